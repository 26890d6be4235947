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


def commands():
    """Those of RESULTS that draw into images/, print tables or compare, each once."""
    text = RESULTS.read_text(encoding="utf-8").replace("\n", " ")
    draws = r"[\w.]+ [^`]*(?:--out images/\S+|--table[^`]*)"
    compares = r"-m results\.(?!redraw)[^`]+"
    found = re.findall(f"`(python (?:{draws}|{compares}))`", text)
    return list(dict.fromkeys(found))


def run(command):
    """Bash, because the document's words have {a,b} and seed? in them."""
    line = command.replace("python", f"'{sys.executable}'", 1)
    return subprocess.run(["bash", "-c", line], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})


def in_document(printed):
    """A line that says how many of the table rows in `printed` stand in RESULTS; "" without any."""
    has = set(RESULTS.read_text(encoding="utf-8").splitlines())
    rows = [line in has for line in printed.splitlines() if line.startswith("| ")]
    return f"({sum(rows)} of {len(rows)} rows are those of docs/RESULTS.md)\n" if rows else ""


def main():
    found = commands()
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each only waits for a process
        for command, done in zip(found, pool.map(run, found)):
            print(f"\n$ {command}\n{done.stdout}{in_document(done.stdout)}", end="", flush=True)
            if done.returncode:
                pool.shutdown(cancel_futures=True)
                sys.exit(done.returncode)


if __name__ == "__main__":
    main()
