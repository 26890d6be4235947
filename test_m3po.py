"""The last chapter: what M3PO claims, one test per claim, in the order of Algorithm 2.

    1  initialise policy, meta-model, D_env and D_model
    2  for N epochs:
    3      fit the meta-model to D_env
    4      for E steps:
    5          take a real step with the policy; add it to D_env
    6-9        M times: draw a history from D_env, go on from it for k steps in the meta-model;
               add them to D_model
    10-12      G times: update the policy on a batch of D_model (here half of it of D_env)

Shipped code is held against an independent slow version, or against fakes whose numbers a reader
can check in the head (tests/conftest.py). Nets are the paper's here; what ours read besides and
every other test stands in tests/, one file per module.
All of them: python -m pytest -q. This chapter alone: python -m pytest -q test_m3po.py
"""

import copy
import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch.distributions import Normal, TanhTransform

import evaluation
import m3po
from model import HistoryNet, MetaModel
from policy import MetaPolicy
from rollouts import Batch, EnvBuffer, ModelBuffer, branch
from tests.conftest import (
    FakeModel, FakePolicy, TINY, assert_same_run, constant_heads, fill, hidden_sign_world,
    never_terminates, parse, random_batch, read_rows, real_steps, resume_run, run,
    slow_standardised, spy, stored_rows, tiny_policy, torch_forward, torch_policy, update_case,
)
from tests.conftest import same_draws_whatever_ran_before  # a fixture that every test uses


# --- The history (paper, Sec. 4): what h_t has seen, and what it has not --------------------------


def slow_window(log, row, L, oldest):
    """The tokens of h at `row`, oldest first: walk back through the list until something stops."""
    found = []
    for earlier in range(row - 1, -1, -1):
        if len(found) == L or earlier < oldest or log[earlier][0] != log[row][0]:
            break
        found.insert(0, log[earlier][1])
    return found


@pytest.mark.parametrize("capacity, L", [(1_000, 4), (37, 4), (37, 1), (37, 0), (16, 15), (5, 9)])
def test_every_window_equals_a_walk_back_through_the_episode(capacity, L):
    checked = 0
    for until in range(0, 400, 23):  # look in at many positions of the write head
        D_env = EnvBuffer(capacity, 3, 1, L)
        log = fill(D_env, until + 1)
        rows = torch.arange(max(0, until + 1 - capacity), until + 1)  # all that should be kept
        assert len(D_env) == len(rows) and D_env.oldest == rows[0]
        batch = D_env.batch(rows)
        assert batch.tokens.shape == (L + 1, len(rows), 5)
        assert batch.mask.shape == (L + 1, len(rows))
        for b, row in enumerate(rows.tolist()):
            slow = slow_window(log, row, L, D_env.oldest)
            mask = batch.mask[:, b].tolist()
            assert mask == [False] * (L - len(slow)) + [True] * len(slow) + [True]  # right-aligned
            assert batch.tokens[batch.mask[:, b], b].tolist() == slow + [log[row][1]]
            assert batch.next_obs[b].tolist() == [row + 1, log[row][0], 0.25]
            assert batch.terminated[b] == log[row][2]
            checked += 1
    assert checked > 80


def test_a_window_is_contiguous_of_one_episode_and_never_past_the_write_head():
    D_env = EnvBuffer(capacity=50, obs_dim=3, act_dim=1, L=4)
    log = fill(D_env, 333)
    batch = D_env.sample(3_000)
    step, episode, task = batch.tokens[..., :3].unbind(-1)
    mask, ages = batch.mask, batch.mask.sum(0) - 1
    assert (step[1:] - step[:-1])[mask[:-1]].eq(1).all()  # each token one step after the one before
    assert (episode == episode[-1])[mask].all()
    assert (step >= 333 - 50)[mask].all()
    assert set(ages.tolist()) == {0, 1, 2, 3, 4}
    assert (task.amax(0) > task.amin(0))[ages == 4].any()  # a task switch does not cut a window
    first = {episode: row for row, (episode, _, _) in reversed(list(enumerate(log)))}
    for row, age in zip(step[-1].tolist(), ages.tolist()):  # and it is never shorter than it can be
        assert age == min(4, row - first[log[int(row)][0]], row - 283)


@pytest.mark.parametrize("terminated, truncated", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_only_termination_cuts_the_bootstrap_and_both_flags_end_the_history(terminated, truncated):
    D_env = EnvBuffer(10, 1, 1, L=2)
    D_env.add([0], [0], 0, [1], terminated, truncated)
    assert D_env.batch(torch.tensor([0])).terminated.item() == terminated
    _, mask = D_env.live_window()
    assert mask.any().item() == (not (terminated or truncated))


# --- Line 1: every net is a GRU over the history and an MLP, all members of an ensemble at once ---


@torch.no_grad()
@pytest.mark.parametrize("token_dim", [6, 4])
def test_the_batched_network_equals_torch_gru_and_linear_on_only_the_real_tokens(token_dim):
    net = HistoryNet(3, token_dim, 4, 2, widths=(7, 8), z_dim=5).double()
    batch = random_batch(O=3, A=2, L=4, B=10, dtype=torch.float64)  # 0 .. 4 tokens, each twice
    tokens, mask, x = batch.tokens[:-1], batch.mask[:-1], torch.randn(10, 4, dtype=torch.float64)
    z, out = net.encode(tokens, mask), net(tokens, mask, x)
    assert z.shape == (3, 10, 5) and out.shape == (3, 10, 2)
    assert sorted(mask.sum(0).tolist()) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    for e, b in itertools.product(range(3), range(10)):
        z_slow, out_slow = torch_forward(net, e, tokens[mask[:, b], b], x[b])
        assert torch.allclose(z[e, b], z_slow, atol=1e-12)
        assert torch.allclose(out[e, b], out_slow, atol=1e-12)
    assert torch.equal(z[:, mask.sum(0) == 0], torch.zeros(3, 2, 5, dtype=torch.float64))  # z_0 = 0


def one_member(net, e):
    """Member e as a network of its own, by copying its weights."""
    one = copy.deepcopy(net)
    for p, q in zip(one.parameters(), net.parameters()):
        p.data = q.data[e : e + 1].clone()
    return one


@torch.no_grad()
@pytest.mark.parametrize("member", [None, [2, 0]])
def test_members_share_nothing(member):
    """E members at once equal one after the other, on shared and on separate inputs."""
    net = HistoryNet(3, 4, 3, 2, widths=(8,))
    chosen = member or [0, 1, 2]
    pick = None if member is None else torch.tensor(member)
    tokens, mask, x = torch.randn(3, 6, 4), torch.rand(3, 6) < 0.7, torch.randn(6, 3)
    shared = net(tokens, mask, x, pick)
    for i, e in enumerate(chosen):
        assert torch.allclose(shared[i : i + 1], one_member(net, e)(tokens, mask, x), atol=1e-6)
    n = len(chosen)
    tokens, mask, x = torch.randn(n, 3, 6, 4), torch.rand(n, 3, 6) < 0.7, torch.randn(n, 6, 3)
    separate = net(tokens, mask, x, pick)
    for i, e in enumerate(chosen):
        alone = one_member(net, e)(tokens[i], mask[i], x[i])
        assert torch.allclose(separate[i : i + 1], alone, atol=1e-6)


@pytest.mark.parametrize("size", [1.0, 1e30, math.inf, math.nan])
def test_padding_has_exactly_no_effect_on_output_or_gradient(size):
    net = HistoryNet(2, 5, 3, 2, widths=(8,))
    batch, x = random_batch(2, 2, L=4, B=15), torch.randn(15, 3)
    tokens, mask = batch.tokens[:-1], batch.mask[:-1]
    results = []
    for padding in (torch.zeros_like(tokens), torch.randn_like(tokens) * size):
        leaf = torch.where(mask[..., None], tokens, padding).requires_grad_()
        out = net(leaf, mask, x)
        grads = torch.autograd.grad(out.square().sum(), [leaf, *net.parameters()])
        assert not grads[0][~mask].any() and grads[0][mask].any(-1).all()
        results.append([out, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("model, moves", [("gru", True), ("mlp", False)])
def test_the_meta_model_s_prediction_moves_with_the_history_and_m2po_s_does_not(model, moves):
    args, env, _ = parse(*TINY, "--model", model)
    policy, net = m3po.build(args, env, "cpu")
    obs, actions = torch.randn(6, 1), torch.rand(6, 1)
    mask = torch.ones(args.L, 6, dtype=torch.bool)
    one, other = (net.predict_mean(torch.randn(args.L, 6, 3), mask, obs, actions)[0]
                  for _ in range(2))
    assert torch.equal(one, other) != moves
    one, other = (policy.act(torch.randn(args.L, 6, 3), mask, obs, True) for _ in range(2))
    assert not torch.equal(one, other)  # M2PO's policy keeps the history
    assert one.shape == (6, 1) and net.members == (3 if moves else 7)


# --- Lines 2, 4: the counts of Table 2 ------------------------------------------------------------


@pytest.mark.parametrize("env, M, G", [
    ("halfcheetah-fwd-bwd", 1000, 40), ("halfcheetah-pier", 500, 40), ("ant-fwd-bwd", 1000, 40),
    ("ant-crippled-leg", 1000, 40), ("walker2d-randomparams", 500, 40),
    ("humanoid-direc", 500, 20)])
def test_the_defaults_are_table_2_but_for_branches_of_two_steps(env, M, G):
    args, _, _ = parse("--env", env)
    assert (args.N, args.E, args.B, args.L) == (200, 1000, 3, 10)
    assert args.k == 2 and parse()[0].k == 1  # Table 2: 1 (docs/DEVIATIONS.md 24), as on the toy
    assert (args.M, args.G, args.width, args.z_dim, args.rollout, args.model) == (
        M, G, 400, 5, "branched", "gru")


# --- Line 3: the meta-model is fitted to D_env ----------------------------------------------------


@pytest.mark.parametrize("beta, reward_weight", [(0.0, 1.0), (0.5, None), (1.0, 3.0)])
def test_the_loss_is_the_weighted_beta_nll_of_torch_distributions(beta, reward_weight):
    model = MetaModel(2, 1, widths=(8,), beta_nll=beta, reward_weight=reward_weight).double()
    model.max_logvar, model.min_logvar = high, low = 1.5, -3.0
    batch = random_batch(2, 1, L=3, B=6, dtype=torch.float64)
    inputs = batch.tokens[:-1], batch.mask[:-1], torch.randn(6, 3).double()
    y = torch.randn(3, 6, 3).double()
    raw = model.net(*inputs)
    weight = [model.obs_dim if reward_weight is None else reward_weight, 1, 1]  # r, then o' - o
    slow = 0.0
    for e, b, j in itertools.product(range(3), range(6), range(3)):
        logvar = high - (1 + (high - raw[e, b, 3 + j]).exp()).log()
        logvar = low + (1 + (logvar - low).exp()).log()
        assert low < logvar < high + 0.1
        term = -Normal(raw[e, b, j], (logvar / 2).exp()).log_prob(y[e, b, j])
        slow = slow + term * logvar.exp().detach() ** beta * weight[j] / sum(weight) / 6
    loss = model.loss(*inputs, y)
    assert math.isclose(loss.item(), slow.item(), rel_tol=1e-6)
    net = list(model.net.parameters())  # the same gradient: the factor variance^beta is detached
    for ours, theirs in zip(torch.autograd.grad(loss, net), torch.autograd.grad(slow, net)):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_members_draw_their_own_minibatches_from_all_rows_and_no_holdout_row(monkeypatch):
    D_env = EnvBuffer(400, 1, 1, L=2, holdout=0.25)
    for row in range(400):
        D_env.add(torch.randn(1), torch.randn(1), row, [0.0], False, row % 9 == 8)  # r says the row
    model = MetaModel(1, 1, widths=(4,), batch_size=64)
    record = []
    spy(monkeypatch, model, "loss", record)
    model.fit(D_env)
    y = torch.stack([args[3][..., 0] for args, *_ in record])  # [steps, E, 64]
    rows = (y * model.target_std[0] + model.target_mean[0]).round().long()
    assert rows.shape == (400, 3, 64)
    assert len(torch.unique(rows.flatten(0, 1), dim=0)) == 1_200  # no two minibatches alike
    train = D_env.rows(holdout=False)
    times = torch.bincount(rows.flatten(), minlength=400)
    assert (times[D_env.rows(holdout=True)] == 0).all()
    expected = rows.numel() / len(train)  # about 256 each, old or new
    assert ((times[train] - expected).abs() < 6 * expected**0.5).all()


def test_a_hidden_sign_is_found_through_the_rewards_of_the_history_and_not_without():
    """r = sign * a, the sign drawn per episode and shown nowhere but in earlier rewards."""
    D_env, explained = hidden_sign_world(2_000), {}
    for name, token_dim in (("o, a, r", 3), ("o, a", 2), ("blind", 0)):
        model = MetaModel(1, 1, widths=(32,), token_dim=token_dim, lr=1e-2)
        explained[name] = float(model.fit(D_env)["explained_reward"])
    # An episode's first step, 1 in 20, cannot be known.
    assert 0.85 < explained["o, a, r"] < 1.0, explained
    assert explained["o, a"] < 0.1 and explained["blind"] < 0.1, explained


# --- Line 5: a real step, chosen from the history that it is later trained with -------------------


def test_the_live_window_is_the_window_its_step_gets_once_it_is_stored():
    D_env, rng, seen = EnvBuffer(20, 1, 1, L=3), random.Random(1), Counter()
    for row in range(200):
        tokens, mask = D_env.live_window()
        assert tokens.shape == (3, 1, 3) and mask.shape == (3, 1)
        seen[int(mask.sum())] += 1
        D_env.add([row], [0.5], -row, [row + 1], rng.random() < 0.2, rng.random() < 0.1)
        stored = D_env.batch(torch.tensor([row]))
        assert torch.equal(mask, stored.mask[:-1])
        assert torch.equal(tokens[mask], stored.tokens[:-1][mask])
    assert set(seen) == {0, 1, 2, 3}


# --- Lines 6-9: k imagined steps from histories of D_env, into D_model ----------------------------


def test_a_branch_at_t_sees_only_history_up_to_t():
    D_env = real_steps(60, L=3)
    origin = torch.tensor([0, 1, 5, 6, 7, 24, 33])
    clean = branch(D_env, origin)
    for i, t in enumerate(origin.tolist()):
        spoilt = copy.deepcopy(D_env)
        spoilt.tokens[t + 1 :] = spoilt.next_obs[t:] = math.nan
        spoilt.tokens[t, 1:] = math.nan  # also step t's own action and reward
        b = branch(spoilt, origin[i : i + 1])
        assert b.obs.item() == t and torch.equal(b.mask[:, 0], clean.mask[:, i])
        assert b.tokens[b.mask][:, 0].tolist() == list(range(t - t % 7, t))[-3:]
        assert torch.equal(b.tokens[b.mask], clean.tokens[:, i][clean.mask[:, i]])


@pytest.mark.parametrize("B", [1, 2, 3, 7])
def test_each_row_is_drawn_from_one_member_and_from_each_equally_often(B):
    """Member e predicts (e, e, e): a mixture of members within a row would show."""
    model = constant_heads(MetaModel(2, 1, members=3, widths=(4,)), [0.0, 1.0, 2.0])
    tokens, mask = torch.randn(4, B, 4), torch.ones(4, B, dtype=torch.bool)
    obs, actions, count = torch.randn(B, 2), torch.zeros(B, 1), torch.zeros(B, 3)
    for _ in range(900):
        reward, next_obs = model.sample(tokens, mask, obs, actions)
        member = reward.round().long()
        assert torch.allclose(reward, member.float(), atol=1e-5)
        assert torch.allclose(next_obs - obs, member[:, None].float(), atol=1e-5)
        count[torch.arange(B), member] += 1
    assert (count - 300).abs().max() < 5 * 200**0.5  # 5 standard deviations, for every row


@pytest.mark.parametrize("L", [0, 1, 3, 7])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_after_k_imagined_steps_a_window_is_real_tokens_then_the_branchs_own(k, L):
    D_env, policy = real_steps(60, L), FakePolicy()
    D_model = ModelBuffer(D_env, M=8, k=k, steps=3, terminated_fn=never_terminates)
    for _ in range(7):  # the ring of 3 rollouts wraps twice
        D_model.rollout(policy, FakeModel())
    stored = stored_rows(D_model)
    assert len(D_model) == len(stored) == 3 * k * 8
    # Oldest first out: the last 3 of 7 rollouts are left, with every branch and depth of them.
    assert set(stored) == {(call, b) for call in range(4 * k, 7 * k) for b in range(8)}
    for (call, b), (origin, depth, window, mask, next_obs, done) in stored.items():
        assert depth == call % k and next_obs == origin + 1_000 * (depth + 1) and done == 0
        real = [[step, 0.5, -1, -step] for step in range(origin - origin % 7, origin)]
        own = [(origin + 1_000 * d, call - depth + d, b) for d in range(depth)]
        n_own, n_real = min(L, depth), max(0, min(len(real), L - depth))
        assert mask.tolist() == [False] * (L - n_own - n_real) + [True] * (n_own + n_real)
        assert window[L - n_own - n_real : L - n_own].tolist() == real[len(real) - n_real :]
        imagined = window[L - n_own :, [0, 2, 3]].tolist()  # obs, call and branch
        assert imagined == [list(token) for token in own[depth - n_own :]]


@pytest.mark.parametrize("L", [0, 2, 6])
def test_the_dead_and_the_non_finite_store_nothing_and_are_counted(L):
    """A branch from step s terminates with its imagined step number s % 3; branch 0 gets a NaN
    reward at depth 1 and branch 1 an infinite observation at depth 0."""
    dies = lambda next_obs: next_obs[:, 0] // 1_000 > next_obs[:, 0] % 1_000 % 3
    D_model = ModelBuffer(real_steps(60, L), M=9, k=4, steps=5, terminated_fn=dies)
    expected, stats = set(), [0, 0, 0]
    for rollout in range(5):
        state = torch.get_rng_state()
        origins = D_model.D_env.sample_rows(9).tolist()
        torch.set_rng_state(state)
        D_model.rollout(FakePolicy(), FakeModel(nan_reward=[(0, 1)], nan_obs=[(1, 0)]))
        for b, s in enumerate(origins):
            for depth in range(s % 3 + 1):
                stats[0] += 1
                if (b, depth) in ((0, 1), (1, 0)):
                    stats[2] += 1
                    break
                expected.add((rollout, b, s, depth))
        stats[1] += sum(
            (s % 3) < {0: 1, 1: 0}.get(b, 9) for b, s in enumerate(origins))  # lived to its end
    assert D_model.stats.tolist() == stats and min(stats) > 0
    assert len(D_model) == len(expected)
    batch = D_model.sample(5_000)
    assert batch.tokens[batch.mask].isfinite().all() and batch.next_obs.isfinite().all()
    o, _, _, b = batch.tokens[-1].T
    origin, depth = o % 1_000, o // 1_000
    assert torch.equal(batch.terminated, (depth == origin % 3).float())
    assert set(zip(b.tolist(), origin.tolist(), depth.tolist())) == {e[1:] for e in expected}


# --- Lines 10-12: soft actor-critic on the histories of D_model -----------------------------------


@torch.no_grad()
def test_log_probabilities_are_those_of_torch_distributions():
    policy, batch = tiny_policy(), random_batch(2, 2, L=3, B=30, dtype=torch.float64)
    tokens, mask, (obs, _, _) = batch.tokens[:-1], batch.mask[:-1], batch.split(2)
    noise = torch.randn(30, 2).double()
    actions, logp = policy.sample(tokens, mask, obs, noise)
    assert actions.shape == (30, 2) and logp.shape == (30,)
    for b in range(30):
        seen = slow_standardised(policy, tokens[:, b], obs[b])
        squashed, gaussian = torch_policy(policy, seen[0], mask[:, b], seen[1])
        action = TanhTransform()(gaussian.mean + gaussian.stddev * noise[b])
        assert torch.allclose(actions[b], action)
        assert torch.isclose(logp[b], squashed.log_prob(action), atol=1e-6)


def slow_losses(policy, batch, noise):
    """Critic, actor and temperature loss row by row, with torch.nn and torch.distributions.
    noise [2, B, A]: of the next action and of the action."""
    B, alpha = len(batch.next_obs), policy.log_alpha.exp().item()
    critic = td_error = actor = temperature = 0.0
    logps = []
    for b in range(B):
        mask, own = batch.mask[:, b], batch.tokens[-1, b]
        action, reward = own[2:4], own[4].item()  # these are not standardised
        tokens, next_obs = slow_standardised(policy, batch.tokens[:, b], batch.next_obs[b])
        obs = tokens[-1, :2]

        def q(net, tokens, mask, obs, action):
            return [torch_forward(net, e, tokens[mask], torch.cat([obs, action]))[1].item()
                    for e in range(2)]

        now = tokens[:-1], mask[:-1], obs  # h_t
        after = tokens[1:], mask[1:], next_obs  # h_{t+1} has seen step t's token
        squashed, gaussian = torch_policy(policy, *after)
        next_action = torch.tanh(gaussian.mean + gaussian.stddev * noise[0, b])
        v = min(q(policy.qf_target, *after, next_action))
        v -= alpha * squashed.log_prob(next_action).item()
        y = policy.reward_scale * reward + (0.0 if batch.terminated[b] else policy.gamma * v)
        critic += sum((q_i - y) ** 2 for q_i in q(policy.qf, *now, action)) / B
        td_error += sum(abs(q_i - y) for q_i in q(policy.qf, *now, action)) / (2 * B)

        squashed, gaussian = torch_policy(policy, *now)
        new_action = torch.tanh(gaussian.mean + gaussian.stddev * noise[1, b])
        logp = squashed.log_prob(new_action).item()
        actor += (alpha * logp - min(q(policy.qf, *now, new_action))) / B
        temperature += -alpha * (logp + policy.target_entropy) / B
        logps.append(logp)
    return critic, td_error, actor, temperature, torch.tensor(logps).double()


@torch.no_grad()
@pytest.mark.parametrize("alpha, scale", [(None, 1.0), (0.7, 1.0), (None, 0.1)])
def test_the_three_losses_equal_their_equations_row_by_row(alpha, scale):
    policy = tiny_policy(alpha=alpha, gamma=0.9, reward_scale=scale)
    batch = random_batch(2, 2, L=3, B=24, dtype=torch.float64)
    noise = torch.randn(2, 24, 2).double()
    critic, td_error, actor, temperature, logp = slow_losses(policy, batch, noise)
    loss, _, our_td_error = policy.critic_loss(batch, noise[0])
    assert math.isclose(loss.item(), critic, rel_tol=1e-6)
    assert math.isclose(our_td_error.item(), td_error, rel_tol=1e-6)
    loss, our_logp = policy.actor_loss(batch, noise[1])
    assert math.isclose(loss.item(), actor, rel_tol=1e-6)
    assert torch.allclose(our_logp, logp, atol=1e-6)
    assert math.isclose(policy.temperature_loss(logp).item(), temperature, rel_tol=1e-6)
    assert policy.target_entropy == -1.0  # -A / 2, as in MBPO


def test_the_targets_move_towards_q_by_exactly_tau_and_have_no_gradient():
    policy, batch, noise = update_case(tau=0.25)
    before = copy.deepcopy(policy.qf_target)
    policy.update(batch, noise)
    for old, target, q in zip(before.parameters(), policy.qf_target.parameters(),
                              policy.qf.parameters()):
        assert torch.allclose(target, 0.75 * old + 0.25 * q, atol=1e-6)
        assert target.grad is None and not target.requires_grad


def test_updates_find_the_best_action_which_only_the_history_tells():
    """A bandit: r = -(a - g)^2, and g = +-0.5 is the reward of the one earlier token."""
    policy = MetaPolicy(1, 1, widths=(32,), lr=3e-3, alpha=1e-3)
    B = 128
    mask = torch.ones(2, B, dtype=torch.bool)
    for _ in range(400):
        goal = torch.where(torch.rand(B) < 0.5, 0.5, -0.5)
        action = torch.rand(B) * 2 - 1
        tokens = torch.zeros(2, B, 3)
        tokens[0, :, 2], tokens[1, :, 1], tokens[1, :, 2] = goal, action, -((action - goal) ** 2)
        batch = Batch(tokens, mask, torch.zeros(B, 1), torch.ones(B))
        policy.update(batch, torch.randn(2, B, 1))
    for goal in (0.5, -0.5):
        token = torch.tensor([[[0.0, 0.0, goal]]])
        best = policy.act(token, mask[:1, :1], torch.zeros(1, 1), deterministic=True)
        assert abs(best.item() - goal) < 0.25


# --- The whole: a run can be repeated and resumed, and its agent adapts by its hidden state alone -


def test_the_same_seed_gives_the_same_run_and_another_does_not(tmp_path):
    assert_same_run(run(tmp_path / "a"), run(tmp_path / "b"))
    assert read_rows(run(tmp_path / "c", "--seed", 1)) != read_rows(tmp_path / "a")


@pytest.mark.parametrize("flags", [
    [], ["--env", "halfcheetah-fwd-bwd", "--reset-every", 30],  # saved after 80 env steps
    ["--env", "ant-crippled-leg", "--k", 3], ["--rollout", "full"],
    ["--env", "walker2d-randomparams", "--model", "mlp"], ["--hybrid", 1, 3]])
def test_stopping_and_resuming_equals_never_stopping(flags, tmp_path):
    flags += ["--eval-every", 2, "--eval-episodes", 1]
    a = run(tmp_path / "a", *flags, "--N", 4)
    b = resume_run(run(tmp_path / "b", *flags, "--N", 2), "--N", 4)
    assert_same_run(a, b)


class SignEnv:
    """o = 0 throughout and r = sign: the reward alone tells the task."""

    def __init__(self, sign):
        self.sign = sign

    def reset(self, seed=None):
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.zeros(1, np.float32), self.sign, self.t == 5, False, {}


def test_adapting_is_z_moving_with_no_gradient_and_no_weight_changed():
    policy, seen = MetaPolicy(1, 1, widths=(8,)), []
    before, act = copy.deepcopy(policy.state_dict()), policy.act

    def watched(tokens, mask, obs, deterministic):
        z = policy.actor.encode(policy.standardise(tokens, obs)[0], mask)[0]
        action = act(tokens, mask, obs, deterministic)
        seen.append((obs.clone(), z, action))
        assert not torch.is_grad_enabled() and not action.requires_grad
        return action

    policy.act = watched
    evaluation.evaluate(policy, evaluation.Group([SignEnv(-1.0), SignEnv(1.0)]), [0, 0], 3)
    for t, (obs, z, action) in enumerate(seen):
        assert not obs.any()  # the two episodes look the same at every step
        assert z.any() == (t > 0)
        for both in (z, action):
            assert torch.equal(both[0], both[1]) == (t == 0)  # until their first reward
    assert len(seen) == 5
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


def test_an_agent_learns_to_adapt_on_the_toy_and_a_blind_one_cannot(tmp_path):
    """Knowing the direction is worth 100, guessing it 0. A third of the default run."""
    flags = ["--N", "5", "--seed", "1", "--diagnose-every", "0"]
    for name, extra in (("sees", []), ("blind", ["--L", "0", "--G", "2", "--N", "3"])):
        m3po.main(*parse(*flags, *extra, "--out", tmp_path / name))
    sees, blind = (max(float(row["eval_return_mean"]) for row in read_rows(tmp_path / name)[-2:])
                   for name in ("sees", "blind"))
    assert sees > 40 and abs(blind) < 15
