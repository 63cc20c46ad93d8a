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
"""Python distribution of each peer, and whether it needs CUDA."""


@frozen_section
class BenchSection:
    """Measured parts, model and peers."""

    parts: tuple[Part, ...] = ("kernels", "model", "generation", "ppo", "checkpoint", "scaling", "rates")
    """Parts to measure; under torchrun only scaling and rates, on the ranks that torchrun started."""
    against: tuple[Peer, ...] = (
        "transformers",
        "liger-kernel",
        "cut-cross-entropy",
        "quack-kernels",
        "flashinfer",
        "FlashAttention-3",
        "Transformer Engine",
    )
    """Peers to compare with, in addition to eager torch; the report lists those that are not installed.
    torch.compile takes about 12 s per kernel to compile on a CPU."""
    model: PathText | None = None
    """Preset's name, or Hugging Face folder whose config.json gives the shape; weights are random. null: a
    model of 5 million parameters on a CPU, the widths of ChatGLM3-6B on CUDA."""
    layers: Count = 4
    """Number of layers to build of that model."""
    ranks: tuple[Count, ...] | None = None
    """Numbers of ranks for scaling; rates uses the last one. null: 1, 2, 4 … up to the number of GPUs; on a
    CPU up to the number of cores, at least 2 and at most 4."""
    threads: Count = 1
    """Torch threads per rank on a CPU."""
    visits: Count = 3
    """Number of rounds; each round measures all rows once, so that slow changes of the machine show in the
    spread (lowest to highest quartile over all rounds)."""
    budget_s: Seconds = 0.25
    """Seconds of timed runs per kernel and round; rows of other parts get eight times as many."""
    earlier: PathText | None = None
    """bench.json of an earlier run; the report then shows the change of each median. null: no comparison."""

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("bench.parts is empty: name at least one part, or omit the key for all of them")


@frozen_section
class BenchConfig:
    """Settings of `bench`."""

    run: RunFolderSection = Field(default_factory=partial(RunFolderSection, name="bench"))
    """Folder of the report, the plots and the rates."""
    bench: BenchSection = Field(default_factory=BenchSection)
    """Measured parts, model and peers."""

    from_yaml = FromYaml()
