"""The order in which a pipeline stage runs its passes and exchanges tensors, computed without ranks.

The order is 1F1B, or interleaved 1F1B (Narayanan et al. 2021, arXiv:2104.04473), as Megatron-core has it,
with the padding micro-batches that `multi_model` puts first. `stage_run` executes the actions of a stage,
`plan` simulates the same passes, and `deadlock` says whether the lists of all stages end.
"""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from glm_rlhf.parallel.spec.layout import Layout


@dataclass(frozen=True, slots=True)
class Pass:
    """One micro-batch through one model chunk."""

    kind: Literal["forward", "backward"]
    """Direction."""
    micro_batch: int
    """Index among the micro-batches that are run, padding first."""
    chunk: int
    """Index of the stage's model chunk."""


Tensor = Literal["activation", "gradient"]
"""What a forward pass gives to the next chunk, or a backward pass to the previous one."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """A tensor that a stage sends to another one or receives from it."""

    kind: Literal["send", "receive"]
    """Direction."""
    tensor: Tensor
    """Which of a pass's results."""
    micro_batch: int
    """Index among the micro-batches that are run, padding first."""
    chunk: int
    """Index of this stage's model chunk that gives or takes it."""
    peer: int
    """The other stage."""


_Queue = tuple[int, int, *tuple[str, ...]]
"""Of a stage: the peer, and what tells its messages from others."""

Action = Pass | Transfer
"""What a stage does next."""


def num_padding_micro_batches(layout: Layout, num_micro_batches: int) -> int:
    """Return how many padding micro-batches run first.

    One if there is no real one; when interleaved, as many as fill the last group of pp micro-batches.
    """
    group = layout.pp if layout.vpp > 1 else 1
    return -max(num_micro_batches, 1) % group + (num_micro_batches == 0)


def stage_order(
    layout: Layout, num_micro_batches: int, *, stage: int, forward_only: bool = False
) -> list[Pass]:
    """Return the passes of pipeline stage `stage`, padding included, in order.

    Args:
        layout: of the model.
        num_micro_batches: without padding.
        stage: 0 ≤ stage < pp.
        forward_only: no backward passes.
    """
    total = num_micro_batches + num_padding_micro_batches(layout, num_micro_batches)
    table = _table(layout, total)
    forwards = [Pass("forward", index, chunk) for index, chunk in table]
    if forward_only:
        return forwards
    backwards = [Pass("backward", index, layout.vpp - 1 - chunk) for index, chunk in table]
    num_first = min(len(table), _num_warm_up(layout, stage))
    steady = [item for pair in zip(forwards[num_first:], backwards, strict=False) for item in pair]
    return [*forwards[:num_first], *steady, *backwards[len(table) - num_first :]]


def stage_actions(
    layout: Layout, num_micro_batches: int, *, stage: int, forward_only: bool = False
) -> list[Action]:
    """Return all that pipeline stage `stage` does in a schedule, in order.

    A pass is preceded by the receive of its input and followed by the send of its result, where another stage
    has the neighbouring chunk. Arguments as of `stage_order`.
    """
    actions: list[Action] = []
    for one in stage_order(layout, num_micro_batches, stage=stage, forward_only=forward_only):
        tensor: Tensor = "activation" if one.kind == "forward" else "gradient"
        step = 1 if one.kind == "forward" else -1
        place = one.chunk * layout.pp + stage  # the chunk's number in the whole model
        at = (one.micro_batch, one.chunk)
        if layout.pp > 1 and 0 <= place - step < layout.pp * layout.vpp:
            actions.append(Transfer("receive", tensor, *at, (stage - step) % layout.pp))
        actions.append(one)
        if layout.pp > 1 and 0 <= place + step < layout.pp * layout.vpp:
            actions.append(Transfer("send", tensor, *at, (stage + step) % layout.pp))
    return actions


def deadlock(stages: Sequence[Sequence[Action]], *, one_stream_per_pair: bool = False) -> str | None:
    """Return where stages wait for each other if all of them run their actions in order; None if they end.

    Nothing is assumed of buffers: a message goes when both sides have come to it. A stage waits in a receive
    for its message, and before a send until the one before it to the same stage, of the same tensor, is gone.

    Args:
        stages: the actions of each stage.
        one_stream_per_pair: whether all messages between two stages, in both directions, go in the order of
            the calls, as NCCL has it for those of one group; otherwise those of each tensor and direction do.
    """
    queues: dict[_Queue, deque[Transfer]] = defaultdict(deque)

    def queue_of(stage: int, peer: int, tensor: str, kind: str) -> deque[Transfer]:
        return queues[stage, peer, *(() if one_stream_per_pair else (tensor, kind))]

    position = [0] * len(stages)
    has_moved = True
    while has_moved:
        has_moved = False
        for stage, actions in enumerate(stages):
            while position[stage] < len(actions) and not _waits(queues, stage, actions[position[stage]]):
                action = actions[position[stage]]
                if isinstance(action, Transfer):
                    queue_of(stage, action.peer, action.tensor, action.kind).append(action)
                position[stage] += 1
                has_moved = True
        for (stage, *_), queue in list(queues.items()):
            while queue and queue[0].kind == "send":
                sent = queue[0]
                others = queue_of(sent.peer, stage, sent.tensor, "receive")
                if not others or (others[0].kind, others[0].tensor) != ("receive", sent.tensor):
                    break
                if _source(others[0], len(stages), sent.peer) != (sent.micro_batch, sent.chunk):
                    return f"stage {sent.peer} gets what {sent} of stage {stage} sends for {others[0]}"
                queue.popleft()
                others.popleft()
                has_moved = True
    ended = all(at == len(actions) for at, actions in zip(position, stages, strict=True))
    if ended and not any(queues.values()):
        return None
    open_messages = [f"stage {key[0]}: {queue[0]}" for key, queue in queues.items() if queue]
    return f"stages wait for each other: {'; '.join(open_messages)}"


def _waits(queues: Mapping[_Queue, Sequence[Transfer]], stage: int, action: Action) -> bool:
    """Return whether a stage waits for an earlier message before it begins an action."""
    for (owner, *_), queue in queues.items():
        for earlier in queue if owner == stage else ():
            if earlier.kind == "receive":
                return True
            if isinstance(action, Transfer) and (action.kind, action.peer, action.tensor) == (
                "send",
                earlier.peer,
                earlier.tensor,
            ):
                return True
    return False


def _source(action: Transfer, num_stages: int, stage: int) -> tuple[int, int]:
    """Return (micro-batch, the sender's chunk) of what a receive is to take."""
    step = 1 if action.tensor == "activation" else -1
    return action.micro_batch, (action.chunk * num_stages + stage - step) // num_stages


def num_in_flight(layout: Layout, num_micro_batches: int, *, stage: int) -> int:
    """Return the largest number of forward passes that wait for their backward on a stage."""
    total = (num_micro_batches + num_padding_micro_batches(layout, num_micro_batches)) * layout.vpp
    return min(total, _num_warm_up(layout, stage) + 1)


def _num_warm_up(layout: Layout, stage: int) -> int:
    """Return the number of forward passes before the first 1F1B pair."""
    num_later_stages = layout.pp - stage - 1
    return num_later_stages if layout.vpp == 1 else 2 * num_later_stages + (layout.vpp - 1) * layout.pp


def _table(layout: Layout, total: int) -> list[tuple[int, int]]:
    """Return (micro-batch, chunk) in the order of forward passes: groups of pp, one chunk after another."""
    group = layout.pp if layout.vpp > 1 else max(total, 1)
    return [
        (index, chunk)
        for first in range(0, total, group)
        for chunk in range(layout.vpp)
        for index in range(first, min(first + group, total))
    ]
