"""Shards of the vocabulary over 2 and 4 gloo ranks give what one rank with all of it gives."""

import pytest
import torch
import torch.multiprocessing
import vocab_ranks
from vocab_ranks import CASES, WORLD, Case

from glm_rlhf.parallel import vocab


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("vocab"))
    torch.multiprocessing.spawn(vocab_ranks.run, args=(folder,), nprocs=WORLD)
    per_rank = [torch.load(f"{folder}/rank{rank}.pt") for rank in range(WORLD)]
    return {case: [ranks[i] for ranks in per_rank] for i, case in enumerate(CASES)}


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
    whole = vocab_ranks.evaluate(case, None, 0, 1)
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
        num_rows = int((vocab_ranks.inputs(case)["targets_T"] != vocab.IGNORE_INDEX).sum())
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
        vocab.linear_logprob(
            torch.zeros(2, 3), torch.zeros(8, 3), torch.zeros(2, dtype=torch.long), group=None, vocab_size=9
        )


def test_case_ids_are_unique():
    assert len(set(CASES)) == len(CASES)
    assert all(isinstance(case, Case) for case in CASES)
