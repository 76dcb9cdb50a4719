"""What is taught is what was meant, over the real chat templates that installed packages bring (`make test-peers`).

The templates are read where they lie and never copied. Each gets a tokenizer of bytes that knows the control tokens
which it writes. What a template refuses, it refuses by name; how many do is printed and bounded.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from chat_templates import answer, check, texts, tokenizer_for, user

from secondnature.errors import BadInput
from secondnature.model.chat import look, teach

PACKAGES = ("trl", "axolotl")
PARTS_ONLY = ("idefics3", "llava_next", "smolvlm")
"""Families whose templates take content as parts of text and images, never as text."""


def found() -> list[Path]:
    """Every chat template of the installed packages."""
    roots = [Path(str(s.origin)).parent for p in PACKAGES if (s := importlib.util.find_spec(p)) and s.origin]
    return sorted(path for root in roots for path in root.rglob("*.jinja"))


TEMPLATES = found()
pytestmark = pytest.mark.skipif(
    len(TEMPLATES) < 50, reason="few templates here; `make test-peers` brings them"
)


def reads_parts_only(path: Path) -> bool:
    return path.stem.removesuffix("_training") in PARTS_ONLY


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_an_answer_comes_back_whole_or_is_refused_by_name(path: Path) -> None:
    tokenizer = tokenizer_for(path.read_text(encoding="utf-8"))
    if reads_parts_only(path):
        with pytest.raises(BadInput, match="the model's chat template"):
            teach(tokenizer, [user("Where?")], answer("It is Paris."))
        return
    asked = texts(1, 6)
    for i, text in enumerate(texts(0, 6)):
        check(tokenizer, [user(asked[i])], text)


def test_how_many_of_them_refuse_even_one_turn() -> None:
    wrong = {p.stem: look(tokenizer_for(p.read_text(encoding="utf-8"))) for p in TEMPLATES}
    refused = {name: said for name, said in wrong.items() if said}
    assert {name.removesuffix("_training") for name in refused} <= set(PARTS_ONLY), refused
