"""D_env, D_model and the rollouts between them (paper Sec. 5.2 and Algorithm 2, lines 5-9).

A branch, for L = 3 and k = 2, leaving the real step t of an episode that began at t - 5:

    D_env     ... x[t-4] x[t-3] x[t-2] x[t-1] x[t] x[t+1] ...        x = real token (o, a, r)
                         \\______ window _____/  o[t]                 h_t: L tokens, then o_t
    depth 0               x[t-3] x[t-2] x[t-1] | o[t]  -> y0      a ~ pi(h), (r, o') ~ p_theta(h, a)
    depth 1                      x[t-2] x[t-1]   y0    | o' -> y1 y = imagined token, r predicted
    D_model   stores y0 and y1, each with t, its depth and the k - 1 tokens before it (y0: x[t-1],
              y1: y0); the rest of a window is real and is gathered from D_env when a row is sampled

THE HISTORY CONTRACT (everything else refers to this)
  * token_i = (o_i, a_i, r_i): the observation, the action taken there, the reward it brought.
  * h_t = the last min(t, L) tokens of this episode, i.e. token_{t-L} .. token_{t-1}, plus o_t.
    The newest token holds a_{t-1} and r_{t-1}; nothing of step t but o_t is in h_t.
  * Windows are right-aligned: tokens [T, B, D] with T = L, the newest last, mask [T, B] True where
    a token exists. At t = 0 nothing exists and z_0 = 0. Masked slots never reach z (model.py).
  * An episode's end resets the history. A task switch does not: the agent cannot see it.
  * A `Batch` carries T = L + 1 tokens; the last is step t's own token, so that
    tokens[:-1] is the window of h_t and tokens[1:] the window of h_{t+1}.
  * No window reaches across an episode's start or past the write head of a full ring buffer.

Axis letters: T time, B batch (or M branches), D = O + A + 1 token, O observation, A action.
"""

from typing import NamedTuple

import torch


class Batch(NamedTuple):
    """B transitions, each with its history; tokens[-1] is step t's own token."""

    tokens: torch.Tensor  # [L + 1, B, D] float32, see the contract above
    mask: torch.Tensor  # [L + 1, B] bool, True where the token exists (the last row always)
    next_obs: torch.Tensor  # [B, O]
    terminated: torch.Tensor  # [B] float32, 1 where the bootstrap is cut; a time limit never is

    def split(self, obs_dim):
        """The step's own obs [B, O], actions [B, A] and rewards [B]."""
        own = self.tokens[-1]
        return own[:, :obs_dim], own[:, obs_dim:-1], own[:, -1]

    def join(self, other):
        """Both batches as one."""
        return Batch(torch.cat([self.tokens, other.tokens], 1),
                     torch.cat([self.mask, other.mask], 1),
                     torch.cat([self.next_obs, other.next_obs]),
                     torch.cat([self.terminated, other.terminated]))

    def minibatches(self, n):
        """n batches of equal size from one gather (leading order is random already)."""
        size = self.next_obs.shape[0] // n
        for i in range(n):
            rows = slice(i * size, (i + 1) * size)
            yield Batch(self.tokens[:, rows], self.mask[:, rows], self.next_obs[rows],
                        self.terminated[rows])


def slide(tokens, mask, token):
    """The window [L, B, D], [L, B] a step later: token [B, D] enters, the oldest falls out."""
    exists = torch.ones_like(token[:, 0], dtype=torch.bool)
    return torch.cat([tokens, token[None]])[1:], torch.cat([mask, exists[None]])[1:]


def take(x, rows):
    """x[rows] for rows [B], in a fraction of the time on a CPU."""
    return x.index_select(0, rows)


class LiveHistory:
    """The windows of n episodes as they happen: all that an acting agent carries."""

    def __init__(self, n, L, token_dim, device="cpu"):
        self.tokens = torch.zeros(L, n, token_dim, device=device)  # oldest first
        self.mask = torch.zeros(L, n, dtype=torch.bool, device=device)

    def append(self, obs, actions, rewards):
        """Step t is over: its token (o_t, a_t, r_t) enters the windows."""
        token = torch.cat([obs, actions, rewards[:, None]], -1)  # [n, D]
        self.tokens, self.mask = slide(self.tokens, self.mask, token)


class EnvBuffer:
    """D_env: a ring of real transitions in the order they happened. Rows carry absolute numbers
    0, 1, 2, ... (`total` so far); row n lies in slot n % capacity until it is overwritten."""

    STATE = ("tokens", "next_obs", "terminated", "age", "holdout")  # tensors of a checkpoint

    def __init__(self, capacity, obs_dim, act_dim, L, device="cpu", holdout=0.2, block=5):
        """holdout: fraction of the rows the model never trains on, in runs of `block` steps."""
        self.capacity, self.obs_dim, self.act_dim, self.L = capacity, obs_dim, act_dim, L
        self.device, self.holdout_fraction, self.block = torch.device(device), holdout, block
        self.tokens = torch.zeros(capacity, obs_dim + act_dim + 1, device=device)
        self.next_obs = torch.zeros(capacity, obs_dim, device=device)
        self.terminated = torch.zeros(capacity, device=device)
        self.age = torch.zeros(capacity, dtype=torch.long, device=device)  # t within its episode
        # Drawn once, when a row is written: the model is warm-started, so a split redrawn at each
        # fit would leak. In runs of steps, so that model errors can be measured over several steps.
        self.holdout = torch.zeros(capacity, dtype=torch.bool, device=device)
        self.lags = torch.arange(L, -1, -1, device=device)[:, None]  # [L + 1, 1] steps back, 0 last
        self.total = 0  # rows ever written
        self.now = 0  # t of the step that add() will write next
        self.held = False  # whether the current run of steps is held out

    @property
    def oldest(self):
        return max(0, self.total - self.capacity)

    def __len__(self):
        return self.total - self.oldest

    def add(self, obs, action, reward, next_obs, terminated, truncated):
        """Append one real step; obs and next_obs are [O], action [A] (Algorithm 2, line 5)."""
        i = self.total % self.capacity
        token = torch.cat([torch.as_tensor(obs, dtype=torch.float32),
                           torch.as_tensor(action, dtype=torch.float32),
                           torch.tensor([reward], dtype=torch.float32)])
        self.tokens[i] = token.to(self.device, non_blocking=True)
        self.next_obs[i] = torch.as_tensor(next_obs, dtype=torch.float32)
        self.terminated[i] = float(terminated)  # truncation alone never cuts the bootstrap
        self.age[i] = self.now
        if self.now % self.block == 0:
            self.held = bool(torch.rand(()) < self.holdout_fraction)
        self.holdout[i] = self.held
        self.total += 1
        self.now = 0 if terminated or truncated else self.now + 1

    def end_episode(self):
        """Forget the running history without a row (the simulator failed)."""
        self.now = 0

    # ---- windows ----------------------------------------------------------------------------

    def length(self, rows):
        """How many tokens h has at the absolute rows [B]: those of its own episode that are not yet
        overwritten. A row that is overwritten itself has none."""
        age = take(self.age, rows % self.capacity)
        return torch.minimum(age, rows - self.oldest).clamp(min=0)

    def gather(self, rows, mask, out=None):
        """The tokens at absolute rows [T, B], where mask [T, B] is True, as [T, B, D]; if given,
        into `out`."""
        slots = (torch.where(mask, rows, 0) % self.capacity).flatten()
        out = self.tokens.new_empty(*rows.shape, self.tokens.shape[1]) if out is None else out
        torch.index_select(self.tokens, 0, slots, out=out.flatten(0, 1))
        return out

    def window(self, rows, length=None):
        """The windows of h at absolute rows [B]: tokens [L, B, D], mask [L, B]."""
        lags = self.lags[:-1]
        mask = lags <= (self.length(rows) if length is None else length)
        return self.gather(rows - lags, mask), mask

    def live_window(self):
        """The history of the step about to be taken: tokens [L, 1, D], mask [L, 1]."""
        row = torch.full((1,), self.total, device=self.device)
        return self.window(row, length=min(self.now, len(self)))

    def batch(self, rows):
        """The transitions at absolute rows [B] as a Batch."""
        mask = self.lags <= self.length(rows)  # [L + 1, B]; lag 0 is the step itself
        slots = rows % self.capacity
        return Batch(self.gather(rows - self.lags, mask), mask, take(self.next_obs, slots),
                     take(self.terminated, slots))

    # ---- which rows -------------------------------------------------------------------------

    def sample_rows(self, n):
        """n absolute row numbers, uniform over all rows kept (line 7)."""
        return torch.randint(self.oldest, self.total, (n,), device=self.device)

    def sample(self, n):
        return self.batch(self.sample_rows(n))

    def kept(self):
        """All absolute rows kept, oldest first."""
        return torch.arange(self.oldest, self.total, device=self.device)

    def start_rows(self):
        """Absolute rows kept that begin an episode."""
        kept = self.kept()
        first = kept[self.age[kept % self.capacity] == 0]
        if len(first) == 0:
            raise ValueError("D_env holds no episode's first step: give a larger --env-capacity")
        return first

    def rows(self, holdout):
        """All absolute rows kept that are (not) in the hold-out, oldest first."""
        kept = self.kept()
        return kept[self.holdout[kept % self.capacity] == holdout]

    def rows_or_all(self, holdout):
        """The same, or all rows kept where there are none: a handful may all lie on one side."""
        rows = self.rows(holdout)
        return rows if len(rows) else self.kept()

    def statistics(self):
        """Mean and standard deviation over all rows kept, by which policy and model standardise: of
        a token (o, a, r) [D], and of what the model predicts, (r, o' - o) [1 + O]."""
        if len(self) == 0:
            raise ValueError("D_env holds no rows to learn from: was every env step a fault?")
        tokens, next_obs = self.tokens[:len(self)], self.next_obs[:len(self)]  # any order will do
        change = next_obs - tokens[:, :self.obs_dim]
        statistics = {}
        for name, data in (("token", tokens), ("target", torch.cat([tokens[:, -1:], change], -1))):
            std, mean = torch.std_mean(data, 0, correction=0)
            # A constant dimension stays what it is, centred: never a division by zero.
            statistics |= {f"{name}_mean": mean, f"{name}_std": torch.where(std > 1e-6, std, 1.0)}
        return statistics

    def state_dict(self):
        kept = {name: getattr(self, name)[:len(self)].clone() for name in self.STATE}
        return kept | {"total": self.total, "now": self.now, "held": self.held}

    def load_state_dict(self, state):
        """Into a buffer of the same capacity, or of a larger one while the ring was not full."""
        for name in self.STATE:
            getattr(self, name)[:len(state[name])] = state[name].to(self.device)
        self.total, self.now, self.held = state["total"], state["now"], state["held"]


class Branches(NamedTuple):
    """M histories being continued in the model."""

    tokens: torch.Tensor  # [L, M, D] window of the current history
    mask: torch.Tensor  # [L, M]
    obs: torch.Tensor  # [M, O]
    origin: torch.Tensor  # [M] absolute D_env row the branch left from
    depth: torch.Tensor  # [M] imagined steps so far
    alive: torch.Tensor  # [M] bool


def branch(D_env, origin):
    """Start branches at the histories of the given D_env rows [M] (line 7)."""
    tokens, mask = D_env.window(origin)
    obs = take(D_env.tokens, origin % D_env.capacity)[:, :D_env.obs_dim]
    return Branches(tokens, mask, obs, origin, torch.zeros_like(origin),
                    torch.ones_like(origin, dtype=torch.bool))


class ModelBuffer:
    """D_model: a ring of imagined steps (lines 6-9).

    A row is one imagined step. It holds the D_env row that its branch left from, its depth, its own
    token and the min(k - 1, L) tokens before it. Whatever lies further back is real and is gathered
    from D_env when the row is sampled, so for k = 1 a row is its own step and two numbers.

    The M branches fill M rows per imagined step, oldest rows first; `living` lists, per such step,
    the rows that were alive and finite. What is written in the others is never looked at.
    """

    STATE = ("tokens", "next_obs", "terminated", "origin", "depth", "living")  # by row

    def __init__(self, D_env, M, k, steps, terminated_fn):
        """steps: env steps whose rollouts are kept. A fork's schedule may set `self.k` to anything
        from 1 to this k, the one a row has room for."""
        self.D_env, self.M, self.k, self.terminated_fn = D_env, M, k, terminated_fn
        self.longest = k
        self.own = min(k - 1, D_env.L)  # tokens before its own that a row holds
        self.blocks = steps * k  # of M rows
        new = lambda *shape, dtype=torch.float32: torch.zeros(
            self.blocks * M, *shape, dtype=dtype, device=D_env.device)
        self.tokens = new(self.own + 1, D_env.tokens.shape[1])
        self.next_obs = new(D_env.obs_dim)
        self.terminated = new()
        self.origin = new(dtype=torch.long)
        self.depth = new(dtype=torch.long)
        self.living = new(dtype=torch.long)  # rows, per block the living first
        self.count = torch.zeros(self.blocks, dtype=torch.long, device=D_env.device)  # of these
        self.sampled = self.blocks  # so many, the newest, are sampled from (full.py: fewer)
        self.written = 0  # blocks ever written
        self.sure = 0  # while fewer blocks are written, has_rows is known to be True
        self.stats = torch.zeros(3, device=D_env.device)  # for the log: imagined, ended, non-finite

    @torch.no_grad()
    def rollout(self, policy, model):
        """Lines 6-9: M rollouts of k steps from histories drawn uniformly from D_env."""
        if self.k > self.longest:
            raise ValueError(f"k = {self.k}: D_model was made for at most {self.longest}")
        branches = branch(self.D_env, self.D_env.sample_rows(self.M))
        for _ in range(self.k):
            branches = self.step(branches, policy, model)

    def step(self, b, policy, model):
        """One imagined step of every branch; what is dead or not finite is not stored."""
        action = policy.act(b.tokens, b.mask, b.obs)
        reward, next_obs = model.sample(b.tokens, b.mask, b.obs, action)
        finite = torch.isfinite(reward) & torch.isfinite(next_obs).all(-1)
        done = self.terminated_fn(next_obs)
        stored = b.alive & finite

        token = torch.cat([b.obs, action, reward[:, None]], -1)  # [M, D], r is the predicted one
        tokens, mask = torch.cat([b.tokens, token[None]]), torch.cat([b.mask, stored[None]])
        block = self.written % self.blocks
        rows = slice(block * self.M, (block + 1) * self.M)
        self.tokens[rows] = tokens[-1 - self.own:].transpose(0, 1)
        self.next_obs[rows], self.terminated[rows] = next_obs, done.float()
        self.origin[rows], self.depth[rows] = b.origin, b.depth
        self.living[rows] = block * self.M + torch.argsort(~stored, stable=True)
        self.count[block] = stored.sum()
        self.written += 1
        self.stats += torch.stack([b.alive, stored & done, b.alive & ~finite]).sum(1)
        return Branches(tokens[1:], mask[1:], next_obs, b.origin, b.depth + 1, stored & ~done)

    def has_rows(self):
        """Whether there is a row to sample. Asking the GPU waits for it, so what it said is
        remembered as long as the newest block with a living row is kept."""
        if self.written >= self.sure:
            living = self.count.nonzero().flatten()
            if len(living) == 0:
                return False
            age = ((self.written - 1 - living) % self.blocks).min().item()
            self.sure = self.written - age + self.sampled
        return True

    def sample(self, n):
        """n living rows, uniform over all of them, as a Batch. Nothing here waits for the GPU;
        has_rows says whether there is a row."""
        ends = torch.cumsum(self.count, 0)  # living rows up to and including each block
        pick = (torch.rand(n, dtype=torch.float64, device=ends.device) * ends[-1]).long()
        block = torch.searchsorted(ends, pick, right=True)
        rank = pick - take(ends - self.count, block)  # among the living of its block
        return self.batch(take(self.living, block * self.M + rank))

    def batch(self, rows):
        """The rows [B] as a Batch."""
        tokens, mask = self.history(rows)
        return Batch(tokens, mask, take(self.next_obs, rows), take(self.terminated, rows))

    def history(self, rows):
        """Tokens [L + 1, B, D], mask [L + 1, B] of rows [B]: real ones, then the branch's own. At
        depth d the token j steps back is the branch's own if j <= d, else the real row
        origin - (j - d). So no token more than `own` steps back is the branch's."""
        origin, depth, lags = take(self.origin, rows), take(self.depth, rows), self.D_env.lags
        mask = lags <= depth + self.D_env.length(origin)  # lag 0 is the row's own token
        older = len(lags) - 1 - self.own  # slots of real tokens alone, as depth < k
        tokens = self.tokens.new_empty(*mask.shape, self.tokens.shape[-1])
        self.D_env.gather(origin + depth - lags[:older], mask[:older], out=tokens[:older])
        tokens[older:] = take(self.tokens, rows).transpose(0, 1)
        return tokens, mask

    def __len__(self):
        return int(self.count.sum())

    def state_dict(self):
        used = min(self.written, self.blocks)
        rows = {name: getattr(self, name)[:used * self.M].clone() for name in self.STATE}
        return rows | {"count": self.count.clone(), "stats": self.stats.clone(),
                       "written": self.written}

    def load_state_dict(self, state):
        for name in (*self.STATE, "count", "stats"):
            getattr(self, name)[:len(state[name])] = state[name].to(self.D_env.device)
        self.written, self.sure = state["written"], 0
