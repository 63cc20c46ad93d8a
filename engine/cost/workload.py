"""What an iteration of PPO has to do, and for which models."""

from collections.abc import Iterator
from dataclasses import dataclass

from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.spec.model_config import GLMConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """The models of a run by their roles; all share one layout."""

    policy: GLMConfig
    """Generates and learns."""
    critic: GLMConfig
    """Learns beside it; a scalar head."""
    reference: GLMConfig
    """Scores only."""
    reward: GLMConfig | None
    """Scores only, a scalar head; None where a function gives the reward."""

    @property
    def items(self) -> Iterator[tuple[str, GLMConfig]]:
        """Names and shapes of those that there are."""
        for name in ("policy", "critic", "reference", "reward"):
            if getattr(self, name) is not None:
                yield name, getattr(self, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One iteration over all ranks; lengths in tokens."""

    max_prompt_tokens: int
    """Longest prompt: what memory must hold."""
    max_new_tokens: int
    """Longest answer: what memory must hold."""
    mean_prompt_tokens: int
    """Mean prompt: what time is spent on."""
    mean_new_tokens: int
    """Mean answer: what time is spent on."""
    num_prompts: int
    """Prompts an iteration."""
    num_samples: int
    """Answers to a prompt."""
    max_batch: int
    """Sequences that generate at once on a copy of the model, at most."""
    max_step_tokens: int
    """Tokens that go through the model in a step of generation, at most."""
    page_size: int
    """Positions a page of the key/value cache."""
    itemsize: int
    """Bytes of a weight or activation: 2 for bf16, 4 for fp32."""
    epochs: int
    """Passes over the answers."""
    minibatches: int
    """Optimizer steps a pass."""
    recomputes_logprobs: bool
    """Whether the policy's logprobs are computed again for all answers and not for a sample of them."""
    offloads: frozenset[str] = frozenset()
    """What waits in host memory where it is not needed, as `train.offload` has it."""

    @property
    def longest(self) -> int:
        """Longest sequence."""
        return self.max_prompt_tokens + self.max_new_tokens

    @property
    def mean_tokens(self) -> int:
        """Mean sequence."""
        return self.mean_prompt_tokens + self.mean_new_tokens

    @property
    def num_sequences(self) -> int:
        """Answers an iteration."""
        return self.num_prompts * self.num_samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a plan decides."""

    layout: Layout
    """Of all models."""
    micro_batch_tokens: int
    """Tokens that go through a model at once."""
    recompute_layers: bool
    """Whether backward runs each layer again."""

    def num_sequences(self, work: Workload, num_gpus: int) -> int:
        """Return the sequences of the fullest data-parallel copy."""
        prompts = -(-work.num_prompts // self.layout.dp(num_gpus))
        return prompts * work.num_samples

    def batch_tokens(self, work: Workload, num_gpus: int, *, length: int) -> int:
        """Return the tokens of a full micro-batch of sequences of `length`, filler included."""
        in_step = -(-self.num_sequences(work, num_gpus) // work.minibatches) * length
        tokens = min(max(self.micro_batch_tokens // length, 1) * length, in_step)
        multiple = self.layout.token_multiple
        return -(-tokens // multiple) * multiple

    def num_micro_batches(self, work: Workload, num_gpus: int, *, length: int, minibatches: int) -> int:
        """Return the micro-batches in one of `minibatches` parts of a copy's sequences of `length`."""
        in_part = -(-self.num_sequences(work, num_gpus) // minibatches)
        return -(-in_part // max(self.micro_batch_tokens // length, 1))
