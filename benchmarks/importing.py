"""How long `secondnature import` takes for a large file: python benchmarks/importing.py [ROWS].

Prints seconds by the clock, seconds of processor time and the largest memory of the command, which is a process of
its own.
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = [
    "tabs",
    "spaces",
    "use",
    "please",
    "the",
    "a",
    "function",
    "in",
    "file",
    "write",
    "read",
    "test",
    "value",
    "list",
    "sort",
    "order",
    "name",
    "python",
]


def write(path: Path, rows: int) -> None:
    """Conversations of about 500 bytes a line."""
    draw = random.Random(0)

    def text(words: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(words))

    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            turns = [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"{text(30)} {i}"},
                {"role": "assistant", "content": text(40)},
            ]
            file.write(json.dumps({"messages": turns, "source": "x"}) + "\n")


def main() -> None:
    """Measure once."""
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "rows.jsonl", Path(folder) / "corrections.jsonl"
        write(path, rows)
        begun = time.monotonic()
        command = [sys.executable, "-m", "secondnature.cli", "import", str(path), "--out", str(out), "--yes"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        took = time.monotonic() - begun
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(f"{rows:,} rows, {path.stat().st_size / 1e6:.1f} MB: {took:.1f} s by the clock")
        print(
            f"{used.ru_utime + used.ru_stime:.1f} s of processor time, {used.ru_maxrss / 1024:.0f} MB at most"
        )


if __name__ == "__main__":
    main()
