"""Watch a trained agent adapt to the hidden task it cannot see.

    python play.py RUN_DIR                          ten episodes: returns, and what switches cost
    python play.py RUN_DIR --best                   the same with best.pt, not the last agent
    python play.py RUN_DIR --view                   in a window; the key N changes the hidden task
    python play.py RUN_DIR --video turning.gif      the first around its first switch; .gif or .mp4
    python play.py RUN_DIR --strip strip.png        time-lapse of the whole of it, as in Figure 8
    python play.py RUN_DIR --video v.gif --switch-at 200 500 --window 150 600 --every 4 --seed 7
    python play.py RUN_DIR --export policy.onnx     the policy, to act without this repository

RUN_DIR is a run folder or one of agents/. The agent runs in `evaluation.evaluate`, as in training,
while a film keeps what happened; drawing.py makes the pictures.
"""

import argparse
import importlib
import importlib.util
import sys
import time
import warnings
from contextlib import closing
from pathlib import Path

import glfw
import numpy as np

import checkpoint
import envs
import m3po
from drawing import (Film, PlayError, Stage, WindowViewer, choose_gl, has_display, has_simulator,
                     is_toy, mujoco, replay, strip, video)  # mujoco, though MUJOCO_GL be broken
from evaluation import Group, around_switches, early_steps, evaluate, summarise
from flags import OneLineParser, count, natural
from logs import method_name

NO_DISPLAY = "no display for --view; --video PATH and --strip PATH need none"
KEYS = "Space: pause     Esc: close"
FRAMES = 30  # a second, at most, in a window
BARS = "▁▂▃▄▅▆▇█"


# ---- in the terminal ----------------------------------------------------------------------------


def introduce(env, run):
    """A line about what one is going to see."""
    clock = envs.switching_clock(env)
    moments = clock and clock.switch_at
    when = (f"changes at {', '.join(map(str, moments))}" if moments else
            f"is redrawn every {clock.every} env steps" if clock else "is set by the env")
    seen = "is told the task" if run.oracle else f"sees the last {run.L} steps, never the task"
    print(f"agent        {method_name(run.method)} on {run.env}: {seen}, which {when}")


def report(episodes, film, gamma, first=0):
    """Prints returns per episode, numbered from `first` on, and how the agent fared after switches;
    the film is of the first."""
    early = early_steps(film)
    returns, lengths, s = summarise(episodes, gamma, early)
    for i, (value, length) in enumerate(zip(returns, lengths)):
        right = episodes["right_way"][:, i]
        way = f"  right way {np.nanmean(right):4.0%}" if np.isfinite(right).any() else ""
        print(f"episode {first + i:3d}  return {value:9.1f}  length {length:4d}{way}")
    print(f"return       {returns.mean():.1f} +- {returns.std():.1f} over {len(returns)} episodes")
    if np.isfinite(s["eval_right_way"]):
        print(f"right way    {s['eval_right_way']:.0%} of the steps")
    if np.isfinite(s["eval_reward_after_switch"]):
        after, otherwise = s["eval_reward_after_switch"], s["eval_reward_otherwise"]
        print(f"per step     {after:.3f} in the {early} steps after a switch, {otherwise:.3f} "
              "otherwise")
        report_switches(episodes, film, early)


def report_switches(episodes, film, early):
    """Prints the reward around each switch of the film, and around all switches on average."""
    size = max(1, early // 10)  # env steps in a bar
    early -= early % size  # so that no bar lies across a switch
    reward, places = around_switches(episodes, np.arange(-early, early))
    bins = np.array([mean(reward[:, i:i + size], 1) for i in range(0, 2 * early, size)]).T
    line = lambda rows: bars(mean(rows, 0), np.nanmin(bins), np.nanmax(bins), early // size)
    print(f"adapting     reward in the {early} steps before | after a switch, {size} a bar")
    for i, (episode, step) in enumerate(places):
        if episode == 0:
            until = next((s for e, s in places[i + 1:] if e == 0), len(episodes["reward"]))
            right = episodes["right_way"][step:until, 0]  # 0, 1; NaN where the env does not say
            wrong = (np.cumsum(right) == 0).sum()
            news = "" if np.isnan(right).all() else f", the wrong way for {wrong} env steps"
            print(f"  step {step:4d}  {line(bins[i:i + 1])}  {film.words(step)}{news}")
    print(f"  all {len(places):5d}  {line(bins)}")


def mean(values, axis):
    """The mean of what is known, NaN where nothing is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy warns of the latter
        return np.nanmean(values, axis)


def bars(values, low, high, middle):
    """Numbers from low to high as bars, with a | before that of the index `middle`."""
    try:
        BARS.encode(sys.stdout.encoding or "ascii")
        levels = BARS
    except UnicodeEncodeError:
        levels = "_.-=+*#@"
    heights = np.nan_to_num((values - low) / max(high - low, 1e-8), nan=-1.0)
    text = [levels[round(height * 7)] if height >= 0 else " " for height in heights]
    return "".join([*text[:middle], "|", *text[middle:]])


# ---- in a window --------------------------------------------------------------------------------


class Window(WindowViewer):
    """MuJoCo's window, with our text and keys in place of Gymnasium's."""

    caption, keys = "", KEYS
    paused = new_task = False  # new_task: somebody asked for one

    @property
    def closed(self):
        return bool(glfw.window_should_close(self.window))

    def _create_overlay(self):
        self.add_overlay(mujoco.mjtGridPos.mjGRID_TOPLEFT, self.caption, "")
        self.add_overlay(mujoco.mjtGridPos.mjGRID_BOTTOMLEFT, self.keys, "")

    def _key_callback(self, window, key, scancode, action, mods):
        if action != glfw.PRESS:
            return
        if key == glfw.KEY_N:
            self.new_task = True
        elif key == glfw.KEY_SPACE:
            self.paused = not self.paused
        elif key == glfw.KEY_ESCAPE:
            glfw.set_window_should_close(window, True)


class Live(Film):
    """A film that is shown while it is made, in real time where the machine can. Once somebody has
    asked for another task, nothing but their asking changes it. A closed window ends the episode.
    """

    def __init__(self, env):
        super().__init__(env)
        self.stage = Stage(self, Window, 960, 720)
        self.clock = envs.switching_clock(env)
        self.switch_at = self.clock and self.clock.switch_at
        if self.clock:
            self.stage.viewer.keys = "N: another hidden task     " + KEYS
        self.dt = getattr(self.unwrapped, "dt", 0.05)
        self.stride = max(1, round(1 / (FRAMES * self.dt)))  # env steps from frame to frame

    def reset(self, *, seed=None, options=None):
        if self.clock:
            self.clock.switch_at = self.switch_at
        self.due = time.perf_counter()
        return super().reset(seed=seed, options=options)

    def step(self, action):
        window = self.stage.viewer
        if window.new_task and self.clock:
            self.clock.switch_at = (*(self.clock.switch_at or ()), self.clock.t + 1)
            self.switch_at = self.switch_at or ()  # in later episodes
        window.new_task = False
        obs, reward, terminated, truncated, info = super().step(action)
        if len(self) % self.stride == 0 and not window.closed:  # drawing into no window crashes
            self.show(len(self) - 1)
        return obs, reward, terminated, truncated or window.closed, info

    def show(self, t):
        window = self.stage.viewer
        self.stage.pose(t)
        window.caption = self.caption(t)
        window.render()
        while window.paused and not window.closed:
            time.sleep(1 / FRAMES)
            window.render()
        now = time.perf_counter()
        self.due = max(self.due + self.stride * self.dt, now)
        time.sleep(self.due - now)


def watch(policy, env, env_seeds, run):
    """One episode after another in a window, until it is closed; returns the film of the last."""
    live = Live(env)
    with closing(live.stage):
        for i, seed in enumerate(env_seeds):
            report(evaluate(policy, Group([live]), [seed], run.L), live, run.gamma, i)
            if live.stage.viewer.closed:
                break
    return live


# ---- the command --------------------------------------------------------------------------------


def load(folder):
    """m3po.load or a baseline's, with whatever is wrong said in one line."""
    file = checkpoint.agent_file(folder)
    try:
        method = checkpoint.read(file, "agent")["method"]
        module = m3po if method == "m3po" else importlib.import_module(f"baselines.{method}")
        return module.load(folder)
    except (checkpoint.CheckpointError, envs.EnvError) as error:
        raise PlayError(str(error)) from error
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        if hasattr(error, "__notes__"):  # not of the file, but of an own env's code
            raise
        reason = " ".join(str(error).split())[:160]
        raise PlayError(f"{file} does not fit this version of M3PO: {reason}") from error


def output_path(*endings):
    """An argparse type: a path in a folder that exists, with one of these endings."""
    def parse(text):
        path = Path(text)
        if path.suffix not in endings:
            raise argparse.ArgumentTypeError(f"{text!r} does not end in {' or '.join(endings)}")
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
        return path
    return parse


def need(what, package):
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        raise PlayError(f"{what} needs {package}: python -m pip install {package}")


def check(args, env):
    """Refuses what this machine or this env cannot show, before any episode runs."""
    toy, pictures = is_toy(env), args.video or args.strip
    if args.window and not pictures:
        raise PlayError("argument --window: it is for --video and --strip")
    if args.window and args.window[0] >= args.window[1]:
        raise PlayError("argument --window: FROM must lie before TO")
    if args.switch_at and not envs.switching_clock(env):
        raise PlayError(f"argument --switch-at: no TaskClock switches the task of {env.spec.id}")
    if args.switch_at and max(args.switch_at) >= envs.time_limit(env):
        raise PlayError(f"argument --switch-at: an episode has {envs.time_limit(env)} steps")
    modes = env.metadata.get("render_modes", ())
    if not (toy or has_simulator(env)):
        for wanted, mode in ((pictures, "rgb_array"), (args.view, "human")):
            if wanted and mode not in modes:
                raise PlayError(f"{env.spec.id} does not render {mode!r}: nothing to show")
    if args.video and args.video.suffix == ".mp4":
        need("an .mp4", "imageio-ffmpeg")
    if args.strip or args.video and toy:
        need("this picture", "matplotlib")
    if args.view and toy:
        raise PlayError("the toy has no window; --video PATH and --strip PATH draw it")
    if args.view and has_simulator(env):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its reason is a warning of two lines
            if not has_display() or not glfw.init():
                raise PlayError(NO_DISPLAY)
    if pictures and has_simulator(env):
        choose_gl()


def play(args):
    policy, _, env, run = load(Path(args.run) / "best.pt" if args.best else args.run)
    if args.export:
        need("--export", "onnxscript")
        import export
        print(export.write(policy, env, run, args.export))
        return
    check(args, env)
    env_seeds = envs.seeds(args.seed, 2, 0, args.episodes)  # 2: no training's, no evaluation's
    live = args.view and has_simulator(env)
    others = [] if live else [m3po.make_env(run) for _ in env_seeds[1:]]
    for one in [env, *others] if args.switch_at else ():
        envs.switching_clock(one).switch_at = tuple(args.switch_at)
    introduce(env, run)
    if live:
        film = watch(policy, env, env_seeds, run)
    else:
        film = Film(env)
        report(evaluate(policy, Group([film, *others]), env_seeds, run.L, show=True), film,
               run.gamma)
    if args.view and not live:
        for _ in replay(film, "human"):  # which draws at each step, in its own time
            pass
    draw(args, film)


def draw(args, film):
    """The pictures asked for."""
    whole = around = (0, len(film))
    if args.window:
        if args.window[0] >= len(film):
            raise PlayError(f"argument --window: the episode ended before step {args.window[0]}")
        whole = around = (args.window[0], min(args.window[1], len(film)))
    elif len(film) > 200:
        switch = film.switches[0] if film.switches else 60
        around = (max(switch - 60, 0), min(switch + 120, len(film)))
    if args.video:
        video(film, args.video, *around, args.every)
    if args.strip:
        strip(film, args.strip, *whole)
    for path in filter(None, (args.video, args.strip)):
        print(f"written      {path}")


def build_parser():
    p = OneLineParser("play.py", description=__doc__.split("\n\n")[0])
    p.add_argument("run", metavar="RUN_DIR", help="a run folder, with its agent.pt; or agents/ENV")
    p.add_argument("--best", action="store_true",
                   help="the agent of the best evaluation (best.pt), not the last one")
    p.add_argument("--episodes", type=count, default=10, help="episodes to evaluate (10)")
    p.add_argument("--seed", type=natural, default=0,
                   help="of the episodes, which no training or evaluation saw (0)")
    p.add_argument("--switch-at", type=count, nargs="+", metavar="STEP",
                   help="env steps at which the hidden task changes (the env draws them)")
    p.add_argument("--view", action="store_true",
                   help="watch the episodes in a window; N: another hidden task, Space: pause")
    p.add_argument("--video", type=output_path(".gif", ".mp4"), metavar="PATH",
                   help="the first episode around its first switch, .gif or .mp4")
    p.add_argument("--strip", type=output_path(".png"), metavar="PATH",
                   help="time-lapse of the first episode, .png")
    p.add_argument("--window", type=natural, nargs=2, metavar=("FROM", "TO"),
                   help="env steps to show in these")
    p.add_argument("--every", type=count, metavar="STEPS",
                   help="env steps from one frame of the video to the next (2; toy 1)")
    p.add_argument("--export", type=output_path(".onnx"), metavar="PATH",
                   help="write the policy as one step of an ONNX graph, and play nothing")
    return p


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        play(args)
    except (PlayError, envs.EnvError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
