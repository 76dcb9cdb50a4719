"""`kill -9` at random instants: of the trainer, of the server, of the process group (`make torture`).

    PYTHONPATH=tests python tests/torture/kills.py --trainer 150 --server 100 --group 50 --seed 0

The real server (`serve.local.main`) on the tests' talking model, by real HTTP. Lessons run one after another,
kept at once, kept or undone by hand, judged, reverted, folded; a second thread gives corrections all the
while and writes down which were acknowledged. After each kill: the home opens, every acknowledged correction,
lesson and revert is there, what was told undone is not kept, and the bytes in the server's arena, mapped from
outside, have the content id of the last kept entry. A quarter of the servers are killed while they start.
Processes are forked from one that has imported everything (`preloaded`). The seed gives order and delays; the
instants are the machine's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tiny_server import KEY, correction, make_talker, say_probes, teach, use_probes

from secondnature.errors import SecondnatureError
from secondnature.lessons.home import running_server
from secondnature.records import GateSettings
from secondnature.weights import checkpoint
from secondnature.weights.arena import Arena
from secondnature.weights.content import content_id
from secondnature.wire import Client, TrainRequest

START_S = 180.0
"""For a start, or a trainer's, on a machine that does other things too."""
ENDED = ("kept", "undone", "failed", "cancelled")
GATE = GateSettings(
    alpha=0.5, min_gain_probes=2, min_gain_seeds=2, min_guard_probes=2, guard_margin=0.9, min_other_probes=1
)


class Preloaded:
    """The process that forks servers."""

    def __init__(self, base: Path) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SECONDNATURE_")}
        self._log = (base / "preloaded.log").open("w")
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("preloaded.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**environment, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TMPDIR": str(base)},
        )
        self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def server(self, asked: dict[str, str]) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return int(self._line())

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()


class Driver:
    """One home, one server at a time, and what it acknowledged."""

    def __init__(self, number: int, base: Path, model: Path, seed: int) -> None:
        self.base, self.model, self.home = base, model, base / "home"
        self._dice = random.Random(f"{seed}-{number}")
        self._preloaded = Preloaded(base)
        self._pid = 0
        self._client: Client | None = None
        self.corrections: list[str] = []
        self.kept: dict[str, str] = {}
        self.gone: dict[str, str] = {}
        """Lessons that were told to have ended otherwise."""
        self.num_lessons = self.num_reverts = self.num_starting = 0
        self.wrong: list[str] = []
        self._killed = threading.Event()
        self._lesson_s = 1.0

    def measure(self) -> None:
        """How long a lesson takes here and now: kills come within two of them."""
        self._kept()
        began = time.monotonic()
        self._kept()
        self._lesson_s = time.monotonic() - began

    # ------------------------------------------------------------------------------------------ the server

    def start(self) -> None:
        """A server over the home; it may not answer yet."""
        (self.base / "server.log").write_text("")
        self._killed.clear()
        settings = {
            "HOME": self.home,
            "MODEL": self.model,
            "PORT": 0,
            "API_KEY": KEY,
            "REQUESTS_PER_MINUTE": 10_000_000,
            "MAX_CHAIN": 3,
            "KEEP_STATES": 2,
        }
        asked = {f"SECONDNATURE_{k}": str(v) for k, v in settings.items()}
        self._pid = self._preloaded.server(
            {**asked, "LOG": str(self.base / "server.log"), "TORTURE_SIBLING": str(self.base / "sibling")}
        )

    def connect(self) -> None:
        """Wait until it answers. Raises AssertionError: it does not come up."""
        deadline = time.monotonic() + START_S
        while True:
            found = running_server(self.home)
            if found is not None and int(found["pid"]) == self._pid:
                self._client = Client(found["url"], KEY)
                return
            if not Path(f"/proc/{self._pid}").exists() or time.monotonic() > deadline:
                raise AssertionError(
                    f"the home does not open: {(self.base / 'server.log').read_text()[-2000:]}"
                )
            time.sleep(0.01)

    @property
    def client(self) -> Client:
        assert self._client is not None, "connected before"
        return self._client

    def trainer_pid(self) -> int | None:
        """The server's child that is not the sibling from which trainers are forked."""
        with contextlib.suppress(OSError, ValueError):
            sibling = int((self.base / "sibling").read_text())
            tasks = Path(f"/proc/{self._pid}/task").glob("*/children")
            found = [int(p) for task in tasks for p in task.read_text().split() if int(p) != sibling]
            return found[0] if found else None
        return None

    def kill(self, target: str) -> None:
        """Now. A trainer that is not there is waited for."""
        deadline = time.monotonic() + START_S
        if target == "trainer":
            while (pid := self.trainer_pid()) is None and time.monotonic() < deadline:
                time.sleep(0.005)
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        else:
            pid = self.trainer_pid()
            with contextlib.suppress(ProcessLookupError):
                if target == "group":
                    os.killpg(self._pid, signal.SIGKILL)  # the server and its sibling
                    if pid is not None:
                        os.kill(pid, signal.SIGKILL)
                else:
                    os.kill(self._pid, signal.SIGKILL)
            while Path(f"/proc/{self._pid}").exists() and time.monotonic() < deadline:
                time.sleep(0.002)
        self._killed.set()

    def close(self) -> None:
        self.kill("group")
        self._preloaded.close()

    # ----------------------------------------------------------------------------------- what goes on meanwhile

    def _give_corrections(self) -> None:
        """Until the kill; each that is acknowledged is written down. It has a client of its own."""
        found = running_server(self.home)
        if found is None:
            return
        with Client(found["url"], KEY) as client:
            while not self._killed.is_set():
                words = self._words(self._dice.choice((1, 1, 3)))
                try:
                    given = client.import_corrections(
                        [correction(w, f"Done {len(self.corrections)}.") for w in words]
                    )
                except (SecondnatureError, OSError):
                    continue
                self.corrections += [str(c.id) for c in given.corrections]
                self._killed.wait(0.02)

    def _words(self, count: int) -> list[str]:
        return self._dice.sample(["tabs", "dots", "red", "tea", "oak", "salt", "jazz", "rope"], count)

    def _lead_lessons(self) -> None:
        """Until the kill; whatever is refused because of it is expected."""
        while not self._killed.is_set():
            with contextlib.suppress(SecondnatureError, OSError):
                self._dice.choice(
                    (self._kept, self._kept, self._decided, self._judged, self._reverted, self._folded)
                )()

    def _request(self, **fields: Any) -> TrainRequest:
        words = self._words(2)
        return teach(words, max_steps=self._dice.randint(1, 4), seed=self._dice.randrange(1000), **fields)

    def _taught(self, request: TrainRequest, *phases: str) -> str | None:
        """The lesson, once it has ended or is in a phase; None: killed before."""
        reply = self.client.train(request)
        while not self._killed.is_set():
            status = self.client.status(reply.job)
            if status.state in ENDED and status.phase == "done":
                self._note(status.lesson, status.state)
                return status.lesson
            if status.phase in phases:
                return status.lesson
            time.sleep(0.02)
        return None

    def _note(self, name: str, state: str, version: str = "") -> None:
        self.num_lessons += 1
        if state == "kept":
            self.kept[name] = version
        else:
            self.gone[name] = state

    def _kept(self) -> None:
        self._taught(self._request(keep=True))

    def _decided(self) -> None:
        name = self._taught(self._request(), "on trial")
        if name is not None and name not in self.gone:
            entry = self.client.keep(name) if self._dice.random() < 0.5 else self.client.revert(name)
            self._note(name, entry.state)

    def _judged(self) -> None:
        probes = use_probes(["lamp", "ink", "mud"]) + say_probes(["bell", "clay", "drum"])
        self._taught(self._request(probes=probes, gate=GATE))

    def _reverted(self) -> None:
        kept = [x for x in self.client.lessons().lessons if x.state == "kept"]
        if kept:
            entry = self.client.revert(kept[-1].id)
            self.kept[entry.id] = str(entry.version)
            self.num_reverts += 1

    def _folded(self) -> None:
        self.client.checkpoint()

    # ----------------------------------------------------------------------------------------- what must hold

    def until_idle(self) -> None:
        """The server has ended what a kill of its trainer broke, by itself."""
        deadline = time.monotonic() + START_S
        while True:
            health, lessons = self.client.health(), self.client.lessons().lessons
            open_ = [x.id for x in lessons if x.state in ("queued", "running", "on_trial")]
            for name in (x.id for x in lessons if x.state == "on_trial"):
                with contextlib.suppress(SecondnatureError):
                    self._note(name, self.client.revert(name).state)
            if not open_ and health.status == "ok":
                return
            if time.monotonic() > deadline:
                raise AssertionError(f"it does not become well: {health}, open: {open_}")
            time.sleep(0.05)

    def check(self) -> None:
        """Raises AssertionError."""
        told = self.client.lessons()
        lost = set(self.corrections) - {c.id for c in self.client.corrections()}
        states = {x.id: x.state for x in told.lessons}
        assert not lost, f"{len(lost)} acknowledged corrections are lost"
        missing = [x for x in self.kept if states.get(x) != "kept"]
        assert not missing, f"acknowledged lessons are lost: {missing}"
        risen = [x for x, state in self.gone.items() if states.get(x) != state]
        assert not risen, f"lessons were told to have ended otherwise: {risen}"
        kept = [x for x in told.lessons if x.state == "kept"]
        if not any(x.state in ("queued", "running", "on_trial") for x in told.lessons):
            found = self._bytes(str(kept[-1].version) if kept else told.weights_version)
            assert found == told.weights_version, f"the arena holds {found}; told is {told.weights_version}"
            assert not kept or kept[-1].version == found, (
                f"the arena holds {found}; the log ends at {kept[-1]}"
            )
        left = [p for p in self.home.rglob("*") if re.fullmatch(r"\..+\.\d+\.tmp", p.name)]
        assert not left, f"temporary files stay: {left}"

    def _bytes(self, like: str) -> str:
        """Content id of the server's weights, whose memory is mapped here."""
        with contextlib.closing(_Reserved(self.model)) as reserved:
            plan = json.loads(reserved.arena.manifest())
        for link in Path(f"/proc/{self._pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if "secondnature-weights" in os.readlink(link):  # noqa: PTH115  (it is no path)
                    plan |= {"pid": self._pid, "fd": int(link.name)}
        return content_id(Arena.attach(json.dumps(plan)).tensors, like=like)

    # ---------------------------------------------------------------------------------------------- one kill

    def one(self, target: str) -> None:
        """Kill once, after a while; then see that nothing was lost."""
        early = target != "trainer" and self._client is not None and self._dice.random() < 0.25
        if early:  # the server is ended in order, and the next one is killed while it starts
            self.kill("server")
            self.start()
            time.sleep(self._dice.uniform(0.0, 1.5))
            self.num_starting += 1
            self.kill(target)
        else:
            timer = threading.Timer(self._dice.uniform(0.0, 2 * self._lesson_s), self.kill, (target,))
            giving = threading.Thread(target=self._give_corrections)
            self._killed.clear()
            giving.start()
            timer.start()
            self._lead_lessons()
            timer.join()
            giving.join()
        if target == "trainer":
            self.until_idle()
        else:
            self.start()
            self.connect()
        self.check()


class _Reserved:
    """The layout of a model's arena."""

    def __init__(self, model: Path) -> None:
        self.arena = Arena.reserve(checkpoint.specs(model))

    def close(self) -> None:
        os.close(json.loads(self.arena.manifest())["fd"])


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, count in (("trainer", 150), ("server", 100), ("group", 50)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drivers", type=int, default=2)
    given = parser.parse_args()
    targets = [t for t in ("trainer", "server", "group") for _ in range(getattr(given, t))]
    random.Random(given.seed).shuffle(targets)
    with tempfile.TemporaryDirectory(
        prefix="kills-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None
    ) as name:
        model = make_talker(Path(name) / "model")
        drivers: list[Driver] = []
        for i in range(given.drivers):
            (Path(name) / str(i)).mkdir()
            drivers.append(Driver(i, Path(name) / str(i), model, given.seed))
        return drive(drivers, targets, given.seed)


def drive(drivers: list[Driver], targets: list[str], seed: int) -> int:
    """Every kill by the next driver that is free; the summary."""
    began, lock, left = time.monotonic(), threading.Lock(), list(targets)

    def lead(driver: Driver) -> None:
        try:
            driver.start()
            driver.connect()
            driver.measure()
            while True:
                with lock:
                    if not left:
                        return
                    target, done = left.pop(), len(targets) - len(left) - 1
                    if done and done % 10 == 0:
                        took = time.monotonic() - began
                        print(
                            f"{done} of {len(targets)} kills, {took:.0f} s, {took / done * len(left):.0f} s to go",
                            flush=True,
                        )
                try:
                    driver.one(target)
                except (AssertionError, SecondnatureError, OSError) as e:
                    driver.wrong.append(f"{target}: {type(e).__name__}: {e}")
                    print(f"WRONG {driver.wrong[-1]}", flush=True)
                    driver.kill("group")
                    shutil.copytree(
                        driver.base, Path(tempfile.mkdtemp(prefix="kills-wrong-")) / "base", symlinks=True
                    )
                    driver.start()
                    driver.connect()
        finally:
            driver.close()

    threads = [threading.Thread(target=lead, args=(d,)) for d in drivers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(summary(drivers, targets[len(left) :], seed, time.monotonic() - began))
    return 1 if left or any(d.wrong for d in drivers) else 0


def summary(drivers: list[Driver], made: list[str], seed: int, took_s: float) -> str:
    """What was done, and what came of it."""
    kinds = ", ".join(f"{made.count(target)} {target}" for target in ("trainer", "server", "group"))
    lessons, reverts = sum(d.num_lessons for d in drivers), sum(d.num_reverts for d in drivers)
    corrections = sum(len(d.corrections) for d in drivers)
    return (
        f"\n{len(made)} kills ({kinds}; {sum(d.num_starting for d in drivers)} of them of a server that was "
        f"starting), seed {seed}, {took_s:.0f} s: {lessons} lessons ended, {reverts} reverts, "
        f"{corrections} corrections acknowledged; {sum(len(d.wrong) for d in drivers)} wrong"
    )


if __name__ == "__main__":
    sys.exit(main())
