"""The losses of supervised and preference training."""

from collections.abc import Sequence

import torch
from torch.nn.functional import logsigmoid


def answer_mask(lengths: Sequence[int], prompt_lengths: Sequence[int], *, num_tokens: int) -> torch.Tensor:
    """Return bool [T], true for the tokens of answers, which a next-token loss trains on.

    mask[t] is true where token t comes after the prompt of its sequence, and false for padding after the
    last sequence.

    Args:
        lengths: tokens of each packed sequence, prompt and answer.
        prompt_lengths: tokens of each sequence's prompt.
        num_tokens: T, padding included.

    Raises:
        ValueError: a prompt longer than its sequence, or sequences longer than the stream.
    """
    return answer_weights(lengths, prompt_lengths, num_tokens=num_tokens) > 0


def answer_weights(
    lengths: Sequence[int], prompt_lengths: Sequence[int], *, num_tokens: int, discount: float = 1.0
) -> torch.Tensor:
    """Return fp32 [T]: discount^i for the i-th token of an answer, from 0; 0 for prompts and padding.

    Args:
        lengths, prompt_lengths, num_tokens: as in `answer_mask`.
        discount: in (0, 1]; 1 gives all tokens of an answer the same weight.

    Raises:
        ValueError: as `answer_mask`, or a discount out of range.
    """
    if not 0.0 < discount <= 1.0:
        raise ValueError(f"discount is {discount}; it must be above 0 and at most 1")
    weights_T = torch.zeros(num_tokens)
    start = 0
    for length, prompt_length in zip(lengths, prompt_lengths, strict=True):
        if not 0 <= prompt_length <= length:
            raise ValueError(f"a prompt of {prompt_length} tokens does not fit a sequence of {length}")
        if start + length > num_tokens:
            raise ValueError(f"sequences of {sum(lengths)} tokens do not fit a stream of {num_tokens}")
        powers = torch.arange(length - prompt_length, dtype=torch.float32)
        weights_T[start + prompt_length : start + length] = discount**powers
        start += length
    return weights_T


def pairwise_loss(
    chosen_scores_B: torch.Tensor,
    rejected_scores_B: torch.Tensor,
    *,
    l2_coef: float = 0.0,
    denominator: float | torch.Tensor,
) -> torch.Tensor:
    """Return the loss of a reward model: sum over pairs b of

    −log σ(w_b − l_b) + l2_coef · (w_b² + l_b²), divided by `denominator`,

    with w the score of the chosen and l that of the rejected answer. The first term depends on differences of
    scores only; the second keeps the scores near zero. Two equal answers have w = l: the first term is log 2
    and has no gradient. Computed in fp32 (fp64 for fp64 scores); large differences do not overflow.

    Args:
        chosen_scores_B, rejected_scores_B: [B] float; B may be 0.
        l2_coef: at least 0.
        denominator: number of pairs in the step, over all micro-batches and data-parallel ranks.

    Returns:
        0-dim, differentiable in both scores; its sum over micro-batches and ranks is the step's loss.

    Raises:
        ValueError: shapes that differ, or a coefficient below 0.

    Source: ChatGLM-RLHF (arXiv 2404.00934), the reward model's loss. Its coefficient is not published.
    """
    _check_pairs(chosen_scores_B, rejected_scores_B)
    if not l2_coef >= 0:
        raise ValueError(f"l2_coef is {l2_coef}; it must be at least 0")
    chosen_B, rejected_B = _at_least_fp32(chosen_scores_B), _at_least_fp32(rejected_scores_B)
    preference = -logsigmoid(chosen_B - rejected_B).sum()
    anchor = (chosen_B.square() + rejected_B.square()).sum()
    return (preference + l2_coef * anchor) / denominator


def dpo_loss(
    policy_chosen_B: torch.Tensor,
    policy_rejected_B: torch.Tensor,
    reference_chosen_B: torch.Tensor,
    reference_rejected_B: torch.Tensor,
    *,
    beta: float,
    denominator: float | torch.Tensor,
    chosen_weights_B: torch.Tensor | None = None,
    rejected_weights_B: torch.Tensor | None = None,
    length_normalised: bool = False,
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `(loss, chosen_rewards_B, rejected_rewards_B)` of direct preference optimisation.

    With the implicit reward of an answer y of pair b

        r_b(y) = beta · (log π(y|x_b) − log π_ref(y|x_b)) [ / weight of y, if length_normalised ]

    the loss is the sum over pairs of −(1 − ε) log σ(r_b(w) − r_b(l)) − ε log σ(r_b(l) − r_b(w)), divided by
    `denominator`. For token weights, pass weighted sums of log-probabilities, with the same weights for the
    reference. Two equal answers give log 2 and no gradient. An answer without tokens has the reward 0.

    Args:
        policy_chosen_B, policy_rejected_B: [B] float, (weighted) sums of the answers' log-probabilities.
        reference_chosen_B, reference_rejected_B: [B], the same under the reference; constants.
        beta: strength of the KL regularisation towards the reference, above 0.
        denominator: number of pairs in the step, over all micro-batches and data-parallel ranks.
        chosen_weights_B, rejected_weights_B: [B], sums of the token weights (with weight 1: the number of
            tokens); required with `length_normalised`.
        length_normalised: divide each answer's log-ratio by its weight, so that length by itself has no
            effect.
        label_smoothing: ε in [0, 0.5), the assumed share of swapped labels.

    Returns:
        loss: 0-dim fp32 (fp64 for fp64 sums), differentiable in the policy's sums.
        chosen_rewards_B, rejected_rewards_B: [B], not differentiable.

    Raises:
        ValueError: shapes that differ, a number out of range, or missing weights.

    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 7; label smoothing as in Mitchell 2023's
    conservative DPO.
    """
    _check_pairs(policy_chosen_B, policy_rejected_B, reference_chosen_B, reference_rejected_B)
    if not beta > 0:
        raise ValueError(f"beta is {beta}; it must be above 0")
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must be at least 0 and below 0.5")
    rewards = []
    for policy_B, reference_B, weights_B in (
        (policy_chosen_B, reference_chosen_B, chosen_weights_B),
        (policy_rejected_B, reference_rejected_B, rejected_weights_B),
    ):
        reward_B = beta * (_at_least_fp32(policy_B) - _at_least_fp32(reference_B).detach())
        if length_normalised:
            if weights_B is None or weights_B.shape != policy_B.shape:
                raise ValueError(
                    "length_normalised needs chosen_weights_B and rejected_weights_B of the shape "
                    f"{list(policy_B.shape)}: sums of the answers' token weights"
                )
            # An answer without tokens has log-ratio 0, which stays 0.
            reward_B = reward_B / torch.where(weights_B > 0, weights_B, 1.0)
        rewards.append(reward_B)
    margin_B = rewards[0] - rewards[1]
    loss = -logsigmoid(margin_B)
    if label_smoothing:
        loss = (1.0 - label_smoothing) * loss - label_smoothing * logsigmoid(-margin_B)
    return loss.sum() / denominator, rewards[0].detach(), rewards[1].detach()


def _check_pairs(first_B: torch.Tensor, *others: torch.Tensor) -> None:
    for tensor in (first_B, *others):
        if tensor.dim() != 1 or tensor.shape != first_B.shape:
            shapes = ", ".join(str(list(other.shape)) for other in (first_B, *others))
            raise ValueError(f"all arguments must have one number per pair; their shapes are {shapes}")


def _at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype is torch.float64 else tensor.float()
