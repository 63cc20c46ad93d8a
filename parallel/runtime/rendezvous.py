"""The first meeting of the ranks of a launch: its key-value store, within a time limit and in plain words."""

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from glm_rlhf.parallel.runtime.launch import Launch, read_address
from glm_rlhf.parallel.runtime.reporter import reported_by

T = TypeVar("T")

_POLL_S, _LONGEST_POLL_S = 0.01, 0.5
"""Pauses between two looks into the store; of rank 0 always the first."""
_CONNECT_S = 0.2
"""Between two attempts to reach the store."""
_ANSWER_S = 5.0
"""In which rank 0, which may have started later than others, tells them who is missing."""


def open_launch_store(launch: Launch, *, timeout_s: float, limit: str) -> dist.Store:
    """Return the key-value store of a launch at `MASTER_ADDR:MASTER_PORT`; every rank calls this.

    Under torchrun its agent serves the store, otherwise rank 0 does. Ranks that have not come are not waited
    for.

    Args:
        launch: the place of this process.
        timeout_s: longest wait for the server, in seconds.
        limit: name of the setting that is `timeout_s`, for messages.

    Raises:
        ValueError: a variable is missing or wrong, the port is taken, or nothing answers there in time.
    """
    host, port = read_address()
    is_server = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    where = f"{host}:{port} (MASTER_ADDR, MASTER_PORT)"
    late = f"within {timeout_s:g} s ({limit})"
    reason = _wait_for(host, port, is_server=is_server, deadline=time.monotonic() + timeout_s)
    if reason:
        raise ValueError(
            f"rank {launch.rank} of {launch.world_size} reached nobody at {where} {late}: {reason}; "
            "does rank 0 run on that host?"
        )

    def connect() -> dist.Store:
        return dist.TCPStore(
            host_name=host,
            port=port,
            world_size=launch.world_size,
            is_master=is_server,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=is_server,
        )

    try:
        store = _within(timeout_s, connect)
    except dist.DistError as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error):
            raise ValueError(
                f"MASTER_PORT is {port}, on which another program of this host listens: give a free port "
                "(torchrun --standalone finds one)"
            ) from error
        first_line = str(error).partition("\n")[0]
        raise ValueError(f"the ranks cannot meet at {where}: {first_line}") from error
    if store is None:
        raise ValueError(
            f"what listens at {where} did not answer as a rank {late}: another program has that port, give a "
            "free one"
        )
    return store


def _wait_for(host: str, port: int, *, is_server: bool, deadline: float) -> str:
    """Return "" when the host has an address, and the server there listens; why not after the deadline.

    torch's own client reports each failed attempt with a stack trace.
    """
    while True:
        try:
            if is_server:
                socket.getaddrinfo(host, port)
            else:
                left_s = max(deadline - time.monotonic(), _CONNECT_S)
                socket.create_connection((host, port), timeout=left_s).close()
            return ""
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > deadline:
            return reason
        time.sleep(_CONNECT_S)


def _within(timeout_s: float, connect: Callable[[], T]) -> T | None:
    """Return the result of a call, None if it takes longer: torch waits for a silent server without end."""
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(connect())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="rendezvous", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if errors:
        raise errors[0]
    return results[0] if results else None


def fresh_name(store: dist.Store, rank: int, world_size: int, timeout_s: float, *, limit: str = "") -> str:
    """Return a name that the store has not seen before; every rank calls this, and gets the same.

    A launcher that restarts ranks keeps its store with all entries of the previous ranks, such as their
    addresses. Rank 0 draws the name. Each other rank requests it under a random key, because an existing
    entry may be from a previous start; rank 0 answers until all ranks have the name, or for `timeout_s`, and
    then tells all that they have met, or which are missing.

    Args:
        store: of the launch.
        rank, world_size: of this process.
        timeout_s: longest wait for all ranks, in seconds.
        limit: name of the setting that is `timeout_s`, for messages.

    Raises:
        ValueError: ranks did not come in time; rank 0 and those that came name them.
    """
    late = f"within {timeout_s:g} s{f' ({limit})' if limit else ''}"
    deadline = time.monotonic() + timeout_s
    if rank:
        key = uuid.uuid4().hex
        try:
            store.set(f"key/{rank}", key)
            name = _poll(store, f"name/{key}", deadline)
            if name is not None:
                store.set(f"taken/{name}/{rank}", "")
                failure = _poll(store, f"met/{name}", deadline + _ANSWER_S)
        except dist.DistError as error:
            first_line = str(error).partition("\n")[0]
            raise ValueError(
                f"rank 0 of {world_size} ended before all ranks had met: {first_line}"
            ) from error
        if name is None or failure is None:
            raise ValueError(f"rank 0 of {world_size} did not come {late}")
        if failure:
            raise reported_by(0, ValueError(failure))
        return name
    name, missing = uuid.uuid4().hex, set(range(1, world_size))
    while missing:
        for other in sorted(missing):
            if store.check([f"key/{other}"]):
                store.set(f"name/{store.get(f'key/{other}').decode()}", name)
        missing -= {other for other in missing if store.check([f"taken/{name}/{other}"])}
        if missing and time.monotonic() > deadline:
            failure = _missing(sorted(missing), world_size, late)
            store.set(f"met/{name}", failure)
            time.sleep(2 * _LONGEST_POLL_S)  # the others read it from this process
            raise ValueError(failure)
        time.sleep(_POLL_S if missing else 0)
    store.set(f"met/{name}", "")
    return name


def _poll(store: dist.Store, key: str, deadline: float) -> str | None:
    """Return an entry, None where it is not there in time; `wait` would report that with a stack trace."""
    pause_s = _POLL_S
    while not store.check([key]):
        if time.monotonic() > deadline:
            return None
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_POLL_S)
    return store.get(key).decode()


def _missing(missing: list[int], world_size: int, late: str) -> str:
    shown = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
    subject = f"rank {shown} is" if len(missing) == 1 else f"ranks {shown} are"
    return (
        f"{world_size - len(missing)} of {world_size} ranks came {late}: {subject} missing; start all of "
        "them, or look into their logs"
    )
