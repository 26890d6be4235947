"""The documents: a README of two pages, links that lead somewhere, examples that run."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

import figures
import play
from results import redraw

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "agents/README.md", *sorted((ROOT / "docs").glob("*.md"))]
TINY = ("--N 2 --E 40 --warmup 20 --fit-every 20 --M 4 --G 1 --width 8 --model-updates .1 "
        "--eval-episodes 2 --diagnose-every 1").split()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs") / "run"
    subprocess.run([sys.executable, ROOT / "m3po.py", *TINY, "--out", folder], check=True,
                   capture_output=True)
    return folder


def without_code(text):
    return re.sub(r"```.*?```", "", text, flags=re.S)


def anchors(path):
    """What GitHub makes of the headings of a document: `## 1. A task` is #1-a-task."""
    titles = re.findall(r"^#+ (.*)$", without_code(path.read_text()), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readme_is_two_pages():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200 and len(text.split()) <= 2_000


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_to_a_file_and_a_heading(document):
    links = re.findall(r"\]\(([^)]+)\)", without_code(document.read_text()))
    for link in (link for link in links if "://" not in link):
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readmes_figure_can_be_drawn_in_a_fresh_clone():
    pattern = re.search(r"figures.py curves (results/\S+)", (ROOT / "README.md").read_text())[1]
    assert figures.read_runs(sorted(ROOT.glob(pattern)))[0]["point-fwd-bwd"]


def test_one_command_redraws_every_picture_and_table_of_the_results():
    text = (ROOT / "docs" / "RESULTS.md").read_text()
    found = redraw.commands(text)
    pictures = set(re.findall(r"\]\(\.\./(images/[^)]*)\)", text))
    drawn = {command.split("--out ")[1] for command in found if "--out " in command}
    assert pictures - drawn == {"images/cheetah_strip.png"}  # which an agent plays
    assert sum(command.startswith("python experiments.py --table") for command in found) > 1
    assert sum("results.compare" in command for command in found) > 2
    assert not any("redraw" in command for command in found)  # itself, without an end
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    printed = "\n".join(["After 1 step:", "", rows[0], "|---|", rows[1], rows[1] + " 1 |"])
    assert redraw.in_document(printed, text) == "(2 of 3 rows are those of docs/RESULTS.md)\n"
    assert redraw.in_document("written      images/a.png\n", text) == ""
    for command in found:  # of finished runs alone
        seeds = "/seed*" if "results.compare" in command else ""  # it names the folder of the seeds
        for pattern in re.findall(r"results/\S+", command):
            given = subprocess.run(["bash", "-c", f"ls -d {pattern}{seeds}"], cwd=ROOT, check=True,
                                   capture_output=True, text=True).stdout.split()
            assert all((ROOT / folder / "progress.csv").exists() for folder in given)


@pytest.mark.parametrize("log", ["progress.csv", "eval.csv", "switches.csv"])
def test_logs_md_explains_exactly_the_columns_there_are(run_folder, log):
    with open(run_folder / log, newline="") as f:
        columns = next(csv.reader(f))
    section = (ROOT / "docs" / "LOGS.md").read_text().split(f"\n## {log}\n")[1].split("\n## ")[0]
    explained = []
    for cell in re.findall(r"^\| (`.*?) \|", section, re.M):
        first, *last = re.findall(r"`(\w+)`", cell)
        if last:  # `nll_depth_1` ... `nll_depth_5`
            (stem, low), (_, high) = (name.rsplit("_", 1) for name in (first, *last))
            explained += [f"{stem}_{d}" for d in range(int(low), int(high) + 1)]
        else:
            explained.append(first)
    assert sorted(explained) == sorted(columns)


def test_the_examples_of_acting_run(run_folder):
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "USING.md").read_text(), re.S)
    acting = [code for code in examples if "runs/DIR" in code]
    assert len(acting) == 2
    for code in acting:
        exec(code.replace("runs/DIR", str(run_folder)), {})


def test_the_example_of_an_exported_policy_runs(run_folder, tmp_path):
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"it needs {package}")
    play.main([str(run_folder), "--export", str(tmp_path / "policy.onnx")])
    text = (ROOT / "docs" / "USING.md").read_text()
    code = next(c for c in re.findall(r"```python\n(.*?)```", text, re.S) if "onnx" in c)
    names = {}
    exec(code.replace("policy.onnx", str(tmp_path / "policy.onnx")), names)
    assert names["truncated"] and names["action"].shape == (1,)


def test_the_readmes_commands_name_folders_that_a_clone_has():
    text = (ROOT / "README.md").read_text()
    commands = "".join(re.findall(r"```\w*\n(.*?)```", text, re.S))
    folders = re.findall(r"\b((?:agents|results)/\S+)", commands)
    assert {folder.split("/")[0] for folder in folders} == {"agents", "results"}
    for folder in folders:
        assert list(ROOT.glob(folder)), folder
