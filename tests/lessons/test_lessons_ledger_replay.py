"""The ledger loses nothing that was acknowledged; the replay mix deals fairly and repeatably."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from failing_disk import disk

from secondnature.errors import BadInput, StorageError
from secondnature.lessons.ledger import Ledger
from secondnature.records import Correction
from secondnature.train.batches import MAX_BATCH, batches, num_replayed


def correction(text: str) -> Correction:
    return Correction.model_validate({"prompt": "Paint it red.", "completion": text})


def test_what_was_added_is_there_after_a_restart(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    added = ledger.add([correction("one"), correction("two\nlines")])
    found = [x.correction for x in added]
    assert Ledger(tmp_path / "ledger.jsonl").all() == found
    assert len({c.id for c in found}) == 2


def test_a_torn_line_spoils_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path).add([correction("one")])
    with path.open("a") as file:
        file.write('{"prompt": [{"role"')
    ledger = Ledger(path)
    assert ledger.num_torn == 1
    ledger.add([correction("two")])
    again = Ledger(path)
    assert [c.chosen[0].content for c in again.all() if c.chosen] == ["one", "two"]
    assert (again.num_torn, again.unreadable) == (0, [])


UNREADABLE = {
    "not JSON": '{"prompt": [{"role"',
    "prompt": '{"prompt": [], "rating": 1}',
    "not a JSON object": "[1, 2]",
    "reads up to 2": '{"prompt": "a", "chosen": "b", "schema_version": 3}',
    "does not say which": '{"schema_version": 2, "deleted_at": "2026-01-02"}',
}


@pytest.mark.parametrize("reason", UNREADABLE)
def test_a_whole_line_that_cannot_be_read_stays_and_is_said(
    tmp_path: Path, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path).add([correction("one")])
    with path.open("a") as file:
        file.write(UNREADABLE[reason] + "\n")
    Ledger(path).add([correction("two")])
    told = path.read_text()
    ledger = Ledger(path)
    assert [c.chosen[0].content for c in ledger.all() if c.chosen] == ["one", "two"]
    assert ledger.num_torn == 0
    ((number, found),) = ledger.unreadable
    assert number == 2
    assert re.search(reason, found)
    assert f"{path}, line 2 cannot be read" in caplog.text
    ledger.add([correction("three"), correction("four")])  # written anew, and nothing is dropped
    assert path.read_text().startswith(told)
    assert [n for n, _ in Ledger(path).unreadable] == [2]


def test_a_field_of_a_newer_version_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    (added,) = Ledger(path).add([correction("one")])
    path.write_text(json.dumps(json.loads(path.read_text()) | {"severity": 3}) + "\n")
    told = path.read_text()
    ledger = Ledger(path)
    assert (ledger.num_torn, ledger.unreadable) == (0, [])
    assert [c.digest() for c in ledger.all()] == [added.correction.digest()]
    ledger.add([correction("two"), correction("three")])
    assert path.read_text().startswith(told)


def test_what_the_ledger_holds_is_what_is_on_the_disk_whichever_call_fails(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    for new in (["two"], ["two", "three"]):
        for n in range(30):
            path.unlink(missing_ok=True)
            ledger = Ledger(path)
            ledger.add([correction("one")])
            told = ""
            with disk(n) as calls:
                try:
                    ledger.add([correction(text) for text in new])
                except StorageError as e:
                    told = type(e).__name__
            assert ledger.all() == Ledger(path).all()
            assert len(ledger.all()) == (1 if told == "StorageError" else 1 + len(new))
            if len(calls.made) <= n:
                assert told == ""
                break
            assert told
        else:
            raise AssertionError("more calls than were counted on")


def test_a_full_disk_refuses_and_keeps_the_old(tmp_path: Path) -> None:
    code = f"""
import resource, signal
from pathlib import Path
from secondnature.lessons.ledger import Ledger
from secondnature.errors import StorageError
from secondnature.records import Correction
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
ledger = Ledger(Path({str(tmp_path)!r}) / "ledger.jsonl")
ledger.add([Correction.model_validate({{"prompt": "a", "completion": "b"}})])
resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))
try:
    ledger.add([Correction.model_validate({{"prompt": "a" * 1000, "completion": "b"}})])
except StorageError as e:
    print("refused:", e)
print(len(ledger.all()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.startswith("refused:")
    assert done.stdout.rstrip().endswith("1")
    assert len(Ledger(tmp_path / "ledger.jsonl").all()) == 1
    assert (tmp_path / "ledger.jsonl").read_bytes().endswith(b"\n")
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 400


def test_a_batch_has_a_largest_size() -> None:
    """Replay included: a share close to 1 would deal billions."""
    assert num_replayed(1, 1 - 1 / MAX_BATCH) == MAX_BATCH - 1
    assert num_replayed(1024, 0.75) == 3072
    for size, share in ((1024, 0.9999999), (1, 1 - 1 / (2 * MAX_BATCH)), (1024, 0.751)):
        with pytest.raises(BadInput, match=f"replay.share {share} with a batch_size of {size} makes"):
            num_replayed(size, share)
    with pytest.raises(BadInput):
        next(batches(8, 3, batch_size=8, steps=1, share=0.9999999, seed=0))
    assert len(list(batches(8, 0, batch_size=8, steps=1, share=0.9999999, seed=0))) == 1  # nothing to replay


def test_every_example_is_dealt_once_an_epoch() -> None:
    dealt = list(batches(6, 0, batch_size=3, steps=4, share=0.25, seed=3))
    first, second = dealt[0][0] + dealt[1][0], dealt[2][0] + dealt[3][0]
    assert sorted(first) == sorted(second) == list(range(6))
    assert first != second
    assert all(old == [] for _, old in dealt)
    assert dealt == list(batches(6, 0, batch_size=3, steps=4, share=0.25, seed=3))
    assert dealt != list(batches(6, 0, batch_size=3, steps=4, share=0.25, seed=8))


@pytest.mark.parametrize(
    ("share", "size", "expected"), [(0.25, 6, 2), (0.5, 4, 4), (0.25, 1, 1), (0.0, 6, 0)]
)
def test_the_share_of_replay(share: float, size: int, expected: int) -> None:
    dealt = list(batches(size, 50, batch_size=size, steps=50, share=share, seed=0))
    assert {len(old) for _, old in dealt} == {expected}
    counts = Counter(i for _, old in dealt for i in old)
    assert not counts or max(counts.values()) - min(counts.get(i, 0) for i in range(50)) <= 1
