"""Megatron-core's import on a machine without CUDA, without PyTorch's compiler; inert where CUDA is.

Megatron-core decorates fused functions with `torch.compile` as it is imported, and that loads Dynamo and
Inductor: two of five seconds of a process's start. No function that this engine calls is among them, so on
a CPU, where every rank of every test pays for its start, they stay as they are written.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_NAME = "megatron.core"


def install() -> None:
    """Have Megatron-core imported so, once, when it is wanted; does nothing where it is imported already."""
    if _NAME not in sys.modules and not any(isinstance(one, _Finder) for one in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds Megatron-core once, where everybody does, and watches over its loading."""

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
        compiler, torch.compile = torch.compile, _as_written
        try:
            load(module)
        finally:
            torch.compile = compiler

    return exec_module


def _as_written(function: Callable | None = None, **options: Any) -> Callable:
    """Stand for `torch.compile`, as a function and as a decorator with options."""
    return _as_written if function is None else function
