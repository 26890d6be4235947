"""diagnostics.py: honest readings, and the measured stand-ins for the quantities of the theory."""

import math

import gymnasium
import numpy as np
import pytest
import torch

import diagnostics
import logs
import m3po
from model import MetaModel
from rollouts import EnvBuffer
from tests.conftest import TINY, hidden_sign_world, parse, read_rows, run


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


class Fixed:
    """A policy whose Qs are o and o + 1, whose log pi is -3 and whose alpha is 0.5."""

    obs_dim, act_dim, gamma, qf, log_alpha = 1, 1, 0.9, None, torch.tensor(0.5).log()
    reward_scale = 1.0

    def act(self, tokens, mask, obs):
        return torch.full((len(obs), 1), 0.25)

    def sample(self, tokens, mask, obs, noise):
        return noise, torch.full((len(obs),), -3.0)

    def q_values(self, qf, tokens, mask, obs, actions):
        return torch.stack([obs[:, 0], obs[:, 0] + 1])


@pytest.mark.parametrize("terminated, scale", [(False, 1.0), (True, 1.0), (False, 0.1)])
def test_the_soft_return_is_the_discounted_sum_of_rewards_and_entropies_that_followed(
        terminated, scale):
    episodes = EnvBuffer(20, 1, 1, 2)
    rewards, v_end = [1.0, -2.0, 4.0, 3.0, 0.5], 7.0 + 0.5 * 3
    for episode in range(2):
        for t, r in enumerate(rewards):
            last = t == 4
            episodes.add([float(t)], [0.0], r + episode, [7.0], terminated and last, last)
    slow, q = [], []
    for episode in range(2):
        for t in range(3):  # 0, 1, 2 lie in the first half of 0 ... 4
            total = 0.0
            for i in range(t, 5):
                entropy = 0.5 * 3 if i > t else 0.0
                total += 0.9 ** (i - t) * (scale * (rewards[i] + episode) + entropy)
            slow.append(total + (0 if terminated else 0.9 ** (5 - t) * v_end))
            q.append(t)
    policy = Fixed()
    policy.reward_scale = scale
    found = diagnostics.q_and_soft_return(policy, episodes)
    assert found == pytest.approx((sum(q) / 6, sum(slow) / 6), rel=1e-5)


def test_fresh_episodes_are_whole_and_end_where_the_simulator_fails():
    class Env(gymnasium.Env):
        _max_episode_steps = 6

        def reset(self, seed=None, options=None):
            self.t, self.seed = 0, seed
            return np.array([seed], np.float32), {}

        def step(self, action):
            self.t += 1
            info = {"fault": "a test"} if self.seed == 8 and self.t == 4 else {}
            over = self.t == 6 or bool(info)
            return np.array([self.seed + self.t], np.float32), float(action[0]), False, over, info

    episodes = diagnostics.fresh_episodes(Fixed(), Env(), [30, 8, 50], 2, "cpu")
    assert episodes.age[:len(episodes)].tolist() == [*range(6), *range(3), *range(6)]
    assert episodes.tokens[:15, 0].tolist() == [*range(30, 36), *range(8, 11), *range(50, 56)]
    assert (episodes.tokens[:15, 1:] == 0.25).all() and not episodes.terminated.any()


def test_a_blind_model_explains_less_exactly_where_history_tells_something():
    D_env = hidden_sign_world(1_000)
    for token_dim in (3, 0):
        torch.manual_seed(0)
        model = MetaModel(1, 1, widths=(32,), token_dim=token_dim, lr=1e-2)
        model.fit(D_env)
        row = {}
        for whose, how in (("episodes", model), ("blind", diagnostics.blind_model(model, D_env))):
            row |= {f"{whose}_{name}": v
                    for name, v in diagnostics.on_episodes(how, hidden_sign_world(2_000)).items()}
        assert logs.history_is_no_help(row) == (token_dim == 0), row
    assert not logs.history_is_no_help({})


def test_where_history_can_tell_nothing_no_blind_model_is_compared(tmp_path):
    for name, flags in (("all", []), ("blind", ["--L", 0]), ("mlp", ["--model", "mlp"]),
                        ("told", ["--oracle"])):
        row = read_rows(run(tmp_path / name, "--diagnose-every", 2, *flags))[-1]
        assert row["episodes_q"] and row["episodes_soft_return"] and row["episodes_nll"]
        assert bool(row["blind_nll"]) == (name == "all")
