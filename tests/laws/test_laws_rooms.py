"""The rooms are on every list that checks them: what is not on them is not checked, and no law would say so."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest

import secondnature

SOURCE = Path(secondnature.__file__).parent
ROOT = SOURCE.parents[1]
LARGEST_SHARE = 0.25
"""Of all lines: a room above it is two rooms."""
BESIDE_THE_DOOR = {"cli", "embedded"}
"""Neither behind the door (law 8) nor a room of the client: the command line itself, and the data of a model."""
NO_TORCH = "No torch in the rooms of the client, the evidence and the report"


def rooms() -> set[str]:
    """Directories and single files right under the package."""
    files = {p.stem for p in SOURCE.glob("*.py") if not p.stem.startswith("__")}
    return files | {p.parent.name for p in SOURCE.glob("*/__init__.py")}


def num_lines(room: str) -> int:
    files = [SOURCE / f"{room}.py", *(SOURCE / room).rglob("*.py")]
    return sum(len(f.read_text(encoding="utf-8").splitlines()) for f in files if f.is_file())


class Lists:
    """What the four lists say: contracts, strict types, law 8, the table of CONTRIBUTING."""

    def __init__(self) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
        contracts = {c["name"]: c for c in project["importlinter"]["contracts"]}
        (layers,) = (c for c in contracts.values() if c["type"] == "layers")
        assert layers["exhaustive"] is True
        names = " ".join(layers["layers"])
        self.layers = set(re.findall(r"\w+", re.sub(r"\(\w+\)", "", names)))  # (in brackets: not made yet)
        self.to_come = set(re.findall(r"\((\w+)\)", names))
        self.light = {m.removeprefix("secondnature.") for m in contracts[NO_TORCH]["source_modules"]}
        self.strict = {Path(p).stem for p in project["pyright"]["strict"] if p.startswith("src/")}
        law = ast.parse((ROOT / "tests/laws/test_law_8_one_path.py").read_text(encoding="utf-8"))
        named = {ast.unparse(n.targets[0]): n.value for n in law.body if isinstance(n, ast.Assign)}
        self.behind_the_door = set(ast.literal_eval(named["BEHIND_THE_DOOR"]))
        text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
        (table,) = re.findall(r"\| room \|.*?\n\n", text, re.DOTALL)
        first_columns = [row.split("|")[1] for row in table.splitlines()[2:] if row]
        self.table = {name for column in first_columns for name in re.findall(r"`(\w+)`", column)}

    def not_listed(self, found: Iterable[str]) -> list[str]:
        """Each room with the list that it is missing on."""
        wrong: list[str] = []
        for room in sorted(found):
            if room not in self.layers | self.to_come:
                wrong.append(f"{room}: not in the layers contract of pyproject.toml")
            if room not in self.table:
                wrong.append(f"{room}: not in CONTRIBUTING.md's table of rooms")
            if room in self.light | {"cli"} and room not in self.strict:
                wrong.append(f"{room}: light, but not in pyright's strict list")
            if room not in self.light | self.behind_the_door | BESIDE_THE_DOOR:
                wrong.append(f"{room}: neither behind the door (law 8) nor in the contract `{NO_TORCH}`")
        return wrong


def test_every_room_is_on_every_list() -> None:
    found = rooms()
    assert len(found) > 15
    assert Lists().not_listed(found) == []


def test_the_lists_name_no_room_that_is_not_there() -> None:
    lists, found = Lists(), rooms()
    for named in (lists.layers, lists.light, lists.strict, lists.behind_the_door, lists.table):
        assert named - found == set()


def test_a_room_that_nobody_listed_is_found() -> None:
    wrong = Lists().not_listed({*rooms(), "attic"})
    assert len(wrong) == 3
    assert all(line.startswith("attic: ") for line in wrong)


@pytest.mark.parametrize("name", ["layers", "table", "strict", "behind_the_door"])
def test_a_room_taken_off_a_list_is_found(name: str) -> None:
    lists = Lists()
    room = sorted(getattr(lists, name))[0]
    getattr(lists, name).discard(room)
    assert lists.not_listed(rooms())


def test_no_room_is_above_a_quarter_of_the_lines() -> None:
    lines = {room: num_lines(room) for room in rooms()}
    total = sum(lines.values())
    assert min(lines.values()) > 0
    assert {room: n for room, n in lines.items() if n > LARGEST_SHARE * total} == {}
