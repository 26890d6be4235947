"""Where theory and run meet: the measured stand-ins for eps_m and eps_pi (App. A.6).

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
from model import gaussian_nll
from policy import MetaPolicy
from rollouts import slide

DEPTHS = 5
FIELDS = [f"{what}_depth_{d}" for what in ("nll", "rmse_reward", "rmse_obs")
          for d in range(1, DEPTHS + 1)] + ["kl_pi", "eps_m", "eps_pi", "gap_full", "gap_branched"]


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
        clone = MetaPolicy(policy.obs_dim, policy.act_dim, policy.actor.token_dim, widths,
                           policy.actor.z_dim or 5, lr=1e-3,
                           newest=policy.actor.newest).to(D_env.device)
        clone.use_statistics(policy.state_dict())  # which holds them
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


def measure(policy, model, D_env, fit, args, seed):
    """Everything above as one dict of numbers for progress.csv. fit: what the
    last fit found; empty if the model is not (or no longer) fitted."""
    metrics = error_by_depth(model, D_env) if fit else {}
    kl = policy_divergence(policy, D_env, (args.width,) * 2, seed)
    pinsker = lambda divergence: min(1.0, math.sqrt(max(divergence, 0.0) / 2))
    metrics |= {"kl_pi": kl, "eps_pi": pinsker(kl)}
    if fit:
        eps_m = pinsker(fit["nll"] - fit["nll_train"])
        r_max = D_env.tokens[:len(D_env), -1].abs().max().clamp(min=1e-8).item()
        error = (eps_m, metrics["eps_pi"], args.gamma)
        metrics |= {"eps_m": eps_m, "gap_full": float(bounds.full_rollout_gap(*error, r_max)),
                  "gap_branched": float(bounds.branched_rollout_gap(*error, args.k, r_max))}
    return metrics
