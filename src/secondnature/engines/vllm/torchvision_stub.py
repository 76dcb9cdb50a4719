"""Stand-ins for torchvision where it is not installed (every process of vLLM).

vLLM's text models of the Qwen3.5 family import, through transformers, modules that read images, and these import
torchvision unasked: gigabytes of CUDA that a server of text on CPUs has no use for, and where it does not fit the
installed torch, vLLM itself breaks. So its names can be imported; what is done with one of them is an ImportError.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Never

__all__ = ["stand_in"]

NAME = "torchvision"


class _Placeholders(type):
    """Of a placeholder: its attributes are placeholders too, calling it fails."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _placeholder(f"{cls.__qualname__}.{name}")

    def __call__(cls, *args: Any, **kwargs: Any) -> Never:
        raise ImportError(f"{cls.__qualname__} was called, but {NAME} is not installed", name=NAME)


def _placeholder(name: str) -> type:
    return _Placeholders(name, (), {"__module__": NAME})


class _Module(ModuleType):
    """Has every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _placeholder(f"{self.__name__}.{name}")


class _Finder(MetaPathFinder, Loader):
    """Makes torchvision and everything below it; asked last, so that a real one would be found before."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == NAME or fullname.startswith(f"{NAME}."):
            return ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


def stand_in() -> bool:
    """Let torchvision's names be imported if it is not installed; says whether this was needed."""
    if importlib.util.find_spec(NAME) is not None:
        return False
    from transformers.utils.import_utils import is_torchvision_available

    is_torchvision_available()  # it remembers its answer, no: what can do without goes on doing without
    sys.meta_path.append(_Finder())
    return True
