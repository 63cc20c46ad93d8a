"""An exception on one rank is raised on all ranks at the same place, and all can continue together."""

import pytest
import torch.distributed as dist

from glm_rlhf.parallel.runtime.consensus import failure_barriers, raise_on_all_ranks


class Unforeseen(Exception):
    """An error that is neither a ValueError nor an OSError."""


def raised(action) -> tuple[str, str] | None:
    try:
        action()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def faults_on(failing, error):
    """The exception on each rank when `error` is raised on the ranks `failing`; all can still communicate."""

    def work():
        with raise_on_all_ranks("reading"):
            if dist.get_rank() in failing:
                raise error

    answer = raised(work)
    dist.barrier()
    return answer


@pytest.mark.parametrize(
    "error, elsewhere, words",
    [
        (ValueError("line 3"), "ValueError", "line 3"),
        (OSError(2, "No such file", "x"), "ValueError", "x: No such file"),
        (KeyError("weight"), "RuntimeError", "KeyError: 'weight'"),
        (AssertionError("not filled"), "RuntimeError", "AssertionError: not filled"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_exception_on_one_rank_is_raised_on_all(ranks, error, elsewhere, words):
    answers = ranks.run(faults_on, [2], error)
    assert answers[2] == (type(error).__name__, str(error))
    assert [answers[rank] for rank in (0, 1, 3)] == [(elsewhere, f"reading failed on rank 2: {words}")] * 3


def test_failing_ranks_raise_their_own_exception_and_the_others_the_first(ranks):
    answers = ranks.run(faults_on, [1, 3], ValueError("mine"))
    assert answers == [("ValueError", said) for said in ("reading failed on rank 1: mine", "mine")] * 2


def test_nothing_is_raised_without_an_exception(ranks):
    assert ranks.run(faults_on, [], ValueError("never")) == [None] * 4


def test_without_a_process_group_an_exception_is_unchanged():
    with pytest.raises(ValueError, match=r"^only here$"), raise_on_all_ranks("reading"):
        raise ValueError("only here")
    assert meet_alone() == ("Unforeseen", "")


def meet_alone():
    def work():
        with failure_barriers("writing") as barrier:
            barrier()
            raise Unforeseen

    return raised(work)


def meet(num_barriers, failing, after):
    """Steps of each rank before some fail after their `after`-th barrier, and the exceptions raised."""
    passed = []

    def work():
        with failure_barriers("writing") as barrier:
            for index in range(num_barriers + 1):
                if dist.get_rank() in failing and index == after:
                    raise OSError(28, "No space left", "shard")
                if index < num_barriers:
                    barrier()
                    passed.append(index)

    answer = raised(work)
    dist.barrier()
    return len(passed), answer


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_rank_that_fails_between_barriers_stops_all_at_the_next(ranks, after):
    answers = ranks.run(meet, 3, [1], after)
    assert answers[1] == (after, ("OSError", "[Errno 28] No space left: 'shard'"))
    said = "writing failed on rank 1: shard: No space left"
    assert [answers[rank] for rank in (0, 2, 3)] == [(after, ("ValueError", said))] * 3


def test_barriers_without_an_exception_let_all_ranks_pass(ranks):
    assert ranks.run(meet, 3, [], 0) == [(3, None)] * 4
