"""Layouts as parameters of a test; slow ones run only in `make slow`."""

from collections.abc import Collection, Mapping
from typing import Any

import pytest


def layout_params(layouts: Mapping[str, Any], *, slow: Collection[str] = ()) -> list[Any]:
    """Return one named parameter per layout; those in `slow` run only in `make slow`."""
    unknown = set(slow) - layouts.keys()
    assert not unknown, f"no such layouts: {unknown}"
    return [
        pytest.param(value, id=name, marks=[pytest.mark.slow] if name in slow else [])
        for name, value in layouts.items()
    ]
