"""Faults that the torture found, each mended since: the short version makes them fail again every time.

(scenario, what the site has to match, error, lasting). A line that no site matches any more is an error: the
code has moved, and the line has to follow it.
"""

from __future__ import annotations

FOUND: tuple[tuple[str, str, str, bool], ...] = (
    # the revert was in the log, and nobody wrote the weights, nor said so
    ("revert of a revert", r"^storage\.open-file .*log\.save\S* < .*log\.create_revert", "memory", False),
    ("revert", r"^storage\.fsync < storage\.sync_dir\S* < lessons\.log\.create:", "memory", False),
    # an entry stayed queued that no job led
    ("kept at once", r"^storage\.fsync < storage\.sync_dir\S* < lessons\.log\.create:", "runtime", False),
    # an ending that the disk refused was told, and another one was found at the next start
    ("trainer dies at write", r"^storage\.open-file .*log\.save\S* < lessons\.runner\._end:", "os", True),
    # a file that had its new content already was taken for refused
    (
        "kept at once",
        r"^storage\.fsync < storage\.sync_dir\S* < storage\.sync_name.*log\.save.*life\.keep:",
        "memory",
        False,
    ),
    # the trainer had said hello, was never answered, and was waited for
    ("start with kept lessons", r"^socket\.send .*trainer\._advance", "runtime", False),
    # a start was refused with errors that say nothing
    ("start with kept lessons", r"^storage\.open-file .*home\.note_settings", "os", True),
    ("start with kept lessons", r"^storage\.stat .*checkpoint\.current", "os", False),
    ("start with kept lessons", r"^storage\.stat .*log\._read", "os", False),
    ("start with kept lessons", r"^arena\.create", "os", False),
    ("start with kept lessons", r"^storage\.stat < serve\.place\.model_directory", "os", False),
)
