"""Every picture and table of docs/RESULTS.md that a command there makes, from results/ alone.

    python -m results.redraw

It runs the document's own commands, one after the other, from the repository's root.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def commands():
    """Those of docs/RESULTS.md that draw into images/, print tables or compare, each once."""
    text = (ROOT / "docs" / "RESULTS.md").read_text(encoding="utf-8").replace("\n", " ")
    draws, compares = r"[\w.]+ [^`]*(?:--out images/\S+|--table)", r"-m results\.(?!redraw)[^`]+"
    found = re.findall(f"`(python (?:{draws}|{compares}))`", text)
    return list(dict.fromkeys(found))


def main():
    for command in commands():
        print(f"\n$ {command}", flush=True)
        # Bash, because the document's words have {a,b} and seed? in them.
        line = command.replace("python", f"'{sys.executable}'", 1)
        subprocess.run(["bash", "-c", line], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
