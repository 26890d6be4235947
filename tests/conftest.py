"""Shared by several files of tests: fakes whose numbers one can check in the head, tiny runs."""

import copy
import csv
import json
import math
import random
import shutil

import gymnasium as gym
import numpy as np
import pytest
import torch
from PIL import Image
from gymnasium.spaces import Box
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

import checkpoint
import drawing
import m3po
from policy import MetaPolicy
from rollouts import Batch, EnvBuffer


torch.set_num_threads(1)  # beside another job a second one waits, spinning, for most of the time


@pytest.fixture(autouse=True)
def same_draws_whatever_ran_before():
    torch.manual_seed(0)


def never_terminates(next_obs):
    return torch.zeros(len(next_obs), dtype=torch.bool)


def random_batch(O, A, L, B, dtype=torch.float32):
    """Random transitions with windows of 0 .. L tokens, right-aligned; every third terminates."""
    length = torch.arange(B) % (L + 1)
    mask = torch.arange(L, -1, -1)[:, None] <= length  # slot L is the own token
    tokens = torch.randn(L + 1, B, O + A + 1, dtype=dtype)
    tokens[..., O:-1] = tokens[..., O:-1].tanh()
    terminated = (torch.arange(B) % 3 == 0).to(dtype)
    return Batch(tokens, mask, torch.randn(B, O, dtype=dtype), terminated)


def fill(D_env, n, lengths=(1, 1, 2, 3, 5, 9, 14), seed=0):
    """n steps with obs = [row, episode, task], action = [row + 0.5], reward = -row, and the task
    changing within episodes. Returns the log, (episode, token, terminated) per row."""
    rng, log = random.Random(seed), []
    episode, left, task = -1, 0, 0
    for row in range(n):
        if left == 0:
            episode, left, by_time_limit = episode + 1, rng.choice(lengths), rng.random() < 0.5
        task = rng.choice([task, task, 1 - task])
        left -= 1
        obs, next_obs = [row, episode, task], [row + 1, episode, 0.25]
        terminated, truncated = left == 0 and not by_time_limit, left == 0 and by_time_limit
        D_env.add(obs, [row + 0.5], -row, next_obs, terminated, truncated)
        log.append((episode, [*obs, row + 0.5, -row], float(terminated)))
    return log


class FakePolicy:
    """a = [a fingerprint of the whole window and o, the number of the call]."""

    def __init__(self):
        self.calls = 0

    @staticmethod
    def fingerprint(tokens, mask, obs):
        slot = torch.arange(1, len(tokens) + 1)[:, None]
        seen = torch.where(mask, slot * tokens[..., 0] + 3 * tokens[..., -1], 0)  # whole numbers
        return seen.sum(0) + 100 * mask.sum(0) + obs[:, 0]

    def act(self, tokens, mask, obs):
        self.calls += 1
        call = torch.full((len(obs),), self.calls - 1.0)
        return torch.stack([self.fingerprint(tokens, mask, obs), call], -1)


class FakeModel:
    """o' = o + 1000, r = the number of the branch; NaN for the (branch, depth) asked for. From
    imagined obs one reads where they come from: depth = obs // 1000, real step = obs % 1000."""

    def __init__(self, nan_reward=(), nan_obs=()):
        self.nan_reward, self.nan_obs = set(nan_reward), set(nan_obs)

    def sample(self, tokens, mask, obs, actions):
        # What the model sees is what the policy saw.
        assert torch.equal(actions[:, 0], FakePolicy.fingerprint(tokens, mask, obs))
        reward, next_obs = torch.arange(float(len(obs))), obs + 1_000
        for b, o in enumerate(obs[:, 0].tolist()):
            if not math.isnan(o) and (b, o // 1_000) in self.nan_reward:
                reward[b] = math.nan
            if not math.isnan(o) and (b, o // 1_000) in self.nan_obs:
                next_obs[b] = math.inf
        return reward, next_obs


def real_steps(n, L, capacity=1_000, length=7, holdout=0.1):
    """obs = [step], action = [0.5, -1], reward = -step; episodes of `length` steps."""
    D_env = EnvBuffer(capacity, 1, 2, L, holdout=holdout)
    for row in range(n):
        D_env.add([row], [0.5, -1], -row, [row + 1], False, row % length == length - 1)
    return D_env


def stored_rows(D_model, n=6_000):
    """What D_model hands out, by (call, branch): (origin, depth, window, mask, own, next, done)."""
    found, batch = {}, D_model.sample(n)
    for b in range(n):
        o, mark, call, member = batch.tokens[-1, b].tolist()
        window, mask = batch.tokens[:-1, b : b + 1], batch.mask[:-1, b : b + 1]
        # The action was chosen from exactly this window.
        assert mark == FakePolicy.fingerprint(window, mask, batch.tokens[-1, b : b + 1, :1]).item()
        found[int(call), int(member)] = (int(o % 1_000), int(o // 1_000), window[:, 0], mask[:, 0],
                                         batch.next_obs[b].item(), batch.terminated[b].item())
    return found


def torch_forward(net, e, tokens, x):
    """Member e's output for one row by torch.nn: tokens [n, D] real ones only, x [I]."""
    D, H = net.token_dim, net.z_dim
    gru = torch.nn.GRU(D, H).to(x.dtype)
    for name, p in (("weight_ih_l0", net.w_x[e].T), ("weight_hh_l0", net.w_h[e].T),
                    ("bias_ih_l0", net.b_x[e, 0]), ("bias_hh_l0", net.b_h[e, 0])):
        getattr(gru, name).data = p.data.contiguous()
    z = gru(tokens[:, None, :D])[1][0, 0] if len(tokens) else torch.zeros(H, dtype=x.dtype)
    layers = []
    for w, b in zip(net.w, net.b):
        layers += [torch.nn.Linear(*w.shape[1:]).to(x.dtype), torch.nn.SiLU()]
        layers[-2].weight.data, layers[-2].bias.data = w[e].T, b[e, 0]
    return z, torch.nn.Sequential(*layers[:-1])(torch.cat([z, x]))


def constant_heads(model, mean, logvar=-60.0):
    """All weights 0: member e predicts mean[e] with variance exp(logvar), whatever it is shown."""
    with torch.no_grad():
        for p in model.net.parameters():
            p.zero_()
        # far from where the soft bounds bend
        model.min_logvar, model.max_logvar = logvar - 20, logvar + 20
        model.net.b[-1][..., : model.obs_dim + 1] = torch.tensor(mean)[:, None, None]
        model.net.b[-1][..., model.obs_dim + 1 :] = logvar
    return model


def spy(monkeypatch, model, name, record):
    """Calls of model.<name> go on as before and are recorded."""
    original = getattr(model, name)

    def spied(*args, **kwargs):
        result = original(*args, **kwargs)
        record.append((args, kwargs, result, copy.deepcopy(model.state_dict())))
        return result

    monkeypatch.setattr(model, name, spied)


def tiny_policy(O=2, A=2, **kwargs):
    """Tiny, in float64, with Q targets that differ from Q and statistics that are not 0 and 1."""
    policy = MetaPolicy(O, A, widths=(8,), z_dim=3, **kwargs).double()
    with torch.no_grad():
        for p in policy.qf_target.parameters():
            p.add_(0.3 * torch.randn_like(p))
        policy.token_mean.normal_(), policy.token_std.uniform_(0.2, 2.0)
    return policy


def slow_standardised(policy, tokens, obs):
    """Number by number what the nets are shown: (x - mean) / std, at most 10 away from 0."""
    mean, std = policy.token_mean, policy.token_std
    shown = lambda x: torch.stack([((x[..., i] - mean[i]) / std[i]).clamp(-10, 10)
                                   for i in range(x.shape[-1])], -1)
    return shown(tokens), shown(obs)


def torch_policy(policy, tokens, mask, obs):
    """pi(. | h) by torch.distributions, for one row: tokens [L, D], mask [L], obs [O]."""
    _, out = torch_forward(policy.actor, 0, tokens[mask], obs)
    mean, log_std = out.split(policy.act_dim)
    gaussian = Normal(mean, log_std.clamp(-10, 2).exp())
    squashed = TransformedDistribution(gaussian, [TanhTransform(cache_size=1)])
    return Independent(squashed, 1), gaussian


def hidden_sign_world(n):
    """n rows of r = sign * a; the sign is drawn per episode of 20 steps and shown nowhere else."""
    D_env = EnvBuffer(n, 1, 1, L=3)
    for row in range(n):
        if row % 20 == 0:
            sign = 1 if torch.rand(()) < 0.5 else -1
        action = (0.5 + torch.rand(1)) * (1 if torch.rand(()) < 0.5 else -1)
        D_env.add(torch.randn(1), action, sign * action.item(), [0.0], False, row % 20 == 19)
    return D_env


def update_case(**kwargs):
    policy = MetaPolicy(2, 2, widths=(8,), **kwargs)
    with torch.no_grad():
        for p in policy.qf_target.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return policy, random_batch(2, 2, L=3, B=32), torch.randn(2, 32, 2)


TINY = ["--N", "2", "--E", "40", "--M", "20", "--G", "2", "--warmup", "40", "--fit-every", "40",
        "--retain", "40", "--width", "8", "--batch-size", "16", "--model-updates", "0.5",
        "--eval-episodes", "2", "--diagnose-every", "0"]


def parse(*flags):
    return m3po.parse_args([str(flag) for flag in flags])


def run(out, *flags):
    """A tiny run in this process; returns its folder."""
    assert m3po.main(*parse(*TINY, *flags, "--out", out)) is None
    return out


def resume_run(folder, *flags):
    assert m3po.main(*parse("--resume", folder, *flags)) is None
    return folder


needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")),
                                    reason="no C++ compiler")


def read_rows(folder, name="progress.csv"):
    with open(folder / name, newline="") as f:
        return [{k: v for k, v in row.items() if not k.startswith("seconds")}
                for row in csv.DictReader(f)]


def state_differences(a, b, path=""):
    """Paths at which two checkpoints differ, NaN equal to NaN."""
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [path]
        return [d for k in a for d in state_differences(a[k], b[k], f"{path}/{k}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [path]
        return [d for i, (x, y) in enumerate(zip(a, b))
                for d in state_differences(x, y, f"{path}/{i}")]
    if torch.is_tensor(a):
        same = a.shape == b.shape and torch.equal(torch.nan_to_num(a.float()),
                                                  torch.nan_to_num(b.float()))
        return [] if same else [path]
    return [] if a == b or a != a and b != b else [path]


def assert_same_run(a, b):
    """Two run folders agree bit for bit: every log but its times, every weight, dataset, stream."""
    states = [checkpoint.read(folder / "checkpoint.pt", "run") for folder in (a, b)]
    for state in states:
        state["progress"].pop("seconds")
        for name in ("out", "resume", "N"):
            state["flags"].pop(name)
    assert state_differences(*states) == []
    assert read_rows(a) == read_rows(b) and read_rows(a, "eval.csv") == read_rows(b, "eval.csv")
    switches = [folder / "switches.csv" for folder in (a, b)]
    assert switches[0].exists() == switches[1].exists()
    assert not switches[0].exists() or switches[0].read_bytes() == switches[1].read_bytes()


class RunEnv(gym.Env):
    """o = (t, a constant); r = 1; what happens at t is set by the test."""

    observation_space = gym.spaces.Box(-1e3, 1e3, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    terminate_at, truncate_at, fail_at = 6, None, None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.t += 1
        reward = math.nan if self.t == self.fail_at else 1.0
        obs = np.array([self.t, 0], np.float32)
        return obs, reward, self.t == self.terminate_at, self.t == self.truncate_at, {}


@pytest.fixture
def run_env(monkeypatch):
    """Register RunEnv with the given behaviour; returns the flag that names it."""
    def register(**behaviour):
        for name, value in behaviour.items():
            monkeypatch.setattr(RunEnv, name, value)
        if "RunEnv-v0" not in gym.registry:
            gym.register("RunEnv-v0", entry_point=RunEnv)
        return ["--env", "RunEnv-v0"]
    return register


def assert_refused(command, flags, says, tmp_path, monkeypatch, capsys):
    """The command's parser ends it with one line that contains `says`, and creates nothing."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        command(flags)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and says in message
    assert list(tmp_path.iterdir()) == []


def train_few_steps(folder, *flags):
    m3po.main(*m3po.parse_args(["--warmup", "30", "--M", "10", "--G", "1", "--width", "16",
                                "--device", "cpu", "--out", str(folder), *flags]))
    return str(folder)


@pytest.fixture(scope="session")
def trained_runs(tmp_path_factory):
    """{"toy", "cheetah"}: run folders of a few dozen env steps."""
    root = tmp_path_factory.mktemp("see")
    return {"toy": train_few_steps(root / "toy", "--N", "2", "--E", "60", "--fit-every", "60",
                                   "--diagnose-every", "1", "--eval-episodes", "3"),
            "cheetah": train_few_steps(root / "cheetah", "--env", "halfcheetah-fwd-bwd",
                                       "--N", "1", "--E", "40", "--eval-episodes", "1",
                                       "--diagnose-every", "0")}


@pytest.fixture(scope="session")
def needs_opengl():
    try:
        drawing.choose_gl()
    except drawing.PlayError as reason:
        pytest.skip(str(reason))


class SeeLamp(gym.Env):
    """The lamp's brightness is how far the push agrees with the hidden sign, redrawn at step 8; 20
    steps. Renders itself; counts how often."""

    metadata = {"render_modes": ["rgb_array", "human"], "render_fps": 20}
    observation_space = Box(0.0, 1.0, (1,), np.float32)
    action_space = Box(0.0, 4.0, (1,), np.float32)
    shown = []

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.sign, self.light = 0, self.np_random.choice((-1, 1)), 0.5
        return np.full(1, self.light, np.float32), {"task": self.sign}

    def step(self, action):
        switched = self.t == 8
        self.sign *= -1 if switched else 1
        self.light = float(np.clip(0.5 + self.sign * (action[0] - 2) / 4, 0, 1))
        self.t += 1
        info = {"task": self.sign, "switched": switched}
        if self.render_mode == "human":
            self.shown.append(self.t)
        return np.full(1, self.light, np.float32), self.light, False, self.t == 20, info

    def render(self):
        self.shown.append(self.t)
        picture = np.zeros((60, 80, 3), np.uint8)
        picture[:, : 4 * self.t] = round(255 * self.light)
        return picture


gym.register("SeeLamp-v0", entry_point=SeeLamp, max_episode_steps=30)


def fake_run(folder, returns=(1.0, 3.0), seed=0, steps=None, **flags):
    """A run folder with a hand-written learning curve, 1,000 env steps between evaluations."""
    folder.mkdir()
    args = vars(m3po.parse_args(["--seed", str(seed), "--out", str(folder / "x")])[0])
    (folder / "config.json").write_text(json.dumps({"flags": args | flags}))
    with open(folder / "progress.csv", "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["epoch", "global_step", "eval_return_mean", "td_error", "seconds_fit"])
        for i, value in enumerate(returns):
            step = steps[i] if steps else 1_000 * (i + 1)
            writer.writerow([i + 1, step, value, "" if i else 0.5, 30.0])
    return folder


def error_line(capsys, module, *argv):
    """The one line on stderr with which a command stops, exit status 2."""
    with pytest.raises(SystemExit) as stop:
        module.main([str(arg) for arg in argv])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith(f"{module.__name__}.py"), err
    return err


def read_image(path, size):
    """Pixels of a picture that has this size and is not blank."""
    image = Image.open(path)
    assert image.size == size
    pixels = np.asarray(image.convert("RGB"), int)
    assert pixels.std() > 5
    return pixels
