"""What server and trainer say to each other over ZMQ: msgspec structs in msgpack, tagged by name (both processes).

Nothing is ever unpickled. Light on purpose: the trainer reads its messages without HTTP or its bodies.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from secondnature import errors

Layout = Literal["transformers", "vllm"]
"""Whose names and shapes the tensors of an arena have."""


class Attach(msgspec.Struct, tag="attach", frozen=True):
    """Server -> trainer: map these weights."""

    manifest: str
    model_dir: str
    threads: int
    layout: Layout = "transformers"
    share: float = 1.0
    """Of the time, while requests are being answered, that the trainer may work."""


class TokenExample(msgspec.Struct, tag="work", frozen=True):
    """One example in token ids."""

    context: list[int]
    continuation: list[int]
    rejected: list[int] | None = None
    weight: float = 1.0
    label: str = ""
    """How an error names it: `correction 3`, `replay 12`."""
    teacher: list[int] | None = None
    """SDFT: the context in which the teacher reads the continuation."""
    by_distribution: bool = False
    """Replay by distribution: held to what the model said before, not trained on."""


class DevelopmentProbe(msgspec.Struct, tag="look", frozen=True):
    """One development probe: the margin of `wanted` over `unwanted` after `context`, where it has any."""

    context: list[int]
    wanted: list[int]
    """Empty, like `unwanted`: it has no margin."""
    unwanted: list[int]
    side: str
    spoken: bool = False
    """Whether it passes is found by asking the serving engine (`Asking`), not by the two answers."""


class Train(msgspec.Struct, tag="train", frozen=True):
    """Server -> trainer: one job."""

    job: str
    lesson: str
    objective: str
    steps: int
    batch_size: int
    seed: int
    examples: list[TokenExample]
    replay: list[TokenExample]
    replay_share: float
    replay_weight: float
    learned_loss: float
    optimizer: dict[str, Any]
    optimizer_in: str | None
    """The state to start from (a file of this home), or None for a fresh one."""
    optimizer_out: str
    development: list[DevelopmentProbe]
    until_margin: float | None
    until_passed: float | None
    look_every: int
    kl: dict[str, list[TokenExample]]
    """Prompts with the base's own answers, by set (`new`, `replay`)."""


class Judged(msgspec.Struct, tag="judged", frozen=True):
    """Server -> trainer: which of the spoken development probes passed, in order, after that step."""

    job: str
    step: int
    passed: list[bool]


class Cancel(msgspec.Struct, tag="cancel", frozen=True):
    """Server -> trainer: stop before the next step."""

    job: str


class Shutdown(msgspec.Struct, tag="shutdown", frozen=True):
    """Server -> trainer: end the process."""


class Hello(msgspec.Struct, tag="hello", frozen=True):
    """Trainer -> server: the first word, before anything heavy is imported; `Attach` may be sent now."""

    pid: int


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """Trainer -> server: mapped and checked."""

    pid: int
    num_tensors: int


class Progress(msgspec.Struct, tag="progress", frozen=True):
    """Trainer -> server: one line of metrics.jsonl (`kind`: step, look, kl), or how far a phase is.

    `{"kind": "phase", "phase": a TrainerPhase, "done": n, "total": m}` (0: not known) is news, not a record: it is
    told some times a second at most, and written nowhere.
    """

    job: str
    """Empty while the weights are mapped."""
    metric: dict[str, Any]


class Asking(msgspec.Struct, tag="asking", frozen=True):
    """Trainer -> server: ask the spoken development probes now. It writes nothing until it is told (`Judged`)."""

    job: str
    step: int


TrainerPhase = Literal[
    "mapping the weights",
    "checking the model",
    "loading the optimizer's state",
    "recording answers for the KL",
    "recording replay",
    "reading the teacher",
    "reading references",
    "looking at development probes",
    "training",
    "measuring the KL",
    "saving the optimizer's state",
]
"""What the trainer is doing, in the order in which a lesson comes through; looks come between the steps."""


class Done(msgspec.Struct, tag="done", frozen=True):
    """Trainer -> server: all writes are made, the optimizer's state is on disk."""

    job: str
    steps: int
    loss: float
    kl: dict[str, float]
    moved: list[dict[str, Any]]
    stopped_by: str
    """Why no further step was made: a key of `records.STOPPED_BY`, which has the sentences."""
    optimizer_sha256: str = ""
    """Of the optimizer's state as it lies on disk, 64 hex digits."""


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """Trainer -> server: the job ended without a result; the weights need to be made whole."""

    job: str
    error: dict[str, str]


ToTrainer = Attach | Train | Judged | Cancel | Shutdown
ToServer = Hello | Ready | Progress | Asking | Done | Failed
_encoder = msgspec.msgpack.Encoder()
_to_trainer: msgspec.msgpack.Decoder[ToTrainer] = msgspec.msgpack.Decoder(ToTrainer)
_to_server: msgspec.msgpack.Decoder[ToServer] = msgspec.msgpack.Decoder(ToServer)


def encode(message: ToTrainer | ToServer) -> bytes:
    """A message as msgpack."""
    return _encoder.encode(message)


def decode_for_trainer(data: bytes) -> ToTrainer:
    """What the server sent. Raises BadInput on anything that is not one of our messages."""
    try:
        return _to_trainer.decode(data)
    except msgspec.MsgspecError as e:
        raise errors.BadInput(
            f"not a message for the trainer: {e}", "server and trainer differ in version?"
        ) from None


def decode_for_server(data: bytes) -> ToServer:
    """What the trainer sent. Raises BadInput on anything that is not one of our messages."""
    try:
        return _to_server.decode(data)
    except msgspec.MsgspecError as e:
        raise errors.BadInput(
            f"not a message for the server: {e}", "server and trainer differ in version?"
        ) from None
