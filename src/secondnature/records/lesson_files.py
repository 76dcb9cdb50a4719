"""What a lesson file says of itself: which lesson, of which model, and the parts that follow (any process)."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from secondnature.records.base import Record
from secondnature.records.lessons import Lesson

LESSON_FILE_VERSION = 1
PartName = Literal[
    "manifest.json",
    "corrections.jsonl",
    "probes.jsonl",
    "evidence.json",
    "delta.safetensors",
    "difference.safetensors",
    "update.safetensors",
]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ModelIdentity(Record):
    """What has to be the same where a lesson is to be added."""

    architecture: str
    """`model.load.fingerprint`."""
    base_version: str
    """Content id of the model's own weights, before any lesson."""
    tokenizer_sha256: Sha256
    """Of what makes tokens: vocabulary, merges, normalisation; not of how the file is written."""
    template_sha256: Sha256
    """Of the chat template."""
    tensors: dict[str, tuple[str, list[int]]]
    """Name -> dtype and shape, of every parameter as it is served."""


class LessonPart(Record):
    """A part of a lesson file."""

    nbytes: Annotated[int, Field(ge=0)]
    sha256: Sha256


class LessonManifest(Record):
    """`manifest.json` of a lesson file."""

    schema_version: int = LESSON_FILE_VERSION
    lesson: Lesson
    """The entry of the log that it comes from: its settings, its cause, why it was kept."""
    model: ModelIdentity
    model_name: str
    """For people: what the model is called where the lesson was taught."""
    parts: dict[PartName, LessonPart]
    """All but the manifest."""
    written_by: str
    """The version of secondnature."""
    exported_at: datetime
