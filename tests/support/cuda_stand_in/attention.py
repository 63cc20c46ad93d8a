"""FlashAttention's operators over packed sequences, as called by torch's variable-length attention."""

from collections.abc import Iterator
from itertools import pairwise

import torch


def register() -> None:
    """Give the stand-in these operators."""
    _LIBRARY.impl("_flash_attention_forward", forward, "CUDA")
    _LIBRARY.impl("_flash_attention_backward", backward, "CUDA")


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_cu: torch.Tensor,
    key_cu: torch.Tensor,
    *others: object,
    scale: float | None = None,
    **options: object,
) -> tuple[torch.Tensor, ...]:
    """As `aten::_flash_attention_forward`; [T, N, H], keys and values may have fewer heads."""
    _check(query, key, value, query_cu, key_cu)
    looks_back = _looks_back(others, options)
    outputs, sums = [], []
    for part in _parts(query, key, value, query_cu, key_cu, looks_back, scale):
        outputs.append((part.scores.softmax(-1) @ part.value).transpose(0, 1))
        sums.append(part.scores.logsumexp(-1))
    return (
        torch.cat(outputs).to(query.dtype).to("cuda"),
        torch.cat(sums, dim=1).to("cuda"),
        torch.empty(2, dtype=torch.uint64, device="cuda"),
        torch.empty((), dtype=torch.uint64, device="cuda"),
        torch.empty(0, dtype=query.dtype, device="cuda"),
    )


def backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    sums: torch.Tensor,
    query_cu: torch.Tensor,
    key_cu: torch.Tensor,
    *others: object,
    scale: float | None = None,
    **options: object,
) -> tuple[torch.Tensor, ...]:
    """As `aten::_flash_attention_backward`."""
    _check(query, key, value, query_cu, key_cu, gradient, output, sums)
    looks_back = _looks_back(others, options)
    upstream = _host(gradient)
    found = [torch.zeros(tensor.shape) for tensor in (query, key, value)]
    for part in _parts(query, key, value, query_cu, key_cu, looks_back, scale):
        above = upstream[part.rows].transpose(0, 1)
        weights = part.scores.softmax(-1)
        change = above @ part.value.transpose(1, 2)
        inner = weights * (change - (weights * change).sum(-1, keepdim=True)) * part.scale
        found[0][part.rows] = (inner @ part.key).transpose(0, 1)
        found[1][part.keys] = part.by_group(inner.transpose(1, 2) @ part.query)
        found[2][part.keys] = part.by_group(weights.transpose(1, 2) @ above)
    return tuple(tensor.to(query.dtype).to("cuda") for tensor in found)


class _Part:
    """One sequence: fp32 on the host, a key and a value for every head."""

    def __init__(self, rows: slice, keys: slice, query, key, value, looks_back: bool, scale: float | None):
        self.rows, self.keys = rows, keys
        self.group = query.shape[1] // key.shape[1]
        self.scale = query.shape[-1] ** -0.5 if scale is None else scale
        self.query = query[rows].transpose(0, 1)
        self.key, self.value = (
            tensor[keys].transpose(0, 1).repeat_interleave(self.group, dim=0) for tensor in (key, value)
        )
        self.scores = self.query @ self.key.transpose(1, 2) * self.scale
        if looks_back:
            num_rows, num_keys = self.scores.shape[1:]
            is_seen = torch.ones(num_rows, num_keys, dtype=torch.bool).tril(num_keys - num_rows)
            self.scores = self.scores.masked_fill(~is_seen, float("-inf"))

    def by_group(self, by_head: torch.Tensor) -> torch.Tensor:
        return by_head.unflatten(0, (-1, self.group)).sum(1).transpose(0, 1)


def _parts(query, key, value, query_cu, key_cu, looks_back: bool, scale: float | None) -> Iterator[_Part]:
    wide = [_host(tensor) for tensor in (query, key, value)]
    ends = (torch.ops.cuda_stand_in.on_host(tensor).tolist() for tensor in (query_cu, key_cu))
    rows, keys = ([slice(*pair) for pair in pairwise(cu)] for cu in ends)
    for of_query, of_key in zip(rows, keys, strict=True):
        yield _Part(of_query, of_key, *wide, looks_back, scale)


def _looks_back(others: tuple[object, ...], options: dict[str, object]) -> bool:
    """Return whether attention is causal; the arguments are the same for both operators."""
    _, _, _, is_causal, *_ = others
    return bool(is_causal) or options.get("window_size_right") == 0


def _host(tensor: torch.Tensor) -> torch.Tensor:
    return torch.ops.cuda_stand_in.on_host(tensor.detach()).float()


def _check(query: torch.Tensor, *others: torch.Tensor) -> None:
    """Raise for arguments that the real operators refuse."""
    if not all(tensor.is_cuda for tensor in (query, *others)):
        raise RuntimeError("flash attention: a tensor is not on the device")
    if query.dtype is not torch.bfloat16:
        raise RuntimeError(f"flash attention takes bf16 (and fp16), not {query.dtype}")
    if query.stride(-1) != 1:
        raise RuntimeError("flash attention: the last dimension is not contiguous")


_LIBRARY = torch.library.Library("aten", "IMPL")
