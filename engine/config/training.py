"""The settings of `sft`, `reward` and `dpo`, and of `label`, which makes pairs."""

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
    TokenizedRoot,
    TokenizerSection,
    check_apart,
    frozen_section,
    out_path,
    resolve_output,
)

Share = Annotated[float, Field(ge=0, lt=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
CountOrZero = Annotated[int, Field(ge=0)]
LengthEdge = Annotated[int, Field(ge=2)]


@frozen_section
class TrainingRunSection:
    """Folder of the run's files, seed, and resuming."""

    name: FolderName
    """Name of the run."""
    output: PathText = "outputs/<run.name>"
    """Run folder; <run.name> is replaced by run.name. The resolved config is written there as config.yaml."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 1234
    """Seed of all random number generators; each rank derives its own from it."""
    resume: Annotated[PathText, Described(accepts="auto, never, or the path of a checkpoint")] = "auto"
    """auto resumes from the newest complete checkpoint in the run folder, if there is one; never starts a new
    run and needs a new run folder; a path resumes from that checkpoint."""
    watchdog_s: Seconds | None = 1800.0
    """Seconds without progress after which a rank reports its phase and stacks, and exits; null: never."""

    def __post_init__(self) -> None:
        resolve_output(self)


@frozen_section
class OptionalModelSection:
    """The reference policy."""

    path: PathText | None = None
    """Hugging Face folder; null: the initial policy (model.path)."""


@frozen_section
class OptimizerSection:
    """AdamW and the learning-rate schedule."""

    lr: Annotated[float, Field(gt=0)] = 1e-5
    """Peak learning rate, reached at the end of the warm-up."""
    min_lr: NotNegative = 0.0
    """Final learning rate of the cosine schedule."""
    warmup_steps: CountOrZero = 0
    """Steps of the linear warm-up of the learning rate."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay; not applied to biases and norms."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """Decay rates of Adam's first and second moments."""
    clip_grad: NotNegative = 1.0
    """Largest L2 norm of the whole model's gradient; larger ones are scaled down to it. 0: no clipping."""
    in_backward: bool = False
    """Whether weights are updated during backward, so that with one micro-batch per step only one layer's
    gradient is in memory. Gradients are then clipped by the latest known norms, not by the current step's."""

    def __post_init__(self) -> None:
        if self.min_lr > self.lr:
            raise ValueError(f"optimizer.min_lr is {self.min_lr}, above optimizer.lr {self.lr}")


@frozen_section
class TrainingSection:
    """Length of the run, batches, precision and checkpoints; in RL a step is an iteration."""

    steps: Count
    """Number of optimizer steps; in RL of iterations: generate, score, estimate advantages, update."""
    global_batch_size: Count = 64
    """Records per step, over all ranks; a pair is one record, in RL a prompt is."""
    micro_batch_tokens: Count = 16384
    """Most tokens per micro-batch, packed from whole sequences; a longer sequence is a micro-batch alone."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision of weights and activations; optimizers keep fp32 weights."""
    recompute_layers: bool = False
    """Whether backward recomputes each layer's activations: less memory, about a third more time."""
    save_every: CountOrZero = 0
    """Steps between checkpoints <run.output>/checkpoints/step_N; 0: by save_every_s, and after the last."""
    save_every_s: NotNegative = 1800.0
    """Seconds from the last checkpoint, or the start, by the clock of rank 0, after which the next step is
    followed by one; 0: never."""
    keep_last: Count = 2
    """Number of newest checkpoints to keep; older ones are removed."""
    keep_every: CountOrZero = 0
    """Also keep each checkpoint whose step is a multiple of this; 0: none."""
    async_save: bool = True
    """Whether checkpoints are written in the background; a failed write ends the run at the next step."""
    export_every: CountOrZero = 0
    """Steps between exports in Hugging Face form, <run.output>/hf/step_N; 0: after the last step only."""
    max_nonfinite_steps: Count = 3
    """Stop after this many consecutive steps that were skipped because of NaN or Inf."""


@frozen_section
class TrainSection(TrainingSection):
    """Length of the run, batches, precision and checkpoints."""

    overlap_communication: bool = False
    """Whether gradient reduction and weight gathering over data-parallel ranks overlap with computation."""
    eval_every: CountOrZero = 0
    """Steps between evaluations on data.eval_path; 0: before the first step and after the last only."""


@frozen_section
class ObserveSection:
    """Outputs in addition to <run.output>/metrics.jsonl."""

    tensorboard: bool = True
    """Whether metrics are also written to <run.output>/tensorboard."""
    wandb: str | None = None
    """Weights & Biases project that metrics are also written to; needs the package wandb; null: none."""
    trace: bool = False
    """Whether each rank writes a trace for Perfetto, <run.output>/trace/rank_N.json; in RL on a CPU it also
    enables the metric perf/idle_fraction."""


@frozen_section
class DemonstrationsSection:
    """Demonstrations."""

    path: PathText
    """Training demonstrations: JSON lines or parquet."""
    eval_path: PathText | None = None
    """Evaluation demonstrations: JSON lines or parquet; null: none."""
    eval_records: Count = 1000
    """Most records used for evaluation, taken from the beginning of the file."""
    max_prompt_tokens: Count = 4096
    """Longest prompt, in tokens; a record with a longer one is bad."""
    max_tokens: Count | None = None
    """Longest prompt + answer, in tokens; null: the model's context length."""
    truncates: bool = False
    """Whether an answer beyond max_tokens is truncated, without an end token; otherwise its record is bad."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with a bad record: raise ends the command, skip drops and counts it."""


@frozen_section
class PairsSection:
    """Preference pairs."""

    path: PathText
    """Training pairs: JSON lines or parquet."""
    form: Literal["pairs", "hh-rlhf"] = "pairs"
    """Form of the records. pairs: prompt, chosen, rejected; hh-rlhf: two whole dialogues."""
    eval_path: PathText | None = None
    """Evaluation pairs of the same form: JSON lines or parquet; null: none."""
    eval_records: Count = 1000
    """Most records used for evaluation, taken from the beginning of the file."""
    max_prompt_tokens: Count = 4096
    """Longest prompt, in tokens; a record with a longer one is bad."""
    max_tokens: Count | None = None
    """Longest prompt + answer, in tokens; null: the model's context length."""
    truncates: bool = False
    """Whether an answer beyond max_tokens is truncated, without an end token; otherwise its record is bad."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with a bad record: raise ends the command, skip drops and counts it."""
    drops_contradictions: bool = True
    """Whether ties (equal answers) and cyclic preferences of a prompt are dropped, counted and reported."""
    drops_repeats: bool = False
    """Whether repeats of a pair are dropped too."""
    balances_lengths: bool = False
    """Whether pairs are dropped until the chosen answer is longer in half of each bucket of difference."""
    length_edges: tuple[LengthEdge, ...] = (8, 16, 32, 64, 128, 256)
    """Lower edges of these buckets, in tokens, ascending; the first bucket begins at 1."""

    def __post_init__(self) -> None:
        if self.drops_repeats and not self.drops_contradictions:
            raise ValueError(
                "data.drops_repeats is true with data.drops_contradictions false: repeats are dropped "
                "together with contradictions, set both to true"
            )
        if any(later <= edge for edge, later in zip(self.length_edges, self.length_edges[1:], strict=False)):
            raise ValueError(f"data.length_edges are {list(self.length_edges)}: they must ascend")


@frozen_section
class RewardSection:
    """The reward model's loss."""

    l2_coef: NotNegative = 0.01
    """Weight of the mean squared scores in the loss, which keeps scores near zero; 0: pairwise loss only."""


@frozen_section
class DPOSection:
    """The DPO loss."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    """Beta: strength of the KL regularisation towards the reference."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed fraction of pairs with swapped labels (conservative DPO)."""
    length_normalised: bool = False
    """Whether an answer's log-ratio is divided by its number of tokens (the sum of their weights)."""
    token_discount: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Weight of the i-th answer token, from 0, is token_discount^i; 1: equal weights."""


@frozen_section
class LabelSection:
    """Selection of pairs and prompts."""

    min_margin: NotNegative = 0.0
    """Smallest difference of best and worst score that makes a pair; equal scores never make one."""
    prompts_out: PathText | None = None
    """Output file (JSON lines) for the prompts whose scores vary, unchanged, for PPO; null: none."""
    min_variance: NotNegative = 0.01
    """Smallest variance of a prompt's scores at which it is written to prompts_out."""


@frozen_section
class RewardModelSection:
    """The reward model."""

    path: PathText
    """Hugging Face folder of a reward model."""


class _SupervisedRoot(TokenizedRoot):
    """A root of a command that trains one model on records."""

    optimizer: OptimizerSection
    train: TrainSection

    def __post_init__(self) -> None:
        if self.optimizer.in_backward and self.train.overlap_communication:
            raise ValueError(
                "optimizer.in_backward and train.overlap_communication are both true: the first communicates "
                "during backward already, set the second to false"
            )


@frozen_section
class SFTConfig(_SupervisedRoot):
    """Settings of `sft`."""

    run: TrainingRunSection = Field(default_factory=partial(TrainingRunSection, name="sft"))
    """Run folder, seed and resuming."""
    model: ModelSection
    """The policy to train."""
    tokenizer: TokenizerSection = Field(default_factory=TokenizerSection)
    """Its tokenizer."""
    parallel: ParallelSection = Field(default_factory=ParallelSection)
    """Its layout."""
    data: DemonstrationsSection
    """Demonstrations."""
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    """Optimizer and learning-rate schedule."""
    train: TrainSection
    """Length, batches and checkpoints."""
    observe: ObserveSection = Field(default_factory=ObserveSection)
    """Outputs of metrics."""

    from_yaml = FromYaml()


@frozen_section
class RewardConfig(_SupervisedRoot):
    """Settings of `reward`."""

    run: TrainingRunSection = Field(default_factory=partial(TrainingRunSection, name="reward"))
    """Run folder, seed and resuming."""
    model: ModelSection
    """The policy or reward model that training starts from."""
    tokenizer: TokenizerSection = Field(default_factory=TokenizerSection)
    """Its tokenizer."""
    parallel: ParallelSection = Field(default_factory=ParallelSection)
    """Its layout."""
    data: PairsSection
    """Preference pairs."""
    reward: RewardSection = Field(default_factory=RewardSection)
    """The loss."""
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    """Optimizer and learning-rate schedule."""
    train: TrainSection
    """Length, batches and checkpoints."""
    observe: ObserveSection = Field(default_factory=ObserveSection)
    """Outputs of metrics."""

    from_yaml = FromYaml()


@frozen_section
class DPOConfig(_SupervisedRoot):
    """Settings of `dpo`."""

    run: TrainingRunSection = Field(default_factory=partial(TrainingRunSection, name="dpo"))
    """Run folder, seed and resuming."""
    model: ModelSection
    """The policy to train."""
    reference: OptionalModelSection = Field(default_factory=OptionalModelSection)
    """The reference policy; its logprobs are computed once, before training."""
    tokenizer: TokenizerSection = Field(default_factory=TokenizerSection)
    """Its tokenizer."""
    parallel: ParallelSection = Field(default_factory=ParallelSection)
    """Its layout."""
    data: PairsSection
    """Preference pairs."""
    dpo: DPOSection = Field(default_factory=DPOSection)
    """The loss."""
    optimizer: OptimizerSection = Field(default_factory=partial(OptimizerSection, lr=1e-6))
    """Optimizer and learning-rate schedule."""
    train: TrainSection
    """Length, batches and checkpoints."""
    observe: ObserveSection = Field(default_factory=ObserveSection)
    """Outputs of metrics."""

    from_yaml = FromYaml()


@frozen_section
class LabelConfig(TokenizedRoot):
    """Settings of `label`."""

    run: RunSection = Field(default_factory=partial(RunSection, name="label"))
    """Run folder and seed."""
    model: ModelSection
    """The policy that answers."""
    reward: RewardModelSection
    """The reward model that scores the answers."""
    tokenizer: TokenizerSection = Field(default_factory=TokenizerSection)
    """Their tokenizer."""
    parallel: ParallelSection = Field(default_factory=ParallelSection)
    """Their layout."""
    data: RecordsSection
    """Input prompts and output pairs."""
    generation: GenerationSection = Field(default_factory=partial(GenerationSection, num_samples=4))
    """Sampling."""
    label: LabelSection = Field(default_factory=LabelSection)
    """Selection of pairs and prompts."""
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
