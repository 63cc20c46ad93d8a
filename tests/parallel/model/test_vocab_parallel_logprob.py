"""Vocabulary shards on 2 and 4 gloo ranks give the results of one rank with the whole vocabulary."""

import io
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from rank_pool import WORLD_SIZE as WORLD

from glm_rlhf.parallel.model import vocab_parallel_logprob


@dataclass(frozen=True)
class Case:
    op: str  # "linear" or "logits"
    tp: int
    num_rows: int = 37
    num_columns: int = 40  # padded, a multiple of tp
    vocab_size: int | None = None
    hidden_size: int = 24
    dtype: torch.dtype = torch.float32
    temperature: float = 0.7
    reduces: bool = True
    targets: str = "some ignored"  # or "all ignored", "all kept"
    uses_minus_infinity: bool = False


CASES = [
    *(Case("linear", tp, dtype=dtype) for tp in (1, 2, 4) for dtype in (torch.float32, torch.float64)),
    Case("linear", 2, dtype=torch.bfloat16),
    Case("linear", 4, reduces=False),
    Case("linear", 4, vocab_size=37),
    Case("linear", 4, vocab_size=11),  # the last two shards hold nothing but padding
    Case("linear", 2, targets="all ignored"),
    Case("linear", 2, targets="all kept", temperature=1.0),
    Case("linear", 2, num_rows=0),
    Case("linear", 4, num_rows=1, num_columns=4),
    *(Case("logits", tp, dtype=dtype) for tp in (1, 2, 4) for dtype in (torch.float32, torch.float64)),
    Case("logits", 4, vocab_size=37),
    Case("logits", 4, uses_minus_infinity=True),
    Case("logits", 2, targets="all ignored"),
    Case("logits", 2, num_rows=0),
]


def inputs(case: Case) -> dict[str, torch.Tensor]:
    """Whole, unsharded inputs of a case, the same on every rank."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    size = case.vocab_size or case.num_columns
    targets_T = torch.randint(0, size, (case.num_rows,), generator=generator)
    if case.targets == "all ignored":
        targets_T.fill_(vocab_parallel_logprob.IGNORE_INDEX)
    elif case.targets == "some ignored":
        targets_T[1::3] = vocab_parallel_logprob.IGNORE_INDEX
    logits_TV = 3 * normal(case.num_rows, case.num_columns)
    if case.uses_minus_infinity:
        logits_TV[:, : case.num_columns // case.tp] = -torch.inf  # a whole shard without a finite logit
        logits_TV[::2, -1] = -torch.inf
        targets_T[targets_T >= 0] = case.num_columns - 2
    return {
        "hidden_TD": normal(case.num_rows, case.hidden_size).to(case.dtype),
        "weight_VD": normal(case.num_columns, case.hidden_size).to(case.dtype),
        "logits_TV": logits_TV.to(case.dtype),
        "targets_T": targets_T,
        "dlogprobs_T": normal(case.num_rows),
        "dentropy_T": normal(case.num_rows),
    }


def evaluate(case: Case, group: dist.ProcessGroup | None, rank: int, shards: int) -> dict[str, torch.Tensor]:
    """Run one case on one shard; `group=None, rank=0, shards=1` is the single-rank run."""
    tensors = inputs(case)
    if case.op == "linear":
        hidden_TD = tensors["hidden_TD"].requires_grad_()
        leaf = tensors["weight_VD"].chunk(shards, dim=0)[rank].clone().requires_grad_()
        logprobs_T, entropy_T = vocab_parallel_logprob.linear_logprob(
            hidden_TD,
            leaf,
            tensors["targets_T"],
            group=group,
            temperature=case.temperature,
            vocab_size=case.vocab_size,
            reduces_hidden_gradient=case.reduces,
        )
    else:
        hidden_TD = None
        leaf = tensors["logits_TV"].chunk(shards, dim=1)[rank].clone().requires_grad_()
        logprobs_T, entropy_T = vocab_parallel_logprob.logprobs_from_logits(
            leaf, tensors["targets_T"], group=group, temperature=case.temperature, vocab_size=case.vocab_size
        )
    torch.autograd.backward(
        [logprobs_T, entropy_T],
        [tensors["dlogprobs_T"].to(logprobs_T.dtype), tensors["dentropy_T"].to(entropy_T.dtype)],
    )
    result = {"logprobs_T": logprobs_T.detach(), "entropy_T": entropy_T.detach(), "shard": leaf.grad}
    if hidden_TD is not None:
        result["hidden_TD"] = hidden_TD.grad
    return result


def run_on_rank() -> bytes:
    """Every case on one rank, with the collectives it issued."""
    groups = {size: _group_of(size) for size in (1, 2, 4)}
    issued: list[tuple[str, int]] = []
    plain_all_reduce = dist.all_reduce

    def counted_all_reduce(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        issued.append((str(op).rsplit(".", 1)[-1], tensor.numel() * tensor.element_size()))
        return plain_all_reduce(tensor, op=op, group=group, async_op=async_op)

    results = []
    dist.all_reduce = counted_all_reduce
    try:
        for case in CASES:
            issued.clear()
            group = groups[case.tp]
            result = evaluate(case, group, group.rank(), case.tp)
            results.append(result | {"issued": list(issued)})
    finally:
        dist.all_reduce = plain_all_reduce
        for group in groups.values():  # the ranks serve other tests after this one
            dist.destroy_process_group(group)
    buffer = io.BytesIO()
    torch.save(results, buffer)
    return buffer.getvalue()


def _group_of(size: int) -> dist.ProcessGroup:
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, WORLD, size)]
    return groups[dist.get_rank() // size]


@pytest.fixture(scope="module")
def results(ranks):
    per_rank = [torch.load(io.BytesIO(answer)) for answer in ranks.run(run_on_rank)]
    return {case: [answers[i] for answers in per_rank] for i, case in enumerate(CASES)}


# float64: rounding only. float32: the sum over shards is taken in another order, 1e-6 relative to values of
# about 10. bfloat16: the gradient is rounded once, 2^-8 relative.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-5, torch.bfloat16: 8e-3}


def close(actual, expected, dtype):
    if actual.dtype in (torch.float32, torch.float64) and dtype == torch.bfloat16 and actual.dim() == 1:
        dtype = torch.float32  # logprob and entropy are not rounded to bfloat16
    limit = TOLERANCES[dtype]
    torch.testing.assert_close(actual, expected, rtol=limit, atol=limit, equal_nan=False)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_equal_one_rank(results, case):
    whole = evaluate(case, None, 0, 1)
    for start in range(0, WORLD, case.tp):
        ranks = results[case][start : start + case.tp]
        for rank in ranks:
            close(rank["logprobs_T"], whole["logprobs_T"], case.dtype)
            close(rank["entropy_T"], whole["entropy_T"], case.dtype)
        dim = 0 if case.op == "linear" else 1
        close(torch.cat([rank["shard"] for rank in ranks], dim), whole["shard"], case.dtype)
        if case.op == "linear" and case.reduces:
            for rank in ranks:
                close(rank["hidden_TD"], whole["hidden_TD"], case.dtype)
        elif case.op == "linear":
            close(sum(rank["hidden_TD"] for rank in ranks), whole["hidden_TD"], case.dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_ranks_hold_the_same_bits(results, case):
    for start in range(0, WORLD, case.tp):
        first = results[case][start]
        for rank in results[case][start + 1 : start + case.tp]:
            assert torch.equal(rank["logprobs_T"], first["logprobs_T"])
            assert torch.equal(rank["entropy_T"], first["entropy_T"])
            if case.op == "linear" and case.reduces:
                assert torch.equal(rank["hidden_TD"], first["hidden_TD"])


@pytest.mark.parametrize("case", [c for c in CASES if c.dtype == torch.float32], ids=str)
def test_collectives_are_those_of_the_docstring(results, case):
    num_rows = case.num_rows
    if case.op == "linear":
        num_rows = int((inputs(case)["targets_T"] != vocab_parallel_logprob.IGNORE_INDEX).sum())
    expected = []
    if case.tp > 1 and num_rows > 0:
        expected = [("MAX", 4 * num_rows), ("SUM", 12 * num_rows)]
        if case.op == "linear" and case.reduces:
            expected.append(("SUM", 4 * num_rows * case.hidden_size))
    for rank in results[case]:
        assert rank["issued"] == expected


def test_phantom_logits_of_padding_take_no_part(results):
    case = next(c for c in CASES if c.vocab_size == 37 and c.op == "linear")
    for rank in results[case][-1:]:
        assert torch.equal(rank["shard"][7:], torch.zeros_like(rank["shard"][7:]))  # ids 37, 38, 39
        assert rank["shard"][:7].abs().min() > 0


def test_vocab_size_beyond_the_shards_is_refused():
    with pytest.raises(ValueError, match="at most 8"):
        vocab_parallel_logprob.linear_logprob(
            torch.zeros(2, 3), torch.zeros(8, 3), torch.zeros(2, dtype=torch.long), group=None, vocab_size=9
        )
