"""Torch and kernel operations between a layer's matrix products agree."""

import pytest
import torch

from glm_rlhf.kernels.dispatch.launch import forced
from glm_rlhf.kernels.layers.rope import rope_table
from glm_rlhf.parallel.inference.layer_ops import KernelOps, TorchOps, layer_ops
from glm_rlhf.parallel.inference.step_inputs import PinnedInputs, decode_batch, decode_shapes

PAGE_SIZE, NUM_PAGES, K, G, H, D = 4, 9, 2, 3, 8, 16
EPSILON = 1e-5


def make_batch(lengths, num_padding_micro_batches):
    """Decoding sequences on separate pages, and padding rows."""
    width = max(-(-length // PAGE_SIZE) for length in lengths)
    numbers = PinnedInputs(decode_shapes(len(lengths) + num_padding_micro_batches, width))
    tokens, positions, slots, _, _, held, table = numbers.arrays
    slots[:] = -1
    first = 0
    for row, length in enumerate(lengths):
        count = -(-length // PAGE_SIZE)
        table[row, :count] = range(first, first + count)
        first += count
        tokens[row], positions[row], held[row] = row, length - 1, length
        slots[row] = table[row, count - 1] * PAGE_SIZE + (length - 1) % PAGE_SIZE
    return decode_batch(numbers.to(torch.device("cpu")))


def outputs(batch, dtype, implementation):
    """The result of every operation, by name."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    num_rows = len(batch.tokens_T)
    table = rope_table(40, H // 2, 1e4)
    with forced(implementation), torch.inference_mode():
        ops = layer_ops(batch, table, page_size=PAGE_SIZE, epsilon=EPSILON)
        assert isinstance(ops, KernelOps if implementation == "triton" else TorchOps)
        found = {"norm": ops.norm(random(num_rows, D), random(D))}
        found["add_norm"], found["sum"] = ops.add_norm(random(num_rows, D), random(num_rows, D), random(D))
        found["gate"] = ops.gate(random(num_rows, 2 * D))
        heads = random(num_rows, K, G + 2, H)
        found["heads"] = heads.clone()
        ops.rotate(heads)
        found["rotated"] = heads
        pools = random(2, NUM_PAGES, PAGE_SIZE, K, H)
        found["old keys"] = pools[0].clone()
        ops.write(heads, pools)
        found["keys"], found["values"] = pools.unbind(0)
        found["context"] = ops.attend(heads[:, :, :-2], pools)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths, num_padding_micro_batches", [((5, 1, 12), 0), ((5, 1, 12), 5), ((7,), 1)])
def test_torch_and_kernels_agree(dtype, lengths, num_padding_micro_batches):
    batch = make_batch(lengths, num_padding_micro_batches)
    expected, found = outputs(batch, dtype, "triton"), outputs(batch, dtype, "reference")
    # fp32 sums in another order; bf16: one rounding, which the interpreter takes as truncation (2^-7).
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 2**-6}
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype == dtype
        torch.testing.assert_close(found[name], tensor, **tolerance, msg=lambda text, name=name: name + text)
    assert not found["context"][len(lengths) :].any(), "rows that fill up see nothing"


def test_values_are_not_rotated_and_other_slots_not_written():
    batch = make_batch((5, 1, 12), 3)
    found = outputs(batch, torch.float32, "reference")
    assert torch.equal(found["rotated"][:, :, -1], found["heads"][:, :, -1])
    assert not torch.equal(found["rotated"][:, :, -2], found["heads"][:, :, -2])
    is_changed = (found["keys"] != found["old keys"]).flatten(2).any(-1).flatten()
    assert set(is_changed.nonzero().flatten().tolist()) == set(batch.slots_T.tolist()) - {-1}
