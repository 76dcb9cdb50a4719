"""A disk that refuses the n-th call: for every n one learns what a write leaves behind and what is told of it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest

CALLS = ("open", "write", "fsync", "replace", "rename", "ftruncate", "mkdir")
"""Of `os`: those that change a disk."""


class Disk:
    """Lets the n-th of the calls that change a disk fail; counts them."""

    def __init__(self, fail_at: int | None, error: BaseException | None = None) -> None:
        self.fail_at, self.made = fail_at, list[str]()
        self.error = error or OSError(errno.EIO, "Input/output error")

    def wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self.made.append(name)
            if len(self.made) - 1 == self.fail_at:
                raise self.error
            return call(*args, **kwargs)

        return wrapper


@contextmanager
def disk(fail_at: int | None = None, error: BaseException | None = None) -> Generator[Disk]:
    found = Disk(fail_at, error)
    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, found.wrapped(name, getattr(os, name)))
        yield found
