"""The settings of `bench`."""

from functools import partial
from typing import Literal

from pydantic import Field

from glm_rlhf.engine.config.load import FromYaml
from glm_rlhf.engine.config.sections import Count, PathText, RunFolderSection, Seconds, frozen_section

Part = Literal["kernels", "model", "generation", "ppo", "checkpoint", "scaling", "rates"]
Peer = Literal[
    "transformers",
    "torch.compile",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "flashinfer",
    "FlashAttention-3",
    "Transformer Engine",
]
PEER_PACKAGES: dict[str, tuple[str, bool]] = {
    "transformers": ("transformers", False),
    "torch.compile": ("torch", False),
    "liger-kernel": ("liger-kernel", True),
    "cut-cross-entropy": ("cut-cross-entropy", True),
    "quack-kernels": ("quack-kernels", True),
    "flashinfer": ("flashinfer-python", True),
    "FlashAttention-3": ("flash-attn-3", True),
    "Transformer Engine": ("transformer-engine", True),
}
"""The distribution of each peer, and whether it runs on CUDA alone."""


@frozen_section
class BenchSection:
    """What is measured, on what, against whom."""

    parts: tuple[Part, ...] = ("kernels", "model", "generation", "ppo", "checkpoint", "scaling", "rates")
    """What is measured; under torchrun only scaling and rates, on the ranks that it started."""
    against: tuple[Peer, ...] = (
        "transformers",
        "liger-kernel",
        "cut-cross-entropy",
        "quack-kernels",
        "flashinfer",
        "FlashAttention-3",
        "Transformer Engine",
    )
    """Peers beside ours and eager torch; one that is not installed is said to be missing. torch.compile takes
    some 12 s a kernel to compile on a CPU."""
    model: PathText | None = None
    """Preset's name, or Hugging Face folder whose config.json says the shape; weights are random. null is a
    model of 5 million parameters on a CPU, ChatGLM3-6B's widths on CUDA."""
    layers: Count = 4
    """Layers of that model that are built."""
    ranks: tuple[Count, ...] | None = None
    """Numbers of ranks of scaling, and the last one of rates; null is 1, 2, 4 … up to the GPUs, on a CPU
    up to the cores, at least to 2 and at most to 4."""
    threads: Count = 1
    """Threads of torch on a CPU, a rank."""
    visits: Count = 3
    """Times that all rows are measured, one after another: what a machine does in minutes then shows in the
    spread, which reaches from the lowest quartile of any visit to the highest."""
    budget_s: Seconds = 0.25
    """Seconds of timed runs of a kernel, a visit; other rows have eight times as many."""
    earlier: PathText | None = None
    """bench.json of an earlier run: the report says how far each median has moved; null compares nothing."""

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("bench.parts is empty: name at least one part, or leave the key out for all")


@frozen_section
class BenchConfig:
    """Settings of `bench`."""

    run: RunFolderSection = Field(default_factory=partial(RunFolderSection, name="bench"))
    """Where the report, the plots and the rates go."""
    bench: BenchSection = Field(default_factory=BenchSection)
    """What is measured."""

    from_yaml = FromYaml()
