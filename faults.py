"""What stops a run before its end, and what is then saved and said.

    Ctrl-C, SIGTERM                 a checkpoint, exit status 130 or 143; a second stops at once
    a number that is not finite     one line; the last good checkpoint stays the last
    no memory, a full disk          one line
    an env that says EnvError       a checkpoint, one line
    another exception of it, a bug  a checkpoint, a line that names env and step, the traceback
"""

import signal
import sys
from contextlib import closing, contextmanager

import torch

from checkpoint import CheckpointError
from env_checks import EnvError
from flags import program


# What torch says, of a GPU and of a CPU on Linux and Windows. An env's error may speak of memory.
NO_MEMORY = "out of memory", "can't allocate memory", "not enough memory"


class StopSignals:
    """Ctrl-C and SIGTERM ask the loop to stop at the next step; a second Ctrl-C stops at once."""

    def __init__(self):
        self.received = None

    def __enter__(self):
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, frame):
        self.received = number
        for s in self.before:
            signal.signal(s, signal.SIG_DFL)

    def __exit__(self, *error):
        for s, handler in self.before.items():
            signal.signal(s, handler)


def check_finite(progress, policy, E):
    """FloatingPointError if a loss of this epoch or a weight is not finite."""
    losses, first = progress.losses.cpu(), (progress.step - 1) // E * E  # [E, LOGGED], by env step
    if not torch.isfinite(losses).all():
        bad = int((~torch.isfinite(losses)).any(1).nonzero()[0, 0])
        which = progress.logged[int((~torch.isfinite(losses[bad])).nonzero()[0, 0])]
        raise FloatingPointError(f"{which} is not finite at env step {first + bad + 1}")
    if not all(torch.isfinite(q).all() for q in policy.parameters()):
        raise FloatingPointError("a parameter of the policy or Q is not finite at step "
                                 f"{progress.step}")


def diverged(error):
    """Of check_finite or of a fit; NumPy's class of an env that asked for it is the same."""
    return isinstance(error, FloatingPointError) and "is not finite at" in str(error)


def out_of_memory(error):
    """torch's own class for it exists on GPUs alone."""
    first_line = str(error).partition("\n")[0]
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and any(
        words in first_line for words in NO_MEMORY)


def in_a_line(error):
    """Whether its first line says all: no traceback, and no checkpoint of what it left."""
    return isinstance(error, CheckpointError) or diverged(error) or out_of_memory(error)


@contextmanager
def saved_first(args, progress, policy, save):
    """Around training. An exception of the user's own env, or a bug, goes on its way with its
    traceback; before that comes a checkpoint and one line that says where it happened."""
    try:
        yield
    except Exception as error:
        if in_a_line(error):
            raise
        try:
            check_finite(progress, policy, args.E)
            save()
            outcome = f"saved; go on with: {resume_command(args)}"
        except (FloatingPointError, CheckpointError) as reason:
            outcome = f"not saved: {reason}"
        print(f"{program(args.method)}: error in {args.env} at env step {progress.step}, step "
              f"{len(progress.actions)} of episode {progress.episode}; {outcome}",
              file=sys.stderr, flush=True)
        raise


def resume_command(args):
    module = "" if args.method == "m3po" else "-m "
    return f"python {module}{program(args.method)} --resume {args.out}"


@contextmanager
def in_one_line(method):
    """What needs no traceback ends the program with one line."""
    try:
        yield
    except Exception as error:
        if not (in_a_line(error) or isinstance(error, EnvError)):
            raise
        message = str(error).partition("\n")[0] or "out of memory"
        if out_of_memory(error):
            sizes = "--M, --retain, --env-capacity" if method == "m3po" else "--env-capacity"
            message = f"{message}; see {sizes}"
        sys.exit(f"{program(method)}: error: {message}")
    except KeyboardInterrupt:  # before training, which has StopSignals
        print("stopped before training began", file=sys.stderr)
        sys.exit(130)


def run(method, main, args, env, state):
    """main(args, env, state) as a program: with what stopped it in one line and the exit status."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # again: see the program's first lines
    with in_one_line(method), closing(env):
        number = main(args, env, state)
    if number:
        print(f"stopped and saved; go on with: {resume_command(args)}")
        sys.exit(128 + number)
