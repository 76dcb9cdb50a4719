"""The counters beside the weights: writes begun, writes done, requests in flight (engine and trainer).

They lie in the first page of the arena's file, in host memory also where the weights are elsewhere. Each has one
writer at a time. Who computes reads them before and after: a write that begun and is not done, or a count that
moved, says what the computation overlapped with. That holds only if the others see the counters and the weights
change in the order in which they were written. x86-64 keeps that order by itself; other processors get a barrier
of memory from the kernel (membarrier(2)), which costs about as much as any system call. Where neither is there,
nothing is served.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Callable, Generator

import numpy as np

from secondnature.errors import WeightsError

__all__ = ["HEADER_BYTES", "MAGIC", "Counters", "barrier", "membarrier"]

HEADER_BYTES = 4096
MAGIC = 0x5EC0_0D0A_7012_0001
_SYSCALL = {"x86_64": 324, "aarch64": 283, "riscv64": 283, "loongarch64": 283, "ppc64le": 365, "s390x": 356}
"""The number of membarrier(2), by machine (linux/unistd.h of each)."""
_QUERY, _GLOBAL_EXPEDITED = 0, 1 << 1
_ORDERED = frozenset({"x86_64", "AMD64"})
"""Stores are seen in their order, and loads are made in theirs."""


def membarrier(machine: str) -> Callable[[], None] | None:
    """A function that is a full barrier of memory for the thread that calls it; None: this kernel has none.

    Both sides call it, so nobody has to be interrupted: `MEMBARRIER_CMD_GLOBAL_EXPEDITED` orders the caller's own
    accesses, and interrupts only processes that asked for it, which ours do not.
    """
    number = _SYSCALL.get(machine)
    if number is None:
        return None
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long
    arguments = [ctypes.c_long(number), *(ctypes.c_int(x) for x in (_GLOBAL_EXPEDITED, 0, 0))]
    known = syscall(ctypes.c_long(number), ctypes.c_int(_QUERY), ctypes.c_int(0), ctypes.c_int(0))
    if known < 0 or not known & _GLOBAL_EXPEDITED:
        return None

    def barrier() -> None:
        if syscall(*arguments) != 0:
            raise WeightsError(
                f"membarrier: {os.strerror(ctypes.get_errno())}",
                "is the system call filtered since the start?",
            )

    return barrier


def _nothing() -> None:
    """Where the processor keeps the order itself."""


def barrier(machine: str) -> Callable[[], None]:
    """What keeps counters and weights in order on this kind of machine.

    Raises:
        WeightsError: neither the processor nor the kernel does.
    """
    found = _nothing if machine in _ORDERED else membarrier(machine)
    if found is None:
        raise WeightsError(
            f"this {machine} kernel has no membarrier(2); without it a write could go unseen",
            "Linux 4.16 or newer is needed on machines that are not x86-64, and a sandbox that lets the call pass",
        )
    return found


try:
    _barrier: Callable[[], None] | WeightsError = barrier(platform.machine())
except WeightsError as _refused:
    _barrier = _refused


class Counters:
    """The counters of one mapping; `memory` is its beginning, of `HEADER_BYTES` at least.

    Raises:
        WeightsError: this machine cannot keep counters and weights in order.
    """

    def __init__(self, memory: memoryview) -> None:
        if isinstance(_barrier, WeightsError):
            raise WeightsError(_barrier.message, _barrier.hint)
        self._order = _barrier
        # [magic, writes begun, writes done, requests in flight]; aligned 8-byte stores, one writer of each
        self._words = np.frombuffer(memory, dtype=np.uint64, count=4)

    def format(self) -> None:
        """Mark new memory as an arena's."""
        self._words[0] = MAGIC

    @property
    def is_arena(self) -> bool:
        """Was this memory marked by `format`?"""
        return int(self._words[0]) == MAGIC

    @property
    def writes(self) -> tuple[int, int]:
        """(begun, done): equal when nobody is writing; never goes back.

        What was read of the weights before this call was read before these numbers, what is read after it, after.
        """
        self._order()
        begun, done = int(self._words[1]), int(self._words[2])
        self._order()
        return begun, done

    @property
    def load(self) -> int:
        """Requests that the server is answering now."""
        return int(self._words[3])

    @load.setter
    def load(self, requests: int) -> None:
        self._words[3] = max(0, requests)

    def begin(self) -> int:
        """A write begins: seen before anything of it. Gives what `end` takes."""
        begun = max(int(self._words[1]), int(self._words[2])) + 1
        self._words[1] = begun
        self._order()
        return begun

    def end(self, begun: int) -> None:
        """That write is done: seen after all of it. Never called for one that may still be under way."""
        self._order()
        self._words[2] = begun

    @contextlib.contextmanager
    def writing(self) -> Generator[None]:
        """Brackets writes into host memory: begun is seen before any of them, done after all. Takes no lock."""
        begun = self.begin()
        try:
            yield
        finally:
            self.end(begun)

    def close_torn_write(self) -> None:
        """After a writer died inside `writing`: counts its torn write as done. Call when nobody writes."""
        self._order()
        self._words[2] = self._words[1]
