"""A home as the version before formats had numbers left it: `old_home.txt` has its files, each under its name.

Written by that version itself (two lessons of the talker, the first undone, the second kept), without the files of
weights. The JSON files stand on one line there and are indented here, as it wrote them.
"""

from __future__ import annotations

import json
from pathlib import Path

FILES = Path(__file__).with_name("old_home.txt")
MODEL, BASE_VERSION = Path("/models/talker"), "wed731a7f3d5b30d0"
FINGERPRINT = "15dd044cbe52a7157494216a3e0474b75342f79d9d81ed790d255e47eded5a4d"


def write_old_home(home: Path) -> Path:
    """Its files, under `home`."""
    for part in FILES.read_text(encoding="utf-8").split("=== ")[1:]:
        name, _, text = part.partition("\n")
        if name.endswith(".json"):
            text = json.dumps(json.loads(text), indent=2) + "\n"
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return home
