"""Every exception of secondnature, in one place (any process).

Each error says what was found, what was expected and what to do (`hint`); each is also a standard
library type, so that callers who know nothing of us can still catch it; each survives pickling and
the wire (`to_wire` / `from_wire`), so that the trainer's error reaches the user unchanged.

    SecondnatureError
    ├── ConfigError(ValueError)             a setting is unknown or has a bad value
    ├── BadInput(ValueError)           400  what the caller sent is wrong
    │   ├── BadRecord                       a line of a file, or a field of a body
    │   ├── BadExample                      token ids outside the vocabulary, empty continuation
    │   └── ContextOverflow                 more tokens than the model can read
    ├── Unauthorized(PermissionError)  401  no key, or the wrong one
    ├── Forbidden(PermissionError)     403  the key is right, and does not open this
    ├── NotFound(LookupError)          404  unknown completion, job, lesson, model
    ├── Conflict(RuntimeError)         409  not now: the state of things forbids it
    │   ├── HomeInUse                       another server owns this home
    │   ├── TooNew                          a newer version wrote this home, or a file in it
    │   └── WrongState                      a lesson cannot go from its state to that one
    ├── TooLarge(ValueError)           413  a body or a field over its limit
    ├── Busy(RuntimeError)             429  a queue is full, or too many requests
    ├── StorageError(OSError)          507  the disk refused (full, read-only); nothing was acknowledged
    │   └── NotDurable                      it took the change, but a power loss may take it back
    ├── DamagedFile(ValueError)        500  a file of the home is not as it was written
    ├── WeightsError(RuntimeError)     500  weights could not be read, mapped or written
    │   ├── UnsupportedModel           400  the architecture or dtype cannot be trained here
    │   ├── BadCheckpoint                   a file of weights is broken or of another model
    │   └── BadDelta                        a delta is broken, or its base is not these weights
    ├── TrainingError(RuntimeError)    500  a job ended without a result; its writes were undone
    │   ├── NonFinite(FloatingPointError)   a loss or a gradient was NaN or infinite
    │   ├── Exploded              a loss or a gradient is far beyond the lesson's first
    │   ├── StalePrefix                     a frozen context was computed with other weights
    │   ├── Cancelled                       somebody asked for it
    │   └── TrainerDied                     the trainer process is gone; it is restarted
    ├── SandboxFailed(RuntimeError)    500  the sandbox itself could not run (not: an answer that failed in it)
    └── Unreachable(ConnectionError)   503  no server answers, or it is shutting down
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "BadCheckpoint",
    "BadDelta",
    "BadExample",
    "BadInput",
    "BadRecord",
    "Busy",
    "Cancelled",
    "ConfigError",
    "Conflict",
    "ContextOverflow",
    "DamagedFile",
    "Exploded",
    "Forbidden",
    "HomeInUse",
    "NonFinite",
    "NotDurable",
    "NotFound",
    "SandboxFailed",
    "SecondnatureError",
    "StalePrefix",
    "StorageError",
    "TooLarge",
    "TooNew",
    "TrainerDied",
    "TrainingError",
    "Unauthorized",
    "Unreachable",
    "UnsupportedModel",
    "WeightsError",
    "WrongState",
]


class SecondnatureError(Exception):
    """Base of all our errors: a message (found / expected) and a hint (what to do)."""

    status: int = 500
    """The HTTP status with which a server answers."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    @property
    def type(self) -> str:
        """The name that users see in `{"error": {"type": ...}}`."""
        return type(self).__name__

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.message, self.hint))

    def to_wire(self) -> dict[str, str]:
        """The error as the plain mapping that both doors (HTTP, ZMQ) send."""
        return {"type": self.type, "message": self.message, "hint": self.hint}


class ConfigError(SecondnatureError, ValueError):
    """A setting is unknown or has a value that cannot be used."""

    status = 400


class BadInput(SecondnatureError, ValueError):
    """What the caller sent is wrong; nothing was written."""

    status = 400


class BadRecord(BadInput):
    """A line of a file, or a field of a body, is not what it should be."""


class BadExample(BadInput):
    """An example cannot be trained on: ids outside the vocabulary, nothing to learn."""


class ContextOverflow(BadInput):
    """More tokens than the model can read."""


class Unauthorized(SecondnatureError, PermissionError):
    """No key was sent, or the wrong one."""

    status = 401


class Forbidden(SecondnatureError, PermissionError):
    """The key that was sent is right, and does not open this."""

    status = 403


class NotFound(SecondnatureError, LookupError):
    """The named thing does not exist (any more)."""

    status = 404


class Conflict(SecondnatureError, RuntimeError):
    """The request is fine, but the state of things forbids it now."""

    status = 409


class HomeInUse(Conflict):
    """Another server owns this home."""


class TooNew(Conflict):
    """A newer version of secondnature wrote this home, or a file in it."""


class WrongState(Conflict):
    """A lesson cannot go from the state it is in to the one that was asked for."""


class TooLarge(SecondnatureError, ValueError):
    """A body or a field is over its limit."""

    status = 413


class Busy(SecondnatureError, RuntimeError):
    """A queue is full, or requests come too fast; try again later."""

    status = 429


class StorageError(SecondnatureError, OSError):
    """The disk refused; nothing was acknowledged."""

    status = 507


class NotDurable(StorageError):
    """The change was made, but it is not known to be on the disk: a power loss may take it back."""


class DamagedFile(SecondnatureError, ValueError):
    """A file of the home is not as it was written; says which, and where."""


class WeightsError(SecondnatureError, RuntimeError):
    """Weights could not be read, mapped or written."""


class UnsupportedModel(WeightsError):
    """The architecture, dtype or shape cannot be trained in place here."""

    status = 400


class BadCheckpoint(WeightsError):
    """A file of weights is broken, or belongs to another model."""


class BadDelta(WeightsError):
    """A delta is broken, or its base is not these weights."""


class TrainingError(SecondnatureError, RuntimeError):
    """A job ended without a result; its writes were undone."""


class NonFinite(TrainingError, FloatingPointError):
    """A loss or a gradient was NaN or infinite; says which example and which tensor."""


class Exploded(TrainingError):
    """A loss or a gradient is finite but far beyond what the lesson began with; says which example or tensor."""


class StalePrefix(TrainingError):
    """A frozen context was computed with other weights than those that are to read it."""


class Cancelled(TrainingError):
    """Somebody asked for the job to end; its writes were undone."""


class TrainerDied(TrainingError):
    """The trainer process is gone; its writes were undone and it is being restarted."""


class SandboxFailed(SecondnatureError, RuntimeError):
    """The sandbox itself could not run; says nothing about the answers."""


class Unreachable(SecondnatureError, ConnectionError):
    """No server answers, or it is shutting down."""

    status = 503


_BY_NAME: dict[str, type[SecondnatureError]] = {
    name: cls
    for name, cls in list(globals().items())
    if isinstance(cls, type) and issubclass(cls, SecondnatureError)
}


def from_wire(error: dict[str, Any]) -> SecondnatureError:
    """The exception that `to_wire` described; an unknown type becomes the base class."""
    cls = _BY_NAME.get(str(error.get("type", "")), SecondnatureError)
    return cls(str(error.get("message", "")), str(error.get("hint", "")))
