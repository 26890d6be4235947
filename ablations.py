"""The README's table of variants, from one command: each variant and seed is one run of m3po.py.

    python ablations.py                                    # the toy, 5 seeds: 55 runs
    python ablations.py --only m3po k2 blind --seeds 0 1   # some rows, some seeds
    python ablations.py --out runs/short -- --N 5          # what follows -- goes to every m3po.py

OUT/ROW/seedS is a run folder, OUT/ROW/seedS.log what it printed, OUT/table.md the table. Stop it
with Ctrl-C at any time: the same command skips what is finished and goes on with what is not. A run
that fails does not stop the others; it is named at the end, with its log.
"""

import argparse
import fcntl
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

import checkpoint
import figures
import m3po
from evaluation import early_steps

ROWS = {  # label: flags of m3po.py, what it shows
    "M3PO": ("", "the default, k = 1"),
    "k=2": ("--k 2", "model errors over two steps"),
    "k=5": ("--k 5", "model errors over five steps"),
    "Full": ("--rollout full", "never branches from real histories"),
    "M2PO": ("--model mlp", "its model sees no history, so not the task"),
    "M3PO-h": ("--hybrid 5 10", "imagined data first, real data last (epochs for the toy)"),
    "recurrent SAC": ("--beta 0", "no model at all"),
    "literal likelihood": ("--beta-nll 0 --reward-weight 1", "the loss as the paper prints it"),
    "blind": ("--L 0", "neither policy nor model sees history"),
    "no reward token": ("--no-token-reward", "a history without what tells the task"),
    "oracle": ("--oracle", "the task is shown: an upper bound"),
}
SLUGS = {label.lower().replace("=", "").replace(" ", "-"): label for label in ROWS}
# Student's t, two-sided 95 %, by number of seeds (one more than the degrees of freedom).
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def command(folder, flags, wanted):
    """The command that starts the run in folder or goes on with it; None if it is finished."""
    program = [sys.executable, str(Path(__file__).with_name("m3po.py"))]
    if not (folder / "checkpoint.pt").exists():
        return [*program, *flags, "--out", str(folder)]
    state = checkpoint.read(folder / "checkpoint.pt", "run")
    for name in wanted.keys() & state["flags"].keys() - (m3po.MAY_CHANGE - {"N"}):
        if state["flags"][name] != wanted[name]:
            raise ValueError(f"{folder} was trained with {name} {state['flags'][name]}, not "
                             f"{wanted[name]}; use another --out")
    finished = state["step"] == wanted["N"] * wanted["E"]
    return None if finished else [*program, "--resume", str(folder)]


def start(folder, line, lock):
    """The run as a process of one thread, which holds the lock until it ends, whatever kills us."""
    if "--out" in line:
        shutil.rmtree(folder, ignore_errors=True)  # of a run killed before its first checkpoint
    folder.parent.mkdir(parents=True, exist_ok=True)
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
                            "TQDM_MININTERVAL": "30"}  # s: a short log
    with open(f"{folder}.log", "a") as log:
        return subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ,
                                pass_fds=[lock.fileno()], start_new_session=True)


def run_all(todo, jobs, lock):
    """Runs todo {folder: command}, `jobs` at a time; returns {folder: status} of what failed."""
    waiting, running, ended = list(todo), {}, {}
    with tqdm(total=len(todo), unit="run", smoothing=0, mininterval=5, miniters=0) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running[waiting[0]] = start(waiting[0], todo[waiting[0]], lock)
                    waiting.pop(0)
                time.sleep(0.2)
                for folder in [f for f, child in running.items() if child.poll() is not None]:
                    ended[folder] = status = running.pop(folder).returncode
                    said = f"exit status {status}" if status else "return {:.1f}".format(
                        figures.read_run(folder).progress["eval_return_mean"][-1])
                    bar.write(f"ended        {folder}: {said}")
                    sys.stdout.flush()
                    bar.update()
                bar.update(0)  # the clock
        finally:  # also Ctrl-C. In sessions of their own, the runs get one signal, ours, and save
            for child in running.values():
                child.send_signal(signal.SIGINT)
            for child in running.values():
                child.wait()
    return {folder: status for folder, status in ended.items() if status}


def interval(values):
    """Mean and Student's 95 % interval as text. Beyond ten values it is a little too wide."""
    n, mean = len(values), np.mean(values)
    if n == 1:
        return f"{mean:.1f}"
    half = T95[min(n, 10)] * np.std(values, ddof=1) / math.sqrt(n)
    return f"{mean:.1f} [{mean - half:.1f}, {mean + half:.1f}]"


def closed_form(env):
    """What is known exactly about returns in env. Who is not told the task gets 0 on average in the
    first step and in each step at which the task is redrawn: it may be either way."""
    if not hasattr(env.unwrapped, "ORACLE_RETURN"):
        return ""
    T, every = env.spec.max_episode_steps, env.unwrapped.switch_every
    return (f" The best possible: {env.unwrapped.ORACLE_RETURN:g} if told the task, ({T} - 1) "
            f"(1 - 1/{every}) = {(T - 1) * (1 - 1 / every):.2f} if not, 0 if blind to history.")


def table(runs, said, args, env):
    """Markdown of finished runs {label: [Run, ...]}; said is the command, args one run's flags."""
    every = [run for found in runs.values() for run in found]
    seconds = [sum(np.nansum(column) for name, column in run.progress.items()
                   if name.startswith("seconds_")) for run in every]
    configs = [json.loads((run.folder / "config.json").read_text()) for run in every]
    used = {f"device {c['flags']['device']}, " + ", ".join(
        f"{name} {version[:12]}" for name, version in c["versions"].items()) for c in configs}
    lines = [
        f"`{said}`: {m3po.cpu_name()}, one thread per run, median {np.median(seconds):.0f} s per run; "
        f"{'; '.join(sorted(used))}.", "",
        f"`{args.env}`, {args.eval_episodes} episodes after {args.N * args.E:,} env steps; means "
        f"over seeds, that of the return with Student's 95 % interval.{closed_form(env)}", "",
        "| variant | flags | final return | mean of all evaluations | right way | reward per step, first "
        f"{early_steps(env)} after a switch / else | explained reward, held out | seeds |",
        "|---|---|---|---|---|---|---|---|"]
    for label, found in runs.items():
        def mean(column):
            value = figures.known_mean(np.array([run.progress[column][-1] for run in found]))
            return f"{value:.2f}" if math.isfinite(value) else "-"

        flags, shows = ROWS[label]
        lines.append("| " + " | ".join([
            f"{label}: {shows}", f"`{flags}`" if flags else "-",
            interval([run.progress["eval_return_mean"][-1] for run in found]) if found else "-",
            interval([np.nanmean(run.progress["eval_return_mean"]) for run in found]) if found else "-",
            mean("eval_right_way"),
            mean("eval_reward_after_switch") + " / " + mean("eval_reward_otherwise"),
            mean("model_explained_reward"),
            " ".join(str(run.flags["seed"]) for run in found) or "-"]) + " |")
    return "\n".join(lines) + "\n"


def build_parser():
    p = m3po.OneLineParser("ablations.py", allow_abbrev=False, description=__doc__.split("\n\n")[0],
                           usage="ablations.py [flags] [-- flags of m3po.py]")
    p.add_argument("--env", default="point-fwd-bwd", metavar="NAME", help="(%(default)s)")
    p.add_argument("--seeds", nargs="+", type=m3po.natural, default=[0, 1, 2, 3, 4], metavar="S",
                   help="one run of each row per seed (0 1 2 3 4)")
    p.add_argument("--only", nargs="+", choices=SLUGS, default=list(SLUGS), metavar="ROW",
                   help=f"some of {', '.join(SLUGS)} (all)")
    p.add_argument("--jobs", type=m3po.count, default=2, help="runs at a time, one thread each (2)")
    p.add_argument("--out", type=Path, default=Path("runs/ablations"), metavar="DIR",
                   help="finished runs in it are not run again (%(default)s)")
    return p


def main(argv=None):
    """Runs what is missing and writes the table. Returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    parser, extra = build_parser(), argv[cut + 1:]
    args = parser.parse_args(argv[:cut])
    for flag in extra:
        if flag.split("=")[0] in ("--env", "--seed", "--out", "--resume"):
            parser.error(f"argument {flag}: not after --, ablations.py sets it")
    rows = {slug: label for slug, label in SLUGS.items() if slug in args.only}
    folders, todo = {label: [] for label in rows.values()}, {}
    for seed in dict.fromkeys(args.seeds):  # each seed with all its rows, so that the ETA is fair
        for slug, label in rows.items():
            flags = [*extra, *ROWS[label][0].split(), "--env", args.env, "--seed", str(seed)]
            wanted, env, _ = m3po.parse_args(flags)  # refuses bad flags before anything starts
            if not wanted.eval_episodes or wanted.N % wanted.eval_every:
                parser.error("argument --eval-every: the last epoch must be evaluated")
            folder = args.out / slug / f"seed{seed}"
            folders[label].append(folder)
            todo[folder] = command(folder, flags, vars(wanted))
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"argument --out: {args.out} is no folder")
    total, todo = len(todo), {folder: line for folder, line in todo.items() if line}
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            parser.error(f"argument --out: an earlier command's runs still go on in {args.out}")
        print(f"{total} runs, {total - len(todo)} of them finished before", flush=True)
        failed = run_all(todo, args.jobs, lock)
    runs = {label: [figures.read_run(folder) for folder in found if folder not in failed]
            for label, found in folders.items()}
    if any(runs.values()):
        said = table(runs, shlex.join(["python", "ablations.py", *argv]), wanted, env)
        (args.out / "table.md").write_text(said)
        print(f"\n{said}\nwritten      {args.out}/table.md")
    for folder, status in failed.items():
        print(f"failed       {folder}, exit status {status}: see {folder}.log")
    return 1 if failed else 0


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", flush=True)
        sys.exit(130)
    except (checkpoint.CheckpointError, figures.FigureError, OSError, ValueError) as error:
        sys.exit(f"ablations.py: error: {error}")
