"""Layouts as parameters of a test, the dear ones of them for `make soak` alone."""

from collections.abc import Collection, Mapping
from typing import Any

import pytest


def layout_params(layouts: Mapping[str, Any], *, soak: Collection[str] = ()) -> list[Any]:
    """Return a parameter a layout, named; those in `soak` run with the soak tests."""
    unknown = set(soak) - layouts.keys()
    assert not unknown, f"no such layouts: {unknown}"
    return [
        pytest.param(value, id=name, marks=[pytest.mark.soak] if name in soak else [])
        for name, value in layouts.items()
    ]
