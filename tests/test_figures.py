"""figures.py: curves, tables and pictures of runs."""

import json
import math
import re

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes

import envs
import figures
import m3po
from flags import differences
from tests.conftest import error_line, fake_run, read_image


def test_every_figure_from_a_tiny_run_has_its_size(trained_runs, tmp_path, capsys):
    sizes = {"curves": (780, 630), "adaptation": (1050, 630), "theory": (1560, 1170)}
    for name, size in sizes.items():
        path = tmp_path / f"{name}.png"
        figures.main([name, trained_runs["toy"], "--out", str(path)])
        read_image(path, size)
        printed = capsys.readouterr().out
        assert "last five [95 %]" in printed
        assert "wall time" in printed and "point-fwd-bwd" in printed
    both = tmp_path / "both.png"
    figures.main(["curves", trained_runs["toy"], trained_runs["cheetah"], "--out", str(both)])
    read_image(both, (1560, 630))


@pytest.mark.parametrize("more, rows", [(0, 2), (1, 3)])  # of four; the toy takes two
def test_the_gallery_shows_every_environment_also_those_you_add(
        more, rows, needs_opengl, tmp_path, monkeypatch):
    seven = ["point-fwd-bwd", "halfcheetah-fwd-bwd", "halfcheetah-pier", "ant-fwd-bwd",
             "ant-crippled-leg", "walker2d-randomparams", "humanoid-direc"]
    shown = {name: envs.ENVS[name] for name in seven} | {
        f"mine-{i}": envs.ENVS["ant-fwd-bwd"] for i in range(more)}
    monkeypatch.setattr(envs, "ENVS", shown)
    titles = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_title",
                        lambda ax, title, set_title=Axes.set_title, **kwargs:
                        titles.append(title) or set_title(ax, title, **kwargs))
    figures.main(["envs", "--out", str(tmp_path / "e.png")])
    assert sorted(titles) == sorted(shown)
    read_image(tmp_path / "e.png", (1800, 405 * rows))


def test_students_interval_of_known_values():
    low, high = figures.students_interval([1, 2, 3, 4, 5])  # 2.776 sqrt(2.5 / 5) = 1.963
    assert (low, high) == (pytest.approx(3 - 1.963, abs=1e-3), pytest.approx(3 + 1.963, abs=1e-3))
    assert np.isnan(figures.students_interval([1])).all()
    rows = np.array([[0, 7, math.nan], [1, 7, 5], [math.nan, 7, math.nan]])
    low, high = figures.students_interval(rows)  # what is NaN is left out
    assert low[0] == pytest.approx(0.5 - 6.353, abs=1e-3)
    assert high[0] == pytest.approx(0.5 + 6.353, abs=1e-3)
    assert (low[1], high[1]) == (7, 7) and np.isnan([low[2], high[2]]).all()
    assert figures.with_interval([7.0]) == "7.0"
    assert figures.with_interval([1, 2, 3, 4, 5]) == "3.0 [1.0, 5.0]"
    assert figures.with_interval([0, 1]) == "0.5 [-5.9, 6.9]"  # 12.706 / 2 = 6.353
    for n in range(2, 11):  # 95 % of the density lies within
        values = np.arange(n)
        quantile = (figures.students_interval(values)[1] - values.mean()) / (
            values.std(ddof=1) / math.sqrt(n))
        x = np.linspace(-quantile, quantile, 20_001)
        student = torch.distributions.StudentT(torch.tensor(n - 1, dtype=torch.float64))
        density = student.log_prob(torch.as_tensor(x)).exp().numpy()
        assert np.trapezoid(density, x) == pytest.approx(0.95, abs=4e-5)


def test_bands_over_a_few_seeds_cover_what_they_say():
    rng = np.random.default_rng(0)
    for n in (2, 5):
        low, high = figures.students_interval(rng.normal(size=(n, 4_000)))
        assert ((low < 0) & (0 < high)).mean() == pytest.approx(0.95, abs=0.012)


def test_a_run_is_drawn_from_its_two_small_files_whatever_columns_they_have(tmp_path, capsys):
    old = fake_run(tmp_path / "old", (1, 2))
    text = "global_step,note,eval_return_mean,newer\n1000,warm-up,1,\n2000,,4,0.5\n"
    (fake_run(tmp_path / "new", seed=1) / "progress.csv").write_text(text)
    figures.main(["curves", str(old), str(tmp_path / "new"), "--out", str(tmp_path / "c.png")])
    row = capsys.readouterr().out.splitlines()[1].split()
    assert row[:4] == ["point-fwd-bwd", "M3PO", "2", "2"]
    assert row[4] == "2.0" and row[7] == "3.0"  # the last five of two, and the last
    assert "note" not in figures.read_run(tmp_path / "new").progress


@pytest.mark.parametrize("flags, name", [
    ({}, "M3PO"), ({"k": 5}, "k = 5"), ({"rollout": "full"}, "Full"), ({"model": "mlp"}, "M2PO"),
    ({"hybrid": [80, 130]}, "M3PO-h 80 to 130"), ({"beta": 0.0}, "recurrent SAC"),
    ({"L": 0}, "blind (L = 0)"), ({"no_token_reward": True}, "no reward token"),
    ({"oracle": True}, "oracle"),
    ({"beta_nll": 0.0, "reward_weight": 1.0}, "literal likelihood"),
    ({"seed": 9, "N": 1, "out": "elsewhere", "device": "cuda"}, "M3PO"),
    ({"k": 5, "G": 9}, "k = 5, G = 9"), ({"fit_every": 7}, "fit every = 7"),
    ({"beta": 1.0}, "imagined alone"), ({"beta": 0.7}, "beta = 0.7"),
    ({"newest_token": False, "k": 5}, "newest token = False, k = 5"), ({"G": 1}, "G = 1"),
    ({"env_capacity": 3_000}, "M3PO"), ({"env_capacity": 500}, "env capacity = 500"),
    ({"beta": 0.0, "k": 5, "model_updates": 9.0}, "recurrent SAC"),  # it has no model
])
def test_a_variant_is_named_by_what_differs_from_the_defaults(flags, name):
    args = vars(m3po.parse_args([])[0])
    assert sorted(figures.variant(differences(args | flags)).split(", ")) == sorted(
        name.split(", "))


def test_full_rollouts_are_called_full_where_branches_have_two_steps():
    args = vars(m3po.parse_args(["--env", "ant-fwd-bwd", "--rollout", "full"])[0])
    assert figures.variant(differences(args)) == "Full"


def test_settings_that_all_runs_share_stand_in_the_title(tmp_path):
    runs = [fake_run(tmp_path / "a", G=9), fake_run(tmp_path / "b", seed=1, G=9),
            fake_run(tmp_path / "c", G=9, k=5)]
    groups, titles = figures.read_runs(runs)
    assert titles == {"point-fwd-bwd": "point-fwd-bwd\nG = 9"}
    assert {label: len(group) for label, group in groups["point-fwd-bwd"].items()} == {
        "M3PO": 2, "k = 5": 1}
    planner = fake_run(tmp_path / "d", method="l2a")  # has no G, so it contradicts none
    config = {"flags": vars(m3po.parse_args([], "l2a")[0])}
    (planner / "config.json").write_text(json.dumps(config))
    assert figures.read_runs([*runs, planner])[1] == titles
    assert "point-fwd-bwd" == figures.read_runs([*runs, fake_run(tmp_path / "e", seed=2)])[1][
        "point-fwd-bwd"]
    sac = fake_run(tmp_path / "h", M=9, beta=0.0)  # has no M either
    groups, titles = figures.read_runs([fake_run(tmp_path / "i", M=9), sac])
    assert titles == {"point-fwd-bwd": "point-fwd-bwd\nM = 9"}
    assert set(groups["point-fwd-bwd"]) == {"M3PO", "recurrent SAC"}
    off = [fake_run(tmp_path / "f", reset_every=None, env="halfcheetah-fwd-bwd"),
           fake_run(tmp_path / "g", reset_every=250, env="halfcheetah-fwd-bwd")]
    assert "reset" not in figures.read_runs(off)[1]["halfcheetah-fwd-bwd"]  # None is a value too


def test_long_names_stay_within_the_picture(tmp_path):
    figure, axes = figures.panels(1)
    for method in ("PEARL", "L2A", "GHP-MDP"):
        axes[0].plot([0, 1], label=f"{method}, raw angles, no early resets")
    figures.finish(figure, axes, tmp_path / "a.png")
    legend = figure.legends[0].get_window_extent()
    assert 0 <= legend.x0 and legend.x1 <= figure.bbox.width


def test_wide_bands_do_not_squeeze_the_curves():
    _, (ax,) = figures.panels(1)
    values = np.array([[0.0, 10.0], [0.0, 14.0]])
    band = figures.students_interval(values)
    figures.draw_group(ax, np.arange(2), values, band, "k")
    assert ax.get_ylim()[1] > band[1][1] > 30
    figures.keep_curves_in_sight(ax)
    assert ax.get_ylim() == (-3.5, 17.5)


def test_the_table_counts_right(tmp_path, capsys):
    fake_run(tmp_path / "a", (0, 2, 4))  # mean height of the curve: 2
    fake_run(tmp_path / "b", (2, 4, 4), seed=1)  # 3.5
    groups, _ = figures.read_runs([tmp_path / "a", tmp_path / "b"])
    figures.summary(groups)
    row = capsys.readouterr().out.splitlines()[1].split()
    assert row == "point-fwd-bwd M3PO 2 3 2.7 [-5.8, 11.1] 4.0 [4.0, 4.0] 2.8 1.5 min".split()


def test_seeds_are_compared_at_the_steps_they_share(tmp_path):
    runs = [figures.read_run(fake_run(tmp_path / "a", (1, 2, 3))),
            figures.read_run(fake_run(tmp_path / "b", (5, "", 7, 8), seed=1))]  # longer; one gap
    x, values = figures.over_seeds(runs, "eval_return_mean")
    assert x.tolist() == [1, 3] and values.tolist() == [[1, 3], [5, 7]]


def test_a_half_written_last_row_is_left_out(tmp_path):
    folder = fake_run(tmp_path / "a", (1, 2))
    with open(folder / "progress.csv", "a") as f:
        f.write("3,30")
    assert figures.read_run(folder).progress["global_step"].tolist() == [1000, 2000]


def test_the_adaptation_figure_tells_reward_before_and_after_over_all_switches(tmp_path, capsys):
    for seed, level in ((0, 1.0), (1, 3.0)):
        folder = fake_run(tmp_path / str(seed), seed=seed)
        rows = [f"{x},{level if x < 0 else -level if x < 6 else level},{7 + (x == 0)}\n"
                for x in range(-3, 20)]
        (folder / "switches.csv").write_text("steps_since_switch,reward,switches\n" + "".join(rows))
    figures.main(["adaptation", str(tmp_path / "0"), str(tmp_path / "1"), "--out",
                  str(tmp_path / "a.svg")])
    row = capsys.readouterr().out.splitlines()[-2].split()
    assert row == ["point-fwd-bwd", "M3PO", "16", "2.00", "-2.00", "6,", "6"]
    (tmp_path / "1/switches.csv").write_text("steps_since_switch,reward,switches\n0,x,1\n")
    assert "switches.csv is broken" in error_line(capsys, figures, "adaptation", tmp_path / "1",
                                                  "--out", tmp_path / "b.svg")


def test_recovery_is_nine_tenths_of_the_way_back():
    x = np.arange(-2, 5)
    assert figures.steps_to_recover(x, np.array([1, 1, -1, -1, 0.7, 0.81, 1])) == 3
    assert figures.steps_to_recover(x, np.array([1, 1, -1, -1, 0, 0, 0])) is None
    assert figures.steps_to_recover(x, np.zeros(7)) is None
    slow = np.array([1, 1, 0.98, 0.95, 0, 0.5, 0.95])  # it falls little by little
    assert figures.steps_to_recover(x, slow) == 4


def test_a_legend_says_how_many_seeds_a_variant_has():
    groups = {"a": {"M3PO": [0] * 5, "PEARL": [0], "L2A": [0] * 3},
              "b": {"M3PO": [0] * 3, "PEARL": [0]}}
    assert figures.with_seeds(groups) == {
        "M3PO": "M3PO (3 to 5 seeds)", "PEARL": "PEARL (1 seed)", "L2A": "L2A (3 seeds)"}


def damage_run(folder, how):
    if how == "no config":
        (folder / "config.json").unlink()
    elif how == "broken config":
        (folder / "config.json").write_text('{"flags": {"env"')
    elif how == "no progress":
        (folder / "progress.csv").unlink()
    elif how == "header only":
        (folder / "progress.csv").write_text("epoch,global_step,eval_return_mean\n")
    elif how == "empty":
        (folder / "progress.csv").write_text("")
    elif how == "text":
        (folder / "progress.csv").write_text("epoch,global_step,eval_return_mean\n1,1000,hello\n")
    elif how == "binary":
        (folder / "progress.csv").write_bytes(bytes(range(256)))
    elif how == "NaN only":
        (folder / "progress.csv").write_text("epoch,global_step,eval_return_mean\n1,1000,nan\n")
    elif how == "no steps":
        (folder / "progress.csv").write_text("epoch,eval_return_mean\n1,3\n")


@pytest.mark.parametrize("how, says", [
    ("no config", "config.json does not exist"), ("broken config", "config.json is broken"),
    ("no progress", "progress.csv does not exist"), ("header only", "has no rows"),
    ("empty", "has no rows"), ("text", "hello"), ("binary", "progress.csv"),
    ("NaN only", "no number in column eval_return_mean"), ("no steps", "global_step"),
])
def test_a_broken_run_folder_gets_one_line_that_names_it(tmp_path, capsys, how, says):
    damage_run(fake_run(tmp_path / "bad"), how)
    good = fake_run(tmp_path / "good", seed=1)
    for command in ("curves", "theory"):
        argv = [command, good, tmp_path / "bad", "--out", tmp_path / "c.png"]
        err = error_line(capsys, figures, *argv)
        assert says in err and str(tmp_path / "bad") in err
    assert not (tmp_path / "c.png").exists()


def test_runs_that_do_not_belong_together_get_one_line(tmp_path, capsys):
    a, b = fake_run(tmp_path / "a"), fake_run(tmp_path / "b", env="ant-fwd-bwd")
    out = tmp_path / "x.png"
    for command in ("theory", "adaptation"):
        assert "one env at a time" in error_line(capsys, figures, command, a, b, "--out", out)
    assert "one variant (M3PO) with one seed (0)" in error_line(
        capsys, figures, "curves", a, fake_run(tmp_path / "c"), "--out", out)
    assert "switches.csv does not exist" in error_line(
        capsys, figures, "adaptation", a, "--out", out)
    assert "does not exist" in error_line(capsys, figures, "curves", tmp_path / "no", "--out", out)
    assert "no folder" in error_line(capsys, figures, "curves", a, "--out", tmp_path / "no/x.png")
    assert "does not end in" in error_line(
        capsys, figures, "curves", a, "--out", tmp_path / "x.bmp")
    assert not out.exists()


@pytest.mark.parametrize("old, names", [
    ("results/old", ("old", "m3po")), ("copy/m3po", ("copy/m3po", "results/m3po"))])
def test_one_variant_of_two_commits_is_two_curves_named_after_their_folders(
        old, names, tmp_path, capsys):
    runs = []
    for method, seed in ((old, 0), ("results/m3po", 0), ("results/m3po", 1)):
        (tmp_path / method).mkdir(parents=True, exist_ok=True)
        runs.append(str(fake_run(tmp_path / method / f"seed{seed}", seed=seed)))
    figures.main(["curves", *runs, "--out", str(tmp_path / "c.svg")])
    found = re.findall(r"M3PO, ([\w/]+) +(\d)", capsys.readouterr().out)
    assert found == list(zip(names, "12"))


def test_theory_says_which_quantity_no_run_has_measured(tmp_path):
    figures.main(["theory", str(fake_run(tmp_path / "a")), "--out", str(tmp_path / "t.svg")])
    assert (tmp_path / "t.svg").stat().st_size > 10_000  # td_error alone is drawn
