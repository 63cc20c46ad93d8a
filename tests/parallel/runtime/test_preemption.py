"""A signal to one rank is a preemption request that all ranks see at the same step, while handled."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.distributed as dist

from glm_rlhf.parallel.runtime.preemption import (
    SIGNALS,
    defer_preemption,
    handle_preemption_signals,
    preemption_requested,
    restore_handlers,
)


@pytest.fixture(autouse=True)
def usual_handlers():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    yield
    restore_handlers()
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, one entry that may be changed."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def requests_seen(number: int) -> list[bool]:
    world = (None, torch.device("cpu"))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    seen, before = [preemption_requested(world)], signal.getsignal(number)
    with handle_preemption_signals():
        seen.append(preemption_requested(world))
        if dist.get_rank() == 2:
            os.kill(os.getpid(), number)
        with defer_preemption():
            seen.append(preemption_requested(world))
        seen.append(preemption_requested(world))
    seen.append(preemption_requested(world))
    restore_handlers()
    assert signal.getsignal(number) == before
    return seen


def test_all_ranks_see_a_request_to_one_while_signals_are_handled(ranks):
    for number in SIGNALS:
        assert ranks.run(requests_seen, number) == [[False, False, False, True, False]] * 4


@pytest.mark.parametrize("repeat", SIGNALS)
def test_repeats_are_the_same_request_and_reported_once(clock, capfd, repeat):
    with handle_preemption_signals():
        for seconds in (0.0, 0.5, 1.9):
            clock[0] = 100.0 + seconds
            for number in (signal.SIGTERM, repeat):
                os.kill(os.getpid(), number)
        assert preemption_requested()
    assert capfd.readouterr().err.splitlines() == [
        "SIGTERM: the run saves and exits as soon as it can",
        f"a second signal ({name_of(repeat)}) is the same request: the save continues",
    ]


def name_of(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


@pytest.mark.parametrize(
    ("number", "same_s", "later_s"), [(signal.SIGTERM, 20.0, 20.5), (signal.SIGUSR1, 19.0, 21.0)]
)
def test_a_repeat_is_ignored_for_20_s_and_a_later_one_is_not(clock, capfd, number, same_s, later_s):
    ended = []
    before = signal.signal(number, lambda *_: ended.append(number))
    try:
        with handle_preemption_signals():
            for seconds in (0.0, same_s):
                clock[0] = 100.0 + seconds
                os.kill(os.getpid(), number)
            assert ended == []
            clock[0] = 100.0 + later_s
            os.kill(os.getpid(), number)
            assert ended == [number]
        assert "again, more than 20 s after the first: the run ends without a save" in capfd.readouterr().err
    finally:
        restore_handlers()
        signal.signal(number, before)


def test_the_first_ctrl_c_saves_and_a_later_one_ends(clock, capfd):
    with handle_preemption_signals():
        for seconds in (0.0, 0.01, 2.0):  # under torchrun it arrives twice
            clock[0] = 100.0 + seconds
            os.kill(os.getpid(), signal.SIGINT)
        assert preemption_requested()
        clock[0] = 102.5
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    said = capfd.readouterr().err
    assert "Ctrl-C: the run saves and exits as soon as it can; another one ends it without a save" in said


def test_another_kind_of_signal_is_the_same_request_at_any_time(clock):
    """A batch system warns by SIGUSR1 and sends SIGTERM at its limit: a save in progress must not end."""
    with handle_preemption_signals():
        os.kill(os.getpid(), signal.SIGUSR1)
        clock[0] += 300.0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption_requested()


def test_a_ctrl_c_that_a_background_job_ignores_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with handle_preemption_signals():
            os.kill(os.getpid(), signal.SIGINT)
            assert not preemption_requested()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_failed_rank_survives_signals_until_it_has_reported(capfd):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="lost"), handle_preemption_signals():
        raise RuntimeError("a peer is lost")
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)
    assert capfd.readouterr().err == "", "it has failed: nothing is saved"
    restore_handlers()
    assert signal.getsignal(signal.SIGTERM) == before
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_handlers_do_not_accumulate_over_blocks_that_raise():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    for _ in range(3):
        with pytest.raises(RuntimeError), handle_preemption_signals():
            raise RuntimeError
    restore_handlers()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


ENDING = """
    import atexit, os, signal, sys
    from glm_rlhf.parallel.runtime.preemption import handle_preemption_signals, ignore_repeats
    class Late:
        def __del__(self):  # runs when the interpreter has taken its handlers away
            os.kill(os.getpid(), signal.SIGTERM)
    sys.late = Late()
    with handle_preemption_signals():
        os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    ignore_repeats()
    atexit.register(os.kill, os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_repeat_while_the_process_ends_does_not_change_its_exit_code():
    program = [sys.executable, "-c", textwrap.dedent(ENDING)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr.count("SIGTERM")) == (0, 1), done.stderr
