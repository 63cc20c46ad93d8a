"""A loss with its gradients in one pass over the head: chunks, products, memory, backward."""

import nearest_bf16
import pytest
import torch
from peak_memory import peak_bytes
from policy_sweep import EVERYTHING, PLAIN, by_sweep, counted, ppo_inputs
from vocabulary_definition import relative

from glm_rlhf.kernels.dispatch.launch import forced
from glm_rlhf.kernels.lm_head import linear_loss as sweep
from glm_rlhf.kernels.lm_head import reference_linear_loss as reference
from glm_rlhf.kernels.lm_head import vocab_head
from glm_rlhf.kernels.lm_head.linear_ppo_loss import linear_ppo_loss

both = pytest.mark.parametrize("implementation", ["reference", "triton"])


@pytest.fixture(autouse=True)
def round_to_nearest(monkeypatch):
    nearest_bf16.install(monkeypatch)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_chunks_give_what_one_gives(implementation, dtype, monkeypatch):
    inputs = ppo_inputs(400, 300, 24, dtype, EVERYTHING)
    with forced(implementation):
        whole_loss, whole_statistics, whole = by_sweep(*inputs)
        monkeypatch.setattr(vocab_head, "CHUNK_BYTES", 128 * 300 * dtype.itemsize)
        monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 128 * 300)
        calls = []
        monkeypatch.setattr(sweep, "_row_gradients", counted(sweep._row_gradients, calls))
        loss, statistics, parts = by_sweep(*inputs)
    assert len(calls) == 3
    # float32 sums in another order; the bf16 gradient of the weight is rounded once either way.
    torch.testing.assert_close(loss, whole_loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(statistics.sums, whole_statistics.sums, rtol=1e-5, atol=1e-4)
    limit = 1e-6 if dtype == torch.float32 else 1e-3
    assert torch.equal(parts[0], whole[0])
    assert relative(parts[1], whole[1]) <= limit


@both
def test_rows_without_gradient_leave_before_the_last_two_products(implementation, monkeypatch):
    hidden_TD, weight_VD, targets_T, arguments = ppo_inputs(60, 300, 24, torch.float32, PLAIN, spread=1.0)
    num_masked = int((~arguments["mask_T"]).sum())
    head = vocab_head if implementation == "triton" else reference
    kept, products = [], []
    monkeypatch.setattr(head, "keep_logits", counted(head.keep_logits, kept))
    monkeypatch.setattr(head, "add_product_", counted(head.add_product_, products))
    with forced(implementation):
        _, statistics, (dhidden_TD, _) = by_sweep(hidden_TD, weight_VD, targets_T, arguments)
    num_clipped = int(statistics.total("num_clipped"))
    assert num_masked > 5
    assert num_clipped > 5
    assert [call[0][0].shape[0] for call in kept] == [60 - num_masked]  # the first product: no masked row
    num_live = 60 - num_masked - num_clipped
    # (out, left, right): dlogits @ weight, then dlogits.T @ hidden.
    assert [call[0][1].shape for call in products] == [(num_live, 300), (300, num_live)]
    assert int((dhidden_TD == 0).all(1).sum()) == num_masked + num_clipped


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_upstream_gradient_scales(implementation, dtype):
    inputs = ppo_inputs(20, 50, 16, dtype, EVERYTHING)
    with forced(implementation):
        plain = by_sweep(*inputs)[2]
        scaled = by_sweep(*inputs, upstream=0.25)[2]
    for one, quarter in zip(plain, scaled, strict=True):
        assert torch.equal(one * 0.25, quarter)  # a power of two rounds nothing


def test_backward_runs_once():
    hidden_TD, weight_VD, targets_T, arguments = ppo_inputs(5, 20, 8, torch.float32, PLAIN)
    loss, _ = linear_ppo_loss(hidden_TD.requires_grad_(), weight_VD, targets_T, **arguments)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call the loss again"):
        loss.backward()


@both
def test_frozen_weight_takes_no_product_and_no_gradient(implementation, monkeypatch):
    hidden_TD, weight_VD, targets_T, arguments = ppo_inputs(20, 50, 16, torch.float32, EVERYTHING)
    head = vocab_head if implementation == "triton" else reference
    with forced(implementation):
        expected = by_sweep(hidden_TD, weight_VD, targets_T, arguments)
        products = []
        monkeypatch.setattr(head, "add_product_", counted(head.add_product_, products))
        leaf = hidden_TD.clone().requires_grad_()
        loss, _ = linear_ppo_loss(leaf, weight_VD, targets_T, temperature=0.8, **arguments)
        loss.backward()
    assert len(products) == 1
    assert torch.equal(leaf.grad, expected[2][0])


@both
def test_without_gradients_nothing_is_kept(implementation, monkeypatch):
    hidden_TD, weight_VD, targets_T, arguments = ppo_inputs(20, 50, 16, torch.float32, EVERYTHING)
    head = vocab_head if implementation == "triton" else reference
    with forced(implementation):
        expected = by_sweep(hidden_TD, weight_VD, targets_T, arguments)
        kept = []
        monkeypatch.setattr(head, "keep_logits", counted(head.keep_logits, kept))
        with torch.no_grad():
            loss, statistics = linear_ppo_loss(
                hidden_TD.requires_grad_(), weight_VD, targets_T, temperature=0.8, **arguments
            )
    assert not kept
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=1e-7)  # merged tile by tile
    torch.testing.assert_close(statistics.sums, expected[1].sums, rtol=1e-5, atol=1e-5)


@both
def test_same_inputs_give_the_same_bits(implementation):
    inputs = ppo_inputs(40, 300, 24, torch.bfloat16, EVERYTHING)
    with forced(implementation):
        first, second = by_sweep(*inputs), by_sweep(*inputs)
    assert torch.equal(first[0], second[0])
    for a, b in zip(first[2], second[2], strict=True):
        assert torch.equal(a, b)


def test_peak_memory_does_not_depend_on_the_vocabulary_but_for_the_weight_gradient(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 1 << 20)  # 4 MB
    peaks = []
    for vocab_size in (16384, 65536):
        hidden_TD, weight_VD, targets_T, arguments = ppo_inputs(
            256, vocab_size, 32, torch.float32, PLAIN, device="cpu"
        )
        hidden_TD.requires_grad_(), weight_VD.requires_grad_()

        def run(inputs=(hidden_TD, weight_VD, targets_T), arguments=arguments):
            linear_ppo_loss(*inputs, **arguments)[0].backward()

        peaks.append(peak_bytes(run) - weight_VD.numel() * weight_VD.element_size())
    # The logits would be 16 and 64 MiB; what is kept is two chunks of up to 4 MiB, and small tiles.
    assert peaks[1] < 1.1 * peaks[0]
    assert max(peaks) < 3 * (4 << 20)
