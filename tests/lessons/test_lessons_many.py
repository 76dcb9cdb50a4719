"""Homes with many lessons: what was taught is encoded once, and tables of older homes move out all at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_server import save_tokenizer

from secondnature.lessons.home import Home
from secondnature.lessons.log import Log
from secondnature.lessons.planner import Planner
from secondnature.model.chat import read_tokenizer
from secondnature.records import Correction, Moved
from secondnature.wire import TrainRequest

BASE = "w2-0000000000000000"


class Counting:
    """A real tokenizer that counts what it is asked to encode."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.calls = 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        return self._tokenizer(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def corrections(word: str, count: int) -> list[Correction]:
    return [
        Correction.model_validate({"prompt": f"Use {word} {i}.", "chosen": "Done.", "rejected": "Why not?"})
        for i in range(count)
    ]


def test_what_kept_lessons_taught_is_encoded_once(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = Counting(read_tokenizer(tmp_path))
    planner = Planner(tokenizer, vocab_size=400, context_limit=256, highest_rank=8, default_lr=None)
    mine = [c.model_dump(mode="json", exclude_none=True) for c in corrections("tea", 1)]
    request = TrainRequest.model_validate({"corrections": mine, "optimizer": {"rank": 4}})
    earlier = corrections("oak", 30)
    first = planner.plan(request, [], earlier)
    cold, tokenizer.calls = tokenizer.calls, 0
    again = planner.plan(request, [], earlier)
    assert tokenizer.calls < cold / 5, f"{tokenizer.calls} of {cold} encodings were made again"
    assert again == first
    assert len(planner._encoder._encoded) == 30
    fewer = planner.plan(request, [], corrections("salt", 2))
    assert len(fewer.replay) == 2
    assert len(planner._encoder._encoded) == 2, "what was taken back is forgotten"


def test_tables_of_an_older_home_move_out_once(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    log = Log(home, tmp_path, BASE)
    moved = [Moved(name="w", layer=None, intended=0.1, relative=0.2, written=0.3)]
    for _ in range(40):
        lesson = log.create("train", "old", state="undone", parent=BASE)
        path = log.directory(lesson) / "lesson.json"
        raw = json.loads(path.read_bytes()) | {"moved": [m.model_dump(mode="json") for m in moved]}
        path.write_text(json.dumps(raw))
    opened = Log(home, tmp_path, BASE)
    assert len(opened.all()) == 40
    for lesson in opened.all():
        assert lesson.moved == []
        assert opened.detail(lesson.id).lesson.moved == moved
        assert "moved" not in json.loads((opened.directory(lesson) / "lesson.json").read_bytes())
    home.close()
