"""Rewards over HTTP: the reference server's, and every way a server can fail, in bounded time."""

import contextlib
import importlib.util
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from reward_requests import reward_requests
from reward_rules import low_id_tokens, share_of_low_ids

from glm_rlhf.engine.rewards import bounded_post
from glm_rlhf.engine.rewards.function import RewardError, RewardFailure, call_reward_function
from glm_rlhf.engine.rewards.http import HttpReward

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "reward_server.py"
GOOD = (200, b'{"rewards": [1.0, 2.0, 3.0]}')
SLOW = "slow"
TIMEOUT_S = 60.0


@contextlib.contextmanager
def serving(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/score"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def scripted(*answers):
    """A server that returns these responses in order, then the last one again: (status, body) or `SLOW`."""
    asked, is_closed = [], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            answer = answers[min(len(asked), len(answers)) - 1]
            if answer is SLOW:
                is_closed.wait()
                answer = GOOD
            with contextlib.suppress(OSError):
                self.send_response(answer[0])
                self.end_headers()
                self.wfile.write(answer[1])

        def log_message(self, *_):
            pass

    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as url:
        try:
            yield url, asked
        finally:
            is_closed.set()


def client(url: str, **changes) -> HttpReward:
    return HttpReward(url=url, **{"timeout_s": TIMEOUT_S, "retries": 2, "pause_s": 0.01, **changes})


def reference_server(rule) -> ThreadingHTTPServer:
    spec = importlib.util.spec_from_file_location("reward_server", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example.make_server(rule)


@pytest.mark.parametrize("rule", [share_of_low_ids, low_id_tokens])
def test_the_reference_server_gives_what_the_rule_gives(rule):
    requests = reward_requests(5)
    with serving(reference_server(rule)) as url:
        assert call_reward_function(client(url, batch_size=2), requests) == call_reward_function(
            rule, requests
        )


def test_batches_share_a_connection_until_the_server_closes_it():
    server, connections = reference_server(share_of_low_ids), []
    get_request = server.get_request

    def counted():
        connection, address = get_request()
        connections.append(connection)
        return connection, address

    server.get_request = counted
    with serving(server) as url:
        ask = client(url, batch_size=1, retries=0)
        assert ask(reward_requests(4)) + ask(reward_requests(2)) == [0.5] * 6
        assert len(connections) == 1
        connections[0].shutdown(socket.SHUT_RDWR)
        assert client(url, batch_size=1, retries=1)(reward_requests(3)) == [0.5] * 3
        assert len(connections) == 2


def test_all_attempts_end_in_the_time_of_each_and_the_pauses():
    with scripted(SLOW) as (url, _):
        start = time.monotonic()
        (fault, *_) = client(url, timeout_s=0.3, retries=2, pause_s=0.1)(reward_requests())
        elapsed = time.monotonic() - start
    assert "gave none in 3 attempts" in fault.reason
    assert 3 * 0.3 + 0.1 + 0.2 <= elapsed < 60.0


def test_a_batch_is_sent_as_the_protocol_says():
    with scripted(GOOD) as (url, asked):
        assert client(url)(reward_requests()) == [1.0, 2.0, 3.0]
    (sent,) = asked
    assert sent["requests"][2] == {
        "prompt": "question 2",
        "response": "x" * 500,
        "prompt_tokens": [1, 2],
        "response_tokens": [4, 55],
        "is_finished": True,
        "extra": {"answer": 2},
    }


TRANSIENT = {
    "error 500": ((500, b"boom"), "status 500, 'boom'"),
    "busy": ((429, b""), "status 429"),
    "bad JSON": ((200, b'{"rewards": [1.0,'), "JSONDecodeError"),
    "no rewards": ((200, b"[1.0, 2.0, 3.0]"), "not of the form"),
    "wrong count": ((200, b'{"rewards": [1.0]}'), "the response has 1 rewards for 3 answers"),
    "slow": (SLOW, "timed out"),
}


@contextlib.contextmanager
def timing_out(asked, slow_numbers):
    """Make the client time out at once on some requests, as soon as the server has them."""
    original = bounded_post.post

    def post(url, body, *, timeout_s):
        assert timeout_s == TIMEOUT_S
        number = len(asked)
        if number not in slow_numbers:
            return original(url, body, timeout_s=timeout_s)
        try:
            return original(url, body, timeout_s=0.1)
        finally:
            deadline = time.monotonic() + TIMEOUT_S
            while len(asked) == number and time.monotonic() < deadline:
                time.sleep(0.005)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounded_post, "post", post)
        yield


@pytest.mark.parametrize(("answer", "words"), TRANSIENT.values(), ids=TRANSIENT.keys())
def test_a_transient_failure_is_retried_and_a_lasting_one_ends(answer, words):
    is_slow = answer is SLOW
    with scripted(answer, GOOD) as (url, asked), timing_out(asked, {0} if is_slow else ()):
        assert call_reward_function(client(url), reward_requests()) == [1.0, 2.0, 3.0]
        assert len(asked) == 2
    with scripted(answer) as (url, asked), timing_out(asked, range(3) if is_slow else ()):
        with pytest.raises(RewardError) as error:
            call_reward_function(client(url), reward_requests())
        assert len(asked) == 3
    assert words in str(error.value)
    assert "gave none in 3 attempts" in str(error.value)
    assert "question 0" in str(error.value)


def test_a_server_that_is_down_is_retried_with_growing_pauses(monkeypatch):
    pauses = []
    monkeypatch.setattr("time.sleep", pauses.append)
    with contextlib.closing(ThreadingHTTPServer(("127.0.0.1", 0), None).socket) as listener:
        port = listener.getsockname()[1]  # no server listens there once it is closed
    found = client(f"http://127.0.0.1:{port}", retries=9, pause_s=0.5, batch_size=1)(reward_requests())
    assert all("ConnectError" in fault.reason for fault in found)
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]  # of the first batch alone


def test_a_client_error_is_not_retried():
    with scripted((404, b"no such judge")) as (url, asked):
        (fault, *_) = client(url)(reward_requests())
    assert len(asked) == 1
    assert "status 404, 'no such judge'" in fault.reason


def test_nan_null_and_inf_are_failures_of_their_answers():
    with scripted((200, b'{"rewards": [NaN, null, Infinity]}')) as (url, asked):
        found = call_reward_function(client(url), reward_requests(), skip_failures=True)
    assert len(asked) == 1
    assert [fault.reason.split(",")[0] for fault in found] == ["it is nan", "it is None", "it is inf"]
    assert all(isinstance(fault, RewardFailure) for fault in found)


def test_batches_after_a_failing_one_are_not_sent():
    with scripted((200, b'{"rewards": [1.0]}'), (500, b"")) as (url, asked):
        first, *others = client(url, batch_size=1, retries=1)(reward_requests(4))
    assert first == 1.0
    assert all(isinstance(fault, RewardFailure) for fault in others)
    assert len(asked) == 3
