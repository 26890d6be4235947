"""The command line of m3po.py: defaults, and what is refused."""

import pytest
import torch

import m3po
from tests.conftest import TINY, assert_refused, parse, run


def test_the_toy_alone_has_no_layer_norm():
    on = {env: m3po.parse_args(["--env", env])[0].layer_norm
          for env in ("point-fwd-bwd", "ant-fwd-bwd")}
    assert on == {"point-fwd-bwd": False, "ant-fwd-bwd": True}
    assert not m3po.parse_args(["--env", "ant-fwd-bwd", "--no-layer-norm"])[0].layer_norm


@pytest.mark.parametrize("flags, says", [
    (["--bogus"], "--bogus"), (["--epoch", "3"], "--epoch"), (["--k", "0"], "[1, inf)"),
    (["--k", "1.5"], "whole"), (["--gamma", "1"], "[0, 1)"), (["--gamma", "nan"], "[0, 1)"),
    (["--lr", "-1"], "(0, inf)"), (["--lr", "inf"], "(0, inf)"), (["--B", "0"], "[1, inf)"),
    (["--tau", "0"], "(0, 1]"), (["--alpha", "0"], "(0, inf)"), (["--warmup", "0"], "[1, inf)"),
    (["--warmup", "9999"], "--warmup"), (["--beta", "1.1"], "[0, 1]"), (["--hybrid", "3"], "A < B"),
    (["--hybrid"], "Table 3"), (["--hybrid", "1", "2", "--beta", "0.5"], "--beta"),
    (["--env", "nope"], "humanoid-direc"), (["--env", "nope:Nope-v0"], "humanoid-direc"),
    (["--resume", "nowhere"], "nowhere"), (["--eval-episodes", "-1"], "[0, inf)"),
    (["--env", "halfcheetah-pier", "--switch-every", "9"], "switch"), (["--device", "tpu"], "cuda"),
    (["--resume", ""], "--resume"), (["--seed", "9" * 400], "[0, 4294967295]"),
    (["--N", "1__0"], "whole"),
    (["--rollout", "full", "--k", "2"], "--k"),
])
def test_an_impossible_flag_is_one_line_that_names_it_and_nothing_is_created(
        flags, says, tmp_path, monkeypatch, capsys):
    assert_refused(m3po.parse_args, flags, says, tmp_path, monkeypatch, capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_where_there_is_none_is_refused_and_only_auto_falls_back(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--device", "cuda")
    assert stop.value.code == 2 and "CUDA" in capsys.readouterr().err
    args, env, _ = parse()
    assert args.device == "cpu"


def test_a_registered_id_is_the_short_name():
    args, _, _ = parse("--env", "M3PO/HumanoidDirec-v0")
    assert (args.env, args.M, args.G) == ("humanoid-direc", 500, 20)


def test_the_default_warmup_is_at_most_half_the_run_and_no_difference():
    args, _, _ = parse("--env", "halfcheetah-fwd-bwd", "--N", 3, "--k", 2)
    assert args.warmup == 1_500 and m3po.differences(vars(args)) == {"k": 2}
    assert parse("--N", 1, "--E", 1)[0].warmup == 1


def test_the_same_folder_twice_is_refused(tmp_path, capsys):
    run(tmp_path / "a")
    with pytest.raises(SystemExit) as stop:
        parse(*TINY, "--out", tmp_path / "a")
    assert stop.value.code == 2 and "--resume" in capsys.readouterr().err
