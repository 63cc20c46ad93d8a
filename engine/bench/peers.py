"""Other people's kernels as contenders: probed by symbol, listed as absent where they are not installed."""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from glm_rlhf.engine.bench.harness import Answer, Contender


def peers(device: torch.device, *contenders: Callable[[], Contender]) -> list[Contender]:
    """Return the contenders that need CUDA, made there; none on the CPU."""
    return [make() for make in contenders] if device.type == "cuda" else []


def peer(
    name: str,
    module: str,
    symbol: str,
    make: Callable[[Any], Callable[[], Any]],
    *,
    prepare: Callable[[], None] | None = None,
    answer: Callable[[Any], Answer] | None = None,
) -> Contender:
    """Return a contender that runs `module.symbol`, or one that says why it cannot.

    Args:
        name: in the report.
        module: where the symbol is imported from.
        symbol: function or class.
        make: given the symbol, returns the timed work; called only where the symbol exists.
        prepare: as in `Contender`.
        answer: as in `Contender`.
    """
    try:
        found = getattr(importlib.import_module(module), symbol)
    except (ImportError, OSError) as error:  # OSError: a shared library that the machine has not
        return _absent(name, f"{module} is not installed ({str(error).splitlines()[0][:80]})")
    except AttributeError:
        return _absent(name, f"{module} has no {symbol}")
    except Exception as error:  # kernels that refuse this device while they are imported
        return _absent(name, f"{module} fails on import: {type(error).__name__}")
    try:
        run = make(found)
    except Exception as error:  # a version whose arguments differ is reported, not fatal
        return _absent(name, f"{module}.{symbol} cannot be set up: {type(error).__name__}: {str(error)[:80]}")
    return Contender(name=name, run=run, prepare=prepare, answer=answer)


def _absent(name: str, reason: str) -> Contender:
    return Contender(name=name, run=_never, absent=reason)


def _never() -> None:
    raise AssertionError("an absent contender is never run")
