"""Row c: token KL, shaped reward, GAE, returns and whitening sums over a packed batch."""

import torch

from glm_rlhf.engine.bench.harness import Answer, Contender, Problem
from glm_rlhf.engine.bench.kernel_rows.case import Case, random_normal
from glm_rlhf.kernels.rl.advantages import ppo_advantages

GAMMA, LAM, KL_COEF = 0.99, 0.95, 0.05
# fp32 against fp64 over thousands of steps of a recurrence whose memory is 1 / (1 - γλ) = 17 tokens.
TOLERANCE = 1e-5
_TARGETS_S = {(64, 8192): 15e-6, (512, 4096): 12e-6}
_NOTES = {(512, 4096): " (the target is for GAE alone, of 12 bytes a token)"}


def cases(sizes: dict[str, tuple[int, int]], models: str) -> list[Case]:
    """Return a row per size (sequences, tokens of each). Limit: three fp32 and a mask read, four written."""
    return [
        Case(
            row=row,
            what=f"token KL, reward, GAE, returns, whitening sums; one pass{_NOTES.get(size, '')}",
            model=models,
            shape=f"{size[0]} sequences of {size[1]}, fp32",
            num_bytes=29.0 * size[0] * size[1],
            target_s=_TARGETS_S.get(size),
            build=lambda device, size=size: _problem(device, *size),
        )
        for row, size in sizes.items()
    ]


def _problem(device: torch.device, num_sequences: int, length: int) -> Problem:
    num_tokens, prompt = num_sequences * length, length // 8
    options = {"device": device, "dtype": torch.float32}
    logprobs_T = -random_normal(num_tokens, seed=1, **options).abs()
    ref_logprobs_T = logprobs_T + random_normal(num_tokens, std=0.1, seed=2, **options)
    values_T = random_normal(num_tokens, seed=3, **options)
    rewards_B = random_normal(num_sequences, seed=4, **options)
    cu_seqlens = torch.arange(0, num_tokens + 1, length, dtype=torch.int32, device=device)
    is_action_L = torch.arange(length, device=device) >= prompt
    inputs = (logprobs_T, ref_logprobs_T, values_T, rewards_B, cu_seqlens, is_action_L.repeat(num_sequences))

    def loop(dtype: torch.dtype = torch.float32) -> Answer:
        logprobs_BL, reference_BL, values_BL = (
            t.view(num_sequences, length).to(dtype) for t in (logprobs_T, ref_logprobs_T, values_T)
        )
        rewards_BL = -KL_COEF * (logprobs_BL - reference_BL) * is_action_L
        rewards_BL[:, -1] += rewards_B
        carry_B = torch.zeros(num_sequences, device=device, dtype=dtype)
        reversed_columns = []
        for t in range(length - 1, prompt - 1, -1):
            next_value_B = values_BL[:, t + 1] if t < length - 1 else 0.0
            delta_B = rewards_BL[:, t] + GAMMA * next_value_B - values_BL[:, t]
            carry_B = delta_B + GAMMA * LAM * carry_B
            reversed_columns.append(carry_B)
        advantages_BL = torch.zeros_like(values_BL)
        advantages_BL[:, prompt:] = torch.stack(reversed_columns[::-1], dim=1)
        returns_BL = (advantages_BL + values_BL) * is_action_L
        count = torch.full((), num_sequences * (length - prompt), device=device, dtype=torch.float64)
        sums = torch.stack([count, advantages_BL.sum().double(), advantages_BL.square().sum().double()])
        return [advantages_BL.flatten(), returns_BL.flatten(), sums]

    return Problem(
        contenders=[
            Contender(
                name="ours",
                run=lambda: ppo_advantages(*inputs, kl_coef=KL_COEF, gamma=GAMMA, lam=LAM),
                answer=lambda result: [result.advantages_T, result.returns_T, result.whitening_sums()],
            ),
            Contender(name="torch eager, loop over time", run=loop),
        ],
        expected=lambda: loop(torch.float64),
        tolerance=TOLERANCE,
    )
