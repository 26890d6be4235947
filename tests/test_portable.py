"""macOS and Windows: training asks for what only Linux has, and does without."""

import re
import subprocess
import sys
from pathlib import Path

from tests.conftest import TINY, assert_same_run

ROOT = Path(__file__).parents[1]
WITHOUT = """
import ctypes, errno, importlib, multiprocessing.context, os, pathlib, signal, sys, warnings
for name in ("torch", "gymnasium", "mujoco", "numpy", "tqdm"):  # they know where they are
    importlib.import_module(name)

for name in dir(os):
    if name.startswith("sched_") or name in "fork forkpty killpg nice setsid uname".split():
        delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGALRM", "SIGCHLD", "SIGUSR1", "SIGUSR2", "SIGSTOP"):
    delattr(signal, name)
for name in ("fcntl", "grp", "pty", "pwd", "resource", "termios"):
    sys.modules[name] = None  # its import fails
del multiprocessing.context._concrete_contexts["fork"]
asked = []

def refusing(function, refuses, error):
    def call(path, *args, **kwargs):
        if refuses(path):
            asked.append(path)
            raise error
        return function(path, *args, **kwargs)
    return call

folder = lambda path: isinstance(path, (str, os.PathLike)) and os.path.isdir(path)
of_proc = lambda path: isinstance(path, (str, os.PathLike)) and str(path).startswith("/proc")
os.open = refusing(os.open, folder, PermissionError(errno.EACCES, "Permission denied"))
os.stat = refusing(os.stat, of_proc, FileNotFoundError(errno.ENOENT, "No such file"))
ctypes.CDLL = refusing(ctypes.CDLL, lambda name: name is None, TypeError("no name"))
ours = "|".join(path.stem for path in pathlib.Path().glob("*.py"))
warnings.filterwarnings("error", category=EncodingWarning, module=f"({ours})$")

import evaluation, figures, logs, m3po
run = lambda *argv: m3po.main(*m3po.parse_args(argv))
"""


def test_training_and_resume_need_nothing_that_windows_or_macos_lack(tmp_path):
    """An own env, whose evaluation is dealt to as many processes as there are cores where it can
    be."""
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)[1]
    (tmp_path / "my_env.py").write_text(example)
    flags = [*TINY, "--env", "my_env:MyEnv-v0", "--eval-episodes", "4"]
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    code = WITHOUT + (
        "assert not evaluation.can_fork()\n"
        f"run(*{flags}, '--N', '3', '--out', {a!r})\n"
        f"run(*{flags}, '--out', {b!r})\n"
        f"run('--resume', {b!r}, '--N', '3')\n"
        f"figures.read_runs([{a!r}])\n"
        "print(logs.cpu_name())\n"
        f"assert {{{a!r}, '/proc/cpuinfo'}} <= {{str(path) for path in asked}}\n")
    done = subprocess.run([sys.executable, "-X", "warn_default_encoding", "-c", code], cwd=ROOT,
                          env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(tmp_path / "a", tmp_path / "b")
