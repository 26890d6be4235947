"""rollouts.py: the windows of D_env and the branches of D_model. More in test_m3po.py."""

import copy
from collections import Counter

import pytest
import torch

import envs
from full import FullBuffer
from rollouts import EnvBuffer, LiveHistory, ModelBuffer
from tests.conftest import (
    FakeModel, FakePolicy, fill, never_terminates, parse, real_steps, stored_rows,
)


# --- D_env: real steps and their windows ----------------------------------------------------------


@pytest.mark.parametrize("L", [0, 3])
def test_the_history_an_evaluation_carries_is_the_one_d_env_gives(L):
    D_env, live, seen = EnvBuffer(50, 2, 1, L), LiveHistory(1, L, 4), Counter()
    for row in range(30):
        tokens, mask = D_env.live_window()
        seen[int(mask.sum())] += 1
        assert torch.equal(mask, live.mask) and torch.equal(tokens[mask], live.tokens[live.mask])
        obs, action, reward = torch.randn(1, 2), torch.rand(1, 1), torch.randn(1)
        D_env.add(obs[0], action[0], reward[0], [0, 0], row % 6 == 5, False)
        live.append(obs, action, reward)
        if row % 6 == 5:
            live = LiveHistory(1, L, 4)
    assert set(seen) == set(range(L + 1))


def test_with_L_0_a_history_is_the_observation_alone():
    D_env = EnvBuffer(10, 3, 1, L=0)
    fill(D_env, 25)
    batch = D_env.sample(7)
    assert batch.tokens.shape == (1, 7, 5) and batch.mask.all()
    tokens, mask = D_env.live_window()
    assert tokens.shape == (0, 1, 5) and mask.shape == (0, 1)


def test_after_a_dropped_transition_a_new_history_begins():
    D_env = EnvBuffer(10, 1, 1, L=3)
    for row in range(2):
        D_env.add([row], [0], 0, [row + 1], False, False)
    D_env.end_episode()  # the simulator failed at the third step: no row, but an end
    assert not D_env.live_window()[1].any()
    D_env.add([7], [0], 0, [8], False, False)
    assert D_env.batch(torch.tensor([2])).mask[:, 0].tolist() == [False, False, False, True]
    assert D_env.start_rows().tolist() == [0, 2]
    assert D_env.batch(torch.tensor([0, 1])).terminated.tolist() == [0, 0]


def test_rows_are_drawn_uniformly_from_those_kept():
    D_env = EnvBuffer(37, 3, 1, L=2)
    fill(D_env, 100)
    count = Counter(D_env.sample_rows(37_000).tolist())
    assert set(count) == set(range(63, 100))
    assert all(abs(n - 1_000) < 5 * 1_000**0.5 for n in count.values())  # 5 standard deviations


def test_a_row_stays_on_its_side_of_the_holdout_split_as_long_as_it_is_kept():
    D_env, side = EnvBuffer(500, 1, 1, L=2, holdout=0.2), {}
    for row in range(1_500):
        D_env.add([row], [0], 0, [0], False, row % 7 == 0)
        if row % 100 == 99:
            held, trained = D_env.rows(holdout=True).tolist(), D_env.rows(holdout=False).tolist()
            assert sorted(held + trained) == list(range(max(0, row - 499), row + 1))
            for kept, is_held in ((held, True), (trained, False)):
                assert all(side.setdefault(r, is_held) == is_held for r in kept)
    assert 0.15 < sum(side.values()) / len(side) < 0.25


def test_the_holdout_comes_in_runs_of_steps_and_none_reaches_over_an_episodes_end():
    D_env = EnvBuffer(2_000, 3, 1, L=2, holdout=0.3, block=4)
    log, runs = fill(D_env, 2_000), {}
    held = set(D_env.rows(holdout=True).tolist())
    for row in range(2_000):
        age = row - min(r for r in range(max(0, row - 14), row + 1) if log[r][0] == log[row][0])
        runs.setdefault((log[row][0], age // 4), set()).add(row in held)
    assert all(len(sides) == 1 for sides in runs.values())  # a run is held out as a whole or not
    share = sum(sides.pop() for sides in runs.values()) / len(runs)
    assert abs(share - 0.3) < 5 * (0.21 / len(runs)) ** 0.5  # each drawn for itself


def test_start_rows_are_the_first_steps_of_the_episodes_kept():
    D_env = EnvBuffer(30, 3, 1, L=2)
    log = fill(D_env, 111)
    begins = [r for r in range(81, 111) if log[r - 1][0] != log[r][0]]
    assert len(begins) > 3 and D_env.start_rows().tolist() == begins
    D_env = EnvBuffer(10, 3, 1, L=2)
    fill(D_env, 25, lengths=(25,))  # an episode longer than the ring
    with pytest.raises(ValueError, match="first step"):
        D_env.start_rows()


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("n", [20, 75])  # D_env not full, and wrapped; both in mid-episode
def test_buffers_go_on_after_saving_and_loading_as_if_nothing_had_been(n, full):
    D_env, policy = real_steps(n, 3, capacity=40, holdout=1.0), FakePolicy()
    new = lambda D_env: (FullBuffer(D_env, 6, 3, never_terminates, horizon=7) if full
                         else ModelBuffer(D_env, 6, 2, 3, never_terminates))
    D_model = new(D_env)
    for _ in range(5):
        D_model.rollout(policy, FakeModel())
    env_twin = EnvBuffer(40, 1, 2, 3, holdout=1.0)
    twin = new(env_twin)
    env_twin.load_state_dict(copy.deepcopy(D_env.state_dict()))
    twin.load_state_dict(copy.deepcopy(D_model.state_dict()))
    samples = []
    for env, buffer, acting in ((D_env, D_model, policy), (env_twin, twin, copy.deepcopy(policy))):
        torch.manual_seed(1)
        samples.append([*buffer.sample(200), *env.sample(200)])
        for row in (n, n + 1):
            env.add([row], [0.5, -1], -row, [row + 1], False, row % 7 == 6)
            buffer.rollout(acting, FakeModel())
        samples[-1] += [*buffer.sample(200), env.rows(holdout=True), env.start_rows(), buffer.stats]
    assert all(torch.equal(a, b) for a, b in zip(*samples))


def test_a_batch_splits_into_its_own_step_and_into_minibatches_without_overlap():
    D_env = EnvBuffer(50, 3, 1, L=2)
    fill(D_env, 50)
    batch = D_env.batch(torch.arange(12))
    obs, actions, rewards = batch.split(3)
    assert obs[:, 0].tolist() == list(range(12))
    assert obs.shape == (12, 3) and actions.shape == (12, 1) and rewards.shape == (12,)
    assert actions[:, 0].tolist() == [row + 0.5 for row in range(12)]
    assert rewards.tolist() == [-row for row in range(12)]
    parts = list(batch.minibatches(4))
    assert [len(p.next_obs) for p in parts] == [3, 3, 3, 3]
    for name in ("tokens", "mask"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts], 1), getattr(batch, name))
    for name in ("next_obs", "terminated"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(batch, name))


# --- D_model: branches ----------------------------------------------------------------------------


def test_when_all_branches_end_at_their_first_step_only_that_step_is_stored():
    D_model = ModelBuffer(real_steps(60, 3), M=5, k=3, steps=2,
                          terminated_fn=lambda next_obs: ~never_terminates(next_obs))
    for rollout in range(5):
        D_model.rollout(FakePolicy(), FakeModel())
        assert len(D_model) == 5 * min(rollout + 1, 2)
    batch = D_model.sample(100)
    assert (batch.tokens[-1, :, 0] < 60).all() and (batch.terminated == 1).all()
    assert D_model.stats.tolist() == [25, 25, 0]


def test_a_model_that_predicts_nan_leaves_d_model_empty_and_usable():
    D_model = ModelBuffer(real_steps(60, 3), M=5, k=2, steps=3, terminated_fn=never_terminates)
    D_model.rollout(FakePolicy(), FakeModel(nan_reward=[(b, 0) for b in range(5)]))
    assert len(D_model) == 0 and D_model.stats.tolist() == [5, 0, 5]
    D_model.rollout(FakePolicy(), FakeModel())
    assert len(D_model) == len(stored_rows(D_model)) == 10


def test_stored_rows_are_drawn_uniformly_however_many_each_step_stored():
    dies = lambda next_obs: next_obs[:, 0] // 1_000 > next_obs[:, 0] % 1_000 % 3
    D_model = ModelBuffer(real_steps(60, 2), M=10, k=3, steps=4, terminated_fn=dies)
    policy = FakePolicy()
    for _ in range(6):
        D_model.rollout(policy, FakeModel())
    n = len(D_model)
    own = D_model.sample(500 * n).tokens[-1]
    count = Counter(zip(own[:, 2].tolist(), own[:, 3].tolist()))  # by call and branch
    assert n < 4 * 3 * 10 and len(count) == n
    chi_square = sum((c - 500) ** 2 / 500 for c in count.values())
    assert abs(chi_square - (n - 1)) < 5 * (2 * (n - 1)) ** 0.5


def test_a_branch_whose_origin_is_overwritten_keeps_its_own_tokens_and_takes_no_strangers():
    D_env, policy = real_steps(30, L=4, capacity=30), FakePolicy()
    D_model = ModelBuffer(D_env, M=30, k=3, steps=1, terminated_fn=never_terminates)
    D_model.rollout(policy, FakeModel())
    for row in range(30, 45):  # 15 of the 30 real steps are overwritten
        D_env.add([row], [0.5, -1], -row, [row + 1], False, row % 7 == 6)
    batch = D_model.sample(2_000)
    for b in range(2_000):
        o = int(batch.tokens[-1, b, 0])
        origin, depth = o % 1_000, o // 1_000
        real = [s for s in range(origin - origin % 7, origin) if s >= 15]
        steps = (real + [origin + 1_000 * d for d in range(depth)])[-4:]
        if depth < 4:  # a window of 4 reaches 4 - depth real steps back
            steps = real[max(0, len(real) - (4 - depth)) :] + steps[len(steps) - depth :]
        assert batch.tokens[:-1, b][batch.mask[:-1, b]][:, 0].tolist() == steps


def test_a_k_that_changes_from_step_to_step_leaves_every_window_right():
    """Each row holds its own imagined tokens: neither a shorter branch nor a wrapped ring, in which
    whole rollouts no longer fit, can take them away."""
    D_env, policy = real_steps(60, L=4), FakePolicy()
    D_model, calls = ModelBuffer(D_env, 6, 5, 3, never_terminates), []
    for k in (5, 2, 3, 1, 5, 4, 2, 5, 3):
        D_model.k = k
        D_model.rollout(policy, FakeModel())
        calls += range(k)  # depth of each call
        stored = stored_rows(D_model, 3_000)
        kept = range(max(0, len(calls) - 15), len(calls))  # steps of the longest k, 15 blocks
        assert set(stored) == {(call, b) for call in kept for b in range(6)}
        for (call, b), (origin, depth, window, mask, _, _) in stored.items():
            assert depth == calls[call]
            real = list(range(origin - origin % 7, origin))
            steps = real + [origin + 1_000 * d for d in range(depth)]
            assert window[mask][:, 0].tolist() == steps[-4:]
            assert window[mask][:, 2].tolist()[-depth or 9 :] == list(range(call - depth, call))
    D_model.k, before = 6, D_model.state_dict()
    with pytest.raises(ValueError, match="k = 6: D_model was made for at most 5"):
        D_model.rollout(policy, FakeModel())  # a row has no room for its fifth token back
    assert D_model.written == before["written"] and torch.equal(D_model.tokens, before["tokens"])


def test_has_rows_is_right_at_every_step_and_seldom_looks(monkeypatch):
    """Blocks that are empty and blocks that are not, in a ring of six."""
    D_model = ModelBuffer(real_steps(60, 2), 5, 2, 3, never_terminates)
    bad = FakeModel(nan_reward=[(b, 0) for b in range(5)])
    assert not D_model.has_rows()
    for good in (0, 0, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 1):
        D_model.rollout(FakePolicy(), FakeModel() if good else bad)
        assert D_model.has_rows() == (len(D_model) > 0)
    looked = []
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda *_, look=torch.Tensor.nonzero:
                        looked.append(1) or look(*_))
    for _ in range(30):
        D_model.rollout(FakePolicy(), FakeModel())
        assert D_model.has_rows()
    assert len(looked) <= 30 / 3 + 1


@pytest.mark.parametrize("name", envs.ENVS)
def test_for_k_1_a_row_of_d_model_is_a_step_and_a_few_numbers(name):
    args, env, _ = parse("--env", name, "--retain", 1_000, "--k", 1)
    O, A = env.observation_space.shape[0], env.action_space.shape[0]
    D_env = EnvBuffer(1, O, A, args.L, "meta")  # shapes without memory
    D_model = ModelBuffer(D_env, args.M, args.k, args.retain, never_terminates)
    size = sum(getattr(D_model, part).nbytes for part in D_model.STATE)
    assert size <= 1_000 * args.M * 4 * (2 * O + A + 10) < 0.5e9
