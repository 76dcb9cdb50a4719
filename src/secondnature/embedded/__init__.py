"""The default model: a small hybrid that this project trains on text that it generates itself.

`path()` is the directory of the shipped weights. Everything heavy (torch, transformers) stays in the modules that
need it: `build` trains, `evaluate` measures, `generator` and `scenarios` write text, `examples` writes examples/.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["path"]


def path() -> Path:
    """The directory of the shipped weights, loadable by transformers' `from_pretrained`."""
    return Path(__file__).parent / "weights"
