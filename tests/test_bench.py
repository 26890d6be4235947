"""bench.py: what a run's parts cost, beside the least they could."""

import time

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import envs
import evaluation
import m3po
import speed
from policy import MetaPolicy
from tests.conftest import random_batch


def test_the_floor_is_the_matrix_products_of_an_update():
    """torch's own count of the eager update, which has no matrix product with h: L of them forward
    in each of 8 encodings (actor 1 + 1, Q 2 + 2, target 2) and twice as many back in 3."""
    O, A, L, B, H = 5, 2, 4, 16, 5
    policy = MetaPolicy(O, A, widths=(8, 8))
    batch = random_batch(O, A, L=L, B=B)
    with FlopCounterMode(display=False) as counted:
        policy.update(batch, torch.randn(2, B, A))
    with_h = 2 * B * H * 3 * H * L * (8 + 2 * 3)
    floor = bench.update_products(policy, B, L)
    with FlopCounterMode(display=False) as multiplied:
        bench.multiply(floor)
    assert multiplied.get_total_flops() == counted.get_total_flops() + with_h


def test_medians_are_of_the_runs_after_the_warm_up():
    calls = {"a": 0, "b": 0}

    def job(name, seconds):
        calls[name] += 1
        time.sleep(0.2 if calls[name] <= 2 else seconds)

    found = bench.medians({"a": lambda: job("a", 0.01), "b": lambda: job("b", 0.03)}, 5,
                          torch.device("cpu"))
    assert calls == {"a": 7, "b": 7} and found["a"] < found["b"] < 0.1


def test_the_simulators_floor_does_the_steps_that_the_evaluation_did():
    recorder = bench.Recorder([envs.make("ant-fwd-bwd") for _ in range(2)])
    policy = MetaPolicy(27, 8, widths=(8, 8))
    found = evaluation.evaluate(policy, recorder, [0, 1], 3)
    lengths = np.isfinite(found["reward"]).sum(0)
    assert [sum(i == env for taken in recorder.taken for i, _ in taken)
            for env in (0, 1)] == list(lengths)
    sim, after = recorder.envs[0].unwrapped, recorder.obs[0].copy()
    recorder.reset([0, 1])
    for taken in recorder.taken:
        for i, ctrl in taken:
            if i == 0:
                bench.drive(sim, ctrl)
    assert np.array_equal(sim._get_obs(), after)


def test_every_table_of_the_bench_can_be_made(monkeypatch, capsys):
    """With small nets and few rows, eager."""
    monkeypatch.setattr(bench, "ROWS", 300)
    monkeypatch.setattr(speed, "compiler_works", lambda device: False)
    parse = m3po.parse_args
    small = ["--width", "8", "--M", "12", "--G", "2", "--L", "2", "--eval-episodes", "2"]
    monkeypatch.setattr(m3po, "parse_args", lambda argv: parse([*argv, *small]))
    bench.main(["--repeats", "1", "--env", "walker2d-randomparams"])
    printed = capsys.readouterr().out
    for title in ("D_model, MB", "evaluation of 2 episodes",
                  "policy update, batch 256", "model rollouts, M 12", "model fit, 3 members",
                  *(f"env step, {name}" for name in list(envs.ENVS)[1:])):
        assert title in printed
    megabytes, _, times = printed.partition("x floor")
    assert [line.split()[0] for line in megabytes.splitlines() if line.startswith("  ")] == [
        *envs.ENVS]
    ratios = [float(line.split()[-1]) for line in times.splitlines() if line.startswith("  ")]
    robots = len(envs.ENVS) - 1
    assert len(ratios) == robots * 3 + 2 + 3 * 2 + 5 and ratios.count(1.0) >= 10 and min(ratios) > 0


@pytest.mark.parametrize("name", ["halfcheetah-fwd-bwd", "ant-fwd-bwd", "humanoid-direc"])
def test_gymnasiums_own_env_of_the_bench_has_our_physics(name):
    ours, plain = envs.make(name), bench.plain_env(name)
    ours.reset(seed=0), plain.reset(seed=0)
    plain.unwrapped.set_state(ours.unwrapped.data.qpos, ours.unwrapped.data.qvel)
    low, high = plain.action_space.low, plain.action_space.high
    for action in np.random.default_rng(0).uniform(-1, 1, (20, *low.shape)).astype(np.float32):
        ours.step(action), plain.step(low + (action + 1) / 2 * (high - low))
    assert np.allclose(ours.unwrapped.data.qpos, plain.unwrapped.data.qpos, atol=1e-4)
