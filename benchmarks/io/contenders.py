"""Every way to read and to write the synthetic checkpoint, each made to be run in a fresh process.

A contender takes the work folder and whether it has to compare bytes, and returns an `Outcome`. The work
folder holds the checkpoint in `source`; exports go to `target`.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from glm_rlhf.engine.bench.memory import forget_peak, resident_bytes
from glm_rlhf.parallel.spec.sharding import place_shard
from glm_rlhf.parallel.storage.hf_config import read_config
from glm_rlhf.parallel.weights.hf_reader import ShardStream, iterate_shard
from glm_rlhf.parallel.weights.hf_writer import export_tensors

BUFFER_BYTES = 2**24


@dataclass(slots=True)
class ContenderOutcome:
    """What one process did."""

    seconds: float
    above_bytes: int
    """Peak resident memory above what stands in memory anyway: the tensors loaded, or to be written."""
    work_bytes: int
    """Bytes of the tensors that were read or written."""
    is_right: bool = True
    """Whether every byte is that of the source."""


def _timed(work: Callable[[], object]) -> tuple[float, int]:
    """Return seconds, and peak resident bytes above those before."""
    forget_peak()
    before = resident_bytes()
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    return seconds, resident_bytes(peak=True) - before


def _stream(folder: Path, tp_rank: int, tp_size: int) -> ShardStream:
    config = read_config(folder / "source")
    layers = range(config.num_layers)
    return iterate_shard(folder / "source", config, tp_rank=tp_rank, tp_size=tp_size, layers=layers)


def _parameters(stream: ShardStream) -> dict[str, torch.Tensor]:
    """Return a rank's parameters as a built model has them: allocated, every page touched."""
    return {s.name: torch.ones(s.shape, dtype=stream.dtypes[s.name]) for s in stream.shards}


def _import_ours(folder: Path, checks: bool, tp_size: int) -> ContenderOutcome:
    parameters = _parameters(_stream(folder, 0, tp_size))

    def load() -> None:
        _stream(folder, 0, tp_size).read_into(parameters)

    seconds, above = _timed(load)
    return ContenderOutcome(
        seconds, above, _nbytes(parameters), not checks or _is_source(folder, parameters, tp_size)
    )


def import_ours(folder: Path, checks: bool) -> ContenderOutcome:
    """Load all slices of one rank of one."""
    return _import_ours(folder, checks, 1)


def import_ours_of_4(folder: Path, checks: bool) -> ContenderOutcome:
    """Load the slices of the first rank of four."""
    return _import_ours(folder, checks, 4)


def import_slices_of_4(folder: Path, checks: bool) -> ContenderOutcome:
    """Load the same slices through safetensors' own slicing."""
    stream = _stream(folder, 0, 4)
    parameters = _parameters(stream)

    def load() -> None:
        files = {}
        for shard in stream.shards:
            dim = shard.pieces[0].dim
            starts = [0]
            for piece in shard.pieces:
                path = stream.tensors[piece.name].path
                if path not in files:
                    files[path] = safe_open(path, framework="pt")
                whole = files[path].get_slice(piece.name)
                part = whole[piece.start : piece.stop] if dim == 0 else whole[:, piece.start : piece.stop]
                parameters[shard.name].narrow(dim, starts[-1], piece.length).copy_(part)
                starts.append(starts[-1] + piece.length)

    seconds, above = _timed(load)
    return ContenderOutcome(
        seconds, above, _nbytes(parameters), not checks or _is_source(folder, parameters, 4)
    )


def import_safetensors(folder: Path, _checks: bool) -> ContenderOutcome:
    """Load file by file and copy every tensor to its place."""
    files = sorted((folder / "source").glob("*.safetensors"))
    parameters = {}
    for file in files:
        with safe_open(file, framework="pt") as content:
            for name in content.keys():
                shape = content.get_slice(name).get_shape()
                parameters[name] = torch.ones(shape, dtype=torch.bfloat16)

    def load() -> None:
        for file in files:
            for name, tensor in load_file(file).items():
                parameters[name].copy_(tensor)

    seconds, above = _timed(load)
    return ContenderOutcome(seconds, above, _nbytes(parameters))


def import_transformers(folder: Path, _checks: bool) -> ContenderOutcome:
    """Make the model out of the folder, every page of it read."""
    found = []

    def load() -> None:
        found.append(_transformers_model(folder))
        # Its weights are mapped files that nobody has read yet: one element of every page is read here.
        for parameter in found[0].parameters():
            parameter.detach().flatten()[::1024].sum()

    seconds, above = _timed(load)
    num_bytes = sum(parameter.nbytes for parameter in found[0].parameters())
    return ContenderOutcome(seconds, above - num_bytes, num_bytes)


def read_plainly(folder: Path, _checks: bool) -> ContenderOutcome:
    """Read the weight files into one small buffer, over and over."""
    buffer, total = bytearray(BUFFER_BYTES), 0

    def read() -> None:
        nonlocal total
        for file in sorted((folder / "source").glob("*.safetensors")):
            with file.open("rb", buffering=0) as stream:
                while count := stream.readinto(buffer):
                    total += count

    seconds, above = _timed(read)
    return ContenderOutcome(seconds, above, total)


def _export_ours(folder: Path, checks: bool, tp_size: int) -> ContenderOutcome:
    config = read_config(folder / "source")
    ranks = [dict(_stream(folder, rank, tp_size)) for rank in range(tp_size)]
    tensors = [(name, [rank[name] for rank in ranks]) for name in ranks[0]]
    target = folder / "target"
    seconds, above = _timed(
        lambda: export_tensors(target, config, tensors, tp_size=tp_size, dtype=torch.bfloat16)
    )
    is_right = not checks or _same_files(folder / "source", target)
    return ContenderOutcome(seconds, above, _folder_bytes(target), is_right)


def export_ours(folder: Path, checks: bool) -> ContenderOutcome:
    """Write the parameters of one rank of one."""
    return _export_ours(folder, checks, 1)


def export_ours_unsynced(folder: Path, checks: bool) -> ContenderOutcome:
    """Write the same without waiting for the disk."""
    with mock.patch("os.fsync"):
        return _export_ours(folder, checks, 1)


def export_ours_of_4(folder: Path, checks: bool) -> ContenderOutcome:
    """Write the parameters of four ranks."""
    return _export_ours(folder, checks, 4)


def export_safetensors(folder: Path, _checks: bool) -> ContenderOutcome:
    """Write the source's tensors with safetensors, into one file; then fsync of file and folder."""
    tensors = {}
    for file in sorted((folder / "source").glob("*.safetensors")):
        tensors |= {name: tensor.clone() for name, tensor in load_file(file).items()}
    target = folder / "target"

    def save() -> None:
        target.mkdir()
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
        _sync(target)

    seconds, above = _timed(save)
    return ContenderOutcome(seconds, above, _folder_bytes(target))


def export_safetensors_unsynced(folder: Path, checks: bool) -> ContenderOutcome:
    """Write the same without waiting for the disk."""
    with mock.patch("os.fsync"):
        return export_safetensors(folder, checks)


def export_transformers(folder: Path, _checks: bool) -> ContenderOutcome:
    """Write a model with transformers."""
    model, target = _transformers_model(folder), folder / "target"

    def save() -> None:
        model.save_pretrained(target)
        _sync(target)

    seconds, above = _timed(save)
    return ContenderOutcome(seconds, above, _folder_bytes(target))


def write_plainly(folder: Path, _checks: bool) -> ContenderOutcome:
    """Write as many bytes from one small buffer."""
    buffer = bytes(torch.randint(0, 256, (BUFFER_BYTES,), dtype=torch.uint8).numpy())
    total, target = _folder_bytes(folder / "source"), folder / "target"

    def save() -> None:
        target.mkdir()
        with (target / "plain.safetensors").open("wb", buffering=0) as stream:
            for start in range(0, total, BUFFER_BYTES):
                stream.write(buffer[: total - start])
        _sync(target)

    seconds, above = _timed(save)
    return ContenderOutcome(seconds, above, total)


def _transformers_model(folder: Path) -> torch.nn.Module:
    from transformers import GlmForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return GlmForCausalLM.from_pretrained(folder / "source", dtype=torch.bfloat16)


def _is_source(folder: Path, parameters: dict[str, torch.Tensor], tp_size: int) -> bool:
    """Return whether every slice of the first rank's parameters has the bytes of its place in the source."""
    stream = _stream(folder, 0, tp_size)
    source = _source_tensors(folder / "source")
    for shard in stream.shards:
        for piece, value in place_shard(shard, parameters[shard.name]):
            if not torch.equal(value, source[piece.name].narrow(piece.dim, piece.start, piece.length)):
                return False
    return True


def _same_files(source: Path, target: Path) -> bool:
    expected, found = _source_tensors(source), _source_tensors(target)
    return expected.keys() == found.keys() and all(torch.equal(expected[n], found[n]) for n in expected)


def _source_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def _sync(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _nbytes(parameters: dict[str, torch.Tensor]) -> int:
    return sum(parameter.nbytes for parameter in parameters.values())


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
