"""Reward functions of a config: in workers, over HTTP or here, and what becomes of those that hang or die."""

import contextlib
import os
import threading
from dataclasses import replace
from types import MappingProxyType

import psutil
import pytest
from reward_requests import reward_requests

from examples.reward_server import make_server
from glm_rlhf.engine.config.reward import PPORewardSection
from glm_rlhf.engine.rewards.configured import open_reward_function
from glm_rlhf.engine.rewards.function import RewardError, RewardFailure, call_reward_function
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout

RULES = """
import os, time
print("imported")
calls = []

def pid(requests):
    return [os.getpid()] * len(requests)

def pid_of_another(requests):
    return [os.getpid()] * len(requests)

def num_calls(requests):
    calls.append(1)
    return [len(calls)] * len(requests)

def hangs(requests):
    time.sleep(600)

def dies(requests):
    os.abort()

def exits(requests):
    os._exit(0)

def raises(requests):
    return [request.extra["missing"] for request in requests]

def texts(requests):
    return ["1"] * len(requests)

def returns_nothing(requests):
    pass

def tensors(requests):
    import torch
    return torch.ones(len(requests), requires_grad=True)
"""


@pytest.fixture(scope="module")
def rules(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rules")
    (folder / "rules_of_a_user.py").write_text(RULES)
    (folder / "rules_that_break.py").write_text("import os\n\nlimit = {}['limit']\n")
    (folder / "rules_that_crash.py").write_text("import os\nos.abort()\n")
    (folder / "rules_that_wait.py").write_text("import time\ntime.sleep(600)\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


@contextlib.contextmanager
def opened(function: str, **options):
    with (
        open_topology(Layout()) as topology,
        open_reward_function(
            PPORewardSection(function=function, **options), topology=topology, seed=1
        ) as found,
    ):
        yield found


def scored(function, count: int = 3) -> list:
    return call_reward_function(function, reward_requests(count), skip_failures=True)


@pytest.mark.parametrize(
    ("options", "count"),
    [({}, 1), ({"concurrency": 0}, 1), ({"concurrency": 3}, 3), ({"concurrency": 3, "workers": 2}, 2)],
    ids=str,
)
def test_there_are_as_many_processes_as_calls_at_once_unless_it_is_said(rules, options, count):
    before = set(psutil.Process().children())
    with opened("rules_of_a_user:pid + rules_of_a_user:pid_of_another", **options) as function:
        children = set(psutil.Process().children()) - before
        assert len(children) == count
        (total, *_) = scored(function)
        assert total in {one.pid + other.pid for one in children for other in children}
    assert not any(child.is_running() for child in children)


def test_a_worker_keeps_what_the_module_has(rules):
    with opened("rules_of_a_user:num_calls") as function:
        assert [scored(function, 1) for _ in range(3)] == [[1.0], [2.0], [3.0]]


def test_without_workers_the_function_runs_in_this_process(rules):
    with opened("rules_of_a_user:pid", workers=0) as function:
        assert scored(function) == [os.getpid()] * 3


def test_a_server_alone_starts_no_process():
    before = set(psutil.Process().children())
    with opened("http://127.0.0.1:9/") as function:
        assert function.url == "http://127.0.0.1:9/"
        assert set(psutil.Process().children()) == before


@pytest.mark.parametrize(
    ("name", "words", "place"),
    [
        ("hangs", r"rules_of_a_user:hangs did not return within 1 s .* its process was ended", None),
        ("dies", "the process of the reward function rules_of_a_user:dies was ended by SIGABRT", None),
        ("exits", "rules_of_a_user:exits ended with exit code 0 during the call", None),
        ("raises", r"raised KeyError: 'missing' \(.*rules_of_a_user\.py, line 26\)", "in raises"),
        ("texts", "it is '1', a finite number is required", None),
        ("returns_nothing", "raised TypeError", None),
    ],
)
def test_a_call_that_fails_names_its_answers_and_the_next_one_works(rules, name, words, place):
    with opened(f"2 * rules_of_a_user:{name}", function_timeout_s=1) as function:
        for _ in range(1 if name == "hangs" else 2):
            with pytest.raises(RewardError, match=words) as error:
                call_reward_function(function, reward_requests())
            assert "reward 0 of 3, of the answer 'xxx" in str(error.value)
        for failure in scored(function):
            assert isinstance(failure, RewardFailure)
            assert (place is None) == (failure.traceback is None)
            assert place is None or place in failure.traceback


def test_tensors_of_a_worker_are_floats_before_they_are_sent(rules):
    with opened("rules_of_a_user:tensors") as function:
        assert scored(function) == [1.0, 1.0, 1.0]


def test_extra_fields_may_be_a_view_but_not_what_cannot_be_pickled(rules):
    (request,) = reward_requests(1)
    view = replace(request, extra=MappingProxyType({"answer": 1}))
    lock = replace(request, extra={"lock": threading.Lock()})
    with opened("rules_of_a_user:num_calls") as function:
        assert function([view]) == [1.0]
        (failure,) = function([lock])
        assert "pickle" in failure.reason
        assert function([view]) == [2.0]


@pytest.mark.parametrize(
    ("function", "words", "shown"),
    [
        ("rules_of_a_user:missing", "rules_of_a_user has no function 'missing'", ""),
        ("rules_of_nobody:rule", "rules_of_nobody:rule cannot be imported: No module named", ""),
        ("rules_of_a_user", "not of that form", ""),
        ("__main__:rule", "in the script that runs", ""),
        (
            "rules_that_break:rule",
            r"KeyError: 'limit' \(.*rules_that_break\.py, line 3\)",
            "limit = {}['limit']",
        ),
        (
            "rules_that_crash:rule",
            "the process that imported rules_that_crash:rule was ended by SIGABRT",
            "line 2",
        ),
        ("rules_that_wait:rule", "could not be imported within 1 s", "line 2 in <module>"),
    ],
)
def test_what_cannot_be_imported_is_an_error_at_the_start(rules, function, words, shown, capfd):
    before = set(psutil.Process().children())
    with pytest.raises(RewardError, match=words), opened(function, function_timeout_s=1 if shown else 300):
        pass
    assert shown in capfd.readouterr().err
    assert set(psutil.Process().children()) == before


def test_a_sum_of_a_server_and_a_function(rules):
    server = make_server(lambda requests: [10.0] * len(requests))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        with opened(f"0.5 * {address} + rules_of_a_user:num_calls", batch_size=1) as function:
            assert scored(function) == [6.0] * 3
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
