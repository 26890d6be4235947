"""Every picture and table of docs/RESULTS.md that a command there makes, from results/ alone.

    python -m results.redraw

It runs the document's own commands from the repository's root, one per core at a time. Under each
table it says whether the document has its rows.
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "RESULTS.md"


def commands(text):
    """Those in RESULTS that draw into images/, print tables or compare, each once."""
    draws = r"[\w.]+ [^`]*(?:--out images/\S+|--table[^`]*)"
    compares = r"-m results\.(?!redraw)[^`]+"
    found = re.findall(f"`(python (?:{draws}|{compares}))`", text.replace("\n", " "))
    return list(dict.fromkeys(found))


def run(command):
    """Bash, because the document's words have {a,b} and seed? in them."""
    line = command.replace("python", f"'{sys.executable}'", 1)
    return subprocess.run(["bash", "-c", line], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})


def in_document(printed, text):
    """A line that says how many table rows of `printed` stand in RESULTS, its text; "" if none is
    printed."""
    lines = set(text.splitlines())
    rows = [line in lines for line in printed.splitlines() if line.startswith("| ")]
    return f"({sum(rows)} of {len(rows)} rows are those of docs/RESULTS.md)\n" if rows else ""


def main():
    text = RESULTS.read_text(encoding="utf-8")
    found = commands(text)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each only waits for a process
        for command, done in zip(found, pool.map(run, found)):
            said = done.stdout + in_document(done.stdout, text)
            print(f"\n$ {command}\n{said}", end="", flush=True)
            if done.returncode:
                pool.shutdown(cancel_futures=True)
                sys.exit(done.returncode)


if __name__ == "__main__":
    main()
