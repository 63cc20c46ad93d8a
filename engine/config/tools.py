"""Settings of the commands that neither train nor read records: `convert`, `demo` and `doctor`."""

from functools import partial
from typing import Annotated, Literal

from pydantic import Field

from glm_rlhf.engine.config.load import FromYaml
from glm_rlhf.engine.config.sections import (
    Count,
    ModelSection,
    NumBytes,
    PathText,
    RunFolderSection,
    RunSection,
    Seconds,
    check_apart,
    frozen_section,
)


@frozen_section
class ConvertSection:
    """The converted model."""

    to: PathText
    """Folder to write; created if missing."""
    format: Literal["same", "chatglm", "glm", "glm4"] = "same"
    """Model family whose weight names and config are written; same: the source's."""
    dtype: Literal["same", "bf16", "fp16", "fp32"] = "same"
    """Precision of the written weights; same: each tensor's own."""
    max_shard_bytes: NumBytes = 5 * 10**9
    """Largest weight file, in bytes; a single tensor above it gets a file of its own."""


@frozen_section
class DemoSection:
    """Size of the demo."""

    num_held_out: Annotated[int, Field(ge=2, le=200)] = 200
    """Held-out prompts per task, on which the models are evaluated."""
    num_pair_prompts: Count = 1600
    """Prompts that the policy answers several times for preference pairs."""
    sft_steps: Count = 360
    """Optimizer steps of SFT."""
    reward_steps: Count = 100
    """Optimizer steps of the reward model."""
    ppo_steps: Count = 30
    """PPO iterations."""
    checks_layouts: bool = True
    """Whether the policy also answers under tensor and pipeline parallelism, to compare the answers."""


@frozen_section
class DoctorSection:
    """Form and time limits of the report."""

    json: bool = False
    """Whether the report is one JSON object instead of tables."""
    timeout_s: Seconds = 60.0
    """Longest wait for a rank under torchrun, and longest time of a collective, in seconds."""


@frozen_section
class ConvertConfig:
    """Settings of `convert`."""

    run: RunFolderSection = Field(default_factory=partial(RunFolderSection, name="convert"))
    """Run folder."""
    model: ModelSection
    """The source."""
    convert: ConvertSection
    """The target."""

    from_yaml = FromYaml()

    def __post_init__(self) -> None:
        check_apart("convert.to", self.convert.to, "model.path", self.model.path)


@frozen_section
class DemoConfig:
    """Settings of `demo`."""

    run: RunSection = Field(default_factory=partial(RunSection, name="demo"))
    """Run folder and seed."""
    demo: DemoSection = Field(default_factory=DemoSection)
    """Size of the demo."""

    from_yaml = FromYaml()


@frozen_section
class DoctorConfig:
    """Settings of `doctor`."""

    doctor: DoctorSection = Field(default_factory=DoctorSection)
    """The report."""

    from_yaml = FromYaml()
