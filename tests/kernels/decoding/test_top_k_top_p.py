"""Top-k and top-p thresholds against their definition over sorted values."""

import pytest
import torch
from kernel_device import DEVICE

from glm_rlhf.kernels.decoding.top_k_top_p import truncation_threshold
from glm_rlhf.kernels.dispatch import launch

IMPLEMENTATIONS = ["reference", "triton"]


def kept_by_definition(logits_V, temperature, top_k, top_p, masked_V):
    """Return which ids are kept, token by token, in float64."""
    allowed = [i for i in range(len(logits_V)) if not masked_V[i] and logits_V[i] > -torch.inf]
    if temperature == 0:
        return set(allowed)
    value = {i: float(logits_V[i]) for i in allowed}
    kept = set(allowed)
    if top_k:
        kept = {i for i in allowed if sum(value[j] > value[i] for j in allowed) < top_k}
    if top_p < 1:
        peak = max(value.values(), default=0.0)
        weight = {i: torch.tensor((value[i] - peak) / temperature).double().exp().item() for i in kept}
        total = sum(weight.values())
        kept = {i for i in kept if sum(weight[j] for j in kept if value[j] > value[i]) < top_p * total}
    return kept


def check(logits_BV, temperature, top_k, top_p, masked_V, implementation):
    batch = len(logits_BV)
    per_row = {
        "temperature_B": torch.full((batch,), temperature, device=DEVICE),
        "top_k_B": torch.full((batch,), top_k, dtype=torch.int32, device=DEVICE) if top_k else None,
        "top_p_B": torch.full((batch,), top_p, device=DEVICE) if top_p < 1 else None,
    }
    with launch.forced(implementation):
        threshold_B = truncation_threshold(
            logits_BV.to(DEVICE),
            **per_row,
            masked_ids_V=None if masked_V is None else masked_V.to(DEVICE),
        ).cpu()
    blocked_V = masked_V if masked_V is not None else torch.zeros(logits_BV.shape[1], dtype=torch.bool)
    for row in range(batch):
        is_kept_V = (logits_BV[row].float() >= threshold_B[row]) & ~blocked_V & (logits_BV[row] > -torch.inf)
        expected = kept_by_definition(logits_BV[row].double(), temperature, top_k, top_p, blocked_V)
        assert set(is_kept_V.nonzero()[:, 0].tolist()) == expected


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "vocab_size, temperature, top_k, top_p",
    [
        (1, 1.0, 1, 0.5),
        (3, 1.0, 2, 1.0),
        (63, 1.0, 0, 0.9),
        (101, 0.3, 7, 0.77),
        (301, 2.0, 300, 0.01),
        (301, 1.0, 1, 0.999),
        (64, 1.0, 500, 1.0),
        (64, 0.0, 3, 0.5),
    ],
)
def test_keeps_what_the_definition_keeps(vocab_size, temperature, top_k, top_p, dtype, implementation):
    generator = torch.Generator().manual_seed(vocab_size)
    # bf16 logits of size 3 have many ties among 301: equal logits must share their fate.
    logits_BV = (3 * torch.randn(4, vocab_size, generator=generator)).to(dtype)
    masked_V = torch.rand(vocab_size, generator=generator) < 0.3
    masked_V[0] = False
    logits_BV[2, 1:] = -torch.inf
    logits_BV[3] = logits_BV[3].round()
    check(logits_BV, temperature, top_k, top_p, masked_V, implementation)
    check(logits_BV, temperature, top_k, top_p, None, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_extreme_logits(implementation):
    rows = [
        [1e30, 1e30, 1e30, 1e30, 0.0],
        [3e38, -3e38, 0.0, 1.0, 2.0],
        [1e-40, 0.0, -1e-40, 1e-38, 2e-40],
        [5.0, 5.0, 5.0, 5.0, 5.0],
        [-torch.inf, -torch.inf, 1.0, 0.0, -1.0],
    ]
    # 0.7 of two to five equal weights is no whole number of them, so that rounding decides nothing.
    check(torch.tensor(rows), 1.0, 2, 0.7, None, implementation)
    check(torch.tensor(rows), 1.0, 0, 0.7, None, implementation)
    check(torch.tensor(rows), 1.0, 3, 1.0, None, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_limits_are_per_row(implementation):
    logits_BV = torch.tensor([[3.0, 2.0, 1.0, 0.0]], device=DEVICE).repeat(5, 1)
    with launch.forced(implementation):
        threshold_B = truncation_threshold(
            logits_BV,
            temperature_B=torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0], device=DEVICE),
            top_k_B=torch.tensor([0, 1, 3, 0, 1], dtype=torch.int32, device=DEVICE),
            # softmax: 0.644, 0.237, 0.087, 0.032
            top_p_B=torch.tensor([1.0, 1.0, 0.5, 0.7, 0.1], device=DEVICE),
        )
    assert threshold_B.tolist() == [-torch.inf, 3.0, 3.0, 2.0, -torch.inf]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("vocab_size", [10007, 65024, 151552])
def test_large_vocabulary_keeps_as_many_as_asked(vocab_size, implementation):
    logits_BV = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    top_k_B = torch.tensor([50], dtype=torch.int32, device=DEVICE)
    with launch.forced(implementation):
        threshold_B = truncation_threshold(
            logits_BV, temperature_B=torch.ones(1, device=DEVICE), top_k_B=top_k_B
        )
    assert torch.equal(threshold_B, logits_BV.topk(50).values[:, -1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_same_inputs_give_the_same_bits(implementation):
    logits_BV = torch.randn(9, 1009, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    arguments = {
        "temperature_B": torch.full((9,), 0.9, device=DEVICE),
        "top_k_B": torch.arange(9, dtype=torch.int32, device=DEVICE),
        "top_p_B": torch.full((9,), 0.7, device=DEVICE),
    }
    with launch.forced(implementation):
        first_B, second_B = (truncation_threshold(logits_BV, **arguments) for _ in range(2))
    assert torch.equal(first_B, second_B)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_poisoned_rows_end_and_leave_their_neighbours_alone(poison, implementation):
    logits_BV = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    arguments = {
        "temperature_B": torch.ones(3, device=DEVICE),
        "top_p_B": torch.full((3,), 0.8, device=DEVICE),
    }
    with launch.forced(implementation):
        clean_B = truncation_threshold(logits_BV, **arguments)
        logits_BV[1, 7] = poison
        poisoned_B = truncation_threshold(logits_BV, **arguments)
    assert torch.equal(poisoned_B[[0, 2]], clean_B[[0, 2]])
