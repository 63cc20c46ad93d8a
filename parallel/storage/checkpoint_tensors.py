"""The whole tensors of a checkpoint, whose slices are assembled from the parts that its ranks wrote.

Writer and reader use `sharding.shards_of`: it gives the rows or columns of a whole tensor that a
tensor-parallel rank of the writing run held, in order; parts are ranges of these, flattened. So any slice can
be read in any layout.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from glm_rlhf.parallel.spec.sharding import HfSlice, ParamShard, owner_rank, shards_of
from glm_rlhf.parallel.spec.weight_map import Weight, names_within, weights_of
from glm_rlhf.parallel.storage.checkpoint_manifest import (
    ADAM_MOMENTS,
    WEIGHT,
    CheckpointError,
    Manifest,
    ModelInfo,
    rank_file_name,
    read_manifest,
)
from glm_rlhf.parallel.storage.durable_io import read_all
from glm_rlhf.parallel.storage.model_folder import ModelFolderError, plain_file
from glm_rlhf.parallel.storage.safetensors_format import (
    FLOAT_DTYPES,
    STORED_DTYPES,
    HeaderEntry,
    read_header,
)

_BLOCK_BYTES = 16 * 2**20  # for each of the threads that read


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPart:
    """Elements `start` to `stop` of one flattened parameter of one rank, in a file."""

    path: Path
    """The file."""
    start: int
    """First element."""
    stop: int
    """One past the last element."""
    dtype: torch.dtype
    """Type in the file."""
    offset: int
    """First byte in the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredShard:
    """One rank's parameter, from all its parts."""

    shard: ParamShard
    """The pieces of whole tensors that it holds."""
    parts: tuple[StoredPart, ...]
    """Its elements in order, without gaps."""

    @property
    def dtype(self) -> torch.dtype:
        """Type in the files."""
        return self.parts[0].dtype

    def read(self, start: int, stop: int, out: torch.Tensor) -> None:
        """Fill `out`, contiguous and of `dtype`, with elements of the flattened parameter."""
        content = memoryview(out.view(-1).view(torch.uint8).numpy())
        size = self.dtype.itemsize
        for part in self.parts:
            first, last = max(start, part.start), min(stop, part.stop)
            if first >= last:
                continue
            with part.path.open("rb", buffering=0) as file:
                read_all(
                    file.fileno(),
                    part.offset + (first - part.start) * size,
                    content[(first - start) * size : (last - start) * size],
                    what=f"{part.path} was truncated while {self.shard.name} was read",
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardedTensor:
    """A whole tensor stored in parts of several ranks, with the interface of one of a Hugging Face folder."""

    path: Path
    """The checkpoint."""
    name: str
    """Name in the family's Hugging Face form."""
    dtype: torch.dtype
    """Type in training; the files may hold more precision."""
    dtype_name: str
    """The same, as safetensors names it."""
    shape: tuple[int, ...]
    """Row-major dimensions."""
    holders: tuple[tuple[HfSlice, int, StoredShard], ...]
    """(piece of this tensor, its first row or column in the shard, shard)."""

    def read_into(self, dim: int, start: int, stop: int, out: torch.Tensor) -> None:
        """Fill `out` with rows (dim 0) or columns (dim 1), cast to its type.

        Raises:
            ModelFolderError: a file was truncated.
        """
        wanted = [[0, size] for size in (*self.shape, 1)[:2]]
        wanted[dim] = [start, stop]
        rows, columns = wanted
        out_RC = out.view(rows[1] - rows[0], columns[1] - columns[0])
        for piece, offset, stored in self.holders:
            first = max(wanted[piece.dim][0], piece.start)
            last = min(wanted[piece.dim][1], piece.stop)
            if first >= last:
                continue
            target = out_RC.narrow(piece.dim, first - wanted[piece.dim][0], last - first)
            within = (first - piece.start + offset, last - piece.start + offset)
            in_shard = (within, (columns[0], columns[1])) if piece.dim == 0 else ((rows[0], rows[1]), within)
            _read_block(stored, *in_shard, target)


def _read_block(
    stored: StoredShard, rows: tuple[int, int], columns: tuple[int, int], out_RC: torch.Tensor
) -> None:
    """Fill `out_RC` with a rectangle of a shard: reads blocks of whole rows and slices them."""
    width = (*stored.shard.shape, 1)[1]
    step = max(1, _BLOCK_BYTES // (width * stored.dtype.itemsize))
    for start in range(rows[0], rows[1], step):
        stop = min(start + step, rows[1])
        block = torch.empty(stop - start, width, dtype=stored.dtype)
        stored.read(start * width, stop * width, block)
        out_RC[start - rows[0] : stop - rows[0]].copy_(block[:, columns[0] : columns[1]])


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint with valid manifest and headers; `check_files` verifies its content."""

    folder: Path
    """Its folder."""
    manifest: Manifest
    """Its manifest."""
    headers: Mapping[int, Mapping[str, HeaderEntry]]
    """The header of each rank's file."""

    def shards(self, model: str, kind: str) -> dict[tuple[str, int], StoredShard]:
        """Return one kind of tensors of a model, by name and tensor-parallel rank of the writing run.

        Of ranks with equal pieces only the lowest is included.

        Raises:
            CheckpointError: an element is missing or stored twice.
        """
        info, tp = self.manifest.models[model], self.manifest.layout.tp
        stored: dict[tuple[str, int], list[StoredPart]] = defaultdict(list)
        for rank, file in enumerate(self.manifest.ranks):
            for name, start in file.starts.get(model, {}).items():
                entry = self.headers[rank].get(tensor_name(model, kind, name))
                if entry is not None:
                    stored[name, file.tp_rank].append(self._part(rank, entry, start))
        shards = {}
        for weight in _stored_weights(info, kind):
            for tp_rank in range(tp):
                for shard in shards_of(weight, info.config, tp_rank=tp_rank, tp_size=tp):
                    if owner_rank(weight, shard, info.config, tp_rank=tp_rank, tp_size=tp) == tp_rank:
                        parts = stored.pop((shard.name, tp_rank), [])
                        shards[shard.name, tp_rank] = self._whole(shard, parts, f"{model}/{kind}")
        if stored:
            raise CheckpointError(
                f"{self.folder} holds {next(iter(stored))} of {model}, which it cannot have"
            )
        return shards

    def tensors(self, model: str, kind: str = WEIGHT) -> dict[str, ShardedTensor]:
        """Return the whole tensors of one kind of a model, by Hugging Face name.

        Raises:
            CheckpointError: an element is missing or stored twice.
        """
        info = self.manifest.models[model]
        holders: dict[str, list[tuple[HfSlice, int, StoredShard]]] = defaultdict(list)
        for stored in self.shards(model, kind).values():
            offset = 0
            for piece in stored.shard.pieces:
                holders[piece.name].append((piece, offset, stored))
                offset += piece.length
        tensors = {}
        for weight in _stored_weights(info, kind):
            is_fp32 = kind != WEIGHT or weight.section == "value_head"
            for name, shape in names_within(weight, info.config).items():
                tensors[name] = ShardedTensor(
                    path=self.folder,
                    name=name,
                    dtype=STORED_DTYPES["F32" if is_fp32 else info.dtype],
                    dtype_name="F32" if is_fp32 else info.dtype,
                    shape=shape,
                    holders=tuple(holders[name]),
                )
        return tensors

    def rank_tensors(self, rank: int) -> dict[str, torch.Tensor]:
        """Return the tensors of a rank itself, such as states of its random generators, by name."""
        prefix, tensors = tensor_name("rank", "", ""), {}
        path = self.folder / rank_file_name(rank)
        for name, entry in self.headers[rank].items():
            if not name.startswith(prefix):
                continue
            out = torch.empty(entry.shape, dtype=STORED_DTYPES[entry.dtype])
            with path.open("rb", buffering=0) as file:
                content = memoryview(out.view(-1).view(torch.uint8).numpy())
                read_all(file.fileno(), entry.offset, content, what=f"{path} was truncated")
            tensors[name.removeprefix(prefix)] = out
        return tensors

    def check_files(self, *, rank: int = 0, world_size: int = 1) -> None:
        """Verify the checksums of every `world_size`-th file, from file `rank` on.

        Raises:
            CheckpointError: a file differs from what was written.
        """
        for name, info in list(self.manifest.files.items())[rank::world_size]:
            checksum = _sha256(self.folder / name)
            if checksum != info.sha256:
                raise CheckpointError(
                    f"{self.folder / name} is damaged: its SHA-256 is {checksum[:12]}…, the manifest says "
                    f"{info.sha256[:12]}…"
                )

    def _part(self, rank: int, entry: HeaderEntry, start: int) -> StoredPart:
        return StoredPart(
            path=self.folder / rank_file_name(rank),
            start=start,
            stop=start + prod(entry.shape),
            dtype=STORED_DTYPES[entry.dtype],
            offset=entry.offset,
        )

    def _whole(self, shard: ParamShard, parts: Iterable[StoredPart], what: str) -> StoredShard:
        position, ordered = 0, sorted(parts, key=lambda part: part.start)
        for part in ordered:
            if part.start != position or part.dtype != ordered[0].dtype:
                break
            position = part.stop
        if position != prod(shard.shape):
            raise CheckpointError(
                f"{self.folder}: {what} of {shard.name} has {position} of {prod(shard.shape)} elements in "
                "order; parts of it are missing or overlap"
            )
        return StoredShard(shard=shard, parts=tuple(ordered))


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Return a checkpoint after checking its manifest, and existence, size and header of each file.

    Raises:
        CheckpointError: names the file and what is wrong with it.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    headers = {}
    try:
        for name, info in manifest.files.items():
            num_bytes = plain_file(folder, name).stat().st_size
            if num_bytes != info.num_bytes:
                raise CheckpointError(f"{folder / name} has {num_bytes} bytes of {info.num_bytes}")
        for rank in range(manifest.world_size):
            path = folder / rank_file_name(rank)
            headers[rank] = read_header(path)
            for name, entry in headers[rank].items():
                if entry.dtype not in STORED_DTYPES:
                    raise CheckpointError(f"{path} holds {name!r} as {entry.dtype}, which is never written")
    except (ModelFolderError, OSError) as error:
        raise error if isinstance(error, CheckpointError) else CheckpointError(str(error)) from None
    _check_names(folder, manifest, headers)
    checkpoint = Checkpoint(folder=folder, manifest=manifest, headers=headers)
    for model, info in manifest.models.items():
        for kind in (WEIGHT, *(ADAM_MOMENTS if info.has_moments else ())):
            checkpoint.shards(model, kind)
    return checkpoint


def _check_names(folder: Path, manifest: Manifest, headers: Mapping[int, Mapping[str, HeaderEntry]]) -> None:
    """Check that the manifest lists exactly the parameters in each rank's file."""
    for rank, file in enumerate(manifest.ranks):
        path = folder / rank_file_name(rank)
        listed = {(model, name) for model, starts in file.starts.items() for name in starts}
        for model, name in listed:
            if model not in manifest.models or tensor_name(model, WEIGHT, name) not in headers[rank]:
                raise CheckpointError(f"{path} has no weight {name} of {model}, which the manifest lists")
        for stored_name, entry in headers[rank].items():
            owner, kind, name = (*stored_name.split("/", 2), "", "")[:3]
            if owner != "rank" and ((owner, name) not in listed or kind not in (WEIGHT, *ADAM_MOMENTS)):
                raise CheckpointError(f"{path} holds {stored_name!r}, which the manifest does not list")
            if owner != "rank" and entry.dtype not in FLOAT_DTYPES:
                raise CheckpointError(
                    f"{path} holds {stored_name!r} as {entry.dtype}; a floating-point type is required"
                )


def tensor_name(owner: str, kind: str, name: str) -> str:
    """Return a tensor's name in a rank's file; `owner` is a model, or `rank` for the rank's own tensors."""
    return f"{owner}/{kind}/{name}"


def list_checkpoint(folder: Path) -> dict[str, ShardedTensor]:
    """Return the tensors of a checkpoint's first model by Hugging Face name, as for a model folder.

    Raises:
        CheckpointError: it is damaged.
    """
    checkpoint = open_checkpoint(folder)
    return checkpoint.tensors(next(iter(checkpoint.manifest.models)))


def _stored_weights(info: ModelInfo, kind: str) -> list[Weight]:
    weights = weights_of(info.config, layers=range(info.config.num_layers), role=info.role)
    return [weight for weight in weights if kind == WEIGHT or weight.name not in info.frozen]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    buffer = bytearray(2**22)
    with path.open("rb", buffering=0) as file:
        while count := os.readv(file.fileno(), [buffer]):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()
