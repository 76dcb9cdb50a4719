"""In every Python process of a test on the null GPU: what kernels should have computed is left out, or played.

Kernels do nothing there, so a model computes what lies in memory. The self-tests, which compare such numbers, and
the guards against numbers that are none, would end every start and every lesson: they are left out. A step of the
optimizer is a copy from the host, for that the null GPU does. Nothing else is changed. The kernels themselves are
launched by benchmarks/gpu_prove.py, which does not load this.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


def _nothing(*_: Any, **__: Any) -> float:
    return 0.0


def _self_test(module: Any) -> None:
    module.self_test = _nothing


def _finite_rows(module: Any) -> None:
    module.finite_rows = lambda logits: [True] * len(logits)


def _step_by_copy(module: Any) -> None:
    def step(self: Any, gradients: Any, *, writing: Any, **_: Any) -> None:
        with writing():
            for tensor in self.parameters.values():
                tensor.copy_(tensor.cpu() + 0.125)
        self.steps += 1

    module.Apollo.step = step


CHANGED: dict[str, Callable[[Any], None]] = {
    "secondnature.engines.local.self_test": _self_test,
    "secondnature.train.prefix": _self_test,
    "secondnature.train.apollo": _step_by_copy,
    "secondnature.engines.local.sampling": _finite_rows,
}


class _Loader(importlib.abc.Loader):
    def __init__(self, real: Any, change: Callable[[Any], None]) -> None:
        self._real, self._change = real, change

    def create_module(self, spec: Any) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)
        self._change(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        change = CHANGED.get(name)
        spec = importlib.machinery.PathFinder.find_spec(name, path) if change else None
        if spec is not None and change is not None:
            spec.loader = _Loader(spec.loader, change)
        return spec


if os.environ.get("NULLGPU"):
    sys.meta_path.insert(0, _Finder())
