"""Full rollouts (paper Sec. 5.1, "Full" in Fig. 9): the rival of the branched ones in rollouts.py.

    branched    leave a real history, k steps long          --rollout branched, the default
    full        begin where an episode begins, and go on to its end in the model alone

Practical form: M model episodes are kept alive, each advanced by one imagined step per env step, as
M branches of one step would be. A real first observation is all they take from D_env.
"""

import torch

from rollouts import Branches, ModelBuffer, branch


class FullBuffer(ModelBuffer):
    """D_model for full rollouts: episode b is row b of every block, and its history lies in the
    blocks before. The oldest L blocks are history only, so that no window is cut by the ring."""

    def __init__(self, D_env, M, steps, terminated_fn, horizon):
        """horizon: the env's own limit of steps, after which an imagined episode is truncated."""
        super().__init__(D_env, M, 1, steps + D_env.L, terminated_fn)
        self.sampled, self.horizon = steps, horizon
        self.running = None  # Branches, which go on from env step to env step
        # They all begin together. Each is cut once, at a block of its own, so that from then on
        # D_model holds every age of an episode at any time and not the same one M times.
        self.cut = torch.arange(1, M + 1, device=D_env.device) * horizon // M

    @torch.no_grad()
    def rollout(self, policy, model):
        """One imagined step of each of the M episodes."""
        self.running = self.step(self.restart(), policy, model)
        if self.blocks > self.sampled:
            self.count[(self.written - 1 - self.sampled) % self.blocks] = 0  # now history only

    def restart(self):
        """The episodes; who is dead or at the end begins anew at a real initial observation."""
        first = self.D_env.start_rows()
        fresh = branch(self.D_env, first[torch.randint(len(first), (self.M,), device=first.device)])
        if self.running is None:
            return fresh
        old = self.running
        go_on = old.alive & (old.depth < self.horizon) & (self.cut != self.written)
        wide = {"tokens": go_on[:, None], "obs": go_on[:, None]}  # the others are [M] or [L, M]
        return Branches(*(torch.where(wide.get(name, go_on), *both) for name, *both
                          in zip(Branches._fields, old, fresh)))

    def history(self, rows):
        """Tokens [L + 1, B, D] and mask [L + 1, B] of rows [B]: the episode's own, none is real."""
        lags = self.D_env.lags
        return self.tokens[(rows - lags * self.M) % len(self.tokens), 0], lags <= self.depth[rows]

    def state_dict(self):
        return super().state_dict() | {"running": self.running and list(self.running)}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        running = state["running"]
        self.running = running and Branches(*(t.to(self.D_env.device) for t in running))
