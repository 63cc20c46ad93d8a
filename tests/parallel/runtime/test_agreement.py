"""Ranks that were not started alike are refused, by all of them and in the same words."""

import torch.distributed as dist

from glm_rlhf.parallel.runtime.agreement import Content, check_ranks_agree


def said(values=None, places=None, digests=None):
    """What each rank raises, or None; each argument lists one entry a rank."""
    rank = dist.get_rank()
    read = []

    def digest():
        read.append(rank)
        return digests[rank]

    contents = {} if places is None else {"data.path": Content(place=places[rank], digest=digest)}
    try:
        check_ranks_agree({} if values is None else values[rank], contents)
    except ValueError as error:
        return str(error), read
    return None, read


def reported(answers):
    messages = {message for message, _ in answers}
    assert len(messages) == 1, messages
    return messages.pop()


def test_equal_ranks_continue_and_one_reads_what_they_share(ranks):
    answers = ranks.run(
        said, [{"optimizer.lr": "0.1"}] * 4, ["/data/a", "/data/a", "/data/b", "/data/a"], ["d"] * 4
    )
    assert answers == [(None, [0]), (None, []), (None, [2]), (None, [])]


def test_a_rank_with_another_value_is_named_by_all(ranks):
    values = [{"run.seed": "1", "train.lr": lr} for lr in ("0.1", "0.1", "0.2", "0.1")]
    assert reported(ranks.run(said, values)) == (
        "train.lr is 0.2 on rank 2 and 0.1 on rank 0 and 2 more: every rank of a launch has to be "
        "started alike"
    )


def test_the_first_rank_is_named_where_it_is_the_odd_one(ranks):
    message = reported(ranks.run(said, [{"run.seed": seed} for seed in "7111"]))
    assert message.startswith("run.seed is 7 on rank 0 and 1 on rank 1 and 2 more:")


def test_a_value_that_a_rank_lacks_differs(ranks):
    message = reported(ranks.run(said, [{"a": "1"}, {"a": "1"}, {"a": "1"}, {}]))
    assert message.startswith("a is absent on rank 3 and 1 on rank 0 and 2 more:")


def test_half_of_the_ranks_with_another_value_are_named_by_their_first(ranks):
    message = reported(ranks.run(said, [{"a": value} for value in "1122"]))
    assert message.startswith("a is 2 on rank 2 and 1 more and 1 on rank 0 and 1 more:")


def test_other_content_is_named_by_its_place(ranks):
    message = reported(ranks.run(said, None, ["/a", "/a", "/a", "/mnt/b"], ["d", "d", "d", "e"]))
    assert message.startswith(
        "data.path holds something else on rank 3 (/mnt/b) than on rank 0 and 2 more (/a):"
    )
