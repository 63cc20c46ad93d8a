"""The environment variables by which a launcher numbers the ranks, checked. Imports no torch."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

RUN_ID = "TORCHELASTIC_RUN_ID"
"""Set by torchrun alone."""
_UNSET = "or unset RANK and WORLD_SIZE to run one process"
_MAX_PORT = 65535


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """The place of this process in a launch; the only rank where no launcher set `RANK` and `WORLD_SIZE`."""

    rank: int = 0
    """Its number in the world."""
    world_size: int = 1
    """All ranks."""
    local_rank: int = 0
    """Its number on this host, and that of its device."""
    is_launched: bool = False
    """Whether a launcher set `RANK` and `WORLD_SIZE`."""


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Return the place of this process by `RANK`, `WORLD_SIZE`, `LOCAL_RANK` and `LOCAL_WORLD_SIZE`.

    `LOCAL_RANK` is 0 where it is not set; `MASTER_PORT` is checked if it is set.

    Raises:
        ValueError: a variable is empty, no whole number, out of range, or missing beside the others.
    """
    world_size = _number(environment, "WORLD_SIZE", at_least=1)
    rank = _number(environment, "RANK", at_least=0)
    local_size = _number(environment, "LOCAL_WORLD_SIZE", at_least=1)
    local_rank = _number(environment, "LOCAL_RANK", at_least=0)
    if (rank is None) != (world_size is None) and (rank or (world_size or 1) > 1):
        present, value, missing = (
            ("RANK", rank, "WORLD_SIZE") if world_size is None else ("WORLD_SIZE", world_size, "RANK")
        )
        raise ValueError(
            f"{present} is {value} and {missing} is not set: start the ranks with torchrun, {_UNSET}"
        )
    for number, name, size, size_name in (
        (rank, "RANK", world_size, "WORLD_SIZE"),
        (local_rank, "LOCAL_RANK", local_size, "LOCAL_WORLD_SIZE"),
        (local_rank, "LOCAL_RANK", world_size, "WORLD_SIZE"),
    ):
        if number is not None and size is not None and number >= size:
            raise ValueError(f"{name} is {number}, it must be below {size_name}, which is {size}")
    if world_size is not None and local_size is not None and local_size > world_size:
        raise ValueError(
            f"LOCAL_WORLD_SIZE is {local_size}, it must be at most WORLD_SIZE, which is {world_size}"
        )
    if "MASTER_PORT" in environment:
        _port(environment)
    return Launch(
        rank=rank or 0,
        world_size=world_size or 1,
        local_rank=local_rank or 0,
        is_launched=rank is not None and world_size is not None,
    )


def read_address(environment: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Return host and port at which the ranks of a launch meet, from `MASTER_ADDR` and `MASTER_PORT`.

    Raises:
        ValueError: one is missing, empty or no port.
    """
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name, "").strip():
            state = "empty" if name in environment else "not set"
            raise ValueError(
                f"{name} is {state}, though RANK and WORLD_SIZE are set: start the ranks with torchrun, "
                f"{_UNSET}"
            )
    return environment["MASTER_ADDR"], _port(environment)


def is_under_torchrun() -> bool:
    """Return whether torchrun started this process."""
    return RUN_ID in os.environ


def _port(environment: Mapping[str, str]) -> int:
    port = _number(environment, "MASTER_PORT", at_least=1)
    if port is None or port > _MAX_PORT:
        raise ValueError(f"MASTER_PORT is {port}, a port is a whole number from 1 to {_MAX_PORT}")
    return port


def _number(environment: Mapping[str, str], name: str, *, at_least: int) -> int | None:
    """Return the value of a variable, None where it is not set."""
    text = environment.get(name)
    if text is None:
        return None
    if not text.strip():
        raise ValueError(f"{name} is empty, it must be a whole number, at least {at_least}, or not be set")
    try:
        number = int(text)
    except ValueError:
        number = None
    if number is None or number < at_least:
        raise ValueError(f"{name} is {text!r}, it must be a whole number, at least {at_least}")
    return number
