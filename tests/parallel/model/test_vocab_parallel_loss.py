"""Losses over vocabulary shards on 2 and 4 gloo ranks equal those of one rank with the whole vocabulary."""

import io
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from rank_pool import WORLD_SIZE as WORLD

from glm_rlhf.kernels.lm_head import reference_linear_loss as reference
from glm_rlhf.parallel.model import vocab_parallel_loss

NUM_ROWS, WIDTH = 40, 24


@dataclass(frozen=True)
class Case:
    tp: int
    loss: str = "ppo"  # or "nll"
    dtype: torch.dtype = torch.float32
    num_columns: int = 40  # padded, a multiple of tp
    vocab_size: int | None = None
    reduces: bool = True
    masked: float = 0.4
    num_chunks: int = 1
    upstream: float = 1.0


CASES = [
    *(Case(tp, loss, dtype) for tp in (1, 2, 4) for loss in ("ppo", "nll") for dtype in (torch.float32,)),
    Case(4, dtype=torch.float64),
    Case(2, dtype=torch.bfloat16),
    Case(4, reduces=False),
    Case(4, vocab_size=37),
    Case(4, vocab_size=11),  # the last two shards hold nothing but padding
    Case(2, masked=2.0),  # every row
    Case(2, num_chunks=3, masked=0.0),
    Case(2, "nll", num_chunks=3, upstream=0.3, masked=0.0),
]


def evaluate(case: Case, group: dist.ProcessGroup | None, rank: int, shards: int) -> dict[str, torch.Tensor]:
    """Run one case on one shard; `group=None, rank=0, shards=1` is the single-rank run."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    targets_T = torch.randint(0, case.vocab_size or case.num_columns, (NUM_ROWS,), generator=generator)
    hidden_TD = normal(NUM_ROWS, WIDTH).to(case.dtype).requires_grad_()
    weight_VD = normal(case.num_columns, WIDTH).to(case.dtype)
    shard = weight_VD.chunk(shards, dim=0)[rank].clone().requires_grad_()
    mask_T = torch.rand(NUM_ROWS, generator=generator) >= case.masked
    placement = {
        "group": group,
        "temperature": 0.7,
        "denominator": 11.0,
        "vocab_size": case.vocab_size,
        "reduces_hidden_gradient": case.reduces,
    }
    if case.loss == "ppo":
        loss, statistics = vocab_parallel_loss.linear_ppo_loss(
            hidden_TD,
            shard,
            targets_T,
            2 * normal(NUM_ROWS) - 5,
            normal(NUM_ROWS),
            mask_T,
            clip_low=0.2,
            clip_high=0.2,
            dual_clip=3.0,
            entropy_coef=0.1,
            ref_logprobs_T=2 * normal(NUM_ROWS) - 5,
            kl_coef=0.1,
            kl_estimator="k2",
            **placement,
        )
    else:
        loss, statistics = vocab_parallel_loss.linear_nll_loss(
            hidden_TD, shard, targets_T, mask_T.float(), **placement
        )
    loss.backward(torch.tensor(case.upstream, dtype=loss.dtype))
    return {
        "loss": loss.detach(),
        "statistics": statistics.sums,
        "hidden_TD": hidden_TD.grad,
        "shard": shard.grad,
    }


def run_on_rank() -> bytes:
    """Every case on one rank, with the collectives it issued."""
    groups = {}
    for size in (1, 2, 4):
        every = [dist.new_group(list(range(first, first + size))) for first in range(0, WORLD, size)]
        groups[size] = every[dist.get_rank() // size]
    issued: list[tuple[str, int]] = []
    plain_all_reduce, plain_elements = dist.all_reduce, reference.CHUNK_ELEMENTS

    def counted_all_reduce(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        issued.append((str(op).rsplit(".", 1)[-1], tensor.numel() * tensor.element_size()))
        return plain_all_reduce(tensor, op=op, group=group, async_op=async_op)

    results = []
    dist.all_reduce = counted_all_reduce
    try:
        for case in CASES:
            issued.clear()
            group = groups[case.tp]
            # 16 rows a chunk is the least that the sweep takes.
            reference.CHUNK_ELEMENTS = 1 if case.num_chunks > 1 else plain_elements
            results.append(evaluate(case, group, group.rank(), case.tp) | {"issued": list(issued)})
    finally:
        dist.all_reduce, reference.CHUNK_ELEMENTS = plain_all_reduce, plain_elements
        for group in groups.values():  # the ranks serve other tests after this one
            dist.destroy_process_group(group)
    buffer = io.BytesIO()
    torch.save(results, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def results(ranks):
    per_rank = [torch.load(io.BytesIO(answer)) for answer in ranks.run(run_on_rank)]
    return {case: [answers[i] for answers in per_rank] for i, case in enumerate(CASES)}


# float64: rounding only. float32: sums over shards in another order. bfloat16: the gradient is rounded once.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-5, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_equal_one_rank(results, case):
    whole = evaluate(case, None, 0, 1)

    def close(actual, expected, limit=TOLERANCES[case.dtype]):
        torch.testing.assert_close(actual, expected, rtol=limit, atol=limit)

    for start in range(0, WORLD, case.tp):
        ranks = results[case][start : start + case.tp]
        for rank in ranks:
            close(rank["loss"], whole["loss"], max(1e-13, min(2e-5, TOLERANCES[case.dtype])))
            close(rank["statistics"], whole["statistics"], 1e-4)  # float32 sums of 40 rows
        close(torch.cat([rank["shard"] for rank in ranks]), whole["shard"])
        if case.reduces:
            for rank in ranks:
                close(rank["hidden_TD"], whole["hidden_TD"])
        else:
            close(sum(rank["hidden_TD"] for rank in ranks), whole["hidden_TD"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_ranks_hold_the_same_bits(results, case):
    for start in range(0, WORLD, case.tp):
        first, *others = results[case][start : start + case.tp]
        for rank in others:
            assert torch.equal(rank["loss"], first["loss"])
            assert torch.equal(rank["statistics"], first["statistics"])
            assert not case.reduces or torch.equal(rank["hidden_TD"], first["hidden_TD"])


@pytest.mark.parametrize("case", [c for c in CASES if c.dtype == torch.float32], ids=str)
def test_collectives_are_those_of_the_docstring(results, case):
    num_rows = int(results[case][0]["statistics"][0 if case.loss == "nll" else 1])
    sizes = [num_rows] if case.num_chunks == 1 else [16, 16, num_rows - 32]
    expected = []
    if case.tp > 1 and num_rows > 0:
        for size in sizes:
            expected += [("MAX", 4 * size), ("SUM", 12 * size)]
            expected += [("SUM", 4 * size * WIDTH)] if case.reduces else []
    for rank in results[case]:
        assert rank["issued"] == expected
