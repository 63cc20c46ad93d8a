"""What a patch of `parallel/megatron_compat` relies on upstream, checked so that a failure names both."""

import dis
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from types import CodeType
from typing import Any

TESTED = {"megatron": ("megatron-core", "0.16.1"), "torch": ("torch", "2.13.0")}
"""Package → (distribution, version) with which the patches were written and tested."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Upstream:
    """One symbol of torch or Megatron-core, and what is asked of it."""

    patch: str
    """The function of `parallel/megatron_compat` that relies on it, `module.name`."""
    symbol: str
    """`module:name` or `module:Class.name`."""
    parameters: tuple[str, ...] | None = None
    """All its parameters, in order; None where they do not matter or cannot be seen."""
    takes: tuple[str, ...] = ()
    """Some of its parameters."""
    sets: tuple[str, ...] = ()
    """Attributes that the class gives its instances."""
    mentions: tuple[str, ...] = ()
    """Names and strings that its code, or the class's, uses."""

    @property
    def owner(self) -> Any:
        """The module that the symbol is found in."""
        return importlib.import_module(self.symbol.partition(":")[0])

    @property
    def path(self) -> list[str]:
        """Names from the module to the symbol."""
        return self.symbol.partition(":")[2].split(".")


def check(upstream: Upstream) -> None:
    """Check that upstream is what the patch was written for.

    Raises:
        AssertionError: it has moved; the sentence names the patch, the symbol and the tested version.
    """
    symbol = upstream.owner
    for name in upstream.path:
        assert hasattr(symbol, name), moved(upstream, f"has no {name}")
        symbol = getattr(symbol, name)
    if upstream.parameters is not None or upstream.takes:
        found = tuple(inspect.signature(symbol).parameters)
        if upstream.parameters is not None:
            wanted = ", ".join(upstream.parameters)
            assert found == upstream.parameters, moved(
                upstream, f"takes ({', '.join(found)}), not ({wanted})"
            )
        lacking = [name for name in upstream.takes if name not in found]
        assert not lacking, moved(upstream, f"takes no {', '.join(lacking)}")
    if upstream.sets:
        lacking = sorted({*upstream.sets} - names_in(symbol, stored=True))
        assert not lacking, moved(upstream, f"sets no {', '.join(lacking)}")
    if upstream.mentions:
        lacking = sorted({*upstream.mentions} - names_in(symbol))
        assert not lacking, moved(upstream, f"does not use {', '.join(lacking)}")


def moved(upstream: Upstream, what: str) -> str:
    """Return the sentence on an upstream that is another one."""
    distribution, tested = TESTED[upstream.symbol.partition(".")[0].partition(":")[0]]
    return (
        f"{upstream.patch} (parallel/megatron_compat) relies on {upstream.symbol}, tested with "
        f"{distribution} {tested}; the installed {version(distribution)} {what}: adapt the patch, "
        "or remove it where upstream no longer needs it"
    )


def names_in(symbol: Any, *, stored: bool = False) -> set[str]:
    """Return the names and strings in the code of a function, or of all methods of a class and its bases.

    Args:
        symbol: function or class, of Python.
        stored: only names of attributes that are assigned.
    """
    functions = [symbol]
    if inspect.isclass(symbol):
        functions = [
            getattr(member, "fget", None) or getattr(member, "__func__", member)
            for kind in symbol.__mro__
            for member in vars(kind).values()
        ]
    found: set[str] = set()
    for function in functions:
        code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
        for part in _codes(code) if code is not None else ():
            if stored:
                found |= {one.argval for one in dis.get_instructions(part) if one.opname == "STORE_ATTR"}
            else:
                found |= {*part.co_names, *part.co_varnames, *_strings(part.co_consts)}
    return found


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Yield a function's code, and that of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _strings(constants: tuple) -> Iterator[str]:
    for constant in constants:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, tuple):
            yield from _strings(constant)
