"""The torture: every call that can fail, in every scenario, fails by itself and for good (`make torture`).

    PYTHONPATH=tests python tests/torture/run.py                         everything
    PYTHONPATH=tests python tests/torture/run.py --sample 60 --seed 3    a sample of it
    PYTHONPATH=tests python tests/torture/run.py --only revert --site fsync

Workers are processes; each takes one run after the other. A run that takes longer than its limit prints the
stacks of all threads, counts as a hang, and its worker is started anew. The last lines are the summary.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import logging
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import far_side
from found import FOUND
from injector import Fault, Injector, kinds
from run_one import Broken, Run, fresh, perform
from scenarios import SCENARIOS, make_templates
from subject import light, make_model

LIMIT_S = 40.0
MAX_OCCURRENCES = 40
"""What comes by more often waits for something: how often, the clock decides."""
KINDS = (
    "losses",
    "dead runners",
    "homes",
    "weights",
    "endings",
    "recoveries",
    "refusals",
    "leftovers",
    "hangs",
    "other",
)


def work(base: Path, requests: IO[str], answers: IO[str]) -> None:
    """A worker: one request a line, one answer a line."""
    tempfile.tempdir = str(base)
    os.environ["TMPDIR"] = str(base)
    logging.disable(logging.CRITICAL)
    forker, _ = far_side.sibling()
    model = make_model(base / "model")
    injector = Injector()
    with injector.installed(), light(forker):
        make_templates(lambda home: Run(home, model, injector, forker), base / "homes")
        print("ready", file=answers, flush=True)
        while line := requests.readline():
            asked = json.loads(line)
            scenario = SCENARIOS[asked["scenario"]]
            fault = Fault(**asked["fault"]) if asked["fault"] else None
            faulthandler.dump_traceback_later(LIMIT_S, exit=True)
            forker.behaviours.clear()
            home = fresh(base / "homes" / scenario.home, base / "home")
            run = Run(home, model, injector, forker, **scenario.settings)
            answer: dict[str, Any] = {"fired": 0, "kind": "", "message": "", "sites": {}}
            try:
                answer["fired"] = perform(run, scenario.act, scenario.prepare, fault)
            except Broken as e:
                answer |= {"kind": e.kind, "message": str(e)}
            except BaseException as e:  # noqa: BLE001  (it is told, and the next run is made)
                answer |= {"kind": "other", "message": "".join(traceback.format_exception(e))[-1500:]}
            faulthandler.cancel_dump_traceback_later()
            if fault is None:
                answer["sites"] = dict(injector.sites)
            print(json.dumps(answer), file=answers, flush=True)


class Worker:
    """One process that makes runs, forked from this one."""

    def __init__(self, number: int, base: Path) -> None:
        self._base = base / f"w{number}"
        self._start()

    def _start(self) -> None:
        shutil.rmtree(self._base, ignore_errors=True)
        self._base.mkdir()
        reading, asked = os.pipe()
        answered, writing = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.close(asked)
                os.close(answered)
                log = os.open(self._base / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                work(self._base, os.fdopen(reading), os.fdopen(writing, "w"))
            except BaseException:  # noqa: BLE001  (a forked process must never come back)
                traceback.print_exc()
            os._exit(1)
        os.close(reading)
        os.close(writing)
        self._requests, self._answers = os.fdopen(asked, "w"), os.fdopen(answered)
        self._ready = False

    def run(self, item: dict[str, Any]) -> dict[str, Any]:
        if not self._ready and not self._answers.readline():
            print(f"a worker does not start: {(self._base / 'log').read_text()[-2000:]}", flush=True)
            os._exit(2)
        self._ready = True
        print(json.dumps(item), file=self._requests, flush=True)
        line = self._answers.readline()
        if line:
            return json.loads(line)
        self.close()
        stacks = (self._base / "log").read_text()[-8000:]
        self._start()
        return {
            "fired": 1,
            "kind": "hangs",
            "message": f"no answer within {LIMIT_S} s:\n{stacks}",
            "sites": {},
        }

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._requests.close()
        self._answers.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)


def in_parallel(workers: list[Worker], items: list[dict[str, Any]], told: Any) -> None:
    """Every item by the next worker that is free; `told(item, answer)` as they come."""
    left, lock = list(reversed(items)), threading.Lock()

    def lead(worker: Worker) -> None:
        while True:
            with lock:
                if not left:
                    return
                item = left.pop()
            answer = worker.run(item)
            with lock:
                told(item, answer)

    threads = [threading.Thread(target=lead, args=(w,)) for w in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def plan(sites: dict[str, dict[str, int]]) -> list[dict[str, Any]]:
    """Every fault of every scenario; a chain of calls that came by in two of them is not tried in a third."""
    seen: Counter[str] = Counter()
    found: list[dict[str, Any]] = []
    for scenario, counts in sites.items():
        for site, count in sorted(counts.items()):
            seen[site] += 1
            if seen[site] > 2:
                continue
            occurrences = sorted({1, count if count < MAX_OCCURRENCES else 2})
            faults = [Fault(site, n, kind) for n in occurrences for kind in kinds(site)]
            faults += [Fault(site, 1, kinds(site)[0], lasting=True)]
            found += [{"scenario": scenario, "fault": asdict(f)} for f in faults]
    return found


SHORT = (
    *(
        "start with kept lessons",
        "kept at once",
        "undone by verdict",
        "undone by hand",
        "trainer dies at write",
    ),
    *("revert", "revert of a revert", "stop: on trial"),
)


def found_before(sites: dict[str, dict[str, int]]) -> list[dict[str, Any]]:
    """What the torture found once, as far as the scenarios are among these."""
    items: list[dict[str, Any]] = []
    for scenario, pattern, error, lasting in FOUND:
        if scenario in sites:
            site = next((s for s in sorted(sites[scenario]) if re.search(pattern, s)), None)
            if site is None:
                raise SystemExit(f"found.py: no site of {scenario!r} matches {pattern!r} any more")
            items.append({"scenario": scenario, "fault": asdict(Fault(site, 1, error, lasting))})
    return items


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument(
        "--short", action="store_true", help="few scenarios, a sample, and what was found before"
    )
    parser.add_argument("--sample", type=int, default=0, help="so many runs only, spread over all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="scenarios whose name contains this")
    parser.add_argument("--site", default="", help="sites that contain this")
    parser.add_argument("--out", type=Path, help="where every run is written, one JSON line each")
    given = parser.parse_args()
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        place = "/dev/shm" if Path("/dev/shm").is_dir() else None
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="torture-", dir=place)))
        workers = [Worker(i, base) for i in range(given.workers)]
        for worker in workers:
            stack.callback(worker.close)
        return torture(workers, _names(given), given, began)


def _names(given: argparse.Namespace) -> list[str]:
    return [n for n in SCENARIOS if given.only in n and (n in SHORT or not given.short)]


def torture(workers: list[Worker], names: list[str], given: argparse.Namespace, began: float) -> int:
    """Count, plan, run, sum up."""
    sites: dict[str, dict[str, int]] = {}
    wrong: Counter[str] = Counter()
    out = given.out.open("w") if given.out else None

    def tell(item: dict[str, Any], answer: dict[str, Any]) -> None:
        if answer["kind"]:
            wrong[answer["kind"]] += 1
            print(f"WRONG {item['scenario']}: {item['fault']}\n  {answer['message']}", flush=True)
        if out is not None:
            print(json.dumps({**item, **answer}), file=out, flush=True)

    def counted(item: dict[str, Any], answer: dict[str, Any]) -> None:
        tell(item, answer)
        sites[item["scenario"]] = answer["sites"]

    in_parallel(workers, [{"scenario": n, "fault": None} for n in names], counted)
    items = [i for i in plan({n: sites[n] for n in names}) if given.site in i["fault"]["site"]]
    num_points = len({i["fault"]["site"] for i in items})
    random.Random(given.seed).shuffle(items)
    items = items[: given.sample] if given.sample else items
    items = [i for i in found_before(sites) if given.site in i["fault"]["site"]] + items
    done, struck = 0, 0

    def made(item: dict[str, Any], answer: dict[str, Any]) -> None:
        nonlocal done, struck
        done, struck = done + 1, struck + bool(answer["fired"])
        tell(item, answer)
        if done % 100 == 0:
            took = time.monotonic() - began
            print(
                f"{done} of {len(items)} runs, {took:.0f} s, {took / done * (len(items) - done):.0f} s to go",
                flush=True,
            )

    in_parallel(workers, items, made)
    print(
        f"\n{len(names)} scenarios, {num_points} points, {len(items)} runs ({struck} struck), seed {given.seed}, "
        f"{time.monotonic() - began:.0f} s"
    )
    print(", ".join(f"{wrong[k]} {_WORDS.get(k, k)}" for k in KINDS))
    if out is not None:
        out.close()
    return 1 if wrong else 0


_WORDS = {
    "losses": "acknowledged losses",
    "homes": "homes that do not open",
    "weights": "weights that are neither old nor new",
    "endings": "endings told otherwise",
    "recoveries": "that did not recover by themselves",
    "refusals": "refusals that are not ours",
}

if __name__ == "__main__":
    sys.exit(main())
