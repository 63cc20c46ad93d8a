"""The settings of every command: typed sections, one root per command.

A root holds only what its command reads, and the same key means the same thing in every root. Sections
are validated when they are built and never change afterwards; derived values are properties. A root's
`default_factory` with keywords gives a section other defaults for that command.
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
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.0001, 10000
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
        raise ValueError(
            "it must be the name of one folder, without slashes or outer spaces (run.output takes a path)"
        )
    return name


def _num_bytes(size: Any) -> Any:
    """Return a size such as `5GB` in bytes; a value that is not text is left to the type check."""
    if not isinstance(size, str):
        return size
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?B|B)", size)
    if match is None:
        raise ValueError("a size is a whole number of bytes, or a number with B, KB, MB, GB, TB, KiB … TiB")
    return int(float(match[1]) * _BYTES[match[2]])


def _temperature(temperature: float) -> float:
    if temperature != 0 and not LOWEST_TEMPERATURE <= temperature <= HIGHEST_TEMPERATURE:
        raise ValueError(
            f"it must be 0 (the most likely token) or from {LOWEST_TEMPERATURE} to {HIGHEST_TEMPERATURE}: "
            "beyond, fp32 loses the differences of logits"
        )
    return temperature


FolderName = Annotated[str, AfterValidator(_folder_name), Described(accepts="a folder name")]
PathText = Annotated[
    str, Field(min_length=1), AfterValidator(os.path.expanduser), Described(accepts="a path")
]
NumBytes = Annotated[
    int, BeforeValidator(_num_bytes), Field(ge=1), Described(accepts="a size in bytes, above 0, such as 5GB")
]
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
Temperature = Annotated[
    float,
    AfterValidator(_temperature),
    Described(accepts=f"0, or a number from {LOWEST_TEMPERATURE} to {HIGHEST_TEMPERATURE}"),
]


@frozen_section
class RunFolderSection:
    """Folder of the run's files."""

    name: FolderName
    """Name of the run."""
    output: PathText = "outputs/<run.name>"
    """Run folder; <run.name> is replaced by run.name. The resolved config is written there as config.yaml."""

    def __post_init__(self) -> None:
        resolve_output(self)


@frozen_section
class RunSection:
    """Folder of the run's files, and the seed."""

    name: FolderName
    """Name of the run."""
    output: PathText = "outputs/<run.name>"
    """Run folder; <run.name> is replaced by run.name. The resolved config is written there as config.yaml."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 1234
    """Seed of all random number generators; each rank derives its own from it."""

    def __post_init__(self) -> None:
        resolve_output(self)


@frozen_section
class ModelSection:
    """The policy."""

    path: PathText
    """Hugging Face folder, or a checkpoint <run.output>/checkpoints/step_N."""


@frozen_section
class TokenizerSection:
    """The tokenizer."""

    path: PathText | None = None
    """Folder with the tokenizer's files; null: model.path."""


@frozen_section
class ParallelSection:
    """Layout of the models over ranks; the data-parallel size is world size / (tp × pp × cp)."""

    tp: Count = 1
    """Tensor-parallel size: ranks that each layer's matrices are split over."""
    pp: Count = 1
    """Pipeline-parallel size: stages of consecutive layers."""
    vpp: Count = 1
    """Virtual pipeline size: model chunks per stage, run in the interleaved schedule; 1: plain 1F1B."""
    cp: Count = 1
    """Context-parallel size: ranks that the tokens of a micro-batch are split over."""
    sequence_parallel: bool = False
    """Whether norms and residuals outside tensor-parallel regions are split over tokens; needs tp above 1."""
    timeout_s: Seconds = 600.0
    """Seconds after which a collective fails that some rank has not entered, and a start to which some rank
    has not come."""

    def __post_init__(self) -> None:
        if self.vpp > 1 and self.pp == 1:
            raise ValueError(
                f"parallel.vpp is {self.vpp} with parallel.pp 1: chunks are interleaved over stages, "
                "set parallel.pp to 2 or more, or parallel.vpp to 1"
            )
        if self.sequence_parallel and self.tp == 1:
            raise ValueError(
                "parallel.sequence_parallel is true with parallel.tp 1: it splits over the tp ranks, "
                "set parallel.tp to 2 or more, or parallel.sequence_parallel to false"
            )


@frozen_section
class RecordsSection:
    """Input records and output file."""

    path: PathText
    """Input file: JSON lines or parquet."""
    out: PathText | None = None
    """Output file: one JSON line per record, in the input's order; null: <run.output>/<command>.jsonl."""
    overwrite: bool = False
    """Whether output files that exist are replaced; otherwise the command is refused."""
    max_prompt_tokens: Count = 4096
    """Longest prompt, in tokens; a record with a longer one is bad."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with a bad record: raise ends the command, skip drops and counts it."""


@frozen_section
class ScoredRecordsSection:
    """Answers to score, and the output file."""

    path: PathText
    """Input file: JSON lines or parquet."""
    form: Literal["demonstrations", "pairs", "hh-rlhf"] = "demonstrations"
    """Form of the records; pairs and hh-rlhf (pairs of whole dialogues) need a reward model."""
    out: PathText | None = None
    """Output file: one JSON line per record, in the input's order; null: <run.output>/<command>.jsonl. A file
    that exists is replaced."""
    max_prompt_tokens: Count = 4096
    """Longest prompt, in tokens; a record with a longer one is bad."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with a bad record: raise ends the command, skip drops and counts it."""


@frozen_section
class PrecisionSection:
    """Precision of the model."""

    dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision of weights and activations."""


@frozen_section
class ForwardSection:
    """Precision and batches of a model that is not trained."""

    dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision of weights and activations."""
    micro_batch_tokens: Count = 16384
    """Most tokens per micro-batch, packed from whole sequences."""


@frozen_section
class GenerationSection:
    """Sampling of answers, and the batches and memory of generation."""

    max_new_tokens: Count = 512
    """Longest answer, in tokens; shorter where prompt + answer would exceed the model's context."""
    temperature: Temperature = 1.0
    """Divides the logits before sampling; 0: greedy decoding."""
    top_p: Annotated[float, Field(ge=1e-6, le=1)] = 1.0
    """Nucleus sampling: sample from the fewest most likely ids whose probabilities sum to top_p; 1: from
    all."""
    top_k: Annotated[int, Field(ge=0, le=2**24)] = 0
    """Sample from the k most likely ids; 0: from all."""
    num_samples: Count = 1
    """Answers per prompt; they share the prompt's pages of the key/value cache."""
    max_batch: Count = 256
    """Most sequences generated at once per model replica (tp × pp ranks)."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """Seed of sampling; the random numbers of an answer depend on it, the record's index and the sample's
    number, in PPO also on the iteration; null: run.seed."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end an answer, in addition to the model's end ids; needs a tokenizer."""
    stop_ids: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Token ids that end an answer, in addition to the model's end ids."""
    page_size: Count = 16
    """Positions per page of the key/value cache; on CUDA at least 16."""
    cache_bytes: NumBytes | None = None
    """Memory of the key/value cache per rank; null: what max_batch sequences of the greatest length need, on
    CUDA at most 80 % of free memory."""
    max_step_tokens: Count = 8192
    """Most tokens per step of generation; a longer prompt is prefilled in several steps."""
    tp: Count | None = None
    """Tensor-parallel size of generation; null: parallel.tp. A layout that differs from the training one
    holds a second copy of the weights during generation."""
    pp: Count | None = None
    """Pipeline-parallel size of generation; null: parallel.pp."""


class TokenizedRoot:
    """A root whose tokenizer is the model's, unless `tokenizer.path` is set."""

    model: ModelSection
    tokenizer: TokenizerSection

    @property
    def tokenizer_path(self) -> Path:
        """Folder with the tokenizer's files."""
        return Path(self.model.path if self.tokenizer.path is None else self.tokenizer.path)


@frozen_section
class ScoreConfig(TokenizedRoot):
    """Settings of `score`."""

    run: RunSection = Field(default_factory=partial(RunSection, name="score"))
    """Run folder and seed."""
    model: ModelSection
    """The policy or the reward model that scores."""
    tokenizer: TokenizerSection = Field(default_factory=TokenizerSection)
    """Its tokenizer."""
    parallel: ParallelSection = Field(default_factory=ParallelSection)
    """Its layout."""
    data: ScoredRecordsSection
    """Input answers and output scores."""
    train: ForwardSection = Field(default_factory=ForwardSection)
    """Precision and batches."""

    from_yaml = FromYaml()

    def __post_init__(self) -> None:
        check_apart("data.out", self.out_path, "data.path", self.data.path)

    @property
    def out_path(self) -> Path:
        """File of scores."""
        return out_path(self, "score.jsonl")


@frozen_section
class GenerateConfig(TokenizedRoot):
    """Settings of `generate`."""

    run: RunSection = Field(default_factory=partial(RunSection, name="generate"))
    """Run folder and seed."""
    model: ModelSection
    """The model that answers."""
    tokenizer: TokenizerSection = Field(default_factory=TokenizerSection)
    """Its tokenizer."""
    parallel: ParallelSection = Field(default_factory=ParallelSection)
    """Its layout."""
    data: RecordsSection
    """Input prompts and output answers."""
    generation: GenerationSection = Field(default_factory=GenerationSection)
    """Sampling."""
    train: PrecisionSection = Field(default_factory=PrecisionSection)
    """Precision."""

    from_yaml = FromYaml()

    def __post_init__(self) -> None:
        check_apart("data.out", self.out_path, "data.path", self.data.path)

    @property
    def out_path(self) -> Path:
        """File of answers."""
        return out_path(self, "generate.jsonl")


def out_path(config: Any, name: str) -> Path:
    """Return the output file of a command on records."""
    return Path(config.data.out) if config.data.out is not None else Path(config.run.output) / name


class _RunFolder(Protocol):
    """What every section of that kind has, training's too."""

    @property
    def name(self) -> str: ...

    @property
    def output(self) -> str: ...


def resolve_output(run: RunSection | RunFolderSection | _RunFolder) -> None:
    object.__setattr__(run, "output", run.output.replace("<run.name>", run.name))


def check_apart(key: str, path: str | Path, source_key: str, source: str | Path) -> None:
    """Check that two keys name two files.

    Raises:
        ValueError: they name the same file.
    """
    if os.path.realpath(path) == os.path.realpath(source):
        raise ValueError(f"{key} and {source_key} are both {source}: the source would be overwritten")
