"""An episode kept as a film, and pictures of it: frames, a time-lapse strip, a GIF or MP4.

The robot's colour is the hidden task: blue forwards, red backwards, or the dead leg red; in the
walker the torso darkens with its mass and the ground with its friction, on the pier the blocks with
their damping. Pictures are made after the episode and change nothing: of MuJoCo's envs from a copy
of the model, of another env that renders "rgb_array" by playing the film's actions again.
"""

import copy
import os
import subprocess
import sys
from contextlib import closing

ASKED_GL = os.environ.pop("MUJOCO_GL", None)  # if set and broken, `import mujoco` fails

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.envs.mujoco.mujoco_rendering import OffScreenViewer, WindowViewer  # play.py

import envs

BLUE, RED, GREY = "#0072B2", "#CC3311", "#8C8C8C"  # told apart by the colour-blind too
COLOURS = {1: BLUE, -1: RED, 0: GREY}  # of a direction; 0 is none
PALE, DARK = np.array([1.0, 0.9, 0.6, 1.0]), np.array([0.3, 0.05, 0.35, 1.0])  # least, most
WIDTH, HEIGHT = 480, 360  # pixels of a frame
CAMERA = {envs.HalfCheetahPier: (3.2, -20), envs.HalfCheetahFwdBwd: (3.2, -15),  # metres, degrees
          envs.AntFwdBwd: (3.8, -30), envs.Walker2dRandomParams: (3.0, -12),
          envs.HumanoidDirec: (3.2, -12)}
SNAPSHOTS = 10  # in a strip
NO_GL = ("no OpenGL to draw with (tried {}); on Debian or Ubuntu: apt-get install libegl1 "
         "libgl1-mesa-dri (EGL) or libosmesa6 (OSMesa); elsewhere set MUJOCO_GL: egl, osmesa, glfw")


class PlayError(Exception):
    """What cannot be shown. The message is one line."""


# ---- what happened: the film --------------------------------------------------------------------


class Film(gym.Wrapper):
    """Keeps one episode: its seed; of step t actions[t], tasks[t], rewards[t] and states[t + 1].

    A state is MuJoCo's qpos or the toy's [x]: its first entry is the position along the track. In
    any other env it is [the reward so far].
    """

    def keep_state(self):
        env = self.unwrapped
        self.states.append(env.data.qpos.copy() if has_simulator(env) else
                           np.array([env.x if is_toy(env) else sum(self.rewards)]))

    def reset(self, *, seed=None, options=None):
        result = self.env.reset(seed=seed, options=options)
        self.seed, self.actions, self.states = seed, [], []
        self.tasks, self.switches, self.rewards = [], [], []
        self.keep_state()
        return result

    def step(self, action):
        result = self.env.step(action)
        info = result[4]
        if info.get("switched"):
            self.switches.append(len(self))
        self.actions.append(np.array(action))
        self.tasks.append(info.get("task"))
        self.rewards.append(result[1])
        self.keep_state()
        return result

    def __len__(self):
        return len(self.rewards)

    def colour(self, t):
        """Of step t's direction, or of another env's task if that is one number; else grey."""
        one = np.size(self.tasks[t]) == 1 and self.tasks[t] is not None
        directed = getattr(self.unwrapped, "has_direction", one)
        return COLOURS[int(np.sign(np.ravel(self.tasks[t])[0])) if directed else 0]

    def words(self, t):
        """Step t's hidden task as a person would say it."""
        env, task = self.unwrapped, self.tasks[t]
        if not is_toy(env) and not isinstance(env, envs.HiddenTaskMujoco):
            return "" if task is None else "task " + " ".join(f"{x:.3g}" for x in np.ravel(task))
        if isinstance(env, envs.AntCrippledLeg):
            return f"leg {np.argmax(task) + 1} dead"
        if isinstance(env, envs.HalfCheetahPier):
            return "blocks: darker = more damped"
        if isinstance(env, envs.Walker2dRandomParams):
            return "mass x{:.1f}, friction x{:.1f}".format(*1.5 ** (3.0 * task))
        return {BLUE: "forwards", RED: "backwards", GREY: ""}[self.colour(t)]

    def caption(self, t):
        since = [t - s for s in self.switches if s <= t]
        news = f" (new {since[-1]} steps ago)" if since and since[-1] < 50 else ""
        return f"step {t}   {self.words(t)}{news}   reward so far {sum(self.rewards[:t + 1]):.0f}"


def is_toy(env):
    return isinstance(env.unwrapped, envs.PointFwdBwd)


def has_simulator(env):
    return isinstance(getattr(env.unwrapped, "data", None), mujoco.MjData)


def replay(film, render_mode):
    """Plays a film's actions again from its seed, in an env that renders: yields (t, env)."""
    with closing(envs.make(film.spec.id, render_mode=render_mode)) as env:
        if clock := envs.switching_clock(env):
            clock.switch_at = envs.switching_clock(film).switch_at
        env.reset(seed=film.seed)
        for t, action in enumerate(film.actions):
            env.step(action)
            yield t, env


def pictures(film, steps, **size):
    """Yields (t, pixels [H, W, 3] of what step t led to) for each of these steps."""
    if not has_simulator(film):
        yield from ((t, env.render()) for t, env in replay(film, "rgb_array") if t in steps)
        return
    with closing(Stage(film, **size)) as stage:
        yield from ((t, stage.frame(t)) for t in steps)


# ---- MuJoCo's robots ----------------------------------------------------------------------------


def has_display():
    return (not sys.platform.startswith("linux")
            or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")))


def choose_gl():
    """Sets MUJOCO_GL to a backend that works here, each tried in a process of its own: after one
    failure PyOpenGL cannot try another."""
    backends = [ASKED_GL] if ASKED_GL else ["glfw"] * has_display() + ["egl", "osmesa"]
    for backend in backends:
        test = f"from mujoco.{backend} import GLContext; GLContext(64, 64).make_current()"
        if subprocess.run([sys.executable, "-c", test], env=os.environ | {"MUJOCO_GL": backend},
                          capture_output=True, check=False).returncode == 0:
            os.environ["MUJOCO_GL"] = backend
            return
    raise PlayError(NO_GL.format(", ".join(backends)))


def paint(model, film, t):
    """Colour the robot by step t's task: geom_rgba and the material, which no dynamics read."""
    rgba = lambda colour: [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)] + [1.0]
    shade = lambda value: PALE + value * (DARK - PALE)  # of a value from 0 to 1
    env, task, bodies = film.unwrapped, film.tasks[t], model.geom_bodyid
    robot = np.array([b > 0 and not model.body(b).name.startswith("block_") for b in bodies])
    model.geom_matid[robot] = -1  # else the material's texture shines through
    model.geom_rgba[robot] = rgba(film.colour(t))
    if isinstance(env, envs.AntCrippledLeg):
        model.geom_rgba[(bodies - 2) // 3 == np.argmax(task)] = rgba(RED)  # 3 bodies a leg, torso 1
    elif isinstance(env, envs.HalfCheetahPier):
        model.geom_rgba[env.blocks] = [shade(damping) for damping in task[:8]]
    elif isinstance(env, envs.Walker2dRandomParams):
        model.geom_rgba[bodies == env.torso] = shade((task[0] + 1) / 2)
        model.geom_rgba[model.geom("floor").id] = shade(0.4 * (task[1] + 1))


class Stage:
    """Draws a film's steps from the side, the camera following; into an array or, with another of
    Gymnasium's viewers, in a window."""

    def __init__(self, film, viewer=OffScreenViewer, width=WIDTH, height=HEIGHT):
        self.film = film
        self.model = model = copy.copy(film.unwrapped.model)
        self.data = mujoco.MjData(model)
        floor = model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE  # ends nowhere but in pictures
        model.geom_size[floor, :2] *= 25
        model.mat_texrepeat[model.geom_matid[floor & (model.geom_matid >= 0)]] *= 25
        model.mat_reflectance[:] = 0
        model.vis.headlight.ambient[:] = 0.4
        model.tex_data[:] = 165 + model.tex_data // 3  # a pale floor, for print and small GIFs
        model.vis.global_.offwidth, model.vis.global_.offheight = width, height
        self.viewer = viewer(model, self.data, width, height)
        self.viewer.scn.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0  # it ends in a hard edge
        self.viewer.cam.azimuth = 90  # x to the right
        self.viewer.cam.distance, self.viewer.cam.elevation = next(
            (view for kind, view in CAMERA.items() if isinstance(film.unwrapped, kind)), (4.0, -15))

    def pose(self, t):
        """The state that step t led to, in the colour of its task."""
        paint(self.model, self.film, t)
        self.data.qpos[:] = self.film.states[t + 1]
        mujoco.mj_forward(self.model, self.data)
        self.viewer.cam.lookat[:] = self.data.subtree_com[1]

    def frame(self, t):
        """The same as pixels [height, width, 3]."""
        self.pose(t)
        return self.viewer.render("rgb_array").copy()

    def close(self):
        self.viewer.con.free()  # now: freed later, it would take the next stage's textures along
        self.viewer.close()


# ---- on paper -----------------------------------------------------------------------------------


def canvas(width, height, dpi):
    """A matplotlib figure of these inches, which needs no window system, and its canvas."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure((width, height), dpi=dpi, layout="constrained")
    return figure, FigureCanvasAgg(figure)


def draw_timeline(ax, film, start, end):
    """Position over steps [start, end); the hidden task is the line's colour and the shade's."""
    cuts = [start, *(s for s in film.switches if start < s < end), end]
    above = dict(transform=ax.get_xaxis_transform(), fontsize=8)
    for left, right in zip(cuts[:-1], cuts[1:]):
        colour = film.colour(left)
        ax.axvspan(left, right, color=colour, alpha=0.15, lw=0)
        x = [state[0] for state in film.states[left:right + 1]]
        ax.plot(range(left, right + 1), x, color=colour, lw=2)
        ax.text((left + right) / 2, 1.02, film.words(left), color=colour, ha="center", **above)
    for cut in cuts[1:-1]:
        ax.axvline(cut, color="black", lw=1, ls="--")
        side = "left" if cut < (start + end) / 2 else "right"
        ax.text(cut, 0.03, f" switch at {cut} ", ha=side, **above)
    ax.set(xlim=(start, end), xlabel="env step", ylabel="position x" if is_toy(film) else
           "position x (m)" if has_simulator(film) else "reward so far")


def strip(film, path, start, end):
    """A time-lapse PNG: snapshots above (not of the toy), the position over time below."""
    figure, _ = canvas(12, 2.4 if is_toy(film) else 3.6, 150)
    grid = figure.add_gridspec(2 - is_toy(film), 1)
    ax = figure.add_subplot(grid[-1])
    draw_timeline(ax, film, start, end)
    if not is_toy(film):
        steps = np.unique(np.linspace(start, end - 1, SNAPSHOTS).astype(int))
        row = grid[0].subgridspec(1, len(steps), wspace=0.02)
        shots = pictures(film, steps, width=HEIGHT, height=HEIGHT)
        for i, (t, pixels) in enumerate(shots):
            place = figure.add_subplot(row[i], xticks=[], yticks=[])
            place.imshow(pixels)
            place.spines[:].set(color=film.colour(t), linewidth=3)
            moved = film.states[t + 1][0] - film.states[max(t - 9, 0)][0]  # in ten steps, metres
            still = abs(moved) < 0.02 or not has_simulator(film)
            arrow = "" if still else r"$\rightarrow$" if moved > 0 else r"$\leftarrow$"
            place.set_title(f"{t} {arrow}", fontsize=11)
            ax.plot(t, film.states[t + 1][0], "o", color="black", ms=3)
    figure.savefig(path)


def env_frames(film, steps):
    """An array [H, W, 3] per step, with a caption."""
    from PIL import Image, ImageDraw, ImageFont
    for t, pixels in pictures(film, steps):
        image = Image.fromarray(pixels)
        if image.width != WIDTH:  # an even height, for videos
            image = image.resize((WIDTH, round(WIDTH * image.height / image.width / 2) * 2))
        draw = ImageDraw.Draw(image)
        draw.rectangle((0, 0, WIDTH, 24), fill="white")
        draw.rectangle((0, 24, WIDTH, 27), fill=film.colour(t))
        draw.text((8, 4), film.caption(t), fill="black", font=ImageFont.load_default(15))
        yield np.asarray(image)


def toy_frames(film, steps, start, end):
    """The same for the toy: the position so far, and the point."""
    figure, agg = canvas(4.8, 3.6, 100)
    ax = figure.add_subplot()
    x = [state[0] for state in film.states]
    for t in steps:
        ax.clear()
        draw_timeline(ax, film, start, t + 1)
        ax.plot(t + 1, x[t + 1], "o", color=film.colour(t), ms=9, clip_on=False)
        ax.set(xlim=(start, end), ylim=(min(x) - 0.05, max(x) + 0.05))
        ax.set_title(film.caption(t), fontsize=9, pad=18)
        agg.draw()
        yield np.asarray(agg.buffer_rgba())[..., :3].copy()


def video(film, path, start, end, every):
    """A GIF or MP4 of steps [start, end), in real time up to 20 frames per second."""
    steps = range(start, end, every or (1 if is_toy(film) else 2))
    frames = toy_frames(film, steps, start, end) if is_toy(film) else env_frames(film, steps)
    dt = getattr(film.unwrapped, "dt", 1 / film.metadata.get("render_fps", 10))
    seconds = max(dt * steps.step, 0.05)
    if path.suffix == ".mp4":
        import imageio
        with imageio.get_writer(path, fps=1 / seconds, macro_block_size=2) as writer:
            for frame in frames:
                writer.append_data(frame)
    else:
        from PIL import Image
        images = [Image.fromarray(frame).quantize(64, dither=Image.Dither.NONE) for frame in frames]
        images[0].save(path, save_all=True, append_images=images[1:], loop=0,
                       duration=round(1000 * seconds))
