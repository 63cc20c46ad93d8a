"""AdamW over many tensors: the bits of torch on the reference path, no lost bf16 update, one launch."""

import math
import sys

import pytest
import torch
from kernel_device import DEVICE

from glm_rlhf.kernels.adam.adamw import AdamWTable, adamw, join_master, split_master
from glm_rlhf.kernels.adam.tensor_table import CHUNK_ELEMENTS
from glm_rlhf.kernels.dispatch.launch import forced

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["reference", "triton"])
KINDS = pytest.mark.parametrize("is_split", [True, False], ids=["bf16", "fp32"])
SHAPES = [(3,), (1,), (0,), (63,), (1000,), (7, 13), (CHUNK_ELEMENTS + 1,), (2, CHUNK_ELEMENTS)]
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "epsilon": 1e-8, "weight_decay": 0.1}


def bits(tensor):
    return tensor.contiguous().view(torch.int32)


def masters(seed=0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]


def gradients(seed, dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(1000 + seed)
    return [torch.randn(shape, generator=generator).to(dtype).to(DEVICE) for shape in shapes]


def table_of(tensors, *, is_split):
    """Return a table that starts from the masters given, with zero moments."""
    weights, remainders = [tensor.clone() for tensor in tensors], None
    if is_split:
        weights, remainders = map(list, zip(*map(split_master, tensors), strict=True))
    return AdamWTable(
        weights=weights,
        remainders=remainders,
        first_moments=[torch.zeros_like(tensor) for tensor in tensors],
        second_moments=[torch.zeros_like(tensor) for tensor in tensors],
    )


def masters_of(table):
    if table.remainders is None:
        return table.weights
    return [join_master(w, r) for w, r in zip(table.weights, table.remainders, strict=True)]


def torch_adamw(tensors, steps, *, clip_factor=None, dtype=torch.float32):
    """Return the parameters after torch.optim.AdamW on gradients(step) for each step."""
    parameters = [torch.nn.Parameter(tensor.to(dtype).clone()) for tensor in tensors]
    optimizer = torch.optim.AdamW(
        parameters, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False
    )
    for step in range(1, steps + 1):
        for parameter, gradient in zip(parameters, gradients(step), strict=True):
            gradient = gradient.to(parameter.device, dtype)
            parameter.grad = gradient if clip_factor is None else gradient * clip_factor
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def special_values():
    """Return masters around every corner of the split: ties, denormals, infinities, the largest numbers."""
    patterns = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x10000, 0x3F800000, 0x3F808000, 0x3F818000]
    patterns += [0x3F807FFF, 0x3F808001, 0x7F7FFFFF, 0x7F7F7FFF, 0x7F7F8000, 0x7F800000, 0x007FFFFF]
    positive = torch.tensor(patterns, dtype=torch.int32)
    return torch.cat((positive, positive + torch.iinfo(torch.int32).min)).view(torch.float32)


def random_patterns():
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32)
    return patterns.view(torch.float32)


@pytest.mark.parametrize("source", [special_values, random_patterns])
def test_split_and_join_keep_every_bit_of_numbers(source):
    master = source()
    weight, remainder = split_master(master)
    joined = join_master(weight, remainder)
    is_number = ~master.isnan()
    assert torch.equal(bits(joined)[is_number], bits(master)[is_number])
    assert joined[~is_number].isnan().all()
    assert weight[~is_number].isnan().all()  # a NaN must not hide behind a weight that is a number


def test_split_weight_is_the_nearest_bf16():
    master = torch.cat((special_values(), random_patterns()))
    master = master[master.isfinite()]
    weight, _ = split_master(master)
    rounded = master.to(torch.bfloat16)
    is_tie = (bits(master) & 0xFFFF) == 0x8000
    assert is_tie.any()
    assert torch.equal(weight[~is_tie].view(torch.int16), rounded[~is_tie].view(torch.int16))
    # A tie is as near to either neighbour; here it goes away from zero, in torch to the even one.
    assert (weight[is_tie].abs().double() >= master[is_tie].abs().double()).all()


def test_split_refuses_other_dtypes():
    with pytest.raises(ValueError, match=r"required is torch\.float32"):
        split_master(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"required are torch.bfloat16 and torch.int16"):
        join_master(torch.zeros(3), torch.zeros(3, dtype=torch.int16))


@KINDS
def test_reference_gives_the_bits_of_torch(is_split):
    """On the host: torch's own fused multiply-adds differ between devices."""
    start = [tensor.cpu() for tensor in masters()]
    table = table_of(start, is_split=is_split)
    with forced("reference"):
        for step in range(1, 8):
            adamw(table, [gradient.cpu() for gradient in gradients(step)], step=step, **OPTIONS)
    expected = torch_adamw(start, 7)
    for actual, wanted in zip(masters_of(table), expected, strict=True):
        assert torch.equal(bits(actual), bits(wanted))


@KINDS
@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16])
def test_kernel_equals_the_reference_to_roundings(is_split, gradient_dtype):
    tables = {name: table_of(masters(), is_split=is_split) for name in ("reference", "triton")}
    for implementation, table in tables.items():
        with forced(implementation):
            for step in range(1, 4):
                adamw(table, gradients(step, gradient_dtype), step=step, **OPTIONS)
    pairs = [
        *zip(masters_of(tables["triton"]), masters_of(tables["reference"]), strict=True),
        *zip(tables["triton"].first_moments, tables["reference"].first_moments, strict=True),
        *zip(tables["triton"].second_moments, tables["reference"].second_moments, strict=True),
    ]
    for actual, wanted in pairs:
        # A few fp32 roundings (2⁻²⁴ = 6e-8) of terms up to 1: absolute where they cancel.
        torch.testing.assert_close(actual, wanted, rtol=3e-7, atol=1e-7)


@KINDS
def test_kernel_equals_torch_in_fp64(is_split):
    start = masters()
    table = table_of(start, is_split=is_split)
    with forced("triton"):
        for step in range(1, 4):
            adamw(table, gradients(step), step=step, **OPTIONS)
    for actual, wanted in zip(masters_of(table), torch_adamw(start, 3, dtype=torch.float64), strict=True):
        # Three steps of fp32 roundings.
        torch.testing.assert_close(actual.double(), wanted, rtol=5e-7, atol=2e-7)


@IMPLEMENTATIONS
def test_hand_worked_first_step(implementation):
    """First step: m̂ = g, v̂ = g², so θ = 1 · (1 - 0.1 · 0.5) - 0.1 · 2 / (2 + ε) = 0.85."""
    table = table_of([torch.tensor([1.0], device=DEVICE)], is_split=False)
    with forced(implementation):
        adamw(
            table,
            [torch.tensor([2.0], device=DEVICE)],
            step=1,
            lr=0.1,
            betas=(0.9, 0.95),
            epsilon=1e-12,
            weight_decay=0.5,
        )
    assert table.weights[0].item() == pytest.approx(0.85, rel=3e-7)
    assert table.first_moments[0].item() == pytest.approx(0.2, rel=3e-7)
    assert table.second_moments[0].item() == pytest.approx(0.2, rel=3e-7)


@pytest.mark.parametrize("implementation, num_steps", [("reference", 1000), ("triton", 40)])
def test_tiny_updates_are_not_lost(implementation, num_steps):
    """Each step moves a weight near 1 by 2e-6, a 2000th of its bf16 spacing; rounding would stop them all."""
    start = torch.linspace(1.0, 1.9, 256, device=DEVICE)
    start = start.to(torch.bfloat16).float()
    table = table_of([start], is_split=True)
    plain = table_of([start], is_split=False)
    gradient = torch.ones(256, device=DEVICE)
    with forced(implementation):
        for step in range(1, num_steps + 1):
            for each in (table, plain):
                adamw(each, [gradient], step=step, lr=2e-6, betas=(0.9, 0.95))
    moved = start - masters_of(table)[0]
    # Every step is lr · m̂ / √v̂ = lr; the fp32 master rounds each by up to 6e-8.
    torch.testing.assert_close(moved, torch.full_like(moved, 2e-6 * num_steps), rtol=0.05, atol=0)
    assert torch.equal(bits(masters_of(table)[0]), bits(plain.weights[0]))
    rounded = start.to(torch.bfloat16) - 2e-6
    assert torch.equal(rounded.to(torch.bfloat16), start.to(torch.bfloat16))
    if num_steps == 1000:
        assert (table.weights[0].float() < start).any()


@IMPLEMENTATIONS
@KINDS
def test_clip_factor_scales_the_gradient(implementation, is_split):
    factor = torch.tensor(0.25, device=DEVICE)  # a power of two: scaling before or after gives the same bits
    clipped, scaled = (table_of(masters(), is_split=is_split) for _ in range(2))
    with forced(implementation):
        adamw(clipped, gradients(1), step=1, clip_factor=factor, **OPTIONS)
        adamw(scaled, [gradient * factor for gradient in gradients(1)], step=1, **OPTIONS)
    for left, right in zip(masters_of(clipped), masters_of(scaled), strict=True):
        assert torch.equal(left, right)
    assert not torch.equal(clipped.first_moments[3], 0.1 * gradients(1)[3])


@IMPLEMENTATIONS
@KINDS
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_nonfinite_clip_factor_changes_nothing(implementation, is_split, factor):
    table = table_of(masters(), is_split=is_split)
    poisoned = [torch.full_like(gradient, math.nan) for gradient in gradients(1)]
    with forced(implementation):
        adamw(table, poisoned, step=1, clip_factor=torch.tensor(factor, device=DEVICE), **OPTIONS)
    for actual, start in zip(masters_of(table), masters(), strict=True):
        assert torch.equal(bits(actual), bits(start))
    assert all((moment == 0).all() for moment in table.first_moments + table.second_moments)


@IMPLEMENTATIONS
def test_nan_gradient_shows_in_weight_and_master(implementation):
    """0x7FFFFFFF is the NaN that a GPU makes: rounded up as a number is, it would become minus zero."""
    table = table_of(masters(), is_split=True)
    bad = gradients(1)
    bad[4][17] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    with forced(implementation):
        adamw(table, bad, step=1, **OPTIONS)
    assert table.weights[4][17].isnan()
    assert masters_of(table)[4][17].isnan()
    assert sum(int(weight.isnan().sum()) for weight in table.weights) == 1


def test_all_tensors_take_one_launch(monkeypatch):
    """500 tensors, a few of them empty: counted at the only place that launches."""
    shapes = [(size % 7,) for size in range(500)]
    launches = []

    class CountingKernel:
        def __getitem__(self, grid):
            launches.append(grid)
            return lambda *arguments, **options: None

    monkeypatch.setattr(sys.modules[adamw.__module__], "_adamw_kernel", CountingKernel())
    with forced("triton"):
        adamw(table_of(masters(shapes=shapes), is_split=True), gradients(1, shapes=shapes), step=1, **OPTIONS)
    assert launches == [(sum(size % 7 > 0 for size in range(500)),)]


def test_moved_storage_is_found_again():
    """Offloading gives weights and moments new storage; the table must not write to the old one."""
    tables = [table_of(masters(), is_split=True) for _ in range(2)]
    with forced("triton"):
        for table in tables:
            adamw(table, gradients(1), step=1, **OPTIONS)
        old = [weight.data for weight in tables[1].weights]
        before = [weight.clone() for weight in old]
        for tensor in tables[1].weights + tables[1].remainders + tables[1].first_moments:
            tensor.data = tensor.data.clone()
        for table in tables:
            adamw(table, gradients(2), step=2, **OPTIONS)
    for left, right in zip(masters_of(tables[0]), masters_of(tables[1]), strict=True):
        assert torch.equal(left, right)
    for weight, kept in zip(old, before, strict=True):
        assert torch.equal(weight, kept)


@KINDS
def test_views_at_odd_addresses_are_updated_and_their_neighbours_are_not(is_split):
    """Shards of a flat buffer need not start at a multiple of 16 bytes."""
    size = 1500
    start = torch.randn(size, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    aligned = table_of([start], is_split=is_split)
    buffers = {
        name: torch.cat((column.new_full((3,), 7), column, column.new_full((5,), 7)))
        for name, column in (
            ("weights", aligned.weights[0]),
            ("remainders", aligned.remainders[0] if is_split else torch.zeros(size, device=DEVICE)),
            ("first_moments", aligned.first_moments[0]),
            ("second_moments", aligned.second_moments[0]),
        )
    }
    views = {name: [buffer[3 : 3 + size]] for name, buffer in buffers.items()}
    if not is_split:
        views["remainders"] = None
    table = AdamWTable(**views)
    gradient = gradients(1, shapes=[(size,)])
    with forced("triton"):
        adamw(table, gradient, step=1, **OPTIONS)
        adamw(aligned, gradient, step=1, **OPTIONS)
    assert torch.equal(masters_of(table)[0], masters_of(aligned)[0])
    for buffer in buffers.values():
        assert (buffer[:3] == 7).all()
        assert (buffer[-5:] == 7).all()


def test_parameters_that_require_gradients_are_updated_in_place():
    parameter = torch.nn.Parameter(torch.ones(4, device=DEVICE))
    address = parameter.data_ptr()
    table = AdamWTable(
        weights=[parameter],
        first_moments=[torch.zeros(4, device=DEVICE)],
        second_moments=[torch.zeros(4, device=DEVICE)],
    )
    adamw(table, [torch.ones(4, device=DEVICE)], step=1, lr=0.5, betas=(0.9, 0.95))
    assert parameter.data_ptr() == address
    assert parameter.detach().tolist() == pytest.approx([0.5] * 4)


def test_kernel_gives_the_same_bits_again():
    tables = [table_of(masters(), is_split=True) for _ in range(2)]
    with forced("triton"):
        for table in tables:
            adamw(table, gradients(1), step=1, **OPTIONS)
    for left, right in zip(masters_of(tables[0]), masters_of(tables[1]), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"step": 0}, "step is 0"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] is 1.0"),
        ({"epsilon": 0.0}, "epsilon is 0.0"),
        ({"weight_decay": math.nan}, "weight_decay is nan"),
        ({"clip_factor": torch.ones(2)}, r"clip_factor has shape \(2,\)"),
        ({"gradients": []}, "gradients has 0 tensors, required are 1"),
        ({"gradients": [torch.zeros(3)]}, r"gradients\[0\] has shape \(3,\), required is \(4,\)"),
        ({"gradients": [torch.zeros(4).half()]}, r"gradients\[0\] is torch.float16"),
        ({"gradients": [torch.zeros(8)[::2]]}, r"gradients\[0\] is not contiguous"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    table = AdamWTable(
        weights=[torch.zeros(4)], first_moments=[torch.zeros(4)], second_moments=[torch.zeros(4)]
    )
    arguments = {"gradients": [torch.zeros(4)], "step": 1} | OPTIONS | change
    with pytest.raises(ValueError, match=message):
        adamw(table, **arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weights": [torch.zeros(4).half()]}, r"weights\[0\] is torch.float16, required is torch.bfloat16"),
        ({"weights": [torch.zeros(4)]}, r"weights\[0\] is torch.float32, required is torch.bfloat16"),
        ({"remainders": None}, r"weights\[0\] is torch.bfloat16, required is torch.float32"),
        ({"remainders": [torch.zeros(4)]}, r"remainders\[0\] is torch.float32, required is torch.int16"),
        ({"first_moments": []}, "first_moments has 0 tensors, required are 1"),
        ({"second_moments": [torch.zeros(4).bfloat16()]}, r"second_moments\[0\] is torch.bfloat16"),
    ],
)
def test_bad_tables_are_refused(change, message):
    tensors = {
        "weights": [torch.zeros(4).bfloat16()],
        "remainders": [torch.zeros(4, dtype=torch.int16)],
        "first_moments": [torch.zeros(4)],
        "second_moments": [torch.zeros(4)],
    }
    with pytest.raises(ValueError, match=message):
        AdamWTable(**(tensors | change))
