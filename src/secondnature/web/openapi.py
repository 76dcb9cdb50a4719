"""The OpenAPI document: `python -m secondnature.web.openapi > docs/reference/openapi.json`.

Made from the routes alone: no model is loaded and nothing is started. A test compares the committed file with it.
"""

from __future__ import annotations

import json
import sys
from typing import Any, cast

from secondnature.config import Settings
from secondnature.lessons.teaching import Teaching
from secondnature.web.application import local_application


def document() -> dict[str, Any]:
    """The document that a server of this version answers at `/openapi.json`."""
    none = cast(Any, None)  # the routes only hold on to what lies behind them
    teaching = Teaching(
        Settings(),
        home=none,
        arena=none,
        clock=none,
        runner=none,
        ledger=none,
        memory=none,
        feedback=none,
        key="",
        correction_key="",
        model_name="",
        wiring=none,
    )
    return local_application(teaching, none, none).openapi()


def text() -> str:
    """The committed file's content."""
    return json.dumps(document(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(text())
