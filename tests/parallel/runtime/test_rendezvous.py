"""The first meeting of ranks: a name of their own, and one sentence where they cannot meet, in time."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist
from machine_load import slowdown

from glm_rlhf.parallel.runtime.launch import Launch
from glm_rlhf.parallel.runtime.rendezvous import fresh_name, open_launch_store
from glm_rlhf.parallel.runtime.reporter import reporting_rank

LIMIT = "parallel.timeout_s"


def names_of(store, count: int) -> list[str]:
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(lambda rank: fresh_name(store, rank, count, 5.0), reversed(range(count))))


def test_ranks_that_are_started_again_meet_under_a_name_of_their_own():
    store = dist.HashStore()
    store.set("key/2", "of a rank that ended before it had an answer")
    found = [names_of(store, 3), names_of(store, 3), names_of(store, 1), names_of(store, 2)]
    assert [len(set(names)) for names in found] == [1] * 4
    assert len({names[0] for names in found}) == 4


def test_ranks_that_never_come_are_named_by_those_that_came():
    store = dist.HashStore()
    store.set("key/3", "of a rank that ended before it had an answer")
    errors = {}

    def come(rank: int) -> None:
        try:
            fresh_name(store, rank, 4, 1.0 if rank == 0 else 60.0, limit=LIMIT)
        except ValueError as error:
            errors[rank] = error

    start = time.monotonic()
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(come, (0, 1)))
    assert time.monotonic() - start < 30 * slowdown(), "rank 1 must not wait for its own 60 s"
    assert [str(errors[rank]) for rank in (0, 1)] == [
        "2 of 4 ranks came within 1 s (parallel.timeout_s): ranks 2, 3 are missing; start all of them, or "
        "look into their logs"
    ] * 2
    assert [reporting_rank(errors[rank]) for rank in (0, 1)] == [None, 0]


def test_a_missing_rank_0_is_named():
    with pytest.raises(ValueError, match=r"rank 0 of 2 did not come within 0.05 s \(parallel.timeout_s\)"):
        fresh_name(dist.HashStore(), 1, 2, 0.05, limit=LIMIT)


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch):
    """A port of this host, given as that of the launch."""
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        yield server


def _open(rank: int, timeout_s: float) -> dist.Store:
    launch = Launch(rank=rank, world_size=2, local_rank=rank, is_launched=True)
    return open_launch_store(launch, timeout_s=timeout_s, limit=LIMIT)


def test_a_port_in_use_is_named(port: socket.socket, monkeypatch: pytest.MonkeyPatch):
    port.listen()
    number = port.getsockname()[1]
    with pytest.raises(ValueError, match=f"MASTER_PORT is {number}, on which another program .* listens"):
        _open(0, 60.0)


def test_nobody_at_the_address_is_one_sentence_without_a_stack(port: socket.socket, capfd):
    with pytest.raises(
        ValueError, match=r"rank 1 of 2 reached nobody at .* within 0.3 s .*: Connection refused"
    ):
        _open(1, 0.3)
    assert capfd.readouterr().err == ""


def test_an_address_without_a_host_is_named(port: socket.socket, monkeypatch: pytest.MonkeyPatch, capfd):
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    for rank in (0, 1):
        with pytest.raises(ValueError, match=r"reached nobody at no-such-host.invalid:\d+ \(MASTER_ADDR"):
            _open(rank, 0.1)
    assert capfd.readouterr().err == ""


def test_two_ranks_meet_at_the_store_of_rank_0(port: socket.socket):
    port.close()
    with ThreadPoolExecutor(2) as threads:
        stores = list(threads.map(lambda rank: _open(rank, 60.0), (1, 0)))
    stores[0].set("from", "rank 1")
    assert stores[1].get("from") == b"rank 1"


# Last, for torch reports later that this server has gone.
def test_a_program_that_is_no_rank_is_not_waited_for(port: socket.socket):
    port.listen()
    with pytest.raises(ValueError, match=r"MASTER_PORT\) did not answer as a rank within 0.5 s"):
        _open(1, 0.5)
