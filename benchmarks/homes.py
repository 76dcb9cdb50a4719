"""Homes with many lessons: what a start and the routes take with a thousand entries, and two hundred kept in a row.

`listed` writes a thousand entries as the product does, half of them kept and folded into a working copy, with
tables of movements as long as the embedded model's, and asks a real server. The same home in the form of older
versions (the tables inside the entries) shows what the first start costs, and the next. `kept` teaches for
real, one step a lesson, on the embedded model, with the product's own parts but without its routes, and looks at
10, 50, 100 and 200 lessons what they have on disk, what a start reads, and what it takes to undo the newest.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import common
import large
import torch

from secondnature import embedded
from secondnature.config import Settings
from secondnature.engines.stamps import Clock
from secondnature.lessons.home import Home
from secondnature.lessons.log import OPTIMIZER_FILE, Log
from secondnature.lessons.pruning import Pruning
from secondnature.lessons.reverted import Reverted
from secondnature.lessons.weights import ServedWeights
from secondnature.model.chat import encode_answer
from secondnature.model.load import fingerprint
from secondnature.records import Correction, Example, Moved, OptimizerSettings, utc_now
from secondnature.train.apollo import Apollo
from secondnature.train.state import save_optimizer
from secondnature.train.step import train_step
from secondnature.weights import checkpoint
from secondnature.weights.content import content_id

REPEATS = 5
MARKS = (10, 50, 100, 200)
WORDS = ("door", "fence", "wall", "gate", "boat", "shelf", "bench", "cabinet", "lamp", "chair")
COLOURS = ("red", "blue", "green", "white", "golden", "black", "pink", "grey")


def _corrections(number: int) -> list[Correction]:
    """Four of an entry's own: no two entries teach the same."""
    found: list[Correction] = []
    for i in range(4):
        word, colour = WORDS[(number + i) % len(WORDS)], COLOURS[(number // 10 + i) % len(COLOURS)]
        data = {
            "prompt": f"Paint the {word} number {number} {colour}.",
            "chosen": f"Yes, I will paint the {word} {colour}.",
            "rejected": "How about another colour instead?",
            "behaviour": "listening",
        }
        found.append(Correction.model_validate(data))
    return found


def _fill(home: Home, log: Log, model: Path, count: int) -> None:
    """So many entries; every second one is kept, and the working copy holds all of them."""
    tensors = checkpoint.read(model)
    moved = [Moved(name=n, layer=0, intended=1e-3, relative=1e-5, written=2e-3) for n in tensors]
    settings = {"objective": "orpo", "steps": 3, "batch_size": 8, "optimizer": {"rank": 16, "lr": 1e-5}}
    parent = log.base_version
    for number in range(1, count + 1):
        corrections = _corrections(number)
        kept = number % 2 == 0
        lines = "".join(c.to_disk() + "\n" for c in corrections)
        metrics = "".join(json.dumps({"kind": "step", "step": i, "loss": 1.0}) + "\n" for i in range(1, 4))
        last = kept and number + 2 > count
        if last:  # the working copy: one tensor moved, so that it is not the base
            next(iter(tensors.values())).view(-1)[0] += 1
        version = content_id(tensors) if last else f"w2-{number:016x}"
        lesson = log.create(
            "train",
            "listening",
            files={"corrections.jsonl": lines, "metrics.jsonl": metrics},
            state="kept" if kept else "undone",
            behaviour="listening",
            parent=parent,
            version=version,
            cause={"corrections": [c.digest() for c in corrections], "num_examples": 4},
            settings=settings,
            steps=3,
            loss=1.0,
            verdict="kept" if kept else "inconclusive",
            reason="its probes say so",
            ended_at=utc_now(),
        )
        log.write_moved(lesson, moved)
        parent = version if kept else parent
    head = log.head()
    assert head is not None, "every second one is kept"
    note = {
        "schema_version": 1,
        "version": head.version,
        "lesson": head.number,
        "saved_at": utc_now().isoformat(),
    }
    checkpoint.save(home.model_root, model, tensors, note)


def _as_before(home: Path) -> None:
    """The tables inside the entries, as older versions had them."""
    for directory in (home / "lessons").iterdir():
        path, table = directory / "lesson.json", directory / "moved.json"
        raw = json.loads(path.read_bytes()) | {"moved": json.loads(table.read_bytes())}
        path.write_text(json.dumps(raw, indent=2) + "\n")
        table.unlink()


def _median(work: Any, repeats: int = REPEATS) -> dict[str, float]:
    found: list[float] = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        found.append(time.perf_counter() - begun)
    return {"median": statistics.median(found), "low": min(found), "high": max(found)}


def _opened(path: Path, model: Path, base: str) -> tuple[float, float]:
    """Seconds to open the home, and its log."""
    begun = time.perf_counter()
    home = Home(path)
    opened = time.perf_counter()
    log = Log(home, model, base)
    seconds = opened - begun, time.perf_counter() - opened
    assert log.all(), "there are lessons"
    home.close()
    return seconds


def _starts(path: Path, model: Path, base: str) -> dict[str, Any]:
    first = _opened(path, model, base)
    again = [_opened(path, model, base) for _ in range(REPEATS)]
    return {
        "first": {"home": first[0], "log": first[1]},
        "home": {"median": statistics.median(a for a, _ in again), "high": max(a for a, _ in again)},
        "log": {"median": statistics.median(b for _, b in again), "high": max(b for _, b in again)},
    }


def _routes(server: large.Served) -> dict[str, Any]:
    """Seconds of the routes that go through the whole log, each first and again."""
    dry = {
        "corrections": [{"prompt": "Paint the car.", "chosen": "Red it is.", "rejected": "No."}],
        "dry_run": True,
        "lesson": {"behaviour": "listening"},
    }
    routes = {
        "lessons": lambda: server.get("/v1/lessons"),
        "status": lambda: server.get("/v1/train/status"),
        "dry_run": lambda: server.post("/v1/train", dry),
        "health": lambda: server.get("/v1/health"),
    }
    found: dict[str, Any] = {}
    for name, ask in routes.items():
        before = _cpu_seconds(server)
        first = _median(ask, 1)["median"]
        cold = _cpu_seconds(server)
        found[name] = {"first": first, **_median(ask, 2 * REPEATS)}
        found[name] |= {"first_cpu": cold - before, "cpu": (_cpu_seconds(server) - cold) / (2 * REPEATS)}
    return found


def _cpu_seconds(server: large.Served) -> float:
    """That the server has used: what a call takes where nothing else runs."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _idle_share(server: large.Served, seconds: float = 5.0) -> float:
    """Of one core, what the server uses while nobody asks anything."""
    before = _cpu_seconds(server)
    time.sleep(seconds)
    return (_cpu_seconds(server) - before) / seconds


def listed(source: Path, folder: Path, count: int) -> dict[str, Any]:
    """The home with `count` entries, now and in the form of before."""
    torch.set_num_threads(1)
    model = embedded.path()
    base = content_id(checkpoint.read(model))
    path = folder / "home"
    home = Home(path)
    home.bind(model, fingerprint(model), base)
    begun = time.perf_counter()
    _fill(home, Log(home, model, base), model, count)
    home.close()
    found: dict[str, Any] = {"entries": count, "written_in_s": time.perf_counter() - begun}
    found["start"] = _starts(path, model, base)
    with large.served(source, model, path, folder / "server.log") as server:
        found["server_ready_s"] = server.ready()
        server.wait_for_trainer()
        found["routes"] = _routes(server)
        found["idle_share_of_a_core"] = _idle_share(server)
    _as_before(path)
    found["form_of_before"] = _starts(path, model, base)
    return found


def _disk(home: Path) -> dict[str, int]:
    """Bytes on disk by kind of file, summed over the lessons; and of the working copy."""
    found: dict[str, int] = {}
    for path in (home / "lessons").glob("*/*"):
        found[path.name] = found.get(path.name, 0) + path.stat().st_size
    found["model/"] = sum(p.stat().st_size for p in (home / "model").rglob("*") if p.is_file())
    return found


def _reads(path: Path, model: Path, base: str) -> dict[str, float]:
    """What a start does with the disk: opens the log, reads the weights that it stands for, names them."""
    home = Home(path)
    begun = time.perf_counter()
    log = Log(home, model, base)
    opened = time.perf_counter()
    version = content_id(log.durable_weights())
    seconds = {"log_s": opened - begun, "weights_s": time.perf_counter() - opened}
    assert version == log.kept_version(), "the disk gives the kept weights"
    seconds["chain"] = float(len(log.chain()))
    home.close()
    return seconds


class _School:
    """Lessons of one real step each, kept at once: what the server does, without its routes and processes."""

    def __init__(self, path: Path, model: Path) -> None:
        self.arena, network, self._tokenizer = common.load(model)
        base = content_id(self.arena.tensors)
        self.home = Home(path)
        self.home.bind(model, fingerprint(model), base)
        self.log = Log(self.home, model, base)
        self.weights = ServedWeights(self.arena, Clock(self.arena, base), self.log)
        self._optimizer = Apollo(network, OptimizerSettings(lr=1e-5, rank=16))
        self._network = network
        self._settings = Settings(home=path)

    def teach(self, number: int) -> None:
        """One lesson: a step, its difference, the optimizer's state, the commit; folded and pruned as always."""
        corrections = _corrections(number)
        head = self.log.head()
        lesson = self.log.create(
            "train",
            "listening",
            files={"corrections.jsonl": "".join(c.to_disk() + "\n" for c in corrections)},
            state="running",
            behaviour="listening",
            parent=self.log.kept_version(),
            optimizer_before=head.optimizer_after if head else None,
            cause={"corrections": [c.digest() for c in corrections], "num_examples": len(corrections)},
            settings={"optimizer": {"rank": 16}},
        )
        self.weights.begin(lesson)
        examples: list[Example] = []
        for correction in corrections[:2]:
            assert correction.chosen is not None, "written so"
            context, answer = encode_answer(self._tokenizer, correction.prompt, correction.chosen[0])
            examples.append(Example(context_ids=context, continuation_ids=answer))
        train_step(self._network, self._optimizer, examples, writing=self.arena.writing, learned_loss=0.0)
        sha256 = save_optimizer(self._optimizer, self.log.directory(lesson) / OPTIMIZER_FILE)
        self.log.write_moved(lesson, self._optimizer.moved())
        after = {"optimizer_after": lesson.id, "optimizer_sha256": sha256, "state": "kept", "steps": 1}
        self.log.save(self.weights.record(lesson).model_copy(update=after))
        self.weights.keep()
        if len(self.log.chain()) > self._settings.max_chain:
            self.weights.fold()
        Pruning(self.log).prune(self._settings.keep_states)

    def undo(self) -> dict[str, float]:
        """Seconds to take the newest back, and to have it again: as often as it takes, at the same length."""
        times: list[float] = []
        newest, version = self.log.head(), self.log.kept_version()
        for _ in range(2 * REPEATS):
            assert newest is not None, "there are lessons"
            change = Reverted(newest, log=self.log, weights=self.weights)
            change.prepare(_nothing)
            begun = time.perf_counter()
            newest = change.apply(_nothing)
            times.append(time.perf_counter() - begun)
        assert self.log.kept_version() == version, "back where it was"
        return {"median": statistics.median(times), "low": min(times), "high": max(times)}


def _nothing() -> None:
    """Nobody asks for anything meanwhile."""


def kept(folder: Path, count: int) -> dict[str, Any]:
    """Lessons kept in a row, one step each; at each mark: disk, what a start reads, the undo of the newest."""
    torch.set_num_threads(1)
    model, home = embedded.path(), folder / "home"
    school = _School(home, model)
    rows: list[dict[str, Any]] = []
    number = 0
    for mark in [m for m in MARKS if m < count] + [count]:
        taken: list[float] = []
        while number < mark:
            number += 1
            begun = time.perf_counter()
            school.teach(number)
            taken.append(time.perf_counter() - begun)
        row: dict[str, Any] = {"kept": mark, "seconds_per_lesson": statistics.median(taken)}
        row["disk"], row["chain"] = _disk(home), len(school.log.chain())
        row["undo_s"] = school.undo()
        base = school.log.base_version
        school.home.close()
        row["reads"] = [_reads(home, model, base) for _ in range(REPEATS)]
        school.home = Home(home)
        rows.append(row)
        common.say(f"{mark} kept: {row['undo_s']['median']:.2f} s to undo, chain of {row['chain']}")
    return {"model_bytes": school.arena.nbytes, "rows": rows}
