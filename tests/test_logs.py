"""What a run writes down about itself."""

import sys

import m3po
from tests.conftest import read_rows, run


def test_without_git_the_commit_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert m3po.versions()["commit"] == "unknown"


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
    assert m3po.tensorboard(tmp_path, 0) is None


def test_a_model_that_was_never_fitted_has_no_errors_in_the_log(tmp_path):
    row = read_rows(run(tmp_path / "a", "--beta", 0, "--diagnose-every", 1))[-1]
    assert row["kl_pi"] and not any(
        row[name] for name in row if "depth" in name or "model_" in name)
