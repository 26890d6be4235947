"""L2A: learning to adapt by gradient (Nagabandi et al., ICLR 2019: GrBAL), planning by MPPI.

    python -m baselines.l2a --env point-fwd-bwd

One dynamics net f serves all tasks, because a gradient step on the last L transitions makes it the
net of the task at hand. Its weights theta are trained for exactly that: to be good after the step.

    adapt   theta' = theta - alpha grad_theta loss(last L steps)   (GrBAL, Sec. 4), from theta anew
            at every env step; every episode that is played gets its own theta'
    plan    MPPI over H actions in f_theta' (PDDM, Nagabandi et al. 2019, Sec. 3.2); take the first
    learn   every `--fit-every` env steps: theta <- Adam on loss(theta'(L past steps); K steps that
            follow them), with the gradient through the inner step (second order, MAML)

    last L steps --one gradient step--> theta' --f_theta'(o, a) -> (r, o' - o)--> MPPI --> action

    symbol        here                        shape
    h             tokens, mask, obs           [L, n, D], [L, n], [n, O]; contract: rollouts.py
    theta         AdaptiveModel.theta         w [1, in, out], b [1, 1, out] per layer
    theta'        AdaptiveModel.adapt         w [n, in, out], b [n, 1, out] per layer
    alpha         inner_rate                  on standardised data
    mu (PDDM)     Mppi.mean                   [n, H, A]

The reward is predicted, not computed: the env's own would tell the hidden task. No task id reaches
training either: windows across a switch stay in, as nobody can see them.
Axis letters: n episodes or windows, T time, N candidates, H horizon, O, A, D as in rollouts.py.
"""

import time
from contextlib import closing

import torch
import torch.nn as nn
import torch.nn.functional as F

import checkpoint
import envs
import faults
import m3po
import speed
from checkpoint import Progress
from flags import count, fraction, in_range, natural, positive
from logs import Log, clock
from model import add_statistics, explained, scale, use_statistics
from rollouts import EnvBuffer, take

LOGGED = ("meta_loss", "unadapted_loss")  # of a fit: of the K steps, at theta' and at theta

# ---- flags --------------------------------------------------------------------------------------

SAME = ["fit_every", "model_lr", "reward_weight"]
DEFAULTS = dict(fit_every=250, fit_steps=400, windows=32, K=10, inner_rate=0.3, H=10,
                candidates=500, sigma=0.8, smoothing=0.7, kappa=10.0, eval_every=10)
ANT = dict(kappa=1.0, inner_rate=0.1)
BY_ENV = {"point-fwd-bwd": dict(fit_every=200, K=3, H=5, smoothing=1.0, eval_every=1),
          "ant-fwd-bwd": ANT, "ant-crippled-leg": ANT,
          "walker2d-randomparams": dict(inner_rate=0.1)}


def add_flags(add):
    add("--fit-steps", type=natural, metavar="UPDATES", help="gradient steps on theta per fit")
    add("--windows", type=count, metavar="WINDOWS", help="of L + K steps, per gradient step")
    add("--K", type=count, metavar="STEPS", help="after the L past ones that theta' must predict")
    add("--inner-rate", type=in_range(float, 0), metavar="ALPHA", help="of the inner step")
    add("--H", type=count, metavar="STEPS", help="planned ahead")
    add("--candidates", type=count, metavar="PLANS", help="drawn per env step")
    add("--sigma", type=positive, metavar="STD", help="of the noise on the mean plan")
    add("--smoothing", type=fraction, metavar="BETA",
        help="of fresh noise per planned step, the rest is the step before's; 1 is none")
    add("--kappa", type=positive, metavar="RATE",
        help="a plan of predicted return S weighs exp(kappa S)")


# ---- the net that adapts ------------------------------------------------------------------------


def rows_ahead(D_env, rows, K):
    """The K rows from absolute rows [n] on, [K, n], and a mask that is True as far as their
    episodes go and are written. The first always is."""
    steps = torch.arange(K, device=D_env.device)[:, None]
    ahead = rows + steps
    age = take(D_env.age, (ahead % D_env.capacity).flatten()).view(ahead.shape)
    return ahead, (ahead < D_env.total) & (age == age[0] + steps)


class AdaptiveModel(nn.Module):
    """f_theta: (o, a) -> (r, o' - o), all standardised by D_env's statistics. Three verbs: `adapt`
    to a window, `predict` with the weights that gives, `fit` theta so that adapting helps."""

    def __init__(self, obs_dim, act_dim, widths=(128,) * 3, inner_rate=0.3, lr=1e-3,
                 reward_weight=None, angles=()):
        """angles: see model.scale. reward_weight: beside 1 per observation. None: as much as all
        observations, without which the inner step follows them and does not find the task."""
        super().__init__()
        O, A = obs_dim, act_dim
        self.obs_dim, self.act_dim, self.inner_rate = O, A, inner_rate
        sizes = [O + A + len(angles), *widths, O + 1]
        uniform = lambda *shape, fan: nn.Parameter(torch.empty(shape).uniform_(-1, 1) / fan**0.5)
        self.theta = nn.ParameterList(  # w, b, w, b, ...
            uniform(1, rows, o, fan=i) for i, o in zip(sizes, sizes[1:]) for rows in (i, 1))
        add_statistics(self, O, A, angles)
        weight = torch.ones(O + 1)
        weight[0] = O if reward_weight is None else reward_weight
        self.register_buffer("weight", weight / weight.sum())
        self.optimizer = torch.optim.Adam(self.theta.parameters(), lr=lr)

    use_statistics = use_statistics

    def forward(self, weights, x):
        """f [n, T, O + 1] of x [n, T, O + A]; each of the n has its own weights."""
        *hidden, last = zip(weights[::2], weights[1::2])
        for w, b in hidden:
            x = F.silu(torch.baddbmm(b, x, w))
        return torch.baddbmm(last[1], x, last[0])

    def predict(self, weights, obs, actions):
        """r [n, T] and o' [n, T, O] in their own units, of obs [n, T, O], actions [n, T, A]."""
        x = torch.cat([obs, actions], -1)
        x = scale(x, self.token_mean, self.token_std, self.angles)
        y = self(weights, x) * self.target_std + self.target_mean
        return y[..., 0], obs + y[..., 1:]

    def pairs(self, tokens, next_obs):
        """Inputs [n, T, O + A and a cosine per angle] and targets [n, T, O + 1], standardised, of
        tokens [T, n, D]."""
        y = torch.cat([tokens[..., -1:], next_obs - tokens[..., :self.obs_dim]], -1)
        x = scale(tokens[..., :-1], self.token_mean, self.token_std, self.angles)
        return x.transpose(0, 1), ((y - self.target_mean) / self.target_std).transpose(0, 1)

    def loss(self, weights, tokens, next_obs, mask):
        """Mean weighted squared error [n] over the steps where mask [T, n] is True; 0 where none
        is."""
        x, y = self.pairs(tokens, next_obs)
        error = ((self(weights, x) - y) ** 2 * self.weight).sum(-1)  # [n, T]
        return torch.where(mask.T, error, 0).sum(1) / mask.sum(0).clamp(min=1)

    def weights(self, n):
        """theta n times over, at no memory."""
        return [p.expand(n, *p.shape[1:]) for p in self.theta]

    def adapt(self, tokens, mask, obs, second_order=False):
        """theta' [n, ...]: one gradient step from theta on each window [L, n, D], [L, n] of its
        own. obs [n, O] is o_t, which the newest token led to. An empty window leaves theta.
        second_order: what is computed from theta' has its full gradient in theta."""
        theta = self.weights(len(obs))
        if len(tokens) == 0 or self.inner_rate == 0:  # L = 0: the control that cannot adapt
            return theta
        next_obs = torch.cat([tokens[1:, :, :self.obs_dim], obs[None]])
        # No row's loss knows another's weights: the gradient of the sum is n gradients at once.
        loss = self.loss(theta, tokens, next_obs, mask).sum()
        gradient = torch.autograd.grad(loss, theta, create_graph=second_order)
        return [p - self.inner_rate * g for p, g in zip(theta, gradient)]

    def meta_loss(self, D_env, rows, K):
        """LOGGED, of windows that adapt on the L steps before absolute rows [n] and are scored on
        those of the K from there on that are not in the hold-out.
        No window crosses an episode's end; one may cross a task switch."""
        tokens, mask = D_env.window(rows)
        ahead, scored = rows_ahead(D_env, rows, K)
        future = D_env.gather(ahead, scored)
        slots = (torch.where(scored, ahead, 0) % D_env.capacity).flatten()
        next_obs = take(D_env.next_obs, slots).view(*ahead.shape, -1)
        scored = scored & ~take(D_env.holdout, slots).view(ahead.shape)
        theta_after = self.adapt(tokens, mask, future[0, :, :self.obs_dim], second_order=True)
        with torch.no_grad():
            before = self.loss(self.weights(len(rows)), future, next_obs, scored).mean()
        return self.loss(theta_after, future, next_obs, scored).mean(), before

    def fit(self, D_env, steps, windows, K):
        """`steps` Adam steps on theta; returns LOGGED of each, [steps] tensors."""
        self.use_statistics(D_env.statistics())
        rows = D_env.rows_or_all(holdout=False)
        losses = []
        for _ in range(steps):
            picked = take(rows, torch.randint(len(rows), (windows,), device=rows.device))
            loss, before = self.meta_loss(D_env, picked, K)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(torch.stack([loss.detach(), before]))
        return losses

    def validate(self, D_env, most=1_000):
        """The fraction of the variance of reward and observation change that theta' explains, one
        step ahead on rows that theta was never scored on, only adapted to (0 = blind)."""
        rows = D_env.rows_or_all(holdout=True)
        spread = torch.linspace(0, len(rows) - 1, min(most, len(rows)), device=rows.device)
        errors, targets = [], []
        for part in rows[spread.long()].split(50):  # as every row takes a net of its own
            batch = D_env.batch(part)
            weights = self.adapt(batch.tokens[:-1], batch.mask[:-1], batch.split(self.obs_dim)[0])
            x, y = self.pairs(batch.tokens[-1:], batch.next_obs[None])
            errors.append((self(weights, x).detach() - y)[:, 0]), targets.append(y[:, 0])
        fractions = explained((torch.cat(errors) ** 2).mean(0), torch.cat(targets))
        return {name: value.item() for name, value in fractions.items()}


# ---- the planner --------------------------------------------------------------------------------


class Mppi(nn.Module):
    """Acts by MPPI in an AdaptiveModel that it adapts first, n episodes at a time.

    It remembers one thing from step to step: the mean plan. An empty window begins an episode, and
    with it a plan of zeros; so for L = 0 every search starts there.
    """

    def __init__(self, model, terminated_fn, H=10, candidates=500, sigma=0.8, smoothing=0.7,
                 kappa=10.0):
        super().__init__()
        self.model, self.terminated_fn, self.act_dim = model, terminated_fn, model.act_dim
        self.H, self.candidates, self.sigma = H, candidates, sigma
        self.smoothing, self.kappa = smoothing, kappa
        self.mean = torch.zeros(1, H, self.act_dim)
        self.own_draws = torch.Generator()  # of evaluation, which must leave training's alone

    # The running episode's plan is in the checkpoint. It is no buffer: its n is no fixed size.
    def get_extra_state(self):
        return self.mean

    def set_extra_state(self, mean):
        self.mean = mean.clone()

    def act(self, tokens, mask, obs, deterministic=False):
        """Actions [n, A] in [-1, 1] for windows [L, n, D], [L, n] and obs [n, O]: the first of the
        plan. deterministic (evaluation): with random numbers that are the same in every call."""
        with torch.inference_mode(False), torch.enable_grad():  # evaluation allows no gradient
            weights = self.model.adapt(tokens.clone(), mask.clone(), obs.clone())
        with torch.no_grad():
            new, mean = ~mask.any(0), self.mean.to(obs.device)
            if len(mean) != len(obs):
                mean = obs.new_zeros(len(obs), self.H, self.act_dim)
            if deterministic and new.all():
                self.own_draws.manual_seed(0)
            shape = len(obs), self.candidates, self.H, self.act_dim
            noise = (torch.randn(shape, generator=self.own_draws).to(obs.device) if deterministic
                     else torch.randn(shape, device=obs.device))
            mean = self.plan(weights, torch.where(new[:, None, None], 0.0, mean), obs, noise)
            self.mean = torch.cat([mean[:, 1:], mean[:, -1:]], 1)  # a step later; PDDM's code
            return mean[:, 0].clone()

    def plan(self, weights, mean, obs, noise):
        """The next mean plan [n, H, A] from the last (PDDM, eqs. 4-5), with standard normal noise
        u [n, N, H, A]:  a_t = mean_t + n_t,  n_t = beta sigma u_t + (1 - beta) n_{t-1},  n_{-1} = 0
                         mean <- sum_k w_k a^k,  w = softmax(kappa S)."""
        smooth, n_t = [], torch.zeros_like(noise[:, :, 0])
        for u in noise.unbind(2):
            n_t = self.smoothing * self.sigma * u + (1 - self.smoothing) * n_t
            smooth.append(n_t)
        plans = (mean[:, None] + torch.stack(smooth, 2)).clamp(-1, 1)
        w = torch.softmax(self.kappa * self.score(weights, obs, plans), 1)  # [n, N]
        return (w[:, :, None, None] * plans).sum(1)

    def score(self, weights, obs, plans):
        """S [n, N]: the rewards that theta' predicts for plans [n, N, H, A] from obs [n, O], summed
        up to a predicted termination. What is not finite weighs nothing beside what is."""
        obs = obs[:, None].expand(-1, plans.shape[1], -1)
        total = obs.new_zeros(plans.shape[:2])
        alive = torch.ones_like(total, dtype=torch.bool)
        for actions in plans.unbind(2):
            reward, obs = self.model.predict(weights, obs, actions)
            total = total + torch.where(alive, reward, 0.0)
            alive = alive & ~self.terminated_fn(obs)
        return torch.where(torch.isfinite(total), total, -1e9)


# ---- the run ------------------------------------------------------------------------------------


def main(args, env, state=None):
    """Returns the number of the signal that stopped it, or None."""
    players = m3po.make_players(args, lambda: build(args, env, "cpu"))  # first: it forks
    speed.set_threads(args)
    cost = planning_cost(args, env)
    policy, D_env, progress = begin(args, env, state)
    log = Log(args, env, progress)
    log.say(cost)
    save = lambda: checkpoint.save(args, progress, policy=policy, D_env=D_env)

    with (closing(players), faults.StopSignals() as stop,
          faults.saved_first(args, progress, policy, save), closing(log)):
        obs = checkpoint.replay(env, progress, args.seed)
        for epoch in range(progress.epoch + 1, args.N + 1):
            while progress.step < epoch * args.E and not stop.received:
                learning, losses = progress.step >= args.warmup, []
                if learning and (progress.step - args.warmup) % args.fit_every == 0:
                    with clock(progress, "fit"):
                        losses = policy.model.fit(D_env, args.fit_steps, args.windows, args.K)
                        progress.fit = policy.model.validate(D_env)
                with clock(progress, "env"):
                    action = m3po.act(policy, D_env, obs, learning)  # adapts, then plans
                    obs = m3po.real_step(env, D_env, progress, args, obs, action)
                if losses:
                    progress.note(losses)
                log.step()
            faults.check_finite(progress, policy, args.E)
            if progress.step == epoch * args.E:
                log.finish_epoch(policy, players, {})
                checkpoint.keep_best(progress, policy=policy)
            if stop.received or epoch % args.checkpoint_every == 0 or epoch == args.N:
                save()
            if stop.received:
                return stop.received
        log.end()


def begin(args, env, state):
    """Agent, D_env and Progress: new, or as the checkpoint has them."""
    torch.manual_seed(args.seed)
    policy = build(args, env, args.device)
    capacity = min(args.N * args.E, args.env_capacity)
    D_env = EnvBuffer(capacity, policy.model.obs_dim, policy.act_dim, args.L, args.device)
    progress = Progress(torch.zeros(args.E, len(LOGGED), device=args.device), LOGGED)
    if state is not None:
        checkpoint.restore(state, progress, policy=policy, D_env=D_env)
    return policy, D_env, progress


def build(args, env, device):
    """The agent, untrained."""
    O, A = env.observation_space.shape[0], env.action_space.shape[0]
    model = AdaptiveModel(O, A, (args.width,) * 3, args.inner_rate, args.model_lr,
                          args.reward_weight, args.angles)
    return Mppi(model, envs.terminated_fn(env), args.H, args.candidates, args.sigma,
                args.smoothing, args.kappa).to(device)


def planning_cost(args, env):
    """A line about how long planning takes, measured with an agent that is then thrown away."""
    agent, seconds = build(args, env, args.device), []
    for n in (1, 1, max(1, args.eval_episodes)):  # the first is slower
        zeros = torch.zeros(max(args.L, 1), n, agent.model.token_mean.numel(), device=args.device)
        start = time.perf_counter()
        agent.act(zeros[:args.L], zeros[:args.L, :, 0] > 0, zeros[0, :, :agent.model.obs_dim]).cpu()
        seconds.append(time.perf_counter() - start)
    return (f"planning     {seconds[1] * 1e3:.0f} ms per env step; an evaluation up to "
            f"{seconds[2] * envs.time_limit(env):,.0f} s on one core")


def load(folder, device="cpu"):
    """The trained agent of a run folder, as m3po.load returns it: (policy, model, env, args)."""
    agent, env, args = m3po.open_agent(folder, "l2a")
    policy = build(args, env, device)
    policy.load_state_dict(agent["policy"])
    return policy, policy.model, env, args


if __name__ == "__main__":
    faults.run("l2a", main, *m3po.parse_args(method="l2a"))
