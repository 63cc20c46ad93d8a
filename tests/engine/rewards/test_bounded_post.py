"""A reward server that breaks the protocol, in every part of a response, costs no more than its timeout."""

import contextlib
import gzip
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from faulty_server import CASES, CONTINUE, OK, serving
from machine_load import slowdown
from reward_requests import reward_requests

from glm_rlhf.engine.rewards import bounded_post
from glm_rlhf.engine.rewards.function import RewardError, RewardFailure
from glm_rlhf.engine.rewards.http import HttpReward

TIMEOUT_S = 2.5  # some cases need an answer in it, on a busy machine too
BUSY_S = 20.0  # without a deadline the cases below take for ever
GOOD = OK + b'Content-Length: 28\r\n\r\n{"rewards": [1.0, 2.0, 3.0]}'


def attempt(url: str, *, timeout_s: float = TIMEOUT_S) -> tuple[list, float]:
    """Return what one attempt gave, and how many seconds it took."""
    start = time.monotonic()
    rewards = HttpReward(url=url, timeout_s=timeout_s, retries=0)(reward_requests())
    return rewards, time.monotonic() - start


def attempts_at_all_faults() -> dict[str, tuple[list, float]]:
    """Return what each case gives, all side by side, by its name; and a server that is not read from."""
    with contextlib.ExitStack() as stack:
        urls = {}
        for name, script in CASES.items():
            port, _, _ = stack.enter_context(serving(script))
            urls[name] = f"http://127.0.0.1:{port}/score"
            if name == "status drips":
                urls["TLS handshake drips"] = f"https://127.0.0.1:{port}/score"
        with ThreadPoolExecutor(len(urls)) as threads:
            return dict(zip(urls, threads.map(attempt, urls.values()), strict=True))


def test_every_fault_of_every_part_is_a_failure_in_time():
    results = attempts_at_all_faults()
    assert len(results) >= 6 * 4 + 13
    for name, (rewards, _) in results.items():
        assert len(rewards) == 3, name
        assert all(isinstance(reward, RewardFailure) for reward in rewards), name
    late = {name: elapsed for name, (_, elapsed) in results.items() if elapsed > TIMEOUT_S + BUSY_S}
    assert not late
    reasons = {name: rewards[0].reason for name, (rewards, _) in results.items()}
    for name in (
        "status drips",
        "headers stops",
        "100-continue drips",
        "chunk heads stops",
        "trailers drips",
    ):
        assert f"timed out: no complete response within {TIMEOUT_S:g} s" in reasons[name], name
    for name in ("error 500, body drips", "error 404, body stops"):
        assert f"status {name[6:9]}, 'no " in reasons[name], name
    assert "longer than 67108864 bytes" in reasons["gzip bomb"]
    assert "its end is missing" in reasons["gzip, cut"]
    assert "encoded as 'br'" in reasons["unknown encoding"]


@pytest.mark.slow
def test_no_attempt_takes_a_second_longer_than_its_timeout():
    attempt("http://127.0.0.1:9/")  # imports the client
    elapsed = {name: elapsed for name, (_, elapsed) in attempts_at_all_faults().items()}
    assert max(elapsed.values()) <= TIMEOUT_S + 1.0 * slowdown(), elapsed


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_and_names_its_target(status):
    with serving(lambda: iter([GOOD])) as (port, requests, _):
        target = f"http://127.0.0.1:{port}/elsewhere"
        head = f"HTTP/1.1 {status} Moved\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n".encode()
        with serving(lambda: iter([head])) as (other, asked, _):
            client = HttpReward(url=f"http://127.0.0.1:{other}/", timeout_s=60, retries=3, pause_s=0)
            (failure, *_) = client(reward_requests())
    assert f"status {status}, a redirect to '{target}', which is not followed" in failure.reason
    assert len(asked) == 1
    assert requests == []


def test_a_connection_is_closed_at_the_deadline():
    with serving(CASES["headers drips"]) as (port, _, is_closed):
        attempt(f"http://127.0.0.1:{port}/", timeout_s=0.2)
        assert is_closed.wait(60)


def test_a_server_that_does_not_read_ends_a_long_request_in_time():
    def script():
        while True:
            yield None

    class Long:
        prompt_tokens = response_tokens = ()
        prompt = "x" * 2**25
        response, is_finished, extra = "", True, {}

    with serving(script, reads=False) as (port, _, _):
        client = HttpReward(url=f"http://127.0.0.1:{port}/", timeout_s=0.5, retries=0)
        (failure,) = client([Long()])
    assert "timed out" in failure.reason


def test_a_name_that_is_not_found_in_time_ends_in_time(monkeypatch):
    has_ended = threading.Event()
    look_up = socket.getaddrinfo

    def slow(host, *args, **options):
        if "judge.invalid" in str(host):
            has_ended.wait(60)
        return look_up(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    try:
        (failure, *_), _ = attempt("http://judge.invalid/", timeout_s=0.2)
        assert not has_ended.is_set()
    finally:
        has_ended.set()
    assert "timed out" in failure.reason


def test_good_responses_after_an_interim_one_chunked_or_compressed_are_read():
    text = b'{"rewards": [1.0, 2.0, 3.0]}'
    packed = gzip.compress(text)
    chunked = OK + b"Transfer-Encoding: chunked\r\n\r\n1c\r\n" + text + b"\r\n0\r\nX-T: 1\r\n\r\n"
    zipped = OK + f"Content-Encoding: gzip\r\nContent-Length: {len(packed)}\r\n\r\n".encode() + packed
    for response in (GOOD, CONTINUE + GOOD, chunked, zipped, OK + b"\r\n" + text):
        with serving(lambda response=response: iter([response])) as (port, _, _):
            assert attempt(f"http://127.0.0.1:{port}/", timeout_s=60)[0] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1.2.3"])
def test_a_proxy_of_the_environment_is_not_used_for_this_machine(host, monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with serving(lambda: iter([GOOD])) as (port, _, _):
        if host == "127.1.2.3":
            assert bounded_post._proxy_of(f"http://{host}:{port}/") is None
        else:
            assert attempt(f"http://{host}:{port}/", timeout_s=60)[0] == [1.0, 2.0, 3.0]


def test_a_proxy_of_the_environment_is_used_for_other_machines(monkeypatch):
    with serving(lambda: iter([GOOD])) as (port, requests, _):
        monkeypatch.setenv("http_proxy", f"127.0.0.1:{port}")
        monkeypatch.setenv("no_proxy", "other.invalid")
        assert attempt("http://judge.invalid/score", timeout_s=60)[0] == [1.0, 2.0, 3.0]
        assert bounded_post._proxy_of("http://other.invalid/") is None
    assert requests[0].startswith(b"POST http://judge.invalid/score HTTP/1.1\r\n")


@pytest.mark.parametrize(
    "url", ["http://", "https:///score", "http://host:x/", "http://host:99999/", "http://[::1/"]
)
def test_what_is_no_address_is_refused_before_the_run(url):
    with pytest.raises(RewardError, match="is not the address of a reward server"):
        HttpReward(url=url)


def test_a_password_in_an_address_is_refused_and_not_shown():
    with pytest.raises(RewardError, match="has a user name or password") as error:
        HttpReward(url="http://me:secret@host/")
    assert "secret" not in str(error.value)
