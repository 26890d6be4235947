"""GHP-MDP: planning under a latent inferred by gradient steps (Perez et al., 2020, Algorithm 1).

    python -m baselines.ghp_mdp --env point-fwd-bwd

One model serves all tasks: p_b(r, o' | o, a, z), an ensemble of B Gaussian nets that are told the
task by a latent z. Which task it is, the last L transitions must say. There is no encoder:

    infer   q(z) = N(mu, sigma), from the prior N(0, I), by J gradient steps on the ELBO of the
            window, theta frozen; again from the prior at every env step
    plan    CEM over H actions in the ensemble, z ~ q(z) held over the horizon; take the first one
    learn   every --fit-every env steps (once per epoch): infer z for each row of a minibatch just
            so, then move theta under it

    last L transitions --J gradient steps--> q(z) --z--> CEM in p_b(r, o' | o, a, z) --> action

    symbol      here                          shape
    h           tokens, mask, obs             [L, n, D], [L, n], [n, O]; contract: rollouts.py
    q(z)        LatentModel.infer             mu, sigma [n, Z]
    p_b         LatentModel.predict           mean, log-variance [B, n, O + 1] of (r, o' - o)
    plan        Planner.plan                  [n, H, A]

Ours, as tasks switch unseen inside an episode: the original keeps one free latent per task instance
and learns it along with theta. Here no instance is known, so a window of L steps stands for one.
The KL to the prior stays in at acting time: what left the window is forgotten.
"""

from contextlib import closing

import torch
import torch.nn as nn

import checkpoint
import envs
import faults
import speed
from checkpoint import Progress
from flags import build_parser, count, positive
from logs import Log, clock
from m3po import act, make_players, open_agent, parse_args, real_step
from model import MetaModel, explained, gaussian_nll
from rollouts import EnvBuffer

# Flags of M3PO that mean the same here, and this file's own (flags.py).
SAME = "B z_dim fit_every model_lr model_decay model_batch beta_nll reward_weight compile".split()
DEFAULTS = dict(fit_every=1_000, fit_steps=300, model_batch=64, J=10, infer_rate=0.3, horizon=15,
                candidates=200, elites=20, std=1.0, eval_every=20)
BY_ENV = {"point-fwd-bwd": dict(N=10, fit_every=200, fit_steps=200, model_lr=3e-3, horizon=5,
                               eval_every=2),
          "ant-fwd-bwd": dict(std=0.5), "ant-crippled-leg": dict(std=0.5)}
LOGGED = ("model_loss",)  # mean over the gradient steps of a fit
AT_ONCE = 5  # episodes whose plans are scored together: 50 leave a core's cache, 1.6 times as slow


def add_flags(add):
    add("--fit-steps", type=count, metavar="STEPS", help="gradient steps of theta per fit, each on"
        " --model-batch windows")
    add("--J", type=count, metavar="STEPS", help="gradient steps of q(z) per inference")
    add("--infer-rate", type=positive, metavar="RATE", help="Adam step size of these")
    add("--horizon", type=count, metavar="STEPS", help="planned ahead")
    add("--candidates", type=count, metavar="PLANS", help="per CEM iteration and episode")
    add("--elites", type=count, metavar="PLANS", help="of these that the next iteration goes by")
    add("--std", type=positive, metavar="STD", help="of the noise that a search starts with")


def main(args, env, state=None):
    """Algorithm 1, for tasks that switch unseen. Returns the number of the signal that stopped it,
    or None."""
    if args.elites > args.candidates:
        build_parser("ghp_mdp").refuse("elites", f"{args.elites} of {args.candidates} candidates")
    players = make_players(args, lambda: build(args, env, "cpu"))  # first, for it forks
    speed.set_threads(args)
    planner, D_env, progress = begin(args, env, state)
    if speed.pays(args, args.horizon) and speed.compiler_works(args.device):
        speed.compile_methods(planner.model, "step")
        if args.device == "cpu":  # as evaluation's is; other processes play their share eager
            speed.compile_methods(players.own.policy.model, "step")
    log = Log(args, env, progress)
    save = lambda: checkpoint.save(args, progress, policy=planner, D_env=D_env)

    with (closing(players), faults.StopSignals() as stop,
          faults.saved_first(args, progress, planner, save), closing(log)):
        obs = checkpoint.replay(env, progress, args.seed)
        for epoch in range(progress.epoch + 1, args.N + 1):
            while progress.step < epoch * args.E and not stop.received:
                learning, losses = progress.step >= args.warmup and len(D_env) > 0, []
                if learning and (progress.step - args.warmup) % args.fit_every == 0:
                    with clock(progress, "fit"):
                        losses = [planner.model.fit(D_env, args.fit_steps, args.model_batch)]
                        progress.fit = planner.model.validate(D_env)
                with clock(progress, "rollouts"):  # of plans
                    action = act(planner, D_env, obs, learning)
                with clock(progress, "env"):
                    obs = real_step(env, D_env, progress, args, obs, action)
                if losses:
                    progress.note(losses)
                log.step()
            faults.check_finite(progress, planner, args.E)
            if progress.step == epoch * args.E:
                log.finish_epoch(planner, players, {})
                checkpoint.keep_best(progress, policy=planner)
            if stop.received or epoch % args.checkpoint_every == 0 or epoch == args.N:
                save()
            if stop.received:
                return stop.received
        log.end()


def begin(args, env, state):
    """Planner with its model, D_env and progress: new, or as the checkpoint has them."""
    torch.manual_seed(args.seed)
    planner = build(args, env, args.device)
    capacity = min(args.N * args.E, args.env_capacity)
    O, A = planner.model.obs_dim, planner.act_dim
    D_env = EnvBuffer(capacity, O, A, args.L, args.device)
    progress = Progress(torch.zeros(args.E, len(LOGGED), device=args.device), LOGGED)
    if state is not None:
        checkpoint.restore(state, progress, policy=planner, D_env=D_env)
    return planner, D_env, progress


def build(args, env, device):
    """The planner with its model, untrained."""
    O, A = env.observation_space.shape[0], env.action_space.shape[0]
    model = LatentModel(O, A, args.B, (args.width,) * 2, args.z_dim, args.J, args.infer_rate,
                        lr=args.model_lr, weight_decay=args.model_decay, beta_nll=args.beta_nll,
                        reward_weight=args.reward_weight, angles=args.angles)
    return Planner(model, envs.terminated_fn(env), args.horizon, args.candidates, args.elites,
                   args.std).to(device)


def load(folder, device="cpu"):
    """The trained agent of a run folder, as m3po.load gives it: (policy, None, env, args)."""
    agent, env, args = open_agent(folder, "ghp_mdp")
    planner = build(args, env, device)
    planner.load_state_dict(agent["policy"])
    return planner, None, env, args


# ---- the method ---------------------------------------------------------------------------------


def normal(shape, generator, device):
    """Standard normal numbers; a generator is of the CPU, and its numbers are the same anywhere."""
    if generator is None:
        return torch.randn(shape, device=device)
    return torch.randn(shape, generator=generator).to(device)


class LatentModel(nn.Module):
    """p_b(r, o' | o, a, z) for B members, and q(z) for windows of transitions.

    To the ensemble z is more dimensions of the action. The members share z: their mean
    log-likelihood is what q is fitted to.
    """

    def __init__(self, obs_dim, act_dim, members=3, widths=(200, 200), z_dim=5, J=10, rate=0.3,
                 **kwargs):
        """J, rate: Adam steps of `infer` and their size. A rate of 0.1 leaves q at the prior.
        kwargs: of MetaModel (learning rate, beta-NLL, reward weight)."""
        super().__init__()
        self.obs_dim, self.act_dim, self.z_dim, self.J, self.rate = obs_dim, act_dim, z_dim, J, rate
        self.ensemble = MetaModel(obs_dim, act_dim + z_dim, members, widths, token_dim=0, **kwargs)

    def use_statistics(self, statistics):
        """Standardise by D_env.statistics() from now on; z is standard normal as it is."""
        n, z = self.obs_dim + self.act_dim, self.z_dim
        for name, neutral in (("token_mean", 0.0), ("token_std", 1.0)):
            value = statistics[name]
            padded = torch.cat([value[:n], value.new_full((z,), neutral), value[n:]])
            statistics = statistics | {name: padded}
        self.ensemble.use_statistics(statistics)

    def predict(self, obs, actions, z):
        """Mean, log-variance [B, n, O + 1] of the standardised (r, o' - o), for raw obs [n, O],
        actions [n, A] and z [n, Z], or with a leading axis of members."""
        return self.ensemble.predict(None, None, self.inputs(obs, actions, z))

    def means(self, obs, actions, z):
        """As predict, but the mean alone, which planning goes by."""
        return self.ensemble.net(None, None, self.inputs(obs, actions, z))[..., :self.obs_dim + 1]

    def step(self, obs, actions, z):
        """r [B, n], -inf where something is not finite, and o' [B, n, O]: the means of each member
        for obs and z of its own [B, n, ...] and actions [n, A]."""
        mean = self.means(obs, actions.expand(len(obs), -1, -1), z)
        y = mean * self.ensemble.target_std + self.ensemble.target_mean
        return torch.where(torch.isfinite(y).all(-1), y[..., 0], -torch.inf), obs + y[..., 1:]

    def inputs(self, obs, actions, z):
        """As the ensemble reads them."""
        return self.ensemble.standardise_step(obs, torch.cat([actions, z], -1))

    def transitions(self, tokens, mask, obs):
        """Tokens [T, n, D], mask [T, n] and the obs [n, O] after the last, as o [T, n, O],
        a [T, n, A] and standardised targets y [T, n, O + 1]; 0 in masked slots."""
        tokens = torch.where(mask[..., None], tokens, 0.0)
        o, a, r = tokens.split([self.obs_dim, self.act_dim, 1], -1)
        next_o = torch.cat([o, obs[None]])[1:]  # o' of a token is the o of the next
        y = torch.cat([r, next_o - o], -1)
        return o, a, (y - self.ensemble.target_mean) / self.ensemble.target_std

    # ---- q(z) ---------------------------------------------------------------------------------

    def elbo(self, o, a, y, mask, mu, log_sigma, noise):
        """sum_t log p(r_t, o_{t+1} | o_t, a_t, z) - KL(q || N(0, I)) [n] with z = mu + sigma noise.

        log p is the mean over the members, the reward weighing as much as all observations: as in
        the loss, or q would describe the noise of O observations and leave the reward to chance.
        """
        T, n = mask.shape
        z = (mu + log_sigma.exp() * noise).expand(T, n, -1)  # one z for the whole window
        mean, logvar = self.predict(*(t.flatten(0, 1) for t in (o, a, z)))
        weight = self.ensemble.weight * y.shape[-1]  # 1 on average
        nll = (gaussian_nll(mean, logvar, y.flatten(0, 1)) * weight).sum(-1).mean(0)  # [T n]
        kl = 0.5 * (mu**2 + torch.exp(2 * log_sigma) - 1) - log_sigma
        return -torch.where(mask, nll.view(T, n), 0.0).sum(0) - kl.sum(-1)

    def infer(self, tokens, mask, obs, generator=None):
        """q(z) of windows: mu, sigma [n, Z], after J Adam steps from the prior up the ELBO. Adam
        works per number, so no row knows of another. An empty window leaves the prior."""
        n = len(obs)
        mu, log_sigma = obs.new_zeros(2, n, self.z_dim).unbind()
        if len(tokens) == 0:  # L = 0: the control, blind
            return mu, log_sigma.exp()
        with torch.inference_mode(False), torch.enable_grad():  # evaluation allows no gradient
            mask = mask.clone()
            o, a, y = self.transitions(tokens.clone(), mask, obs.clone())
            mu, log_sigma = (o.new_zeros(n, self.z_dim, requires_grad=True) for _ in range(2))
            adam = torch.optim.Adam([mu, log_sigma], lr=self.rate)
            for _ in range(self.J):
                noise = normal(mu.shape, generator, mu.device)
                elbo = self.elbo(o, a, y, mask, mu, log_sigma, noise)
                mu.grad, log_sigma.grad = torch.autograd.grad(-elbo.sum(), (mu, log_sigma))
                adam.step()
            return mu.detach(), log_sigma.detach().exp()

    # ---- theta --------------------------------------------------------------------------------

    def loss(self, batch, scored):
        """beta-NLL of the transitions of a Batch under z ~ q(z | its window).

        scored [L + 1, n]: which of its tokens count: window *and* row. Then theta climbs the sum
        that q has climbed, each term weighed by beta-NLL. Scored on the row alone, theta is never
        asked to explain a window by the z that was fitted to it, and z stays noise:
        docs/DEVIATIONS.md.
        """
        mu, sigma = self.infer(batch.tokens[:-1], batch.mask[:-1], batch.split(self.obs_dim)[0])
        z = (mu + sigma * torch.randn_like(mu)).expand(*scored.shape, -1)
        o, a, y = self.transitions(batch.tokens, batch.mask, batch.next_obs)
        o, a, z, y = (t[scored] for t in (o, a, z, y))  # [transitions, ...]
        return self.ensemble.loss(None, None, self.inputs(o, a, z), y)

    def fit(self, D_env, steps, batch_size):
        """theta <- `steps` Adam steps on minibatches of D_env; returns the mean loss [1]."""
        self.use_statistics(D_env.statistics())
        rows = D_env.rows_or_all(holdout=False)
        losses = []
        for _ in range(steps):
            picked = rows[torch.randint(len(rows), (batch_size,), device=rows.device)]
            batch = D_env.batch(picked)
            # A row held out stays so in the windows of the others.
            held = D_env.holdout[(picked - D_env.lags) % D_env.capacity]
            held[-1] = False  # the rows picked; they are held out only if all are
            loss = self.loss(batch, batch.mask & ~held)
            self.ensemble.optimizer.zero_grad()
            loss.backward()
            self.ensemble.optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses).mean()[None]

    @torch.no_grad()
    def validate(self, D_env, most=1_000):
        """The fraction of the variance of reward and observation change that the ensemble's mean
        explains at z = mu, on rows that theta never was fitted to (0 = blind)."""
        rows = D_env.rows_or_all(holdout=True)
        spread = torch.linspace(0, len(rows) - 1, min(most, len(rows)), device=rows.device)
        batch = D_env.batch(rows[spread.long()])
        obs, actions, _ = batch.split(self.obs_dim)
        mu, _ = self.infer(batch.tokens[:-1], batch.mask[:-1], obs)
        y = self.transitions(batch.tokens[-1:], batch.mask[-1:], batch.next_obs)[2][0]
        mean = self.predict(obs, actions, mu)[0].mean(0)
        fractions = explained(((mean - y) ** 2).mean(0), y)
        return {name: fraction.item() for name, fraction in fractions.items()}


class Planner(nn.Module):
    """Acts by CEM in a LatentModel, n episodes at a time.

    It remembers one thing from step to step: the plan, from which the next search starts. An empty
    window begins an episode, and with it a plan of zeros; so for L = 0 every search starts there.
    """

    def __init__(self, model, terminated_fn, H=15, candidates=200, elites=20, std=1.0,
                 iterations=3, alpha=0.1):
        """H: steps looked ahead. std: that a search starts with; smaller ones turn too slowly after
        a switch. alpha: of mean and std that a CEM iteration keeps."""
        super().__init__()
        self.model, self.terminated_fn, self.act_dim = model, terminated_fn, model.act_dim
        self.H, self.candidates, self.elites = H, candidates, elites
        self.iterations, self.alpha, self.std = iterations, alpha, std
        self.mean = torch.zeros(0, H, model.act_dim)  # [n, H, A], the plan
        self.own_draws = torch.Generator()  # of evaluation, which must leave training's alone

    def get_extra_state(self):
        """The plan goes into checkpoints, so that a resumed episode goes on as planned."""
        return self.mean

    def set_extra_state(self, mean):
        self.mean = mean

    @torch.no_grad()
    def act(self, tokens, mask, obs, deterministic=False):
        """Actions [n, A] in [-1, 1] for windows [L, n, D], [L, n] and obs [n, O]: the first of the
        plan. deterministic (evaluation): with random numbers that are the same in every call."""
        new = ~mask.any(0)
        if len(self.mean) != len(obs):
            self.mean = obs.new_zeros(len(obs), self.H, self.act_dim)
        mean = torch.where(new[:, None, None], 0.0, self.mean.to(obs.device))
        generator = self.own_draws if deterministic else None
        if deterministic and new.all():
            self.own_draws.manual_seed(0)
        mu, sigma = self.model.infer(tokens, mask, obs, generator)
        members = self.model.ensemble.members
        noise = normal((members, *mu.shape), generator, mu.device)
        mean = self.plan(mean, obs, mu + sigma * noise, generator)
        self.mean = torch.cat([mean[:, 1:], torch.zeros_like(mean[:, :1])], 1)  # a step later
        return mean[:, 0].clone()

    def plan(self, mean, obs, z, generator=None):
        """The plan [n, H, A] after CEM from `mean`: each iteration draws candidates from a Gaussian
        and moves it to the best of them (PETS; theirs are truncated where these are clamped)."""
        std = torch.full_like(mean, self.std)
        for _ in range(self.iterations):
            noise = normal((len(mean), self.candidates, *mean.shape[1:]), generator, mean.device)
            plans = (mean[:, None] + std[:, None] * noise).clamp(-1, 1)  # [n, N, H, A]
            best = self.score(obs, z, plans).topk(self.elites, 1).indices
            elites = plans.take_along_dim(best[..., None, None], 1)
            mean = torch.lerp(elites.mean(1), mean, self.alpha)
            std = torch.lerp(elites.std(1, correction=0), std, self.alpha)
        return mean

    def score(self, obs, z, plans):
        """Predicted return [n, N] of plans [n, N, H, A] from obs [n, O]: the sum of H rewards,
        averaged over particles, which are a member and its z [B, n, Z] each.

        After a predicted termination nothing is earned or lost. What is not finite costs most.
        """
        blocks = zip(obs.split(AT_ONCE), z.split(AT_ONCE, 1), plans.split(AT_ONCE))
        return torch.cat([self.score_block(*block) for block in blocks])

    def score_block(self, obs, z, plans):
        (B, n, _), N = z.shape, plans.shape[1]
        each = lambda t: t[..., None, :].expand(B, n, N, -1).flatten(1, 2)  # [B, n N, ...]
        obs, z = each(obs), each(z)
        total, alive = obs.new_zeros(B, n * N), obs.new_ones(B, n * N, dtype=torch.bool)
        for actions in plans.flatten(0, 1).unbind(1):  # H times [n N, A]
            reward, obs = self.model.step(obs, actions, z)
            total += torch.where(alive, reward, 0.0)
            alive &= ~self.terminated_fn(obs)
        return total.mean(0).view(n, N)


if __name__ == "__main__":
    faults.run("ghp_mdp", main, *parse_args(method="ghp_mdp"))
