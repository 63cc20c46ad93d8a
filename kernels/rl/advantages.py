"""Per-token KL, shaped rewards, GAE, returns and whitening sums in one launch over packed sequences."""

import torch
import triton
import triton.language as tl

from glm_rlhf.kernels.dispatch.arguments import check_cu_seqlens, check_mask, check_range, check_vectors
from glm_rlhf.kernels.dispatch.launch import CompileCase, uses_triton
from glm_rlhf.kernels.rl import reference_advantages as reference
from glm_rlhf.kernels.rl.kl import token_kl
from glm_rlhf.kernels.rl.reference_advantages import Advantages
from glm_rlhf.kernels.rl.reference_kl import check_kl_estimator


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
    """Return `Advantages`: advantages, returns, shaped rewards, KL and the sums for whitening.

    Let a_1 < … < a_n be the action tokens of one sequence (masked tokens between them, such as turns of a
    user or a tool, are skipped), V_i = values_T[a_i], and d_i the policy's log-ratio to the reference:

        r_i = token_rewards_T[a_i] - kl_coef · kl(d_i) + [i = n] · rewards_B
        δ_i = r_i + gamma · V_{i+1} - V_i,                   V_{n+1} = bootstrap_B, or 0
        A_i = δ_i + gamma · lam · A_{i+1},                   A_{n+1} = 0
        returns_i = A_i + V_i

    Not differentiable. The recurrence and the whitening sums are computed in fp64: with gamma · lam near one
    the horizon would multiply the rounding error of an fp32 decay.

    Args:
        logprobs_T: [T] float, log p(token t | tokens before t) of the policy, nats.
        ref_logprobs_T: [T] float, the same of the reference.
        values_T: [T] float, `values_T[t]` is the critic's value of the state in which token t is chosen,
            i.e. the critic's output at position t - 1, aligned with logprobs_T.
        rewards_B: [B] float, reward of the whole sequence, added at the last action token. A sequence
            without action tokens drops it: its count in the whitening sums is zero.
        cu_seqlens: [B + 1] int32, first token of each sequence, then T. Sequences may be empty. Only tokens
            of sequences have outputs: on a GPU the caller must ensure that the last entry is T.
        action_mask_T: [T] bool, True where the policy chose the token. Other inputs are ignored at masked
            tokens, rewards included.
        kl_coef: weight of the KL penalty, ≥ 0.
        gamma: discount per action token, in [0, 1].
        lam: GAE's λ, in [0, 1].
        kl_estimator: `k1`, `k2` or `k3`, see `reference.kl.token_kl`.
        token_rewards_T: [T] float or None, rewards of single tokens, added to the terminal ones.
        bootstrap_B: [B] float or None, value after the last action token: 0 for a finished sequence,
            the critic's value for a truncated one. None means that all have finished.

    Returns:
        Advantages, fp32, zero at masked tokens. A NaN or Inf input affects only its own sequence.

    Raises:
        ValueError: shapes, devices or ranges do not fit.

    Source: Schulman et al. 2016 (arXiv 1506.02438), eq. 16; reward shaping of Ouyang et al. 2022
    (arXiv 2203.02155), eq. 2 without the pretraining term.
    """
    num_tokens, num_sequences = logprobs_T.numel(), rewards_B.numel()
    check_vectors(
        logprobs_T=(logprobs_T, num_tokens),
        ref_logprobs_T=(ref_logprobs_T, num_tokens),
        values_T=(values_T, num_tokens),
        rewards_B=(rewards_B, num_sequences),
        cu_seqlens=(cu_seqlens, num_sequences + 1),
        action_mask_T=(action_mask_T, num_tokens),
        token_rewards_T=(token_rewards_T, num_tokens),
        bootstrap_B=(bootstrap_B, num_sequences),
    )
    check_cu_seqlens(cu_seqlens, num_tokens)
    check_mask("action_mask_T", action_mask_T)
    check_range("kl_coef", kl_coef, 0.0, float("inf"))
    check_range("gamma", gamma, 0.0, 1.0)
    check_range("lam", lam, 0.0, 1.0)
    check_kl_estimator(kl_estimator)
    run = _launch if uses_triton(logprobs_T) else reference.ppo_advantages
    return run(
        logprobs_T,
        ref_logprobs_T,
        values_T,
        rewards_B,
        cu_seqlens,
        action_mask_T,
        kl_coef=kl_coef,
        gamma=gamma,
        lam=lam,
        kl_estimator=kl_estimator,
        token_rewards_T=token_rewards_T,
        bootstrap_B=bootstrap_B,
    )


def whiten(
    advantages_T: torch.Tensor,
    action_mask_T: torch.Tensor,
    sums: torch.Tensor,
    *,
    shifts_mean: bool = True,
    epsilon: float = 1e-8,
) -> torch.Tensor:
    """Return advantages with variance 1, and mean 0 or, without `shifts_mean`, the mean they had.

        (A_t - mean) / sqrt(variance + epsilon),   variance = (Σ A² - (Σ A)² / n) / (n - 1)

    Without `shifts_mean` the mean is added to that. Masked tokens stay 0.

    No host synchronisation. With one token or none the variance counts as 0.

    Args:
        advantages_T: [T] float.
        action_mask_T: [T] bool.
        sums: [3] fp64, `Advantages.whitening_sums()`; summed over data-parallel ranks before, for statistics
            of the global batch.
        shifts_mean: False keeps the mean.
        epsilon: added to the variance, > 0.

    Source: as in TRL and verl, with Bessel's correction.
    """
    count, total, total_of_squares = sums.double().unbind()
    mean = total / count.clamp(min=1)
    variance = ((total_of_squares - total * mean) / (count - 1).clamp(min=1)).clamp(min=0)
    scale = torch.rsqrt(variance + epsilon)
    whitened_T = (advantages_T.double() - mean) * scale
    if not shifts_mean:
        whitened_T = whitened_T + mean
    return torch.where(action_mask_T, whitened_T, 0.0).to(advantages_T.dtype)


@torch.no_grad()
def _launch(
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
    kl_estimator: str,
    token_rewards_T: torch.Tensor | None,
    bootstrap_B: torch.Tensor | None,
) -> Advantages:
    num_tokens, num_sequences = logprobs_T.numel(), rewards_B.numel()
    outputs_4T = [torch.empty(num_tokens, dtype=torch.float32, device=logprobs_T.device) for _ in range(4)]
    sums_B3 = torch.empty(num_sequences, 3, dtype=torch.float64, device=logprobs_T.device)
    if num_sequences > 0:
        block, num_warps = _tile(num_tokens, num_sequences)
        _ppo_advantages_fwd_kernel[(num_sequences,)](
            logprobs_T.contiguous(),
            ref_logprobs_T.contiguous(),
            values_T.contiguous(),
            rewards_B.contiguous(),
            logprobs_T if token_rewards_T is None else token_rewards_T.contiguous(),
            rewards_B if bootstrap_B is None else bootstrap_B.contiguous(),
            cu_seqlens.contiguous(),
            action_mask_T.contiguous().view(torch.uint8),
            *outputs_4T,
            sums_B3,
            float(kl_coef),
            *_two_floats(gamma),
            *_two_floats(gamma * lam),
            HAS_TOKEN_REWARDS=token_rewards_T is not None,
            HAS_BOOTSTRAP=bootstrap_B is not None,
            KL_ESTIMATOR=kl_estimator,
            BLOCK=block,
            num_warps=num_warps,
        )
    advantages_T, returns_T, shaped_T, kl_T = outputs_4T
    return Advantages(
        advantages_T=advantages_T,
        returns_T=returns_T,
        token_rewards_T=shaped_T,
        kl_T=kl_T,
        whitening_sums_B3=sums_B3,
    )


def _tile(num_tokens: int, num_sequences: int) -> tuple[int, int]:
    """Return (tokens per block, warps): one block spans a sequence of mean length, up to 2048 tokens.

    The mean needs no device synchronisation; a longer sequence takes several blocks. Four tokens
    a thread are one 16-byte vector; at 2048 tokens the fp64 scan's state still fits the registers.
    """
    mean_length = triton.cdiv(num_tokens, num_sequences)
    block = min(max(triton.next_power_of_2(mean_length + 16), 128), 2048)
    return block, block // 128


def _two_floats(number: float) -> tuple[float, float]:
    """Return two fp32 numbers whose sum is `number` to 48 bits: kernel arguments are fp32."""
    high = torch.tensor(number, dtype=torch.float32).item()
    return high, number - high


@triton.jit
def _ppo_advantages_fwd_kernel(
    logprobs_ptr,
    ref_logprobs_ptr,
    values_ptr,
    rewards_ptr,
    token_rewards_ptr,
    bootstrap_ptr,
    cu_seqlens_ptr,
    action_mask_ptr,
    advantages_ptr,
    returns_ptr,
    shaped_ptr,
    kl_ptr,
    sums_ptr,
    kl_coef,
    gamma_high,
    gamma_low,
    decay_high,
    decay_low,
    HAS_TOKEN_REWARDS: tl.constexpr,
    HAS_BOOTSTRAP: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per sequence processes its blocks from last to first, carrying A and the next action."""
    sequence = tl.program_id(0).to(tl.int64)
    begin = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    # Positions count from a multiple of 16 tokens at or before the sequence, so that access to its blocks is
    # vectorised, and each thread's tokens are adjacent, as the scans need.
    base = tl.multiple_of(begin // 16 * 16, 16)
    first = (begin - base).to(tl.int32)
    end = (tl.load(cu_seqlens_ptr + sequence + 1) - base).to(tl.int32)
    zero = tl.zeros((), dtype=tl.float64)
    gamma = zero + gamma_high + gamma_low
    decay = zero + decay_high + decay_low
    terminal_reward = tl.load(rewards_ptr + sequence).to(tl.float32)
    if HAS_BOOTSTRAP:
        bootstrap = tl.load(bootstrap_ptr + sequence).to(tl.float32)

    # State of the blocks already done: A and position of their first action token (`end` if there is none).
    later_advantage = zero
    later_action = end
    count = zero
    total = zero
    total_of_squares = zero
    num_blocks = tl.where(end > first, tl.cdiv(end, BLOCK), 0)
    for done in range(0, num_blocks):
        start = (num_blocks - 1 - done) * BLOCK
        position = start + tl.arange(0, BLOCK)
        is_inside = (position >= first) & (position < end)
        is_full = (start >= first) & (start + BLOCK <= end)
        is_action = is_inside & (_load(action_mask_ptr + base, position, is_inside, is_full) != 0)

        # The action token after each position: the nearest one in this block, by a scan over the mask shifted
        # by one token, else the first one of the blocks done.
        is_next = is_inside & (position + 1 < end)
        is_next &= tl.load(action_mask_ptr + base + position + 1, mask=is_next, other=0) != 0
        next_action = tl.associative_scan(tl.where(is_next, position + 1, end), 0, _nearest, reverse=True)
        next_action = tl.minimum(next_action, later_action)
        is_last = is_action & (next_action == end)

        # Each output is stored as soon as it is known: values alive across the second scan cost registers.
        logprob = _load(logprobs_ptr + base, position, is_inside, is_full).to(tl.float32)
        ref_logprob = _load(ref_logprobs_ptr + base, position, is_inside, is_full).to(tl.float32)
        kl = token_kl(logprob - ref_logprob, KL_ESTIMATOR)
        _store(kl_ptr + base, position, tl.where(is_action, kl, 0.0), is_inside, is_full)
        reward = -kl_coef * kl
        if HAS_TOKEN_REWARDS:
            reward += _load(token_rewards_ptr + base, position, is_inside, is_full).to(tl.float32)
        reward = tl.where(is_last, reward + terminal_reward, reward)
        _store(shaped_ptr + base, position, tl.where(is_action, reward, 0.0), is_inside, is_full)

        value = _load(values_ptr + base, position, is_inside, is_full).to(tl.float32)
        has_next = is_action & (next_action < end)
        next_value = tl.load(values_ptr + base + next_action, mask=has_next, other=0.0).to(tl.float32)
        if HAS_BOOTSTRAP:
            next_value = tl.where(is_last, bootstrap, next_value)
        # A masked token is the identity of the recurrence: the carry passes unchanged.
        delta = tl.where(is_action, reward.to(tl.float64) + gamma * next_value - value, 0.0)
        factor = tl.where(is_action, decay, 1.0)
        factor, advantage = tl.associative_scan((factor, delta), 0, _linear, reverse=True)
        advantage += factor * later_advantage
        later_advantage = tl.sum(tl.where(position == start, advantage, 0.0))
        later_action = tl.minimum(later_action, tl.min(tl.where(is_action, position, end)))

        advantage = tl.where(is_action, advantage, 0.0)
        returned = tl.where(is_action, advantage + value, 0.0)
        _store(advantages_ptr + base, position, advantage.to(tl.float32), is_inside, is_full)
        _store(returns_ptr + base, position, returned.to(tl.float32), is_inside, is_full)
        count += tl.sum(is_action.to(tl.float64))
        total += tl.sum(advantage)
        total_of_squares += tl.sum(advantage * advantage)

    tl.store(sums_ptr + sequence * 3, count)
    tl.store(sums_ptr + sequence * 3 + 1, total)
    tl.store(sums_ptr + sequence * 3 + 2, total_of_squares)


@triton.jit
def _load(pointer, position, is_inside, is_full):
    # A mask with an arbitrary end prevents vectorised access, so full blocks use none.
    if is_full:
        loaded = tl.load(pointer + position)
    else:
        loaded = tl.load(pointer + position, mask=is_inside, other=0)
    return loaded


@triton.jit
def _store(pointer, position, stored, is_inside, is_full):
    if is_full:
        tl.store(pointer + position, stored)
    else:
        tl.store(pointer + position, stored, mask=is_inside)


@triton.jit
def _nearest(later, earlier):
    return tl.minimum(later, earlier)


@triton.jit
def _linear(later_factor, later_advantage, factor, delta):
    return later_factor * factor, delta + factor * later_advantage


def compile_cases() -> list[CompileCase]:
    """Return the kernel for 64 sequences of 8192 tokens and for many short ones, for all model shapes."""
    cases = []
    for shape, block, num_warps in (("64x8192", 2048, 16), ("4096x128", 256, 2)):
        pointers = dict.fromkeys(("logprobs_ptr", "ref_logprobs_ptr", "values_ptr", "rewards_ptr"), "*fp32")
        pointers |= {"token_rewards_ptr": "*fp32", "bootstrap_ptr": "*fp32"}
        pointers |= {"cu_seqlens_ptr": "*i32", "action_mask_ptr": "*u8"}
        pointers |= dict.fromkeys(("advantages_ptr", "returns_ptr", "shaped_ptr", "kl_ptr"), "*fp32")
        pointers |= {"sums_ptr": "*fp64"}
        scalars = ("kl_coef", "gamma_high", "gamma_low", "decay_high", "decay_low")
        constexprs = {
            "HAS_TOKEN_REWARDS": True,
            "HAS_BOOTSTRAP": True,
            "KL_ESTIMATOR": "k3",
            "BLOCK": block,
        }
        cases.append(
            CompileCase(
                name=f"ppo_advantages_fwd/{shape}/fp32",
                kernel=_ppo_advantages_fwd_kernel,
                signature=pointers | dict.fromkeys(scalars, "fp32") | dict.fromkeys(constexprs, "constexpr"),
                constexprs=constexprs,
                divisible_by_16=tuple(pointers),
                num_warps=num_warps,
            )
        )
    return cases
