"""One POST over HTTP that has ended, one way or the other, by a deadline of the clock.

A socket's timeout bounds each wait for bytes: a server that sends one now and then would be waited for
without end. Here the requests of a process are tasks of one event loop in a background thread. A task is
cancelled at its deadline, wherever it is, and its connection is closed.
"""

import asyncio
import contextlib
import ipaddress
import os
import socket
import ssl
import threading
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import httpx2

MAX_BYTES = 64 * 2**20
"""Longest body of a response, decompressed."""
_MAX_ERROR_BYTES = 500
_KEEP_ALIVE_S = 15.0
_LATE_S = 5.0  # for a loop that is busy with other responses
_HEADERS = {
    "Accept": "application/json",
    "Accept-Encoding": "identity",
    "Content-Type": "application/json",
    "User-Agent": "glm-rlhf",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A response."""

    status: int
    """Its status."""
    location: str | None
    """Where it redirects to; None where it does not."""
    body: bytes
    """Decompressed; where the status is no success, its beginning, as far as that came in time."""


def post(url: str, body: bytes, *, timeout_s: float) -> Reply:
    """Return the response to a POST of JSON.

    Redirects are not followed, and connections are kept for the next request. The environment's proxies are
    used as by urllib (`http_proxy`, `https_proxy`, `no_proxy`), but never for this machine itself.

    Args:
        url: http or https.
        body: of the request.
        timeout_s: from the look-up of the host's name to the last byte of the response, in seconds.

    Raises:
        TimeoutError: the response was not complete in time.
        OSError: the connection failed, or the server broke the protocol.
        ValueError: the body is longer than `MAX_BYTES`, or not encoded as it says.
    """
    client = _client(os.getpid())
    future = asyncio.run_coroutine_threadsafe(client.post(url, body, timeout_s), client.loop)
    try:
        return future.result(timeout_s + _LATE_S)
    except TimeoutError:
        future.cancel()
        raise TimeoutError(f"timed out: no complete response within {timeout_s:g} s") from None
    except httpx2.InvalidURL as error:
        raise ValueError(str(error)) from error
    except (httpx2.HTTPError, ImportError) as error:  # ImportError: a socks proxy, without its package
        raise OSError(f"{type(error).__name__}: {error}") from error


class _Client:
    """Owns the event loop, its thread, and the connections that are kept."""

    def __init__(self) -> None:
        self.loop = _EventLoop()
        self._transports: dict[str | None, httpx2.AsyncHTTPTransport] = {}
        threading.Thread(target=self.loop.run_forever, name="http", daemon=True).start()

    async def post(self, url: str, body: bytes, timeout_s: float) -> Reply:
        async with asyncio.timeout(timeout_s) as deadline:
            request = httpx2.Request("POST", url, content=body, headers=_HEADERS)
            response = await self._transport(_proxy_of(url)).handle_async_request(request)
            status = response.status_code
            location = response.headers.get("location") if 300 <= status < 400 else None
            try:
                if 200 <= status < 300:
                    return Reply(status=status, location=location, body=await _read(response, MAX_BYTES))
                # What an error says is worth less than its status: some of the time is kept to report that.
                ends = (deadline.when() or 0.0) - timeout_s / 10
                beginning = bytearray()
                with contextlib.suppress(TimeoutError, httpx2.HTTPError, ValueError):
                    async with asyncio.timeout_at(ends):
                        await _read(response, _MAX_ERROR_BYTES, into=beginning)
                return Reply(status=status, location=location, body=bytes(beginning[:_MAX_ERROR_BYTES]))
            finally:
                await response.aclose()

    def _transport(self, proxy: str | None) -> httpx2.AsyncHTTPTransport:
        if proxy not in self._transports:
            self._transports[proxy] = httpx2.AsyncHTTPTransport(
                verify=ssl.create_default_context(),
                trust_env=False,
                proxy=proxy,
                limits=httpx2.Limits(keepalive_expiry=_KEEP_ALIVE_S),
            )
        return self._transports[proxy]


@cache
def _client(_pid: int) -> _Client:
    """Return the one of this process; a forked process has its own."""
    return _Client()


async def _read(response: httpx2.Response, limit: int, *, into: bytearray | None = None) -> bytes:
    """Return the body of a response; what has come of it is in `into` also where this raises.

    Raises:
        ValueError: it is longer than `limit` bytes, or not encoded as it says.
    """
    body = bytearray() if into is None else into
    decoder = _Decoder(response.headers.get("content-encoding"))
    async for part in response.aiter_raw():
        body += decoder.decode(part, limit + 1 - len(body))
        if len(body) > limit:
            raise ValueError(f"the response is longer than {limit} bytes")
    decoder.finish()
    return bytes(body)


class _Decoder:
    """Decompresses a body in parts of bounded length."""

    def __init__(self, encoding: str | None) -> None:
        name = (encoding or "identity").strip().lower()
        if name not in ("identity", "gzip", "x-gzip", "deflate"):
            raise ValueError(f"the response is encoded as {encoding!r}: gzip or no encoding is required")
        self._decompress = None if name == "identity" else zlib.decompressobj(wbits=47)  # gzip or zlib

    def decode(self, part: bytes, most: int) -> bytes:
        """Return what a part holds, at most `most` bytes, at least one."""
        if self._decompress is None:
            return part
        try:
            return self._decompress.decompress(part, most)
        except zlib.error as error:
            raise ValueError(f"the response cannot be decompressed: {error}") from error

    def finish(self) -> None:
        """Raise ValueError where the end of the compressed body is missing."""
        if self._decompress is not None and not self._decompress.eof:
            raise ValueError("the response cannot be decompressed: its end is missing")


def _proxy_of(url: str) -> str | None:
    """Return the environment's proxy for an address; None for a direct connection."""
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    if _is_this_machine(host) or urllib.request.proxy_bypass(parts.netloc):
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    return f"http://{proxy}" if proxy and "://" not in proxy else proxy or None


def _is_this_machine(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _EventLoop(asyncio.SelectorEventLoop):
    """An event loop that looks names up in daemon threads.

    asyncio's own threads are waited for when Python exits, and a look-up can take minutes.
    """

    async def getaddrinfo(self, host: Any, port: Any, **options: Any) -> Any:
        future = self.create_future()

        def settle(set_to: Callable[[Any], None], value: object) -> None:
            if not future.done():  # cancelled
                set_to(value)

        def look_up() -> None:
            try:
                found = socket.getaddrinfo(host, port, **options)
            except Exception as error:
                self.call_soon_threadsafe(settle, future.set_exception, error)
            else:
                self.call_soon_threadsafe(settle, future.set_result, found)

        threading.Thread(target=look_up, name="name look-up", daemon=True).start()
        return await future
