"""schemathesis against the OpenAPI document of a real server: `python tests/fuzz/run.py [CASES] [SEED]`.

Every operation of the document, with the key, half of the cases valid and half not, over the network to a server
process with a tiny model. Checked after each case: no 5xx; an error has type, message and hint; a refused request
wrote nothing (lines of the ledger, lessons, and the version of the weights are those from before it); an accepted
one wrote what its answer says. A job that was accepted is cancelled, which must give back the weights. Nothing is
left out of the document. Prints a table; exits 1 on the first broken rule, with the case as a curl command.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import schemathesis  # pyright: ignore[reportMissingImports]  (an extra of its own)
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.generation import GenerationMode  # pyright: ignore[reportMissingImports]
from tiny_server import KEY, make_talker, process

from secondnature.wire import Client

DEFAULT_CASES = 2000


class Watch:
    """What the server has written, and whether that is what it said."""

    def __init__(self, home: Path, client: Client) -> None:
        self.home, self.client = home, client
        self.version = client.lessons().weights_version
        self.counts: Counter[tuple[str, str]] = Counter()
        self.slowest_s = 0.0

    def written(self) -> tuple[int, int]:
        """(corrections in the ledger, lessons), on disk."""
        ledger = self.home / "ledger.jsonl"
        lines = ledger.read_bytes().count(b"\n") if ledger.exists() else 0
        return lines, len(list((self.home / "lessons").iterdir()))

    def check(self, case: Any, label: str) -> None:
        """Send one case and hold the server to its answer."""
        before = self.written()
        began = time.monotonic()
        response = case.call(headers={"Authorization": f"Bearer {KEY}"}, timeout=120)
        self.slowest_s = max(self.slowest_s, time.monotonic() - began)
        status = response.status_code
        self.counts[label, str(status)] += 1
        how = f"{status} {response.text[:500]}\n{case.as_curl_command()[:3000]}"
        assert status < 500, f"the server failed: {how}"
        if status >= 400:
            error = response.json()["error"]
            assert set(error) == {"type", "message", "hint"}, how
            assert error["message"], how
            assert self.written() == before, f"a refused request wrote: {how}"
        elif label == "POST /v1/train" and response.json()["lesson"]:
            assert self.written() == (before[0], before[1] + 1), how
            self.client.cancel(response.json()["job"])
        elif label == "POST /v1/corrections":
            assert self.written() == (before[0] + len(response.json()["corrections"]), before[1]), how
        elif label == "POST /v1/feedback":
            assert self.written() == (before[0] + 1, before[1]), how
        else:
            assert self.written() == before, how
        if status >= 400 or label == "POST /v1/train":
            found = self.client.health()
            assert (found.weights_version, found.status) == (self.version, "ok"), f"{found} after {how}"


def run(operation: Any, watch: Watch, mode: GenerationMode, cases: int, start: int) -> None:
    """So many cases of one operation."""

    @seed(start)
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=[*HealthCheck],  # pyright: ignore[reportArgumentType]
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def test(case: Any) -> None:
        watch.check(case, operation.label)

    with contextlib.suppress(Unsatisfiable):  # an operation without input has no invalid one
        test()


def main(num_cases: int, start: int) -> int:
    """The exit status."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        model = make_talker(Path(name) / "model")  # trained: its answers end
        with process(Path(name) / "home", model) as server, server.connect(timeout_s=300) as client:
            watch = Watch(server.home, client)
            schema = schemathesis.openapi.from_url(f"{client.url}/openapi.json")
            operations = [found.ok() for found in schema.get_all_operations()]  # pyright: ignore[reportAttributeAccessIssue]
            bodies = [o for o in operations if list(o.body)]
            inputs = [o for o in operations if list(o.iter_parameters()) and o not in bodies]
            modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
            each = -(
                -num_cases * 5 // (8 * (3 * len(bodies) + len(inputs)))
            )  # a quarter more: inputs run out
            for operation in operations:  # those with a body get three times as many
                for mode in modes:
                    run(operation, watch, mode, 3 * each if operation in bodies else each, start)
                print(f"{operation.label}: {watch.counts.total():,} cases", flush=True)
            assert watch.counts.total() >= num_cases, f"only {watch.counts.total():,} cases"
            print(f"\n{'operation':34} answers")
            for operation in operations:
                answers = {s: n for (label, s), n in sorted(watch.counts.items()) if label == operation.label}
                print(f"{operation.label:34} {'  '.join(f'{s}: {n}' for s, n in answers.items())}")
            print(
                f"{watch.counts.total():,} cases, seed {start}: no 5xx, nothing written by a refused request; "
                f"{watch.written()[0]:,} corrections and {watch.written()[1]:,} lessons accepted; slowest answer "
                f"{watch.slowest_s:.1f} s; weights {watch.version} as at the start"
            )
    return 0


if __name__ == "__main__":
    given_numbers = [int(x) for x in sys.argv[1:]]
    sys.exit(main(*(given_numbers + [DEFAULT_CASES, 0][len(given_numbers) :])))
