"""play.py: to watch an agent."""

import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from PIL import Image
from gymnasium.spaces import Box

import envs
import evaluation
import figures
import m3po
import play
from tests.conftest import error_line, read_image, train_few_steps


SIX = [name for name in envs.ENVS if name != "point-fwd-bwd"]


def test_play_evaluates_as_training_does_and_says_how_the_agent_fared(trained_runs, capsys):
    play.main([trained_runs["toy"], "--episodes", "4", "--seed", "5"])
    printed = capsys.readouterr().out
    policy, _, _, args = m3po.load(trained_runs["toy"])
    test = evaluation.Group([m3po.make_env(args) for _ in range(4)])
    found = evaluation.evaluate(policy, test, envs.seeds(5, 2, 0, 4), args.L)
    returns = np.nansum(found["reward"], 0)
    for i, value in enumerate(returns):
        assert f"episode {i:3d}  return {value:9.1f}  length  100" in printed
    assert f"return       {returns.mean():.1f} +- {returns.std():.1f} over 4 episodes" in printed
    assert "right way" in printed and "after a switch" in printed


def test_best_plays_best_pt(trained_runs, tmp_path, capsys):
    agent = Path(trained_runs["toy"]) / "agent.pt"
    (tmp_path / "best.pt").write_bytes(agent.read_bytes())
    argv = ["--episodes", "2", "--seed", "5"]
    play.main([trained_runs["toy"], *argv])
    last = capsys.readouterr().out
    play.main([str(tmp_path), "--best", *argv])
    assert capsys.readouterr().out == last
    assert "agent.pt does not exist" in error_line(capsys, play, tmp_path)
    (tmp_path / "best.pt").rename(tmp_path / "agent.pt")
    assert "best.pt does not exist" in error_line(capsys, play, tmp_path, "--best")


def test_the_toy_gets_a_strip_and_a_gif_with_a_frame_per_step(trained_runs, tmp_path):
    strip, gif = tmp_path / "s.png", tmp_path / "v.gif"
    play.main([trained_runs["toy"], "--episodes", "1", "--strip", str(strip)])
    read_image(strip, (1800, 360))
    play.main([trained_runs["toy"], "--episodes", "1", "--video", str(gif), "--window", "20", "28"])
    read_image(gif, (480, 360))
    assert Image.open(gif).n_frames == 8 and Image.open(gif).info["duration"] == 100


def test_a_robot_gets_a_strip_and_a_gif(trained_runs, needs_opengl, tmp_path):
    strip, gif = tmp_path / "s.png", tmp_path / "v.gif"
    play.main([trained_runs["cheetah"], "--episodes", "1", "--strip", str(strip),
               "--video", str(gif),
               "--window", "100", "112", "--every", "3"])
    read_image(strip, (1800, 540))
    read_image(gif, (480, 360))
    assert Image.open(gif).n_frames == 4
    assert Image.open(gif).info["duration"] == 150  # ms: 3 steps of 0.05 s


def film_of(name, steps=3):
    film = play.Film(envs.make(name))
    film.reset(seed=0)
    for _ in range(steps):
        film.step(np.zeros(film.action_space.shape, np.float32))
    return film


@pytest.mark.parametrize("name", [n for n in SIX if n.endswith(("fwd-bwd", "direc"))])
def test_the_robot_is_blue_forwards_and_red_backwards(needs_opengl, name):
    film = film_of(name)
    for direction, channel in ((1, 2), (-1, 0)):
        film.tasks[-1] = np.array([direction], np.float32)
        stage = play.Stage(film)
        pixels = stage.frame(2).astype(int)
        stage.close()
        assert (pixels[..., channel] > pixels[..., 2 - channel] + 80).sum() > 500
        assert (pixels[..., 2 - channel] > pixels[..., channel] + 80).sum() == 0


def test_the_dead_leg_is_red_and_it_is_the_leg_without_force():
    film = film_of("ant-crippled-leg")
    model = film.unwrapped.model
    for leg in range(4):
        film.tasks[0] = np.eye(4, dtype=np.float32)[leg]
        play.paint(model, film, 0)
        red = model.geom_rgba[:, 0] > 2 * model.geom_rgba[:, 1]
        moved = {model.joint(j).name for j in range(1, model.njnt)
                 if red[model.geom_bodyid == model.jnt_bodyid[j]].all()}
        assert red.sum() == 3 and moved == {f"hip_{leg + 1}", f"ankle_{leg + 1}"}


@pytest.mark.parametrize("name", SIX)
def test_colouring_does_not_change_the_trajectory(name):
    film, plain = film_of(name, 1), envs.make(name)
    plain.reset(seed=0)
    plain.step(np.zeros(plain.action_space.shape, np.float32))
    rng = np.random.default_rng(0)
    for t in range(40):
        film.tasks[t] = film.unwrapped.draw_task(rng)
        play.paint(film.unwrapped.model, film, t)  # the live model, though play.py paints a copy
        action = rng.uniform(-0.5, 0.5, plain.action_space.shape).astype(np.float32)
        (obs_a, *rest_a, _), (obs_b, *rest_b, _) = film.step(action), plain.step(action)
        assert np.array_equal(obs_a, obs_b) and rest_a == rest_b


def test_a_film_knows_the_switches_and_where_the_point_was():
    film = play.Film(envs.make("point-fwd-bwd"))
    film.reset(seed=29)
    infos = [film.step(np.ones(1, np.float32))[4] for _ in range(100)]
    assert film.switches == [t for t, info in enumerate(infos) if info["switched"]] == [52, 77]
    assert np.allclose(np.ravel(film.states), np.minimum(0.1 * np.arange(101), 1.0))  # to the wall
    assert film.colour(51) == play.BLUE and film.colour(52) == play.RED
    assert film.caption(54) == "step 54   backwards (new 2 steps ago)   reward so far 49"


class SeeLamp(gym.Env):
    """The lamp's brightness is how far the push agrees with the hidden sign, redrawn at step 8; 20
    steps. Renders itself; counts how often."""

    metadata = {"render_modes": ["rgb_array", "human"], "render_fps": 20}
    observation_space = Box(0.0, 1.0, (1,), np.float32)
    action_space = Box(0.0, 4.0, (1,), np.float32)
    shown = []

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.sign, self.light = 0, self.np_random.choice((-1, 1)), 0.5
        return np.full(1, self.light, np.float32), {"task": self.sign}

    def step(self, action):
        switched = self.t == 8
        self.sign *= -1 if switched else 1
        self.light = float(np.clip(0.5 + self.sign * (action[0] - 2) / 4, 0, 1))
        self.t += 1
        info = {"task": self.sign, "switched": switched}
        if self.render_mode == "human":
            self.shown.append(self.t)
        return np.full(1, self.light, np.float32), self.light, False, self.t == 20, info

    def render(self):
        self.shown.append(self.t)
        picture = np.zeros((60, 80, 3), np.uint8)
        picture[:, : 4 * self.t] = round(255 * self.light)
        return picture


gym.register("SeeLamp-v0", entry_point=SeeLamp, max_episode_steps=30)


def test_an_own_env_that_renders_gets_a_strip_a_gif_and_a_window(
        tmp_path, capsys, monkeypatch):
    folder = train_few_steps(tmp_path / "a", "--env", "SeeLamp-v0", "--N", "1", "--E", "40",
                       "--eval-episodes", "1", "--diagnose-every", "0")
    strip, gif = tmp_path / "s.png", tmp_path / "v.gif"
    SeeLamp.shown.clear()
    play.main([folder, "--episodes", "1", "--strip", str(strip)])
    read_image(strip, (1800, 540))
    assert SeeLamp.shown == [1, 3, 5, 7, 9, 11, 13, 15, 17, 20]  # its ten snapshots, nothing else
    play.main([folder, "--episodes", "1", "--video", str(gif), "--window", "4", "12"])
    read_image(gif, (480, 360))
    frames = Image.open(gif)
    assert frames.n_frames == 4 and frames.info["duration"] == 100  # ms: 2 steps at 20 per second
    SeeLamp.shown.clear()
    play.main([folder, "--episodes", "1", "--view"])
    assert SeeLamp.shown[-20:] == list(range(1, 21))
    capsys.readouterr()
    monkeypatch.setattr(SeeLamp, "metadata", {"render_modes": []})
    for option, mode in (("--view", "human"), ("--strip", "rgb_array")):
        argv = [folder, option] + [str(tmp_path / "no.png")] * (option == "--strip")
        assert f"does not render '{mode}'" in error_line(capsys, play, *argv)


def test_what_an_own_env_is_replayed_to_is_what_happened():
    film = play.Film(envs.make("SeeLamp-v0", oracle=True))
    film.reset(seed=3)
    rng, lights = np.random.default_rng(0), []
    for _ in range(20):
        film.step(rng.uniform(-1, 1, 1).astype(np.float32))
        lights.append(film.unwrapped.light)
    again = [env.unwrapped.light for _, env in play.replay(film, "rgb_array")]
    assert again == lights and np.allclose(np.ravel(film.states), [0, *np.cumsum(lights)])
    assert film.switches == [8] and film.words(8) == f"task {film.tasks[8]}"
    assert film.colour(8) == (play.BLUE if film.tasks[8] > 0 else play.RED) != film.colour(7)


@pytest.mark.parametrize("argv, says", [
    (["{gone}"], "does not exist"),
    (["{toy}", "--vid", "x.gif"], "unrecognized"),
    (["{toy}", "--episodes", "0"], "--episodes"),
    (["{toy}", "--video", "x.avi"], ".gif or .mp4"),
    (["{toy}", "--strip", "no/such/x.png"], "no folder"),
    (["{toy}", "--view"], "no window"),
    (["{toy}", "--strip", "x.png", "--window", "9", "3"], "--window"),
    (["{toy}", "--strip", "x.png", "--window", "200", "300"], "--window"),
])
def test_play_refuses_in_one_line(trained_runs, capsys, tmp_path, argv, says):
    argv = [a.format(gone=tmp_path / "gone", **trained_runs) for a in argv]
    assert says in error_line(capsys, play, *argv)
    assert not Path("x.png").exists()


def test_a_missing_package_is_named_with_its_pip_command(
        trained_runs, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(play.importlib.util, "find_spec", lambda name: None)
    err = error_line(capsys, play, trained_runs["toy"], "--video", tmp_path / "v.mp4")
    assert "python -m pip install imageio-ffmpeg" in err
    err = error_line(capsys, play, trained_runs["toy"], "--strip", tmp_path / "s.png")
    assert "python -m pip install matplotlib" in err
    err = error_line(capsys, figures, "curves", trained_runs["toy"], "--out", tmp_path / "c.png")
    assert "python -m pip install matplotlib" in err
    monkeypatch.setattr(play.importlib.util, "find_spec", lambda name: name != "scipy" or None)
    err = error_line(capsys, figures, "curves", trained_runs["toy"], "--out", tmp_path / "c.png")
    assert "python -m pip install scipy" in err


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="displays are Linux's matter")
def test_without_a_display_view_says_so(trained_runs, capsys, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert "no display" in error_line(capsys, play, trained_runs["cheetah"], "--view")


def test_without_opengl_one_line_says_what_to_install(trained_runs, tmp_path):
    argv = [trained_runs["cheetah"], "--strip", str(tmp_path / "s.png")]
    done = subprocess.run([sys.executable, play.__file__, *argv], text=True, capture_output=True,
                          env=os.environ | {"MUJOCO_GL": "broken"})
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "apt-get install libegl1" in done.stderr and "libosmesa6" in done.stderr
