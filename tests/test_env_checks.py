"""env_checks.py, and what envs.py makes of a user's own env."""

import importlib
import math
import re
import traceback
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, Tuple
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers import FlattenObservation

import envs
from tests.conftest import parse, read_rows, run
from tests.test_envs import NAMES, envs_run


class Own(gym.Env):
    """A user's env whose every oddity is an argument."""

    def __init__(self, obs=None, action=None, old_step=False, old_reset=False, bad=None, **says):
        self.observation_space = obs or Box(-np.inf, np.inf, (3,), np.float64)
        self.action_space = action or Box(-1, 1, (2,), np.float32)
        self.old_step, self.old_reset, self.bad, self.says = old_step, old_reset, bad, says
        self.switch_every = says.get("switch_every")

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.actions = []
        first = np.full(3, 0.1), self.says.get("reset_info", {})
        return first[0] if self.old_reset else first

    def step(self, action):
        self.actions.append(action)
        obs = np.full(3, np.nan if self.bad == 0 else 0.1)
        reward = np.inf if self.bad == 1 else self.says.get("reward", 1.0)
        terminated, info = self.says.get("terminated", True), self.says.get("info", {})
        truncated = self.says.get("truncated", False)
        return ((obs, reward, True, {}) if self.old_step else
                (obs, reward, terminated, truncated, info))


gym.register("Own-v0", entry_point=Own, max_episode_steps=5)


def make_own(monkeypatch, **kwargs):
    monkeypatch.setitem(gym.registry["Own-v0"].kwargs, "_", None)  # restores kwargs afterwards
    for key, value in kwargs.items():
        monkeypatch.setitem(gym.registry["Own-v0"].kwargs, key, value)
    return envs.make("Own-v0")


@pytest.mark.parametrize(
    "kwargs, word",
    [
        ({"action": Discrete(3)}, "Discrete action"),
        ({"action": Dict({"a": Box(-1, 1)})}, "Dict action"),
        ({"action": Tuple((Discrete(2), Discrete(2)))}, "Tuple action"),
        ({"action": Box(-np.inf, np.inf, (2,))}, "unbounded action"),
        ({"action": Box(0, np.inf, (2,))}, "unbounded action"),
        ({"action": Box(-1, 1, (2, 2))}, "action shape"),
        ({"action": Box(0, 5, (2,), np.int64)}, "int64 action"),
        ({"obs": Box(0, 255, (64, 64, 3), np.uint8)}, "image"),
        ({"obs": Box(-1, 1, ())}, "observation shape"),
        ({"obs": Dict({"a": Box(-1, 1)})}, "Dict observation"),
        ({"obs": Discrete(5)}, "Discrete observation"),
        ({"old_step": True}, "old API: step"),
        ({"old_reset": True}, "old API: reset"),
        ({"action": Box(0, 1, (0,))}, "action space has no dimensions"),
        ({"obs": Box(0, 1, (0,))}, "observation space has no dimensions"),
        ({"action": Box(np.array([-1, 2], np.float32), np.array([1, 2], np.float32))},
         "action dimension 1 reaches from 2 to 2"),
        ({"reward": np.array([1.0])}, "array([1.]) as reward; M3PO needs a number"),
        ({"reward": None}, "None as reward"),
        ({"reward": "1"}, "'1' as reward"),
        ({"terminated": np.array([True])}, "array([ True]) as terminated; M3PO needs a bool"),
        ({"terminated": None}, "None as terminated"),
        ({"truncated": "no"}, "'no' as truncated"),
        ({"info": None}, "step returned None as info"),
        ({"reset_info": None}, "reset returned None as info"),
        ({"info": {"right_way": "yes"}}, "step returned 'yes' as info['right_way']"),
        ({"info": {"switched": np.array([True])}}, "array([ True]) as info['switched']"),
        ({"switch_every": 30.0}, "its switch_every is 30.0"),
        ({"switch_every": 0}, "its switch_every is 0"),
    ],
)
def test_what_m3po_cannot_use_is_refused_by_name_in_one_line(monkeypatch, kwargs, word):
    with pytest.raises(envs.EnvError, match=re.escape(word)) as error:
        make_own(monkeypatch, **kwargs)
    message = str(error.value)
    assert message.startswith("Own-v0: ") and "\n" not in message


def test_an_env_that_changes_the_action_it_is_given_does_not_change_the_agents(monkeypatch):
    env, step = make_own(monkeypatch), Own.step
    monkeypatch.setattr(Own, "step", lambda self, a: step(self, np.multiply(a, 9, a)))
    env.reset(seed=0)
    given = np.full(2, 0.5, np.float32)
    env.step(given)
    assert given.tolist() == [0.5, 0.5] and env.unwrapped.actions[-1].tolist() == [4.5, 4.5]


def test_an_env_can_say_itself_that_a_step_is_no_data(monkeypatch):
    env = make_own(monkeypatch, info={"fault": "the gripper slipped"})
    first, _ = env.reset(seed=0)
    obs, *_, info = step = env.step(np.zeros(2, np.float32))
    assert step[1:4] == (0.0, False, True) and info["fault"] == "the gripper slipped"
    assert np.array_equal(obs, first)
    env = make_own(monkeypatch, info={"fault": False})
    env.reset(seed=0)
    *_, truncated, info = env.step(np.zeros(2, np.float32))
    assert not truncated and "fault" not in info  # which alone would count as one


def test_a_rule_that_says_more_ends_than_there_are_is_noted_once(monkeypatch, capsys):
    monkeypatch.setattr(Own, "terminated_fn", staticmethod(lambda o: o[..., 0] > 0), raising=False)
    env = make_own(monkeypatch, terminated=False)
    env.reset(seed=0)
    for _ in range(2):
        env.step(np.zeros(2, np.float32))
    assert capsys.readouterr().out.count("Own-v0 did not terminate where its terminated_fn") == 1


def test_the_bounds_that_stand_for_the_unit_box_are_those_after_the_envs_own_wrappers(monkeypatch):
    def made():
        own = Own(action=Box(-9, 9, (2,), np.float32))
        return gym.wrappers.RescaleAction(own, np.float32(-4), np.float32(4))

    monkeypatch.setattr(gym.registry["Own-v0"], "entry_point", made)
    env = envs.make("Own-v0")
    assert env.get_wrapper_attr("action_bounds") == Box(-4, 4, (2,), np.float32)
    assert env.action_space == Box(-1, 1, (2,), np.float32)


def test_a_task_that_grows_is_no_oracles(monkeypatch):
    make_own(monkeypatch, reset_info={"task": 1.0}, info={"task": 1.0})
    env = envs.make("Own-v0", oracle=True)
    assert env.reset(seed=0)[0].shape == (4,)
    env.unwrapped.says["info"] = {"task": [1.0, 2.0]}
    with pytest.raises(envs.EnvError, match="^Own-v0: info says a task of 2 numbers, where the f"):
        env.step(np.zeros(2, np.float32))


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_asymmetric_action_bounds_are_rescaled_from_the_unit_box(monkeypatch, dtype):
    bounds = np.array([-3, 0.2], dtype), np.array([0.1, 0.7], dtype)
    env = make_own(monkeypatch, action=Box(*bounds, dtype=dtype))
    assert env.action_space == Box(-1, 1, (2,), np.float32)
    env.reset(seed=0)
    for unit in (-1, 0, 1):
        env.step(np.full(2, unit, np.float32))
    low, middle, high = env.unwrapped.actions
    assert np.array_equal(low, bounds[0]) and np.array_equal(high, bounds[1])  # never beyond
    assert np.allclose(middle, (bounds[0] + bounds[1]) / 2) and middle.dtype == dtype


@pytest.mark.parametrize("space", (np.float32, np.float64))
def test_observations_are_float32_whatever_the_space_says(monkeypatch, space):
    env = make_own(monkeypatch, obs=Box(-1, 1, (3,), space))
    assert env.observation_space.dtype == np.float32 == env.reset(seed=0)[0].dtype
    assert env.step(np.zeros(2, np.float32))[0].dtype == np.float32


def own_old_reset(self):
    return np.zeros(3)


def own_broken(self, *_, **__):
    raise LookupError("the motor\ndoes not answer")


def test_a_reset_without_a_seed_is_refused_as_the_old_api(monkeypatch):
    for old in (own_old_reset, lambda self, seed=None: (np.zeros(3), {})):  # the latter: no options
        monkeypatch.setattr(Own, "reset", old)
        with pytest.raises(envs.EnvError, match="^Own-v0: old API: reset must take seed and opt"):
            envs.make("Own-v0")


@pytest.mark.parametrize("method, where", [
    ("reset", "its first reset"), ("step", "its first step"), ("__init__", "making it"),
    ("terminated_fn", "terminated_fn, asked about a NumPy array (3, 3)")])
def test_what_an_own_env_raises_keeps_its_traceback_below_a_line_that_names_the_env(
        monkeypatch, capsys, method, where):
    monkeypatch.setattr(Own, method, own_broken, raising=False)
    with pytest.raises(LookupError, match="the motor\ndoes not answer") as error:
        envs.make("Own-v0")
    lines = {frame.lineno for frame in traceback.extract_tb(error.value.__traceback__)}
    for cause in filter(None, (error.value.__cause__, error.value.__context__)):  # raised anew
        lines |= {frame.lineno for frame in traceback.extract_tb(cause.__traceback__)}
    assert own_broken.__code__.co_firstlineno + 1 in lines
    assert capsys.readouterr().err == f"Own-v0: the env's own code failed in {where}\n"


@pytest.mark.parametrize("rule, says", [
    (lambda next_obs: False, "NumPy array (3, 3) with False"),
    (lambda next_obs: next_obs > 1, "NumPy array (3, 3) with array"),
    (lambda next_obs: next_obs[..., 0], "NumPy array (3, 3) with array"),
    (lambda next_obs: np.asarray(next_obs)[..., 0] > 1, "torch array (3, 3) with array([False"),
    (lambda next_obs: next_obs.sum(-1) * 1.0, "NumPy array (3, 3) with array"),
    (lambda next_obs: next_obs[:, 0] > 1, "NumPy array (2, 4, 3) with array"),
])
def test_a_rule_that_gives_no_bool_per_row_is_refused_at_once(monkeypatch, rule, says):
    monkeypatch.setattr(Own, "terminated_fn", staticmethod(rule), raising=False)
    with pytest.raises(envs.EnvError, match=re.escape(says)) as error:
        envs.make("Own-v0")
    assert str(error.value).startswith("Own-v0: terminated_fn") and "\n" not in str(error.value)


@pytest.mark.parametrize("limit, says", [
    (None, "it has no terminated_fn"), (9.0, "its terminated_fn did not say so"), (0.05, None)])
def test_an_end_that_no_rule_foresees_is_said_once(monkeypatch, capsys, limit, says):
    envs.say_once.cache_clear()
    if limit:
        rule = staticmethod(lambda next_obs: next_obs[..., 0] > limit)
        monkeypatch.setattr(Own, "terminated_fn", rule, raising=False)
    env = make_own(monkeypatch)
    for _ in range(2):
        env.reset(seed=0)
        assert env.step(np.zeros(2, np.float32))[2]
    said = capsys.readouterr().out
    assert said.count("Own-v0 terminated, but") == (says is not None)
    assert (says or "") in said


class Double(gym.ObservationWrapper):
    def observation(self, obs):
        return 2 * obs


class DoubleWithRule(Double):
    @staticmethod
    def terminated_fn(next_obs):
        return next_obs[..., -1] > 0.15


class OwnDict(Own):
    """What it sees has names."""

    def __init__(self):
        super().__init__(Dict({"speed": Box(-9, 9, (2,)), "angle": Box(-9, 9)}),
                         reset_info={"task": 5.0}, info={"task": 5.0})

    def named(self, result):
        return {"speed": result[0][:2], "angle": result[0][2:]}, *result[1:]

    def reset(self, *, seed=None, options=None):
        return self.named(super().reset(seed=seed))

    def step(self, action):
        return self.named(super().step(action))


gym.register("Flat-v0", max_episode_steps=5, entry_point=lambda: FlattenObservation(OwnDict()))
gym.register("Double-v0", max_episode_steps=5, entry_point=lambda: Double(Own()))
gym.register("DoubleWithRule-v0", max_episode_steps=5, entry_point=lambda: DoubleWithRule(
    FlattenObservation(OwnDict())))


@pytest.mark.parametrize("name, oracle, factor, ends", [
    ("Flat-v0", False, 1, False), ("Flat-v0", True, 1, False), ("Double-v0", False, 2, False),
    ("DoubleWithRule-v0", False, 2, True), ("DoubleWithRule-v0", True, 2, True)])
def test_an_env_may_come_in_wrappers_that_change_what_it_shows(name, oracle, factor, ends):
    """The rule is that of the outermost wrapper that has one, about what the agent sees."""
    env = envs.make(name, oracle=oracle)
    shown = np.float32([0.1 * factor] * 3 + [5] * oracle)
    assert np.array_equal(env.reset(seed=0)[0], shown)
    assert np.array_equal(env.step(np.zeros(2, np.float32))[0], shown)
    assert env.observation_space.shape == shown.shape
    assert envs.terminated_fn(env)(shown) == ends and envs.termination_known(env) == ends


def test_a_wrapper_that_hides_from_the_rule_what_it_is_about_is_refused(monkeypatch):
    monkeypatch.setattr(Own, "terminated_fn", lambda self, o: o[..., -1] > 0.05, raising=False)
    with pytest.raises(envs.EnvError, match="^Double-v0: Double changes the observations after"):
        envs.make("Double-v0")
    assert envs.terminated_fn(envs.make("DoubleWithRule-v0")) == DoubleWithRule.terminated_fn


@pytest.mark.parametrize("task, name", [
    (2.0, "task"), (np.array([1.0, -1.0]), "task"), ([True], "task"), (2.0, "next_task")])
def test_an_own_env_that_names_its_task_has_an_oracle(monkeypatch, task, name):
    info = {name: task}
    monkeypatch.setattr(Own, "terminated_fn", lambda self, o: o[..., -1] > 0.05, raising=False)
    monkeypatch.setitem(gym.registry["Own-v0"].kwargs, "reset_info", info)
    monkeypatch.setitem(gym.registry["Own-v0"].kwargs, "info", info)
    env = envs.make("Own-v0", oracle=True)
    shown = np.float32([0.1, 0.1, 0.1, *np.atleast_1d(task)])
    assert env.observation_space == Box(-np.inf, np.inf, shown.shape, np.float32)
    assert np.array_equal(env.reset(seed=0)[0], shown)
    obs = env.step(np.zeros(2, np.float32))[0]
    assert np.array_equal(obs, shown) and obs.dtype == np.float32
    assert envs.terminated_fn(env)(obs)  # the rule sees the env's own observation, not the task


@pytest.mark.parametrize("first, then", [
    ({}, {}), ({"task": 1}, {}), ({"task": "left"}, {"task": "left"}),
    ({"task": [1, 2]}, {"task": 1})])
def test_an_oracle_of_an_env_that_names_no_task_is_refused(monkeypatch, first, then):
    monkeypatch.setitem(gym.registry["Own-v0"].kwargs, "reset_info", first)
    monkeypatch.setitem(gym.registry["Own-v0"].kwargs, "info", then)
    with pytest.raises(envs.EnvError, match=r"^Own-v0: oracle needs info\['task'\]"):
        envs.make("Own-v0", oracle=True)


def test_a_module_that_is_not_the_users_is_named_with_its_file(tmp_path, monkeypatch):
    with pytest.raises(envs.EnvError) as error:
        envs.make("envs:MyEnv-v0")
    message = str(error.value)
    assert f"The module envs is {envs.__file__}, a file of M3PO: give yours another name" in message
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in (("own_empty", ""), ("own_lacks", "import no_such_package")):
        (tmp_path / f"{name}.py").write_text(text)
    importlib.invalidate_caches()
    with pytest.raises(envs.EnvError) as error:
        envs.make("own_empty:MyEnv-v0")
    assert f"The module own_empty is {tmp_path / 'own_empty.py'})" in str(error.value)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):  # its traceback says where
        envs.make("own_lacks:MyEnv-v0")


def test_a_syntax_error_in_the_users_module_names_their_file_and_line(
        tmp_path, monkeypatch, capsys):
    (tmp_path / "own_typo.py").write_text("import gymnasium\n\nclass MyEnv(gymnasium.Env:\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(SyntaxError) as error:
        envs.make("own_typo:MyEnv-v0")
    printed = "".join(traceback.format_exception(error.value))
    assert f'File "{tmp_path}/own_typo.py", line 3\n' in printed  # the last place of all
    assert capsys.readouterr().err == "own_typo:MyEnv-v0: the env's own code failed in making it\n"


def test_an_env_whose_observations_have_another_shape_than_its_space_is_refused(monkeypatch):
    with pytest.raises(envs.EnvError, match=r"reset returned an observation of shape \(3,\)"):
        make_own(monkeypatch, obs=Box(-1, 1, (4,), np.float32))


def test_an_env_without_a_time_limit_gets_one(monkeypatch):
    monkeypatch.setattr(gym.registry["Own-v0"], "max_episode_steps", None)
    assert envs.time_limit(envs.make("Own-v0")) == 1_000
    monkeypatch.setattr(gym.registry["Own-v0"], "max_episode_steps", 5)
    assert envs.time_limit(envs.make("Own-v0")) == 5 and (
        envs.time_limit(envs.make("ant-fwd-bwd")) == 1_000)
    monkeypatch.setattr(gym.registry["Own-v0"], "max_episode_steps", None)
    monkeypatch.setattr(Own, "_max_episode_steps", 3, raising=False)  # which it does not keep to
    env = make_own(monkeypatch, terminated=False)
    env.reset(seed=0)
    assert [env.step(np.zeros(2, np.float32))[3] for _ in range(3)] == [False, False, True]


def test_a_reward_too_large_for_float32_and_a_reset_without_numbers_are_faults(monkeypatch):
    env = make_own(monkeypatch)
    env.reset(seed=0)
    step = Own.step
    monkeypatch.setattr(Own, "step", lambda self, a: (step(self, a)[0], 1e300, False, False, {}))
    assert env.step(np.zeros(2, np.float32))[1:4] == (0.0, False, True)
    monkeypatch.setattr(
        Own, "reset", lambda self, seed=None, options=None: (np.full(3, np.nan), {}))
    with pytest.raises(envs.EnvError, match="non-finite"):
        env.reset(seed=0)


@pytest.mark.filterwarnings("error")
def test_float64_observations_are_cast_without_a_warning(monkeypatch):
    env = make_own(monkeypatch, obs=Box(-0.1, np.full(3, 0.3), dtype=np.float64))
    assert env.observation_space.dtype == np.float32
    obs, _ = env.reset(seed=0)
    assert obs.dtype == np.float32
    assert env.step(np.zeros(2, np.float32))[0].dtype == np.float32


def test_without_a_termination_rule_no_imagined_state_is_terminal(monkeypatch):
    env = make_own(monkeypatch)
    assert not envs.termination_known(env)
    for batch in (np.full((4, 2, 3), np.nan), torch.zeros(4, 2, 3)):
        answer = envs.terminated_fn(env)(batch)
        assert answer.shape == (4, 2) and not answer.any()


@pytest.mark.parametrize("name", ["nope", "no_such_module:X-v0", "Foo-v9", "a:b:c", "", 3])
def test_an_unknown_env_is_answered_with_the_valid_names(name):
    with pytest.raises(envs.EnvError) as error:
        envs.make(name)
    assert "\n" not in str(error.value) and all(valid in str(error.value) for valid in NAMES)


@pytest.mark.parametrize(
    "name, period",
    [("halfcheetah-pier", 5), ("Pendulum-v1", 5), ("ant-fwd-bwd", 0), ("ant-fwd-bwd", 2.5)],
)
def test_a_switch_period_is_refused_where_it_makes_no_sense(name, period):
    with pytest.raises(envs.EnvError, match="switch"):
        envs.make(name, switch_every=period)


@pytest.mark.filterwarnings("ignore:.*symmetric and normalized space")
def test_the_readmes_own_env_works(tmp_path, monkeypatch):
    text = (Path(envs.__file__).parent / "README.md").read_text()
    code = re.search(r"```python\n# my_env\.py\n(.*?)```", text, re.S).group(1)
    (tmp_path / "my_env.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    env = envs.make("my_env:MyEnv-v0")
    check_env(env.unwrapped, skip_render_check=True)
    assert env.spec.max_episode_steps == 200 and envs.termination_known(env)
    rule = envs.terminated_fn(env)
    assert rule(torch.tensor([[0.0], [6.0]])).tolist() == [False, True]
    env.reset(seed=0)
    obs, _, infos = envs_run(env, np.full((200, 1), -1, np.float32))
    assert len(obs) < 200 and rule(obs).tolist() == [False] * (len(obs) - 1) + [True]
    flags = re.search(r"python m3po.py (--env my_env:MyEnv-v0.*)", text).group(1).split()
    parse(*flags)  # the command is valid as it stands; here with tiny sizes
    row = read_rows(run(tmp_path / "a", *flags[:2]))[-1]
    assert math.isfinite(float(row["q_loss"])) and row["eval_right_way"] == "nan"


def test_a_non_finite_reward_or_observation_is_a_fault_in_any_env():
    for where, reason in ((0, "non-finite observation"), (1, "non-finite reward")):
        env = envs.FaultGuard(Own(bad=where))
        first, _ = env.reset(seed=0)
        obs, reward, terminated, truncated, info = env.step(np.zeros(2, np.float32))
        assert (reward, terminated, truncated, info["fault"]) == (0.0, False, True, reason)
        assert np.array_equal(obs, first)
