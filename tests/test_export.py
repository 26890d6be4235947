"""export.py: the policy as one step of an ONNX graph."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

import export
import m3po
import play
from rollouts import LiveHistory


def untrained(*flags):
    """A policy with random weights and statistics, and its L."""
    args, env, _ = m3po.parse_args(["--env", "halfcheetah-fwd-bwd", "--width", "16", *flags])
    policy, _ = m3po.build(args, env, "cpu")
    for name in ("token_mean", "token_std", "target_mean", "target_std"):
        getattr(policy, name).uniform_(0.5, 1.5)
    return policy, args.L


def play_episode(policy, env, L, seed):
    """The agent's own episode: obs [T, O], rewards [T], actions [T, A]."""
    history = LiveHistory(1, L, policy.obs_dim + policy.act_dim + 1)
    obs, _ = env.reset(seed=seed)
    steps, done = [], False
    while not done:
        obs_t = torch.tensor(obs)[None]
        action = policy.act(history.tokens, history.mask, obs_t, deterministic=True)
        next_obs, reward, terminated, truncated, _ = env.step(action[0].numpy())
        history.append(obs_t, action, torch.tensor([reward], dtype=torch.float32))
        steps.append((obs, np.float32(reward), action[0].numpy()))
        obs, done = next_obs, terminated or truncated
    return [np.array(column) for column in zip(*steps)]


@pytest.mark.parametrize("flags", [
    [], ["--L", "0"], ["--L", "1"], ["--newest-token", "--token-changes"], ["--no-token-reward"],
    ["--oracle"]], ids=" ".join)
def test_the_state_carries_the_history_that_the_contract_describes(flags):
    policy, L = untrained(*flags)
    history = LiveHistory(1, L, policy.obs_dim + policy.act_dim + 1)
    step, (state, _, _) = export.Step(policy), export.example(policy, L)
    reward = torch.full((1,), torch.nan)  # nobody reads it at an episode's start
    for _ in range(L + 5):
        obs = torch.randn(policy.obs_dim)
        expected = policy.act(history.tokens, history.mask, obs[None], deterministic=True)
        action, state = step(state, obs, reward)
        assert torch.equal(action, expected[0])
        reward = torch.randn(1)
        history.append(obs[None], action[None], reward)


def test_what_has_no_network_to_export_is_refused():
    with pytest.raises(play.PlayError, match="--export: l2a has no policy that is one network"):
        export.write(object(), None, Namespace(method="l2a"), "x.onnx")


@pytest.fixture(scope="module")
def exported(trained_runs, tmp_path_factory):
    """{"toy", "cheetah"}: the exported agents of the two run folders."""
    pytest.importorskip("onnxscript", reason="the exporter needs onnxscript")
    pytest.importorskip("onnxruntime", reason="the graphs are run with onnxruntime")
    root = tmp_path_factory.mktemp("export")
    for name, folder in trained_runs.items():
        play.main([folder, "--export", str(root / f"{name}.onnx")])
    return {name: root / f"{name}.onnx" for name in trained_runs}


@pytest.mark.parametrize("name", ["toy", "cheetah"])
def test_the_graph_acts_as_the_agent_does_over_an_episode(exported, trained_runs, name):
    import onnxruntime
    policy, _, env, args = m3po.load(trained_runs[name])
    obs, rewards, actions = play_episode(policy, env, args.L, seed=7)
    session = onnxruntime.InferenceSession(exported[name])
    state = np.zeros(session.get_inputs()[0].shape, np.float32)
    for t, action in enumerate(actions):
        inputs = {"state": state, "obs": obs[t], "reward": rewards[max(t - 1, 0)][None]}
        found, state = session.run(None, inputs)
        assert np.abs(found - action).max() < 1e-5
    assert len(actions) == {"toy": 100, "cheetah": 1_000}[name] and np.ptp(actions) > 1e-3


def test_the_example_gets_the_agents_return(exported, trained_runs):
    from examples import onnx_policy
    policy, _, env, args = m3po.load(trained_runs["toy"])
    _, rewards, actions = play_episode(policy, env, args.L, seed=3)
    total, found = onnx_policy.run_episode(exported["toy"], seed=3)
    assert np.abs(found - actions).max() < 1e-5 and abs(total - rewards.sum()) < 1e-3


def test_the_file_says_what_its_numbers_mean_and_nothing_of_this_machine(exported):
    import onnxruntime
    says = onnxruntime.InferenceSession(exported["cheetah"]).get_modelmeta().custom_metadata_map
    assert says == {"env": "halfcheetah-fwd-bwd", "action_low": str([-1.0] * 6),
                    "action_high": str([1.0] * 6)}
    assert str(Path(m3po.__file__).parent).encode() not in exported["cheetah"].read_bytes()
