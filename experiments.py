"""The experiments: every method in every env with every seed, each run one command.

    python experiments.py                             # the toy, 13 variants, 5 seeds: 65 runs, less
                                                      # those that RESULTS has
    python experiments.py --envs ant-fwd-bwd halfcheetah-pier --methods m3po recurrent-sac pearl \\
        --seeds 0 1 2 -- --N 20 --width 128 --G 10    # 18 runs; what follows -- goes to each
    ... --dry-run                                     # what is done, what remains, how long
    ... --table                                       # the table of what is done, at once
    ... --print                                       # a command per run that remains
    ... --slurm                                       # what remains as one array job (slurm.py)

OUT/ENV/METHOD/seedS is a run folder, OUT/ENV/METHOD/seedS.log what it printed, OUT/table.md the
table. Of a finished run RESULTS/ENV/METHOD/seedS keeps progress.csv, config.json and switches.csv:
a few kB for git. What is there is never run again, so another machine goes on with the rest. Stop
it with Ctrl-C at any time; the same command goes on. A run that fails does not stop the others; it
is named at the end, with its log. A grid of one run trains in this process, and that is what a
larger grid, SLURM or GNU parallel starts for each of its runs. The methods: METHODS in tables.py.
"""

import importlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import checkpoint
import faults
import figures
import flags
import logs
import m3po
import play
import slurm
from tables import METHODS, Method, read_config, tables, versions


class Refused(ValueError):
    """What a folder holds is not what was asked for. The message is one line."""


@dataclass
class Experiment:
    """One run of the grid."""

    env: str
    method: Method
    seed: int
    common: list  # what followed --, as far as its program has such flags
    wanted: dict  # every flag, as its program reads them
    folder: Path  # run folder
    result: Path  # what is kept of it when it ends

    def flags(self):
        return [*self.common, *self.method.flags.split(), "--env", self.env,
                "--seed", str(self.seed)]

    def __str__(self):
        return "/".join(self.folder.parts[-3:])


# ---- the grid -----------------------------------------------------------------------------------


def by_flag(words):
    """[["--N", "20"], ["--oracle"], ...]: each flag with its values."""
    groups = []
    for word in words:
        if word.startswith("--") or not groups:
            groups.append([])
        groups[-1].append(word)
    return groups


def common_flags(programs, extra, parser):
    """{program: the flags of extra that it has}, and lines that say which it has not. A flag that
    none of them has is refused."""
    parsers = {program: flags.build_parser(program) for program in programs}
    common, lines = {program: [] for program in programs}, []
    for group in by_flag(extra):
        if group[0].split("=")[0] in ("--env", "--seed", "--out", "--resume"):
            parser.error(f"argument {group[0]}: not after --, experiments.py sets it")
        without = [program for program in programs if parsers[program].parse_known_args(group)[1]]
        if len(without) == len(common):
            parser.error(f"argument {' '.join(group)}: none of the methods has it")
        if without:
            lines.append(f"Left out: {' '.join(group)} for {' and '.join(without)}.")
        for program in common.keys() - set(without):
            common[program] += group
    return common, lines


def overruled(methods, extra):
    """Lines that say which flags of extra a method sets itself."""
    name = lambda word: word.split("=")[0].replace("--no-", "--")
    given = {name(group[0]): " ".join(group) for group in by_flag(extra)}
    return [f"Left out: {given[flag]} for {method.label}, which has {' '.join(group)}."
            for method in methods for group in by_flag(method.flags.split())
            if (flag := name(group[0])) in given and given[flag] != " ".join(group)]


def changes_nothing(method, env):
    """Whether its flags are the env's defaults, as k = 1 on the toy: the method is M3PO there."""
    own = flags.parse([*method.flags.split(), "--env", env], method.program)[0]
    return method.flags and not flags.differences(vars(own))


def grid(args, extra, parser):
    """Every wanted run, {name: env}, and what was left out as lines. Seeds come outermost, so that
    whatever has ended makes a table of all methods in all envs."""
    runs, made, methods = [], {}, [METHODS[slug] for slug in args.methods]
    programs = dict.fromkeys(method.program for method in methods)
    common, left_out = common_flags(programs, extra, parser)
    left_out += overruled(methods, extra)
    twins = [(method, env) for method in methods for env in args.envs
             if changes_nothing(method, env)]
    left_out += [f"Left out: {method.label} in {env}, where it is M3PO itself."
                 for method, env in twins]
    tag = f"-{args.tag}" if args.tag else ""
    for seed in args.seeds:
        for env in args.envs:
            for method in methods:
                place = Path(env.replace("/", "-").replace(":", "-"), method.slug + tag,
                             f"seed{seed}")
                run = Experiment(env, method, seed, common[method.program], {}, args.out / place,
                                 args.results / place)
                wanted = flags.parse(run.flags(), method.program)[0]  # refuses before all else
                if not wanted.eval_episodes:
                    parser.error("argument --eval-episodes: 0 leaves nothing for the table")
                if env not in made:
                    made[env] = m3po.parse_args(run.flags(), method.program)[1]
                run.wanted = vars(wanted)
                if (method, env) not in twins:
                    runs.append(run)
    if not runs:
        parser.error(" ".join(left_out))
    return runs, made, left_out


def command(run, args):
    """The grid of this run alone, which trains it in one process."""
    tag = ["--tag", args.tag] if args.tag else []
    return [sys.executable, os.path.abspath(__file__), "--envs", run.env, "--methods",
            run.method.slug, "--seeds", str(run.seed), "--out", str(args.out), "--results",
            str(args.results), *tag, *(["--", *run.common] if run.common else [])]


# ---- what is there ------------------------------------------------------------------------------

# What a run that has ended need not share: how often it was looked at.
HOW_OFTEN = {"eval_every", "diagnose_every", "checkpoint_every"}


def refuse_others(folder, trained, wanted, option, may_differ=frozenset()):
    """Refused if the run in folder, trained with these flags, is not the wanted one."""
    ignored = flags.MAY_CHANGE - {"N"} | may_differ | flags.unused(wanted)
    for name in wanted.keys() - ignored:
        was = trained.get(name)
        if was != wanted[name] and (was or wanted[name]):
            raise Refused(f"{folder} was trained with {name} {was}, not {wanted[name]}; "
                          f"use another {option} or --tag")


def is_kept(run):
    """Whether its results folder holds the whole run."""
    if not (run.result / "config.json").exists():
        return False
    kept = figures.read_run(run.result)
    refuse_others(run.result, kept.flags, run.wanted, "--results", HOW_OFTEN)
    if kept.progress["global_step"][-1] != run.wanted["N"] * run.wanted["E"]:
        return False
    if not np.isfinite(kept.progress["eval_return_mean"][-1]):
        raise Refused(f"{run.result} was not evaluated at its end; use another --results or --tag")
    return True


def of_another_program(kept):
    """A line, if some of these runs are not of the program as it is now: is_kept compares flags."""
    now, program = logs.versions(), lambda version: (version.get("commit"), version.get("changes"))
    n = sum(any(program(version) != program(now) for version in versions(read_config(run.result)))
            for run in kept)
    return [f"note: {n} of those done are of another commit or of changed code; --tag WORD trains "
            "them with the code as it is"] if n else []


def keep(run):
    """Copies of a finished run what tables and figures read, without this machine's paths.

    config.json comes last: where it is, the rest is complete.
    """
    with checkpoint.writing(run.result):
        run.result.mkdir(parents=True, exist_ok=True)
        for name in ("progress.csv", "switches.csv"):  # the latter if the task ever switched
            if (run.folder / name).exists():
                shutil.copyfile(run.folder / name, run.result / name)
    config = json.loads((run.folder / "config.json").read_text(encoding="utf-8"))
    config["flags"] |= {"out": str(run), "resume": None}
    config["cpu"] = logs.cpu_name()
    text = json.dumps(config, indent=1) + "\n"
    checkpoint.write_atomically(run.result / "config.json", lambda f: f.write(text.encode()))


def epochs_done(run):
    """Of a run that was begun; without a checkpoint it begins anew."""
    if not (run.folder / "checkpoint.pt").exists():
        return 0
    refuse_others(run.folder, figures.read_flags(run.folder), run.wanted, "--out")
    try:
        return len(figures.read_run(run.folder).progress["global_step"])
    except figures.FigureError:  # stopped in its first epoch
        return 0


def locked(file):
    """Locks a file until this process has ended; False if somebody else has. On Windows, which has
    no fcntl, nobody is kept out."""
    if not importlib.util.find_spec("fcntl"):
        return True
    import fcntl
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # a file system without locks keeps nobody out either
        return not isinstance(error, BlockingIOError)
    return True


def is_running(run):
    lock = Path(f"{run.folder}.lock")
    if not lock.exists():
        return False
    with open(lock, "a") as file:
        return not locked(file)


def in_short(run):
    """Of a kept run."""
    kept = figures.read_run(run.result)
    return f"return {kept.progress['eval_return_mean'][-1]:.1f}, {kept.seconds():.0f} s"


def time_left(todo, kept, jobs):
    """In words, by what the kept runs took: those of the same method and env, else those of the
    method, else all."""
    if not todo:
        return "nothing left"
    took = [(run.env, run.method, figures.read_run(run.result).seconds()) for run in kept]
    if not took:
        return "how long that takes is known when the first has ended"
    total, guessed = 0.0, []
    for run in todo:
        of_method = [row for row in took if row[1] == run.method]
        alike = [row for row in of_method if row[0] == run.env] or of_method or took
        done = epochs_done(run) / run.wanted["N"]
        total += np.mean([time for *_, time in alike]) * (1 - done)
        if not of_method and run.method.label not in guessed:
            guessed.append(run.method.label)
    minutes = total / jobs / 60
    text = f"about {minutes / 60:.1f} h" if minutes > 90 else f"about {minutes:.0f} min"
    note = f" (no run of {', '.join(guessed)} has ended: taken as the others)" if guessed else ""
    return f"{text} left with {jobs} at a time{note}"


# ---- running ------------------------------------------------------------------------------------


def train(run):
    """Trains the run in this process, from its checkpoint if it has one, and keeps what it logged.
    Where a signal stops it, this ends the program with 128 + its number."""
    program = run.method.program
    with checkpoint.writing(run.folder.parent):
        run.folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{run.folder}.lock", "w") as lock:
        if not locked(lock):
            time.sleep(0.5)  # who only asks whether it is locked holds it for a moment
            if not locked(lock):
                raise Refused(f"{run.folder} is in another process's hands")
        where = ["--resume", str(run.folder)]
        if not (run.folder / "checkpoint.pt").exists():
            if (run.folder / "agent.pt").exists():
                raise Refused(f"{run.folder} has an agent.pt but no checkpoint.pt to go on from; "
                              "move it away or use another --out")
            shutil.rmtree(run.folder, ignore_errors=True)  # killed before its first checkpoint
            where[0] = "--out"
        module = importlib.import_module("m3po" if program == "m3po" else f"baselines.{program}")
        faults.run(program, module.main, *m3po.parse_args([*run.flags(), *where], program))
        keep(run)
    print(f"kept         {run.result}")


def start(run, args):
    """The run as a process of one thread, in a session of its own."""
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with checkpoint.writing(run.folder.parent):
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        log = open(f"{run.folder}.log", "a")
    with log:
        return subprocess.Popen(command(run, args), stdin=subprocess.DEVNULL, stdout=log,
                                stderr=log, env=environ, start_new_session=True)


def interrupt(child):
    """Ctrl-C for a run. Windows has no such signal to send, and there the console has sent it."""
    try:
        child.send_signal(signal.SIGINT)
    except ValueError:
        pass


def run_all(runs, todo, args):
    """Runs todo, args.jobs at a time. Returns {run: status} of what failed, by name."""
    waiting, running, failed = list(todo), [], {}
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                run = waiting[0]
                if is_kept(run) or is_running(run):  # by now
                    print(f"elsewhere    {run}: another process has taken it", flush=True)
                else:
                    running.append((run, start(run, args)))
                waiting.pop(0)
            time.sleep(0.2)
            for run, child in [pair for pair in running if pair[1].poll() is not None]:
                running.remove((run, child))
                if child.returncode:
                    outcome = f"exit status {child.returncode}, see {run.folder}.log"
                    failed[str(run)] = outcome
                else:
                    outcome = in_short(run)
                kept = [other for other in runs if is_kept(other)]
                left = [*waiting, *(other for other, _ in running)]
                print(f"ended        {run}: {outcome}; {len(kept)} of {len(runs)} done, "
                      f"{time_left(left, kept, args.jobs)}", flush=True)
    finally:  # also Ctrl-C. In sessions of their own, the runs get one signal, ours, and save
        for _, child in running:
            interrupt(child)
        for _, child in running:
            child.wait()
    return failed


# ---- command line -------------------------------------------------------------------------------


def build_parser():
    p = flags.OneLineParser("experiments.py", description=__doc__.partition("\n\nOUT/")[0],
                            usage="experiments.py [flags] [-- flags of every run]")
    p.add_argument("--envs", nargs="+", default=["point-fwd-bwd"], metavar="NAME",
                   help="(point-fwd-bwd)")
    variants = [slug for slug, method in METHODS.items() if method.program == "m3po"]
    p.add_argument("--methods", nargs="+", choices=METHODS, default=variants, metavar="METHOD",
                   help=f"some of {', '.join(METHODS)} (all but the last three, the baselines)")
    p.add_argument("--seeds", nargs="+", type=flags.natural, default=[0, 1, 2, 3, 4], metavar="S",
                   help="(0 1 2 3 4)")
    p.add_argument("--jobs", type=flags.count, default=2, metavar="RUNS",
                   help="at a time, one thread each (2)")
    p.add_argument("--tag", metavar="WORD", help="METHOD-WORD is the name of each method's folders:"
                   " for the same methods with other flags")
    p.add_argument("--out", type=Path, default=Path("runs/experiments"), metavar="DIR",
                   help="for run folders; those in it are gone on with (%(default)s)")
    p.add_argument("--results", type=Path, default=Path("results"), metavar="DIR",
                   help="keeps what finished runs logged, which are not run again (%(default)s)")
    p.add_argument("--dry-run", action="store_true",
                   help="say what is done, what remains and how long that will take; with --slurm"
                   " print the script")
    instead = p.add_mutually_exclusive_group()
    instead.add_argument("--table", action="store_true", help="print the table of what is done")
    instead.add_argument("--print", action="store_true",
                         help="print a command for each run that remains, one a line")
    instead.add_argument("--slurm", nargs="?", type=Path, metavar="TEMPLATE",
                         const=Path(__file__).with_name("slurm.sh"),
                         help="submit what remains and is not in the queue as one array job"
                         " (slurm.sh)")
    return p


def read_grid(argv):
    """The command line: (args, runs, {name: env}, lines that say what was left out)."""
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = build_parser()
    args = parser.parse_args(argv[:cut])
    for name in ("envs", "methods", "seeds"):  # nothing twice
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    for option, path in (("--out", args.out), ("--results", args.results)):
        if path.exists() and not path.is_dir():
            parser.error(f"argument {option}: {path} is no folder")
    return args, *grid(args, argv[cut + 1:], parser)


def main(argv=None):
    """Does what was asked for. Returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args, runs, made, left_out = read_grid(argv)
    kept = [run for run in runs if is_kept(run)]
    line = shlex.join(["python", "experiments.py", *argv])
    if args.table:
        print(tables(runs, kept, made, line, left_out), end="")
        return 0
    missing = [run for run in runs if run not in kept]
    todo = [run for run in missing if not is_running(run)]
    begun = sum(epochs_done(run) > 0 for run in todo)
    script = args.print or args.slurm  # on stdout
    left = time_left(todo, kept, 1 if script else args.jobs)
    print("\n".join([*left_out, f"{len(runs)} runs: {len(kept)} done, {len(missing) - len(todo)} "
                     f"running elsewhere, {begun} begun, {len(todo) - begun} not; {left}",
                     *of_another_program(kept)]),
          file=sys.stderr if script else sys.stdout, flush=True)
    if args.print:
        print("".join(shlex.join(command(run, args)) + "\n" for run in todo), end="")
    elif args.slurm:
        slurm.submit(args.slurm, {run.folder: command(run, args) for run in todo}, args.out,
                     args.dry_run)
    elif args.dry_run:
        for run in kept:
            print(f"done         {run}: {in_short(run)}")
        for run in missing:
            print(f"{'to do' if run in todo else 'running':12} {run}: {epochs_done(run)} of "
                  f"{run.wanted['N']} epochs")
    elif len(runs) == 1:
        train(runs[0]) if missing else None
    else:
        failed = run_all(runs, todo, args)
        markdown = tables(runs, [run for run in runs if is_kept(run)], made, line, left_out)
        args.out.mkdir(parents=True, exist_ok=True)
        checkpoint.write_atomically(args.out / "table.md", lambda f: f.write(markdown.encode()))
        print(f"\n{markdown}\nwritten      {args.out}/table.md, {args.results}")
        for name, outcome in failed.items():
            print(f"failed       {name}: {outcome}")
        return 1 if failed else 0
    return 0


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        play.need("experiments.py", "scipy")
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", flush=True)
        sys.exit(130)
    except (checkpoint.CheckpointError, figures.FigureError, play.PlayError, slurm.SlurmError,
            Refused) as error:
        sys.exit(f"experiments.py: error: {error}")
