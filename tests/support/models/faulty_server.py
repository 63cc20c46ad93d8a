"""Reward servers that break the protocol: every part of a response, and everything that can go wrong with it.

Each is a raw socket that reads a request as far as it comes and then writes what its script yields.
"""

import contextlib
import gzip
import itertools
import random
import socket
import threading
from collections.abc import Callable, Iterator

DRIP_S = 0.05
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
JUNK = random.Random(0).randbytes(1000).replace(b"\n", b"").replace(b"\r", b"") + b"\r\n\r\n"

Script = Callable[[], Iterator[bytes | None]]
"""Yields what a server writes; None: it writes nothing for `DRIP_S` seconds."""

# By part: what is right before it, its own beginning, and what it can be prolonged by.
PARTS = {
    "status": (b"", b"HTTP/1.1 2", b" " * 4096),
    "headers": (OK, b"X-Long: y", b"y" * 4096),
    "100-continue": (b"", CONTINUE, CONTINUE * 100),
    "chunk heads": (CHUNKED, b"2", b"0" * 4096),
    "body": (OK + b"Content-Length: 1000000000\r\n\r\n", b'{"rewards": [', b" " * 65536),
    "trailers": (CHUNKED + b"2\r\n{}\r\n0\r\n", b"X-Long: y", b"y" * 4096),
}


def drips(part: str) -> Script:
    before, beginning, more = PARTS[part]

    def script() -> Iterator[bytes | None]:
        yield before + beginning
        whole = CONTINUE if more.startswith(CONTINUE) else more[:1]
        for byte in itertools.cycle(whole):
            yield bytes([byte])
            yield None

    return script


def stops(part: str) -> Script:
    before, beginning, _ = PARTS[part]

    def script() -> Iterator[bytes | None]:
        yield before + beginning
        while True:
            yield None

    return script


def huge(part: str) -> Script:
    before, beginning, more = PARTS[part]

    def script() -> Iterator[bytes | None]:
        yield before + beginning
        while True:
            yield more

    return script


def junk(part: str) -> Script:
    before, _, _ = PARTS[part]

    def script() -> Iterator[bytes | None]:
        yield (before or (CONTINUE if part == "100-continue" else b"")) + JUNK

    return script


FAULTS: dict[str, Callable[[str], Script]] = {"drips": drips, "stops": stops, "huge": huge, "junk": junk}


def _sends(*pieces: bytes) -> Script:
    return lambda: iter(pieces)


def _error(status: str, fault: str) -> Script:
    """An error with a body that is never complete."""

    def script() -> Iterator[bytes | None]:
        yield f"HTTP/1.1 {status} Of Some Kind\r\nContent-Length: 1000000000\r\n\r\nno ".encode()
        while True:
            yield {"drips": b"x", "stops": None, "huge": b"x" * 65536}[fault]
            if fault == "drips":
                yield None

    return script


def _encoded(encoding: str, body: bytes) -> Script:
    head = f"Content-Encoding: {encoding}\r\nContent-Length: {len(body)}\r\n\r\n"
    return _sends(OK + head.encode() + body)


BOMB = gzip.compress(b" " * (96 * 2**20), compresslevel=9)

OTHERS: dict[str, Script] = {
    "closes at once": _sends(),
    "error 500, body drips": _error("500", "drips"),
    "error 500, body stops": _error("500", "stops"),
    "error 500, body huge": _error("500", "huge"),
    "error 404, body drips": _error("404", "drips"),
    "error 404, body stops": _error("404", "stops"),
    "gzip bomb": _encoded("gzip", BOMB),
    "gzip, cut": _encoded("gzip", BOMB[: len(BOMB) // 2000]),
    "gzip, junk": _encoded("gzip", JUNK),
    "unknown encoding": _encoded("br", b'{"rewards": [1.0, 1.0, 1.0]}'),
    "switches protocols": _sends(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"
    ),
    "deep JSON": _sends(OK + b"Content-Length: 1000000\r\n\r\n" + b"[" * 1_000_000),
    "body ends early": _sends(OK + b'Content-Length: 100\r\n\r\n{"rewards"'),
}

CASES: dict[str, Script] = {
    f"{part} {name}": make(part) for part in PARTS for name, make in FAULTS.items()
} | OTHERS


@contextlib.contextmanager
def serving(script: Script, *, reads: bool = True) -> Iterator[tuple[int, list[bytes], threading.Event]]:
    """Serve connections by a script; gives the port, the requests, and whether a client has closed one.

    Args:
        script: what each connection gets, after which the server closes it.
        reads: whether the server reads what it is sent.
    """
    requests: list[bytes] = []
    has_ended, is_closed = threading.Event(), threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(10)
            if reads:
                requests.append(connection.recv(1 << 20))
            for piece in script():
                if has_ended.is_set():
                    return
                if piece is None:
                    has_ended.wait(DRIP_S)
                    if not reads:
                        continue
                    connection.setblocking(False)
                    with contextlib.suppress(BlockingIOError):
                        if not connection.recv(1 << 20):
                            is_closed.set()
                            return
                    connection.settimeout(10)
                else:
                    connection.sendall(piece)
            return
        is_closed.set()  # a write that fails

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1], requests, is_closed
    finally:
        has_ended.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
