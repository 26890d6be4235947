"""What a run leaves behind and says: the run folder, its logs, the clocks and the screen.

    config.json     method, flags and versions
    progress.csv    one row per epoch (FIELDS; docs/LOGS.md explains each column). A baseline leaves
                    empty what it has not and adds what it alone has
    eval.csv        one row per evaluation episode
    switches.csv    reward around the switches of the task in the last evaluation, if there were any
    events.*        the same numbers for TensorBoard, where it is installed
    wandb/          the same for Weights & Biases, with --track
"""

import csv
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from hashlib import sha1
from pathlib import Path
from uuid import uuid4

import gymnasium as gym
import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import diagnostics
import envs
from evaluation import around_switches, early_steps, span, summarise
from flags import differences, program

FIELDS = [*"""epoch global_step eval_return_mean eval_return_std eval_length_mean
eval_discounted_return eval_reward_after_switch eval_reward_otherwise eval_right_way eval_faults
train_return_mean q_loss actor_loss q_mean td_error entropy q_shift alpha beta model_nll
model_nll_train model_explained_reward model_explained_obs model_fresh_nll
model_fresh_explained_reward model_fresh_explained_obs model_fits model_gradient_steps imagined
terminated_share nonfinite_share dropped_transitions""".split(), *diagnostics.FIELDS,
          *(f"seconds_{part}" for part in "env fit rollouts updates eval diagnose".split())]
LEGEND = ("legend       alpha: weight of the policy's entropy; explained: fraction of the variance "
          "of r (rewards) and\n             o (observations) that the model predicted in this "
          "epoch's steps before it\n             learned them (after the first fit: in held-out "
          "ones)")


@contextmanager
def clock(progress, part):
    """Adds the wall time of its block to progress.seconds[part]."""
    start = time.perf_counter()
    yield
    progress.seconds[part] = progress.seconds.get(part, 0.0) + time.perf_counter() - start


def append_csv(path, fields, rows):
    """Under the file's own header if it has one: a resumed run keeps the columns it began with."""
    with checkpoint.writing(path), open(path, "a+", newline="", encoding="utf-8") as f:
        f.seek(0)
        header = next(csv.reader(f), None)
        writer = csv.DictWriter(f, header or fields, extrasaction="ignore")
        if not header:
            writer.writeheader()
        writer.writerows(rows)


def tensorboard(folder, step):
    """A writer if the package is there, else None. What it shows past env step `step` is hidden."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder, purge_step=step + 1)


def weights_and_biases(args, out):
    """With --track a run of Weights & Biases, else None. A resume goes on with the same one."""
    if not args.track:
        return None
    import wandb
    name = out / "wandb_id.txt"
    if not name.exists():
        name.write_text(uuid4().hex, encoding="utf-8")
    try:
        tracker = wandb.init(project=os.environ.get("WANDB_PROJECT", "m3po"), name=out.name,
                             id=name.read_text(encoding="utf-8"), resume="allow", dir=out,
                             config=vars(args))
    except wandb.Error as error:
        sys.exit(f"{program(args.method)}: error: --track: {' '.join(str(error).split())} "
                 "(WANDB_MODE=offline needs no account)")
    # Not its own count of rows, which must rise: a resume writes the last ones again, the same.
    tracker.define_metric("*", step_metric="global_step")
    return tracker


def open_run_folder(args, step, now):
    """A new folder with config.json; in a resume also the logs, cut after env step `step`. now:
    versions()."""
    out = Path(args.out)
    with checkpoint.writing(out):
        out.mkdir(parents=True, exist_ok=bool(args.resume))
    for name in ("progress.csv", "eval.csv") if args.resume else ():
        checkpoint.cut_log(Path(args.resume) / name, out / name, step)
    config = {"method": args.method, "flags": vars(args)} | versions_of_run(args.resume, now)
    text = json.dumps(config, indent=1)
    checkpoint.write_atomically(out / "config.json", lambda f: f.write(text.encode()))
    return out


def versions_of_run(resumed, now):
    """{"versions": those it began with, "later": the others it was resumed with, if any}."""
    before = {}
    if resumed:
        try:
            before = json.loads((Path(resumed) / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):  # lost or broken: nothing to add to
            pass
    first, later = before.get("versions", now), before.get("later", [])
    if now not in [first, *later]:
        later = [*later, now]
    return {"versions": first} | ({"later": later} if later else {})


class Log:
    """A run's logs and its screen: a progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, args, env, progress):
        self.args, self.env, self.progress = args, env, progress
        self.seconds = Counter()  # by part, since this process began
        now = versions()
        self.out = open_run_folder(args, progress.epoch * args.E, now)
        self.board = tensorboard(args.out, progress.step)
        self.tracker = weights_and_biases(args, self.out)
        print(describe(args, env, progress, now), flush=True)
        if args.method == "m3po":
            print(LEGEND, flush=True)
        self.bar = self.new_bar(progress.step)

    def new_bar(self, step):
        """Of the warm-up or, from its end on, of learning: an ETA over both would mislead."""
        first, last = (0, self.args.warmup) if step < self.args.warmup else (
            self.args.warmup, self.args.N * self.args.E)
        no_terminal = not (sys.stdout.isatty() and sys.stderr.isatty())
        return tqdm(total=last - first, initial=step - first, unit="step", dynamic_ncols=True,
                    desc="learning" if first else "warm-up", smoothing=0.05,
                    disable=no_terminal or step >= last)

    def step(self):
        """An env step is over."""
        self.bar.update()
        if self.progress.step == self.args.warmup:
            self.bar.close()
            self.bar = self.new_bar(self.args.warmup)

    def say(self, line):
        if self.bar.disable:
            print(line, flush=True)
        else:
            self.bar.write(line, file=sys.stdout)

    def finish_epoch(self, policy, players, columns):
        """What an epoch is judged by: evaluation and a row in the logs. It touches no training
        stream. columns: {name: value} of the row that the method itself knows."""
        args, progress = self.args, self.progress
        epoch = progress.epoch + 1
        row = {"epoch": epoch, "global_step": progress.step}
        if args.eval_episodes and (epoch % args.eval_every == 0 or epoch == args.N):
            row |= self.evaluate(policy, players, epoch)
        self.write(row | columns)
        progress.next_epoch()

    def evaluate(self, policy, players, epoch):
        """An evaluation: one row in eval.csv per episode; returns its numbers for progress.csv."""
        args, progress = self.args, self.progress
        with clock(progress, "eval"):
            episodes = players.evaluate(policy, envs.seeds(args.seed, 1, epoch, args.eval_episodes))
        returns, lengths, metrics = summarise(episodes, args.gamma, early_steps(self.env))
        append_csv(self.out / "eval.csv", ["global_step", "episode", "return", "length"],
                   [{"global_step": progress.step, "episode": i, "return": r, "length": n}
                    for i, (r, n) in enumerate(zip(returns.tolist(), lengths.tolist()))])
        self.write_switches(episodes)
        progress.last = [metrics["eval_return_mean"], progress.step]
        progress.best = max(progress.best, progress.last)
        return metrics

    def write_switches(self, episodes):
        """The mean reward at each step from a switch, and of how many switches it is the mean."""
        x = span(self.env)
        reward, places = around_switches(episodes, x)
        if places:
            n = np.isfinite(reward).sum(0)
            mean = np.nansum(reward, 0) / np.maximum(n, 1)
            rows = zip(x.tolist(), np.where(n, mean, np.nan).tolist(), n.tolist())
            text = "".join(f"{step},{value!r},{count}\n" for step, value, count in rows)
            checkpoint.write_atomically(
                self.out / "switches.csv",
                lambda f: f.write(f"steps_since_switch,reward,switches\n{text}".encode()))

    def write(self, row):
        """Complete an epoch's row; to progress.csv, TensorBoard, the screen."""
        progress, logged = self.progress, self.progress.logged
        done = progress.updated
        mean = progress.losses.sum(0).cpu() / done if done else torch.full((len(logged),), math.nan)
        returns = progress.train_returns
        row = row | dict(zip(logged, mean.tolist())) | {
            "train_return_mean": float(np.mean(returns)) if returns else math.nan,
            "dropped_transitions": progress.dropped}
        row |= {f"model_{name}": value for name, value in found(progress).items()}
        row |= {f"seconds_{part}": seconds for part, seconds in progress.seconds.items()}
        own = [name for name in logged if name not in FIELDS]
        append_csv(self.out / "progress.csv", FIELDS + own, [row])
        grouped = {f"{'losses' if name in logged else 'charts'}/{name}": value
                   for name, value in row.items()}
        for name, value in grouped.items() if self.board else ():
            self.board.add_scalar(name, value, row["global_step"])
        if self.tracker:
            self.tracker.log({"global_step": row["global_step"]} | grouped)
        self.seconds.update(progress.seconds)
        self.say(epoch_line(row, progress, self.args.warmup))
        if history_is_no_help(row):
            self.say("model        it explains no more with history than a model without: reward "
                     "{:.2f} and {:.2f}, observations {:.2f} and {:.2f} on fresh episodes. Has it "
                     "not found the task?".format(*(row[f"{whose}_explained_{what}"] for what in (
                         "reward", "obs") for whose in ("episodes", "blind"))))
        if progress.faults:
            reasons = ", ".join(f"{reason} ({n})" for reason, n in progress.faults.items())
            n = sum(progress.faults.values())
            self.say(f"faults       {n} env steps dropped in this epoch, each ended its episode: "
                     f"{reasons}")
        if row.get("eval_faults"):
            self.say(f"faults       in {row['eval_faults']} of {self.args.eval_episodes} episodes "
                     "of this evaluation, which ended there")

    def end(self):
        """The last lines of a run that reached its end."""
        progress = self.progress
        if progress.last[1]:
            self.say("evaluation   last {:.1f} at step {:,}, best {:.1f} at step {:,} (best.pt)"
                     .format(*progress.last, *progress.best))
        split = ", ".join(f"{part} {seconds:.0f}" for part, seconds in self.seconds.items())
        self.say(f"seconds      {split or 'none'}")
        self.say(f"to see it    {self.out}/progress.csv, eval.csv; agent.pt and checkpoint.pt hold"
                 " the agent")
        if self.tracker:  # else, at the program's end, wandb does it and says that it broke off
            self.tracker.finish()

    def close(self):
        self.bar.close()


def found(progress):
    """What the last fit found; of what was fresh the mean of this epoch's fits, of their number
    and gradient steps the sum."""
    fits = progress.fits
    kept = {name: value for name, value in progress.fit.items() if not name.startswith("fresh")}
    if "gradient_steps" in kept:  # M3PO's
        kept |= {"fits": len(fits), "gradient_steps": sum(fit["gradient_steps"] for fit in fits)}
    names = {name for fit in fits for name in fit if name.startswith("fresh")}
    return kept | {name: float(np.mean([fit[name] for fit in fits if name in fit]))
                   for name in names}


def history_is_no_help(row):
    """Whether a diagnosis found that the model explains no output better for seeing history."""
    return "blind_nll" in row and all(
        row[f"episodes_explained_{what}"] < row[f"blind_explained_{what}"] + 0.02
        for what in ("reward", "obs"))


def epoch_line(row, progress, warmup):
    """An epoch on the screen, without what is not known yet."""
    parts = [f"epoch {row['epoch']:3d}", f"step {row['global_step']:7,d}"]
    if "eval_return_mean" in row:
        parts.append(f"return {row['eval_return_mean']:7.1f} +- {row['eval_return_std']:5.1f}")
    elif math.isfinite(row["train_return_mean"]):
        parts.append(f"training return {row['train_return_mean']:7.1f}")
    if progress.updated and "q_mean" in row:
        parts += [f"Q {row['q_mean']:6.1f}", f"alpha {row['alpha']:.3f}"]
    if progress.step <= warmup:
        parts.append("warm-up: random actions, nothing is learned yet")
    kind = "model_fresh_explained" if "model_fresh_nll" in row else "model_explained"
    if f"{kind}_reward" in row:
        parts.append(f"explained r {row[f'{kind}_reward']:.2f} o {row[f'{kind}_obs']:.2f}")
    return "  ".join([*parts, f"{sum(progress.seconds.values()):.0f} s"])


# ---- what is printed before training starts -----------------------------------------------------


def cpu_name():
    info = Path("/proc/cpuinfo")
    info = info.read_text(encoding="utf-8") if info.exists() else ""  # Linux has it
    names = [line.split(": ")[1] for line in info.splitlines() if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor() or 'a CPU'}"


def git(*words):
    """What a git command prints in this folder; nothing where there is no git."""
    try:
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True,
                              encoding="utf-8", check=False).stdout.strip()
    except OSError:
        return ""


def versions():
    """Of what a run's numbers depend on. changes: a hash of what was changed in the program since
    the commit, if anything was."""
    changes = git("diff", "HEAD", "--", "*.py")
    return {"python": platform.python_version(), "torch": torch.__version__,
            "gymnasium": gym.__version__, "mujoco": envs.mujoco.__version__,
            "numpy": np.__version__, "commit": git("rev-parse", "HEAD") or "unknown"} | (
                {"changes": sha1(changes.encode()).hexdigest()[:12]} if changes else {})


def method_name(method):
    """As it is written: M3PO, PEARL, GHP-MDP."""
    return method.upper().replace("_", "-")


def describe(args, env, progress, now):
    """What is trained, in some ten lines. now: versions()."""
    inner, own = env.unwrapped, "the env's own"
    period = getattr(inner, "switch_every", own)
    task = period or "one per episode"
    if isinstance(period, int):
        task = f"redrawn every {period} env steps"
    name = method_name(args.method)
    rollouts = f", {args.E * args.M:,} model rollouts of k={args.k}" if "M" in args else ""
    updates = f", {args.E * args.G:,} policy updates" if "G" in args else ""
    note = "" if envs.termination_known(env) else " (unknown to the model: branches never end)"
    differs = [f"{name.replace('_', ' ')} = {value}"
               for name, value in differences(vars(args)).items()]
    lines = [
        f"env          {args.env}{' + oracle' if args.oracle else ''}: "
        f"obs {env.observation_space.shape[0]}, actions {env.action_space.shape[0]} in [-1, 1]",
        f"reward       {getattr(inner, 'reward_text', own)}",
        f"terminated   {getattr(inner, 'termination_text', own)}{note}; "
        f"episodes of {envs.time_limit(env):,} env steps at most"
        + (f", in training of {args.reset_every:,}" if args.reset_every else ""),
        f"hidden task  {task}",
        f"method       {name}" + (", but " + ", ".join(differs) if differs else ""),
        f"one epoch    {args.E:,} env steps{rollouts}{updates}; {args.N} epochs",
        f"device       {args.device}, {torch.get_num_threads()} threads, seed {args.seed}",
        "versions     " + ", ".join(f"{name} {text[:12]}" for name, text in now.items()),
        f"run folder   {args.out}"]
    if args.resume:
        lines.append(f"resumed      {args.resume} from env step {progress.step:,}")
    return "\n".join(lines)
