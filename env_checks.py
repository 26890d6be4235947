"""What M3PO asks of an env that is not its own: checked with one trial step, before training.

What cannot work is refused by name, in one line (EnvError). An exception out of the env's own code
keeps its traceback, which its author needs to mend it, below a line that names the env.
"""

import contextlib
import inspect
import sys
from pathlib import Path

import numpy as np
from gymnasium import ObservationWrapper
from gymnasium.spaces import Box
from gymnasium.wrappers import OrderEnforcing, TimeLimit


# Of info, where an env has them: by these evaluation says how the agent adapts.
ADAPTING = "steps_since_switch", "switched", "right_way"


class EnvError(ValueError):
    """An env that M3PO cannot use, or that does not exist. The message is one line."""


@contextlib.contextmanager
def own_code(name, where):
    """Names the env above the traceback of whatever its own code raises in here."""
    try:
        yield
    except EnvError:
        raise
    except Exception as error:
        print(f"{name}: the env's own code failed in {where}", file=sys.stderr, flush=True)
        error.add_note(f"in the own code of {name}")  # by which play.load knows it
        raise


def why_not(name, error, loaded):
    """Why gym.make(name) failed, as one line; `loaded` are the modules that were there before.

    Raises the error again if it is that of the user's module, which lacks a package of its own.
    """
    reason = " ".join(str(error).split())
    module = str(name).partition(":")[0]
    missing = getattr(error.__cause__, "name", None) or module
    if module != missing and not module.startswith(f"{missing}."):
        raise error
    file = getattr(sys.modules.get(module), "__file__", None)
    if ":" not in str(name):
        return reason
    if file is None:
        return f"{reason} Is {module}.py beside m3po.py, or its folder on PYTHONPATH?"
    ours = module in loaded and Path(file).parent == Path(__file__).parent
    return (f"{reason} The module {module} is {file}"
            + (", a file of M3PO: give yours another name" if ours else ""))


def check_env(name, env, oracle):
    """Raises EnvError if M3PO cannot learn in this env, saying why.

    Steps it once, outside the wrappers that gym.make puts around it; callers reset before use.
    Returns how many numbers info["task"] holds if `oracle` asks for it, else 0.
    """
    check_spaces(name, env.observation_space, env.action_space)
    while isinstance(env, (TimeLimit, OrderEnforcing)):
        env = env.env
    shape = env.observation_space.shape
    parameters = inspect.signature(env.unwrapped.reset).parameters.values()
    if not {"seed", "options"} <= {p.name for p in parameters} and not any(
            p.kind == p.VAR_KEYWORD for p in parameters):
        raise EnvError(f"{name}: old API: reset must take seed and options and return (obs, info)")
    with own_code(name, "its first reset"):
        first = env.reset(seed=0)
    if not (isinstance(first, tuple) and len(first) == 2):
        raise EnvError(f"{name}: old API: reset must return (obs, info)")
    with own_code(name, "its first step"):
        result = env.step(env.action_space.sample())
    if not (isinstance(result, tuple) and len(result) == 5):
        raise EnvError(
            f"{name}: old API: step must return (obs, reward, terminated, truncated, info)")
    for what, obs, info in (("reset", *first), ("step", result[0], result[4])):
        if np.shape(obs) != shape:
            raise EnvError(f"{name}: {what} returned an observation of shape {np.shape(obs)}, its "
                           f"space says {shape}")
        if not isinstance(info, dict):
            raise EnvError(f"{name}: {what} returned {said(info)} as info; M3PO needs a dict")
    for what, value, kinds, needs in (("reward", result[1], "fiub", "a number"),
                                      ("terminated", result[2], "biu", "a bool"),
                                      ("truncated", result[3], "biu", "a bool")):
        if np.asarray(value).shape != () or np.asarray(value).dtype.kind not in kinds:
            raise EnvError(f"{name}: step returned {said(value)} as {what}; M3PO needs {needs}")
    check_adapting(name, env, result[4])
    check_rule(name, env, first[0])
    return task_size(name, first[1], result[4]) if oracle else 0


def said(value):
    """A value in a message of one line."""
    return " ".join(repr(value).split())[:60]


def check_spaces(name, observation_space, action_space):
    for what, space in (("observation", observation_space), ("action", action_space)):
        if not isinstance(space, Box):
            kind = type(space).__name__
            flatten = what == "observation" and kind in ("Dict", "Tuple")
            cure = "; gymnasium.wrappers.FlattenObservation makes it one" if flatten else ""
            raise EnvError(f"{name}: {kind} {what} space; M3PO needs a Box of one axis{cure}")
        if len(space.shape) != 1:
            image = " (an image?)" if what == "observation" and len(space.shape) > 1 else ""
            raise EnvError(f"{name}: {what} shape {space.shape}{image}; M3PO needs one axis")
        if space.shape == (0,):
            raise EnvError(f"{name}: the {what} space has no dimensions; M3PO needs at least one")
    if not action_space.is_bounded("both"):
        raise EnvError(f"{name}: unbounded action space; M3PO needs a finite low and high")
    if not np.issubdtype(action_space.dtype, np.floating):
        raise EnvError(f"{name}: {action_space.dtype} actions; M3PO needs floats")
    empty = np.flatnonzero(action_space.low >= action_space.high)
    if len(empty):
        i = empty[0]
        raise EnvError(f"{name}: action dimension {i} reaches from {action_space.low[i]:g} to "
                       f"{action_space.high[i]:g}; M3PO needs low < high")


def check_adapting(name, env, info):
    """What evaluation reads to say how the agent adapts, where the env has it."""
    for key in ADAPTING:
        if info.get(key) is None:
            continue
        value = np.asarray(info[key])
        if value.shape != () or value.dtype.kind not in "fiub":
            raise EnvError(f"{name}: step returned {said(info[key])} as info[{key!r}]; M3PO needs "
                           "a number or a bool")
    every = getattr(env.unwrapped, "switch_every", None)
    if every is not None and not (isinstance(every, (int, np.integer)) and every >= 1):
        raise EnvError(f"{name}: its switch_every is {said(every)}; M3PO needs a whole number of "
                       "env steps, or None")


def check_rule(name, env, obs):
    """The env's terminated_fn, if it has one, must answer [..., O] of both kinds with bools [...].
    It is asked about what the agent sees, so no wrapper around it may change observations."""
    if not env.has_wrapper_attr("terminated_fn"):
        return
    outer = env
    while not hasattr(outer, "terminated_fn"):
        if isinstance(outer, ObservationWrapper):
            raise EnvError(f"{name}: {type(outer).__name__} changes the observations after "
                           "terminated_fn; give that wrapper a terminated_fn of its own")
        outer = outer.env
    import torch  # here: the envs themselves need none
    for shape in ((3,), (2, len(obs) + 1)):  # where [:, 0] is not [..., 0]
        batch = np.broadcast_to(obs, (*shape, len(obs))).astype(np.float32)
        for kind, next_obs, bools in (("NumPy", batch, np.bool_),
                                      ("torch", torch.tensor(batch), torch.bool)):
            with own_code(name, f"terminated_fn, asked about a {kind} array {batch.shape}"):
                dead = outer.terminated_fn(next_obs)
            if not isinstance(dead, type(next_obs)) or dead.shape != shape or dead.dtype != bools:
                raise EnvError(f"{name}: terminated_fn answered a {kind} array {batch.shape} with "
                               f"{said(dead)}; M3PO needs a {kind} array {shape} of bools")


def task_size(name, *infos):
    """How many numbers the task has in the infos of reset and step."""
    shown = [info.get("next_task", info.get("task")) for info in infos]
    tasks = [np.asarray(task) for task in shown]
    if not all(task.dtype.kind in "fiub" and task.ndim <= 1 and task.size for task in tasks) or (
            tasks[0].size != tasks[1].size):
        raise EnvError(f"{name}: oracle needs info['task'] or info['next_task'] from reset and "
                       f"step, a number or a vector, got {' and '.join(map(said, shown))}")
    return tasks[0].size
