"""Layouts as parameters of a test, the dear ones of them for `make wide` alone."""

from collections.abc import Collection, Mapping
from typing import Any

import pytest


def layout_params(layouts: Mapping[str, Any], *, wide: Collection[str] = ()) -> list[Any]:
    """Return a parameter a layout, named; those in `wide` run with `make wide`."""
    unknown = set(wide) - layouts.keys()
    assert not unknown, f"no such layouts: {unknown}"
    return [
        pytest.param(value, id=name, marks=[pytest.mark.wide] if name in wide else [])
        for name, value in layouts.items()
    ]
