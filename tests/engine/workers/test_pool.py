"""Calls in worker processes: what they return, every way they end, and that no process outlives its use."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from glm_rlhf.engine.workers.messages import Call
from glm_rlhf.engine.workers.pool import CallRaised, WorkerPool, visible_devices, worker_environment
from glm_rlhf.engine.workers.process import WorkerDied, WorkerTimeout

LONG_S = 300.0


def open_pool(num_workers: int = 1, timeout_s: float = LONG_S, seed: str = "1", **options) -> WorkerPool:
    pool = WorkerPool(num_workers=num_workers, timeout_s=timeout_s, seed=seed, **options)
    pool.start()
    return pool


@pytest.fixture(scope="module")
def shared():
    pool = open_pool()
    yield pool
    pool.close()


def until(condition, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_worker_is_a_process_of_its_own_without_torch_or_a_place_in_the_world(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    monkeypatch.setenv("MINE", "kept")
    pool = open_pool(environment={"CUDA_VISIBLE_DEVICES": "5"})
    try:
        about = pool.call("worker_calls:about")
    finally:
        pool.close()
    assert about["pid"] in pool.process_ids()
    assert about["parent"] == os.getpid()
    assert about["folder"] == os.getcwd()
    assert about["stdin"] == ""
    assert "numpy" in about["modules"]
    assert not {"torch", "pydantic", "asyncio", "multiprocessing", "yaml", "glm_rlhf.engine.config"} & set(
        about["modules"]
    )
    environment = about["environment"]
    assert (environment["MINE"], environment["CUDA_VISIBLE_DEVICES"]) == ("kept", "5")
    assert not {"RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"} & set(environment)
    assert worker_environment({"LOCAL_RANK": "1", "PATH": "p"}) == {"PATH": "p"}


@pytest.mark.parametrize("value", [None, {"a": [1.5, "ü"]}, "x" * 3_000_000], ids=["none", "nested", "long"])
def test_arguments_and_results_are_carried_whole(shared, value):
    assert shared.call("worker_calls:echo", value) == value


def test_what_raises_names_the_exception_with_the_function_s_lines(shared):
    with pytest.raises(CallRaised, match="KeyError: 'answer'") as error:
        shared.call("worker_calls:raises")
    lines = error.value.raised.traceback.splitlines()
    assert "worker_calls.py" in lines[1]
    assert lines[1].endswith("in raises")
    assert "child.py" not in error.value.raised.traceback
    for function, words in (
        ("worker_calls:unpicklable", "pickle"),
        ("nowhere:f", "nowhere"),
        ("sys:exit", "SystemExit"),
    ):
        with pytest.raises(CallRaised, match=words):
            shared.call(function)
    with pytest.raises(CallRaised, match="pickle"):
        shared.call("worker_calls:echo", lambda: None)
    assert shared.call("worker_calls:echo", 1) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("worker_calls:die", "exit"), "ended with exit code 3"),
        (("worker_calls:die", "SIGSEGV"), "was ended by SIGSEGV"),
        (("worker_calls:die", "SIGKILL"), "was ended by SIGKILL"),
        (("worker_calls:fork_and_die",), "ended with exit code 4"),
    ],
    ids=["exits", "crashes", "is killed", "leaves a fork"],
)
def test_a_worker_that_dies_is_named_and_replaced(shared, arguments, words):
    (before,) = shared.process_ids()
    with pytest.raises(WorkerDied, match=words):
        shared.call(*arguments)
    (after,) = shared.process_ids()
    assert after != before
    assert shared.call("worker_calls:echo", 1) == 1


def test_a_worker_that_died_while_idle_is_replaced_before_a_call(shared):
    (pid,) = shared.process_ids()
    os.kill(pid, signal.SIGKILL)
    until(lambda: not is_running(pid))
    assert shared.call("worker_calls:echo", 1) == 1


def test_a_call_past_its_time_is_ended_with_what_it_started_and_shows_where_it_was(tmp_path, capfd):
    path = tmp_path / "ids"
    pool = open_pool(timeout_s=2.0)
    try:
        start = time.monotonic()
        with pytest.raises(WorkerTimeout):
            pool.call("worker_calls:hang_with_child", str(path))
        assert time.monotonic() - start < 2.0 + 60.0
        worker, child = map(int, path.read_text().split())
        until(lambda: not is_running(worker) and not is_running(child))
        assert pool.call("worker_calls:echo", 1) == 1
    finally:
        pool.close()
    assert "in hang_with_child" in capfd.readouterr().err


def test_a_call_that_holds_the_interpreter_is_ended_too():
    pool = open_pool(timeout_s=0.5)
    try:
        with pytest.raises(WorkerTimeout):
            pool.call("worker_calls:hang")
    finally:
        pool.close()


def test_signals_to_a_whole_job_do_not_end_a_worker_nor_stay_with_what_it_starts(shared, capfd):
    (pid,) = shared.process_ids()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        os.kill(pid, number)
    assert shared.call("worker_calls:terminate_children") == [-signal.SIGTERM, -signal.SIGTERM]
    assert shared.process_ids() == [pid]
    assert capfd.readouterr().err == ""


def test_what_a_function_prints_goes_where_it_went_before(capfd):
    pool = open_pool()
    try:
        assert pool.call("worker_calls:prints", "said") == "said"
    finally:
        pool.close()
    out, err = capfd.readouterr()
    assert (out, err) == ("said\n", "said\n")


def test_workers_draw_the_same_numbers_in_every_run_and_others_than_each_other():
    def of(seed: str) -> list:
        pool = open_pool(num_workers=2, seed=seed)
        try:
            return [pool.call("worker_calls:draws") for _ in range(2)]  # of one after the other
        finally:
            pool.close()

    first, second = of("1"), of("2")
    assert first[0] != first[1]
    assert first != second
    assert of("1") == first


def test_calls_run_at_once_in_as_many_processes_as_there_are():
    pool = open_pool(num_workers=2)
    try:
        pids, barrier = [], threading.Barrier(2)

        def ask() -> None:
            barrier.wait(60)
            pool.call("time:sleep", 0.5)
            pids.append(pool.call("os:getpid"))

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(pids) <= set(pool.process_ids())
    finally:
        pool.close()


def test_a_preparation_that_fails_is_raised_at_the_start_and_leaves_no_process():
    pool = WorkerPool(num_workers=2, timeout_s=LONG_S, seed="1")
    with pytest.raises(CallRaised, match="not today"):
        pool.start(Call(function="worker_calls:broken_preparation"))
    pool.close()
    assert not any(map(is_running, pool.process_ids()))


def test_closing_ends_idle_and_busy_workers(shared):
    pool = open_pool(num_workers=2)
    errors = []

    def ask() -> None:
        try:
            pool.call("time:sleep", 1000)
        except WorkerDied as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: any(worker._is_busy for worker in pool._workers))
    pool.close()
    thread.join(60)
    assert len(errors) == 1
    assert not any(map(is_running, pool.process_ids()))
    with pytest.raises(WorkerDied, match="closed"):
        pool.call("worker_calls:echo", 1)


SCRIPT = """
import sys, threading
from glm_rlhf.engine.workers.pool import WorkerPool
pool = WorkerPool(num_workers=2, timeout_s=300, seed="1")
pool.start()
threading.Thread(target=pool.call, args=("worker_calls:hang",), daemon=True).start()
print(*pool.process_ids(), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("is_killed", [True, False], ids=["killed", "ends without closing"])
def test_workers_end_with_their_parent_also_where_it_is_killed_and_without_a_guard_of_main(
    is_killed, tmp_path
):
    script = tmp_path / "unguarded.py"
    script.write_text(SCRIPT)
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    assert all(map(is_running, pids))
    if is_killed:
        parent.kill()
    parent.communicate("", timeout=120)
    until(lambda: not any(map(is_running, pids)))


@pytest.mark.parametrize(
    ("own", "visible", "expected"),
    [(0, None, "0,1,2,3"), (2, None, "2,0,1,3"), (1, "4,6", "6,4"), (0, "GPU-1, GPU-2", "GPU-1,GPU-2")],
)
def test_the_first_device_that_a_worker_sees_is_its_rank_s(own, visible, expected):
    assert visible_devices(own, visible=visible, count=4) == expected
