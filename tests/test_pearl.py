"""baselines/pearl.py: what its z knows and may not know, whence the encoder learns, whole runs."""

import csv
import json

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

import checkpoint
import figures
import m3po
import play
from baselines import pearl
from policy import LOGGED
from rollouts import Batch, EnvBuffer
from tests.conftest import assert_same_run, needs_compiler, random_batch, read_rows

TINY = ["--N", "2", "--E", "40", "--G", "2", "--warmup", "40", "--width", "8", "--batch-size", "16",
        "--eval-episodes", "2"]


def parse(*flags):
    return m3po.parse_args([str(flag) for flag in flags], "pearl")


def run(out, *flags):
    assert pearl.main(*parse(*TINY, *flags, "--out", out)) is None
    return out


@pytest.fixture
def agent():
    agent = pearl.Pearl(2, 1, widths=(8, 8), z_dim=3, keep=1)
    agent.use_statistics({"token_mean": torch.tensor([1.0, -1, 0, 2]),
                          "token_std": torch.tensor([2.0, 1, 0.5, 3]),
                          "target_mean": torch.tensor([2, 0.1, -0.2]),
                          "target_std": torch.tensor([3, 0.5, 2.0])})
    return agent


# ---- q(z | c) -----------------------------------------------------------------------------------


def test_the_product_of_gaussians_is_the_normalised_product_of_their_densities():
    """log of the product minus log q is one constant wherever one looks."""
    means, variances = torch.randn(4, 5, 3).double(), torch.rand(4, 5, 3).double() + 0.1
    mask = torch.arange(3, -1, -1)[:, None] <= torch.arange(5) % 4  # 1 to 4 factors
    mean, variance = pearl.product_of_gaussians(means, variances, mask)
    for b in range(5):
        at = torch.randn(7, 3).double()  # seven places to look
        product = sum(Normal(means[n, b], variances[n, b].sqrt()).log_prob(at)
                      for n in range(4) if mask[n, b])
        constant = product - Normal(mean[b], variance[b].sqrt()).log_prob(at)
        assert torch.allclose(constant, constant[:1].expand(7, 3))


def test_the_product_taken_factor_by_factor_in_any_order_is_the_same():
    means, variances = torch.randn(6, 1, 2).double(), torch.rand(6, 1, 2).double() + 0.1
    mean, variance = pearl.product_of_gaussians(means, variances, torch.ones(6, 1).bool())
    m, v = means[-1, 0], variances[-1, 0]
    for n in (3, 0, 4, 1, 2):  # two Gaussians at a time
        m, v = ((m * variances[n, 0] + means[n, 0] * v) / (v + variances[n, 0]),
                v * variances[n, 0] / (v + variances[n, 0]))
    assert torch.allclose(mean[0], m) and torch.allclose(variance[0], v)


def test_an_empty_context_gives_the_prior_whatever_lies_in_its_slots(agent):
    tokens, mask = torch.full((3, 4, 4), torch.nan), torch.zeros(3, 4).bool()
    obs = torch.randn(4, 2)
    for L in (3, 0):
        mean, variance = agent.infer(tokens[:L], mask[:L], obs)
        assert torch.equal(mean, torch.zeros(4, 3)) and torch.equal(variance, torch.ones(4, 3))


def test_one_transition_is_one_factor_and_the_prior_is_none(agent):
    tokens, obs = torch.randn(1, 4, 4), torch.randn(4, 2)
    mean, variance = agent.infer(tokens, torch.ones(1, 4).bool(), obs)
    twice = tokens[0, :, :2]  # o = o' in both copies, so that they are one transition, twice
    two, halved = agent.infer(tokens.expand(2, 4, 4), torch.ones(2, 4).bool(), twice)
    one, whole = agent.infer(tokens, torch.ones(1, 4).bool(), twice)
    assert torch.allclose(two, one, atol=1e-6) and torch.allclose(halved, whole / 2)
    assert not torch.allclose(mean, one)  # for o' is read


def test_the_posterior_agrees_with_a_loop_over_rows_and_real_transitions(agent):
    batch = random_batch(2, 1, L=3, B=8)
    mean, variance = agent.infer(*agent.context(batch))
    for b in range(8):
        precision, weighted = torch.zeros(3), torch.zeros(3)
        for n in range(3):
            if batch.mask[n, b]:
                token = batch.tokens[n, b]
                change = batch.tokens[n + 1, b, :2] - token[:2]
                change = (change - agent.target_mean[1:]) / agent.target_std[1:]
                token = (token - agent.token_mean) / agent.token_std
                x = torch.cat([change, token]).clamp(-10, 10)[None]  # (o' - o, o, a, r)
                none = torch.zeros(0, 1, 4), torch.zeros(0, 1).bool()
                m, s = agent.encoder(*none, x)[0, 0].split(3)
                precision += 1 / torch.nn.functional.softplus(s)
                weighted += m / torch.nn.functional.softplus(s)
        seen = precision > 0
        expected = torch.where(seen, weighted / precision, 0.0), torch.where(seen, 1 / precision, 1)
        assert torch.allclose(mean[b], expected[0], atol=1e-5)
        assert torch.allclose(variance[b], expected[1], atol=1e-5)


def test_the_divergence_is_that_of_torch_distributions():
    mean, variance = torch.randn(4, 3), torch.rand(4, 3) + 0.1
    q = Independent(Normal(mean, variance.sqrt()), 1)
    prior = Independent(Normal(torch.zeros(4, 3), torch.ones(4, 3)), 1)
    assert torch.allclose(pearl.divergence_from_prior(mean, variance), kl_divergence(q, prior))


def test_a_rows_own_transition_is_not_in_its_context(agent):
    """Every reward is the number of its row, and o' of a row the next one's o: what z is inferred
    from ends one before the row, within its episode."""
    D_env = EnvBuffer(100, 2, 1, L=3)
    for i in range(20):  # episodes of 7
        D_env.add([i**2, 0], [0], i, [(i + 1)**2, 0], False, (i + 1) % 7 == 0)
    rows = torch.arange(20)
    tokens, mask, obs = agent.context(D_env.batch(rows))
    as_it_is = pearl.Pearl(2, 1)  # it has not been told any statistics
    seen = pearl.scale_tokens(tokens / 100, obs / 100, as_it_is, changes=True) * 100
    for b in rows.tolist():
        ids = [round(seen[n, b, 5].item()) for n in range(3) if mask[n, b]]
        first = max(b - 3, b // 7 * 7)
        assert ids == list(range(first, b))
        assert [round(seen[n, b, 0].item()) for n in range(3) if mask[n, b]] == [
            (i + 1)**2 - i**2 for i in ids]
    changed = D_env.batch(rows)
    changed.tokens[-1, :, 2:] += 5  # the row's own action and reward
    changed.next_obs.add_(5)
    for q, other in zip(agent.infer(tokens, mask, obs), agent.infer(*agent.context(changed))):
        assert torch.equal(q, other)


def test_a_row_is_learned_with_another_part_of_its_window_each_time(agent):
    """With the same context each time z could say which row it is: Q would learn rows by heart."""
    D_env = EnvBuffer(500, 2, 1, L=4)
    for i in range(500):
        D_env.add([i, 0], [0], i, [i + 1, 0], False, (i + 1) % 50 == 0)
    batch = D_env.batch(torch.arange(500))
    there, agent.keep = batch.mask[:-1], 0.25
    masks = [agent.context(batch)[1] for _ in range(40)]
    assert not any((mask & ~there).any() for mask in masks)
    often = torch.stack(masks).float().mean(0)[there]
    assert abs(often.mean() - 0.25) < 0.01 and often.std() < 1.2 * (0.25 * 0.75 / 40) ** 0.5
    acting = agent.infer(batch.tokens[:-1], there, batch.split(2)[0])
    agent.keep = 1  # nobody acts on less than the whole window
    for q, other in zip(acting, agent.infer(*agent.context(batch))):
        assert torch.equal(q, other)


# ---- learning -----------------------------------------------------------------------------------


def gradient(loss, parameters):
    grads = torch.autograd.grad(loss, list(parameters), allow_unused=True, retain_graph=True)
    return sum(0.0 if g is None else g.abs().sum().item() for g in grads)


def test_the_encoder_learns_from_the_loss_of_q_and_the_divergence_and_never_from_pi(agent):
    batch = random_batch(2, 1, L=3, B=16)
    mean, variance = agent.infer(*agent.context(batch))
    z = mean + variance.sqrt() * torch.randn_like(mean)
    noise, encoder = torch.randn(16, 1), agent.encoder
    q_loss = agent.sac.critic_loss(agent.with_z(batch, z), noise)[0]
    kl = pearl.divergence_from_prior(mean, variance).mean()
    assert gradient(q_loss, encoder.parameters()) > 0 and gradient(kl, encoder.parameters()) > 0

    # With z's gradient left in, pi's loss would reach the encoder; update_actor is not given it.
    actor_loss = agent.sac.actor_loss(agent.with_z(batch, z), noise)[0]
    assert gradient(actor_loss, encoder.parameters()) > 0
    given, update_actor = [], agent.sac.update_actor
    agent.sac.update_actor = lambda rows, noise: given.append(rows) or update_actor(rows, noise)
    agent.update(batch)
    assert not given[0].tokens.requires_grad and not given[0].next_obs.requires_grad


def test_an_update_gives_the_encoder_the_gradient_of_the_two_losses_alone(agent):
    """As computed here, loss by loss, from the same draws."""
    batch = random_batch(2, 1, L=3, B=16)
    torch.manual_seed(1)
    mean, variance = agent.infer(*agent.context(batch))
    z = mean + variance.sqrt() * torch.randn_like(mean)
    noise = torch.randn(2, 16, 1)
    q_loss = agent.sac.critic_loss(agent.with_z(batch, z), noise[0])[0]
    loss = q_loss + 0.1 * pearl.divergence_from_prior(mean, variance).mean()
    expected = torch.autograd.grad(loss, list(agent.encoder.parameters()))
    torch.manual_seed(1)
    agent.update(batch)
    assert all(torch.equal(p.grad, g) for p, g in zip(agent.encoder.parameters(), expected))


def test_q_and_pi_see_o_and_z_and_the_target_the_same_z_at_the_next_observation(agent):
    batch, z = random_batch(2, 1, L=3, B=4), torch.randn(4, 3)
    blind = agent.with_z(batch, z)
    obs, actions, rewards = blind.split(5)
    assert torch.equal(obs, torch.cat([batch.tokens[-1, :, :2], z], -1))
    assert torch.equal(blind.next_obs, torch.cat([batch.next_obs, z], -1))
    assert torch.equal(actions, batch.tokens[-1, :, 2:3])
    assert torch.equal(rewards, batch.tokens[-1, :, 3]) and len(blind.tokens) == 1
    shown = agent.sac.standardise(blind.tokens, obs)[1]
    expected = (batch.tokens[-1, :, :2] - agent.token_mean[:2]) / agent.token_std[:2]
    assert torch.allclose(shown[:, :2], expected)
    assert torch.equal(shown[:, 2:], z)  # z is left as it is


def test_an_update_moves_every_net(agent):
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    assert agent.update(random_batch(2, 1, L=3, B=16)).shape == (len(LOGGED) + 1,)
    for name in ("encoder.w.0", "sac.actor.w.0", "sac.qf.w.0", "sac.qf_target.w.0",
                 "sac.log_alpha"):
        assert not torch.equal(before[name], agent.state_dict()[name]), name


def test_evaluation_takes_the_mean_of_q_and_training_draws_z(agent):
    tokens, mask, obs = torch.randn(3, 5, 4), torch.ones(3, 5).bool(), torch.randn(5, 2)
    none = torch.zeros(0, 5, 7), mask[:0]
    z, _ = agent.infer(tokens, mask, obs)
    mean, _ = agent.sac.distribution(*none, torch.cat([obs, z], -1))
    assert torch.equal(agent.act(tokens, mask, obs, deterministic=True), torch.tanh(mean))
    assert not torch.equal(agent.act(tokens, mask, obs), agent.act(tokens, mask, obs))


# ---- whole runs ---------------------------------------------------------------------------------


def test_a_run_stopped_and_resumed_is_the_run_that_never_stopped(tmp_path):
    whole = run(tmp_path / "a", "--N", 3)
    part = run(tmp_path / "b")
    assert pearl.main(*parse("--resume", part, "--N", 3)) is None
    assert_same_run(whole, part)


def test_a_run_names_its_method_and_fills_the_columns_it_shares(tmp_path):
    folder = run(tmp_path / "a")
    assert json.loads((folder / "config.json").read_text())["method"] == "pearl"
    with open(folder / "progress.csv", newline="") as f:
        row = list(csv.DictReader(f))[-1]
    assert all(row[name] for name in (*LOGGED, "z_kl", "alpha", "eval_return_mean", "seconds_env"))
    assert not any(row[name] for name in ("beta", "imagined", "model_nll", "kl_pi"))
    assert list(row)[-1] == "z_kl"
    assert figures.read_runs([folder])[0]["point-fwd-bwd"].keys() == {
        "PEARL"}  # what is different is in the title, with one run


@needs_compiler
def test_a_compiled_run_is_the_eager_one_up_to_rounding(tmp_path):
    flags = "--E", 10, "--warmup", 10, "--L", 1, "--compile"  # ten updates, few slots
    eager, compiled = (read_rows(run(tmp_path / on, *flags, on))[-1] for on in ("off", "on"))
    for name in (*LOGGED, "z_kl", "eval_return_mean"):
        assert float(compiled[name]) == pytest.approx(float(eager[name]), rel=1e-3, abs=1e-4), name


def test_play_loads_its_agent_and_m3po_refuses_it(tmp_path, capsys):
    folder = run(tmp_path / "a")
    policy, model, env, args = play.load(folder)
    assert model is None and args.method == "pearl" and isinstance(policy, pearl.Pearl)
    saved = checkpoint.read(folder / "agent.pt", "agent")["policy"]
    assert all(torch.equal(saved[name], value) for name, value in policy.state_dict().items())
    with pytest.raises(checkpoint.CheckpointError, match="of the method pearl, not m3po"):
        m3po.load(folder)
    with pytest.raises(SystemExit) as stop:
        m3po.parse_args(["--resume", str(folder)])
    assert stop.value.code == 2 and "method pearl" in capsys.readouterr().err


def test_a_blind_run_has_nothing_to_infer_z_from(tmp_path):
    run(tmp_path / "a", "--L", 0)
    with open(tmp_path / "a/progress.csv", newline="") as f:
        assert float(list(csv.DictReader(f))[-1]["z_kl"]) == 0


@pytest.mark.parametrize("given, says", [
    (["--G", "-1"], "--G"), (["--kl-weight", "-1"], "--kl-weight"), (["--k", "2"], "--k"),
    (["--L", "x"], "--L"), (["--env", "nowhere"], "--env"), (["--resume", "nowhere"], "--resume"),
    (["--warmup", "10000"], "--warmup"), (["--beta", "0"], "--beta")])
def test_what_it_has_not_or_cannot_do_is_refused_in_one_line(given, says, tmp_path, monkeypatch,
                                                             capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        parse(*given)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and says in message
    assert message.startswith("baselines.pearl: error: ") and not list(tmp_path.iterdir())


def test_help_tells_its_own_flags_and_none_of_the_models(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    assert "--kl-weight" in text and "--model-updates" not in text and "__pearl__" in text
    assert max(map(len, text.splitlines())) <= 100


def test_what_is_not_finite_ends_the_run_with_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(pearl.Pearl, "update", lambda agent, batch: torch.tensor(
        [0.0] * len(LOGGED) + [torch.nan]))
    with pytest.raises(FloatingPointError, match="z_kl is not finite at env step 41"):
        run(tmp_path / "a")
