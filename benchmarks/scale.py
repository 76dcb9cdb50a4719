"""What does not fit a small benchmark: a model of a billion parameters, a thousand lessons, two hundred kept ones.

    python benchmarks/scale.py [--only large listed kept] [--params 1e9] [--src PATH] [--name NAME]

By hand: it takes an hour, 10 GB of memory and 20 GB of disk in the temporary directory. `--src` is the `src` of
another commit (a git worktree): the servers are of that one, the measuring is of this one. Figures are added to
the JSON file under the name of the source tree (`--name`), so that two runs stand beside each other.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parents[1]
PARTS = ("large", "listed", "kept")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    parser.add_argument("--params", type=float, default=1e9, help="parameters of the large model")
    parser.add_argument("--src", type=Path, default=ROOT / "src", help="the source tree of the servers")
    parser.add_argument("--brief", action="store_true", help="the large model is taught one lesson, not two")
    parser.add_argument("--name", default="present", help="what its figures are called")
    parser.add_argument("--lessons", type=int, default=1000, help="entries of the listed home")
    parser.add_argument("--kept", type=int, default=200, help="lessons that are kept in a row")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "scale.json")
    options = parser.parse_args()
    from run import machine

    from secondnature import embedded

    results = json.loads(options.output.read_text()) if options.output.is_file() else {}
    for part in options.only:
        with tempfile.TemporaryDirectory(prefix="secondnature-scale-") as name:
            folder = Path(name)
            if part == "large":
                import large

                model = folder / "model"
                num_parameters = large.write_model(model, options.params, embedded.path())
                found = {"parameters": num_parameters, "shape": large.hold_config(model)}
                found |= large.run(options.src, model, folder, brief=options.brief)
            elif part == "listed":
                import homes

                found = homes.listed(options.src, folder, options.lessons)
            else:
                import homes

                found = homes.kept(options.src, folder, options.kept)
        found |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine()}
        results.setdefault(part, {})[options.name] = found
        options.output.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{part}: {options.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
