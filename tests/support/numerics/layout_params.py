"""Layouts as parameters of a test, the dear ones of them for `make slow` alone."""

from collections.abc import Collection, Mapping
from typing import Any

import pytest


def layout_params(layouts: Mapping[str, Any], *, slow: Collection[str] = ()) -> list[Any]:
    """Return a parameter a layout, named; those in `slow` run with `make slow`."""
    unknown = set(slow) - layouts.keys()
    assert not unknown, f"no such layouts: {unknown}"
    return [
        pytest.param(value, id=name, marks=[pytest.mark.slow] if name in slow else [])
        for name, value in layouts.items()
    ]
