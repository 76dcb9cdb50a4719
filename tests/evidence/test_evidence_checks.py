"""Answers judged: patterns, preferences, code; where the code in an answer is found."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from secondnature.errors import BadInput, SandboxFailed
from secondnature.evidence import Asked, Limits, extract_python, judge, judge_all, judge_probes
from secondnature.records import Check, Probe

ADD = "def add(a, b):\n    return a + b"


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (f"Here:\n```python\n{ADD}\n```\nEnjoy!", ADD),
        (f"```\nnot this\n```\n```py\n{ADD}\n```", ADD),
        (f"```\n{ADD}\n```", ADD),
        (f"  ```Python\n{ADD}", ADD),
        (f"Sure! From here on:\n{ADD}", ADD),
        (f"Sure.\nimport math\n{ADD}", f"import math\n{ADD}"),
        (f"Sure.\nfrom math import pi\n{ADD}", f"from math import pi\n{ADD}"),
        ("x = 1", "x = 1"),
        ("", ""),
    ],
)
def test_the_code_in_an_answer(answer: str, code: str) -> None:
    assert extract_python(answer) == code


@given(st.text(alphabet="`\npython def:x ", max_size=200))
def test_extraction_takes_any_text(answer: str) -> None:
    assert isinstance(extract_python(answer), str)


def test_each_kind_of_check() -> None:
    code = Check(python="assert add(1, 2) == 3")
    asked = [
        Asked(Check(matches=r"\byes\b"), "oh yes!"),
        Asked(Check(matches=r"\byes\b"), "yesterday"),
        Asked(Check(not_matches="alternatively"), "as you say"),
        Asked(Check(not_matches="alternatively"), "or alternatively"),
        Asked(code, f"```python\n{ADD}\n```"),
        Asked(code, ADD.replace("+", "-")),
        Asked(code, "I'd rather not."),
        Asked(Check(prefers=("a", "b")), "", margin=0.5),
        Asked(Check(prefers=("a", "b")), "", margin=-0.5),
    ]
    rulings = judge_all(asked)
    assert [r.passed for r in rulings] == [True, False, True, False, True, False, False, True, False]
    assert rulings[3].reason == "the pattern occurs"
    assert "AssertionError" in rulings[5].reason
    assert "SyntaxError" in rulings[6].reason
    assert judge(code, ADD)


def test_a_preference_needs_its_margin() -> None:
    with pytest.raises(BadInput, match="without its margin"):
        judge(Check(prefers=("a", "b")), "")


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)+$", r"(.*)*\1x"])
def test_a_pattern_that_backtracks_for_ever_ends_and_does_not_hold_up_the_others(pattern: str) -> None:
    slow = Asked(Check(matches=pattern), "a" * 60 + "b")
    not_slow = Asked(Check(not_matches=pattern), "a" * 60 + "b")
    quick = Asked(Check(matches="b$"), "a" * 60 + "b")
    rulings = judge_all([quick, slow, quick, not_slow, quick])
    assert [r.passed for r in rulings] == [True, False, True, False, True]
    assert rulings[1].reason == rulings[3].reason == "the regular expression ran out of time or memory"


@pytest.mark.parametrize("pattern", ["a{99999999999}", "(" * 900 + ")" * 900, "("])
def test_a_pattern_that_does_not_compile_is_a_bad_record(pattern: str) -> None:
    with pytest.raises(ValidationError, match="not a regular expression"):
        Check(matches=pattern)


def test_outcomes_carry_the_answers_in_the_probes_order() -> None:
    probes = [
        Probe.model_validate(
            {"prompt": "add?", "behaviour": "code", "check": {"python": "assert add(1, 1) == 2"}}
        ),
        Probe.model_validate({"prompt": "ok?", "behaviour": "talk", "check": {"matches": "ok"}}),
    ]
    outcomes = judge_probes(probes, [ADD, "no"], [None, 1.5])
    assert [o.probe for o in outcomes] == [p.digest() for p in probes]
    assert [o.passed for o in outcomes] == [True, False]
    assert outcomes[1].margin == 1.5
    assert outcomes[0].answer == ADD


def test_hundreds_of_code_probes_share_one_start() -> None:
    """Each ruling is its own: a wrong one among three hundred is the one that fails."""
    asked = [Asked(Check(python=f"assert add({i}, 1) == {i + (i != 123)}"), ADD) for i in range(300)]
    rulings = judge_all([*asked[:123], Asked(asked[0].check, "def add(a, b): return 7"), *asked[124:]])
    assert [i for i, r in enumerate(rulings) if not r.passed] == [123]


def test_the_same_answer_gets_the_same_ruling() -> None:
    """Neither the order of sets nor `random` makes flips of its own."""
    code = "import random\norder = list({'a', 'b', 'c', 'd', 'e'})\nnumber = random.random()"
    check = Check(python="raise ValueError(order, number)")
    reasons = {judge_all([Asked(check, code)])[0].reason for _ in range(3)}
    assert len(reasons) == 1


def test_a_sandbox_that_cannot_start_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/does/not/exist")
    with pytest.raises(SandboxFailed, match="did not run"):
        judge_all([Asked(Check(matches="a"), "a")], Limits())
