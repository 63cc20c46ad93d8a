"""Per-token outputs of a model's final hidden states: logprobs, or one scalar per token.

Heads work on rows: row t holds the hidden state after token t and predicts token t + 1. Everything else
works on tokens: `logprobs_T[t]` is that of token t given the tokens before it. `shift_to_rows` and
`shift_to_tokens` convert between the two.
"""

import torch

from glm_rlhf.kernels.lm_head.targets import IGNORE_INDEX
from glm_rlhf.parallel.model import vocab_parallel_logprob
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.model.packing import PackedTokens


def token_logprobs(
    model: GLMModel, hidden_TD: torch.Tensor, targets_T: torch.Tensor, *, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log p(target) and the entropy of the distribution at each row, without materialising all logits.

    The tensor-parallel group of `model` communicates; all of its ranks must call.

    Args:
        model: last chunk of a policy or reference.
        hidden_TD: output of that chunk, [T, D].
        targets_T: the token that each row predicts, int64; `IGNORE_INDEX` rows are skipped and give 0.
        temperature: divides the logits.

    Returns:
        (logprobs [T], entropy [T]) fp32, differentiable, equal on all tensor-parallel ranks.
    """
    return vocab_parallel_logprob.linear_logprob(
        hidden_TD,
        model.output_weight_VD,
        targets_T,
        group=model.topology.tp_group,
        temperature=temperature,
        vocab_size=model.glm.vocab_size,
        # With sequence parallelism the backward of the gather that made hidden_TD sums the gradients.
        reduces_hidden_gradient=not model.config.sequence_parallel,
    )


def token_values(model: GLMModel, hidden_TD: torch.Tensor) -> torch.Tensor:
    """Return the scalar of each row, fp32 [T]: a critic's value or a reward model's score.

    Raises:
        ValueError: the model has no scalar head.
    """
    if not hasattr(model, "value_head"):
        raise ValueError(f"a {model.role} has a vocabulary head, values need a critic or a reward model")
    return model.value_head(hidden_TD)


def next_tokens(packed: PackedTokens, wanted_T: torch.Tensor | None = None) -> torch.Tensor:
    """Return the target of every row: the next token of the same sequence, else `IGNORE_INDEX`.

    Args:
        packed: the stream.
        wanted_T: bool [T], tokens whose logprobs are needed; all but each sequence's first when None.

    Returns:
        int64 [T].
    """
    is_target_T = torch.ones_like(packed.tokens_T, dtype=torch.bool) if wanted_T is None else wanted_T.clone()
    starts = torch.tensor([start for start, _ in packed.spans]).to(is_target_T.device, non_blocking=True)
    is_target_T[starts] = False
    if packed.num_padding:
        is_target_T[-packed.num_padding :] = False
    return shift_to_rows(torch.where(is_target_T, packed.tokens_T, IGNORE_INDEX), last=IGNORE_INDEX)


def shift_to_rows(values_T: torch.Tensor, *, last: float = 0) -> torch.Tensor:
    """Return per-token values in row order: row t gets the value of token t + 1."""
    return torch.cat((values_T[1:], torch.full_like(values_T[:1], last)))


def shift_to_tokens(rows_T: torch.Tensor) -> torch.Tensor:
    """Return per-row results in token order: token t gets row t - 1, the first token 0."""
    return torch.cat((torch.zeros_like(rows_T[:1]), rows_T[:-1]))
