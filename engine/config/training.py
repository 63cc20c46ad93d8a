"""The settings of the commands that train, and of what makes their data."""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from glm_rlhf.engine.config.keys import Described
from glm_rlhf.engine.config.load import FromYaml
from glm_rlhf.engine.config.sections import (
    Count,
    FolderName,
    ForwardSection,
    GenerationSection,
    ModelSection,
    ParallelSection,
    PathText,
    RecordsSection,
    RunSection,
    Seconds,
    TokenizerSection,
    check_apart,
    frozen_section,
    out_path,
    resolve_output,
    tokenizer_path,
)

Share = Annotated[float, Field(ge=0, lt=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
CountOrZero = Annotated[int, Field(ge=0)]
LengthEdge = Annotated[int, Field(ge=2)]


@frozen_section
class TrainingRunSection:
    """Where the run keeps its files, what its random numbers start from, and what it goes on from."""

    name: FolderName
    """Name of the run."""
    output: PathText = "outputs/<run.name>"
    """Run folder; <run.name> stands for the name. The resolved config goes there as config.yaml."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 1234
    """Seed of every random number generator; ranks derive theirs from it."""
    resume: Annotated[PathText, Described(words="auto, never, or the path of a checkpoint")] = "auto"
    """auto goes on from the newest whole checkpoint in the run folder; never starts anew in a new folder."""
    watchdog_s: Seconds | None = 1800.0
    """Seconds without progress after which a rank tells its phase and stacks, and ends; null: never."""

    def __post_init__(self) -> None:
        resolve_output(self)


@frozen_section
class OptionalModelSection:
    """Another model beside the policy."""

    path: PathText | None = None
    """Hugging Face folder; null is the policy as it is before the first step."""


@frozen_section
class OptimizerSection:
    """How a gradient becomes a change of the weights."""

    lr: Annotated[float, Field(gt=0)] = 1e-5
    """Highest learning rate, reached after the warm-up."""
    min_lr: NotNegative = 0.0
    """Learning rate at which the cosine ends."""
    warmup_steps: CountOrZero = 0
    """Steps over which the learning rate rises from 0."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay; biases and norms are exempt."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """Decay of Adam's running mean, and of its running mean square."""
    clip_grad: NotNegative = 1.0
    """Largest norm of the gradient over the whole model; 0 does not clip."""
    in_backward: bool = False
    """Whether weights change during backward, so that with one micro-batch a step no more than one layer's
    gradient is in memory. Each layer is clipped by the newest norms known, not by the step's own."""

    def __post_init__(self) -> None:
        if self.min_lr > self.lr:
            raise ValueError(f"optimizer.min_lr is {self.min_lr}, above optimizer.lr {self.lr}")


@frozen_section
class TrainingSection:
    """How long a model is trained and in which portions; steps are iterations in RL."""

    steps: Count
    """Optimizer steps; in RL iterations: generate, score, estimate, update."""
    global_batch_size: Count = 64
    """Records per step, over all ranks; a pair is one record, and so is a prompt in RL."""
    micro_batch_tokens: Count = 16384
    """Tokens that go through a model at once, packed from whole sequences; a longer one goes alone."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision of weights and activations; optimizers keep fp32 weights."""
    recompute_layers: bool = False
    """Whether backward runs each layer again in place of keeping its activations: less memory, a third more
    time."""
    save_every: CountOrZero = 0
    """Steps between two saves of <run.output>/checkpoints/step_N to resume from; 0: after the last only."""
    keep_last: Count = 2
    """Newest checkpoints that stay; the others are removed."""
    keep_every: CountOrZero = 0
    """Checkpoints after a multiple of so many steps stay too; 0 for none."""
    async_save: bool = True
    """Whether a checkpoint is written while training continues; a failure then ends the next step."""
    export_every: CountOrZero = 0
    """Steps between two Hugging Face folders <run.output>/hf/step_N; 0: after the last only."""
    max_nonfinite_steps: Count = 3
    """Steps in a row that are skipped, since a loss or gradient is not finite, before the run stops."""


@frozen_section
class TrainSection(TrainingSection):
    """How long and in which portions the model is trained."""

    overlap_communication: bool = False
    """Whether gradients are reduced and weights gathered over dp while the model computes."""
    eval_every: CountOrZero = 0
    """Steps between two evaluations on data.eval_path; 0: before the first step and after the last only."""


@frozen_section
class ObserveSection:
    """Where metrics go, beside <run.output>/metrics.jsonl, and what else is recorded."""

    tensorboard: bool = True
    """Whether <run.output>/tensorboard is written."""
    wandb: str | None = None
    """Project of Weights & Biases to write to; needs wandb installed; null for none."""
    trace: bool = False
    """Whether each rank writes <run.output>/trace/rank_N.json for Perfetto; in RL on a CPU perf/idle_fraction
    is measured then too."""


@frozen_section
class DemonstrationsSection:
    """The answers that are imitated."""

    path: PathText
    """JSON lines, or parquet, of demonstrations to learn from."""
    eval_path: PathText | None = None
    """JSON lines, or parquet, of demonstrations to evaluate on; null for none."""
    eval_records: Count = 1000
    """The evaluation takes at most so many of them, the first ones."""
    max_prompt_tokens: Count = 4096
    """Longest prompt, in tokens; a longer one is a bad record."""
    max_tokens: Count | None = None
    """Longest prompt and answer together, in tokens; null is the model's context."""
    truncates: bool = False
    """Whether a longer answer is cut there, and has no end; otherwise its record is a bad one."""
    on_error: Literal["raise", "skip"] = "raise"
    """What a bad record does: end the command, or be left out and counted."""


@frozen_section
class PairsSection:
    """The answers that are compared."""

    path: PathText
    """JSON lines, or parquet, of pairs to learn from."""
    form: Literal["pairs", "hh-rlhf"] = "pairs"
    """Form of the records: prompt, chosen, rejected; or hh-rlhf's two whole dialogues."""
    eval_path: PathText | None = None
    """JSON lines, or parquet, of pairs, of the same form, to evaluate on; null for none."""
    eval_records: Count = 1000
    """The evaluation takes at most so many of them, the first ones."""
    max_prompt_tokens: Count = 4096
    """Longest prompt, in tokens; a longer one is a bad record."""
    max_tokens: Count | None = None
    """Longest prompt and answer together, in tokens; null is the model's context."""
    truncates: bool = False
    """Whether a longer answer is cut there, and has no end; otherwise its record is a bad one."""
    on_error: Literal["raise", "skip"] = "raise"
    """What a bad record does: end the command, or be left out and counted."""
    drops_contradictions: bool = True
    """Whether ties and cyclic preferences among a prompt's answers are left out, counted and reported."""
    drops_repeats: bool = False
    """Whether repeats of a pair are left out too."""
    balances_lengths: bool = False
    """Whether pairs are left out until at any difference of length as many winners are longer as shorter."""
    length_edges: tuple[LengthEdge, ...] = (8, 16, 32, 64, 128, 256)
    """Differences, in tokens, at which the buckets of that balance begin, ascending."""

    def __post_init__(self) -> None:
        if self.drops_repeats and not self.drops_contradictions:
            raise ValueError(
                "data.drops_repeats is true with data.drops_contradictions false: repeats are found where "
                "contradictions are, set both"
            )
        if any(later <= edge for edge, later in zip(self.length_edges, self.length_edges[1:], strict=False)):
            raise ValueError(f"data.length_edges are {list(self.length_edges)}: they must ascend")


@frozen_section
class RewardSection:
    """The reward model's loss."""

    l2_coef: NotNegative = 0.01
    """Weight of the squared scores, which ties them to zero; 0 leaves the pairwise loss alone."""


@frozen_section
class DPOSection:
    """The loss of direct preference optimisation."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    """Strength of the tie to the reference."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of the labels that are taken to be swapped."""
    length_normalised: bool = False
    """Whether an answer's log-ratio is divided by its number of tokens, or by their weights."""
    token_discount: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Weight of an answer's token by its place i is this to the power i; 1 weighs all alike."""


@frozen_section
class LabelSection:
    """Which answers become a pair."""

    min_margin: NotNegative = 0.0
    """Smallest difference of best and worst score; a prompt below it, or with equal scores, gives no pair."""
    prompts_out: PathText | None = None
    """JSON lines to write the prompts to whose scores vary, as they came, for PPO; null for none."""
    min_variance: NotNegative = 0.01
    """Smallest variance of a prompt's scores that counts as varying there."""


@frozen_section
class RewardModelSection:
    """The reward model."""

    path: PathText
    """Hugging Face folder of a reward model."""


def check_overlap(optimizer: OptimizerSection, train: TrainSection) -> None:
    """Raise ValueError where two ways to communicate during backward are asked for."""
    if optimizer.in_backward and train.overlap_communication:
        raise ValueError(
            "optimizer.in_backward and train.overlap_communication are both true: the first communicates "
            "during backward already, set the second to false"
        )


@frozen_section
class SFTConfig:
    """Settings of `sft`."""

    run: TrainingRunSection = Field(default_factory=partial(TrainingRunSection, name="sft"))
    """Where everything goes, and the seed."""
    model: ModelSection
    """The policy that is trained."""
    tokenizer: TokenizerSection = Field(default_factory=TokenizerSection)
    """Its tokenizer."""
    parallel: ParallelSection = Field(default_factory=ParallelSection)
    """Its layout."""
    data: DemonstrationsSection
    """What it imitates."""
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    """How it learns."""
    train: TrainSection
    """How long."""
    observe: ObserveSection = Field(default_factory=ObserveSection)
    """Who is told."""

    from_yaml = FromYaml()

    def __post_init__(self) -> None:
        check_overlap(self.optimizer, self.train)

    @property
    def tokenizer_path(self) -> Path:
        """Folder with the tokenizer's files."""
        return tokenizer_path(self)


@frozen_section
class RewardConfig:
    """Settings of `reward`."""

    run: TrainingRunSection = Field(default_factory=partial(TrainingRunSection, name="reward"))
    """Where everything goes, and the seed."""
    model: ModelSection
    """The policy, or the reward model, that training starts from."""
    tokenizer: TokenizerSection = Field(default_factory=TokenizerSection)
    """Its tokenizer."""
    parallel: ParallelSection = Field(default_factory=ParallelSection)
    """Its layout."""
    data: PairsSection
    """What it learns to tell apart."""
    reward: RewardSection = Field(default_factory=RewardSection)
    """The loss."""
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    """How it learns."""
    train: TrainSection
    """How long."""
    observe: ObserveSection = Field(default_factory=ObserveSection)
    """Who is told."""

    from_yaml = FromYaml()

    def __post_init__(self) -> None:
        check_overlap(self.optimizer, self.train)

    @property
    def tokenizer_path(self) -> Path:
        """Folder with the tokenizer's files."""
        return tokenizer_path(self)


@frozen_section
class DPOConfig:
    """Settings of `dpo`."""

    run: TrainingRunSection = Field(default_factory=partial(TrainingRunSection, name="dpo"))
    """Where everything goes, and the seed."""
    model: ModelSection
    """The policy that is trained."""
    reference: OptionalModelSection = Field(default_factory=OptionalModelSection)
    """The policy that it is tied to; scored once, before training."""
    tokenizer: TokenizerSection = Field(default_factory=TokenizerSection)
    """Its tokenizer."""
    parallel: ParallelSection = Field(default_factory=ParallelSection)
    """Its layout."""
    data: PairsSection
    """What it learns to prefer."""
    dpo: DPOSection = Field(default_factory=DPOSection)
    """The loss."""
    optimizer: OptimizerSection = Field(default_factory=partial(OptimizerSection, lr=1e-6))
    """How it learns."""
    train: TrainSection
    """How long."""
    observe: ObserveSection = Field(default_factory=ObserveSection)
    """Who is told."""

    from_yaml = FromYaml()

    def __post_init__(self) -> None:
        check_overlap(self.optimizer, self.train)

    @property
    def tokenizer_path(self) -> Path:
        """Folder with the tokenizer's files."""
        return tokenizer_path(self)


@frozen_section
class LabelConfig:
    """Settings of `label`."""

    run: RunSection = Field(default_factory=partial(RunSection, name="label"))
    """Where results go, and the seed."""
    model: ModelSection
    """The policy that answers."""
    reward: RewardModelSection
    """The reward model that judges."""
    tokenizer: TokenizerSection = Field(default_factory=TokenizerSection)
    """Their tokenizer."""
    parallel: ParallelSection = Field(default_factory=ParallelSection)
    """Their layout."""
    data: RecordsSection
    """Prompts in, pairs out."""
    generation: GenerationSection = Field(default_factory=partial(GenerationSection, num_samples=4))
    """How answers are drawn."""
    label: LabelSection = Field(default_factory=LabelSection)
    """Which of them become a pair."""
    train: ForwardSection = Field(default_factory=ForwardSection)
    """Precision of both models, and batches of the reward model."""

    from_yaml = FromYaml()

    def __post_init__(self) -> None:
        check_apart("data.out", self.out_path, "data.path", self.data.path)
        if self.label.prompts_out is not None:
            check_apart("label.prompts_out", self.label.prompts_out, "data.path", self.data.path)
            check_apart("label.prompts_out", self.label.prompts_out, "data.out", self.out_path)
        if self.generation.num_samples < 2:
            raise ValueError(
                f"generation.num_samples is {self.generation.num_samples}: a pair needs at least 2 answers"
            )

    @property
    def out_path(self) -> Path:
        """File of pairs."""
        return out_path(self, "label.jsonl")

    @property
    def tokenizer_path(self) -> Path:
        """Folder with the tokenizer's files."""
        return tokenizer_path(self)
