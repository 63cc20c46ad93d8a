"""Each sample has a random stream of its own."""

from glm_rlhf.engine.rollout.scheduling.requests import sample_seed
from glm_rlhf.parallel.inference.step_plan import SequenceWork, StepPlan


def test_mixing_is_splitmix64():
    # The published first outputs of SplitMix64 with seed 0 are mix(1 · γ), mix(2 · γ), …; mix(0) = 0.
    assert sample_seed(0, 0) % 2**64 == 0xE220A8397B1DCDAF
    assert sample_seed(0, 1) % 2**64 == 0x6E789E6AA1B965F4
    assert sample_seed(0, 2) % 2**64 == 0x06C45D188009454F


def test_seeds_are_int64_and_differ():
    seeds = [sample_seed(seed, sample) for seed in (*range(-50, 50), 2**62, 10**30) for sample in range(50)]
    assert len(set(seeds)) == len(seeds)
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)
    assert 0.4 < sum(seed < 0 for seed in seeds) / len(seeds) < 0.6  # 5100 coin flips: 14 standard deviations


def test_integers_equal_modulo_a_word_are_one_seed():
    assert sample_seed(-1, 3) == sample_seed(2**64 - 1, 3)


def test_a_step_counts_its_tokens():
    def work(num_tokens):
        return SequenceWork(
            sequence=0, tokens=(5,) * num_tokens, start=0, pages=(0,), samples=True, seed=0, num_generated=0
        )

    assert StepPlan(copies=(), decodes=(work(1), work(1)), prefills=(work(3), work(1))).num_tokens == 6
