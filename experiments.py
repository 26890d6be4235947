"""The table of variants, from one command: each variant and seed is one run of m3po.py.

    python experiments.py                                    # the toy, 5 seeds: 55 runs
    python experiments.py --only m3po k2 blind --seeds 0 1   # some rows, some seeds
    python experiments.py --out runs/short --results runs/short/results -- --N 5

What follows -- goes to every m3po.py. OUT/ROW/seedS is a run folder, OUT/ROW/seedS.log what it
printed, OUT/table.md the table. Of a finished run RESULTS/ROW/seedS keeps progress.csv and
config.json: a few kB for git. What is there is never run again, so another machine goes on with the
rest. Stop it with Ctrl-C at any time; the same command goes on. A run that fails does not stop the
others; it is named at the end, with its log.
"""

import importlib.util
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
import play
from evaluation import early_steps
from flags import MAY_CHANGE, OneLineParser, count, natural
from logs import cpu_name

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


def refuse_others(folder, flags, wanted, option):
    """ValueError if the run in folder, trained with flags, is not the wanted one."""
    for name in wanted.keys() & flags.keys() - (MAY_CHANGE - {"N"}):
        if flags[name] != wanted[name]:
            raise ValueError(f"{folder} was trained with {name} {flags[name]}, not {wanted[name]}; "
                             f"use another {option}")


def is_kept(result, wanted):
    """Whether the results folder `result` holds the whole run."""
    if not (result / "config.json").exists():
        return False
    run = figures.read_run(result)
    refuse_others(result, run.flags, wanted, "--results")
    return run.progress["global_step"][-1] == wanted["N"] * wanted["E"]


def keep(folder, result):
    """Copies of a finished run what tables and figures read, without this machine's paths.

    config.json comes last: where it is, the rest is complete.
    """
    result.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / "progress.csv", result / "progress.csv")
    config = json.loads((folder / "config.json").read_text())
    config["flags"] |= {"out": f"{folder.parent.name}/{folder.name}", "resume": None}
    config["cpu"] = cpu_name()
    text = json.dumps(config, indent=1) + "\n"
    checkpoint.write_atomically(result / "config.json", lambda f: f.write(text.encode()))


def command(folder, flags, wanted):
    """The command that starts the run in folder or goes on with it; None if it is finished."""
    program = [sys.executable, str(Path(__file__).with_name("m3po.py"))]
    if not (folder / "checkpoint.pt").exists():
        return [*program, *flags, "--out", str(folder)]
    state = checkpoint.read(folder / "checkpoint.pt", "run")
    refuse_others(folder, state["flags"], wanted, "--out")
    finished = state["progress"]["epoch"] == wanted["N"]
    return None if finished else [*program, "--resume", str(folder)]


def start(folder, line, lock):
    """The run as a process of one thread, which holds the lock until it ends, whatever kills us."""
    if "--out" in line:
        shutil.rmtree(folder, ignore_errors=True)  # of a run killed before its first checkpoint
    folder.parent.mkdir(parents=True, exist_ok=True)
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
                            "TQDM_MININTERVAL": "30"}  # s: a short log
    inherited = [lock.fileno()] if os.name == "posix" else []
    with open(f"{folder}.log", "a") as log:
        return subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ,
                                pass_fds=inherited, start_new_session=True)


def run_all(todo, jobs, lock, results):
    """Runs todo {folder: command}, `jobs` at a time, and keeps what ends well in results {folder:
    results folder}; returns {folder: status} of what failed."""
    waiting, running, ended = list(todo), {}, {}
    with tqdm(total=len(todo), unit="run", smoothing=0, mininterval=5, miniters=0,
              disable=not todo) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running[waiting[0]] = start(waiting[0], todo[waiting[0]], lock)
                    waiting.pop(0)
                time.sleep(0.2)
                for folder in [f for f, child in running.items() if child.poll() is not None]:
                    ended[folder] = status = running.pop(folder).returncode
                    message = f"exit status {status}"
                    if not status:
                        keep(folder, results[folder])
                        last = figures.read_run(folder).progress["eval_return_mean"][-1]
                        message = f"return {last:.1f}"
                    bar.write(f"ended        {folder}: {message}")
                    sys.stdout.flush()
                    bar.update()
                bar.update(0)  # the clock
        finally:  # also Ctrl-C. In sessions of their own, the runs get one signal, ours, and save
            for child in running.values():
                child.send_signal(signal.SIGINT)
            for child in running.values():
                child.wait()
    return {folder: status for folder, status in ended.items() if status}


def closed_form(env):
    """What is known exactly about returns in env. Who is not told the task gets 0 on average in the
    first step and in each step at which the task is redrawn: it may be either way."""
    if not hasattr(env.unwrapped, "ORACLE_RETURN"):
        return ""
    T, every = env.spec.max_episode_steps, env.unwrapped.switch_every
    return (f" The best possible: {env.unwrapped.ORACLE_RETURN:g} if told the task, ({T} - 1) "
            f"(1 - 1/{every}) = {(T - 1) * (1 - 1 / every):.2f} if not, 0 if blind to history.")


def table(runs, line, args, env):
    """Markdown of finished runs {label: [Run, ...]}; line is the command, args one run's flags."""
    every = [run for twins in runs.values() for run in twins]
    seconds = [sum(np.nansum(column) for name, column in run.progress.items()
                   if name.startswith("seconds_")) for run in every]
    configs = [json.loads((run.folder / "config.json").read_text()) for run in every]
    used = {f"device {config['flags']['device']}, " + ", ".join(
        f"{name} {version[:12]}" for name, version in config.get("versions", {}).items())
            for config in configs}
    machines = {config.get("cpu", "a CPU") for config in configs}
    lines = [
        f"`{line}`: {' and '.join(sorted(machines))}, one thread per run, median "
        f"{np.median(seconds):.0f} s per run; {'; '.join(sorted(used))}.", "",
        f"`{args.env}`, {args.eval_episodes} episodes after {args.N * args.E:,} env steps; means "
        f"over seeds, that of the return with Student's 95 % interval.{closed_form(env)}", "",
        "| variant | flags | final return | mean of all evaluations | right way | reward per step, "
        f"first {early_steps(env)} after a switch / else | explained reward, held out | seeds |",
        "|---|---|---|---|---|---|---|---|"]
    for label, twins in runs.items():
        def mean(column):
            value = figures.known_mean(np.array(
                [run.progress.get(column, [math.nan])[-1] for run in twins]))
            return f"{value:.2f}" if math.isfinite(value) else "-"

        flags, shows = ROWS[label]
        lines.append("| " + " | ".join([
            f"{label}: {shows}", f"`{flags}`" if flags else "-",
            figures.with_interval([run.progress["eval_return_mean"][-1] for run in twins])
            if twins else "-",
            figures.with_interval([np.nanmean(run.progress["eval_return_mean"]) for run in twins])
            if twins else "-",
            mean("eval_right_way"),
            mean("eval_reward_after_switch") + " / " + mean("eval_reward_otherwise"),
            mean("model_explained_reward"),
            " ".join(str(run.flags["seed"]) for run in twins) or "-"]) + " |")
    return "\n".join(lines) + "\n"


def build_parser():
    p = OneLineParser("experiments.py", description=__doc__.split("\n\n")[0],
                           usage="experiments.py [flags] [-- flags of m3po.py]")
    p.add_argument("--env", default="point-fwd-bwd", metavar="NAME", help="(%(default)s)")
    p.add_argument("--seeds", nargs="+", type=natural, default=[0, 1, 2, 3, 4], metavar="S",
                   help="one run of each row per seed (0 1 2 3 4)")
    p.add_argument("--only", nargs="+", choices=SLUGS, default=list(SLUGS), metavar="ROW",
                   help=f"some of {', '.join(SLUGS)} (all)")
    p.add_argument("--jobs", type=count, default=2, help="runs at a time, one thread each (2)")
    p.add_argument("--out", type=Path, default=Path("runs/ablations"), metavar="DIR",
                   help="for run folders; those in it are gone on with (%(default)s)")
    p.add_argument("--results", type=Path, metavar="DIR",
                   help="keeps what finished runs logged, which are not run again (results/ENV)")
    return p


def plan(args, rows, extra, parser):
    """Every wanted run as (label, flags, flags as m3po.py reads them, run folder, results folder),
    and the env."""
    runs = []
    for seed in dict.fromkeys(args.seeds):  # each seed with all its rows, so that the ETA is fair
        for slug, label in rows.items():
            flags = [*extra, *ROWS[label][0].split(), "--env", args.env, "--seed", str(seed)]
            wanted, env, _ = m3po.parse_args(flags)  # refuses bad flags before anything starts
            if not wanted.eval_episodes or wanted.N % wanted.eval_every:
                parser.error("argument --eval-every: the last epoch must be evaluated")
            place = f"{slug}/seed{seed}"
            runs.append((label, flags, wanted, args.out / place, args.results / place))
    return runs, env


def locked(file):
    """Locks a file until all who hold it have ended; False if somebody else has. On Windows, which
    has no fcntl, nobody is kept out."""
    if not importlib.util.find_spec("fcntl"):
        return True
    import fcntl
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def main(argv=None):
    """Runs what is missing and writes the table. Returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    parser, extra = build_parser(), argv[cut + 1:]
    args = parser.parse_args(argv[:cut])
    args.results = args.results or Path("results", args.env.replace("/", "-").replace(":", "-"))
    for flag in extra:
        if flag.split("=")[0] in ("--env", "--seed", "--out", "--resume"):
            parser.error(f"argument {flag}: not after --, experiments.py sets it")
    rows = {slug: label for slug, label in SLUGS.items() if slug in args.only}
    runs, env = plan(args, rows, extra, parser)
    for option, path in (("--out", args.out), ("--results", args.results)):
        if path.exists() and not path.is_dir():
            parser.error(f"argument {option}: {path} is no folder")
    missing = [run for run in runs if not is_kept(run[-1], vars(run[2]))]
    lines = {folder: command(folder, flags, vars(wanted))
             for _, flags, wanted, folder, _ in missing}
    todo = {folder: line for folder, line in lines.items() if line}
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "lock", "w") as lock:
        if not locked(lock):
            parser.error(f"argument --out: an earlier command's runs still go on in {args.out}")
        print(f"{len(runs)} runs, {len(runs) - len(todo)} of them finished before", flush=True)
        results = {folder: result for *_, folder, result in runs}
        for folder in lines.keys() - todo.keys():  # finished, and stopped before it was kept
            keep(folder, results[folder])
        failed = run_all(todo, args.jobs, lock, results)
    finished = {label: [figures.read_run(result) for name, *_, folder, result in runs
                        if name == label and folder not in failed] for label in rows.values()}
    if any(finished.values()):
        line = shlex.join(["python", "experiments.py", *argv])
        markdown = table(finished, line, runs[-1][2], env)
        (args.out / "table.md").write_text(markdown)
        print(f"\n{markdown}\nwritten      {args.out}/table.md, {args.results}")
    for folder, status in failed.items():
        print(f"failed       {folder}, exit status {status}: see {folder}.log")
    return 1 if failed else 0


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        play.need("experiments.py", "scipy")
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", flush=True)
        sys.exit(130)
    except (checkpoint.CheckpointError, figures.FigureError, play.PlayError, OSError,
            ValueError) as error:
        sys.exit(f"experiments.py: error: {error}")
