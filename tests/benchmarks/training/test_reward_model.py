"""The lengths that the reward model's benchmark stores are those of the published pairs."""

from benchmarks.training.padding import padding_share
from benchmarks.training.reward_model import HH_RLHF_LENGTHS, length_quantiles
from glm_rlhf.engine.data.store.token_store import open_store
from glm_rlhf.engine.data.tokenizer.load import load_tokenizer


def test_quantiles_are_evenly_spaced_by_the_tokens_of_both_sequences():
    lengths = [(1, n, 0) for n in range(8)]
    assert length_quantiles(lengths[::-1], 4) == [(1, 1, 0), (1, 3, 0), (1, 5, 0), (1, 7, 0)]
    assert length_quantiles([(5, 1, 1), (1, 2, 9)], 2) == [(5, 1, 1), (1, 2, 9)]  # 12 tokens, then 13


def test_padding_is_what_the_longest_of_a_batch_leaves():
    assert padding_share([[1, 3], [4, 4]]) == 1 - 12 / 14


def test_the_stored_lengths_are_hh_rlhfs(shared_data, tmp_path):
    store = open_store(
        shared_data / "hh-rlhf" / "harmless-base-test.jsonl.gz",
        "pairs",
        folder=tmp_path,
        tokenizer=load_tokenizer(shared_data / "chatglm3"),
        max_prompt_tokens=4096,
        max_tokens=8192,
        form="hh-rlhf",
    )
    columns = (store.prompt_lengths, store.chosen_lengths, store.rejected_lengths)
    lengths = list(zip(*(column.tolist() for column in columns), strict=True))
    assert tuple(length_quantiles(lengths)) == HH_RLHF_LENGTHS
