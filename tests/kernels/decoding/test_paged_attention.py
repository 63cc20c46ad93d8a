"""Paged attention against a loop over sequences in float64."""

import pytest
import torch
from kernel_device import DEVICE

from glm_rlhf.kernels.decoding.paged_attention import paged_attention
from glm_rlhf.kernels.dispatch import launch

IMPLEMENTATIONS = ["reference", "triton"]
# fp32: sums of up to a thousand terms and exponentials of a few ulp. fp16: one rounding of the output and, in
# the kernel on a GPU, one of the weights. bf16: the same, truncations (2^-7) in Triton's interpreter.
TOLERANCES = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-6},
    torch.float16: {"rtol": 2**-9, "atol": 2**-9},
    torch.bfloat16: {"rtol": 2**-6, "atol": 2**-6},
}


class Pool:
    """A pool of shuffled pages with NaN wherever no sequence has written."""

    def __init__(
        self, lengths, *, num_kv_heads, head_size, page_size, dtype=torch.float32, seed=0, spare_pages=1
    ):
        generator = torch.Generator().manual_seed(seed)
        pages_of = [-(-length // page_size) for length in lengths]
        num_pages = sum(pages_of) + 3
        shape = (num_pages, page_size, num_kv_heads, head_size)
        self.keys, self.values = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
        shuffled = torch.randperm(num_pages, generator=generator).tolist()
        # Entries past the length are garbage, outside the pool on purpose.
        self.table = torch.full((len(lengths), max(pages_of) + spare_pages), 10**8, dtype=torch.int32)
        self.sequences = []
        for row, length in enumerate(lengths):
            key, value = torch.randn(2, length, num_kv_heads, head_size, generator=generator)
            pages = [shuffled.pop() for _ in range(pages_of[row])]
            self.table[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
            for position in range(length):
                self.keys[pages[position // page_size], position % page_size] = key[position]
                self.values[pages[position // page_size], position % page_size] = value[position]
            self.sequences.append((key.to(dtype), value.to(dtype)))
        self.keys, self.values = self.keys.to(DEVICE, dtype), self.values.to(DEVICE, dtype)
        self.table = self.table.to(DEVICE)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)

    def attention(self, query, **options):
        return paged_attention(query, self.keys, self.values, self.table, self.lengths, **options)

    def definition(self, query_BQNH, scale):
        """Softmax attention in float64, one sequence, token and head at a time; on the CPU."""
        query_BQNH = query_BQNH.cpu()
        out = torch.zeros(query_BQNH.shape, dtype=torch.float64)
        group = query_BQNH.shape[2] // self.keys.shape[2]
        for row, (key, value) in enumerate(self.sequences):
            for new in range(query_BQNH.shape[1]):
                num_visible = max(0, len(key) - query_BQNH.shape[1] + new + 1)
                for head in range(query_BQNH.shape[2] if num_visible else 0):
                    visible_key = key[:num_visible, head // group].double()
                    weights = (visible_key @ query_BQNH[row, new, head].double() * scale).softmax(0)
                    out[row, new, head] = weights @ value[:num_visible, head // group].double()
        return out


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize(
    "lengths, num_new, heads, head_size, page_size",
    [
        ([1], 1, (1, 1), 1, 16),
        ([63, 3, 1000, 17], 1, (32, 2), 16, 16),
        ([512, 513, 511, 1], 1, (4, 1), 63, 64),
        ([5, 600, 64], 3, (6, 3), 32, 37),
        ([130, 70], 19, (8, 1), 20, 256),
    ],
)
def test_equals_the_float64_definition(lengths, num_new, heads, head_size, page_size, dtype, implementation):
    pool = Pool(lengths, num_kv_heads=heads[1], head_size=head_size, page_size=page_size, dtype=dtype)
    query = torch.randn(len(lengths), num_new, heads[0], head_size).to(DEVICE, dtype)
    with launch.forced(implementation):
        out = pool.attention(query)
    assert out.dtype == dtype
    expected = pool.definition(query, head_size**-0.5)
    torch.testing.assert_close(out.double().cpu(), expected, **TOLERANCES[dtype])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("spare_pages", [0, 40])
def test_sequences_shorter_than_the_new_tokens_give_zeros_for_the_missing(spare_pages, implementation):
    pool = Pool([0, 2, 0, 7], num_kv_heads=2, head_size=8, page_size=16, spare_pages=spare_pages)
    query = torch.randn(4, 4, 4, 8).to(DEVICE)
    with launch.forced(implementation):
        out = pool.attention(query).cpu()
    expected = pool.definition(query, 8**-0.5)
    assert torch.equal(out[[0, 2]], torch.zeros(2, 4, 4, 8))
    assert torch.equal(out[1, :2], torch.zeros(2, 4, 8))
    torch.testing.assert_close(out.double(), expected, **TOLERANCES[torch.float32])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_new_token_may_leave_out_its_dimension_and_the_scale_is_used(implementation):
    pool = Pool([20, 9], num_kv_heads=1, head_size=16, page_size=16)
    query = torch.randn(2, 4, 16).to(DEVICE)
    with launch.forced(implementation):
        out = pool.attention(query, scale=0.7)
    expected = pool.definition(query[:, None], 0.7)[:, 0]
    torch.testing.assert_close(out.double().cpu(), expected, **TOLERANCES[torch.float32])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_huge_scores_neither_overflow_nor_give_nan(implementation):
    pool = Pool([40, 700], num_kv_heads=1, head_size=16, page_size=16)
    query = 1e4 * torch.randn(2, 1, 4, 16).to(DEVICE)
    with launch.forced(implementation):
        out = pool.attention(query)
    # Scores of 1e4 carry an error of 1e-3 in fp32, and the weights the same relative error.
    torch.testing.assert_close(out.double().cpu(), pool.definition(query, 0.25), rtol=1e-2, atol=1e-2)


def test_kernel_gives_a_sequence_the_same_bits_in_any_batch_and_under_any_table_width():
    lengths = [700, 3, 1300, 512]
    pool = Pool(lengths, num_kv_heads=2, head_size=16, page_size=64)
    query = torch.randn(4, 1, 4, 16).to(DEVICE)
    with launch.forced("triton"):
        together = pool.attention(query)
        assert torch.equal(together, pool.attention(query))
        for row in range(4):
            num_pages = -(-lengths[row] // 64)
            alone = paged_attention(
                query[row : row + 1],
                pool.keys,
                pool.values,
                pool.table[row : row + 1, :num_pages].contiguous(),
                pool.lengths[row : row + 1],
            )
            assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_new_tokens_together_equal_one_after_the_other(implementation):
    pool = Pool([30, 12], num_kv_heads=2, head_size=16, page_size=16)
    query = torch.randn(2, 3, 4, 16).to(DEVICE)
    with launch.forced(implementation):
        together = pool.attention(query)
        for new in range(3):
            lengths = pool.lengths - 2 + new
            alone = paged_attention(query[:, new].contiguous(), pool.keys, pool.values, pool.table, lengths)
            # The same sums over another number of keys, hence in another order.
            torch.testing.assert_close(alone, together[:, new], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_empty_batch_and_batch_of_empty_sequences(implementation):
    pool = Pool([4], num_kv_heads=1, head_size=16, page_size=16)
    with launch.forced(implementation):
        no_query = torch.empty(0, 2, 16, device=DEVICE)
        out = paged_attention(no_query, pool.keys, pool.values, pool.table[:0], pool.lengths[:0])
        empty = Pool([0, 0], num_kv_heads=1, head_size=16, page_size=16)
        nothing = empty.attention(torch.randn(2, 2, 16).to(DEVICE))
    assert out.shape == (0, 2, 16)
    assert torch.equal(nothing, torch.zeros_like(nothing))
    assert nothing.shape == (2, 2, 16)


def test_wrong_arguments_are_named():
    pool = Pool([4], num_kv_heads=2, head_size=16, page_size=16)
    query = torch.zeros(1, 4, 16, device=DEVICE)
    with pytest.raises(ValueError, match="multiple of key heads"):
        pool.attention(torch.zeros(1, 3, 16, device=DEVICE))
    with pytest.raises(ValueError, match="use one dtype"):
        pool.attention(query.bfloat16())
    with pytest.raises(ValueError, match="int32"):
        paged_attention(query, pool.keys, pool.values, pool.table.long(), pool.lengths)
    with pytest.raises(ValueError, match="a batch of 1 needs"):
        paged_attention(query, pool.keys, pool.values, pool.table, pool.lengths.repeat(2))
    with pytest.raises(ValueError, match="contiguous"):
        paged_attention(query, pool.keys[::2], pool.values[::2], pool.table, pool.lengths)
