"""What left a home: one line of `exports.jsonl` for each export (any process)."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from secondnature.records.base import Record

ExportForm = Literal["checkpoint", "lesson", "lora", "gguf"]


class Export(Record):
    """Weights, or what changes them, outside of the home."""

    schema_version: int = 1
    form: ExportForm
    """`checkpoint`: a Hugging Face directory. `lesson`: a file for another server of the same base.
    `lora`: a PEFT adapter. `gguf`: a file for llama.cpp."""
    path: str
    """Where it was written, on the server's machine."""
    lessons: list[str]
    """Ids of the lessons that are in it."""
    base_version: str
    """Of the model's own weights, before any lesson."""
    weights_version: str
    """Of the weights that it holds; of a lesson or an adapter, those that the lesson ended at."""
    nbytes: int
    details: dict[str, Any] = {}
    """Of an adapter: its rank, its error, what it cannot hold. Of a GGUF file: how its matrices are stored."""
    exported_at: datetime
