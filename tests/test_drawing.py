"""drawing.py: the film of an episode, and its pictures."""

import gymnasium as gym
import numpy as np
import pytest

import drawing
import envs
from tests.conftest import SeeLamp


SIX = [name for name in envs.ENVS if name != "point-fwd-bwd"]


def film_of(name, steps=3):
    film = drawing.Film(envs.make(name))
    film.reset(seed=0)
    for _ in range(steps):
        film.step(np.zeros(film.action_space.shape, np.float32))
    return film


@pytest.mark.parametrize("name", [n for n in SIX if n.endswith(("fwd-bwd", "direc"))])
def test_the_robot_is_blue_forwards_and_red_backwards(needs_opengl, name):
    film = film_of(name)
    for direction, channel in ((1, 2), (-1, 0)):
        film.tasks[-1] = np.array([direction], np.float32)
        stage = drawing.Stage(film)
        pixels = stage.frame(2).astype(int)
        stage.close()
        assert (pixels[..., channel] > pixels[..., 2 - channel] + 80).sum() > 500
        assert (pixels[..., 2 - channel] > pixels[..., channel] + 80).sum() == 0


def test_the_dead_leg_is_red_and_it_is_the_leg_without_force():
    film = film_of("ant-crippled-leg")
    model = film.unwrapped.model
    for leg in range(4):
        film.tasks[0] = np.eye(4, dtype=np.float32)[leg]
        drawing.paint(model, film, 0)
        red = model.geom_rgba[:, 0] > 2 * model.geom_rgba[:, 1]
        moved = {model.joint(j).name for j in range(1, model.njnt)
                 if red[model.geom_bodyid == model.jnt_bodyid[j]].all()}
        assert red.sum() == 3 and moved == {f"hip_{leg + 1}", f"ankle_{leg + 1}"}


@pytest.mark.parametrize("name", SIX)
def test_colouring_does_not_change_the_trajectory(name):
    film, plain = film_of(name, 1), envs.make(name)
    plain.reset(seed=0)
    plain.step(np.zeros(plain.action_space.shape, np.float32))
    rng = np.random.default_rng(0)
    for t in range(40):
        film.tasks[t] = film.unwrapped.draw_task(rng)
        drawing.paint(film.unwrapped.model, film, t)  # the live one, though a copy is painted
        action = rng.uniform(-0.5, 0.5, plain.action_space.shape).astype(np.float32)
        (obs_a, *rest_a, _), (obs_b, *rest_b, _) = film.step(action), plain.step(action)
        assert np.array_equal(obs_a, obs_b) and rest_a == rest_b


def test_a_film_knows_the_switches_and_where_the_point_was():
    film = drawing.Film(envs.make("point-fwd-bwd"))
    film.reset(seed=29)
    infos = [film.step(np.ones(1, np.float32))[4] for _ in range(100)]
    assert film.switches == [t for t, info in enumerate(infos) if info["switched"]] == [52, 77]
    assert np.allclose(np.ravel(film.states), np.minimum(0.1 * np.arange(101), 1.0))  # to the wall
    assert film.colour(51) == drawing.BLUE and film.colour(52) == drawing.RED
    assert film.caption(54) == "step 54   backwards (new 2 steps ago)   reward so far 49"


def test_what_an_own_env_is_replayed_to_is_what_happened():
    film = drawing.Film(envs.make("SeeLamp-v0", oracle=True))
    film.reset(seed=3)
    rng, lights = np.random.default_rng(0), []
    for _ in range(20):
        film.step(rng.uniform(-1, 1, 1).astype(np.float32))
        lights.append(film.unwrapped.light)
    again = [env.unwrapped.light for _, env in drawing.replay(film, "rgb_array")]
    assert again == lights and np.allclose(np.ravel(film.states), [0, *np.cumsum(lights)])
    assert film.switches == [8] and film.words(8) == f"task {film.tasks[8]}"
    assert film.colour(8) == (drawing.BLUE if film.tasks[8] > 0 else drawing.RED) != film.colour(7)


class SwitchLamp(SeeLamp):
    """The sign comes from a TaskClock: redrawn every 5 steps."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.clock = envs.TaskClock(envs.draw_direction, 5)

    def reset(self, *, seed=None, options=None):
        obs, _ = super().reset(seed=seed)
        self.clock.reset(self.np_random)
        return obs, self.clock.reset_info()

    def step(self, action):
        self.t, t = 0, self.t  # SeeLamp's own switch never comes
        self.sign = self.clock.task[0]
        obs, light, _, _, _ = super().step(action)
        self.t = t + 1
        return obs, light, False, self.t == 20, self.clock.step(self.np_random)


gym.register("SwitchLamp-v0", entry_point=SwitchLamp, max_episode_steps=30)


def test_an_own_env_switches_at_the_moments_asked_for_and_so_does_its_replay():
    film = drawing.Film(envs.make("SwitchLamp-v0"))
    envs.switching_clock(film).switch_at = (4, 11)
    film.reset(seed=2)
    lights = []
    for _ in range(20):
        film.step(np.ones(1, np.float32))
        lights.append(film.unwrapped.light)
    assert film.switches == [4, 11] and lights[3] != lights[4] == lights[10] != lights[11]
    assert [env.unwrapped.light for _, env in drawing.replay(film, "rgb_array")] == lights
