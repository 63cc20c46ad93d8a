"""Messages between this process and its workers: pickles with their length in front, over a socket."""

import pickle
import socket
import struct
from dataclasses import dataclass

_LENGTH = struct.Struct("!Q")
_MOST_PER_READ = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A function to call in a worker."""

    function: str
    """`module:function`."""
    arguments: tuple[object, ...] = ()
    """Positional arguments; they are pickled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """The first message to a worker."""

    argv: tuple[str, ...]
    """Its `sys.argv`."""
    seed: int
    """Of Python's and numpy's random generators, 32 bits."""
    timeout_s: float
    """Longest time of a call in seconds; after it the stacks of the worker go to stderr."""
    preparation: Call | None
    """Called once, before the other calls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Raised:
    """The answer to a call that raised; the answer to another one is its result."""

    kind: str
    """Name of the exception's type."""
    message: str
    """Its text."""
    traceback: str
    """As Python prints it, without the frames of the worker itself."""


def pack(message: object) -> bytes:
    """Return a message as bytes for `send`.

    Raises:
        Exception: it cannot be pickled.
    """
    content = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(content)) + content


def unpack(content: bytes) -> object:
    """Return the message in what `Inbox.receive` returned.

    Raises:
        Exception: it cannot be unpickled here, as where a class in it cannot be imported.
    """
    return pickle.loads(content)


class Inbox:
    """Owns the bytes of a message that has come in part."""

    def __init__(self, connection: socket.socket) -> None:
        """Read from a connection, whose timeout is the caller's."""
        self._connection = connection
        self._received = bytearray()

    def receive(self) -> bytes:
        """Return the next message, still pickled.

        Raises:
            TimeoutError: nothing came in the connection's timeout; call it again to continue.
            EOFError: the other side has closed the connection.
            OSError: the connection is broken.
        """
        size = _LENGTH.size
        self._read_until(size)
        (length,) = _LENGTH.unpack_from(self._received)
        self._read_until(size + length)
        content = bytes(self._received[size : size + length])
        del self._received[: size + length]
        return content

    def _read_until(self, size: int) -> None:
        while len(self._received) < size:
            part = self._connection.recv(min(size - len(self._received), _MOST_PER_READ))
            if not part:
                raise EOFError("the connection was closed")
            self._received += part
