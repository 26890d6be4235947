"""diagnostics.py: the measured stand-ins for the quantities of the theory."""

import math

import pytest
import torch

import diagnostics
import m3po
from rollouts import EnvBuffer
from tests.conftest import TINY, parse


def test_a_policy_has_no_divergence_from_a_copy_of_itself_and_much_from_noise():
    D_env = EnvBuffer(600, 1, 1, 2)
    torch.manual_seed(0)
    args, env, _ = parse(*TINY, "--L", 2)
    policy, _ = m3po.build(args, env, "cpu")
    for row in range(600):
        obs = torch.rand(1)
        action = policy.act(*D_env.live_window(), obs[None])[0]
        D_env.add(obs, action, 0.0, torch.rand(1), False, row % 20 == 19)
    near = diagnostics.policy_divergence(policy, D_env, (8, 8), seed=1)
    with torch.no_grad():
        policy.actor.b[-1][..., 0] += 3.0  # the mean moves by 3
    assert 0 <= near < 0.1 < 1 < diagnostics.policy_divergence(policy, D_env, (8, 8), seed=1)


def test_the_error_by_depth_grows_as_a_wrong_model_adds_its_error_up():
    """o' = o + 1 for real; the model says o' = o + 1.5: depth d is off by d / 2."""
    D_env = EnvBuffer(200, 1, 1, 2, holdout=1.0)
    for row in range(200):
        D_env.add([row % 10], [0.0], 2.0, [row % 10 + 1], False, row % 10 == 9)

    class Model:
        target_mean, target_std, token_std = torch.tensor([2.5, 1.5]), torch.ones(2), torch.ones(3)

        def predict_mean(self, tokens, mask, obs, actions):
            return torch.zeros(3, len(obs), 2), torch.zeros(3, len(obs), 2)

    found = diagnostics.error_by_depth(Model(), D_env)
    assert [found[f"rmse_obs_depth_{d}"] for d in range(1, 6)] == (
        pytest.approx([0.5, 1, 1.5, 2, 2.5]))
    assert found["rmse_reward_depth_4"] == pytest.approx(0.5)
    nll = 2 * 0.5 * math.log(2 * math.pi) + 0.5 * 0.5**2  # reward off by 0.5; the observation by:
    assert found["nll_depth_1"] == pytest.approx(nll + 0.5 * 0.5**2, rel=1e-4)
    assert found["nll_depth_3"] == pytest.approx(nll + 0.5 * 1.5**2, rel=1e-4)
