"""The meta-policy: soft actor-critic on histories (paper Sec. 6, "the policy is implemented as").

    pi_phi(a | h_L)    tanh-squashed diagonal Gaussian, a in [-1, 1]      HistoryNet, 1 member
    Q_1, Q_2 (h_L, a)  twin soft Q-functions and their slow targets       HistoryNet, 2 members each

One update is four functions, one equation each: `critic_loss`, `actor_loss`, `temperature_loss` and
`update_targets`. Adapting to a new task is none of them: the window of the last L tokens moves, and
z is computed from it anew, from zero, at each step. No gradient, no task id, no state carried over.

Axis letters and the history contract: rollouts.py. Lineage: SAC (Haarnoja et al. 2018) as in MBPO.
"""

import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import HistoryNet, add_statistics, scale, scale_tokens, use_statistics

LOG_STD_MIN, LOG_STD_MAX = -10, 2
LOGGED = ("q_loss", "actor_loss", "q_mean", "td_error", "entropy")  # what one update returns


def squashed_log_prob(u, noise, log_std):
    """log pi(tanh u) [B] for u = mean + std * noise: log N(u) minus the log of tanh's slope,
    log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)), which stays finite for large u."""
    logp = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
    return (logp - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)


class MetaPolicy(nn.Module):
    """Policy, twin Q, targets and temperature with their optimizers."""

    def __init__(self, obs_dim, act_dim, token_dim=None, widths=(400, 400), z_dim=5, gamma=0.99,
                 tau=0.005, lr=3e-4, alpha=None, target_entropy=None, layer_norm=False,
                 newest=False, changes=False, reward_scale=1.0, angles=()):
        """token_dim: how much of a token (o, a, r) is seen, None is all.
        alpha: a fixed temperature (1.0 is the paper's objective); None tunes it, from 0.1.
        layer_norm: in Q, which without it runs away upwards (docs/DEVIATIONS.md). newest: see
        HistoryNet; changes: see scale_tokens; angles: see scale. reward_scale: Q is of rewards
        times it."""
        super().__init__()
        O, A = obs_dim, act_dim
        token_dim = O + A + 1 if token_dim is None else token_dim
        self.obs_dim, self.act_dim, self.gamma, self.tau = O, A, gamma, tau
        self.reward_scale = reward_scale
        self.token_dim, self.changes = token_dim, changes and token_dim > 0
        read = token_dim and token_dim + O * self.changes + len(angles)  # see scale_tokens
        seen = O + len(angles)
        self.actor = HistoryNet(1, read, seen, 2 * A, widths, z_dim, newest=newest)
        self.qf = HistoryNet(2, read, seen + A, 1, widths, z_dim, layer_norm, newest)
        self.qf_target = copy.deepcopy(self.qf).requires_grad_(False)
        add_statistics(self, obs_dim, A, angles)
        self.target_entropy = -A / 2 if target_entropy is None else target_entropy  # MBPO
        self.tune_alpha = alpha is None
        self.log_alpha = nn.Parameter(torch.tensor(math.log(0.1 if alpha is None else alpha)))
        adam = lambda params: torch.optim.Adam(params, lr=lr, fused=True)
        self.q_optimizer = adam(self.qf.parameters())
        self.actor_optimizer = adam([*self.actor.parameters(), self.log_alpha])  # nothing in common

    use_statistics = use_statistics

    @torch.no_grad()
    def restandardise(self, D_env, most=1_000):
        """Standardise by D_env's statistics of now. Returns what that does to Q: the root mean
        square of its change on `most` rows of D_env, spread evenly."""
        rows = torch.linspace(D_env.oldest, D_env.total - 1, most, device=D_env.device).long()
        batch = D_env.batch(rows)
        obs, actions, _ = batch.split(self.obs_dim)
        q = lambda: self.q_values(self.qf, batch.tokens[:-1], batch.mask[:-1], obs, actions)
        before = q()
        self.use_statistics(D_env.statistics())
        return (q() - before).square().mean().sqrt().item()

    def standardise(self, tokens, obs):
        return (scale_tokens(tokens, obs, self, self.changes),
                scale(obs, self.token_mean, self.token_std, self.angles))

    # ---- the nets, all fed raw tokens [L, B, D], mask [L, B], obs [B, O] ------------------------

    def distribution(self, tokens, mask, obs):
        """Mean and log-std [B, A] of pi's Gaussian before the tanh."""
        tokens, obs = self.standardise(tokens, obs)
        mean, log_std = self.actor(tokens, mask, obs)[0].chunk(2, -1)
        return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)

    def q_values(self, qf, tokens, mask, obs, actions):
        """[2, B], both Q(a, h)."""
        tokens, obs = self.standardise(tokens, obs)
        return qf(tokens, mask, torch.cat([obs, actions], -1)).squeeze(-1)

    def sample(self, tokens, mask, obs, noise):
        """a = tanh(mean + std * noise) [B, A] and log pi(a | h) [B], both with gradients."""
        mean, log_std = self.distribution(tokens, mask, obs)
        u = mean + log_std.exp() * noise
        return torch.tanh(u), squashed_log_prob(u, noise, log_std)

    @torch.no_grad()
    def act(self, tokens, mask, obs, deterministic=False):
        """Actions [B, A] in [-1, 1]: drawn from pi, or tanh of its mean."""
        mean, log_std = self.distribution(tokens, mask, obs)
        return torch.tanh(mean if deterministic else mean + log_std.exp() * torch.randn_like(mean))

    def log_prob(self, batch):
        """log pi(a_t | h_t) [B] of a Batch's own actions, those at the bounds moved inside."""
        obs, actions, _ = batch.split(self.obs_dim)
        mean, log_std = self.distribution(batch.tokens[:-1], batch.mask[:-1], obs)
        u = torch.atanh(actions.clamp(-1 + 1e-5, 1 - 1e-5))
        return squashed_log_prob(u, (u - mean) / log_std.exp(), log_std)

    # ---- learning: Algorithm 2, lines 10-12 ---------------------------------------------------

    def critic_loss(self, batch, noise):
        """Q(a_t, h_t) -> y = c r_t + gamma (1 - d_t) [min_i Q'_i(a', h') - alpha log pi(a' | h')]

        with h' = h_{t+1} (Sec. 6, Q and V) and c the reward scale. Only termination cuts the
        bootstrap: d_t is never a time limit.
        """
        obs, actions, rewards = batch.split(self.obs_dim)
        with torch.no_grad():
            history = batch.tokens[1:], batch.mask[1:], batch.next_obs  # h_{t+1}: has seen step t
            next_actions, next_logp = self.sample(*history, noise)
            q_next = self.q_values(self.qf_target, *history, next_actions).amin(0)
            v_next = q_next - self.log_alpha.exp() * next_logp  # [B]
            y = self.reward_scale * rewards + self.gamma * (1 - batch.terminated) * v_next
        q = self.q_values(self.qf, batch.tokens[:-1], batch.mask[:-1], obs, actions)
        assert q.shape == (2, *y.shape)
        error = q - y  # the TD error of both Qs (Fig. 17)
        return (error**2).mean(-1).sum(), q.detach().mean(), error.detach().abs().mean()

    def actor_loss(self, batch, noise):
        """J(phi) = E[alpha log pi(a|h) - min_i Q_i(a, h)], a ~ pi; for alpha 1 it is the KL
        divergence of Sec. 6."""
        history = batch.tokens[:-1], batch.mask[:-1], batch.split(self.obs_dim)[0]
        actions, logp = self.sample(*history, noise)
        q = self.q_values(self.qf, *history, actions).amin(0)  # [B]
        return (self.log_alpha.exp().detach() * logp - q).mean(), logp.detach()

    def temperature_loss(self, logp):
        """alpha rises while the entropy -log pi is below its target (SAC, Sec. 5 of its sequel)."""
        return -(self.log_alpha.exp() * (logp + self.target_entropy)).mean()

    @torch.no_grad()
    def update_targets(self):
        """Q' <- (1 - tau) Q' + tau Q."""
        targets, sources = list(self.qf_target.parameters()), list(self.qf.parameters())
        torch._foreach_lerp_(targets, sources, self.tau)

    def update_actor(self, batch, noise):
        """A gradient step of policy and temperature; returns the actor's loss and log pi [B]."""
        self.qf.requires_grad_(False)  # the actor's gradient passes through Q and changes nothing
        actor_loss, logp = self.actor_loss(batch, noise)
        temperature_loss = self.temperature_loss(logp) if self.tune_alpha else 0.0
        self.actor_optimizer.zero_grad()
        (actor_loss + temperature_loss).backward()
        self.actor_optimizer.step()
        self.qf.requires_grad_(True)
        return actor_loss, logp

    def update(self, batch, noise):
        """One policy update on a Batch with standard normal noise [2, B, A]. Returns a tensor of
        LOGGED, so that nothing here waits for the GPU."""
        q_loss, q_mean, td_error = self.critic_loss(batch, noise[0])
        self.q_optimizer.zero_grad()
        q_loss.backward()
        self.q_optimizer.step()
        actor_loss, logp = self.update_actor(batch, noise[1])
        self.update_targets()
        return torch.stack([q_loss.detach(), actor_loss.detach(), q_mean, td_error, -logp.mean()])
