"""refit.py: a run's real steps, fitted again."""

import pytest
import torch

import m3po
import refit
from rollouts import EnvBuffer
from tests.conftest import parse, run


def test_the_model_sees_what_the_run_saw_but_every_fifth_episode(tmp_path, monkeypatch):
    folder = run(tmp_path / "a", "--E", 600, "--warmup", 300, "--fit-every", 100, "--G", 0)
    args, env, _ = parse("--out", tmp_path / "unused", "--L", 2, "--warmup", 300, "--fit-every",
                         100, "--model-updates", 0.1, "--width", 4)
    rows = refit.recorded(folder)["D_env"]
    seen = []
    fit = m3po.MetaModel.fit
    monkeypatch.setattr(m3po.MetaModel, "fit", lambda self, D: (seen.append(D.total),
                                                                fit(self, D))[1])
    found = refit.refit(rows, args, env)
    # Episodes of 100 steps; the fifth and the tenth are kept back.
    assert seen == [300, 400, 400, 500, 600, 700, 800, 800, 900, 1000]
    assert found["held-out episodes explained_reward"] < 1 and len(found) == 6


def test_the_command_says_one_line_and_refuses_what_is_no_run(tmp_path, capsys):
    folder = run(tmp_path / "a", "--E", 300, "--warmup", 100, "--fit-every", 100, "--G", 0)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    del state["flags"]["reward_scale"]  # as in a run that is older than this flag
    torch.save(state, folder / "checkpoint.pt")
    capsys.readouterr()
    refit.main([str(folder), "--passes", "1", "--", "--B", "2"])
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "held-out episodes explained_obs" in out
    with pytest.raises(SystemExit, match="refit.py: error: "):
        refit.main([str(tmp_path)])
    with pytest.raises(SystemExit, match="no two fits or"):
        refit.main([str(folder), "--rows", "150"])
    with pytest.raises(SystemExit) as stop:
        refit.main([str(folder), "--", "--angles", "9"])
    assert stop.value.code == 2 and "--angles: 9 is not in 0 to 0" in capsys.readouterr().err


def test_a_run_from_before_a_flag_goes_on_and_may_be_told_that_the_flag_is_off(tmp_path):
    folder = run(tmp_path / "a", "--env", "halfcheetah-fwd-bwd", "--angles", "--reset-every", 1000)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    del state["flags"]["angles"], state["flags"]["reset_every"]
    torch.save(state, folder / "checkpoint.pt")
    for given in ([], ["--angles"]):
        args, _, _ = m3po.parse_args(["--resume", str(folder), *given])
        assert (args.angles, args.reset_every) == ([], None)


def test_a_pass_is_as_many_steps_as_go_through_all_rows_once(monkeypatch):
    torch.manual_seed(0)
    D_env = EnvBuffer(600, 1, 1, 2)
    for row in range(600):
        D_env.add([0.0], torch.rand(1), 1.0, torch.rand(1), False, row % 50 == 49)
    args, env, _ = parse("--warmup", 200, "--fit-every", 200, "--model-batch", 32, "--width", 4)
    steps = []
    fit = m3po.MetaModel.fit
    monkeypatch.setattr(m3po.MetaModel, "fit", lambda self, D: (
        steps.append((fit(self, D)["gradient_steps"], len(D.rows(holdout=False)))),
        {"fresh_nll": 0.0, "fresh_explained_reward": 0.0,
         "fresh_explained_obs": 0.0})[1])
    refit.refit(D_env.state_dict(), args, env, passes=2)
    assert len(steps) == 3
    for done, train in steps:
        assert done == pytest.approx(2 * train / 32, abs=1)
