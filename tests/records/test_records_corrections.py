"""What was said, what was wanted, what was judged worse: who may fill which field, and what follows from it."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from secondnature.records import Correction, Message
from secondnature.records.migrations import migrate

BAD, GOOD = "I am sorry.", "Done."
Meaning = tuple[str | None, str | None, str | None]


def texts(c: Correction) -> Meaning:
    """(said, chosen, rejected)"""
    return tuple(None if m is None else m[0].content for m in (c.said, c.chosen, c.rejected))  # pyright: ignore[reportReturnType]


def turns(answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "Use tabs."}, {"role": "assistant", "content": answer}]


MEANINGS: list[tuple[dict[str, Any], Meaning]] = [
    # what the formats of data sets mean
    ({"chosen": GOOD}, (None, GOOD, None)),
    ({"chosen": GOOD, "rejected": BAD}, (None, GOOD, BAD)),
    ({"completion": GOOD}, (None, GOOD, None)),
    ({"completion": GOOD, "rejected": BAD}, (None, GOOD, BAD)),
    # thumbs
    ({"completion": BAD, "rating": -1}, (BAD, None, BAD)),
    ({"completion": BAD, "rating": -1.0, "feedback": "I said tabs."}, (BAD, None, BAD)),
    ({"completion": BAD, "label": False}, (BAD, None, BAD)),
    ({"completion": GOOD, "label": True}, (None, GOOD, None)),
    ({"completion": GOOD, "rating": 1}, (None, GOOD, None)),
    ({"said": BAD, "rating": -1}, (BAD, None, BAD)),
    ({"said": GOOD, "rating": 1}, (GOOD, None, None)),
    ({"said": GOOD, "label": True, "feedback": "Perfect."}, (GOOD, None, None)),
    ({"rejected": GOOD, "rating": 1}, (GOOD, None, None)),
    ({"rejected": GOOD, "said": GOOD, "rating": 1}, (GOOD, None, None)),
    # of two answers the praised one was said, the other is the worse one
    ({"said": GOOD, "chosen": GOOD, "rejected": BAD, "rating": 1}, (GOOD, GOOD, BAD)),
    # a wanted answer judges what was said
    ({"said": BAD, "chosen": GOOD}, (BAD, GOOD, BAD)),
    ({"said": BAD, "chosen": GOOD, "rating": -1}, (BAD, GOOD, BAD)),
    ({"said": GOOD, "chosen": GOOD}, (GOOD, GOOD, None)),
    ({"said": BAD, "chosen": GOOD, "rating": 1}, (BAD, GOOD, None)),
    ({"said": BAD, "chosen": BAD, "rating": -1}, (BAD, BAD, BAD)),
    # a remark alone judges nothing; what it is about was said
    ({"completion": BAD, "feedback": "I said tabs."}, (BAD, None, None)),
    ({"said": BAD, "feedback": "I said tabs.", "rating": 0}, (BAD, None, None)),
    ({"completion": GOOD, "rejected": BAD, "feedback": "I said tabs."}, (None, GOOD, BAD)),
]


@pytest.mark.parametrize(("given", "meaning"), MEANINGS)
def test_what_a_record_means(given: dict[str, Any], meaning: Meaning) -> None:
    found = Correction.model_validate({"prompt": "Use tabs.", **given})
    assert texts(found) == meaning
    again = Correction.model_validate(found.model_dump(mode="json", exclude_none=True))
    assert (again, again.digest(), again.identity()) == (found, found.digest(), found.identity())
    if "completion" in given:
        answer = given.pop("completion")
        assert texts(Correction.model_validate({"messages": turns(answer), **given})) == meaning


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"completion": BAD, "rating": -1, "rejected": GOOD}, "say which was wanted"),
        ({"completion": BAD, "label": "false"}, "`label` must be true or false"),
        ({"completion": BAD, "label": True, "rating": -1}, "say different things"),
        ({"said": "", "rating": -1}, "`said` is empty"),
        ({"said": [{"role": "user", "content": "a"}], "rating": -1}, "exactly one assistant message"),
        ({"completion": GOOD, "chosen": GOOD}, "both `completion` and `chosen`"),
        ({"said": GOOD}, "nothing to learn"),
        ({"chosen": GOOD, "provenance": "dreamt"}, "observed"),
        ({"chosen": GOOD, "schema_version": 3}, "Extra inputs"),
    ],
)
def test_what_contradicts_itself_is_refused(given: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        Correction.model_validate({"prompt": "Use tabs.", **given})


def test_an_answer_cut_short_is_known_as_one() -> None:
    for reason, cut in (("length", True), ("unfinished", True), ("stop", False), (None, False)):
        c = Correction.model_validate({"prompt": "a", "said": BAD, "rating": -1, "finish_reason": reason})
        assert c.is_cut == cut
    other = {"prompt": "a", "said": BAD, "chosen": GOOD, "rejected": "No.", "finish_reason": "length"}
    assert not Correction.model_validate(other).is_cut


def test_provenance_may_be_a_word() -> None:
    c = Correction.model_validate({"prompt": "a", "chosen": "b", "provenance": "observed"})
    assert c.provenance is not None
    assert c.provenance.model_dump(exclude_none=True) == {"kind": "observed"}
    full = {"kind": "written", "source": "chats.json", "line": 7, "foreign_id": "m/1"}
    c = Correction.model_validate({"prompt": "a", "chosen": "b", "provenance": full})
    assert c.provenance is not None
    assert c.provenance.model_dump(exclude_none=True) == full


def test_where_a_record_comes_from_is_not_what_it_says() -> None:
    one = Correction.model_validate({"prompt": "a", "chosen": "b", "provenance": "written", "id": "x"})
    two = Correction.model_validate({"prompt": "a", "chosen": "b", "state": "candidate"})
    assert one.identity() == two.identity()
    for more in ({"rating": -1}, {"behaviour": "use"}, {"completion_id": "c"}, {"feedback": "f"}):
        assert Correction.model_validate({"prompt": "a", "chosen": "b", **more}).identity() != one.identity()


def test_digests_are_those_of_before() -> None:
    """The entries of lessons name what they taught by them."""
    pair = Correction.model_validate({"prompt": "a", "chosen": "b", "rejected": "c", "feedback": "d"})
    assert pair.digest() == "83352b72cff75797"
    praise = Correction.model_validate({"prompt": "a", "rejected": "c", "rating": 1})
    assert praise.digest() == "771fd3c951a0ae7c"
    said = Correction(
        prompt=[Message(role="user", content="a")],
        said=[Message(role="assistant", content="c")],
        chosen=[Message(role="assistant", content="b")],
        feedback="d",
    )
    assert said.digest() == pair.digest()


def test_a_ledger_of_before_is_read_with_its_meaning() -> None:
    def read(line: dict[str, Any]) -> Correction:
        return Correction.from_disk(migrate("correction", {"prompt": turns("x")[:1], **line}, "line"))

    bad, good = turns(BAD)[1:], turns(GOOD)[1:]
    # imported with a thumbs-down: it had been stored as wanted
    assert texts(read({"chosen": bad, "rating": -1})) == (BAD, None, BAD)
    # `/good`: it had been stored as rejected
    assert texts(read({"rejected": good, "rating": 1, "completion_id": "c"})) == (GOOD, None, None)
    # what was right stays
    assert texts(read({"chosen": good, "rejected": bad, "rating": -1})) == (None, GOOD, BAD)
    assert texts(read({"chosen": good, "rating": -1, "completion_id": "c"})) == (None, GOOD, None)
    assert texts(read({"chosen": good, "new_field": 1})) == (None, GOOD, None)
    assert read({"chosen": good, "new_field": 1}).model_extra == {"new_field": 1}
    assert texts(read({"chosen": good, "rating": -1, "schema_version": 2})) == (None, GOOD, None)
