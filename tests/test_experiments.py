"""experiments.py: a table of variants, each trained with several seeds."""

import fcntl
import json
import os
import shutil
import signal
import sys
import threading
import time

import numpy as np
import pytest

import experiments
import envs
import figures
import m3po
from flags import differences
from logs import Log
from tests.conftest import (TINY, assert_refused, assert_same_run, error_line, fake_run, read_rows,
                            run)


@pytest.mark.parametrize("label", experiments.ROWS)
def test_a_row_of_the_ablations_is_the_variant_that_figures_name(label):
    args = vars(m3po.parse_args(experiments.ROWS[label][0].split())[0])
    named = figures.variant(differences(args))
    assert named.replace(" ", "").startswith(label.replace(" ", ""))
    assert (named == "M3PO") == (label == "M3PO")


def test_who_repeats_the_way_that_paid_last_gets_the_closed_form():
    env, returns = envs.make("point-fwd-bwd"), []
    assert "100 if told the task" in experiments.closed_form(env) and (
        "= 95.04" in experiments.closed_form(env))
    assert experiments.closed_form(envs.make("ant-fwd-bwd")) == ""
    for seed in range(400):
        way, paid, done = 1.0, [], False
        env.reset(seed=seed)
        while not done:
            _, reward, _, done, _ = env.step(np.array([way], np.float32))
            way = way if reward > 0 else -way
            paid.append(reward)
        returns.append(sum(paid))
    assert np.mean(returns) == pytest.approx(95.04, abs=4 * np.std(returns) / 20)


def test_ablations_skip_what_is_finished_go_on_with_what_is_not_and_outlive_a_failure(
        tmp_path, monkeypatch, capsys):
    out, results = tmp_path / "out", tmp_path / "results"
    run(out / "m3po/seed0")
    with monkeypatch.context() as patch:  # stopped between the first epoch and the second
        patch.setattr(Log, "finish_epoch", lambda log, *rest, first=Log.finish_epoch:
                      first(log, *rest) if log.progress.step == 40 else sys.exit("stopped"))
        with pytest.raises(SystemExit):
            run(out / "blind/seed0", "--L", 0)
    (out / "k2").mkdir()
    (out / "k2/seed0").touch()  # where a folder should be
    before = (out / "m3po/seed0/checkpoint.pt").stat().st_mtime_ns
    flags = ["--only", "m3po", "k2", "blind", "--seeds", "0", "--out", str(out),
             "--results", str(results), "--", *TINY]
    assert experiments.main(flags) == 1
    said = capsys.readouterr().out
    assert "3 runs, 1 of them finished before" in said
    assert said.splitlines()[-1].startswith("failed") and "k2/seed0.log" in said.splitlines()[-1]
    assert "exists" in (out / "k2/seed0.log").read_text()
    assert (out / "m3po/seed0/checkpoint.pt").stat().st_mtime_ns == before
    assert_same_run(out / "blind/seed0", run(tmp_path / "never_stopped", "--L", 0))
    table = (out / "table.md").read_text()
    assert table in said and "95.04" in table and "first 12 after a switch" in table
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert [row.split(":")[0] for row in rows] == ["| M3PO", "| k=2", "| blind"]
    returns = [float(row["eval_return_mean"]) for row in read_rows(out / "m3po/seed0")]
    way = float(read_rows(out / "m3po/seed0")[-1]["eval_right_way"])
    assert f"| {returns[-1]:.1f} | {np.mean(returns):.1f} | {way:.2f} |" in rows[0]
    assert rows[1].endswith("| `--k 2` | - | - | - | - / - | - | - |")

    assert sorted(str(path.relative_to(results)) for path in results.rglob("*.*")) == sorted(
        f"{slug}/seed0/{name}" for slug in ("m3po", "blind")
        for name in ("config.json", "progress.csv"))
    for slug in ("m3po", "blind"):
        config = (results / slug / "seed0/config.json").read_text()
        assert str(tmp_path) not in config and json.loads(config)["flags"]["out"] == f"{slug}/seed0"
        log = (out / slug / "seed0/progress.csv").read_bytes()
        assert (results / slug / "seed0/progress.csv").read_bytes() == log

    with pytest.raises(ValueError, match="was trained with G 2, not 3; use another --results"):
        experiments.main([*flags, "--G", "3"])
    other = [*flags[:-len(TINY) - 2], str(tmp_path / "other"), *flags[-len(TINY) - 1:]]
    with pytest.raises(ValueError, match="was trained with G 2, not 3; use another --out"):
        experiments.main([*other, "--G", "3"])
    capsys.readouterr()
    with open(out / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "still go on" in error_line(capsys, ablations, *flags)


def test_what_the_results_hold_is_finished_on_any_machine(tmp_path, monkeypatch, capsys):
    """From git alone: no run folder, no agent, and other columns than today's."""
    here, there = tmp_path / "results/m3po", fake_run(tmp_path / "fake", (1, 3), steps=(1500, 3000))
    shutil.copytree(there, here / "seed0")
    flags = ["--only", "m3po", "--seeds", "0", "--out", str(tmp_path / "out"), "--results",
             str(tmp_path / "results")]
    monkeypatch.setattr(ablations, "start", lambda *_: pytest.fail("it was finished"))
    assert experiments.main(flags) == 0
    said = capsys.readouterr().out
    assert "1 runs, 1 of them finished before" in said
    assert "| 3.0 | 2.0 | - | - / - | - | 0 |" in said
    figures.main(["curves", str(here / "seed0"), "--out", str(tmp_path / "c.png")])

    rows = (here / "seed0/progress.csv").read_text().splitlines()
    (here / "seed0/progress.csv").write_text("\n".join(rows[:-1]) + "\n")
    with pytest.raises(pytest.fail.Exception):  # half a run is none
        experiments.main(flags)


def test_where_there_is_no_fcntl_nobody_is_kept_out(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments.importlib.util, "find_spec", lambda name: None)
    with open(tmp_path / "lock", "w") as mine, open(tmp_path / "lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert experiments.locked(mine)


def test_stopping_the_ablations_sends_each_run_one_signal_and_waits_until_it_has_saved(tmp_path):
    code = ("import pathlib, signal, sys, time\n"
            "def save(*_): "
            "time.sleep(0.3); pathlib.Path(sys.argv[1], 'saved').touch(); sys.exit(130)\n"
            "signal.signal(signal.SIGINT, save)\n"
            "pathlib.Path(sys.argv[1], 'running').touch(); time.sleep(60)\n")
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    todo = {folder: [sys.executable, "-c", code, str(folder)] for folder in folders}

    def stop():
        while not all((folder / "running").exists() for folder in folders[:2]):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with open(tmp_path / "lock", "w") as lock, pytest.raises(KeyboardInterrupt):
            threading.Thread(target=stop, daemon=True).start()
            experiments.run_all(todo, 2, lock, {})
    finally:
        signal.signal(signal.SIGINT, before)
    assert [(folder / "saved").exists() for folder in folders] == [True, True, False]


@pytest.mark.parametrize("flags, says", [
    (["--only", "nope"], "recurrent-sac"), (["--jobs", "0"], "[1, inf)"),
    (["--seeds", "-1"], "--seeds"),
    (["--N", "2"], "--N"), (["--", "--seed=3"], "--seed=3"), (["--env", "nope"], "humanoid-direc"),
    (["--", "--bogus"], "--bogus"), (["--", "--beta", "0.5"], "--beta"),
    (["--", "--eval-episodes", "0"], "last epoch"),
])
def test_bad_input_to_the_ablations_is_one_line_and_nothing_is_created(
        flags, says, tmp_path, monkeypatch, capsys):
    assert_refused(experiments.main, flags, says, tmp_path, monkeypatch, capsys)
