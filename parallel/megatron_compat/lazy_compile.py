"""Import of Megatron-core without `torch.compile` on a machine without CUDA; does nothing with CUDA.

Megatron-core decorates fused functions with `torch.compile` at import, which loads Dynamo and Inductor: two
of the five seconds that a process takes to start. This engine calls none of these functions. On a CPU, where
every rank of every test pays for its start, they are left uncompiled.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_NAME = "megatron.core"


def install() -> None:
    """Patch the first import of Megatron-core; does nothing if it is already imported."""
    if _NAME not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """A finder that delegates to the regular ones and wraps the loader of Megatron-core, once."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _NAME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = _without_compiler(spec.loader.exec_module)
        return spec


def _without_compiler(load: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    def exec_module(module: ModuleType) -> None:
        import torch

        if torch.cuda.is_available():
            load(module)
            return
        compiler, torch.compile = torch.compile, _uncompiled
        try:
            load(module)
        finally:
            torch.compile = compiler

    return exec_module


def _uncompiled(function: Callable | None = None, **options: Any) -> Callable:
    """Replace `torch.compile`, as a function and as a decorator with options: return the function itself."""
    return _uncompiled if function is None else function
