"""experiments.py: a grid of runs that goes on wherever it was stopped."""

import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import envs
import experiments
import figures
import logs
import m3po
import tables
from tests.conftest import TINY, assert_refused, assert_same_run, fake_run, read_rows, run

ROOT = Path(__file__).parents[1]


def wanted(*argv):
    """(args, runs, envs, what was left out) of a command line."""
    return experiments.read_grid([str(word) for word in argv])


def test_the_grid_has_seeds_outermost_and_methods_innermost_and_nothing_twice():
    _, runs, made, _ = wanted("--envs", "point-fwd-bwd", "ant-fwd-bwd", "--methods", "pearl", "k5",
                              "pearl", "--seeds", 3, 0, 3, "--out", "o", "--results", "r")
    assert [str(run) for run in runs] == [
        f"{env}/{method}/seed{seed}" for seed in (3, 0) for env in ("point-fwd-bwd", "ant-fwd-bwd")
        for method in ("pearl", "k5")]
    assert list(made) == ["point-fwd-bwd", "ant-fwd-bwd"]
    assert [runs[1].folder, runs[1].result] == [Path(place, "point-fwd-bwd/k5/seed3")
                                                for place in "or"]
    assert [run.wanted["k"] for run in runs[1::2]] == [5] * 4 and runs[2].wanted["N"] == 200
    tagged = wanted("--methods", "k2", "--seeds", 3, "--tag", "wide", "--", "--width", 99)[1]
    assert str(tagged[0].result) == "results/point-fwd-bwd/k2-wide/seed3"
    with_defaults = wanted()[1]
    assert len(with_defaults) == 65 and with_defaults[-1].method.label == "oracle"


def test_a_method_whose_flags_are_an_envs_defaults_is_not_trained_twice(capsys):
    _, runs, _, left_out = wanted("--envs", "point-fwd-bwd", "ant-fwd-bwd", "--methods", "m3po",
                                  "k1", "k2", "--seeds", 0, 1)
    assert [str(run) for run in runs[:4]] == [
        f"{name}/seed0" for name in ("point-fwd-bwd/m3po", "point-fwd-bwd/k2", "ant-fwd-bwd/m3po",
                                     "ant-fwd-bwd/k1")]
    assert left_out == ["Left out: k=1 in point-fwd-bwd, where it is M3PO itself.",
                        "Left out: k=2 in ant-fwd-bwd, where it is M3PO itself."]
    with pytest.raises(SystemExit):
        wanted("--envs", "ant-fwd-bwd", "--methods", "k2")
    assert capsys.readouterr().err.endswith("error: Left out: k=2 in ant-fwd-bwd, where it is M3PO "
                                            "itself.\n")


def test_a_flag_that_a_method_does_not_have_is_left_out_there_and_that_is_said():
    _, runs, _, left_out = wanted(
        "--methods", "m3po", "pearl", "l2a", "recurrent-sac", "--seeds", 0, "--", "--N", 4, "--M=9",
        "--kl-weight", .5, "--target-entropy", "-3", "--beta", .5, "--no-layer-norm")
    assert left_out == ["Left out: --M=9 for pearl and l2a.", "Left out: --kl-weight 0.5 for m3po "
                        "and l2a.", "Left out: --target-entropy -3 for l2a.",
                        "Left out: --beta 0.5 for pearl and l2a.",
                        "Left out: --no-layer-norm for l2a.",
                        "Left out: --beta 0.5 for recurrent SAC, which has --beta 0."]
    own, pearl, l2a, sac = (run.wanted for run in runs)
    assert [flags["N"] for flags in (own, pearl, l2a, sac)] == [4] * 4
    assert own["M"] == 9 and own["target_entropy"] == -3 and pearl["target_entropy"] == -3
    assert pearl["kl_weight"] == .5 and "kl_weight" not in own and "M" not in pearl
    assert own["beta"] == .5 and sac["beta"] == 0  # a method's own flags win


def test_experiments_skip_what_is_finished_go_on_with_what_is_not_and_outlive_a_failure(
        tmp_path, monkeypatch, capsys):
    out, results = tmp_path / "out/point-fwd-bwd", tmp_path / "results/point-fwd-bwd"
    monkeypatch.setattr(tables, "CURVE", 2)  # TINY's evaluations
    run(out / "m3po/seed0")
    with monkeypatch.context() as patch:  # stopped between the first epoch and the second
        patch.setattr(logs.Log, "finish_epoch", lambda log, *rest, first=logs.Log.finish_epoch:
                      first(log, *rest) if log.progress.step == 40 else sys.exit("stopped"))
        with pytest.raises(SystemExit):
            run(out / "blind/seed0", "--L", 0)
    (out / "k2").mkdir()
    (out / "k2/seed0").touch()  # where a folder should be
    before = (out / "m3po/seed0/checkpoint.pt").stat().st_mtime_ns
    flags = ["--methods", "m3po", "k2", "blind", "--seeds", "0", "--out", str(tmp_path / "out"),
             "--results", str(tmp_path / "results"), "--", *TINY]
    assert experiments.main(flags) == 1
    said = capsys.readouterr().out
    assert "3 runs: 0 done, 0 running elsewhere, 2 begun, 1 not" in said
    assert "/m3po/seed0: return" in said and "2 of 3 done" in said
    assert said.splitlines()[-1].startswith("failed") and "k2/seed0.log" in said.splitlines()[-1]
    assert "exists" in (out / "k2/seed0.log").read_text()
    assert (out / "m3po/seed0/checkpoint.pt").stat().st_mtime_ns == before
    assert_same_run(out / "blind/seed0", run(tmp_path / "never_stopped", "--L", 0))
    table = (tmp_path / "out/table.md").read_text()
    assert table in said and "95.04" in table and "early: 12" in table
    rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert [row.split(":")[0].split(" |")[0] for row in rows] == [
        "| M3PO", "| k=2", "| blind", "| zero action", "| random actions"]
    returns = [float(row["eval_return_mean"]) for row in read_rows(out / "m3po/seed0")]
    way = float(read_rows(out / "m3po/seed0")[-1]["eval_right_way"])
    assert f"| {returns[-1]:.1f} | {returns[-1]:.1f} | {np.mean(returns):.1f} | " in rows[0]
    assert rows[0].split(" | ")[6] == f"{way:.2f}"
    assert rows[1].endswith("| `--k 2` | - | - | - | - | - | - / - | - | - |")

    assert sorted(str(path.relative_to(results)) for path in results.rglob("*.*")) == sorted(
        f"{slug}/seed0/{name}" for slug in ("m3po", "blind")
        for name in ("config.json", "progress.csv", "switches.csv"))
    for slug in ("m3po", "blind"):
        config = (results / slug / "seed0/config.json").read_text()
        assert str(tmp_path) not in config
        assert json.loads(config)["flags"]["out"] == f"point-fwd-bwd/{slug}/seed0"
        log = (out / slug / "seed0/progress.csv").read_bytes()
        assert (results / slug / "seed0/progress.csv").read_bytes() == log

    with pytest.raises(ValueError, match="was trained with G 2, not 3; use another --results"):
        experiments.main([*flags, "--G", "3"])
    other = [*flags[:-len(TINY) - 2], str(tmp_path / "other"), *flags[-len(TINY) - 1:]]
    with pytest.raises(ValueError, match="was trained with G 2, not 3; use another --out"):
        experiments.main([*other, "--G", "3"])
    capsys.readouterr()
    monkeypatch.setattr(experiments, "start", lambda *_: pytest.fail("nothing is to do"))
    with open(out / "k2/seed0.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert experiments.main(flags) == 0
        assert "3 runs: 2 done, 1 running elsewhere, 0 begun, 0 not" in capsys.readouterr().out
        k2 = ["--methods", "k2", *flags[4:]]
        with pytest.raises(experiments.Refused, match="k2/seed0 is in another process's hands"):
            experiments.main(k2)


def test_what_the_results_hold_is_finished_on_any_machine(tmp_path, monkeypatch, capsys):
    """From git alone: no run folder, no agent, and other columns than today's."""
    here = tmp_path / "results/point-fwd-bwd/m3po"
    shutil.copytree(fake_run(tmp_path / "fake", (1, 3), steps=(1500, 3000)), here / "seed0")
    flags = ["--methods", "m3po", "k5", "--seeds", "0", "--out", str(tmp_path / "out"), "--results",
             str(tmp_path / "results")]
    for name in ("start", "train"):
        monkeypatch.setattr(experiments, name, lambda *_: pytest.fail("it was finished"))
    assert experiments.main([*flags[:2], *flags[3:]]) == 0
    said = capsys.readouterr().out
    assert "1 runs: 1 done" in said and "note: 1 of those done are of another commit" in said
    config = json.loads((here / "seed0/config.json").read_text())
    (here / "seed0/config.json").write_text(json.dumps(config | {"versions": logs.versions()}))
    assert experiments.main([*flags[:2], *flags[3:]]) == 0
    assert "note:" not in capsys.readouterr().out
    assert experiments.main([*flags, "--table"]) == 0
    said = capsys.readouterr().out
    assert "| 3.0 | 2.0 | 3.0 | - | - / - | - | 0 |" in said and "| `--k 5` | - | - " in said
    assert not (tmp_path / "out").exists()
    figures.main(["curves", str(here / "seed0"), "--out", str(tmp_path / "c.png")])

    rows = (here / "seed0/progress.csv").read_text().splitlines()
    (here / "seed0/progress.csv").write_text("\n".join(rows[:-1]) + "\n")
    with pytest.raises(pytest.fail.Exception):  # half a run is none
        experiments.main(flags)


def test_a_flag_that_did_not_exist_when_a_result_was_made_was_off(tmp_path):
    folder = fake_run(tmp_path / "old", (1, 3), steps=(1500, 3000))
    config = json.loads((folder / "config.json").read_text())
    for name in ("newest_token", "threads", "method", "reward_scale"):
        del config["flags"][name]
    (folder / "config.json").write_text(json.dumps(config))
    flags = ["--methods", "m3po", "--seeds", 0, "--results", tmp_path / "results"]
    shutil.copytree(folder, tmp_path / "results/point-fwd-bwd/m3po/seed0")
    assert experiments.is_kept(wanted(*flags, "--", "--no-newest-token")[1][0])
    with pytest.raises(experiments.Refused, match="with newest_token False, not True"):
        experiments.is_kept(wanted(*flags, "--", "--newest-token")[1][0])
    with pytest.raises(experiments.Refused, match="with reward_scale 1.0, not 0.1"):
        experiments.is_kept(wanted(*flags, "--", "--no-newest-token", "--reward-scale", .1)[1][0])
    shutil.copytree(folder, tmp_path / "results/point-fwd-bwd/pearl/seed0")
    with pytest.raises(experiments.Refused, match="not"):
        experiments.is_kept(wanted("--methods", "pearl", *flags[2:])[1][0])


def test_what_recurrent_sac_does_not_use_may_have_been_different(tmp_path):
    folder = tmp_path / "results/point-fwd-bwd/recurrent-sac/seed0"
    folder.parent.mkdir(parents=True)
    fake_run(folder, (1, 3), steps=(1500, 3000), beta=0.0, model_lr=9.0, B=1)
    flags = ["--methods", "recurrent-sac", "--seeds", 0, "--results", tmp_path / "results", "--"]
    assert experiments.is_kept(wanted(*flags)[1][0])
    with pytest.raises(experiments.Refused, match="with lr 0.0005, not 0.1"):
        experiments.is_kept(wanted(*flags, "--lr", .1)[1][0])
    m3po_flags = vars(m3po.parse_args([])[0])
    with pytest.raises(experiments.Refused, match="with model_lr 0.001, not 3"):
        experiments.refuse_others("f", m3po_flags, m3po_flags | {"model_lr": 3}, "--out")


def test_how_often_a_finished_run_was_evaluated_makes_it_no_other(tmp_path):
    folder = tmp_path / "results/point-fwd-bwd/m3po/seed0"
    folder.parent.mkdir(parents=True)
    fake_run(folder, (1, 3), steps=(1500, 3000), eval_every=3, diagnose_every=0)
    flags = ["--methods", "m3po", "--seeds", 0, "--results", tmp_path / "results"]
    assert experiments.is_kept(wanted(*flags)[1][0])
    with pytest.raises(experiments.Refused, match="with eval_episodes 50, not 9"):
        experiments.is_kept(wanted(*flags, "--", "--eval-episodes", 9)[1][0])


def test_a_finished_run_without_an_evaluation_at_its_end_is_refused(tmp_path):
    folder = tmp_path / "results/point-fwd-bwd/m3po/seed0"
    folder.parent.mkdir(parents=True)
    fake_run(folder, (1, math.nan), steps=(1500, 3000), eval_every=4)
    with pytest.raises(experiments.Refused, match="was not evaluated at its end"):
        experiments.is_kept(wanted("--methods", "m3po", "--seeds", 0, "--results",
                                   tmp_path / "results")[1][0])


def test_a_run_that_stopped_in_its_first_epoch_goes_on_with_its_own_flags_alone(tmp_path):
    flags = ["--methods", "m3po", "--seeds", 0, "--out", tmp_path, "--results", tmp_path / "r"]
    begun = wanted(*flags)[1][0]
    begun.folder.parent.mkdir(parents=True)
    fake_run(begun.folder, G=20)
    (begun.folder / "progress.csv").unlink()
    assert experiments.epochs_done(begun) == 0  # killed before its first checkpoint
    (begun.folder / "checkpoint.pt").touch()
    assert experiments.epochs_done(wanted(*flags, "--", "--G", 20)[1][0]) == 0
    with pytest.raises(experiments.Refused, match="with G 20, not 4; use another --out"):
        experiments.epochs_done(begun)


def test_what_another_runner_has_taken_meanwhile_is_left_to_it(tmp_path, monkeypatch, capsys):
    args, runs, _, _ = wanted("--methods", "m3po", "--seeds", 0, 1, 2, "--out", tmp_path,
                              "--results", tmp_path / "r")
    started = []
    monkeypatch.setattr(experiments, "start", lambda run, args: started.append(run.seed)
                        or subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]))
    runs[0].folder.parent.mkdir(parents=True)
    runs[1].result.parent.mkdir(parents=True)
    fake_run(runs[1].result, (1, 3), seed=1, steps=(1500, 3000))
    with open(f"{runs[0].folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        failed = experiments.run_all(runs, runs, args)
    assert started == [2] and list(failed) == ["point-fwd-bwd/m3po/seed2"]
    assert capsys.readouterr().out.count("another process has taken it") == 2


def test_an_agent_without_its_checkpoint_is_not_thrown_away(tmp_path):
    begun = wanted("--methods", "m3po", "--seeds", 0, "--out", tmp_path)[1][0]
    begun.folder.mkdir(parents=True)
    (begun.folder / "agent.pt").touch()
    with pytest.raises(experiments.Refused, match="agent.pt but no checkpoint.pt"):
        experiments.train(begun)
    assert (begun.folder / "agent.pt").exists()


def test_the_time_left_is_that_of_the_same_method_and_less_what_is_done(tmp_path):
    _, runs, _, _ = wanted("--methods", "m3po", "k2", "l2a", "--seeds", 0, 1, "--envs",
                           "point-fwd-bwd", "ant-fwd-bwd", "--results", tmp_path, "--out", tmp_path)
    by_name = {str(run): run for run in runs}

    def took(name, minutes):
        run = by_name[name]
        run.result.parent.mkdir(parents=True, exist_ok=True)
        fake_run(run.result, (1, 3))  # 30 s an epoch
        text = (run.result / "progress.csv").read_text().replace("30.0", str(30 * minutes))
        (run.result / "progress.csv").write_text(text)
        return run

    left = lambda todo, kept, jobs=1: experiments.time_left([by_name[name] for name in todo], kept,
                                                            jobs)
    kept = [took("point-fwd-bwd/m3po/seed0", 10), took("ant-fwd-bwd/m3po/seed0", 50)]
    assert left(["point-fwd-bwd/m3po/seed1"], []).startswith("how long")
    assert left([], kept) == "nothing left"
    assert left(["point-fwd-bwd/m3po/seed1"], kept) == "about 10 min left with 1 at a time"
    assert left(["ant-fwd-bwd/m3po/seed1"], kept, 2) == "about 25 min left with 2 at a time"
    assert left(["point-fwd-bwd/l2a/seed0", "point-fwd-bwd/m3po/seed1"], kept) == (
        "about 40 min left with 1 at a time (no run of L2A has ended: taken as the others)")
    kept.append(took("point-fwd-bwd/l2a/seed0", 200))  # another env's run of L2A tells more
    assert left(["ant-fwd-bwd/l2a/seed0"], kept) == "about 3.3 h left with 1 at a time"

    begun = by_name["point-fwd-bwd/m3po/seed1"]  # 3 of 15 epochs
    fake_run(begun.folder, (1, 2, 3), seed=1)
    (begun.folder / "checkpoint.pt").touch()
    assert left([str(begun)], kept) == "about 8 min left with 1 at a time"


def test_each_printed_command_does_its_run_alone_wherever_it_is_started(
        tmp_path, monkeypatch, capsys):
    grid = ["--methods", "blind", "pearl", "--seeds", "0", "--out", str(tmp_path / "an out"),
            "--results", str(tmp_path / "results"), "--tag", "small"]
    assert experiments.main([*grid, "--print", "--", *TINY]) == 0
    said = capsys.readouterr()
    blind, pearl = said.out.splitlines()
    assert "Left out" in said.err and "--retain" in blind and "--retain" not in pearl
    assert not (tmp_path / "an out").exists()
    done = subprocess.run(["bash", "-c", pearl], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept = tmp_path / "results/point-fwd-bwd/pearl-small/seed0"
    assert f"kept         {kept}" in done.stdout and len(read_rows(kept)) == 2
    assert experiments.main([*grid, "--print", "--", *TINY]) == 0
    assert capsys.readouterr().out == f"{blind}\n"
    assert experiments.main([*grid, "--dry-run", "--", *TINY]) == 0
    states = capsys.readouterr().out.splitlines()[-3:]
    assert states[0].startswith("2 runs: 1 done")
    assert states[1].startswith("done         point-fwd-bwd/pearl-small/seed0: return ")
    assert states[2] == "to do        point-fwd-bwd/blind-small/seed0: 0 of 2 epochs"


def test_a_run_that_was_stopped_ends_the_single_command_with_the_signals_status(
        tmp_path, monkeypatch, capsys):
    flags = ["--methods", "m3po", "--seeds", "0", "--out", str(tmp_path / "out"), "--results",
             str(tmp_path / "results"), "--", *TINY]
    with monkeypatch.context() as patch:
        patch.setattr(logs.Log, "finish_epoch", lambda log, *rest, first=logs.Log.finish_epoch:
                      (first(log, *rest), os.kill(os.getpid(), signal.SIGTERM)))
        with pytest.raises(SystemExit) as stop:
            experiments.main(flags)
    assert stop.value.code == 143 and not (tmp_path / "results").exists()
    assert experiments.main(flags) == 0
    folder = "point-fwd-bwd/m3po/seed0"
    assert_same_run(tmp_path / "out" / folder, run(tmp_path / "never_stopped"))
    assert (tmp_path / "results" / folder / "config.json").exists()


@pytest.mark.skipif(not shutil.which("git"), reason="it needs git")
@pytest.mark.parametrize("patch", sorted((ROOT / "results" / "search").glob("*.patch")),
                         ids=lambda path: path.stem)
def test_the_patches_of_the_search_apply(patch, tmp_path):
    files = re.findall(r"^\+\+\+ b/(\S+)", patch.read_text(), re.M)
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    done = subprocess.run(["git", "apply", str(patch)], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert any((ROOT / name).read_text() != (tmp_path / name).read_text() for name in files)


def test_where_there_is_no_fcntl_nobody_is_kept_out(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments.importlib.util, "find_spec", lambda name: None)
    with open(tmp_path / "lock", "w") as mine, open(tmp_path / "lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert experiments.locked(mine)


def test_stopping_the_experiments_sends_each_run_one_signal_and_waits_until_it_has_saved(
        tmp_path, monkeypatch):
    code = ("import pathlib, signal, sys, time\n"
            "def save(*_): "
            "time.sleep(0.3); pathlib.Path(sys.argv[1], 'saved').touch(); sys.exit(130)\n"
            "signal.signal(signal.SIGINT, save)\n"
            "pathlib.Path(sys.argv[1], 'running').touch(); time.sleep(60)\n")
    args, runs, _, _ = wanted("--methods", "m3po", "--seeds", 0, 1, 2, "--out", tmp_path,
                              "--results", tmp_path / "r")
    folders = [run.folder for run in runs]
    for folder in folders:
        folder.mkdir(parents=True)
    monkeypatch.setattr(experiments, "command",
                        lambda run, args: [sys.executable, "-c", code, str(run.folder)])

    def stop():
        while not all((folder / "running").exists() for folder in folders[:2]):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            threading.Thread(target=stop, daemon=True).start()
            experiments.run_all(runs, runs, args)
    finally:
        signal.signal(signal.SIGINT, before)
    assert [(folder / "saved").exists() for folder in folders] == [True, True, False]


def test_where_no_run_can_be_sent_ctrl_c_stopping_still_waits_for_them(tmp_path, monkeypatch):
    class Child:  # as on Windows
        waited = False

        def send_signal(self, number):
            raise ValueError(f"Unsupported signal: {number}")

        def poll(self):
            raise KeyboardInterrupt  # from the console, to them as well

        def wait(self):
            self.waited = True

    child = Child()
    monkeypatch.setattr(experiments, "start", lambda run, args: child)
    args, runs, _, _ = wanted("--methods", "m3po", "--seeds", 0, "--out", tmp_path, "--results",
                              tmp_path / "r")
    with pytest.raises(KeyboardInterrupt):
        experiments.run_all(runs, runs, args)
    assert child.waited


@pytest.mark.parametrize("flags, says", [
    (["--methods", "nope"], "recurrent-sac"), (["--jobs", "0"], "[1, inf)"),
    (["--seeds", "-1"], "--seeds"), (["--table", "--print"], "not allowed"),
    (["--N", "2"], "--N"), (["--", "--seed=3"], "--seed=3"), (["--envs", "nope"], "humanoid-direc"),
    (["--", "--bogus"], "--bogus"), (["--", "--beta", "0.5"], "--beta"), (["--", "7"], "7"),
    (["--methods", "pearl", "l2a", "--", "--M", "9"], "--M 9: none of the methods"),
    (["--methods", "m3po", "pearl", "--", "--N", "0"], "--N"),
    (["--", "--eval-episodes", "0"], "leaves nothing for the table"),
])
def test_bad_input_to_the_experiments_is_one_line_and_nothing_is_created(
        flags, says, tmp_path, monkeypatch, capsys):
    assert_refused(experiments.main, flags, says, tmp_path, monkeypatch, capsys)
