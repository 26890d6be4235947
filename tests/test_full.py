"""Full rollouts (Sec. 5.1): whole episodes in the meta-model alone."""

import itertools
import math
from collections import Counter

import pytest

from full import FullBuffer
from tests.conftest import FakeModel, FakePolicy, never_terminates, real_steps, stored_rows


@pytest.mark.parametrize("L", [0, 2, 5])
def test_full_rollouts_run_from_first_observations_to_the_horizon_in_the_model_alone(L):
    """Horizon 6; branches that left real step 14 terminate with their third step, and branch 3 gets
    a NaN at depth 4. Every real step but the first ones of episodes is poisoned."""
    D_env, policy, steps = real_steps(35, L), FakePolicy(), 9
    D_env.next_obs[:] = math.nan
    for row in range(35):
        if row % 7:
            D_env.tokens[row] = math.nan
        else:
            D_env.tokens[row, 1:] = math.nan  # of a first step only the observation is used
    dies = lambda next_obs: next_obs[:, 0] == 3_014
    D_model = FullBuffer(D_env, 5, steps, dies, horizon=6)
    D_env.tokens[0, 1:] = 0  # padding is read from slot 0 and masked
    model, seen = FakeModel(nan_obs=[(3, 4)]), {}
    for call in range(60):
        D_model.rollout(policy, model)
        if len(D_model) and call % 4 == 3 or call == 59:
            stored = stored_rows(D_model, 600)
            assert all(c > call - steps for c, _ in stored)  # the last `steps` env steps are kept
            seen |= stored
    assert set(stored) == {(c, b) for c in range(60 - steps, 60) for b in range(5)} - {
        (c, 3) for c in range(60) if (c, 3) not in seen}
    depths, begun = Counter(), set()
    for (call, b), (origin, depth, window, mask, next_obs, done) in seen.items():
        depths[depth] += 1
        assert origin % 7 == 0 and next_obs == origin + 1_000 * (depth + 1)
        n = min(depth, L)  # its whole imagined episode so far, or the last L steps of it
        assert mask.tolist() == [False] * (L - n) + [True] * n
        tokens = [[origin + 1_000 * d, call - depth + d, b] for d in range(depth - n, depth)]
        assert window[L - n :][:, [0, 2, 3]].tolist() == tokens
        assert done == (origin == 14 and depth == 2)
        if depth == 0:
            begun.add(origin)
        later = seen.get((call + 1, b))
        if later is not None:
            # All begin at once; branch b is cut one time, after (b + 1) 6 / 5 steps.
            restarts = done or depth == 5 or (b, depth) == (3, 4) or call + 1 == (b + 1) * 6 // 5
            assert later[1] == 0 if restarts else later[:2] == (origin, depth + 1)
    assert begun == {0, 7, 14, 21, 28} and set(depths) == set(range(6))
    assert not any(b == 3 and row[1] >= 4 for (_, b), row in seen.items())


def test_full_rollouts_that_never_end_are_soon_of_every_age():
    D_model = FullBuffer(real_steps(20, 2), 7, 4, never_terminates, horizon=7)
    for call in range(30):
        D_model.rollout(FakePolicy(), FakeModel())
        ages = D_model.depth.view(-1, 7)[call % D_model.blocks]  # of the step just imagined
        if call >= 7:
            assert sorted(ages.tolist()) == list(range(7))


def test_len_of_a_full_d_model_counts_what_sample_can_give():
    """L = 2 blocks are kept as history only: two good steps, then two without a number in them."""
    D_model = FullBuffer(real_steps(20, 2), 5, 2, never_terminates, horizon=1000)
    bad = FakeModel(nan_reward=itertools.product(range(5), range(4)))
    for model, n in ((FakeModel(), 5), (FakeModel(), 10), (bad, 5), (bad, 0)):
        D_model.rollout(FakePolicy(), model)
        assert len(D_model) == n
        if n:
            assert D_model.sample(8).next_obs.isfinite().all()
