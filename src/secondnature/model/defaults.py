"""How a model's makers want it sampled: `generation_config.json`, for requests that do not say (server; no torch).

As vLLM: `temperature`, `top_p`, `top_k`, `min_p` and `repetition_penalty` of that file are taken where a client's
request leaves them out. Probes, lessons and own answers say what they want and never come here.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

__all__ = ["SamplingDefaults", "sampling_defaults"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class SamplingDefaults:
    """What a request that does not say is sampled with."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


_ALLOWED: dict[str, Callable[[float], bool]] = {
    "temperature": lambda x: 0 <= x <= 5,
    "top_p": lambda x: 0 < x <= 1,
    "top_k": lambda x: -1 <= x < 2**31 and x == int(x),
    "min_p": lambda x: 0 <= x <= 1,
    "repetition_penalty": lambda x: 0 < x <= 100,
}


def sampling_defaults(directory: Path) -> SamplingDefaults:
    """What the model's `generation_config.json` says; a value that cannot be one is passed over with a warning."""
    path = directory / "generation_config.json"
    try:
        read: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return SamplingDefaults()
    except (OSError, ValueError, RecursionError) as e:
        _LOG.warning("%s: %s; sampling as if it were not there", path, e)
        return SamplingDefaults()
    given = cast("dict[str, Any]", read) if isinstance(read, dict) else {}
    found: dict[str, Any] = {}
    for name in (f.name for f in fields(SamplingDefaults)):
        value = given.get(name)
        if value is None:
            continue
        if isinstance(value, int | float) and math.isfinite(value) and _ALLOWED[name](value):
            found[name] = int(value) if name == "top_k" else float(value)
        else:
            _LOG.warning("%s: %s is %.40r; taken as if it were not there", path, name, value)
    return SamplingDefaults(**found)
