"""PEARL: probabilistic embeddings for actor-critic meta-RL (Rakelly et al., ICML 2019).

    python -m baselines.pearl                                     # the toy: a minute
    python -m baselines.pearl --env halfcheetah-fwd-bwd --N 20 --G 10 --width 128

The idea: guess the hidden task, z, from recent transitions, each of which is one piece of evidence;
act and learn by soft actor-critic as if z were part of the observation. No model, no recurrence.

    c: last L transitions --encoder, each alone--> L Gaussian factors --product--> q(z | c)
    z ~ q(z | c) --> pi(a | o, z), Q_1 and Q_2(o, z, a)       one MetaPolicy (policy.py), blind to
                                                              history: its observation is (o, z)
    gradient into the encoder: from the loss of Q and the KL to the prior; from pi's never

    paper               here                              shape                  file
    c_n = (s, a, r, s') scale_tokens: (o' - o, o, a, r)   [L, B, O + O + A + 1]  model.py
    c                   the window of h_t                 L of them, masked      rollouts.py
    Psi(z | c_n)        Pearl.encoder                     mean, variance [., Z]  here
    q(z | c), eq. (2)   product_of_gaussians              mean, variance [B, Z]  here
    KL(q || N(0, I))    divergence_from_prior             [B]                    here
    pi, Q, their losses Pearl.sac                                                policy.py

Here the task switches within an episode, unseen, so c is what M3PO sees as well: a sliding window,
the last L steps of this episode, and q is computed anew at each step. PEARL multiplies all evidence
of a task, known to be one: precisions only grow, and after a switch the old task would outvote the
new. In the original z is drawn once per episode, here at each step; evaluation takes q's mean.

A row of D_env is learned from with the c before it, the window of h_t, of which its own transition
is no part: an encoder that sees r_t would teach Q to read r_t off z. Each time a row is learned
from, a fresh half of that window is c: with the same c each time, z could come to say which row it
is. The same z stands in the target, at o', as in the original. Deviations, with their reasons:
docs/DEVIATIONS.md.
"""

from contextlib import closing

import torch
import torch.nn as nn
import torch.nn.functional as F

import checkpoint
import faults
import speed
from checkpoint import Progress
from flags import fraction, in_range
from logs import Log, clock
from m3po import act, make_players, open_agent, parse_args, real_step
from model import HistoryNet, add_statistics, scale_tokens, use_statistics
from policy import LOGGED, MetaPolicy
from rollouts import Batch, EnvBuffer

# The command line: flags.py. L is the number of transitions in c, lineage: oyster, PEARL's code.
SAME = "G z_dim batch_size lr tau alpha target_entropy layer_norm reward_scale compile".split()
DEFAULTS = dict(kl_weight=0.1, keep=0.5)  # lineage; ours
BY_ENV = {}
REFRESH_EVERY = 250  # env steps, as often as M3PO takes new statistics on robots


def add_flags(add):
    add("--kl-weight", type=in_range(float, 0), metavar="WEIGHT",
        help="of KL(q || N(0, I)) beside Q's loss; 1 leaves nothing of the task in z")
    add("--keep", type=fraction, metavar="FRACTION",
        help="of the steps of c that a row is learned with, drawn anew each time; 1 is all")


def main(args, env, state=None):
    """Off-policy PEARL in a single stream of tasks. Returns the number of the signal that stopped
    it, or None."""
    players = make_players(args, lambda: build(args, env, "cpu"))  # first, for it forks
    speed.set_threads(args)
    policy, D_env, progress = begin(args, env, state)
    if speed.pays(args, args.G) and speed.compiler_works(args.device):
        speed.compile_methods(policy.sac)
        speed.compile_methods(policy, "infer")
    log = Log(args, env, progress)
    save = lambda: checkpoint.save(args, progress, policy=policy, D_env=D_env)

    with (closing(players), faults.StopSignals() as stop,
          faults.saved_first(args, progress, policy, save), closing(log)):
        obs = checkpoint.replay(env, progress, args.seed)
        for epoch in range(progress.epoch + 1, args.N + 1):
            while progress.step < epoch * args.E and not stop.received:
                learning = progress.step >= args.warmup and len(D_env) > 0
                refresh = (progress.step - args.warmup) % min(args.E, REFRESH_EVERY) == 0
                if learning and refresh:
                    policy.use_statistics(D_env.statistics())
                with clock(progress, "env"):
                    action = act(policy, D_env, obs, learning)  # z ~ q(z | c), a ~ pi(a | o, z)
                    obs = real_step(env, D_env, progress, args, obs, action)
                if learning and args.G:
                    with clock(progress, "updates"):
                        batches = D_env.sample(args.G * args.batch_size).minibatches(args.G)
                        progress.note([policy.update(batch) for batch in batches])
                log.step()
            faults.check_finite(progress, policy, args.E)
            if progress.step == epoch * args.E:
                log.finish_epoch(policy, players, {"alpha": policy.sac.log_alpha.exp().item()})
                checkpoint.keep_best(progress, policy=policy)
            if stop.received or epoch % args.checkpoint_every == 0 or epoch == args.N:
                save()
            if stop.received:
                return stop.received
        log.end()


# ---- q(z | c) -----------------------------------------------------------------------------------


def product_of_gaussians(means, variances, mask):
    """Eq. (2): q(z | c), the normalised product of the factors [L, B, Z] where mask [L, B] is True,
    as mean and variance [B, Z]. Precisions add, and weigh the means. The prior N(0, I) is none of
    the factors; it is q where there are none."""
    precisions = mask[..., None] / variances
    total = precisions.sum(0)
    total = torch.where(mask.any(0)[:, None], total, 1.0)
    return (precisions * means).sum(0) / total, 1 / total


def divergence_from_prior(mean, variance):
    """KL(N(mean, variance) || N(0, I)) [B] in nats, for [B, Z]."""
    return 0.5 * (variance + mean**2 - 1 - variance.log()).sum(-1)


class Pearl(nn.Module):
    """Encoder, and SAC on (o, z), with their optimizers. Windows as everywhere: raw tokens
    [L, B, D], mask [L, B], obs [B, O]."""

    def __init__(self, obs_dim, act_dim, widths=(400, 400), z_dim=5, lr=3e-4, kl_weight=0.1,
                 keep=0.5, angles=(), **sac):
        super().__init__()
        O, A = obs_dim, act_dim
        self.obs_dim, self.act_dim, self.z_dim = O, A, z_dim
        self.kl_weight, self.keep = kl_weight, keep
        half = (max(widths[0] // 2, 1),) * 3  # lineage: 3 x 200 beside nets of width 300
        self.encoder = HistoryNet(1, 0, O + len(angles) + O + A + 1, 2 * z_dim, half)  # an MLP
        self.sac = MetaPolicy(O + z_dim, A, token_dim=0, widths=widths, lr=lr, angles=angles, **sac)
        self.encoder_optimizer = torch.optim.Adam(self.encoder.parameters(), lr=lr, fused=True)
        add_statistics(self, O, A, angles)

    def use_statistics(self, statistics):
        """Standardise by D_env.statistics() from now on; z, near its prior, is left as it is."""
        use_statistics(self, statistics)
        O, mean, std = self.obs_dim, self.token_mean, self.token_std
        self.sac.use_statistics({
            "token_mean": torch.cat([mean[:O], mean.new_zeros(self.z_dim), mean[O:]]),
            "token_std": torch.cat([std[:O], std.new_ones(self.z_dim), std[O:]])})

    def infer(self, tokens, mask, obs):
        """q(z | c): mean and variance [B, Z]."""
        L, B = mask.shape
        x = scale_tokens(tokens, obs, self, changes=True)  # o', as what the step has changed
        x = torch.where(mask[..., None], x, 0.0)
        none = tokens[:0], mask[:0]  # the history of a blind net
        mean, spread = self.encoder(*none, x.flatten(0, 1))[0].unflatten(0, (L, B)).chunk(2, -1)
        return product_of_gaussians(mean, F.softplus(spread).clamp(min=1e-7), mask)

    @torch.no_grad()
    def act(self, tokens, mask, obs, deterministic=False):
        """Actions [B, A] in [-1, 1]: of a drawn z, drawn from pi; or tanh of pi's mean at q's."""
        z, variance = self.infer(tokens, mask, obs)
        if not deterministic:
            z = z + variance.sqrt() * torch.randn_like(z)
        no_tokens = obs.new_empty(0, len(obs), len(self.sac.token_mean))
        return self.sac.act(no_tokens, mask[:0], torch.cat([obs, z], -1), deterministic)

    # ---- learning -------------------------------------------------------------------------------

    def context(self, batch):
        """What z may be inferred from, as infer's arguments: some steps of the window of h_t. The
        batch's last token is the row's own and is left out."""
        mask = batch.mask[:-1]
        mask = mask & (torch.rand(mask.shape, device=mask.device) < self.keep)
        return batch.tokens[:-1], mask, batch.split(self.obs_dim)[0]

    def with_z(self, batch, z):
        """The Batch with (o, z) for o and (o', z) for o', and no history."""
        obs, actions, rewards = batch.split(self.obs_dim)
        own = torch.cat([obs, z, actions, rewards[:, None]], -1)
        return Batch(own[None], batch.mask[-1:], torch.cat([batch.next_obs, z], -1),
                     batch.terminated)

    def update(self, batch):
        """One update of encoder, Q, pi, temperature and targets (Rakelly et al., Algorithm 1).
        Returns a tensor of LOGGED and the mean KL."""
        mean, variance = self.infer(*self.context(batch))
        z = mean + variance.sqrt() * torch.randn_like(mean)  # reparametrised: z carries gradient
        kl = divergence_from_prior(mean, variance).mean()
        noise = torch.randn(2, len(z), self.act_dim, device=z.device)

        q_loss, q_mean, td_error = self.sac.critic_loss(self.with_z(batch, z), noise[0])
        self.sac.q_optimizer.zero_grad()
        self.encoder_optimizer.zero_grad()
        (q_loss + self.kl_weight * kl).backward()
        self.sac.q_optimizer.step()
        self.encoder_optimizer.step()

        # pi takes z as a given: its loss would bend z to what pi likes, not to what the task is.
        actor_loss, logp = self.sac.update_actor(self.with_z(batch, z.detach()), noise[1])
        self.sac.update_targets()
        return torch.stack([q_loss.detach(), actor_loss.detach(), q_mean, td_error, -logp.mean(),
                            kl.detach()])


# ---- begin and end of a run ---------------------------------------------------------------------


def build(args, env, device):
    """The agent, untrained."""
    O, A = env.observation_space.shape[0], env.action_space.shape[0]
    return Pearl(O, A, (args.width,) * 2, args.z_dim, args.lr, args.kl_weight, args.keep,
                 args.angles, gamma=args.gamma, tau=args.tau, alpha=args.alpha,
                 target_entropy=args.target_entropy, layer_norm=args.layer_norm,
                 reward_scale=args.reward_scale).to(device)


def begin(args, env, state):
    """Agent, D_env and Progress: new, or as the checkpoint has them."""
    torch.manual_seed(args.seed)
    policy = build(args, env, args.device)
    capacity = min(args.N * args.E, args.env_capacity)
    D_env = EnvBuffer(capacity, policy.obs_dim, policy.act_dim, args.L, args.device)
    logged = (*LOGGED, "z_kl")
    progress = Progress(torch.zeros(args.E, len(logged), device=args.device), logged)
    if state is not None:
        checkpoint.restore(state, progress, policy=policy, D_env=D_env)
    return policy, D_env, progress


def load(folder, device="cpu"):
    """The trained agent of a run folder, as m3po.load returns it: (policy, no model, env, args)."""
    agent, env, args = open_agent(folder, "pearl")
    policy = build(args, env, device)
    policy.load_state_dict(agent["policy"])
    return policy, None, env, args


if __name__ == "__main__":
    faults.run("pearl", main, *parse_args(method="pearl"))
