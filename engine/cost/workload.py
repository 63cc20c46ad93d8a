"""The workload of a PPO iteration, its models, and the choices of a plan."""

from collections.abc import Iterator
from dataclasses import dataclass

from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.spec.model_config import GLMConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """The models of a run by role; all share one layout."""

    policy: GLMConfig
    """Generates and is trained."""
    critic: GLMConfig
    """Is trained; scalar head."""
    reference: GLMConfig
    """Scores only."""
    reward: GLMConfig | None
    """Scores only; scalar head; None: a function gives the reward."""

    @property
    def items(self) -> Iterator[tuple[str, GLMConfig]]:
        """Role and shape of each model."""
        for name in ("policy", "critic", "reference", "reward"):
            if getattr(self, name) is not None:
                yield name, getattr(self, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One iteration over all ranks; lengths in tokens."""

    max_prompt_tokens: int
    """Longest prompt; memory is estimated for it."""
    max_new_tokens: int
    """Longest answer; memory is estimated for it."""
    mean_prompt_tokens: int
    """Mean length of a prompt; time is estimated for it."""
    mean_new_tokens: int
    """Mean length of an answer; time is estimated for it."""
    num_prompts: int
    """Prompts per iteration."""
    num_samples: int
    """Answers per prompt."""
    max_batch: int
    """Most sequences generated at once per model replica."""
    max_step_tokens: int
    """Most tokens per step of generation."""
    page_size: int
    """Positions per page of the key/value cache."""
    itemsize: int
    """Bytes of a weight or activation: 2 for bf16, 4 for fp32."""
    epochs: int
    """Epochs over the answers."""
    minibatches: int
    """Optimizer steps per epoch."""
    recomputes_logprobs: bool
    """Whether the policy's logprobs are recomputed for all answers, not for a sample of them only."""
    offloads: frozenset[str] = frozenset()
    """States offloaded to host memory, as in `train.offload`."""

    @property
    def longest(self) -> int:
        """Length of the longest sequence."""
        return self.max_prompt_tokens + self.max_new_tokens

    @property
    def mean_tokens(self) -> int:
        """Mean length of a sequence."""
        return self.mean_prompt_tokens + self.mean_new_tokens

    @property
    def num_sequences(self) -> int:
        """Answers per iteration."""
        return self.num_prompts * self.num_samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The choices of a plan."""

    layout: Layout
    """Layout of all models."""
    micro_batch_tokens: int
    """Most tokens per micro-batch."""
    recompute_layers: bool
    """Whether backward recomputes the activations of each layer."""

    def num_sequences(self, work: Workload, num_gpus: int) -> int:
        """Return the largest number of sequences of a data-parallel rank."""
        prompts = -(-work.num_prompts // self.layout.dp(num_gpus))
        return prompts * work.num_samples

    def batch_tokens(self, work: Workload, num_gpus: int, *, length: int) -> int:
        """Return the tokens of a full micro-batch of sequences of `length`, padding included."""
        in_step = -(-self.num_sequences(work, num_gpus) // work.minibatches) * length
        tokens = min(max(self.micro_batch_tokens // length, 1) * length, in_step)
        multiple = self.layout.token_multiple
        return -(-tokens // multiple) * multiple

    def num_micro_batches(self, work: Workload, num_gpus: int, *, length: int, minibatches: int) -> int:
        """Return the micro-batches per mini-batch of a data-parallel rank, for sequences of `length`."""
        in_part = -(-self.num_sequences(work, num_gpus) // minibatches)
        return -(-in_part // max(self.micro_batch_tokens // length, 1))
