"""The settings of every command: typed sections, one root per command.

A root holds only what its command reads, and the same key means the same thing in every root. Sections
are checked when they are built and never change afterwards; what follows from settings is a property.
A root's `default_factory` with keywords gives a section other defaults for that command.
"""

import os
import re
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar, cast, dataclass_transform

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from glm_rlhf.engine.config.keys import Described
from glm_rlhf.engine.config.load import FromYaml

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)
_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BYTES |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}

Section = TypeVar("Section")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field,))
def frozen_section(section: type[Section]) -> type[Section]:
    """Return a class as a section or a root: values of the declared types only, unknown names refused."""
    made = dataclass(section, frozen=True, slots=True, kw_only=True, config=_STRICT)
    return cast("type[Section]", made)  # pydantic declares its own protocol alone


def _folder_name(name: str) -> str:
    if name.strip() != name or name in (".", "..") or not re.fullmatch(r"[^/\\\0]+", name):
        raise ValueError("it names one folder, without slashes or outer spaces (run.output takes a path)")
    return name


def _num_bytes(size: Any) -> Any:
    """Return a size such as `5GB` in bytes; what is no text is left to the type check."""
    if not isinstance(size, str):
        return size
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?B|B)", size)
    if match is None:
        raise ValueError("a size is a whole number of bytes, or a number with B, KB, MB, GB, TB, KiB … TiB")
    return int(float(match[1]) * _BYTES[match[2]])


FolderName = Annotated[str, AfterValidator(_folder_name), Described(words="a folder name")]
PathText = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser), Described(words="a path")]
NumBytes = Annotated[
    int, BeforeValidator(_num_bytes), Field(ge=1), Described(words="a size in bytes, above 0, such as 5GB")
]
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]


@frozen_section
class RunFolderSection:
    """Where the run keeps its files."""

    name: FolderName
    """Name of the run."""
    output: PathText = "outputs/<run.name>"
    """Run folder; <run.name> stands for the name. The resolved config goes there as config.yaml."""

    def __post_init__(self) -> None:
        resolve_output(self)


@frozen_section
class RunSection:
    """Where the run keeps its files, and what its random numbers start from."""

    name: FolderName
    """Name of the run."""
    output: PathText = "outputs/<run.name>"
    """Run folder; <run.name> stands for the name. The resolved config goes there as config.yaml."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 1234
    """Seed of every random number generator; ranks derive theirs from it."""

    def __post_init__(self) -> None:
        resolve_output(self)


@frozen_section
class ModelSection:
    """The policy."""

    path: PathText
    """Hugging Face folder, or a checkpoint of ours."""


@frozen_section
class TokenizerSection:
    """The text side of the policy."""

    path: PathText | None = None
    """Folder with the tokenizer's files; null takes them from model.path."""


@frozen_section
class ParallelSection:
    """How the model is laid out over ranks; data parallelism takes what is left of the world."""

    tp: Count = 1
    """Tensor parallelism: ranks that share every layer's matrices."""
    pp: Count = 1
    """Pipeline parallelism: stages that hold consecutive layers."""
    vpp: Count = 1
    """Model chunks per pipeline stage, interleaved; 1 is the plain pipeline."""
    cp: Count = 1
    """Context parallelism: ranks that share the tokens of a micro-batch."""
    sequence_parallel: bool = False
    """Whether norms and residuals between tensor-parallel regions are split over tokens."""
    timeout_s: Seconds = 600.0
    """Seconds after which a collective that some rank never entered fails."""

    def __post_init__(self) -> None:
        if self.vpp > 1 and self.pp == 1:
            raise ValueError(
                f"parallel.vpp is {self.vpp} with parallel.pp 1: chunks interleave over stages, "
                "set parallel.pp to 2 or more, or parallel.vpp to 1"
            )
        if self.sequence_parallel and self.tp == 1:
            raise ValueError(
                "parallel.sequence_parallel is true with parallel.tp 1: it splits over the tp ranks, "
                "set parallel.tp to 2 or more, or parallel.sequence_parallel to false"
            )


@frozen_section
class RecordsSection:
    """The records that go in, and the file of lines that comes out."""

    path: PathText
    """JSON lines, or parquet, to read."""
    out: PathText | None = None
    """JSON lines to write, one a record in the input's order; null is <run.output>/<command>.jsonl."""
    max_prompt_tokens: Count = 4096
    """Longest prompt, in tokens; a longer one is a bad record."""
    on_error: Literal["raise", "skip"] = "raise"
    """What a bad record does: end the command, or be left out and counted."""


@frozen_section
class ScoredRecordsSection:
    """The answers that are scored, and the file of lines that comes out."""

    path: PathText
    """JSON lines, or parquet, to read."""
    form: Literal["demonstrations", "pairs", "hh-rlhf"] = "demonstrations"
    """Form of the records; pairs, also as hh-rlhf's dialogues, are for reward models."""
    out: PathText | None = None
    """JSON lines to write, one a record in the input's order; null is <run.output>/<command>.jsonl."""
    max_prompt_tokens: Count = 4096
    """Longest prompt, in tokens; a longer one is a bad record."""
    on_error: Literal["raise", "skip"] = "raise"
    """What a bad record does: end the command, or be left out and counted."""


@frozen_section
class PrecisionSection:
    """How exactly a model is run."""

    dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision of weights and activations."""


@frozen_section
class ForwardSection:
    """How a model that does not learn is run."""

    dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision of weights and activations."""
    micro_batch_tokens: Count = 16384
    """Tokens that go through the model at once, packed from whole sequences."""


@frozen_section
class GenerationSection:
    """How answers are drawn."""

    max_new_tokens: Count = 512
    """Longest answer, in tokens; less where the model's context leaves less room."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw among the likeliest ids that together have this probability; 1 for all."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Draw among the k most likely ids; 0 for all."""
    num_samples: Count = 1
    """Answers to each prompt; they share the prompt's pages."""
    max_batch: Count = 256
    """Sequences that run at once on a copy of the model."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """Each answer's random numbers follow from it, the record's place and the sample's number, in PPO the
    iteration too; null: run.seed."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end an answer, beside the model's own end ids; needs a tokenizer."""
    stop_ids: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Ids that end an answer, beside the model's own."""
    page_size: Count = 16
    """Positions a page of the key/value cache; 16 or more on CUDA."""
    cache_bytes: NumBytes | None = None
    """Memory of the key/value cache a rank; null: what max_batch needs, on CUDA at most 80 % of the free."""
    max_step_tokens: Count = 8192
    """Tokens that go through the model in a step; longer prompts are read in parts."""
    tp: Count | None = None
    """Tensor parallelism while generating; null: parallel.tp. Another layout holds a second copy of the
    weights on a rank while it generates."""
    pp: Count | None = None
    """Pipeline parallelism while generating; null: parallel.pp."""


@frozen_section
class ConvertSection:
    """What the converted model looks like."""

    to: PathText
    """Folder to write; made when missing."""
    format: Literal["same", "chatglm", "glm", "glm4"] = "same"
    """Family of names and config to write; same keeps the source's."""
    dtype: Literal["same", "bf16", "fp16", "fp32"] = "same"
    """Precision to write; same keeps each tensor's."""
    max_shard_bytes: NumBytes = 5 * 10**9
    """Largest weight file, in bytes; one tensor that is larger gets a file of its own."""


@frozen_section
class DemoSection:
    """How much the demonstration does."""

    num_held_out: Annotated[int, Field(ge=2, le=200)] = 200
    """Prompts of either task that no model learns from, and on which figures are taken."""
    num_pair_prompts: Count = 1600
    """Prompts that the policy answers several times to make preference pairs."""
    sft_steps: Count = 360
    """Steps of SFT."""
    reward_steps: Count = 100
    """Steps of the reward model."""
    ppo_steps: Count = 30
    """Iterations of PPO."""
    checks_layouts: bool = True
    """Whether the policy answers again over several ranks, by tensor and by pipeline parallelism."""


@frozen_section
class DoctorSection:
    """How the report is made."""

    json: bool = False
    """Whether the report is one JSON object in place of tables."""
    timeout_s: Seconds = 60.0
    """Seconds that a rank is waited for under torchrun, and that a collective may take."""


@frozen_section
class ScoreConfig:
    """Settings of `score`."""

    run: RunSection = Field(default_factory=partial(RunSection, name="score"))
    """Where results go, and the seed."""
    model: ModelSection
    """The policy or the reward model that scores."""
    tokenizer: TokenizerSection = Field(default_factory=TokenizerSection)
    """Its tokenizer."""
    parallel: ParallelSection = Field(default_factory=ParallelSection)
    """Its layout."""
    data: ScoredRecordsSection
    """Answers in, scores out."""
    train: ForwardSection = Field(default_factory=ForwardSection)
    """Its precision and batches."""

    from_yaml = FromYaml()

    def __post_init__(self) -> None:
        check_apart("data.out", self.out_path, "data.path", self.data.path)

    @property
    def out_path(self) -> Path:
        """File of scores."""
        return out_path(self, "score.jsonl")

    @property
    def tokenizer_path(self) -> Path:
        """Folder with the tokenizer's files."""
        return tokenizer_path(self)


@frozen_section
class GenerateConfig:
    """Settings of `generate`."""

    run: RunSection = Field(default_factory=partial(RunSection, name="generate"))
    """Where results go, and the seed."""
    model: ModelSection
    """The model that answers."""
    tokenizer: TokenizerSection = Field(default_factory=TokenizerSection)
    """Its tokenizer."""
    parallel: ParallelSection = Field(default_factory=ParallelSection)
    """Its layout."""
    data: RecordsSection
    """Prompts in, answers out."""
    generation: GenerationSection = Field(default_factory=GenerationSection)
    """How answers are drawn."""
    train: PrecisionSection = Field(default_factory=PrecisionSection)
    """Its precision."""

    from_yaml = FromYaml()

    def __post_init__(self) -> None:
        check_apart("data.out", self.out_path, "data.path", self.data.path)

    @property
    def out_path(self) -> Path:
        """File of answers."""
        return out_path(self, "generate.jsonl")

    @property
    def tokenizer_path(self) -> Path:
        """Folder with the tokenizer's files."""
        return tokenizer_path(self)


@frozen_section
class ConvertConfig:
    """Settings of `convert`."""

    run: RunFolderSection = Field(default_factory=partial(RunFolderSection, name="convert"))
    """Where the resolved config goes."""
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
    """Where everything goes, and the seed."""
    demo: DemoSection = Field(default_factory=DemoSection)
    """How much is done."""

    from_yaml = FromYaml()


@frozen_section
class DoctorConfig:
    """Settings of `doctor`."""

    doctor: DoctorSection = Field(default_factory=DoctorSection)
    """The report."""

    from_yaml = FromYaml()


def out_path(config: Any, name: str) -> Path:
    """Return where a command on records writes its lines."""
    return Path(config.data.out) if config.data.out is not None else Path(config.run.output) / name


def tokenizer_path(config: Any) -> Path:
    """Return the folder with the tokenizer's files."""
    return Path(config.tokenizer.path if config.tokenizer.path is not None else config.model.path)


class _RunFolder(Protocol):
    """What every section of that kind has, training's too."""

    @property
    def name(self) -> str: ...

    @property
    def output(self) -> str: ...


def resolve_output(run: RunSection | RunFolderSection | _RunFolder) -> None:
    object.__setattr__(run, "output", run.output.replace("<run.name>", run.name))


def check_apart(key: str, path: str | Path, source_key: str, source: str | Path) -> None:
    """Return nothing when two keys name two files.

    Raises:
        ValueError: they name one.
    """
    if os.path.realpath(path) == os.path.realpath(source):
        raise ValueError(f"{key} and {source_key} are both {source}: the source would be overwritten")
