"""The home belongs to one model, and its lessons to one engine's weights."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator
from pathlib import Path

import pytest
from failing_disk import disk
from old_home import BASE_VERSION, FINGERPRINT, write_old_home
from old_home import MODEL as MODEL_OF_OLD
from tiny_server import file_hashes, running, teach

from secondnature.errors import BadCheckpoint, ConfigError, DamagedFile, HomeInUse, StorageError, TooNew
from secondnature.lessons.home import Home
from secondnature.lessons.ledger import Ledger
from secondnature.lessons.log import Log
from secondnature.records import Correction


@pytest.fixture
def home(tmp_path: Path) -> Generator[Home]:
    found = Home(tmp_path / "home")
    yield found
    found.close()


MODEL = Path("/models/one")


def test_the_same_model_may_come_back(home: Home) -> None:
    for _ in range(2):
        home.bind(MODEL, "print", "wone", "vllm")
    known = json.loads((home.path / "home.json").read_text())
    assert known == {
        "model": str(MODEL),
        "fingerprint": "print",
        "base_version": "wone",
        "engine": "vllm",
        "format": 2,
    }


def test_another_engine_with_other_bytes_is_told_what_to_do(home: Home) -> None:
    home.bind(MODEL, "print", "wbf16", "local")
    with pytest.raises(BadCheckpoint, match=r"of the local engine.*other dtypes.*vllm engine") as caught:
        home.bind(MODEL, "print", "wfp32", "vllm")
    assert "--engine local" in caught.value.hint
    assert f"{home.model_root}/current" in caught.value.hint


def test_another_engine_with_the_same_bytes_is_welcome(home: Home) -> None:
    """A dense model is bf16 in both: its lessons are the same differences of the same bytes."""
    home.bind(MODEL, "print", "wone", "local")
    home.bind(MODEL, "print", "wone", "vllm")


def test_a_home_of_an_older_version_is_the_local_engines(home: Home) -> None:
    old = {"model": str(MODEL), "fingerprint": "print", "base_version": "wone"}
    (home.path / "home.json").write_text(json.dumps(old))
    home.bind(MODEL, "print", "wone")
    with pytest.raises(BadCheckpoint, match="of the local engine"):
        home.bind(MODEL, "print", "wtwo", "vllm")


@pytest.mark.parametrize(
    ("fingerprint", "version", "what"), [("other", "wone", "architecture"), ("print", "wtwo", "weights")]
)
def test_another_model_is_refused(home: Home, fingerprint: str, version: str, what: str) -> None:
    home.bind(MODEL, "print", "wone")
    with pytest.raises(BadCheckpoint, match=f"its {what}"):
        home.bind(MODEL, fingerprint, version)


def test_a_second_server_is_refused_until_the_first_one_ends(home: Home) -> None:
    home.announce("http://127.0.0.1:1")
    with pytest.raises(HomeInUse, match=r"in use by another server \(process \d+, http://127\.0\.0\.1:1\)"):
        Home(home.path)
    home.close()
    Home(home.path).close()


# ------------------------------------------------------------------------------------ forms of a home


def test_a_home_of_the_version_before_formats_opens(tmp_path: Path) -> None:
    """Everything is read; home.json gets its number and is kept as it was, a table moves beside its lesson."""
    path = write_old_home(tmp_path / "home")
    before = dict(file_hashes(path))
    home = Home(path)
    try:
        home.bind(MODEL_OF_OLD, FINGERPRINT, BASE_VERSION)
        log, ledger = Log(home, MODEL_OF_OLD, BASE_VERSION), Ledger(home.ledger_path)
        assert [(x.id, x.state) for x in log.all()] == [("0001-use", "undone"), ("0002-use", "kept")]
        kept, undone = log.detail("0002-use"), log.detail("0001-use")
        assert len(kept.corrections) == 4
        assert [m["kind"] for m in kept.metrics] == ["step", "step", "kl", "kl"]
        assert len(kept.answers) == 2
        assert undone.evidence is not None
        assert undone.evidence.verdict == "inconclusive"
        assert [c.feedback for c in ledger.all()] == [None, "Just do it."]
        assert (ledger.num_torn, ledger.unreadable) == (0, [])
    finally:
        home.close()
    after = dict(file_hashes(path))
    assert after.pop("home.json.1") == before.pop("home.json")
    assert json.loads((path / "home.json").read_text())["format"] == 2
    lesson = "lessons/0002-use/lesson.json"
    del after["home.json"], after[lesson], before[lesson]
    moved = json.loads((path / "lessons/0002-use/moved.json").read_text())
    assert after.pop("lessons/0002-use/moved.json")
    assert after == before
    old = json.loads((write_old_home(tmp_path / "again") / lesson).read_text())
    assert old.pop("moved") == moved
    new, cause = json.loads((path / lesson).read_text()), old.pop("cause")
    assert {key: new[key] for key in old} == old
    assert {key: new["cause"][key] for key in cause} == cause


def test_a_home_of_a_newer_form_is_refused_and_untouched(tmp_path: Path) -> None:
    path = write_old_home(tmp_path / "home")
    known = json.loads((path / "home.json").read_text())
    (path / "home.json").write_text(json.dumps(known | {"format": 3}))
    (path / "server.json").write_text("{}")
    before = file_hashes(path)
    for _ in range(2):  # the lock is given back
        with pytest.raises(TooNew, match=r"home\.json: format 3; .* reads up to 2") as caught:
            Home(path)
        assert "format 3" in caught.value.hint
    assert file_hashes(path) == before
    assert (path / "server.json").exists()
    assert not (path / "model").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"format": "two"}', "[" * 100_000])
def test_a_home_json_that_is_damaged_is_named(tmp_path: Path, text: str) -> None:
    path = write_old_home(tmp_path / "home")
    (path / "home.json").write_text(text)
    with pytest.raises(DamagedFile, match=r"home\.json"):
        Home(path)


def test_an_interrupted_migration_is_finished_by_the_next_start(tmp_path: Path) -> None:
    """The disk refuses the n-th of its calls, for every n: either form is in force, and the next start serves."""
    path = tmp_path / "home"
    num_refused = 0
    for n in range(40):
        old = (write_old_home(path) / "home.json").read_bytes()
        (path / "home.json.1").unlink(missing_ok=True)
        home = Home(path)
        with disk(n) as calls, contextlib.suppress(StorageError):
            home.bind(MODEL_OF_OLD, FINGERPRINT, BASE_VERSION)
        home.close()
        again = Home(path)
        again.bind(MODEL_OF_OLD, FINGERPRINT, BASE_VERSION)
        again.close()
        assert json.loads((path / "home.json").read_text())["format"] == 2
        assert (path / "home.json.1").read_bytes() == old
        if len(calls.made) <= n:
            break
        num_refused += 1
    assert 8 <= num_refused < 40


def test_a_home_of_another_model_is_not_migrated(tmp_path: Path) -> None:
    path = write_old_home(tmp_path / "home")
    before = (path / "home.json").read_bytes()
    home = Home(path)
    with pytest.raises(BadCheckpoint):
        home.bind(MODEL, "other", BASE_VERSION)
    home.close()
    assert (path / "home.json").read_bytes() == before


@pytest.mark.slow
def test_what_a_newer_version_added_is_served_around_and_written_back(tmp_path: Path, talker: Path) -> None:
    """One unknown field in lesson.json, in the ledger and in home.json: nothing of it is lost."""
    path = tmp_path / "home"
    with running(path, talker) as server:
        server.client.import_corrections(
            [Correction.model_validate({"prompt": "Use mud.", "chosen": "Done."})]
        )
        kept = server.lesson(teach(max_steps=1, keep=True))
    lesson, ledger = path / "lessons" / kept.id / "lesson.json", path / "ledger.jsonl"
    for file in (lesson, ledger, path / "home.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"severity": 3}) + "\n")
    told = ledger.read_text()
    with running(path, talker) as server:
        reply = server.client.ledger()
        assert (len(reply.corrections), reply.num_torn, reply.unreadable) == (1, None, None)
        assert server.client.lessons().lessons[0].id == kept.id
        again = server.lesson(teach(corrections=None, ledger=True, max_steps=1))
        server.client.revert(again.id)
        server.client.revert(kept.id)  # which writes its lesson.json
    assert json.loads(lesson.read_text())["severity"] == 3
    assert json.loads(lesson.read_text())["reverted_by"]
    assert json.loads((path / "home.json").read_text())["severity"] == 3
    assert ledger.read_text() == told
    taught = path / "lessons" / again.id / "corrections.jsonl"
    assert json.loads(taught.read_text())["severity"] == 3


@pytest.mark.slow
def test_a_garbled_line_of_metrics_or_ledger_blocks_nothing(tmp_path: Path, talker: Path) -> None:
    """Metrics are appended without fsync: a power loss just after a keep may leave any of their lines garbled."""
    path = tmp_path / "home"
    with running(path, talker) as server:
        kept = server.lesson(teach(max_steps=2, keep=True))
    metrics = path / "lessons" / kept.id / "metrics.jsonl"
    first, *rest = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(first[:20] + b"\0" * 30 + b"\n" + b"".join(rest)[:-10])
    (path / "ledger.jsonl").write_text('{"prompt": "a"}\n{"pro')
    with running(path, talker) as server:
        client = server.client
        detail = client.lesson(kept.id)
        assert (len(detail.metrics), detail.metrics_skipped) == (len(rest) - 1, 2)
        assert client.status(kept.job).state == "kept"
        assert [x["job"] for x in client.request("GET", "/v1/train/status")["jobs"]] == [kept.job]
        assert client.train(teach(("salt", "jazz"), dry_run=True)).state == "planned"
        reply = client.ledger()
        assert (reply.corrections, reply.num_torn) == ([], 1)
        assert reply.unreadable is not None
        assert [x.line for x in reply.unreadable] == [1]
        client.revert(kept.id)


def test_a_key_file_that_is_too_short_is_refused_and_left(home: Home) -> None:
    (home.path / "key").write_text("short\n")
    with pytest.raises(ConfigError, match="a key of 5 characters; expected 16 or more"):
        home.key(None)
    assert (home.path / "key").read_text() == "short\n"
    (home.path / "key").unlink()
    assert len(home.key(None)) >= 16
    assert home.key(None) == home.key(None)
