"""What a run writes down about itself."""

import fcntl
import json
import os
import re
import struct
import subprocess
import sys
import termios

import pytest

import checkpoint
import logs
import m3po
from tests.conftest import TINY, read_rows, resume_run, run


def test_without_git_the_commit_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert logs.versions()["commit"] == "unknown"


def test_changes_since_the_commit_are_in_the_versions(monkeypatch):
    said = {"rev-parse": "c0ffee", "diff": ""}
    monkeypatch.setattr(logs, "git", lambda word, *rest: said[word])
    assert logs.versions()["commit"] == "c0ffee" and "changes" not in logs.versions()
    hashes = []
    for said["diff"] in ("-a", "-a+b"):
        hashes.append(logs.versions()["changes"])
    assert len(set(hashes)) == 2 and all(len(text) == 12 for text in hashes)


def test_a_resumed_run_tells_the_versions_it_began_with_and_those_it_met_later(
        tmp_path, monkeypatch):
    of_run = lambda: json.loads((tmp_path / "a/config.json").read_text())
    commits = iter(["one", "one", "two", "two", "one"])
    monkeypatch.setattr(logs, "versions", lambda: {"commit": next(commits)})
    monkeypatch.setattr(logs, "describe", lambda *_: "")
    run(tmp_path / "a")
    for n in (3, 4, 5, 6):
        assert ("later" in of_run()) == (n == 6 or n == 5)
        resume_run(tmp_path / "a", "--N", n)
    assert of_run()["versions"] == {"commit": "one"} and of_run()["later"] == [{"commit": "two"}]


def test_a_resumed_log_keeps_the_columns_it_began_with(tmp_path):
    path = tmp_path / "log.csv"
    logs.append_csv(path, ["a", "b"], [{"a": 1, "b": 2}])
    logs.append_csv(path, ["a", "new", "b"], [{"a": 3, "new": 9, "b": 4}])
    assert path.read_text().split() == ["a,b", "1,2", "3,4"]


def test_tensorboard_gets_every_number_where_it_is_installed(monkeypatch, tmp_path):
    written = {}

    class Writer:
        def __init__(self, folder, purge_step):
            assert purge_step == 1  # nothing was written before

        def add_scalar(self, name, value, step):
            written[name, step] = value

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type(sys)("tensorboard"))
    sys.modules["torch.utils.tensorboard"].SummaryWriter = Writer
    run(tmp_path / "a")
    assert ("losses/q_loss", 80) in written and ("charts/eval_return_mean", 40) in written
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert logs.tensorboard(tmp_path, 0) is None


def fake_wandb(monkeypatch, error=None):
    """A module wandb, and a list of what is called in it."""
    calls, module = [], type(sys)("wandb")

    class Run:
        def __getattr__(self, name):
            return lambda *args, **kwargs: calls.append((name, args, kwargs))

    def init(**kwargs):
        calls.append(("init", (), kwargs))
        if error:
            raise module.Error(error)
        return Run()

    module.init, module.Error = init, type("Error", (Exception,), {})
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_track_sends_every_row_to_weights_and_biases_and_a_resume_to_the_same_run(
        tmp_path, monkeypatch):
    calls = fake_wandb(monkeypatch)
    run(tmp_path / "a", "--track")
    resume_run(tmp_path / "a", "--N", 3)
    assert [name for name, *_ in calls] == ["init", "define_metric", "log", "log", "finish",
                                            "init", "define_metric", "log", "finish"]
    first, second = (kwargs for name, _, kwargs in calls if name == "init")
    assert first["id"] == second["id"] and first["resume"] == "allow"
    assert (first["dir"], first["name"]) == (tmp_path / "a", "a") and first["config"]["G"] == 2
    rows = [args[0] for name, args, _ in calls if name == "log"]
    assert [row["global_step"] for row in rows] == [40, 80, 120]
    assert rows[1]["losses/q_loss"] == float(read_rows(tmp_path / "a")[1]["q_loss"])
    assert "charts/eval_return_mean" in rows[0]
    resume_run(tmp_path / "a", "--N", 4, "--no-track")
    assert len(calls) == 9
    run(tmp_path / "b", "--track")
    assert calls[9][2]["id"] != first["id"]


def test_weights_and_biases_without_an_account_is_one_line(tmp_path, monkeypatch):
    fake_wandb(monkeypatch, "No API key\nconfigured.")
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "a", "--track")
    assert stop.value.code == ("m3po.py: error: --track: No API key configured. "
                               "(WANDB_MODE=offline needs no account)")


def test_a_model_that_was_never_fitted_has_no_errors_in_the_log(tmp_path):
    row = read_rows(run(tmp_path / "a", "--beta", 0, "--diagnose-every", 1))[-1]
    assert row["kl_pi"] and not any(
        row[name] for name in row if "depth" in name or "model_" in name)


def test_where_there_is_no_terminal_there_is_no_bar_and_each_epoch_is_a_line(tmp_path, capfd):
    run(tmp_path / "a", "--N", 3)
    out, err = capfd.readouterr()
    assert "\r" not in out + err and err == ""
    warm_up, *learning = [line for line in out.splitlines() if line.startswith("epoch")]
    assert "warm-up" in warm_up and "nan" not in warm_up and len(learning) == 2
    for line in learning:
        assert re.search(r"Q +-?[0-9.]+  alpha [0-9.]+  explained r -?[0-9.]+ o -?[0-9.]+", line)
        assert len(line) <= 105
    for word in ("legend", "alpha:", "explained:"):  # what these are
        assert word in out[:out.index("\nepoch")]


def test_without_an_evaluation_the_return_of_the_training_episodes_is_shown(tmp_path, capsys):
    run(tmp_path / "a", "--eval-episodes", 0, "--E", 100)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    rows = read_rows(tmp_path / "a")
    for line, row in zip(lines, rows, strict=True):
        assert f"training return {float(row['train_return_mean']):7.1f}" in line


def test_the_last_epoch_is_evaluated_however_seldom_the_others_are(tmp_path):
    out = run(tmp_path / "a", "--N", 3, "--eval-every", 2)
    assert [bool(row["eval_return_mean"]) for row in read_rows(out)] == [False, True, True]


def test_a_model_that_is_not_fitted_explains_nothing_on_the_screen(tmp_path, capsys):
    run(tmp_path / "a", "--beta", 0)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert "Q" in lines[-1] and "explained" not in lines[-1] and "nan" not in lines[-1]


def test_dropped_steps_are_said_once_per_epoch_with_their_reason(run_env, tmp_path, capsys):
    run(tmp_path / "a", *run_env(terminate_at=None, truncate_at=9, fail_at=4))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("faults")]
    training, evaluation = lines[::2], lines[1::2]
    assert len(training) == 2 and all("non-finite reward (10)" in line for line in training)
    assert len(evaluation) == 2 and all("in 2 of 2 episodes of this evaluation" in line
                                        for line in evaluation)


def test_a_terminal_has_a_bar_for_the_warm_up_and_then_one_for_learning(tmp_path):
    """In a pseudo-terminal. An ETA over both would be that of a loop which does not learn yet."""
    main, side = os.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("4H", 30, 100, 0, 0))  # rows, columns
    child = subprocess.Popen([sys.executable, m3po.__file__, *TINY, "--out", tmp_path / "a"],
                             stdout=side, stderr=side)
    os.close(side)
    seen = b""
    try:
        while more := os.read(main, 65536):
            seen += more
    except OSError:  # how Linux says that the other side is closed
        pass
    assert child.wait() == 0
    text = seen.decode()
    assert "warm-up:" in text and "learning:" in text
    assert "40/40" in text[text.rindex("warm-up:"):]  # of 80 env steps, 40 and 40
    assert text.index("warm-up:") < text.index("learning:") and "epoch   1" in text


def test_a_run_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(checkpoint.CheckpointError, match="file/a could not be written"):
        run(tmp_path / "file" / "a")


def test_an_epoch_without_a_fit_repeats_no_work_and_knows_nothing_fresh(tmp_path, capsys):
    rows = read_rows(run(tmp_path / "a", "--N", 5, "--E", 40, "--fit-every", 80,
                         "--model-updates", 0.25))
    assert [row["model_fits"] for row in rows] == ["", "1", "0", "1", "0"]
    assert [row["model_gradient_steps"] for row in rows] == ["", "10", "0", "20", "0"]
    assert [bool(row["model_fresh_nll"]) for row in rows] == [False, False, False, True, False]
    assert all(row["model_nll"] for row in rows[1:])
    assert "nan" not in capsys.readouterr().out


def test_after_the_warm_up_an_epoch_without_updates_is_no_warm_up(tmp_path, capsys):
    run(tmp_path / "a", "--G", 0, "--N", 2)
    epochs = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert ["warm-up" in line for line in epochs] == [True, False]
