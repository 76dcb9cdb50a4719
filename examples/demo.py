"""`make demo`: correct the embedded model while it serves; one lesson is undone, one is kept.

A throwaway home (.demo-home), a real server, and the same two commands that a user would type:

    secondnature learn examples/yes_sayer     six corrections, drilled -> takes wrong directions too -> undone
    secondnature learn examples/listening     the same six, in small steps, with replay -> kept

Meanwhile a client goes on asking, so that you see that nothing pauses. Ends with the table, ./report.html and the
line that undoes what was kept. `demo_real.py` does the same with a real model.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from secondnature.cli import main as secondnature
from secondnature.cli.connect import Where, open_server
from secondnature.cli.learn import write_run
from secondnature.cli.output import Output
from secondnature.report import write_many
from secondnature.wire import Client, LessonDetail

EXAMPLES = Path(__file__).parent
QUESTION = "Please paint the bench red."
UNDONE, KEPT = 1, 0
"""What `secondnature learn` exits with."""


class Visitor(threading.Thread):
    """Somebody who keeps asking while the model learns."""

    def __init__(self, client: Client, question: str = QUESTION) -> None:
        super().__init__(daemon=True)
        self.client = client
        self.question = question
        self.num_answers = self.num_trial = self.num_failed = 0
        self.slowest_s = 0.0
        self.stopping = threading.Event()

    def ask(self) -> str:
        """One greedy answer to the question."""
        answer = self.client.chat([{"role": "user", "content": self.question}], temperature=0, max_tokens=64)
        self.num_trial += bool(answer["trial"])
        return str(answer["choices"][0]["message"]["content"])

    def run(self) -> None:
        """Ask twice a second until told to stop."""
        while not self.stopping.wait(0.5):
            begun = time.monotonic()
            try:
                self.ask()
                self.num_answers += 1
            except Exception as e:  # noqa: BLE001  (counted and shown: it must be zero)
                self.num_failed += 1
                print("a request failed:", e)
            self.slowest_s = max(self.slowest_s, time.monotonic() - begun)


def demo(
    home: Path,
    model: str,
    report: Path,
    lessons: Mapping[str, int],
    visit: Callable[[Client], Visitor] = Visitor,
    tell: Callable[[Visitor, list[LessonDetail]], None] | None = None,
) -> int:
    """The whole demonstration; the exit status.

    Args:
        home: is removed first.
        lessons: folders beside this file, with what `secondnature learn` should exit with.
        visit: makes the one who keeps asking.
        tell: is given that one and the lessons at the end.
    """
    shutil.rmtree(home, ignore_errors=True)
    begun = time.monotonic()
    with (
        open_server(Where(home=home, model=model), Output()) as server,
        tempfile.TemporaryDirectory() as scratch,
    ):
        where = ["--url", server.client.url, "--home", str(home)]
        visitor = visit(server.client)
        print(f"\nA user:    {visitor.question}\nThe model: {visitor.ask()}\n")
        visitor.start()
        statuses: list[int] = []
        for name in lessons:
            print(f"$ secondnature learn examples/{name}")
            page = str(Path(scratch) / f"{name}.html")
            statuses.append(secondnature(["learn", str(EXAMPLES / name), *where, "--report", page]))
            print()
        visitor.stopping.set()
        visitor.join()
        print(f"A user:    {visitor.question}\nThe model: {visitor.ask()}\n")
        details = [server.client.lesson(lesson.id) for lesson in server.client.lessons().lessons]
        runs = [Path(scratch) / detail.lesson.id for detail in details]
        for detail, folder in zip(details, runs, strict=True):
            folder.mkdir()
            write_run(detail, folder)
        write_many(runs, report)
        if tell is not None:
            tell(visitor, details)
        print(
            f"Meanwhile {visitor.num_answers} other requests were answered, {visitor.num_trial} of them by weights "
            f"on trial; {visitor.num_failed} failed; the slowest took {visitor.slowest_s:.1f} s."
        )
        print(f"Report: {report}   ({time.monotonic() - begun:.0f} s)")
        print(f"Undo what was kept: .venv/bin/{server.command('lessons', 'revert', details[-1].lesson.id)}")
    expected = list(lessons.values())
    if statuses != expected or visitor.num_failed:
        print(
            f"unexpected: exit statuses {statuses} (expected {expected}), {visitor.num_failed} failed requests"
        )
        return 1
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--home", type=Path, default=Path(".demo-home"))
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--report", type=Path, default=Path("report.html"))
    options = parser.parse_args()
    shown = {"yes_sayer": UNDONE, "listening": KEPT}
    raise SystemExit(demo(options.home, options.model, options.report, shown))
