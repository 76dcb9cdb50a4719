"""Memory that processes share by a file without a name: made here, opened elsewhere (any process with weights).

A `memfd_create` file, sealed against shrinking. Another process of the same user opens it through `/proc/PID/fd/N`,
which needs no name and no /dev/shm, and vanishes with its last user.
"""

from __future__ import annotations

import fcntl
import mmap
import os

from secondnature.errors import WeightsError

__all__ = ["make", "mapped", "open_", "refused"]


def refused(nbytes: int, cause: OSError) -> WeightsError:
    """What to say when the system has not that much memory."""
    return WeightsError(
        f"cannot allocate {nbytes:,} bytes of shared memory: {cause.strerror}",
        "free memory or raise the limit",
    )


def make(name: str, nbytes: int, allocated: int) -> int:
    """A file of `nbytes` whose first `allocated` bytes have memory for real; its descriptor.

    Raises:
        WeightsError: there is not that much memory.
    """
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as e:
        raise refused(nbytes, e) from e
    try:
        os.ftruncate(fd, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        os.posix_fallocate(fd, 0, allocated)
    except OSError as e:
        os.close(fd)
        raise refused(nbytes, e) from e
    return fd


def open_(pid: int, fd: int) -> int:
    """A descriptor of our own for the file that process `pid` holds as `fd`.

    Raises:
        WeightsError: the owner is gone, or may not be looked into.
    """
    try:
        return os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as e:
        raise WeightsError(
            f"cannot map the weights of process {pid}: {e.strerror}",
            "is the server alive, and the same user?",
        ) from e


def mapped(fd: int, nbytes: int) -> mmap.mmap:
    """The file's first bytes as memory, shared, to be read and written."""
    return mmap.mmap(fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
