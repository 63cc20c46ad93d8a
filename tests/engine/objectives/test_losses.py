"""The losses equal hand-worked values, and formulas written down a second time."""

import math

import pytest
import torch

from glm_rlhf.engine.objectives.losses import answer_mask, answer_weights, dpo_loss, pairwise_loss

NUM_RANDOM = 17


def leaf(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def random_leaves(count: int, scale: float = 3.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(NUM_RANDOM, generator=generator, dtype=torch.float64).mul(scale).requires_grad_()
        for _ in range(count)
    ]


class TestAnswerMask:
    def test_only_answers_are_trained_on(self):
        mask = answer_mask([3, 4, 2], [2, 1, 2], num_tokens=12)
        first, second, no_answer, padding = [0, 0, 1], [0, 1, 1, 1], [0, 0], [0, 0, 0]
        assert mask.dtype == torch.bool
        assert mask.int().tolist() == [*first, *second, *no_answer, *padding]

    def test_later_tokens_of_an_answer_weigh_less(self):
        weights = answer_weights([3, 5], [1, 2], num_tokens=8, discount=0.5)
        assert weights.tolist() == [0, 1, 0.5, 0, 0, 1, 0.5, 0.25]

    @pytest.mark.parametrize(
        "lengths, prompts, options, sentence",
        [
            ([3], [4], {}, "prompt of 4 tokens .* sequence of 3"),
            ([3, 3], [1, 1], {}, "6 tokens do not fit a stream of 5"),
            ([3], [1], {"discount": 0.0}, "discount is 0.0"),
            ([3], [1], {"discount": 1.5}, "discount is 1.5"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, lengths, prompts, options, sentence):
        with pytest.raises(ValueError, match=sentence):
            answer_weights(lengths, prompts, num_tokens=5, **options)


class TestPairwiseLoss:
    def test_hand_worked(self):
        # σ(1) = 0.7310586, −log σ(1) = 0.3132617; squares 1 and 0; halved by the denominator.
        chosen, rejected = leaf(1.0), leaf(0.0)
        loss = pairwise_loss(chosen, rejected, l2_coef=0.1, denominator=2)
        loss.backward()
        assert loss.item() == pytest.approx((0.3132617 + 0.1) / 2, abs=1e-7)
        # d/dw = −(1 − σ(1)) + 0.2 w, d/dl = (1 − σ(1)) + 0.2 l.
        assert chosen.grad.item() == pytest.approx((-0.2689414 + 0.2) / 2, abs=1e-7)
        assert rejected.grad.item() == pytest.approx(0.2689414 / 2, abs=1e-7)

    def test_equals_the_formula_written_out(self):
        chosen, rejected = random_leaves(2)
        loss = pairwise_loss(chosen, rejected, l2_coef=0.03, denominator=5.0)
        loss.backward()
        total = 0.0
        for index in range(NUM_RANDOM):
            won, lost = chosen[index].item(), rejected[index].item()
            odds = 1.0 / (1.0 + math.exp(won - lost))  # σ(lost − won)
            total += math.log1p(math.exp(lost - won)) + 0.03 * (won * won + lost * lost)
            assert chosen.grad[index].item() == pytest.approx((-odds + 0.06 * won) / 5, rel=1e-12)
            assert rejected.grad[index].item() == pytest.approx((odds + 0.06 * lost) / 5, rel=1e-12)
        assert loss.item() == pytest.approx(total / 5, rel=1e-12)

    def test_identical_answers_give_log_2_and_only_the_anchor_pulls(self):
        chosen, rejected = leaf(2.0, -1.0), leaf(2.0, -1.0)
        loss = pairwise_loss(chosen, rejected, l2_coef=0.25, denominator=1)
        loss.backward()
        assert loss.item() == pytest.approx(2 * math.log(2) + 0.25 * 2 * (4 + 1))
        # The two gradients of a pair cancel, except 2 · 0.25 · score each.
        assert (chosen.grad + rejected.grad).tolist() == pytest.approx([2.0, -1.0])

    def test_only_differences_count_without_the_anchor(self):
        chosen, rejected = random_leaves(2)
        one = pairwise_loss(chosen, rejected, denominator=1)
        other = pairwise_loss(chosen + 100.0, rejected + 100.0, denominator=1)
        assert other.item() == pytest.approx(one.item(), rel=1e-12)

    def test_no_difference_overflows(self):
        chosen = torch.tensor([3e4, -3e4], requires_grad=True)
        loss = pairwise_loss(chosen, -chosen.detach(), denominator=1)
        loss.backward()
        assert loss.item() == pytest.approx(6e4)
        assert chosen.grad.tolist() == [0.0, -1.0]

    def test_no_pairs_give_zero(self):
        empty = torch.zeros(0, requires_grad=True)
        assert pairwise_loss(empty, empty, l2_coef=1.0, denominator=4).item() == 0.0

    def test_bf16_scores_are_computed_in_fp32(self):
        chosen, rejected = torch.tensor([1.0]).bfloat16(), torch.tensor([0.0]).bfloat16()
        loss = pairwise_loss(chosen, rejected, denominator=1)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(0.3132617, abs=1e-7)

    def test_wrong_arguments_are_refused(self):
        with pytest.raises(ValueError, match=r"shapes are \[2\], \[1\]"):
            pairwise_loss(torch.zeros(2), torch.zeros(1), denominator=1)
        with pytest.raises(ValueError, match="l2_coef is -1"):
            pairwise_loss(torch.zeros(2), torch.zeros(2), l2_coef=-1, denominator=1)


class TestDpoLoss:
    def test_hand_worked(self):
        # Rewards 0.5 · (−2 + 3) = 0.5 and 0.5 · (−3 + 2.5) = −0.25; margin 0.75, σ = 0.6791787.
        chosen, rejected = leaf(-2.0), leaf(-3.0)
        loss, won, lost = dpo_loss(chosen, rejected, leaf(-3.0), leaf(-2.5), beta=0.5, denominator=1)
        loss.backward()
        assert (won.item(), lost.item()) == (0.5, -0.25)
        assert loss.item() == pytest.approx(0.3868710, abs=1e-7)
        assert chosen.grad.item() == pytest.approx(-0.5 * (1 - 0.6791787), abs=1e-7)
        assert rejected.grad.item() == pytest.approx(0.5 * (1 - 0.6791787), abs=1e-7)

    @pytest.mark.parametrize("is_normalised", [False, True])
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_equals_the_formula_written_out(self, is_normalised, smoothing):
        policy_w, policy_l, reference_w, reference_l = random_leaves(4)
        weights_w = torch.arange(1.0, NUM_RANDOM + 1).double()
        weights_l = weights_w.flip(0)
        loss, *_ = dpo_loss(
            policy_w,
            policy_l,
            reference_w,
            reference_l,
            beta=0.3,
            denominator=7.0,
            chosen_weights_B=weights_w,
            rejected_weights_B=weights_l,
            length_normalised=is_normalised,
            label_smoothing=smoothing,
        )
        loss.backward()
        total = 0.0
        for i in range(NUM_RANDOM):
            by_w, by_l = (weights_w[i].item(), weights_l[i].item()) if is_normalised else (1.0, 1.0)
            ratio_w = (policy_w[i].item() - reference_w[i].item()) / by_w
            ratio_l = (policy_l[i].item() - reference_l[i].item()) / by_l
            margin = 0.3 * (ratio_w - ratio_l)
            win = 1.0 / (1.0 + math.exp(-margin))
            total -= (1 - smoothing) * math.log(win) + smoothing * math.log(1 - win)
            slope = (win - (1 - smoothing)) * 0.3 / 7
            assert policy_w.grad[i].item() == pytest.approx(slope / by_w, rel=1e-9)
            assert policy_l.grad[i].item() == pytest.approx(-slope / by_l, rel=1e-9)
        assert loss.item() == pytest.approx(total / 7, rel=1e-12)
        assert reference_w.grad is None

    def test_a_policy_that_is_its_reference_has_log_2_and_no_rewards(self):
        chosen, rejected = random_leaves(2)
        loss, won, lost = dpo_loss(
            chosen, rejected, chosen.detach(), rejected.detach(), beta=0.1, denominator=NUM_RANDOM
        )
        assert loss.item() == pytest.approx(math.log(2), rel=1e-12)
        assert won.abs().max() == lost.abs().max() == 0

    def test_identical_answers_leave_no_gradient(self):
        # One policy tensor is used for both answers, as identical texts have one log-probability.
        policy = leaf(-5.0, -7.0)
        loss, *_ = dpo_loss(policy, policy, leaf(-4.0, -9.0), leaf(-4.0, -9.0), beta=0.2, denominator=2)
        loss.backward()
        assert loss.item() == pytest.approx(math.log(2), rel=1e-12)
        assert policy.grad.tolist() == [0.0, 0.0]

    def test_an_empty_answer_has_the_reward_0(self):
        loss, won, lost = dpo_loss(
            leaf(0.0),
            leaf(-6.0),
            leaf(0.0),
            leaf(-8.0),
            beta=1.0,
            denominator=1,
            chosen_weights_B=torch.zeros(1),
            rejected_weights_B=torch.full((1,), 4.0),
            length_normalised=True,
        )
        assert (won.item(), lost.item()) == (0.0, 0.5)
        assert loss.item() == pytest.approx(math.log1p(math.exp(0.5)))

    def test_twice_the_length_gains_nothing_when_normalised(self):
        options = {"beta": 0.1, "denominator": 1, "length_normalised": True}
        short = dpo_loss(
            leaf(-2.0),
            leaf(-3.0),
            leaf(-4.0),
            leaf(-3.5),
            chosen_weights_B=torch.tensor([5.0]),
            rejected_weights_B=torch.tensor([5.0]),
            **options,
        )
        long = dpo_loss(
            leaf(-4.0),
            leaf(-3.0),
            leaf(-8.0),
            leaf(-3.5),
            chosen_weights_B=torch.tensor([10.0]),
            rejected_weights_B=torch.tensor([5.0]),
            **options,
        )
        assert long[0].item() == pytest.approx(short[0].item(), rel=1e-12)

    def test_wrong_arguments_are_refused(self):
        pair = [torch.zeros(2)] * 4
        with pytest.raises(ValueError, match="beta is 0"):
            dpo_loss(*pair, beta=0, denominator=1)
        with pytest.raises(ValueError, match=r"label_smoothing is 0.5"):
            dpo_loss(*pair, beta=1, denominator=1, label_smoothing=0.5)
        with pytest.raises(ValueError, match="length_normalised needs"):
            dpo_loss(*pair, beta=1, denominator=1, length_normalised=True)
        with pytest.raises(ValueError, match=r"\[2\], \[2\], \[2\], \[3\]"):
            dpo_loss(*pair[:3], torch.zeros(3), beta=1, denominator=1)
