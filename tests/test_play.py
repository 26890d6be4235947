"""play.py: to watch an agent."""

import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import glfw
import numpy as np
import pytest
from PIL import Image

import drawing
import envs
import evaluation
import figures
import m3po
import play
from tests.conftest import SeeLamp, error_line, read_image, train_few_steps


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
def test_a_line_per_switch_shows_what_it_cost(capsys):
    reward = np.ones((60, 2))
    reward[[20, 21]] = reward[40, 0] = -1
    switched = np.zeros((60, 2))
    switched[[20, 40], 0] = switched[20, 1] = 1
    episodes = {"reward": reward, "switched": switched, "right_way": (reward > 0).astype(float)}
    film = SimpleNamespace(words=lambda t: {20: "backwards", 40: "forwards"}[t])
    play.report_switches(episodes, film, 12)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "  step   20  ████████████|▁▁██████████  backwards, the wrong way for 2 env steps",
        "  step   40  ████████████|▁███████████  forwards, the wrong way for 1 env steps",
        "  all     3  ████████████|▁▃██████████"]  # (1 - 1 - 1) / 3 lies two sevenths up


def test_no_bar_lies_across_a_switch(capsys):
    reward = np.ones((120, 1))
    reward[60:70] = -1
    episodes = {"reward": reward, "switched": np.eye(120)[60][:, None],
                "right_way": np.full((120, 1), np.nan)}
    play.report_switches(episodes, SimpleNamespace(words=lambda t: "leg 2 dead"), 25)
    line = "████████████|▁▁▁▁▁███████"
    assert f"  step   60  {line}  leg 2 dead\n  all     1  {line}\n" in capsys.readouterr().out


def test_bars_leave_out_what_is_not_known_and_need_no_unicode(monkeypatch):
    values = np.array([0.0, np.nan, 7.0])
    assert play.bars(values, 0, 7, 2) == "▁ |█"
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert play.bars(values, 0, 7, 2) == "_ |@"


def test_the_moments_asked_for_are_when_the_task_switches_in_every_episode(
        trained_runs, tmp_path, capsys, monkeypatch):
    films = []
    monkeypatch.setattr(play, "strip", lambda film, *args: films.append(film))
    play.main([trained_runs["toy"], "--episodes", "3", "--switch-at", "20", "50",
               "--strip", str(tmp_path / "s.png")])
    printed = capsys.readouterr().out
    assert films[0].switches == [20, 50]
    assert "changes at 20, 50" in printed and "\n  all     6  " in printed
    assert "\n  step   20  " in printed and "\n  step   50  " in printed


class FakeStage:
    """A stage without OpenGL. After frame i its window does what script[i] says."""

    script = {}

    def __init__(self, film, viewer, width, height):
        self.viewer = SimpleNamespace(closed=False, paused=False, new_task=False, captions=[],
                                      render=self.render)

    def pose(self, t):
        pass

    def render(self):
        vars(self.viewer).update(self.script.get(len(self.viewer.captions), {}))
        self.viewer.captions.append(self.viewer.caption)

    def close(self):
        pass


@pytest.fixture
def fake_window(monkeypatch):
    monkeypatch.setattr(play, "Stage", FakeStage)
    monkeypatch.setattr(play, "has_display", lambda: True)
    monkeypatch.setattr(play.glfw, "init", lambda: True)
    monkeypatch.setattr(play.time, "sleep", lambda seconds: None)
    return lambda script: monkeypatch.setattr(FakeStage, "script", script)


def live_steps(live, n):
    return [live.step(np.zeros(live.action_space.shape, np.float32)) for _ in range(n)]


@pytest.mark.parametrize("name", ["halfcheetah-fwd-bwd", "ant-crippled-leg"])
def test_a_key_changes_the_task_and_from_then_on_nothing_else_does(fake_window, name):
    fake_window({4: {"new_task": True}, 20: {"new_task": True}})
    live = play.Live(envs.make(name, switch_every=7))
    live.reset(seed=0)
    live_steps(live, 40)
    kept = [s for s in live.switches if s > 5]
    assert kept == [6, 22]  # asked for while step 4 was shown: step 5 was under way to be chosen
    assert not np.array_equal(live.tasks[5], live.tasks[6])
    captions = live.stage.viewer.captions
    assert live.words(6) in captions[6] and "new 0 steps ago" in captions[6]
    live.reset(seed=1)
    live_steps(live, 40)
    assert live.switches == []


def test_space_pauses_and_a_closed_window_ends_the_episode(fake_window):
    fake_window({2: {"paused": True}, 5: {"paused": False}, 8: {"closed": True}})
    live = play.Live(envs.make("halfcheetah-fwd-bwd"))
    live.reset(seed=0)
    ends = [truncated for *_, truncated, _ in live_steps(live, 6)]
    assert [caption.split()[1] for caption in live.stage.viewer.captions] == list("012222345")
    assert ends == [False] * 5 + [True]


def test_one_episode_after_another_is_watched_until_the_window_is_closed(
        fake_window, trained_runs, capsys):
    fake_window({1_010: {"closed": True}})
    play.main([trained_runs["cheetah"], "--view", "--switch-at", "300"])
    printed = capsys.readouterr().out
    assert printed.count("episode ") == 2 and "episode   1 " in printed
    assert "length 1000" in printed and "length   11" in printed
    assert printed.count("\n  step  300  ") == 1


def bare_window():
    """A Window that no system has opened."""
    window = object.__new__(play.Window)
    window.window, window._overlays = None, {}
    return window


def test_keys_of_the_window(monkeypatch):
    closed = []
    monkeypatch.setattr(play.glfw, "set_window_should_close", lambda *args: closed.append(args))
    window = bare_window()
    press = lambda key, action=glfw.PRESS: window._key_callback("it", key, 0, action, 0)
    press(glfw.KEY_N, glfw.RELEASE), press(glfw.KEY_R), press(glfw.KEY_SPACE, glfw.RELEASE)
    assert not window.new_task and not window.paused
    press(glfw.KEY_N), press(glfw.KEY_SPACE)
    assert window.new_task and window.paused
    press(glfw.KEY_SPACE)
    assert not window.paused and closed == []
    press(glfw.KEY_ESCAPE)
    assert closed == [("it", True)]
    window.caption = "step 3   backwards"
    window._create_overlay()
    assert ["step 3   backwards\n", "\n"] in window._overlays.values()


@pytest.mark.skipif(not drawing.has_display() or not glfw.init(), reason="no display")
def test_a_real_window_shows_an_episode_and_takes_keys():
    live = play.Live(envs.make("halfcheetah-fwd-bwd"))
    live.reset(seed=0)
    live_steps(live, 3)
    window = live.stage.viewer
    window._key_callback(window.window, glfw.KEY_N, 0, glfw.PRESS, 0)
    live_steps(live, 3)
    assert live.switches == [4] and not window.closed
    window._key_callback(window.window, glfw.KEY_ESCAPE, 0, glfw.PRESS, 0)
    assert live_steps(live, 1)[0][3]
    live.stage.close()


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
    assert "no TaskClock" in error_line(capsys, play, folder, "--switch-at", "5")


def test_an_env_whose_task_never_switches_refuses_moments():
    args = play.build_parser().parse_args(["x", "--switch-at", "5"])
    with pytest.raises(play.PlayError, match="no TaskClock switches the task of M3PO/HalfCheetahP"):
        play.check(args, envs.make("halfcheetah-pier"))


@pytest.mark.parametrize("argv, says", [
    (["{gone}"], "does not exist"),
    (["{toy}", "--vid", "x.gif"], "unrecognized"),
    (["{toy}", "--episodes", "0"], "--episodes"),
    (["{toy}", "--video", "x.avi"], ".gif or .mp4"),
    (["{toy}", "--strip", "no/such/x.png"], "no folder"),
    (["{toy}", "--view"], "no window"),
    (["{toy}", "--strip", "x.png", "--window", "9", "3"], "--window"),
    (["{toy}", "--strip", "x.png", "--window", "200", "300"], "--window"),
    (["{toy}", "--window", "2", "3"], "--window"),
    (["{toy}", "--switch-at", "0"], "--switch-at"),
    (["{toy}", "--switch-at", "20", "100"], "an episode has 100 steps"),
    (["{toy}", "--export", "x.pt"], ".onnx"),
])
def test_play_refuses_in_one_line(trained_runs, capsys, tmp_path, argv, says):
    argv = [a.format(gone=tmp_path / "gone", **trained_runs) for a in argv]
    assert says in error_line(capsys, play, *argv)
    assert not Path("x.png").exists()


def test_an_error_of_an_own_envs_code_is_no_file_that_does_not_fit(trained_runs, monkeypatch):
    def load(folder):
        with envs.own_code("arm:Arm-v0", "making it"):
            raise KeyError("calibration")
    monkeypatch.setattr(m3po, "load", load)
    with pytest.raises(KeyError, match="calibration"):
        play.main([trained_runs["toy"]])


def test_a_missing_package_is_named_with_its_pip_command(
        trained_runs, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(play.importlib.util, "find_spec", lambda name: None)
    err = error_line(capsys, play, trained_runs["toy"], "--video", tmp_path / "v.mp4")
    assert "python -m pip install imageio-ffmpeg" in err
    err = error_line(capsys, play, trained_runs["toy"], "--strip", tmp_path / "s.png")
    assert "python -m pip install matplotlib" in err
    err = error_line(capsys, play, trained_runs["toy"], "--export", tmp_path / "p.onnx")
    assert "python -m pip install onnxscript" in err
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
