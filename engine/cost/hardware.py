"""The machines that a plan is for: their memory, how they are joined, what rates they reach."""

import json
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path

from glm_rlhf.parallel.spec.model_config import GLMConfig
from glm_rlhf.parallel.spec.presets import PRESETS, preset
from glm_rlhf.parallel.storage.hf_config import read_config

ASSUMED_SHARE_OF_FLOP = 0.5
"""Share of the peak that matrix products of training are taken to reach where nothing was measured."""
ASSUMED_SHARE_OF_BYTES = 0.8
"""Share of the peak that memory and links are taken to reach where nothing was measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GPU:
    """A kind of GPU, by its maker's public figures."""

    memory_bytes: int
    """Device memory."""
    peak_flop_per_s: float
    """Dense bf16 matrix products."""
    peak_bytes_per_s: float
    """Device memory's bandwidth."""
    node_bytes_per_s: float
    """To GPUs of the same node, one direction."""


GPUS = {
    "a100-40gb": GPU(
        memory_bytes=40 * 10**9, peak_flop_per_s=312e12, peak_bytes_per_s=1.56e12, node_bytes_per_s=300e9
    ),
    "a100-80gb": GPU(
        memory_bytes=80 * 10**9, peak_flop_per_s=312e12, peak_bytes_per_s=2.04e12, node_bytes_per_s=300e9
    ),
    "h20": GPU(
        memory_bytes=96 * 10**9, peak_flop_per_s=148e12, peak_bytes_per_s=4.0e12, node_bytes_per_s=450e9
    ),
    "h800": GPU(
        memory_bytes=80 * 10**9, peak_flop_per_s=989e12, peak_bytes_per_s=3.35e12, node_bytes_per_s=200e9
    ),
    "h100": GPU(
        memory_bytes=80 * 10**9, peak_flop_per_s=989e12, peak_bytes_per_s=3.35e12, node_bytes_per_s=450e9
    ),
    "h200": GPU(
        memory_bytes=141 * 10**9, peak_flop_per_s=989e12, peak_bytes_per_s=4.8e12, node_bytes_per_s=450e9
    ),
    "b200": GPU(
        memory_bytes=180 * 10**9, peak_flop_per_s=2250e12, peak_bytes_per_s=7.7e12, node_bytes_per_s=900e9
    ),
}
"""Figures of the data sheets of NVIDIA, SXM forms, without sparsity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What a rank reaches; measured by `bench`, or assumed from public figures."""

    flop_per_s: float
    """Large matrix products."""
    attention_flop_per_s: float
    """Attention over whole sequences."""
    bytes_per_s: float
    """Memory, read plus written."""
    node_bytes_per_s: float
    """A rank's collectives within a node, one direction."""
    network_bytes_per_s: float
    """A rank's collectives between nodes, one direction."""
    node_latency_s: float
    """A collective or message within a node, however small."""
    network_latency_s: float
    """The same between nodes."""
    layer_s: float
    """One layer's forward pass in training, however few rows."""
    decode_layer_s: float
    """One layer's decode step, however few rows."""
    pass_s: float
    """One micro-batch's way through a chunk, beside its layers."""
    turn_s: float
    """One step of generation on a stage, beside its layers: host, sampling."""
    step_s: float
    """One optimizer step, however small the model."""
    backward_factor: float
    """A layer's backward by its forward."""
    source: str
    """Where these come from, as a report says it."""


def assumed_rates(gpu: GPU, *, network_bytes_per_s: float) -> Rates:
    """Return rates guessed from public peaks; the report says so."""
    return Rates(
        flop_per_s=ASSUMED_SHARE_OF_FLOP * gpu.peak_flop_per_s,
        attention_flop_per_s=0.8 * ASSUMED_SHARE_OF_FLOP * gpu.peak_flop_per_s,
        bytes_per_s=ASSUMED_SHARE_OF_BYTES * gpu.peak_bytes_per_s,
        node_bytes_per_s=ASSUMED_SHARE_OF_BYTES * gpu.node_bytes_per_s,
        network_bytes_per_s=ASSUMED_SHARE_OF_BYTES * network_bytes_per_s,
        node_latency_s=15e-6,
        network_latency_s=40e-6,
        layer_s=150e-6,
        decode_layer_s=15e-6,
        pass_s=500e-6,
        turn_s=500e-6,
        step_s=5e-3,
        backward_factor=2.0,
        source="assumed from public peak figures, not measured",
    )


def read_rates(path: str | Path) -> Rates:
    """Return the rates in a JSON file, an object with every name of `Rates`.

    Raises:
        ValueError: no file, no JSON, a name missing or unknown, or a number that is not above 0.
    """
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cluster.rates names {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}; `glm-rlhf bench` writes such a file") from error
    names = [field.name for field in fields(Rates)]
    if not isinstance(given, dict) or sorted(given) != sorted(names):
        found = sorted(given) if isinstance(given, dict) else type(given).__name__
        raise ValueError(f"{path} holds {found}, required is one object with {', '.join(names)}")
    for name in names:
        value = given[name]
        is_sound = isinstance(value, str) if name == "source" else _is_positive(value)
        if not is_sound:
            wanted = "text" if name == "source" else "a number above 0"
            raise ValueError(f"{path}: {name} is {value!r}, required is {wanted}")
    return Rates(**given)


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The machines of a plan."""

    gpu: GPU
    """Their kind of GPU."""
    num_gpus: int
    """GPUs, one rank each."""
    gpus_per_node: int
    """GPUs a node."""
    rates: Rates
    """What they reach."""
    usable_bytes: int
    """Memory a rank that a plan may fill."""

    def link(self, *, num_ranks: int, stride: int) -> tuple[float, float]:
        """Return bandwidth and latency between `num_ranks` ranks that are `stride` apart.

        Ranks of a node join their network adapters: a ring through several of them a node uses all of theirs.
        """
        rates = self.rates
        in_node = max(1, min(num_ranks, self.gpus_per_node // stride))
        if num_ranks <= in_node:
            return rates.node_bytes_per_s, rates.node_latency_s
        return min(rates.node_bytes_per_s, rates.network_bytes_per_s * in_node), rates.network_latency_s


def shape_of(path: str) -> GLMConfig:
    """Return the shape of a preset, or of a folder.

    Raises:
        ValueError: it is neither.
    """
    if path in PRESETS:
        return preset(path)
    if not Path(path).exists():
        near = get_close_matches(path.lower(), PRESETS, n=1)
        nearest = f", the nearest of which is {near[0]}" if near else ""
        raise ValueError(
            f"{path} is neither a folder nor a preset's name{nearest}: presets are {', '.join(PRESETS)}"
        )
    return read_config(path)
