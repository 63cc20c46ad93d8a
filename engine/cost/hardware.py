"""The machines of a plan: memory, links and rates."""

from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path

from glm_rlhf.parallel.spec.model_config import GLMConfig
from glm_rlhf.parallel.spec.presets import PRESETS, preset
from glm_rlhf.parallel.storage.hf_config import read_config
from glm_rlhf.parallel.storage.model_folder import ModelFolderError
from glm_rlhf.parallel.storage.text_files import read_json

ASSUMED_SHARE_OF_FLOP = 0.5
"""Share of the peak rate that is assumed for matrix products of training without measured rates."""
ASSUMED_SHARE_OF_BYTES = 0.8
"""Share of the peak rate that is assumed for memory and links without measured rates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GPU:
    """A type of GPU, with public figures of its maker."""

    memory_bytes: int
    """Device memory."""
    peak_flop_per_s: float
    """Of dense bf16 matrix products."""
    peak_bytes_per_s: float
    """Bandwidth of device memory."""
    node_bytes_per_s: float
    """Bandwidth to GPUs of the same node, in one direction."""


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
"""Figures of NVIDIA's data sheets for SXM modules, without sparsity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Rates that a rank reaches; measured by `bench`, or assumed from public figures."""

    flop_per_s: float
    """Large matrix products."""
    attention_flop_per_s: float
    """Attention over whole sequences."""
    bytes_per_s: float
    """Device memory, reads plus writes."""
    node_bytes_per_s: float
    """Collectives of a rank within a node, in one direction."""
    network_bytes_per_s: float
    """Collectives of a rank between nodes, in one direction."""
    node_latency_s: float
    """Fixed time of a collective or message within a node."""
    network_latency_s: float
    """Fixed time of a collective or message between nodes."""
    layer_s: float
    """Fixed time of one layer's forward pass in training."""
    decode_layer_s: float
    """Fixed time of one layer's decode step."""
    pass_s: float
    """Fixed time of one micro-batch in a chunk, in addition to its layers."""
    turn_s: float
    """Fixed time of one step of generation on a stage, in addition to its layers: host work, sampling."""
    step_s: float
    """Fixed time of one optimizer step."""
    backward_factor: float
    """Time of a layer's backward / time of its forward."""
    source: str
    """Origin of these rates, for the report."""


def assumed_rates(gpu: GPU, *, network_bytes_per_s: float) -> Rates:
    """Return rates assumed as shares of public peak rates; the report says so."""
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
    """Return the rates in a JSON file, an object with all names of `Rates`.

    Raises:
        ValueError: the file is missing or not JSON, a name is missing or unknown, or a number is not above 0.
    """
    names = [field.name for field in fields(Rates)]
    try:
        values = read_json(Path(path), max_bytes=2**20)
    except ModelFolderError as error:
        raise ValueError(
            f"cluster.rates: {error}; `glm-rlhf bench` writes such a file, with {', '.join(names)}"
        ) from None
    if sorted(values) != sorted(names):
        content = str(sorted(values))
        raise ValueError(f"{path} holds {content:.200}, it must hold one object with {', '.join(names)}")
    for name in names:
        value = values[name]
        is_valid = isinstance(value, str) if name == "source" else _is_positive(value)
        if not is_valid:
            required = "text" if name == "source" else "a number above 0"
            raise ValueError(f"{path}: {name} is {value!r}, it must be {required}")
    return Rates(**values)


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The machines of a plan."""

    gpu: GPU
    """Type of GPU."""
    num_gpus: int
    """Number of GPUs, one rank each."""
    gpus_per_node: int
    """GPUs per node."""
    rates: Rates
    """Rates that a rank reaches."""
    usable_bytes: int
    """Memory per rank that a plan may use."""

    def link(self, *, num_ranks: int, stride: int) -> tuple[float, float]:
        """Return bandwidth and latency between `num_ranks` ranks that are `stride` apart.

        A ring with several ranks per node uses the network adapters of all of them.
        """
        rates = self.rates
        in_node = max(1, min(num_ranks, self.gpus_per_node // stride))
        if num_ranks <= in_node:
            return rates.node_bytes_per_s, rates.node_latency_s
        return min(rates.node_bytes_per_s, rates.network_bytes_per_s * in_node), rates.network_latency_s


def shape_of(path: str) -> GLMConfig:
    """Return the shape of a preset's name or of a Hugging Face folder.

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
