"""What is read of Megatron-core's distributed optimizer is what it steps."""

import pytest
import torch
from tiny_training import Case, make_batches, make_chunks, train_step
from upstream import Upstream, moved

from glm_rlhf.parallel.megatron_compat import distributed_optimizer as compat
from glm_rlhf.parallel.optim.in_backward import training_state
from glm_rlhf.parallel.optim.training_state import AdamSettings

OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
# A bf16 model with an fp32 value head has both kinds of groups.
CASE = Case(role="critic", dtype=torch.bfloat16, settings=AdamSettings(lr=0.1, clip_grad=0.0))


@pytest.fixture
def state(topology):
    return training_state(make_chunks(CASE, topology), CASE.settings, topology=topology)


def owners(state):
    """Each trained weight with the optimizer that has it."""
    optimizers = compat.sub_optimizers(state.optimizer)
    assert optimizers, moved(
        Upstream(patch="distributed_optimizer.sub_optimizers", symbol=OPTIMIZER), "is none"
    )
    for chunk in state.bare_chunks:
        for name, weight in chunk.named_weights():
            found = [one for one in optimizers if compat.owns_part_of(one, weight)]
            assert len(found) == 1, moved(
                Upstream(patch="distributed_optimizer.owns_part_of", symbol=OPTIMIZER), f"does not own {name}"
            )
            yield name, weight, found[0]


def test_main_weights_are_the_model_s_in_fp32_from_the_first_element_on(state):
    main = Upstream(patch="distributed_optimizer.main_weights", symbol=OPTIMIZER)
    first = Upstream(patch="distributed_optimizer.first_element", symbol=OPTIMIZER)
    kinds = set()
    for name, weight, optimizer in owners(state):
        values = compat.main_weights(optimizer)[weight]
        is_same = values.dtype is torch.float32 and torch.equal(values, weight.detach().float().view(-1))
        assert is_same, moved(main, f"has other values of {name}")
        assert compat.first_element(optimizer, weight) == 0, moved(first, f"begins elsewhere in {name}")
        kinds.add(weight.dtype)
    assert kinds == {torch.bfloat16, torch.float32}


def test_main_weights_are_copied_to_the_model(state):
    copy = Upstream(
        patch="distributed_optimizer.copy_main_weights_to_model",
        symbol=f"{OPTIMIZER}._copy_main_params_to_model_params",
    )
    for _, weight, optimizer in owners(state):
        compat.main_weights(optimizer)[weight].data.fill_(0.375)
    for optimizer in compat.sub_optimizers(state.optimizer):
        compat.copy_main_weights_to_model(optimizer)
    for name, weight, _ in owners(state):
        assert bool((weight == 0.375).all()), moved(copy, f"leaves {name} as it was")


def test_state_tensors_are_the_weights_that_are_stepped_and_two_moments_of_each(state, topology):
    train_step(CASE, state, make_batches(CASE, topology), topology)
    assert state.step().is_applied
    tensors = list(compat.state_tensors(state.optimizer))
    weights = [weight for _, weight, _ in owners(state)]
    expected = 3 * sum(weight.numel() for weight in weights)
    found = sum(tensor.numel() for tensor in tensors)
    upstream = Upstream(patch="distributed_optimizer.state_tensors", symbol=OPTIMIZER)
    assert found == expected, moved(upstream, f"keeps {found} numbers for {expected // 3} weights")
    assert {id(compat.main_weights(one)[weight]) for _, weight, one in owners(state)} <= set(map(id, tensors))
