"""First stage of the sandbox: put up the kernel's walls, then become the zygote (a process of its own).

Run as `python -s -S -P -B confine.py DEVNULL_FD` with an empty environment; not imported by anything. An empty
network namespace where the kernel allows one, then `no_new_privs` and a seccomp filter that refuses sockets,
writing to the file system, io_uring, namespaces, tracing and the like, then exec of zygote.py. It is a stage of its
own because it needs ctypes, which must not exist in a process that runs answers. A wall that cannot be put up is
left out, never silently: the zygote returns the list of those that stand.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from pathlib import Path

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LOAD, JUMP_EQUAL, JUMP_AT_LEAST, JUMP_ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050001  # SECCOMP_RET_ALLOW; SECCOMP_RET_ERRNO | EPERM
WRITING = 0o1 | 0o2 | 0o100 | 0o1000  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC

# Refused whatever the arguments. Per machine: AUDIT_ARCH, numbers, and (number, index of `flags`) of the opens.
# In words: socket, socketpair, connect, ptrace, shmget, semget, msgget, rename, mkdir, rmdir, creat, link, unlink,
# symlink, chmod, fchmod, chown, fchown, lchown, truncate, utime, mknod, personality, pivot_root, modify_ldt,
# adjtimex, chroot, acct, settimeofday, mount, umount2, swapon, reboot, sethostname, setdomainname, iopl, ioperm,
# init_module, delete_module, quotactl, *setxattr, *removexattr, io_setup, clock_settime, utimes, mq_open,
# kexec_load, add_key, request_key, keyctl, the *at variants, unshare, setns, process_vm_*, finit_module, bpf,
# perf_event_open, memfd_create, userfaultfd, open_by_handle_at, io_uring_*, pidfd_*, the new mount calls, openat2.
# fmt: off
MACHINES: dict[str, tuple[int, tuple[int, ...], tuple[tuple[int, int], ...]]] = {
    "x86_64": (
        0xC000003E,
        (
            29, 41, 42, 53, 64, 68, 76, 82, 83, 84, 85, 86, 87, 88, 90, 91, 92, 93, 94, 101, 132, 133,
            135, 154, 155, 159, 161, 163, 164, 165, 166, 167, 169, 170, 171, 172, 173, 175, 176, 179,
            188, 189, 190, 197, 198, 199, 206, 227, 235, 240, 246, 248, 249, 250, 258, 259, 260, 261,
            263, 264, 265, 266, 268, 272, 280, 298, 300, 304, 308, 310, 311, 313, 316, 319, 321, 323,
            425, 426, 427, 428, 429, 430, 431, 432, 433, 434, 437, 438, 442, 447,
        ),
        ((2, 1), (257, 2)),
    ),
    "aarch64": (
        0xC00000B7,
        (
            0, 5, 6, 7, 14, 15, 16, 33, 34, 35, 36, 37, 38, 39, 40, 41, 45, 51, 52, 53, 54, 55, 60,
            88, 89, 92, 97, 104, 105, 106, 112, 117, 142, 161, 162, 170, 171, 180, 186, 190, 194, 198,
            199, 203, 217, 218, 219, 224, 241, 262, 265, 268, 270, 271, 273, 276, 279, 280, 282, 425,
            426, 427, 428, 429, 430, 431, 432, 433, 434, 437, 438, 442, 447,
        ),
        ((56, 2),),
    ),
}
# fmt: on


def refusing_filter(machine: str) -> bytes | None:
    """The seccomp program (struct sock_filter[]) for this machine, or None where its numbers are not known."""
    if machine not in MACHINES or sys.byteorder != "little":
        return None
    architecture, refused, opens = MACHINES[machine]

    def step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_true, if_false, value)

    program = [
        step(LOAD, 4),  # seccomp_data.arch: another ABI has other numbers, so it is refused as a whole
        step(JUMP_EQUAL, architecture, 1, 0),
        step(RETURN, REFUSE),
        step(LOAD, 0),  # seccomp_data.nr
        step(JUMP_AT_LEAST, 0x40000000, 0, 1),  # x32
        step(RETURN, REFUSE),
    ]
    for number in refused:
        program += [step(JUMP_EQUAL, number, 0, 1), step(RETURN, REFUSE)]
    for number, argument in opens:
        program += [
            step(JUMP_EQUAL, number, 0, 4),
            step(LOAD, 16 + 8 * argument),
            step(JUMP_ANY_BIT, WRITING, 0, 1),
            step(RETURN, REFUSE),
            step(RETURN, ALLOW),
        ]
    return b"".join([*program, step(RETURN, ALLOW)])


def put_up() -> list[str]:
    """Put up what the kernel grants; the names of the walls that stand."""
    walls: list[str] = []
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        unshare, prctl = libc.unshare, libc.prctl
    except (OSError, AttributeError):
        return walls
    if unshare(CLONE_NEWNET) == 0 or unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0:
        walls.append("network namespace")
    program = refusing_filter(platform.machine())
    if program is not None and prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0:
        code = ctypes.create_string_buffer(program, len(program))
        header = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))  # struct sock_fprog
        if prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0) == 0:
            walls.append("seccomp")
    return walls


def main() -> None:
    """Put up the walls and become the zygote."""
    zygote = Path(__file__).with_name("zygote.py")
    arguments = [sys.executable, "-s", "-S", "-P", "-B", str(zygote), sys.argv[1], ",".join(put_up())]
    os.execve(sys.executable, arguments, {"PYTHONHASHSEED": "0"})  # noqa: S606 - our own program, no shell


if __name__ == "__main__":
    main()
