"""agents/: trained agents that a fresh clone can watch."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import checkpoint
import play

AGENTS = Path(__file__).parents[1] / "agents"
README = (AGENTS / "README.md").read_text()
FOLDERS = sorted(path for path in AGENTS.iterdir() if path.is_dir())


def assert_fit_for_git(folder):
    """Two small files that agree and name no path of the machine they come from."""
    assert sorted(path.name for path in folder.iterdir()) == ["agent.pt", "config.json"]
    assert (folder / "agent.pt").stat().st_size < 2_000_000
    agent = checkpoint.read(folder / "agent.pt", "agent")
    config = json.loads((folder / "config.json").read_text())
    assert agent.keys() == {"version", "kind", "method", "flags", "step", "policy", "model"}
    assert agent["flags"] == config["flags"]
    for value in json.dumps(config), str(agent["flags"]):
        assert not re.search(r"[\"'](/|~|[A-Z]:\\)", value), value


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_an_agent_plays_and_is_explained(folder, capsys):
    assert_fit_for_git(folder)
    play.main([str(folder), "--episodes", "1"])
    assert "episode   0  return" in capsys.readouterr().out
    assert README.count(f"| `{folder.name}` | `python ") == 1


def test_the_toys_agent_adapts_to_switches_that_one_asks_for(capsys):
    play.main([str(AGENTS / "point-fwd-bwd"), "--switch-at", "20", "40", "60", "80"])
    printed = capsys.readouterr().out
    assert float(re.search(r"return +([\d.]+) \+-", printed)[1]) > 60  # 4 switches; chance is 0
    cost = [int(steps) for steps in re.findall(r"the wrong way for (\d+) env steps", printed)]
    assert len(cost) == 4 and max(cost) <= 5


def test_the_way_to_add_an_agent_works(trained_runs, tmp_path):
    copied = tmp_path / "agents" / "ENV"
    copied.mkdir(parents=True)
    for name in ("agent.pt", "config.json"):
        shutil.copy(Path(trained_runs["cheetah"]) / name, copied)
    with pytest.raises(AssertionError):
        assert_fit_for_git(copied)  # --out was absolute
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert_fit_for_git(copied)
