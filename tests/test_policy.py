"""policy.py: soft actor-critic on histories. More in test_m3po.py."""

import copy
import importlib
import math

import pytest
import torch

import m3po
from policy import LOGGED, MetaPolicy
from rollouts import EnvBuffer
from tests.conftest import (
    fill, random_batch, slow_standardised, tiny_policy, torch_policy, update_case,
)


@torch.no_grad()
def test_log_probabilities_of_a_batchs_own_actions_are_those_of_torch_distributions():
    policy, batch = tiny_policy(), random_batch(2, 2, L=3, B=30, dtype=torch.float64)
    logp = policy.log_prob(batch)
    for b in range(30):
        tokens, obs = slow_standardised(policy, batch.tokens[:, b], batch.tokens[-1, b, :2])
        squashed, _ = torch_policy(policy, tokens[:-1], batch.mask[:-1, b], obs)
        assert torch.isclose(logp[b], squashed.log_prob(batch.tokens[-1, b, 2:4]), atol=1e-6)
    batch.tokens[-1, :, 2:4] = torch.tensor([1.0, -1.0])  # at the bounds, where the density ends
    assert policy.log_prob(batch).isfinite().all()


@pytest.mark.parametrize("angles", [[], [1]])
@pytest.mark.parametrize("method", ["m3po", "pearl", "l2a", "ghp_mdp"])
def test_a_full_turn_changes_no_methods_action_if_its_nets_know_the_angle(method, angles):
    """A cheetah lies on its back at +180 degrees and at -180."""
    module = m3po if method == "m3po" else importlib.import_module(f"baselines.{method}")
    given = ["--env", "halfcheetah-fwd-bwd", "--width", "8", "--angles", *map(str, angles)]
    args, env, _ = m3po.parse_args(given, method)
    batch = random_batch(17, 6, L=args.L, B=3)
    mask = torch.ones(args.L, 3, dtype=torch.bool)

    def act(tokens):
        torch.manual_seed(0)
        agent = module.build(args, env, "cpu")
        agent = agent[0] if method == "m3po" else agent
        if method in ("l2a", "ghp_mdp"):
            agent.own_draws.manual_seed(0)
        return agent.act(tokens[:-1], mask, tokens[-1, :, :17], deterministic=True)

    turned = batch.tokens.clone()
    turned[..., 1] += 2 * math.pi
    assert torch.allclose(act(batch.tokens), act(turned), atol=1e-3) == bool(angles)


@torch.no_grad()
def test_far_into_saturation_log_probabilities_stay_finite_and_right():
    """Mean 12, deviation 1, noise 0: log N = -log(2 pi) / 2, log(1 - tanh(12)^2) = log 4 - 24."""
    policy = MetaPolicy(1, 1, widths=(4,))
    for p in policy.actor.parameters():
        p.zero_()
    policy.actor.b[-1][0, 0, 0] = 12.0
    none = torch.zeros(2, 1, 3), torch.zeros(2, 1, dtype=torch.bool), torch.zeros(1, 1)
    action, logp = policy.sample(*none, torch.zeros(1, 1))
    assert action.item() == 1.0  # float32 cannot tell
    expected = -0.5 * math.log(2 * math.pi) - (math.log(4) - 24)
    assert math.isclose(logp.item(), expected, rel_tol=1e-5)
    policy.actor.b[-1][0, 0, 1] = 50.0  # log-std is clamped to 2
    _, log_std = policy.distribution(*none)
    assert log_std.item() == 2.0
    policy.actor.b[-1][0, 0, 1] = -50.0
    _, log_std = policy.distribution(*none)
    assert log_std.item() == -10.0


@torch.no_grad()
def test_acting_draws_from_the_same_distribution_and_the_mean_action_is_tanh_of_the_mean():
    policy, batch = MetaPolicy(2, 2, widths=(8,)), random_batch(2, 2, L=3, B=30)
    policy.token_mean.normal_(), policy.token_std.uniform_(0.2, 2.0)
    history = batch.tokens[:-1], batch.mask[:-1], 5 * batch.split(2)[0]
    torch.manual_seed(1)
    acted = policy.act(*history)
    torch.manual_seed(1)
    sampled, _ = policy.sample(*history, torch.randn(30, 2))
    assert torch.allclose(acted, sampled, atol=1e-6) and acted.abs().max() <= 1
    mean, _ = policy.distribution(*history)
    chosen = policy.act(*history, deterministic=True)
    assert torch.allclose(chosen, torch.tanh(mean), atol=1e-6)


def test_the_policys_nets_see_what_the_statistics_of_d_env_make_of_the_data():
    D_env, policy = EnvBuffer(50, 3, 1, L=2), MetaPolicy(3, 1)
    fill(D_env, 40)
    policy.use_statistics(D_env.statistics())
    batch = D_env.batch(torch.arange(40))
    tokens, obs = policy.standardise(batch.tokens, batch.split(3)[0])
    assert torch.allclose(tokens[-1].mean(0), torch.zeros(5), atol=1e-5)
    assert torch.allclose(tokens[-1].std(0, correction=0), torch.ones(5), atol=1e-5)
    assert torch.equal(tokens[-1, :, :3], obs)
    assert policy.standardise(1e6 * batch.tokens, obs)[0].abs().max() == 10
    assert {"token_mean", "token_std"} <= set(policy.state_dict())


@pytest.mark.parametrize("which", ["critic", "actor", "temperature"])
def test_gradients_equal_finite_differences_and_reach_nothing_else(which):
    policy = tiny_policy()
    batch = random_batch(2, 2, L=3, B=12, dtype=torch.float64)
    noise, logp = torch.randn(12, 2).double(), torch.randn(12).double()
    part, loss = {
        "critic": (policy.qf, lambda: policy.critic_loss(batch, noise)[0]),
        "actor": (policy.actor, lambda: policy.actor_loss(batch, noise)[0]),
        "temperature": (None, lambda: policy.temperature_loss(logp)),
    }[which]
    params = [policy.log_alpha] if part is None else list(part.parameters())
    if which == "actor":
        policy.qf.requires_grad_(False)  # as update() does
    loss().backward()
    for p in params:
        direction = torch.randn_like(p)
        along = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                p.add_(step * direction)
                along.append(loss().item())
                p.sub_(step * direction)
        slope = (along[0] - along[1]) / 2e-6
        assert math.isclose((p.grad * direction).sum().item(), slope, rel_tol=1e-5, abs_tol=1e-7)
        assert abs(slope) > 1e-7
    others = {id(p) for p in policy.parameters()} - {id(p) for p in params}
    assert all(p.grad is None for p in policy.parameters() if id(p) in others)


def test_one_update_moves_every_weight_of_the_actor_and_of_both_qs_at_its_rate():
    policy, batch, noise = update_case(lr=1e-3)
    before = copy.deepcopy(policy)
    policy.update(batch, noise)
    for part in ("actor", "qf"):
        for (name, new), old in zip(getattr(policy, part).named_parameters(),
                                    getattr(before, part).parameters()):
            moved = (new - old).abs()
            assert (moved > 0).all(), (part, name)
            assert torch.isclose(moved.median(), torch.tensor(1e-3), rtol=0.05)  # Adam's first step
    assert policy.log_alpha != before.log_alpha


def test_the_actors_step_changes_no_q_and_the_critics_step_no_actor():
    policy, batch, noise = update_case()
    critic_only = copy.deepcopy(policy)
    critic_only.critic_loss(batch, noise[0])[0].backward()
    critic_only.q_optimizer.step()
    actor_only = copy.deepcopy(critic_only)  # the actor's step comes after the critic's
    actor_only.actor_loss(batch, noise[1])[0].backward()
    actor_only.actor_optimizer.step()
    log_alphas = set()
    for left_over in (None, 100.0, -100.0):  # gradients from before
        fresh = copy.deepcopy(policy)
        for p in fresh.parameters():
            if left_over and p.requires_grad:
                p.grad = torch.full_like(p, left_over)
        fresh.update(batch, noise)
        log_alphas.add(fresh.log_alpha.item())
        for a, b in zip(fresh.qf.parameters(), critic_only.qf.parameters()):
            assert torch.equal(a, b) and a.requires_grad
        for a, b in zip(fresh.actor.parameters(), actor_only.actor.parameters()):
            assert torch.equal(a, b)
        for a, b in zip(fresh.qf.parameters(), critic_only.qf.parameters()):
            assert torch.equal(a.grad, b.grad)  # the actor's loss has added nothing
    assert len(log_alphas) == 1


def test_a_given_alpha_stays_and_a_tuned_one_follows_the_entropy():
    policy, batch, noise = update_case(alpha=0.5)
    for _ in range(3):
        policy.update(batch, noise)
    assert math.isclose(policy.log_alpha.exp().item(), 0.5, rel_tol=1e-6)
    for target_entropy, rises in ((50.0, True), (-50.0, False)):
        policy, batch, noise = update_case(target_entropy=target_entropy)
        assert math.isclose(policy.log_alpha.exp().item(), 0.1, rel_tol=1e-6)
        policy.update(batch, noise)
        assert (policy.log_alpha.exp() > 0.1).item() == rises


def test_an_update_returns_what_it_says():
    policy, batch, noise = update_case(alpha=0.5)
    with torch.no_grad():
        q_loss, q_mean, td_error = policy.critic_loss(batch, noise[0])
        own = torch.cat(batch.split(2)[:2], -1)  # statistics 0 and 1: nothing is standardised
        assert torch.isclose(q_mean, policy.qf(batch.tokens[:-1], batch.mask[:-1], own).mean())
    twin = copy.deepcopy(policy)
    returned = policy.update(batch, noise)
    assert not returned.requires_grad and len(returned) == len(LOGGED)
    found = dict(zip(LOGGED, returned))
    assert found["q_loss"] == q_loss and found["q_mean"] == q_mean and found["td_error"] == td_error
    twin.critic_loss(batch, noise[0])[0].backward()
    twin.q_optimizer.step()
    actor_loss, logp = twin.actor_loss(batch, noise[1])
    assert found["actor_loss"] == actor_loss and found["entropy"] == -logp.mean()


def test_the_same_update_twice_gives_the_same_numbers():
    policy, batch, noise = update_case()
    twin = copy.deepcopy(policy)
    for _ in range(3):
        assert torch.equal(policy.update(batch, noise), twin.update(batch, noise))
    for a, b in zip(policy.parameters(), twin.parameters()):
        assert torch.equal(a, b)


def test_restandardising_says_how_far_it_moves_q():
    D_env = EnvBuffer(50, 3, 1, L=2)
    fill(D_env, 40)
    policy = MetaPolicy(3, 1, widths=(8,))
    before = copy.deepcopy(policy)
    shift = policy.restandardise(D_env, most=40)  # all rows
    assert torch.equal(policy.token_mean, D_env.statistics()["token_mean"])
    batch, q = D_env.batch(torch.arange(40)), []
    for p in (before, policy):
        own = batch.split(3)
        q.append(p.q_values(p.qf, batch.tokens[:-1], batch.mask[:-1], *own[:2]))
    assert shift == pytest.approx((q[1] - q[0]).square().mean().sqrt().item(), rel=1e-4) and shift
    assert policy.restandardise(D_env) < 1e-6  # the same statistics again


def test_with_changes_policy_and_q_see_what_each_token_brought_about():
    policy = MetaPolicy(2, 1, widths=(8,), changes=True)
    policy.target_mean.fill_(0.5), policy.target_std.fill_(2.0)
    window, obs = torch.randn(3, 5, 4), torch.randn(5, 2)
    tokens, _ = policy.standardise(window, obs)
    assert tokens.shape == (3, 5, 6) and torch.equal(tokens[..., 2:], window)
    following = torch.cat([window[1:, :, :2], obs[None]])
    assert torch.allclose(tokens[..., :2], (following - window[..., :2] - 0.5) / 2)
    assert policy.actor.token_dim == policy.qf.token_dim == 6
