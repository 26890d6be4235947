"""tables.py: the methods of the experiments, and what is written of them."""

import json
import re
from argparse import Namespace

import numpy as np
import pytest

import envs
import experiments
import figures
import m3po
import tables
from flags import differences
from results import compare
from results.search import table as search_table
from tests.conftest import fake_run


@pytest.mark.parametrize("slug", tables.METHODS)
def test_a_method_of_the_experiments_is_the_variant_that_figures_name(slug):
    method = tables.METHODS[slug]
    env = "ant-fwd-bwd" if slug == "k1" else "point-fwd-bwd"  # where it is not the default
    args = vars(m3po.parse_args([*method.flags.split(), "--env", env], method.program)[0])
    named = figures.variant(differences(args), method.program)
    assert named.replace(" ", "").startswith(method.label.replace(" ", ""))
    assert (named == "M3PO") == (slug == "m3po")


def test_who_repeats_the_way_that_paid_last_gets_the_closed_form():
    env, returns = envs.make("point-fwd-bwd"), []
    assert "100 if told the task" in tables.closed_form(env) and (
        "= 95.04" in tables.closed_form(env))
    assert tables.closed_form(envs.make("ant-fwd-bwd")) == ""
    for seed in range(400):
        way, paid, done = 1.0, [], False
        env.reset(seed=seed)
        while not done:
            _, reward, _, done, _ = env.step(np.array([way], np.float32))
            way = way if reward > 0 else -way
            paid.append(reward)
        returns.append(sum(paid))
    assert np.mean(returns) == pytest.approx(95.04, abs=4 * np.std(returns) / 20)


def test_the_table_of_many_envs_comes_from_the_results_alone(tmp_path, capsys):
    for env, program, seed, returns in (
            ("point-fwd-bwd", "m3po", 0, (1, 4)), ("point-fwd-bwd", "m3po", 1, (1, 6)),
            ("point-fwd-bwd", "ghp_mdp", 1, (1, 8)), ("ant-fwd-bwd", "m3po", 0, (900, 950))):
        args = vars(m3po.parse_args(["--env", env], program)[0])
        last = args["N"] * args["E"]
        del args["seed"]
        slug = program.replace("_", "-")
        (tmp_path / "r" / env / slug).mkdir(parents=True, exist_ok=True)
        folder = tmp_path / "r" / env / slug / f"seed{seed}"
        fake_run(folder, returns, seed, (last // 2, last), **args)
        config = json.loads((folder / "config.json").read_text())
        config["versions"] = {"torch": "2.13.0+cpu", "commit": f"{seed}23456789"}
        (folder / "config.json").write_text(json.dumps(config))
    assert experiments.main(["--envs", "point-fwd-bwd", "ant-fwd-bwd", "--methods", "m3po",
                             "ghp-mdp", "--seeds", "0", "1", "--results", str(tmp_path / "r"),
                             "--table"]) == 0
    said = capsys.readouterr().out
    toy, ant = said.split("\n| **`ant-fwd-bwd`**, 50 episodes after 200,000 env steps; early: 50. |")
    assert "\n| **`point-fwd-bwd`**, 50 episodes after 3,000 env steps; early: 12. The" in toy
    assert "95.04" in toy and said.count("\n| method | flags |") == 1
    rows = [line for line in said.split("All envs")[0].splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {11} and len(rows) == 2 + 2 * 5
    assert "| M3PO: the default | - | 5.0 [-7.7, 17.7] | 5.0 [-7.7, 17.7] | 3.0 [" in toy
    assert "after 2,000 env steps, evaluated every 400 | - | 8.0 | 8.0 | 4.5 | 2.0 |" in toy
    assert "| 1 |\n" in toy
    assert "| zero action | - | 0.0 | - | - | - | 0.00 | 0.00 / 0.00 | - | - |\n" in toy
    assert "| 950.0 | 950.0 | 925.0 |" in ant and "95.04" not in ant and "median 60 s" in toy
    assert ", torch 2.13.0+cpu; commits 0234567, 1234567.\n" in toy
    nothing, noise = (float(ant.split(f"| {name} | - | ")[1].split(" |")[0])
                      for name in ("zero action", "random actions"))
    assert nothing > 950 > 0 > noise  # an ant that stands earns 1 a step
    # The toy's ends are random actions and M3PO's 5, as GHP-MDP's 8 is one seed's. M3PO's seed 0
    # is at 4 there, and in the ant's env at 1; its seed 1 did not end there.
    low = float(toy.split("| random actions | - | ")[1].split(" |")[0])
    both = said.split("All envs together")[1]
    whole = ((4 - low) / (5 - low) + 1) / 2
    assert f"| M3PO | 1.00 | 1.00 | {whole:.2f} | 1 |" in both
    assert f"| GHP-MDP | {(8 - low) / (5 - low):.2f} | - | - | 0 |" in both
    assert "| method | point-fwd-bwd | ant-fwd-bwd | mean | seeds |" in both  # of two none is cut
    assert f"| {(nothing - noise) / (950 - noise):.2f} |" in both.split("| zero action |")[1]


def fake_kept(tmp_path, env, method, *finals):
    """Runs of a grid, and what is kept of them: their last returns."""
    runs, kept = [], {}
    for seed, last in enumerate(finals):
        folder = tmp_path / env / method / f"seed{seed}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        kept[folder] = figures.read_run(fake_run(folder, (0, last), seed))
        runs.append(Namespace(env=env, method=tables.METHODS[method], seed=seed, folder=folder))
    return runs, kept


def test_the_scale_over_envs_goes_from_random_actions_to_the_best_method(tmp_path):
    runs, kept = [], {}
    for env, good, bad in (("a", (90, 110), (40, 60)), ("b", (800, 820), (200, 230)),
                           ("c", (95, 95), (-5, 45)), ("d", (10, 10), (-20, -10))):
        for method, finals in (("m3po", good), ("recurrent-sac", bad)):
            more = fake_kept(tmp_path, env, method, *finals)
            runs, kept = runs + more[0], kept | more[1]
    more = fake_kept(tmp_path, "e", "m3po", -9, -8)
    runs, kept = runs + more[0], kept | more[1]
    played = {"a": (0, 0), "b": (1000, -190), "c": (-5, -5), "d": (0, -90), "e": (0, 0)}
    text = tables.overview(runs, kept, played)
    assert "Without e, where no run is above random actions." in text
    assert "| method | a | b | c | d | mean | interquartile mean | seeds |" in text
    # By hand. M3PO's seeds are at .9 and 1.1, .99 and 1.01, 1 and 1, 1 and 1; SAC's at .4 and .6,
    # 0.39 and .42, 0 and .5, .7 and .8. Of each seed the lowest and the highest are cut off.
    shown = lambda *values: figures.with_interval(values, 2)
    assert (f"| M3PO | 1.00 | 1.00 | 1.00 | 1.00 | {shown(3.89 / 4, 4.11 / 4)} | "
            f"{shown(1.99 / 2, 2.01 / 2)} | 2 |") in text
    assert (f"| recurrent SAC | 0.50 | 0.41 | 0.25 | 0.75 | {shown(1.49 / 4, 2.32 / 4)} | "
            f"{shown(0.79 / 2, 1.1 / 2)} | 2 |") in text
    assert f"| zero action | 0.00 | {1190 / 1000:.2f} | 0.00 | 0.90 |" in text
    assert tables.overview(runs, {}, played).startswith("In no env")


def test_one_lucky_seed_is_no_methods_best_where_others_have_three(tmp_path):
    runs, kept = [], {}
    for method, finals in (("m3po", (1, 2, 3)), ("pearl", (9,)), ("oracle", (20, 20, 20))):
        more = fake_kept(tmp_path, "a", method, *finals)
        runs, kept = runs + more[0], kept | more[1]
    by_method = tables.grouped(runs)
    assert tables.best_return(by_method, kept) == 2
    assert tables.best_return({m: by_method[m] for m in list(by_method)[1:2]}, kept) == 9
    assert np.isnan(tables.best_return(by_method, {}))


def test_a_late_return_is_of_the_last_quarter_of_the_steps(tmp_path):
    run = figures.read_run(fake_run(tmp_path / "a", range(1, 21)))
    assert tables.late_return(run) == (16 + 17 + 18 + 19 + 20) / 5
    seldom = figures.read_run(fake_run(tmp_path / "b", (3, 8), steps=(10_000, 20_000)))
    assert tables.late_return(seldom) == 8


def test_a_variant_stands_beside_its_control_seed_by_seed(tmp_path, capsys):
    low, high = (2.0, 4.0, 9.0), (11.0, 12.0, 10.0, 14.0)  # means of the last five of six
    for name, means, flags in (("control", low, {}),
                               ("more", high, {"G": 20, "token_changes": False})):
        (tmp_path / name).mkdir()
        for seed, mean in enumerate(means):
            fake_run(tmp_path / name / f"seed{seed}", (99, *(mean + i for i in range(-2, 3))), seed,
                     **flags)
    fake_run(tmp_path / "more" / "seed10", (99, 99), 10, G=20)
    (tmp_path / "more" / "seed10.lock").touch()  # as experiments.py leaves them
    compare.main([str(tmp_path / "control"), str(tmp_path / "more")])
    said, _, _, _, control, more = capsys.readouterr().out.splitlines()
    assert said == "After 6,000 env steps:"
    assert "| control | - | 0 1 2 | 2.0, 4.0, 9.0 | 5.0 [-4.0, 14.0] | - | " in control
    assert "| 20.7 [13.2, 28.1] | - | - | unknown |" in control  # of six evaluations, one of 99
    assert "| more | `--G 20 --no-token-changes` | 0 1 2 3 (1 shorter) | 11.0, 12.0, 10.0, " in more
    # By hand, of the seeds that both have: 9, 8 and 1; t of .975 at 2 degrees of freedom is 4.303.
    half = 4.303 * ((9 + 4 + 25) / 2 / 3) ** 0.5
    assert f"| +6.0 [{6 - half:.1f}, {6 + half:.1f}] |" in more
    # Without a seed in common nothing can be taken away.
    (tmp_path / "other").mkdir()
    fake_run(tmp_path / "other" / "seed7", range(1, 7), 7)
    compare.main([str(tmp_path / "control"), str(tmp_path / "other")])
    assert "| other | - | 7 | 4.0 | 4.0 | - | 3.5 | - | - |" in capsys.readouterr().out
    # Until 3,000 steps there are three evaluations, 99, m - 2 and m - 1.
    compare.main([str(tmp_path / "control"), str(tmp_path / "more"), "--until", "3000"])
    assert "| 33.3, 34.7, 38.0 |" in capsys.readouterr().out
    # So does a variant that has not come further, without being asked.
    (tmp_path / "short").mkdir()
    fake_run(tmp_path / "short" / "seed0", (1, 2, 3), 0)
    compare.main([str(tmp_path / "control"), str(tmp_path / "short")])
    said = capsys.readouterr().out
    assert "After 3,000 env steps" in said and "| 33.3, 34.7, 38.0 |" in said
    # Beside a run without a model the model's flags are no difference.
    (tmp_path / "sac").mkdir()
    fake_run(tmp_path / "sac" / "seed0", (1, 2, 3), 0, beta=0.0, M=9)
    compare.main([str(tmp_path / "control"), str(tmp_path / "sac")])
    assert "| sac | `--beta 0` | 0 |" in capsys.readouterr().out
    (tmp_path / "m2po").mkdir()
    fake_run(tmp_path / "m2po" / "seed0", (1, 2, 3), 0, model="mlp")
    compare.main([str(tmp_path / "sac"), str(tmp_path / "m2po"), str(tmp_path / "control")])
    said = capsys.readouterr().out
    assert "| m2po | `--model mlp --beta 0.5` | 0 |" in said
    assert "| control | `--beta 0.5` | 0 1 2 |" in said


def test_what_seeds_share_is_tested_as_by_hand():
    table = np.array([[100.0, 500, 600], [200, 700, 900]])  # variants x seeds
    fake = [Namespace(last_five=row, seeds=[0, 1, 2]) for row in table]
    grand, rows, seeds = table.mean(), table.mean(1, keepdims=True), table.mean(0, keepdims=True)
    within, left = ((table - rows) ** 2).sum(), ((table - rows - seeds + grand) ** 2).sum()
    F = ((within - left) / 2) / (left / 2)
    said = search_table.shared_by_seeds(fake)
    assert f"differ by {(within / 4) ** 0.5:.0f} (standard deviation)" in said
    assert f"by {(left / 2) ** 0.5:.0f} without what" in said
    assert f"F(2, 2) = {F:.1f}, p = {1 / (1 + F):.1g}." in said  # of 2 and 2 degrees of freedom


def test_a_comparison_shows_flags_as_they_are_typed():
    for typed, name, value in (
            ("--hybrid 5 10", "hybrid", [5.0, 10.0]), ("--model mlp", "model", "mlp"),
            ("--beta 0.25", "beta", 0.25), ("--oracle", "oracle", True),
            ("--no-layer-norm", "layer_norm", False)):
        assert compare.typed(name, value) == typed
        assert getattr(m3po.parse_args(typed.split())[0], name) == value
    assert compare.typed("alpha", None) == "(no --alpha)"


def test_a_comparison_without_a_run_says_so_in_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "short").mkdir()
    fake_run(tmp_path / "short" / "seed0")
    for folder, says in (("empty", "holds no seed"), ("short", "got to 9,000 env steps")):
        with pytest.raises(SystemExit, match="2"):
            compare.main([str(tmp_path / folder), str(tmp_path / "short"), "--until", "9000"])
        assert re.fullmatch(f".*results.compare: error: .*{says}\n", capsys.readouterr().err)


def test_two_evaluations_are_no_learning_curve(tmp_path):
    folder, method = tmp_path / "seed0", tables.METHODS["l2a"]
    kept = [figures.read_run(fake_run(folder, (3, 8), steps=(10_000, 20_000)))]
    for every, shown in ((10, "| 8.0 | 8.0 | - | - |"), (4, "| 8.0 | 8.0 | 5.5 | 20.0 |")):
        wanted = {"N": 20, "E": 1_000, "eval_every": every}
        run = Namespace(method=method, wanted=wanted)
        assert shown in tables.row([run], kept, run, 5)


def test_half_the_way_is_reached_at_the_first_evaluation_that_is_there(tmp_path):
    kept = [figures.read_run(fake_run(tmp_path / name, returns, steps=(2_000, 4_000, 6_000)))
            for name, returns in (("a", (1, 5, 2)), ("b", (1, 2, 6)), ("c", (1, 2, 3)))]
    assert tables.reached(kept[:2], 5) == "5.0" and tables.reached(kept, 5) == "6.0 (2 of 3)"
    assert tables.reached(kept, 6) == "never (1 of 3)" and tables.reached(kept, 1) == "2.0"
    assert tables.reached(kept, float("nan")) == tables.reached([], 1) == "-"
