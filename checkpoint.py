"""Nothing lost: checkpoints from which a run goes on as if it had never stopped.

Two files in the run folder, each replaced in one atomic move, so that a kill at any moment or a
full disk leaves the old one or the new one, complete:

    checkpoint.pt   everything: nets, targets, temperature, every optimizer, the model with its
                    statistics, D_env, D_model, random streams, the step, the current episode
    agent.pt        what is needed to use the agent: flags, policy, model (a few MB)

Both hold tensors and plain Python values alone and are read with weights_only=True: a foreign file
runs no code. The env itself is not saved. Every episode starts from its own seed, so the interrupted
one is replayed: the same seed, the same actions, at the simulator's speed. That needs nothing of the
env but Gymnasium's promise that reset(seed) makes it deterministic.
"""

import csv
import os
import pickle
import signal

import torch

VERSIONS = {"agent": 1, "run": 3}  # of what the two files hold


class CheckpointError(Exception):
    """A checkpoint that cannot be written, read or used. The message is one line."""


def write_atomically(path, write):
    """Call write(file) on a temporary file in the same folder, then move it onto path."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())  # on the disk, not in the page cache, before the name moves
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path} could not be written, the one before is still valid: "
                              f"{' '.join(str(error).split())[:200]}") from error


def read(path, kind):
    """A checkpoint of the given kind ("agent" or "run") as a dict on the CPU."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is truncated or no checkpoint of ours") from error
    if not isinstance(state, dict) or state.get("kind") != kind:
        raise CheckpointError(f"{path}: field 'kind' is not {kind!r}, so it is no checkpoint of ours")
    if state.get("version") != VERSIONS[kind]:
        raise CheckpointError(f"{path}: field 'version' is {state.get('version')}, not {VERSIONS[kind]}")
    return state


def save(folder, flags, progress, policy, model, D_env, D_model):
    """Write agent.pt and checkpoint.pt. flags, progress: dicts of plain values and tensors."""
    agent = {"version": VERSIONS["agent"], "kind": "agent", "flags": flags, "step": progress["step"],
             "policy": policy.state_dict(), "model": model.state_dict()}
    optimizers = (policy.q_optimizer, policy.actor_optimizer, model.optimizer)
    cuda = torch.cuda.get_rng_state() if next(policy.parameters()).is_cuda else None
    run = agent | {"version": VERSIONS["run"], "kind": "run", "progress": progress,
                   "D_env": D_env.state_dict(), "D_model": D_model.state_dict(),
                   "rng": torch.get_rng_state(), "rng_cuda": cuda,
                   "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
    write_atomically(folder / "agent.pt", lambda f: torch.save(agent, f))
    write_atomically(folder / "checkpoint.pt", lambda f: torch.save(run, f))


def restore(state, policy, model, D_env, D_model):
    """Load a "run" checkpoint into freshly built parts and the random streams; returns progress."""
    optimizers = (policy.q_optimizer, policy.actor_optimizer, model.optimizer)
    try:
        policy.load_state_dict(state["policy"])
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        D_env.load_state_dict(state["D_env"])
        D_model.load_state_dict(state["D_model"])
    except (KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"the checkpoint does not fit this run: {reason}") from error
    torch.set_rng_state(state["rng"])
    if state["rng_cuda"] is not None and next(policy.parameters()).is_cuda:
        torch.cuda.set_rng_state(state["rng_cuda"])
    return state["progress"]


def cut_log(source, target, step):
    """Copy a CSV log without the rows past global_step = step, which the run will write again, and
    without a last line that was cut short."""
    if not source.exists():
        return
    with open(source, newline="") as f:
        header, *rows = csv.reader(f) if source.stat().st_size else [[]]
    if "global_step" not in header:  # the disk was full before its first line was written
        target.unlink(missing_ok=True)
        return
    at = header.index("global_step")
    kept = [row for row in rows if len(row) == len(header) and int(row[at]) <= step]

    def write(f):
        lines = [",".join(row) for row in [header, *kept]]
        f.write(("\r\n".join(lines) + "\r\n").encode())

    write_atomically(target, write)


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
