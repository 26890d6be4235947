"""D_env, D_model and the rollouts between them (paper Sec. 5.2 and Algorithm 2, lines 5-9).

A branch, for L = 3 and k = 2, leaving the real step t of an episode that began at t - 5:

    D_env     ... x[t-4] x[t-3] x[t-2] x[t-1] x[t] x[t+1] ...        x = real token (o, a, r)
                         \\______ window _____/  o[t]                 h_t: L tokens, then o_t
    depth 0               x[t-3] x[t-2] x[t-1] | o[t]  -> y0         a ~ pi(h), (r, o') ~ p_theta(h, a)
    depth 1                      x[t-2] x[t-1]   y0    | o' -> y1    y = imagined token, r is predicted
    D_model   stores y0 and y1, each with the index t and its depth; windows are gathered when sampled

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
    """B transitions with their histories; the trailing O + A + 1 numbers of tokens[-1] are step t."""

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
        return Batch(torch.cat([self.tokens, other.tokens], 1), torch.cat([self.mask, other.mask], 1),
                     torch.cat([self.next_obs, other.next_obs]),
                     torch.cat([self.terminated, other.terminated]))

    def minibatches(self, n):
        """n batches of equal size from one gather (leading order is random already)."""
        size = self.next_obs.shape[0] // n
        for i in range(n):
            rows = slice(i * size, (i + 1) * size)
            yield Batch(self.tokens[:, rows], self.mask[:, rows], self.next_obs[rows],
                        self.terminated[rows])


def slide(tokens, mask, token, exists=True):
    """The window [L, B, D], [L, B] a step later: token [B, D] enters, the oldest falls out. exists
    [B]: False where the branch is dead, so that the slot stays masked."""
    own = torch.ones_like(token[:, 0], dtype=torch.bool) & exists
    return torch.cat([tokens, token[None]])[1:], torch.cat([mask, own[None]])[1:]


class LiveHistory:
    """The windows of n episodes as they happen: what an acting agent carries, and all it carries."""

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
        """holdout: share of the rows the model never trains on, in runs of `block` steps."""
        self.capacity, self.obs_dim, self.act_dim, self.L = capacity, obs_dim, act_dim, L
        self.device, self.holdout_share, self.block = torch.device(device), holdout, block
        self.tokens = torch.zeros(capacity, obs_dim + act_dim + 1, device=device)
        self.next_obs = torch.zeros(capacity, obs_dim, device=device)
        self.terminated = torch.zeros(capacity, device=device)
        self.age = torch.zeros(capacity, dtype=torch.long, device=device)  # t within its episode
        # Drawn once, when a row is written: the model is warm-started, so a split redrawn at each
        # fit would leak. In runs of steps, so that model errors can be measured over several steps.
        self.holdout = torch.zeros(capacity, dtype=torch.bool, device=device)
        self.back = torch.arange(L, 0, -1, device=device)[:, None]  # [L, 1]: slot 0 is L steps back
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
            self.held = bool(torch.rand(()) < self.holdout_share)
        self.holdout[i] = self.held
        self.total += 1
        self.now = 0 if terminated or truncated else self.now + 1

    def end_episode(self):
        """Forget the running history without a row (the simulator failed: FAULTS row 7)."""
        self.now = 0

    def window(self, rows, shift=0, age=None):
        """Windows of h at the given absolute rows [B]: tokens [L, B, D], mask [L, B].

        With `shift` [B] the newest `shift` slots are left empty, for imagined tokens, and the real
        ones stand that much further back.
        """
        age = self.age[rows % self.capacity] if age is None else age
        back = self.back - shift  # [L, B] real steps back from `rows`
        exists = torch.minimum(age, rows - self.oldest)  # own episode, and not yet overwritten
        mask = (back >= 1) & (back <= exists)
        tokens = self.tokens[torch.where(mask, rows - back, 0) % self.capacity]
        return tokens, mask

    def live_window(self):
        """The history of the step about to be taken: tokens [L, 1, D], mask [L, 1]."""
        rows = torch.full((1,), self.total, device=self.device)
        return self.window(rows, age=torch.full_like(rows, self.now))

    def batch(self, rows):
        """The transitions at absolute rows [B] as a Batch."""
        tokens, mask = self.window(rows)
        i = rows % self.capacity
        own = torch.ones(1, len(rows), dtype=torch.bool, device=self.device)
        return Batch(torch.cat([tokens, self.tokens[i][None]]), torch.cat([mask, own]),
                     self.next_obs[i], self.terminated[i])

    def sample_rows(self, n):
        """n absolute row numbers, uniform over all rows kept (line 7)."""
        return torch.randint(self.oldest, self.total, (n,), device=self.device)

    def sample(self, n):
        return self.batch(self.sample_rows(n))

    def start_rows(self):
        """Absolute rows kept that begin an episode."""
        kept = torch.arange(self.oldest, self.total, device=self.device)
        first = kept[self.age[kept % self.capacity] == 0]
        if len(first) == 0:
            raise ValueError("D_env holds no episode's first step: give a larger --env-capacity")
        return first

    def rows(self, holdout):
        """All absolute rows kept that are (not) in the hold-out, oldest first."""
        kept = torch.arange(self.oldest, self.total, device=self.device)
        return kept[self.holdout[kept % self.capacity] == holdout]

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


def branch(env_buffer, origin):
    """Start branches at the histories of the given D_env rows [M] (line 7)."""
    tokens, mask = env_buffer.window(origin)
    obs = env_buffer.tokens[origin % env_buffer.capacity][:, :env_buffer.obs_dim]
    return Branches(tokens, mask, obs, origin, torch.zeros_like(origin),
                    torch.ones_like(origin, dtype=torch.bool))


class ModelBuffer:
    """D_model: a ring of blocks, each one imagined step of M branches (lines 6-9).

    A branch of length k fills k consecutive blocks of its column, so the token imagined i steps
    earlier lies i blocks back, and older ones are in D_env: a row needs no copy of its window.
    `order` lists, block by block, the columns that were alive and finite; what is written in the
    others is never looked at.
    Blocks are overwritten oldest first, k at a time.
    """

    def __init__(self, env_buffer, M, k, steps, terminated_fn, full=False, horizon=1000):
        """steps: env steps whose rollouts are kept. full: Sec. 5.1's rollouts, one
        imagined step per env step from initial histories to termination or `horizon`, the length
        of a real episode."""
        env, self.env = env_buffer, env_buffer
        self.M, self.k, self.full, self.horizon = M, k, full, horizon
        self.terminated_fn = terminated_fn
        # Full: the oldest L blocks serve as history only, so that no window is cut by the ring.
        self.spare = env.L if full else 0
        self.blocks = steps * (1 if full else k) + self.spare
        n, dev = self.blocks * M, env.device
        self.tokens = torch.zeros(n, env.tokens.shape[1], device=dev)
        self.next_obs = torch.zeros(n, env.obs_dim, device=dev)
        self.terminated = torch.zeros(n, device=dev)
        self.origin = torch.zeros(n, dtype=torch.long, device=dev)
        self.depth = torch.zeros(n, dtype=torch.long, device=dev)
        self.order = torch.zeros(self.blocks, M, dtype=torch.int32, device=dev)
        self.count = torch.zeros(self.blocks, dtype=torch.long, device=dev)
        self.written = 0  # blocks ever written
        self.running = None  # Branches: full rollouts go on from env step to env step
        # They all begin together. Each is cut once, at a block of its own, so that from then on
        # D_model holds every age of an episode at any time and not the same one M times.
        self.cut = torch.arange(1, M + 1, device=dev) * horizon // M
        self.stats = torch.zeros(3, device=dev)  # imagined, terminated, non-finite (for the log)

    @torch.no_grad()
    def rollout(self, policy, model):
        """Lines 6-9: M rollouts of k steps from histories drawn uniformly from D_env."""
        if self.full:
            self.running = self.step(self.restart(self.running), policy, model)
            return
        branches = branch(self.env, self.env.sample_rows(self.M))
        for _ in range(self.k):
            branches = self.step(branches, policy, model)

    def restart(self, running):
        """Full rollouts: dead or finished episodes begin anew at a real initial observation."""
        first = self.env.start_rows()
        fresh = branch(self.env, first[torch.randint(len(first), (self.M,), device=first.device)])
        if running is None:
            return fresh
        go_on = running.alive & (running.depth < self.horizon) & (self.cut != self.written)
        keep = {"tokens": go_on[:, None], "obs": go_on[:, None]}
        return Branches(*(torch.where(keep.get(name, go_on), old, new) for name, old, new
                          in zip(Branches._fields, running, fresh)))

    def step(self, b, policy, model):
        """One imagined step of every branch; what is dead or not finite is not stored."""
        action = policy.act(b.tokens, b.mask, b.obs)
        reward, next_obs = model.sample(b.tokens, b.mask, b.obs, action)
        finite = torch.isfinite(reward) & torch.isfinite(next_obs).all(-1)
        done = self.terminated_fn(next_obs)
        stored = b.alive & finite

        token = torch.cat([b.obs, action, reward[:, None]], -1)  # [M, D], r is the predicted one
        block = self.written % self.blocks
        rows = slice(block * self.M, (block + 1) * self.M)
        self.tokens[rows], self.next_obs[rows] = token, next_obs
        self.terminated[rows], self.origin[rows], self.depth[rows] = done.float(), b.origin, b.depth
        self.order[block] = torch.argsort(~stored, stable=True)  # the living first
        self.count[block] = stored.sum()
        self.written += 1
        self.stats += torch.stack([b.alive.sum(), (stored & done).sum(), (b.alive & ~finite).sum()])
        return Branches(*slide(b.tokens, b.mask, token, stored), next_obs, b.origin, b.depth + 1,
                        stored & ~done)

    def counts(self):
        """Rows per block [blocks] that may be sampled."""
        if not self.spare:
            return self.count
        age = (self.written - 1 - torch.arange(self.blocks, device=self.count.device)) % self.blocks
        return torch.where(age < self.blocks - self.spare, self.count, 0)  # older: history only

    def sample(self, n):
        """n stored rows, uniform over all of them, as a Batch. Nothing here waits for the GPU."""
        count = self.counts()
        ends = torch.cumsum(count, 0)  # rows up to and including each block
        pick = (torch.rand(n, dtype=torch.float64, device=count.device) * ends[-1]).long()
        block = torch.searchsorted(ends, pick, right=True)
        block = block.clamp(max=self.blocks - 1)  # in an empty D_model: rows that are not finite
        column = self.order[block, pick - (ends[block] - count[block])].long()
        return self.batch(block, column)

    def batch(self, block, column):
        """The rows at (block, column), both [B], as a Batch: real tokens, then imagined ones."""
        row = block * self.M + column
        depth = self.depth[row]
        tokens, mask = self.env.window(self.origin[row], shift=depth)
        if self.full or self.k > 1:
            back = self.env.back  # [L, 1]
            own = back <= depth  # imagined by this very branch
            past = (block - back) % self.blocks * self.M + column  # same column, `back` blocks ago
            tokens = torch.where(own[..., None], self.tokens[past], tokens)
            mask = mask | own
        last = torch.ones(1, len(row), dtype=torch.bool, device=mask.device)
        return Batch(torch.cat([tokens, self.tokens[row][None]]), torch.cat([mask, last]),
                     self.next_obs[row], self.terminated[row])

    def __len__(self):
        return int(self.counts().sum())

    STATE = ("tokens", "next_obs", "terminated", "origin", "depth", "order", "count", "stats")

    def state_dict(self):
        used = min(self.written, self.blocks)
        rows = {"order": used, "count": used, "stats": 3}
        kept = {name: getattr(self, name)[:rows.get(name, used * self.M)].clone()
                for name in self.STATE}
        running = None if self.running is None else list(self.running)
        return kept | {"written": self.written, "running": running}

    def load_state_dict(self, state):
        dev = self.env.device
        for name in self.STATE:
            getattr(self, name)[:len(state[name])] = state[name].to(dev)
        self.written, running = state["written"], state["running"]
        self.running = None if running is None else Branches(*(t.to(dev) for t in running))
