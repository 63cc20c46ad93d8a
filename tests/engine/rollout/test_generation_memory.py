"""Memory that runs out while answers are generated: smaller steps, the same answers, or a clear end."""

import contextlib

import pytest
import torch
from tiny_generation import answers, make_phase, make_requests
from tiny_training import Case, make_chunks

from glm_rlhf.parallel.inference.stage import GenerationStage
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout

WIDE = {"max_batch": 12, "max_step_tokens": 40, "num_pages": 60}


@contextlib.contextmanager
def memory_for(most_rows: int, *, on_rank: int | None = None):
    """Have memory for steps of so many rows only, on every rank or on one; yields the rows of each step."""
    compute, rows = GenerationStage._compute, []

    def limited(stage, chunk, batch, hidden_TD):
        rows.append(len(batch.tokens_T))
        output = compute(stage, chunk, batch, hidden_TD)
        if rows[-1] > most_rows and on_rank in (None, stage.topology.rank):
            raise torch.OutOfMemoryError("injected: no memory")
        return output

    GenerationStage._compute = limited
    try:
        yield rows
    finally:
        GenerationStage._compute = compute


def with_and_without_memory(axes: dict, most_rows: int):
    """Answers with enough memory, and with little: then also the rows of its steps."""
    with open_topology(Layout(**axes)) as topology:
        chunks, requests = make_chunks(Case(), topology), make_requests(6, num_samples=2)
        with make_phase(chunks, topology, requests, **WIDE) as phase:
            expected = answers(phase, requests)
        with memory_for(most_rows) as rows, make_phase(chunks, topology, requests, **WIDE) as phase:
            found = answers(phase, requests)
            met, rows[:] = list(rows), []
            again = answers(phase, requests)  # the phase continues with the size that fits
    assert again.keys() == found.keys()
    return expected, found, met, rows


def check(expected, found, met, rows, most_rows: int) -> None:
    assert max(met) > 2 * most_rows, "memory ran out more than once"
    assert sum(size > most_rows for size in met) <= 5, "each time steps are halved"
    assert max(rows) <= most_rows
    assert found.keys() == expected.keys()
    for key, done in found.items():
        assert done.tokens == expected[key].tokens
        # Keys of a prompt that was read in other parts: sums in another order.
        assert done.logprobs == pytest.approx(expected[key].logprobs, abs=1e-5)


@pytest.mark.parametrize("most_rows", [1, 5])
def test_steps_become_smaller_and_the_answers_stay(most_rows, capfd):
    check(*with_and_without_memory({}, most_rows), most_rows)
    assert "out of memory in a step of generation: at most 20 tokens per step" in capfd.readouterr().err


def test_tensor_parallel_ranks_that_run_out_of_memory_together_continue(ranks):
    for answer in ranks.run(with_and_without_memory, {"tp": 2}, 5):
        check(*answer, 5)


@pytest.mark.slow  # ranks that wait for each other are restarted
@pytest.mark.parametrize("axes, on_rank", [({"tp": 4}, 1), ({"pp": 4}, None)], ids=["tp, one rank", "pp"])
def test_where_steps_cannot_become_smaller_the_run_ends_and_says_so(ranks, axes, on_rank):
    with pytest.raises(AssertionError, match=r"rank \d is out of memory in a step.*lower generation\.max"):
        ranks.run(run_out, axes, on_rank)


def run_out(axes: dict, on_rank: int | None) -> None:
    with open_topology(Layout(**axes)) as topology, memory_for(5, on_rank=on_rank):
        chunks, requests = make_chunks(Case(), topology), make_requests(6)
        with make_phase(chunks, topology, requests, **WIDE) as phase:
            answers(phase, requests)


def test_out_of_memory_at_one_token_is_an_error_and_no_endless_loop():
    with open_topology(Layout()) as topology, memory_for(0) as rows:
        chunks, requests = make_chunks(Case(), topology), make_requests(3)
        with (
            make_phase(chunks, topology, requests, **WIDE) as phase,
            pytest.raises(ValueError, match=r"rank 0 is out of memory in a step of generation"),
        ):
            answers(phase, requests)
        assert rows[-1] == 1
        assert len(rows) < 8
