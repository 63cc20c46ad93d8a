"""TensorBoard's event files, cut where a run resumes: so no reader sees a step twice."""

import os
import struct
from pathlib import Path

from glm_rlhf.parallel.storage.durable_io import remove

_LENGTH, _CRC = struct.Struct("<Q"), 4
_STEP_KEY, _WALL_TIME_KEY = 0x10, 0x09  # field 2 as a varint, field 1 as 8 bytes
_HEAD_BYTES = 32
"""Enough of an event for its time and its step, which come first."""


def cut_events(folder: Path, last_step: int | None) -> None:
    """Remove the events of steps after `last_step` from a folder's event files; with None all of them.

    A file's events are in the order of their steps, so that the rest of it goes from the first such event on,
    or from one that a kill has cut. The format is TFRecord: length (8 bytes), checksum (4), a protobuf
    `Event`, checksum (4).

    Raises:
        OSError: a file cannot be cut.
    """
    for path in sorted(folder.glob("events.out.tfevents.*")):
        if last_step is None or not path.is_file():
            remove(path)
        else:
            end = _end_of(path, last_step)
            if end < path.stat().st_size:
                os.truncate(path, end)


def _end_of(path: Path, last_step: int) -> int:
    """Return the offset of a file's first event that goes, or its size."""
    size, offset = path.stat().st_size, 0
    with path.open("rb") as file:
        while True:
            head = file.read(_LENGTH.size + _CRC + _HEAD_BYTES)
            if len(head) < _LENGTH.size + _CRC:
                return offset
            (num_bytes,) = _LENGTH.unpack_from(head)
            end = offset + _LENGTH.size + _CRC + num_bytes + _CRC
            if end > size or _step_of(head[_LENGTH.size + _CRC :][:num_bytes]) > last_step:
                return offset
            offset = end
            file.seek(offset)


def _step_of(event: bytes) -> int:
    """Return the step of an event from its first bytes; 0 where it has none."""
    place = 9 if event[:1] == bytes([_WALL_TIME_KEY]) else 0
    if event[place : place + 1] != bytes([_STEP_KEY]):
        return 0
    step = 0
    for number, byte in enumerate(event[place + 1 :]):
        step |= (byte & 0x7F) << (7 * number)
        if byte < 0x80:
            return step
    return step
