"""Nothing lost: checkpoints from which a run goes on as if it had never stopped.

Files in the run folder, each replaced in one atomic move, so that a kill at any moment or a
full disk leaves the old one or the new one, complete:

    checkpoint.pt   everything: nets, targets, temperature, every optimizer, the model with its
                    statistics, D_env, D_model, random streams, the step, the current episode
    agent.pt        what is needed to use the agent: flags, policy, model (a few MB)
    best.pt         the same of the agent whose evaluation had the highest mean so far

All name the method, "m3po" or a baseline. They hold tensors and plain Python values alone and are
read with weights_only=True: a foreign file runs no code. The env itself is not saved. Every
episode starts from its own seed, so the interrupted one is replayed: the same seed, the same
actions, at the simulator's speed. That needs nothing of the env but Gymnasium's promise that
reset(seed) makes it deterministic.
"""

import copy
import csv
import os
import pickle
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from envs import seeds

VERSIONS = {"agent": 4, "run": 6}  # of what these files hold
FIELDS = {"agent": {"flags": dict, "step": int}, "run": {  # beside the nets and the datasets
    "flags": dict, "step": int, "progress": dict, "rng": torch.Tensor, "optimizers": list}}


@dataclass
class Progress:
    """What changes from step to step and lies in no net, dataset or random stream."""

    losses: torch.Tensor  # [E, logged], by env step of this epoch; 0 where nothing was updated
    logged: tuple  # what they are: columns of progress.csv
    step: int = 0  # env steps taken
    epoch: int = 0  # epochs finished: evaluated, and in the logs
    episode: int = 0  # training episodes begun, less one
    actions: list = field(default_factory=list)  # of the running episode, to replay it
    train_return: float = 0.0  # of the running episode
    train_returns: list = field(default_factory=list)  # of the episodes that ended in this epoch
    dropped: int = 0  # transitions that were no data, in the whole run
    faults: dict = field(default_factory=dict)  # {reason: how many of them in this epoch}
    updated: int = 0  # env steps of this epoch that had updates
    fit: dict = field(default_factory=dict)  # what the last fit found; empty without a model
    q_shift: float = 0.0  # the largest of this epoch that new statistics brought about
    fits: list = field(default_factory=list)  # what each fit of this epoch found
    seconds: dict = field(default_factory=dict)  # of this epoch, by part
    last: list = field(default_factory=lambda: [float("nan"), 0])  # evaluation: mean return, step
    best: list = field(default_factory=lambda: [float("-inf"), 0])
    best_agent: dict = field(default_factory=dict)  # the nets at that step, for best.pt

    def note(self, losses):
        """The losses of the updates of the env step just taken; nothing waits for the GPU."""
        self.losses[(self.step - 1) % len(self.losses)] = torch.stack(losses).mean(0)
        self.updated += 1

    def note_shift(self, q_shift):
        self.q_shift = max(self.q_shift, q_shift)

    def note_fit(self, found):
        """found: {name: number} of a fit, {} where there is no model."""
        self.fit = found
        self.fits += [found] if found else []

    def next_epoch(self):
        self.losses.zero_()
        self.epoch, self.updated, self.q_shift = self.epoch + 1, 0, 0.0
        self.train_returns, self.faults, self.fits, self.seconds = [], {}, [], {}


class CheckpointError(Exception):
    """A file of the run folder that cannot be written, read or used. The message is one line."""


@contextmanager
def writing(path, note=""):
    """A full disk or a forbidden folder becomes one line that names the path."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        raise CheckpointError(f"{path} could not be written{note}: "
                              f"{' '.join(str(error).split())[:200]}") from error


def write_atomically(path, write):
    """Call write(file) on a temporary file in the same folder, then move it onto path."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with writing(path, ", the one before is still valid" if path.exists() else ""):
            with open(temporary, "wb") as f:
                write(f)
                f.flush()
                os.fsync(f.fileno())  # on the disk, not in the page cache, before the name moves
            os.replace(temporary, path)
            sync_folder(path.parent)
    except CheckpointError:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder):
    """Bring the names in a folder to the disk, where a folder can be opened: not on Windows."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def agent_file(path):
    """agent.pt of a run folder. A path to a file, as RUN/best.pt, is taken as it is."""
    return Path(path) if Path(path).suffix == ".pt" else Path(path) / "agent.pt"


def read(path, kind, method=None):
    """A checkpoint of the given kind ("agent" or "run") as a dict on the CPU; of this method, where
    one is named."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is truncated or no checkpoint of ours") from error
    if not isinstance(state, dict) or state.get("kind") != kind:
        raise CheckpointError(f"{path}: field 'kind' is not {kind!r}: no checkpoint of ours")
    if state.get("version") != VERSIONS[kind]:
        raise CheckpointError(f"{path}: field 'version' is {state.get('version')}, "
                              f"not {VERSIONS[kind]}")
    for name, type_ in FIELDS[kind].items():
        if not isinstance(state.get(name), type_):
            raise CheckpointError(f"{path}: field {name!r} is missing or no {type_.__name__}")
    state.setdefault("method", "m3po")  # there was no other once
    if method and state["method"] != method:
        raise CheckpointError(f"{path} is of the method {state['method']}, not {method}")
    return state


def optimizers(nets):
    """The optimizers of some modules, in the order in which they were made."""
    return [value for net in nets for module in net.modules() for value in vars(module).values()
            if isinstance(value, torch.optim.Optimizer)]


def modules(parts):
    """Those of parts {name: net or dataset} that make up the agent."""
    return {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}


def keep_best(progress, **parts):
    """After an epoch: if its evaluation is the best so far, a copy of the nets goes into progress,
    and from there into each checkpoint, so that a resume has it too."""
    if progress.best[1] == progress.step:
        progress.best_agent = {name: copy.deepcopy(net.state_dict())
                               for name, net in modules(parts).items()}


def save(args, progress, **parts):
    """Write agent.pt, best.pt and checkpoint.pt into args.out. args and progress hold plain values,
    in lists and dicts, and tensors. parts: the nets, which make up the agent, and the datasets."""
    folder, nets = Path(args.out), modules(parts)
    header = {"version": VERSIONS["agent"], "kind": "agent", "method": args.method,
              "flags": vars(args)}
    agent = header | {"step": progress.step}
    agent |= {name: net.state_dict() for name, net in nets.items()}
    run = agent | {name: part.state_dict() for name, part in parts.items() if name not in nets} | {
        "version": VERSIONS["run"], "kind": "run", "progress": vars(progress),
        "rng": torch.get_rng_state(),
        "rng_cuda": torch.cuda.get_rng_state() if on_gpu(nets.values()) else None,
        "optimizers": [optimizer.state_dict() for optimizer in optimizers(nets.values())]}
    write_atomically(folder / "agent.pt", lambda f: torch.save(agent, f))
    if progress.best_agent:
        best = header | {"step": progress.best[1]} | progress.best_agent
        write_atomically(folder / "best.pt", lambda f: torch.save(best, f))
    write_atomically(folder / "checkpoint.pt", lambda f: torch.save(run, f))


def on_gpu(nets):
    return any(weight.is_cuda for net in nets for weight in net.parameters())


def restore(state, progress, **parts):
    """Load a "run" checkpoint into a fresh progress and freshly built parts, as given to `save`,
    and the random streams."""
    nets = modules(parts).values()
    try:
        if strange := state["progress"].keys() - vars(progress):
            raise ValueError(f"progress has {', '.join(sorted(map(str, strange)))}")
        device = progress.losses.device
        vars(progress).update(state["progress"])
        progress.losses = progress.losses.to(device)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        for optimizer, saved in zip(optimizers(nets), state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(state["rng"])
        if state["rng_cuda"] is not None and on_gpu(nets):
            torch.cuda.set_rng_state(state["rng_cuda"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        missing = "it lacks " if isinstance(error, KeyError) else ""  # whose text is the name alone
        reason = missing + " ".join(str(error).split())[:200]
        raise CheckpointError(f"the checkpoint does not fit this run: {reason}") from error


def replay(env, progress, run_seed):
    """The observation at which the run stopped: its episode's seed, its actions."""
    obs, _ = env.reset(seed=seeds(run_seed, 0, progress.episode)[0])
    for action in progress.actions:
        obs, *_ = env.step(np.array(action, np.float32))
    return obs


def cut_log(source, target, step):
    """Copy a CSV log without the rows past global_step = step, which the run will write again, and
    without a last line that was cut short."""
    if not source.exists():
        return
    with open(source, newline="", encoding="utf-8") as f:
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
