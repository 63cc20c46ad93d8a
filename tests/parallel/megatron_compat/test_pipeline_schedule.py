"""Megatron-core's schedules call the replaced backward step, once per micro-batch, with what it takes."""

from megatron.core.pipeline_parallel import schedules
from tiny_training import Case, make_batches, make_chunks, train_step
from upstream import Upstream, moved

from glm_rlhf.parallel.megatron_compat.pipeline_schedule import around_backward_steps
from glm_rlhf.parallel.optim.in_backward import training_state

STEP = Upstream(
    patch="pipeline_schedule.around_backward_steps",
    symbol="megatron.core.pipeline_parallel.schedules:backward_step",
)


def test_each_micro_batch_comes_by_and_the_original_is_put_back(topology):
    case = Case()
    state = training_state(make_chunks(case, topology), case.settings, topology=topology)
    original, calls = schedules.backward_step, []

    def around(step, *arguments):
        calls.append(len(arguments))
        return step(*arguments)

    batches = make_batches(case, topology)
    with around_backward_steps(around):
        train_step(case, state, batches, topology)
    assert calls == [5] * len(batches), moved(STEP, f"is called with {calls} arguments")
    assert schedules.backward_step is original
    assert state.grad_norm() > 0


def test_what_it_returns_is_what_the_schedule_gets():
    with around_backward_steps(lambda step, *arguments: arguments):
        assert schedules.backward_step(1, 2) == (1, 2)
