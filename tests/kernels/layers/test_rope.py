"""Rotary embedding against transformers' GLM, rotation matrices and finite differences."""

import pytest
import torch
from kernel_device import DEVICE
from transformers import GlmConfig
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding, apply_rotary_pos_emb

from glm_rlhf.kernels.dispatch import launch
from glm_rlhf.kernels.layers.rope import rope, rope_qkv, rope_qkv_in_place, rope_table

IMPLEMENTATIONS = ["reference", "triton"]


def angles(num_tokens, num_pairs, seed=0, device=DEVICE):
    angle_TR = 6.3 * torch.rand(num_tokens, num_pairs, generator=torch.Generator().manual_seed(seed))
    return angle_TR.cos().to(device), angle_TR.sin().to(device)


def definition(heads_TNH, cos_TR, sin_TR):
    """Multiply every pair by its 2 × 2 rotation matrix."""
    rotation = torch.stack([cos_TR, -sin_TR, sin_TR, cos_TR], -1).unflatten(-1, (2, 2)).to(heads_TNH.dtype)
    rotary_size = 2 * cos_TR.shape[1]
    pairs = heads_TNH[..., :rotary_size].unflatten(-1, (-1, 2))
    turned = torch.einsum("trij,tnrj->tnri", rotation, pairs).flatten(-2)
    return torch.cat([turned, heads_TNH[..., rotary_size:]], -1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_transformers_glm_at_packed_positions(implementation):
    config = GlmConfig(
        hidden_size=64,
        num_attention_heads=4,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 5e3},
    )
    config.rope_parameters["partial_rotary_factor"] = 0.5
    positions_T = torch.tensor([0, 1, 2, 3, 0, 1, 0, 8191, 77])
    query_TNH, key_TNH = torch.randn(9, 4, 16), torch.randn(9, 2, 16)
    cos, sin = GlmRotaryEmbedding(config)(query_TNH, positions_T[None])
    expected = apply_rotary_pos_emb(query_TNH[None], key_TNH[None], cos, sin, unsqueeze_dim=2)

    cos_PR, sin_PR = rope_table(8192, 8, 5e3)
    with launch.forced(implementation):
        table = [angle_PR[positions_T].to(DEVICE) for angle_PR in (cos_PR, sin_PR)]
        rotated = [rope(heads.to(DEVICE), *table).cpu() for heads in (query_TNH, key_TNH)]
    for actual, expected_tensor in zip(rotated, expected, strict=True):
        # Products and one sum in fp32, perhaps fused: two roundings of numbers of size one.
        torch.testing.assert_close(actual, expected_tensor[0], rtol=0, atol=5e-7)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "num_tokens, num_heads, head_size, num_pairs",
    [(1, 1, 2, 1), (3, 5, 63, 31), (17, 16, 32, 8), (1000, 1, 8, 4), (9, 9, 12, 3), (5, 2, 6, 0)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradient_equal_the_rotation_matrices(
    num_tokens, num_heads, head_size, num_pairs, dtype, implementation
):
    cos_TR, sin_TR = angles(num_tokens, num_pairs)
    heads_TNH = torch.randn(num_tokens, num_heads, head_size).to(DEVICE, dtype).requires_grad_()
    grad_TNH = torch.randn(num_tokens, num_heads, head_size).to(DEVICE, dtype)
    with launch.forced(implementation):
        out_TNH = rope(heads_TNH, cos_TR, sin_TR)
        (d_heads_TNH,) = torch.autograd.grad(out_TNH, heads_TNH, grad_TNH)
    exact_input = heads_TNH.detach().double().requires_grad_()
    exact_TNH = definition(exact_input, cos_TR.double(), sin_TR.double())
    (exact_grad,) = torch.autograd.grad(exact_TNH, exact_input, grad_TNH.double())
    # fp32: two roundings. bf16: one, a truncation (2^-7) in Triton's interpreter.
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-6}
    torch.testing.assert_close(out_TNH.double(), exact_TNH, **tolerance)
    torch.testing.assert_close(d_heads_TNH.double(), exact_grad, **tolerance)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("num_groups, queries_per_group", [(1, 16), (2, 16), (3, 1)])
def test_packed_qkv_rotates_queries_and_keys_and_leaves_values(num_groups, queries_per_group, implementation):
    num_tokens, head_size, num_pairs = 11, 8, 2
    cos_TR, sin_TR = angles(num_tokens, num_pairs)
    mixed, grad = torch.randn(2, num_tokens, num_groups, queries_per_group + 2, head_size).to(DEVICE)
    mixed.requires_grad_()
    with launch.forced(implementation):
        out = rope_qkv(mixed, cos_TR, sin_TR)
        (d_mixed,) = torch.autograd.grad(out, mixed, grad)
    turned = definition(mixed.detach()[:, :, :-1].flatten(1, 2), cos_TR, sin_TR)
    # Two fp32 roundings of numbers of size one.
    torch.testing.assert_close(out[:, :, :-1].flatten(1, 2), turned, rtol=1e-6, atol=1e-6)
    assert torch.equal(out[:, :, -1], mixed[:, :, -1])
    turned_back = definition(grad[:, :, :-1].flatten(1, 2), cos_TR, -sin_TR)
    torch.testing.assert_close(d_mixed[:, :, :-1].flatten(1, 2), turned_back, rtol=1e-6, atol=1e-6)
    assert torch.equal(d_mixed[:, :, -1], grad[:, :, -1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_equals_out_of_place_with_gradients_through_the_projection(dtype, implementation):
    cos_TR, sin_TR = angles(7, 4)
    hidden_TD = torch.randn(7, 24).to(DEVICE, dtype)
    results = []
    for is_in_place in (False, True):
        weight_MD = torch.randn(2 * 5 * 16, 24, generator=torch.Generator().manual_seed(0))
        weight_MD = weight_MD.to(DEVICE, dtype).requires_grad_()
        mixed_TM = hidden_TD @ weight_MD.T
        with launch.forced(implementation):
            if is_in_place:
                out_TM = rope_qkv_in_place(mixed_TM, cos_TR, sin_TR, num_groups=2, head_size=16)
                assert out_TM.data_ptr() == mixed_TM.data_ptr()
            else:
                out_TM = rope_qkv(mixed_TM.view(7, 2, 5, 16), cos_TR, sin_TR)
            query, key_value = out_TM.view(7, 2, 5, 16).split([3, 2], dim=2)
            ((query.float() ** 2).sum() + (key_value.float() ** 3).sum()).backward()
        results.append((out_TM.detach().reshape(7, -1), weight_MD.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_in_place_without_autograd_writes_the_tensor_it_was_given(implementation):
    cos_TR, sin_TR = angles(3, 2)
    mixed_TM = torch.randn(3, 24).to(DEVICE)
    expected = rope_qkv(mixed_TM.view(3, 1, 6, 4), cos_TR, sin_TR)
    with launch.forced(implementation):
        rope_qkv_in_place(mixed_TM, cos_TR, sin_TR, num_groups=1, head_size=4)
    # The two implementations may fuse the product and the sum differently.
    torch.testing.assert_close(mixed_TM.view_as(expected), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_out_of_place_leaves_input_and_gradient_alone(implementation):
    cos_TR, sin_TR = angles(3, 2)
    heads_TNH, grad_TNH = torch.randn(2, 3, 2, 4).to(DEVICE)
    heads_TNH.requires_grad_()
    kept = heads_TNH.detach().clone(), grad_TNH.clone()
    with launch.forced(implementation):
        rope(heads_TNH, cos_TR, sin_TR).backward(grad_TNH)
    assert torch.equal(heads_TNH, kept[0])
    assert torch.equal(grad_TNH, kept[1])


def test_gradient_passes_finite_differences():
    cos_TR, sin_TR = angles(3, 2, device="cpu")
    heads_TNH = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda heads: rope(heads, cos_TR.double(), sin_TR.double()), heads_TNH)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_keeps_lengths_and_depends_on_relative_position_only(implementation):
    cos_PR, sin_PR = rope_table(64, 8, 1e4, device=DEVICE)
    query, key = torch.randn(2, 1, 1, 8).to(DEVICE).expand(2, 64, 1, 8)
    with launch.forced(implementation):
        query_P, key_P = rope(query, cos_PR, sin_PR)[:, 0], rope(key, cos_PR, sin_PR)[:, 0]
    # Rotations keep lengths; eight fp32 squares are summed.
    torch.testing.assert_close(query_P.norm(dim=-1), query[:, 0].norm(dim=-1), rtol=1e-5, atol=1e-6)
    scores = query_P @ key_P.T
    # The angles are rounded at size up to 64, hence 64 · 2^-24 in each.
    torch.testing.assert_close(scores[5, 2], scores[63, 60], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_same_inputs_give_the_same_bits_and_no_tokens_pass(implementation):
    cos_TR, sin_TR = angles(40, 8)
    heads_TNH = torch.randn(40, 7, 33).to(DEVICE)
    with launch.forced(implementation):
        assert torch.equal(rope(heads_TNH, cos_TR, sin_TR), rope(heads_TNH, cos_TR, sin_TR))
        assert rope(heads_TNH[:0], cos_TR[:0], sin_TR[:0]).shape == (0, 7, 33)


def test_wrong_shapes_are_named():
    cos_TR, sin_TR = angles(3, 2)
    with pytest.raises(ValueError, match="one row per token"):
        rope(torch.zeros(4, 1, 8, device=DEVICE), cos_TR, sin_TR)
    with pytest.raises(ValueError, match="do not fit a head"):
        rope(torch.zeros(3, 1, 3, device=DEVICE), cos_TR, sin_TR)
    with pytest.raises(ValueError, match="must be even"):
        rope_table(4, 7, 1e4)
    with pytest.raises(ValueError, match="contiguous"):
        rope_qkv_in_place(torch.zeros(24, 3, device=DEVICE).T, cos_TR, sin_TR, num_groups=1, head_size=4)
    with launch.forced("triton"), pytest.raises(ValueError, match="float64"):
        rope(torch.zeros(3, 1, 8, device=DEVICE).double(), cos_TR, sin_TR)
