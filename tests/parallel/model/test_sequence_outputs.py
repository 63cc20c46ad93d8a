"""Per-sequence outputs and their gradients are the same for any split of the rows."""

import pytest
import torch
from layout_params import layout_params
from tiny_models import make_model, reference_logprobs, save_folder

from glm_rlhf.parallel.model.packing import pack, share
from glm_rlhf.parallel.model.sequence_outputs import last_token_values, sequence_logprobs
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.weights.load import load_model

LENGTHS = (5, 1, 9, 3, 12)
LAYOUTS = {"cp2": {"cp": 2}, "cp4": {"cp": 4}, "tp2 cp2": {"tp": 2, "cp": 2}, "tp4": {"tp": 4}}


def sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(0, 96, (length,), generator=generator) for length in LENGTHS]


def token_weights() -> torch.Tensor:
    """Weights of all tokens, some of them 0, and of first tokens, which have no logprob."""
    weights = torch.rand(sum(LENGTHS), generator=torch.Generator().manual_seed(5))
    return torch.where(weights < 0.3, 0.0, weights)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("model"), "glm")


def on_ranks(folder, axes: dict) -> tuple[list, list]:
    return numbers(folder, axes, "reward"), numbers(folder, axes, "policy")


def numbers(folder, axes: dict, role: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers of a layout, and the gradient of a loss of them at every row, in the stream's order."""
    with open_topology(Layout(**axes)) as topology:
        chunks, _ = load_model(folder, topology, role=role, dtype=torch.float32)
        packed = pack(sequences(), multiple=topology.layout.token_multiple)
        mine = share(packed, cp_rank=topology.cp_rank, cp_size=topology.layout.cp)
        with torch.no_grad():
            hidden_TD = chunks[0](mine)
        hidden_TD.requires_grad_()
        if role == "reward":
            found_B = last_token_values(chunks[0], hidden_TD, mine)
        else:
            weights_T = torch.zeros(packed.num_tokens)
            weights_T[: sum(LENGTHS)] = token_weights()
            found_B = sequence_logprobs(chunks[0], hidden_TD, mine, weights_T)
        # Any loss of all numbers together: each rank computes the whole of it.
        (found_B * torch.arange(1.0, 6.0)).sum().square().backward()
        gradient_TD = torch.zeros(packed.num_tokens, hidden_TD.shape[1])
        gradient_TD[slice(None) if mine.rows is None else mine.rows] = hidden_TD.grad
        torch.distributed.all_reduce(gradient_TD, group=topology.cp_group)
        return found_B.detach(), gradient_TD[: sum(LENGTHS)]


@pytest.fixture(scope="module")
def alone(folder):
    return on_ranks(folder, {})


def test_one_rank_equals_transformers(folder, alone):
    (scores_B, _), (logprobs_B, _) = alone
    model = make_model("glm")
    with open_topology(Layout()) as topology:
        chunks, _ = load_model(folder, topology, role="reward", dtype=torch.float32)
        head = chunks[0].value_head
        with torch.no_grad():
            expected = [head(model.model(ids[None]).last_hidden_state[0, -1:])[0] for ids in sequences()]
    # fp32, about as many roundings as layers.
    assert scores_B.tolist() == pytest.approx([score.item() for score in expected], abs=1e-5)
    with torch.no_grad():
        by_token = reference_logprobs(model, sequences())
    parts = token_weights().split(LENGTHS)
    sums = [float((logprobs * part).sum()) for logprobs, part in zip(by_token, parts, strict=True)]
    assert logprobs_B.tolist() == pytest.approx(sums, abs=1e-4)
    assert logprobs_B[1] == 0.0  # a single token has no logprob


@pytest.mark.parametrize("axes", layout_params(LAYOUTS, quick=("tp2 cp2",)))
def test_every_layout_equals_one_rank_gradients_too(ranks, folder, alone, axes):
    for answer in ranks.run(on_ranks, folder, axes):
        for (found_B, gradient_TD), (expected_B, expected_TD) in zip(answer, alone, strict=True):
            # fp32 sums in another order.
            assert torch.allclose(found_B, expected_B, rtol=1e-5, atol=1e-5)
            scale = expected_TD.abs().max()
            assert float((gradient_TD - expected_TD).abs().max() / scale) <= 1e-5


def test_a_sequence_without_tokens_is_refused(folder):
    with open_topology(Layout()) as topology:
        chunks, _ = load_model(folder, topology, role="reward", dtype=torch.float32)
        packed = pack([torch.tensor([3, 4]), torch.tensor([], dtype=torch.int64)])
        mine = share(packed)
        with pytest.raises(ValueError, match="sequence 1 of the stream has no token"):
            last_token_values(chunks[0], chunks[0](mine), mine)
