"""The meta-policy outside this repository: one step of it as an ONNX graph.

    python play.py RUN_DIR --export policy.onnx      needs onnxscript, through torch's exporter
    python -m examples.onnx_policy policy.onnx       needs onnxruntime, and no torch

    in    state       [L + 1, O + A + 2]  what the last step returned; zeros begin an episode
          obs         [O]                 o_t as the env gives it: it is standardised inside
          reward      [1]                 r_{t-1}, which the last action brought; unread at a start
    out   action      [A]                 tanh of pi's mean, in [-1, 1]
          next_state  [L + 1, O + A + 2]

All are float32. A row of the state is a token (o, a, r) and 1 where it exists (the history contract
in rollouts.py), the newest last. That one lacks its reward until the next step brings it. The
file's metadata say the env's name and the bounds that -1 and 1 stand for.
"""

import json
import logging
import warnings

import torch

from drawing import PlayError
from policy import MetaPolicy


class Step(torch.nn.Module):
    """(state, obs, reward) -> (action, next_state), as above."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def forward(self, state, obs, reward):
        *step, _, exists = state[-1:].split([self.policy.obs_dim, self.policy.act_dim, 1, 1], 1)
        reward = torch.where(exists > 0.5, reward[None], 0.0)
        rows = torch.cat([state[:-1], torch.cat([*step, reward, exists], 1)])[1:]  # [L, D + 1]
        window = rows[:, None, :-1], rows[:, None, -1] > 0.5  # tokens [L, 1, D], mask [L, 1]
        action = self.policy.act(*window, obs[None], deterministic=True)[0]
        own = torch.cat([obs, action, torch.zeros(1), torch.ones(1)])
        return action, torch.cat([rows, own[None]])


def example(policy, L):
    """Inputs of a Step at an episode's start: state, obs, reward."""
    O, A = policy.obs_dim, policy.act_dim
    return torch.zeros(L + 1, O + A + 2), torch.zeros(O), torch.zeros(1)


def write(policy, env, run, path):
    """Writes the policy of a run to path; returns what to tell the user."""
    if not isinstance(policy, MetaPolicy):
        raise PlayError(f"argument --export: {run.method} has no policy that is one network")
    inputs = example(policy, run.L)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # torchvision is not installed: so what
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(Step(policy.eval()), inputs, dynamo=True, verbose=False,
                                    input_names=["state", "obs", "reward"],
                                    output_names=["action", "next_state"])
    bounds = env.get_wrapper_attr("action_bounds")
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces, with this machine's paths
    program.model.metadata_props.update(
        env=run.env, action_low=json.dumps(bounds.low.tolist()),
        action_high=json.dumps(bounds.high.tolist()))
    program.save(path, external_data=False)
    shapes = [list(x.shape) for x in inputs]
    return (f"written      {path}: state {shapes[0]}, obs {shapes[1]}, reward {shapes[2]} -> "
            f"action [{policy.act_dim}] in [-1, 1], next_state")
