"""torch.compile and CUDA graphs: faster, with the same numbers."""

import contextlib
import copy

import pytest
import torch

import m3po
import speed
from model import MetaModel
from policy import MetaPolicy
from rollouts import Batch
from speed import Graphed, compile_methods
from tests.conftest import needs_compiler, parse, random_batch, update_case


@needs_compiler
def test_what_is_compiled_equals_the_eager_original():
    policy, _, noise = update_case()
    batch = random_batch(2, 2, L=1, B=32)  # the GRU's steps are unrolled: few compile sooner
    compiled = copy.deepcopy(policy)
    compile_methods(compiled)
    history = batch.tokens[:-1], batch.mask[:-1], batch.next_obs
    assert torch.allclose(policy.act(*history, True), compiled.act(*history, True), atol=1e-6)
    model = MetaModel(2, 2, widths=(8, 8))
    imagines = copy.deepcopy(model)
    compile_methods(imagines)
    steps = []
    for m in (model, imagines):
        torch.manual_seed(3)  # the draws are outside of what is compiled
        steps.append(torch.cat(
            [x.flatten() for x in m.sample(*history, policy.act(*history, True))]))
    assert torch.allclose(*steps, atol=1e-5)
    rows = Batch.join(batch, random_batch(2, 2, L=1, B=16))  # 16 for each member
    for _ in range(2):
        assert torch.allclose(policy.update(batch, noise), compiled.update(batch, noise), rtol=1e-4)
        assert torch.allclose(model.update(rows), imagines.update(rows), rtol=1e-4)
    for part, its_twin in ((policy, compiled), (model, imagines)):
        for a, b in zip(part.parameters(), its_twin.parameters()):
            assert torch.allclose(a, b, atol=1e-5)


def several_updates(update, part, n=6):
    """n updates on batches that are views, as in training: all losses, then all parameters."""
    torch.manual_seed(1)
    batches = random_batch(5, 2, L=4, B=n * 15).minibatches(n)
    device = part.token_mean.device
    noise = lambda: [torch.randn(2, 15, 2).to(device)] if isinstance(part, MetaPolicy) else []
    losses = [update(Batch(*(x.to(device) for x in batch)), *noise()) for batch in batches]
    return [x.cpu() for x in (*losses, *part.parameters())]


def test_what_cannot_be_compiled_goes_on_eager_with_one_line(monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("no compiler\nand nothing else")

    monkeypatch.setattr(torch, "compile", broken)
    args, env, _ = parse("--compile", "on", "--device", "cpu")
    policy, model = m3po.build(args, env, "cpu")
    assert speed.fastest_update(policy, model, args) == policy.update
    assert capsys.readouterr().out.startswith("compile      off: ")
    assert "critic_loss" not in vars(policy)  # nothing was put in its place


def test_looking_for_a_compiler_draws_no_random_number(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda net: net)
    before = torch.get_rng_state()
    assert speed.compiler_works("cpu")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def fake_cuda_graphs(monkeypatch):
    """Stand-ins for torch.cuda's streams and graphs: recording changes no parameter, and a replay
    does what was recorded with what then lies in the same tensors."""
    class Graph:
        recording = False

        def replay(self):
            self.update.losses.copy_(self.update.run())

    class Record:
        def __init__(self, graph):
            self.graph = graph

        def __enter__(self):
            update, Graph.recording = Graph.latest, True
            self.graph.update, self.part = update, update.step.__self__
            self.before = copy.deepcopy(self.part.state_dict())
            self.steps = [copy.deepcopy(o.state_dict()) for o in update.optimizers]

        def __exit__(self, *error):
            Graph.recording = False
            self.part.load_state_dict(self.before)
            for optimizer, step in zip(self.graph.update.optimizers, self.steps):
                optimizer.load_state_dict(step)

    class Stream:
        def wait_stream(self, other):
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Record)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return Graph


@pytest.mark.parametrize("kind", [MetaPolicy, MetaModel])
def test_a_graphed_update_feeds_every_batch_once_and_keeps_the_losses(kind, fake_cuda_graphs):
    part = kind(5, 2, widths=(8, 8))
    other = copy.deepcopy(part)
    graphed = fake_cuda_graphs.latest = Graphed(other)
    expected, found = several_updates(part.update, part), several_updates(graphed, other)
    assert graphed.graph and all(map(torch.equal, expected, found))


def test_on_a_gpu_updates_and_fits_are_recorded(monkeypatch):
    args, env, _ = parse("--compile", "on")
    policy, model = m3po.build(args, env, "cpu")
    assert speed.fastest_update(policy, model, args) == policy.update
    assert "update" not in vars(model)
    args.device = "cuda"
    monkeypatch.setattr(speed, "compiler_works", lambda device: False)
    assert speed.fastest_update(policy, model, args).step == policy.update
    assert isinstance(model.update, Graphed) and model.update.step.__self__ is model
    assert model.update.optimizers == [model.optimizer]


@pytest.mark.parametrize("late", [False, True])
def test_an_update_that_cannot_be_recorded_goes_on_with_one_line(
        late, fake_cuda_graphs, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("operation not permitted\nwhen capturing")

    policy = MetaPolicy(5, 2, widths=(8, 8))
    other = copy.deepcopy(policy)
    graphed = fake_cuda_graphs.latest = Graphed(other)
    if late:  # in the middle of an update
        actor_loss = other.actor_loss
        monkeypatch.setattr(other, "actor_loss", lambda *batch: (
            fail if fake_cuda_graphs.recording else actor_loss)(*batch))
    else:
        monkeypatch.setattr(torch.cuda, "graph", fail)
    found = several_updates(graphed, other)
    assert all(map(torch.equal, several_updates(policy.update, policy), found))
    assert capsys.readouterr().out == "CUDA graph   off: operation not permitted when capturing\n"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", [MetaPolicy, MetaModel])
def test_a_graphed_update_on_a_gpu_is_the_eager_update(kind, compiled):
    part = kind(5, 2, widths=(8, 8)).to("cuda")
    other = copy.deepcopy(part)
    if compiled:
        compile_methods(other)
    graphed = Graphed(other)
    expected, found = several_updates(part.update, part), several_updates(graphed, other)
    assert graphed.graph
    for a, b in zip(expected, found):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
