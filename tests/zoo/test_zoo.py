"""Models as people have them: one of each thing that is special; `make test-zoo` drives all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from architectures import FAST
from drive import drive


@pytest.mark.parametrize("name", FAST)
def test_served_taught_undone_and_exported_as_transformers_has_it(name: str, tmp_path: Path) -> None:
    row = drive(name, tmp_path)
    for found, difference in ((row.answers, row.difference), (row.exported, row.exported_difference)):
        equal, asked = found.split("/")
        assert equal == asked
        assert difference < 3e-5
    assert row.rises[0] == "-"
    assert row.undone
