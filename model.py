"""The meta-model p_theta(r, o' | a, h), and the network all of M3PO is made of (Sec. 6, Fig. 5).

    tokens of h --> GRU --> z (5 units) --+
                               o (and a) -+--> MLP --> outputs       `HistoryNet`, E members at once

`MetaModel` has three verbs: `fit` it to D_env (Algorithm 2, line 3), `sample` one imagined step
(line 8), and `validate` what it knows on rows it never trained on.

Axis letters: E members (the paper's B, --B), B batch, T time (tokens, newest last), D token,
H = z units.
What a token is, and which tokens a history holds: the history contract in rollouts.py.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class HistoryNet(nn.Module):
    """E independent copies of GRU + MLP as one batched matmul per layer (leading member axis).

    forward(tokens [T, B, D] or [E, T, B, D], mask [T, B] or [E, T, B], x [B, I] or [E, B, I])
    -> [E, B, out]. Only the first token_dim entries of a token are read, so that O + A hides the
    reward; 0 makes the net blind: no GRU, the plain MLP of MBPO and SAC. layer_norm scales each
    hidden layer to mean 0 and variance 1 per row before its SiLU. newest gives the MLP the newest
    token too, beside z, so that the GRU need not keep it.
    `member` selects members: an index tensor, or all of them.
    """

    def __init__(self, members, token_dim, in_dim, out_dim, widths=(400, 400), z_dim=5,
                 layer_norm=False, newest=False):
        super().__init__()
        self.layer_norm, self.newest = layer_norm, newest
        self.token_dim, self.z_dim = token_dim, z_dim if token_dim else 0
        uniform = lambda *shape, fan: nn.Parameter(torch.empty(shape).uniform_(-1, 1) / fan**0.5)
        if token_dim:
            H = z_dim  # torch.nn.GRU's init, equations and order: reset, update, candidate
            self.w_x = uniform(members, token_dim, 3 * H, fan=H)
            self.w_h = uniform(members, H, 3 * H, fan=H)
            self.b_x = uniform(members, 1, 3 * H, fan=H)
            self.b_h = uniform(members, 1, 3 * H, fan=H)
        sizes = [self.z_dim + token_dim * newest + in_dim, *widths, out_dim]
        self.w = nn.ParameterList(uniform(members, i, o, fan=i) for i, o in zip(sizes, sizes[1:]))
        self.b = nn.ParameterList(uniform(members, 1, o, fan=i) for i, o in zip(sizes, sizes[1:]))

    @staticmethod
    def pick(member, *params):
        return params if member is None else [p[member] for p in params]

    def encode(self, tokens, mask, member=None):
        """z [E, B, H]: the GRU's state after the newest token; 0 where there is no token.

        Per token x, from h = 0 (torch.nn.GRU's equations and its h, which is no history: the last
        h is z):
            reset     = sigmoid(W_r x + b_r + U_r h + c_r)     how much of h the candidate sees
            update    = sigmoid(W_u x + b_u + U_u h + c_u)     how much of h is kept
            candidate = tanh(W_c x + b_c + reset * (U_c h + c_c))
            h        <- (1 - update) candidate + update h
        """
        T, B = tokens.shape[-3:-1]
        H = self.z_dim
        # The batch is the last axis in here: gates have 5 rows of B numbers, not B rows of 5.
        weights = self.pick(member, self.w_x, self.w_h, self.b_x, self.b_h)
        w_x, w_h, b_x, b_h = [p.mT for p in weights]
        x = torch.where(mask[..., None], tokens[..., :self.token_dim], 0.0)
        x = w_x @ x.flatten(-3, -2).mT + b_x  # [E, 3H, T B]: all T tokens in one matmul
        # Even a zero token moves a GRU, by its biases. A masked one must leave the state as it is,
        # here 0: hold its update gate shut at 1.
        shut = (~mask).to(x.dtype).unsqueeze(-3) * 1e4  # sigmoid(1e4) is exactly 1
        x_reset, x_update, x_candidate = x.unflatten(-1, (T, B)).chunk(3, 1)  # [E, H, T, B] each
        x_gates = torch.cat([x_reset, x_update + shut], 1)
        h = x.new_zeros(len(x), H, B)
        # unbind: one backward for all steps
        for x_gates, x_candidate in zip(x_gates.unbind(2), x_candidate.unbind(2)):
            # A sum over a few units is too small for a matmul, and the compiler fuses it.
            from_h = (w_h[..., None] * h[:, None]).sum(2) if H <= 16 else w_h @ h  # [E, 3H, B]
            h_gates, h_candidate = (from_h + b_h).split([2 * H, H], 1)
            reset, update = torch.sigmoid(x_gates + h_gates).chunk(2, 1)
            candidate = torch.tanh(torch.addcmul(x_candidate, reset, h_candidate))
            h = torch.lerp(candidate, h, update)  # exactly h where update = 1
        return h.mT

    def forward(self, tokens, mask, x, member=None):
        # list: PyTorch 2.11 cannot compile the unpacking of a ParameterList.
        w, b = self.pick(member, *list(self.w)), self.pick(member, *list(self.b))
        x = x.expand(len(w[0]), *x.shape[-2:])
        if self.token_dim:
            parts = [self.encode(tokens, mask, member), x]
            if self.newest:
                own = tokens[..., -1, :, :self.token_dim]  # 0 where there is no token yet
                own = torch.where(mask[..., -1, :, None], own, 0.0)
                parts.insert(1, own.expand(len(x), *own.shape[-2:]))
            x = torch.cat(parts, -1)  # [E, B, H + I], or H + D + I
        for w_i, b_i in zip(w[:-1], b[:-1]):
            x = torch.baddbmm(b_i, x, w_i)  # [E, B, width]
            x = F.silu(F.layer_norm(x, x.shape[-1:]) if self.layer_norm else x)
        return torch.baddbmm(b[-1], x, w[-1])  # [E, B, out]


def gaussian_nll(mean, logvar, target):
    """Negative log-likelihood per output, in nats: 0.5 (log 2 pi var + (y - mean)^2 / var)."""
    return 0.5 * (math.log(2 * math.pi) + logvar + (target - mean) ** 2 * torch.exp(-logvar))


def scale(x, mean, std, angles):
    """Inputs x [..., n] as the nets read them: standardised by the first n of mean and std and
    clipped at 10. Of the dims in `angles` [k], radians without bounds, they read sine and cosine
    instead, the cosines in front, scaled by sqrt 2, which is right where all angles are equally
    frequent: D_env's own mean and std jump when a robot first falls over, under nets that have
    learned with the old ones."""
    n = x.shape[-1]
    scaled = (x - mean[:n]).div_(std[:n]).clamp_(-10, 10)
    if not len(angles):
        return scaled
    turned = x.index_select(-1, angles)
    scaled = scaled.index_copy(-1, angles, 2**0.5 * torch.sin(turned))
    return torch.cat([2**0.5 * torch.cos(turned), scaled], -1)


def scale_tokens(tokens, obs, statistics, changes):
    """A window's tokens [L, B, D] as the nets read them (`scale`); obs [B, O] is what follows them.
    statistics: a module that holds D_env.statistics().

    changes: each token also holds what it brought about, o_{i+1} - o_i. h holds that anyway, but
    in two tokens, of which a GRU would have to remember one to see it.

    So a token is read as (change, cosines, o, a, r). HistoryNet reads its first token_dim numbers:
    the reward stands last, and whatever is added in front, so that the reward can be cut off.
    """
    scaled = scale(tokens, statistics.token_mean, statistics.token_std, statistics.angles)
    if not changes:
        return scaled
    O = obs.shape[-1]
    change = torch.cat([tokens[1:, :, :O], obs[None]]) - tokens[..., :O]  # [L, B, O]
    mean, std = statistics.target_mean[1:], statistics.target_std[1:]
    change = (change - mean).div_(std).clamp_(-10, 10)
    return torch.cat([change, scaled], -1)


def add_statistics(module, obs_dim, act_dim, angles=()):
    """Buffers for D_env.statistics(): of a token (o, a, r) and of (r, o' - o). angles: see scale.
    """
    module.register_buffer("angles", torch.tensor(angles, dtype=torch.long), persistent=False)
    for name, n in (("token", obs_dim + act_dim + 1), ("target", obs_dim + 1)):
        module.register_buffer(f"{name}_mean", torch.zeros(n))
        module.register_buffer(f"{name}_std", torch.ones(n))


def use_statistics(module, statistics):
    """Standardise by D_env.statistics() from now on: a method of each module that has them."""
    for name, value in statistics.items():
        getattr(module, name).copy_(value)


def explained(residual, y):
    """The fractions of the variance of targets y [B, O + 1] that are explained, of the reward and
    of the observation change; residual [O + 1] is the mean squared error."""
    variance = y.var(0, correction=0)
    fraction = 1 - residual / variance.clamp(min=1e-8)  # [O + 1]
    varies = variance > 1e-8  # what never varies counts as not explained
    obs = torch.where(varies[1:], fraction[1:], 0).sum() / varies[1:].sum().clamp(min=1)
    return {"explained_reward": fraction[0] * varies[0], "explained_obs": obs}


class MetaModel(nn.Module):
    """B members, each with its own minibatches, predicting (r, o' - o) as diagonal Gaussians.

    token_dim = 0 gives M2PO's model (App. A.9), MBPO's feed-forward ensemble that sees o and a
    alone: 7 members, of which the `elites` = 5 with the lowest hold-out error are sampled from.
    """

    def __init__(self, obs_dim, act_dim, members=3, widths=(400, 400), z_dim=5, token_dim=None,
                 layer_norm=False, newest=False, changes=False, elites=None, lr=1e-3,
                 weight_decay=0.0, batch_size=256, beta_nll=0.5, reward_weight=None,
                 steps_per_row=1.0, max_rows=5_000, angles=()):
        """token_dim: how much of a token (o, a, r) is seen, None is all. changes: see scale_tokens;
        angles: see scale. max_rows: as many rows at most are looked at to measure."""
        super().__init__()
        O, A = obs_dim, act_dim
        self.obs_dim, self.act_dim = O, A
        token_dim = O + A + 1 if token_dim is None else token_dim
        self.changes = changes and token_dim > 0
        read = token_dim and token_dim + O * self.changes + len(angles)  # see scale_tokens
        self.net = HistoryNet(members, read, O + A + len(angles), 2 * (O + 1), widths, z_dim,
                              layer_norm, newest)
        # Soft bounds, fixed: PETS learns them and pulls them together by a term of its own, which
        # here won against the weighted likelihood, and the variances died (docs/DEVIATIONS.md 2).
        self.min_logvar, self.max_logvar = -10.0, 0.5
        # What is sampled from: all members, or the best few of them.
        self.members, self.elites = members, elites or members
        self.register_buffer("elite", torch.arange(self.elites))
        add_statistics(self, O, A, angles)
        self.register_buffer("seen", torch.tensor(0))  # rows ever written when it was last fitted
        # beta-NLL 0.5 and a reward that weighs as much as all O observations (docs/DEVIATIONS.md);
        # beta 0 and weight 1 are the paper's literal likelihood, which finds the task late.
        self.beta_nll = beta_nll
        weight = torch.ones(O + 1)
        weight[0] = O if reward_weight is None else reward_weight
        self.register_buffer("weight", weight / weight.sum())
        self.batch_size, self.steps_per_row, self.max_rows = batch_size, steps_per_row, max_rows
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=lr, weight_decay=weight_decay,
                                          fused=True)

    def standardise(self, tokens, obs):
        """The window's tokens [L, B, D] as the net reads them; obs [B, O] is what follows them."""
        return scale_tokens(tokens, obs, self, self.changes)

    def standardise_step(self, obs, actions):
        """x = (o, a) [B, O + A and a cosine per angle], scaled as in the tokens."""
        x = torch.cat([obs, actions], -1)
        return scale(x, self.token_mean, self.token_std, self.angles)

    def predict_mean(self, tokens, mask, obs, actions):
        """What all sampled-from members predict for raw inputs: mean, log-variance [E, B, O + 1] of
        the standardised (r, o' - o)."""
        return self.predict(self.standardise(tokens, obs), mask,
                            self.standardise_step(obs, actions), self.chosen())

    def chosen(self):
        """The members that are sampled from; None is all of them, at no copy of their weights."""
        return None if self.elites == self.members else self.elite

    def predict(self, tokens, mask, x, member=None):
        """Mean and log-variance [E, B, O + 1] of the standardised (r, o' - o), from standardised
        tokens and x = (o, a), by all members or those selected."""
        mean, logvar = self.net(tokens, mask, x, member).chunk(2, -1)
        logvar = self.max_logvar - F.softplus(self.max_logvar - logvar)
        return mean, self.min_logvar + F.softplus(logvar - self.min_logvar)

    @torch.no_grad()
    def sample(self, tokens, mask, obs, actions):
        """(r [B], o' [B, O]) ~ p_theta(. | a, h): a uniformly drawn member per row, its Gaussian.

        tokens [L, B, D], mask [L, B], obs [B, O], actions [B, A]. The rows are dealt to the
        members in equal shares by a random permutation: each row's member is uniform, and the
        ensemble stays one batched matmul over B / E rows per member instead of B.
        """
        B, E = len(obs), self.elites
        seats = torch.randperm(-(-B // E) * E, device=obs.device)  # seat -> row
        rows = seats.clamp(max=B - 1).view(E, -1)  # the last row fills the spare seats
        mean, logvar = self.predict_dealt(tokens, mask, obs, actions, rows)
        y = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        y = y.flatten(0, 1).index_select(0, torch.argsort(seats)[:B])  # row -> its seat
        y = y * self.target_std + self.target_mean
        return y[:, 0], obs + y[:, 1:]

    def predict_dealt(self, tokens, mask, obs, actions, rows):
        """Mean and log-variance [E, B / E, O + 1] by each member for its own rows [E, B / E]."""
        tokens, x = self.standardise(tokens, obs), self.standardise_step(obs, actions)
        deal = lambda t, dim: t.index_select(dim, rows.flatten()).unflatten(dim, rows.shape)
        return self.predict(deal(tokens, 1).transpose(0, 1), deal(mask, 1).transpose(0, 1),
                            deal(x, 0),  # [E, L, B / E, D], [E, L, B / E], [E, B / E, I]
                            self.chosen())

    def loss(self, tokens, mask, x, y):
        """beta-NLL of standardised targets y [E, B, O + 1] (Seitzer et al. 2022): each term times
        its own detached variance^beta, so that an output not explained yet still pulls."""
        mean, logvar = self.predict(tokens, mask, x)
        nll = gaussian_nll(mean, logvar, y) * torch.exp(self.beta_nll * logvar.detach())
        return (nll * self.weight).sum(-1).mean(1).sum()

    def batch_loss(self, batch):
        """loss of a Batch of E * b transitions, b for each member in turn."""
        tokens, mask, x, y = self.standardised(batch)
        by_member = lambda t, dim: t.unflatten(dim, (self.members, -1))
        return self.loss(by_member(tokens, 1).transpose(0, 1),  # [E, L, b, D]
                         by_member(mask, 1).transpose(0, 1), by_member(x, 0), by_member(y, 0))

    def update(self, batch):
        """One gradient step on a Batch of E * b transitions; returns their loss."""
        loss = self.batch_loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def standardised(self, batch):
        """A Batch as inputs and targets: tokens [L, B, D], mask, x [B, O + A], y [B, O + 1]."""
        obs, actions, rewards = batch.split(self.obs_dim)
        y = torch.cat([rewards[:, None], batch.next_obs - obs], -1)
        return (self.standardise(batch.tokens[:-1], obs), batch.mask[:-1],
                self.standardise_step(obs, actions), (y - self.target_mean) / self.target_std)

    use_statistics = use_statistics

    def fit(self, D_env):
        """theta <- argmax of the (beta-weighted) likelihood of D_env (Algorithm 2, line 3).

        It goes on from the weights it has: steps_per_row gradient steps for each row that is new
        since the last fit, on minibatches that each member draws for itself. So the work per env
        step is the same in the whole run, and no fit is thrown away. Returns what it found, also
        how well the new rows were predicted before they were learned (`fresh`).
        """
        found = self.fresh(D_env)
        self.use_statistics(D_env.statistics())
        steps = max(1, round(self.steps_per_row * (D_env.total - self.seen.item())))
        for rows in self.minibatches(D_env, steps):  # [E, b]
            self.update(D_env.batch(rows.flatten()))
        self.seen.fill_(D_env.total)
        metrics = self.validate(D_env)
        if not torch.isfinite(metrics["member_error"]).all():
            raise FloatingPointError("the meta-model's loss is not finite at env step "
                                     f"{D_env.total}")
        self.elite.copy_(torch.argsort(metrics["member_error"])[:self.elites])
        metrics["nll_train"] = self.validate(D_env, holdout=False)["nll"]
        names = ("nll", "nll_train", "explained_reward", "explained_obs")
        return found | {"gradient_steps": steps} | {name: metrics[name].item() for name in names}

    def minibatches(self, D_env, steps):
        """So many minibatches of absolute rows [E, b] that are not held out, drawn uniformly from
        all that are kept."""
        train, E = D_env.rows_or_all(holdout=False), self.members
        for _ in range(steps):
            yield train[torch.randint(len(train), (E, self.batch_size), device=train.device)]

    @torch.no_grad()
    def score(self, D_env, rows):
        """On absolute rows [B], or max_rows of them spread evenly: each member's weighted squared
        error [E], the ensemble's NLL per transition (nats, in standardised units; Fig. 11), its
        mean's squared error per output [O + 1], and the targets y [B, O + 1]."""
        if len(rows) > self.max_rows:
            spread = torch.linspace(0, len(rows) - 1, self.max_rows, device=rows.device)
            rows = rows[spread.long()]
        tokens, mask, x, y = self.standardised(D_env.batch(rows))
        mean, logvar = self.predict(tokens, mask, x)  # [E, B, O + 1]
        member_error = ((mean - y) ** 2 * self.weight).sum(-1).mean(-1)  # [E]
        log_members = -gaussian_nll(mean, logvar, y).sum(-1)[self.elite]  # [E, B]
        nll = -(torch.logsumexp(log_members, 0) - math.log(self.elites)).mean()
        residual = ((mean[self.elite].mean(0) - y) ** 2).mean(0)
        return member_error, nll, residual, y

    def validate(self, D_env, holdout=True):
        """On rows never trained on (or on the others): member_error, nll, and the share of the
        variance of reward and observation change that the ensemble's mean explains (0 = blind)."""
        member_error, nll, residual, y = self.score(D_env, D_env.rows_or_all(holdout))
        return {"member_error": member_error, "nll": nll} | explained(residual, y)

    def fresh(self, D_env):
        """Errors on the rows written since the last fit, before the next one trains on them: whole
        stretches of where the policy goes now, not rows beside those it trained on. The share is
        of the variance in D_env, as the few new rows have little of their own."""
        seen = self.seen.item()
        if not 0 < seen < D_env.total:
            return {}
        rows = torch.arange(max(seen, D_env.oldest), D_env.total, device=D_env.device)
        _, nll, residual, _ = self.score(D_env, rows)
        varies = self.target_std[1:] != 1  # exactly 1 is what never varied in D_env
        residual_obs = residual[1:][varies].mean() if varies.any() else residual[1:].mean()
        return {"fresh_nll": nll.item(), "fresh_explained_reward": 1 - residual[0].item(),
                "fresh_explained_obs": 1 - residual_obs.item()}
