"""KL-shaped rewards, GAE and returns over packed sequences in plain torch."""

from dataclasses import dataclass

import torch

from glm_rlhf.kernels.rl.reference_kl import check_kl_estimator, token_kl


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """Per-token training signals of policy and value function; zero on masked tokens."""

    advantages_T: torch.Tensor
    """[T] fp32: A_t of the action token t, not whitened."""
    returns_T: torch.Tensor
    """[T] fp32: A_t + V_t, the value function's target."""
    token_rewards_T: torch.Tensor
    """[T] fp32: the shaped reward r_t (rewards minus the KL penalty)."""
    kl_T: torch.Tensor
    """[T] fp32: the KL estimate of token t in nats, before `kl_coef`."""
    whitening_sums_B3: torch.Tensor
    """[B, 3] fp64: per sequence the number of action tokens, the sum of A_t and of A_t²."""

    def whitening_sums(self) -> torch.Tensor:
        """Return [3] fp64: count, sum, sum of squares over the batch; sum them over dp before `whiten`.

        The B partial sums are added here in a fixed order: in the kernel a sum over programs would need
        atomics.
        """
        return self.whitening_sums_B3.sum(0)


@torch.no_grad()
def ppo_advantages(
    logprobs_T: torch.Tensor,
    ref_logprobs_T: torch.Tensor,
    values_T: torch.Tensor,
    rewards_B: torch.Tensor,
    cu_seqlens: torch.Tensor,
    action_mask_T: torch.Tensor,
    *,
    kl_coef: float,
    gamma: float,
    lam: float,
    kl_estimator: str = "k1",
    token_rewards_T: torch.Tensor | None = None,
    bootstrap_B: torch.Tensor | None = None,
) -> Advantages:
    """Return `Advantages`: the definition of `glm_rlhf.kernels.rl.advantages.ppo_advantages`.

    Arithmetic is fp64; the outputs are fp32, or fp64 if `logprobs_T` is fp64. The recurrence is solved by
    doubling: log2(longest sequence) vector steps over the action tokens, instead of a loop over time.
    """
    check_kl_estimator(kl_estimator)
    output_dtype = torch.float64 if logprobs_T.dtype == torch.float64 else torch.float32
    num_tokens, num_sequences = logprobs_T.numel(), rewards_B.numel()
    lengths_B = cu_seqlens.diff().long()
    sequence_T = torch.repeat_interleave(
        torch.arange(num_sequences, device=logprobs_T.device), lengths_B, output_size=num_tokens
    )

    # From here on there are only the A action tokens, so that values at masked tokens cannot leak.
    action_A = action_mask_T.nonzero().squeeze(1)
    sequence_A = sequence_T[action_A]
    value_A = values_T[action_A].double()
    kl_A = token_kl(logprobs_T[action_A].double() - ref_logprobs_T[action_A].double(), kl_estimator)
    reward_A = -kl_coef * kl_A
    if token_rewards_T is not None:
        reward_A = reward_A + token_rewards_T[action_A].double()
    is_last_A = torch.ones_like(sequence_A, dtype=torch.bool)
    is_last_A[:-1] = sequence_A[1:] != sequence_A[:-1]
    last_sequence = sequence_A[is_last_A]
    reward_A[is_last_A] += rewards_B[last_sequence].double()

    next_value_A = value_A.roll(-1)
    next_value_A[is_last_A] = 0.0 if bootstrap_B is None else bootstrap_B[last_sequence].double()
    advantage_A = _discounted_suffix_sums(
        reward_A + gamma * next_value_A - value_A,
        sequence_A,
        gamma * lam,
        int(lengths_B.amax(0)) if num_sequences else 0,
    )

    def unpacked(source_A: torch.Tensor) -> torch.Tensor:
        return torch.zeros(num_tokens, dtype=output_dtype, device=source_A.device).index_put_(
            (action_A,), source_A.to(output_dtype)
        )

    sums_B3 = torch.zeros(num_sequences, 3, dtype=torch.float64, device=logprobs_T.device)
    sums_B3.index_add_(
        0, sequence_A, torch.stack((torch.ones_like(advantage_A), advantage_A, advantage_A.square()), dim=1)
    )
    return Advantages(
        advantages_T=unpacked(advantage_A),
        returns_T=unpacked(advantage_A + value_A),
        token_rewards_T=unpacked(reward_A),
        kl_T=unpacked(kl_A),
        whitening_sums_B3=sums_B3,
    )


def _discounted_suffix_sums(
    delta_A: torch.Tensor, sequence_A: torch.Tensor, decay: float, longest: int
) -> torch.Tensor:
    """Return S_i = sum over k ≥ 0 of decay^k · delta_{i+k}, within each sequence."""
    sums_A, stride = delta_A, 1
    while stride < min(longest, delta_A.numel()):
        # S over 2·stride terms = S over stride terms + decay^stride · (S over the next stride terms).
        is_same_A = sequence_A[stride:] == sequence_A[:-stride]
        carried_A = torch.where(is_same_A, decay**stride * sums_A[stride:], 0.0)
        sums_A = torch.cat((sums_A[:-stride] + carried_A, sums_A[-stride:]))
        stride *= 2
    return sums_A
