"""Layouts as parameters of a test, a few in `make test`, the others only in `make slow`."""

from collections.abc import Collection, Mapping
from typing import Any

import pytest


def layout_params(layouts: Mapping[str, Any], *, quick: Collection[str]) -> list[Any]:
    """Return one named parameter per layout; those not in `quick` run only in `make slow`."""
    unknown = set(quick) - layouts.keys()
    assert not unknown, f"no such layouts: {unknown}"
    return [
        pytest.param(value, id=name, marks=[] if name in quick else [pytest.mark.slow])
        for name, value in layouts.items()
    ]
