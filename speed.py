"""What makes a run faster without changing what it computes, and where each of it is used.

    torch.compile   the policy's losses and actions, the meta-model's loss and its answer to a
                    rollout, and what PEARL and GHP-MDP call most: the many small kernels around the
                    matrix products become a few. About a third faster, after a minute or two in
                    which each is compiled for its one batch size.
    CUDA graph      on a GPU, a whole gradient step of policy or model: recorded once, then
                    replayed, so that the GPU does not wait for Python to launch hundreds of small
                    kernels.

Both give the eager numbers up to rounding. Where one does not work, the run goes on without it.
"""

import torch

from flags import ONE_THREAD
from model import HistoryNet, MetaModel
from policy import MetaPolicy
from rollouts import Batch

TORCHS_OWN = torch.get_num_threads()  # before a run changes it
# Updates per epoch times width from which on `--compile auto` pays; whatever N is, so that a run
# that is resumed for more epochs goes on with the same kernels.
ENOUGH = 500_000
COMPILED = {MetaPolicy: ("critic_loss", "actor_loss", "distribution"),
            MetaModel: ("predict_dealt", "batch_loss")}


def pays(args, calls):
    """Whether --compile wants it; auto: where an epoch has enough `calls` per env step of nets that
    are --width wide."""
    enough = args.E * calls * args.width >= ENOUGH
    return args.compile == "on" or args.compile == "auto" and enough


def fastest_update(policy, model, args):
    """The function to call for a policy update; the model's own is put in its place, and methods of
    both are compiled there."""
    if not pays(args, args.G):
        return policy.update
    if compiler_works(args.device):
        compile_methods(policy)
        compile_methods(model)
    if args.device != "cuda":
        return policy.update
    model.update = Graphed(model)
    return Graphed(policy)


def cores(args):
    """How many this run may use: --threads, or what torch takes."""
    return args.threads or TORCHS_OWN


def set_threads(args):
    """Small nets are faster with one thread. Beside other jobs on two cores the toy's first three
    epochs took 18 to 26 s with one, and 85 to 302 s with torch's default of two."""
    torch.set_num_threads(args.threads or (1 if args.width <= ONE_THREAD else cores(args)))


def compiler_works(device):
    """Whether torch.compile can build our networks here: there may be no compiler, and some version
    of PyTorch may not take what the newest does. Then a line says so. Draws nothing from the run's
    random stream."""
    with torch.random.fork_rng(devices=[]):
        net = HistoryNet(1, token_dim=3, in_dim=2, out_dim=1, widths=(4,)).to(device)
    new = lambda *shape: torch.zeros(*shape, device=device)
    try:
        torch.compile(net)(new(1, 8, 3), new(1, 8).bool(), new(8, 2)).sum().backward()
    except Exception:  # whatever it turns into, on any version
        print("compile      off: torch.compile cannot build our networks here (it needs a "
              "compiler; CPU: g++, GPU: Triton); running eager")
        return False
    return True


def compile_methods(part, *names):
    """Compile these methods of a part at their first call; of a policy or a model, those that
    COMPILED names."""
    names = names or next(names for kind, names in COMPILED.items() if isinstance(part, kind))
    for name in names:
        setattr(part, name, torch.compile(getattr(part, name), dynamic=False))


class Graphed:
    """part.update(batch, *more) as one CUDA graph: the same kernels in the same order.

    A replay reads its inputs where the recording read them, so they are copied there first. Where
    recording fails, steps go on as they were. (PyTorch, "CUDA semantics", whole-network capture.)
    """

    def __init__(self, part):
        self.step, self.inputs, self.graph = part.update, None, None
        self.optimizers = [x for x in vars(part).values() if isinstance(x, torch.optim.Optimizer)]
        self.capturable(False)  # true in a recorded run's checkpoint; PyTorch warns of it here
        self.first = 3  # steps before the recording: they compile, and set up the optimizers

    def run(self):
        return self.step(Batch(*self.inputs[:4]), *self.inputs[4:])

    def __call__(self, batch, *more):
        given = (*batch, *more)
        if self.inputs is None:
            self.inputs = [torch.empty_like(x, memory_format=torch.contiguous_format)
                           for x in given]
        for kept, x in zip(self.inputs, given, strict=True):
            kept.copy_(x)
        if self.first:
            self.first -= 1
            return self.run_aside()
        if self.graph is None:
            self.record()
        if not self.graph:
            return self.run()
        self.graph.replay()
        return self.losses.clone()

    def run_aside(self):
        """On a stream of its own, as a recording will be: autograd remembers where it first ran."""
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            losses = self.run()
        here.wait_stream(aside)
        return losses

    def groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def capturable(self, on):
        for group in self.groups():
            group["capturable"] = on

    def record(self):
        """Nothing is computed meanwhile; the first replay does."""
        self.capturable(True)
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.losses = self.run()
            self.graph = graph
        except RuntimeError as error:
            self.graph = False
            self.capturable(False)
            for group in self.groups():  # a policy's update may have been left where Q needs none
                for parameter in group["params"]:
                    parameter.requires_grad_(True)
            print(f"CUDA graph   off: {' '.join(str(error).split())[:120]}", flush=True)
