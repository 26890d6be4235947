"""examples/: what documents call an example works, and teaches what it says."""

import numpy as np
import torch

import diagnostics
import envs
import m3po
from rollouts import EnvBuffer
from tests.conftest import parse, read_rows

SIGN = "examples.pendulum:PendulumSign-v0"
PENDULUM = """--env Pendulum-v1 --N 6 --E 400 --M 100 --G 4 --L 3 --width 32 --warmup 800
--model-updates 4 --reward-scale .1 --eval-episodes 10 --diagnose-every 0 --compile off
--threads 1""".split()
SIZES = ("--L", 5, "--width", 64, "--N", 14, "--E", 500, "--warmup", 1000)


def random_steps(env, n, L):
    """n steps under uniform actions, and the sign of each."""
    D_env, signs = EnvBuffer(n, 3, 1, L), []
    rng, obs = np.random.default_rng(0), None
    for step in range(n):
        if obs is None:
            obs, _ = env.reset(seed=step)
        action = rng.uniform(-1, 1, 1).astype(np.float32)
        next_obs, reward, terminated, truncated, info = env.step(action)
        D_env.add(obs, action, reward, next_obs, terminated, truncated)
        signs.append(info["task"])
        obs = None if truncated else next_obs
    return D_env, signs


def test_the_pendulums_sign_is_in_its_torque_and_nowhere_in_its_rewards_or_observations():
    D_env, signs = random_steps(envs.make(SIGN), 600, 5)
    obs, actions, rewards = D_env.tokens[:600].split([3, 1, 1], 1)
    angle = torch.atan2(obs[:, 1], obs[:, 0])
    torque = 2 * actions[:, 0]  # Gymnasium's bounds are -2 and 2
    cost = angle**2 + 0.1 * obs[:, 2] ** 2 + 0.001 * torque**2
    assert torch.allclose(rewards[:, 0], -0.1 * cost, atol=1e-4)
    sign = torch.tensor(np.array(signs).reshape(600), dtype=torch.float32)
    assert 0.3 < (sign > 0).float().mean() < 0.7 and sign.abs().min() == 1
    speed = obs[:, 2] + 0.05 * (15 * obs[:, 1] + 3 * sign * torque)  # g = 10, m = l = 1
    inside = speed.abs() < 8
    assert torch.allclose(D_env.next_obs[:600, 2][inside], speed[inside], atol=1e-4)
    switches = [step for step in range(1, 600) if signs[step] != signs[step - 1] and step % 200]
    assert len(switches) >= 2 and all(later - earlier >= 49 or earlier // 200 < later // 200
                                      for earlier, later in zip(switches, switches[1:]))
    told = envs.make(SIGN, oracle=True)
    assert told.reset(seed=0)[0].shape == (4,)


def test_the_model_finds_the_hidden_sign_where_a_blind_one_cannot():
    """It is the plateau that fits used to end on: what can be predicted without the sign."""
    torch.manual_seed(0)
    args, env, _ = parse("--env", SIGN, *SIZES, "--model-updates", 4)
    D_env, _ = random_steps(env, 1_000, args.L)
    episodes, _ = random_steps(env, 400, args.L)
    model = m3po.build(args, env, "cpu")[1]
    model.fit(D_env)
    blind = diagnostics.blind_model(model, D_env)
    speed = lambda model: 1 - model.score(episodes, episodes.kept())[2][3].item()
    assert speed(blind) < 0.93 < 0.96 < speed(model), (speed(blind), speed(model))


def test_the_direction_of_cheetah_dir_is_drawn_per_episode_and_holds_for_its_200_steps():
    env, drawn = envs.make("examples.cheetah_dir:CheetahDir-v0"), []
    for seed in range(20):
        env.reset(seed=seed)
        steps = [env.step(np.zeros(6, np.float32)) for _ in range(200)]
        tasks = {float(info["task"][0]) for *_, info in steps}
        assert len(tasks) == 1 and [step[3] for step in steps] == [False] * 199 + [True]
        drawn += tasks
    assert set(drawn) == {-1.0, 1.0}


def test_a_pendulum_swings_up_within_2400_steps(tmp_path):
    """Gymnasium's own, nothing hidden: -1,300 untrained, about -150 when it can. The model is
    perfect soon, so what learns here is Q, whose rewards are scaled (docs/USING.md)."""
    m3po.main(*parse(*PENDULUM, "--out", tmp_path / "run"))
    rows = read_rows(tmp_path / "run")
    returns = [float(row["eval_return_mean"]) for row in rows]
    assert returns[0] < -900 and returns[-1] > -400, returns
    assert float(rows[-1]["model_explained_obs"]) > 0.99
