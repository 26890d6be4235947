"""The command line of m3po.py: defaults, and what is refused."""

import re
import sys

import pytest
import torch

import flags
import m3po
import speed
from tests.conftest import TINY, assert_refused, parse, run


def test_the_toy_alone_has_no_layer_norm():
    on = {env: m3po.parse_args(["--env", env])[0].layer_norm
          for env in ("point-fwd-bwd", "ant-fwd-bwd")}
    assert on == {"point-fwd-bwd": False, "ant-fwd-bwd": True}
    assert not m3po.parse_args(["--env", "ant-fwd-bwd", "--no-layer-norm"])[0].layer_norm


@pytest.mark.parametrize("given, says", [
    (["--bogus"], "--bogus"), (["--epoch", "3"], "--epoch"), (["--k", "0"], "[1, inf)"),
    (["--k", "1.5"], "whole"), (["--gamma", "1"], "[0, 1)"), (["--gamma", "nan"], "[0, 1)"),
    (["--lr", "-1"], "(0, inf)"), (["--lr", "inf"], "(0, inf)"), (["--B", "0"], "[1, 1000]"),
    (["--tau", "0"], "(0, 1]"), (["--alpha", "0"], "(0, inf)"), (["--warmup", "0"], "[1, inf)"),
    (["--warmup", "9999"], "--warmup"), (["--beta", "1.1"], "[0, 1]"), (["--hybrid", "3"], "A < B"),
    (["--hybrid"], "Table 3"), (["--hybrid", "1", "2", "--beta", "0.5"], "--beta"),
    (["--env", "nope"], "humanoid-direc"), (["--env", "nope:Nope-v0"], "humanoid-direc"),
    (["--resume", "nowhere"], "nowhere"), (["--eval-episodes", "-1"], "[0, inf)"),
    (["--env", "halfcheetah-pier", "--switch-every", "9"], "switch"), (["--device", "tpu"], "cuda"),
    (["--resume", ""], "--resume"), (["--seed", "9" * 400], "[0, 4294967295]"),
    (["--N", "1__0"], "whole"), (["--B", "100000000"], "[1, 1000]"),
    (["--rollout", "full", "--k", "2"], "--k"), (["--model", "mlp", "--B", "5"], "7 members"),
    (["--model", "mlp", "--model-layer-norm"], "--model-layer-norm"),
    (["--angles", "-1"], "--angles"), (["--angles", "0", "9"], "9 is not in 0 to 0"),
])
def test_an_impossible_flag_is_one_line_that_names_it_and_nothing_is_created(
        given, says, tmp_path, monkeypatch, capsys):
    assert_refused(m3po.parse_args, given, says, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("what_is_there", [None, type(sys)("wandb")])  # nothing, a folder wandb/
def test_track_without_weights_and_biases_says_how_to_install_it(
        what_is_there, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", what_is_there)
    assert_refused(m3po.parse_args, ["--track"], "--track: needs Weights & Biases: python -m pip "
                   "install wandb", tmp_path, monkeypatch, capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_where_there_is_none_is_refused_and_only_auto_falls_back(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--device", "cuda")
    assert stop.value.code == 2 and "CUDA" in capsys.readouterr().err
    args, env, _ = parse()
    assert args.device == "cpu"


def test_the_table_of_defaults_names_every_flag_and_no_other():
    actions = [a for a in flags.build_parser()._actions if a.dest != "help"]
    assert sorted(a.dest for a in actions) == sorted(flags.DEFAULTS)
    assert all(set(row) < set(flags.DEFAULTS) for row in flags.BY_ENV.values())
    assert vars(flags.build_parser().parse_args([])) == {}  # what was not given is not there
    args = vars(parse("--env", "humanoid-direc", "--tau", "0.1")[0])
    assert args.pop("method") == "m3po"
    assert {name: args[name] for name in args if args[name] != flags.DEFAULTS[name]} == {
        "env": "humanoid-direc", "M": 500, "G": 20, "tau": 0.1, "out": args["out"], "device": "cpu"}


def test_help_begins_with_two_commands_and_ten_flags_and_says_what_a_value_is(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    assert text.count("    python m3po.py") == 2 and len(text.splitlines()) < 120
    first = text[text.index("the ten to know first"):text.index("Table 2 of the paper")]
    assert re.findall(r"^  --(\S+)", first, re.M) == (
        "env seed N G width L threads device out resume".split())
    for action in flags.build_parser()._actions:
        if action.nargs != 0 and action.choices is None:
            assert action.metavar and action.metavar.lower() != action.dest.lower() or (
                action.dest == "seed")
    assert max(map(len, text.splitlines())) <= 100
    for default in ("(1000; toy 200; pier 500; walker2d 500; humanoid 500)", "(250; toy 100)",
                    "(yes; toy no)"):
        assert default in " ".join(text.split())


def test_small_nets_take_one_thread_and_large_ones_what_torch_would(monkeypatch):
    monkeypatch.setattr(speed, "TORCHS_OWN", 2)
    before, taken = torch.get_num_threads(), []
    try:
        for given in ([], ["--width", "128"], ["--width", "129"], ["--threads", "2"],
                      ["--env", "ant-fwd-bwd"], ["--env", "ant-fwd-bwd", "--threads", "1"]):
            args = parse(*given)[0]
            speed.set_threads(args)
            taken.append((torch.get_num_threads(), speed.cores(args)))
    finally:
        torch.set_num_threads(before)
    # Of torch, and of evaluation's processes.
    assert taken == [(1, 2), (1, 2), (2, 2), (2, 2), (2, 2), (1, 1)]


def test_a_registered_id_is_the_short_name():
    args, _, _ = parse("--env", "M3PO/HumanoidDirec-v0")
    assert (args.env, args.M, args.G) == ("humanoid-direc", 500, 20)


def test_the_cheetahs_pitch_is_an_angle_and_no_angles_is_a_value_too():
    assert parse("--env", "halfcheetah-pier")[0].angles == [1] and parse()[0].angles == []
    literal, _, _ = parse("--env", "halfcheetah-fwd-bwd", "--angles")
    assert literal.angles == [] and flags.differences(vars(literal)) == {"angles": []}
    older = {name: value for name, value in vars(literal).items() if name != "angles"}
    assert flags.completed(older)["angles"] == []  # of a run from before the flag
    assert flags.completed({"env": "ant-fwd-bwd", "method": "ghp_mdp"})["std"] == 1


def test_the_default_warmup_is_at_most_half_the_run_and_no_difference():
    args, _, _ = parse("--env", "halfcheetah-fwd-bwd", "--N", 3, "--k", 3)
    assert args.warmup == 1_500 and flags.differences(vars(args)) == {"k": 3}
    assert parse("--N", 1, "--E", 1)[0].warmup == 1


def test_the_same_folder_twice_is_refused(tmp_path, capsys):
    run(tmp_path / "a")
    with pytest.raises(SystemExit) as stop:
        parse(*TINY, "--out", tmp_path / "a")
    assert stop.value.code == 2 and "--resume" in capsys.readouterr().err
