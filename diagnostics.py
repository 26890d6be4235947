"""What a run is worth knowing of: honest readings of model and Q, and where theory and run meet.

On whole fresh episodes of the sampled policy, which neither model nor Q ever saw:

    fresh episodes    what the model explains there, what one that sees no history explains, and
                      mean Q beside the soft return that followed the same states and actions

The measured stand-ins for eps_m and eps_pi (App. A.6):

    model error     NLL and root mean squared error by rollout depth, on held-out real segments
    eps_m           sqrt(KL / 2), KL ~ the model's NLL on held-out rows minus that on its own rows
    eps_pi          sqrt(KL / 2), KL(pi_phi || pi_D), pi_D fitted to D_env (Fig. 12)
    C_Th1, C_Th2    the paper's gaps (bounds.py) at these two and the run's gamma, k and largest |r|

Measured: the NLLs, the KL and |r|. Assumed: that the NLL on training rows is the entropy of the
real environment; that Pinsker's TV <= sqrt(KL / 2) is tight; that means over D_env stand for the
maxima of Definitions 1 and 2. So the gaps are what the theory would say of such errors, no
certificate.
eps_m is small for a model that fits neither its own rows nor others, as M2PO's on a direction task:
it compares fits of one model, not models with each other.

Nothing here touches the training's random stream.
"""

import math

import torch

import bounds
import envs
from model import MetaModel, explained, gaussian_nll
from policy import MetaPolicy
from rollouts import EnvBuffer, slide

DEPTHS = 5
EPISODES = 10
FIELDS = ["episodes_q", "episodes_soft_return",
          *(f"{whose}_{what}" for whose in ("episodes", "blind")
            for what in ("nll", "explained_reward", "explained_obs")),
          *(f"{what}_depth_{d}" for what in ("nll", "rmse_reward", "rmse_obs")
            for d in range(1, DEPTHS + 1)), "kl_pi", "eps_m", "eps_pi", "gap_full", "gap_branched"]


@torch.no_grad()
def fresh_episodes(policy, env, env_seeds, L, device):
    """An EnvBuffer of whole episodes, one per seed, in which the policy's actions are sampled. An
    episode that the simulator fails in ends there, as if cut."""
    O = policy.obs_dim
    episodes = EnvBuffer(len(env_seeds) * envs.time_limit(env), O, policy.act_dim, L, device)
    for seed in env_seeds:
        obs, over = env.reset(seed=seed)[0], False
        while not over:
            obs_t = torch.as_tensor(obs, device=device)[None]
            action = policy.act(*episodes.live_window(), obs_t)[0].cpu().numpy()
            next_obs, reward, terminated, truncated, info = env.step(action)
            over = terminated or truncated
            if "fault" not in info:
                episodes.add(obs, action, reward, next_obs, terminated, over)
            obs = next_obs
        episodes.end_episode()
    return episodes


@torch.no_grad()
def q_and_soft_return(policy, episodes):
    """Mean min_i Q_i(a_t, h_t) over the first half of whole episodes, and the mean of what it
    predicts: r_t + gamma (r_{t+1} - alpha log pi(a_{t+1} | h_{t+1}) + gamma (...)), r times the
    policy's reward scale.

    Past an episode's time limit Q itself speaks, which has little weight then: at most
    gamma^(T / 2). log pi is that of another action drawn from the same pi.
    """
    rows = episodes.kept()  # padded to one size, for which the policy is compiled once
    batch = episodes.batch(torch.cat([rows, rows[-1:].expand(episodes.capacity - len(rows))]))
    obs, actions, rewards = batch.split(policy.obs_dim)
    history, alpha = (batch.tokens[:-1], batch.mask[:-1], obs), policy.log_alpha.exp()
    q = policy.q_values(policy.qf, *history, actions).amin(0)
    entropy = -policy.sample(*history, torch.randn_like(actions))[1]
    after = batch.tokens[1:], batch.mask[1:], batch.next_obs
    next_actions, next_logp = policy.sample(*after, torch.randn_like(actions))
    v = policy.q_values(policy.qf, *after, next_actions).amin(0) - alpha * next_logp
    v, bonus = (v * (1 - batch.terminated)).tolist(), (alpha * entropy).tolist()
    rewards = (policy.reward_scale * rewards).tolist()
    n, age = len(rows), episodes.age[:len(rows)].tolist()
    soft, first_half, length = [0.0] * n, [False] * n, 0
    for i in reversed(range(n)):
        last = i + 1 == n or age[i + 1] == 0
        length = age[i] + 1 if last else length
        soft[i] = rewards[i] + policy.gamma * (v[i] if last else soft[i + 1] + bonus[i + 1])
        first_half[i] = 2 * age[i] < length
    first_half = torch.tensor(first_half)
    return q[:n].cpu()[first_half].mean().item(), torch.tensor(soft)[first_half].mean().item()


def blind_model(model, D_env, most=5_000):
    """A model of as many members that sees no history, fitted to the same rows with as many
    gradient steps, up to `most`: what it explains too tells nothing of a hidden task."""
    steps, (net,) = min(most, model.steps_per_row * D_env.total), model.optimizer.param_groups
    widths = [w.shape[1] for w in model.net.w[1:]]
    blind = MetaModel(model.obs_dim, model.act_dim, model.members, widths, token_dim=0,
                      layer_norm=model.net.layer_norm, beta_nll=model.beta_nll,
                      weight_decay=net["weight_decay"], lr=net["lr"], batch_size=model.batch_size,
                      steps_per_row=steps / D_env.total,
                      angles=model.angles.tolist()).to(D_env.device)
    blind.weight.copy_(model.weight)
    blind.fit(D_env)
    return blind


def on_episodes(model, episodes):
    """NLL and explained shares of variance on rows of whole episodes."""
    _, nll, residual, y = model.score(episodes, episodes.kept())
    return {"nll": nll} | explained(residual, y)


@torch.no_grad()
def error_by_depth(model, D_env, most=1_000):
    """Roll the model along held-out real segments with the real actions; depth 1 is one step.

    At depth d the history holds d - 1 imagined tokens, as in a rollout. Returns {name: [DEPTHS]}:
    NLL of the real (r, o') (nats, standardised units), RMSE of the reward (its own unit) and of the
    observation (in standard deviations of each dimension). NaN where no segment is that long.
    """
    rows = D_env.rows(holdout=True)
    slot = lambda row: row % D_env.capacity
    rows = rows[D_env.age[slot(rows)] % D_env.block == 0]  # where a held-out run of steps begins
    rows = rows[rows + DEPTHS <= D_env.total][-most:]
    whole = D_env.age[slot(rows + DEPTHS - 1)] == D_env.age[slot(rows)] + DEPTHS - 1
    rows = rows[whole]
    metrics = {"nll": [], "rmse_reward": [], "rmse_obs": []}
    tokens, mask = D_env.window(rows)
    O = D_env.obs_dim
    obs = D_env.tokens[slot(rows)][:, :O]
    for d in range(DEPTHS):
        real = D_env.tokens[slot(rows + d)]
        actions, reward, next_obs = real[:, O:-1], real[:, -1], D_env.next_obs[slot(rows + d)]
        mean, logvar = model.predict_mean(tokens, mask, obs, actions)  # [E, B, O + 1], standardised
        y = torch.cat([reward[:, None], next_obs - obs], -1)
        y = (y - model.target_mean) / model.target_std
        log_members = -gaussian_nll(mean, logvar, y).sum(-1)
        nll = math.log(len(mean)) - torch.logsumexp(log_members, 0)
        predicted = mean.mean(0) * model.target_std + model.target_mean  # [B, O + 1]
        metrics["nll"].append(nll.mean())
        metrics["rmse_reward"].append((predicted[:, 0] - reward).pow(2).mean().sqrt())
        error = (obs + predicted[:, 1:] - next_obs) / model.token_std[:O]
        metrics["rmse_obs"].append(error.pow(2).mean().sqrt())
        token = torch.cat([obs, actions, predicted[:, :1]], -1)  # the imagined token comes next
        tokens, mask = slide(tokens, mask, token)
        obs = obs + predicted[:, 1:]
    return {f"{name}_depth_{d + 1}": v.item() for name, values in metrics.items()
            for d, v in enumerate(values)}


def policy_divergence(policy, D_env, widths, seed, steps=500, batch_size=256):
    """E[KL(pi_phi || pi_D)] over D_env, nats; pi_D has pi_phi's architecture and is fitted to
    D_env's actions by maximum likelihood (Fig. 12). The tanh leaves the KL as it is."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clone = MetaPolicy(policy.obs_dim, policy.act_dim, policy.token_dim, widths,
                           policy.actor.z_dim or 5, lr=1e-3, newest=policy.actor.newest,
                           changes=policy.changes,
                           angles=policy.angles.tolist()).to(D_env.device)
        clone.use_statistics(dict(policy.named_buffers()))
        for _ in range(steps):
            loss = -clone.log_prob(D_env.sample(batch_size)).mean()
            clone.actor_optimizer.zero_grad()
            loss.backward()
            clone.actor_optimizer.step()
        with torch.no_grad():
            batch = D_env.sample(4_096)
            history = batch.tokens[:-1], batch.mask[:-1], batch.split(policy.obs_dim)[0]
            m, s = policy.distribution(*history)  # means and log-stds [B, A]
            n, q = clone.distribution(*history)
            kl = q - s + (torch.exp(2 * s) + (m - n) ** 2) / (2 * torch.exp(2 * q)) - 0.5
            return kl.sum(-1).mean().item()


def measure(policy, model, D_env, fit, args, env, epoch):
    """Everything above as one dict of numbers for progress.csv. fit: what the last fit found; empty
    if the model is not (or no longer) fitted. env: one of its own, for fresh episodes."""
    with torch.random.fork_rng():
        torch.manual_seed(envs.seeds(args.seed, 4, epoch)[0])
        episodes = fresh_episodes(policy, env, envs.seeds(args.seed, 3, epoch, EPISODES), args.L,
                                  D_env.device)
        q, soft = q_and_soft_return(policy, episodes)
        metrics = {"episodes_q": q, "episodes_soft_return": soft}
        compared = {"episodes": model} if fit else {}
        if fit and model.net.token_dim and not args.oracle:  # else there is nothing to find
            compared["blind"] = blind_model(model, D_env)
        metrics |= {f"{whose}_{name}": value.item() for whose, how in compared.items()
                    for name, value in on_episodes(how, episodes).items()}
    metrics |= error_by_depth(model, D_env) if fit else {}
    kl = policy_divergence(policy, D_env, (args.width,) * 2, envs.seeds(args.seed, 5, epoch)[0])
    pinsker = lambda divergence: min(1.0, math.sqrt(max(divergence, 0.0) / 2))
    metrics |= {"kl_pi": kl, "eps_pi": pinsker(kl)}
    if fit:
        eps_m = pinsker(fit["nll"] - fit["nll_train"])
        r_max = D_env.tokens[:len(D_env), -1].abs().max().clamp(min=1e-8).item()
        error = (eps_m, metrics["eps_pi"], args.gamma)
        metrics |= {"eps_m": eps_m, "gap_full": float(bounds.full_rollout_gap(*error, r_max)),
                  "gap_branched": float(bounds.branched_rollout_gap(*error, args.k, r_max))}
    return metrics
