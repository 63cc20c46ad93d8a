"""What every spawned rank of test_vocab.py runs: the same cases over shards of one vocabulary."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from glm_rlhf.parallel import vocab

WORLD = 4


@dataclass(frozen=True)
class Case:
    op: str  # "linear" or "logits"
    tp: int
    num_rows: int = 37
    num_columns: int = 40  # padded, a multiple of tp
    vocab_size: int | None = None
    hidden_size: int = 24
    dtype: torch.dtype = torch.float32
    temperature: float = 0.7
    reduces: bool = True
    targets: str = "some ignored"  # or "all ignored", "all kept"
    uses_minus_infinity: bool = False


CASES = [
    *(Case("linear", tp, dtype=dtype) for tp in (1, 2, 4) for dtype in (torch.float32, torch.float64)),
    Case("linear", 2, dtype=torch.bfloat16),
    Case("linear", 4, reduces=False),
    Case("linear", 4, vocab_size=37),
    Case("linear", 4, vocab_size=11),  # the last two shards hold nothing but padding
    Case("linear", 2, targets="all ignored"),
    Case("linear", 2, targets="all kept", temperature=1.0),
    Case("linear", 2, num_rows=0),
    Case("linear", 4, num_rows=1, num_columns=4),
    *(Case("logits", tp, dtype=dtype) for tp in (1, 2, 4) for dtype in (torch.float32, torch.float64)),
    Case("logits", 4, vocab_size=37),
    Case("logits", 4, uses_minus_infinity=True),
    Case("logits", 2, targets="all ignored"),
    Case("logits", 2, num_rows=0),
]


def inputs(case: Case) -> dict[str, torch.Tensor]:
    """Whole, unsharded inputs of a case, the same on every rank."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    size = case.vocab_size or case.num_columns
    targets_T = torch.randint(0, size, (case.num_rows,), generator=generator)
    if case.targets == "all ignored":
        targets_T.fill_(vocab.IGNORE_INDEX)
    elif case.targets == "some ignored":
        targets_T[1::3] = vocab.IGNORE_INDEX
    logits_TV = 3 * normal(case.num_rows, case.num_columns)
    if case.uses_minus_infinity:
        logits_TV[:, : case.num_columns // case.tp] = -torch.inf  # a whole shard without a finite logit
        logits_TV[::2, -1] = -torch.inf
        targets_T[targets_T >= 0] = case.num_columns - 2
    return {
        "hidden_TD": normal(case.num_rows, case.hidden_size).to(case.dtype),
        "weight_VD": normal(case.num_columns, case.hidden_size).to(case.dtype),
        "logits_TV": logits_TV.to(case.dtype),
        "targets_T": targets_T,
        "dlogprobs_T": normal(case.num_rows),
        "dentropy_T": normal(case.num_rows),
    }


def evaluate(case: Case, group: dist.ProcessGroup | None, rank: int, shards: int) -> dict[str, torch.Tensor]:
    """Run one case on one shard; `group=None, rank=0, shards=1` is the single-rank run."""
    given = inputs(case)
    if case.op == "linear":
        hidden_TD = given["hidden_TD"].requires_grad_()
        leaf = given["weight_VD"].chunk(shards, dim=0)[rank].clone().requires_grad_()
        logprobs_T, entropy_T = vocab.linear_logprob(
            hidden_TD,
            leaf,
            given["targets_T"],
            group=group,
            temperature=case.temperature,
            vocab_size=case.vocab_size,
            reduces_hidden_gradient=case.reduces,
        )
    else:
        hidden_TD = None
        leaf = given["logits_TV"].chunk(shards, dim=1)[rank].clone().requires_grad_()
        logprobs_T, entropy_T = vocab.logprobs_from_logits(
            leaf, given["targets_T"], group=group, temperature=case.temperature, vocab_size=case.vocab_size
        )
    torch.autograd.backward(
        [logprobs_T, entropy_T],
        [given["dlogprobs_T"].to(logprobs_T.dtype), given["dentropy_T"].to(entropy_T.dtype)],
    )
    result = {"logprobs_T": logprobs_T.detach(), "entropy_T": entropy_T.detach(), "shard": leaf.grad}
    if hidden_TD is not None:
        result["hidden_TD"] = hidden_TD.grad
    return result


def run(rank: int, folder: str) -> None:
    """Entry of one rank: every case, with the collectives it issued, saved to `folder/rank<r>.pt`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    groups = {size: _group_of(rank, size) for size in (1, 2, 4)}
    issued: list[tuple[str, int]] = []
    plain_all_reduce = dist.all_reduce

    def counted_all_reduce(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        issued.append((str(op).rsplit(".", 1)[-1], tensor.numel() * tensor.element_size()))
        return plain_all_reduce(tensor, op=op, group=group, async_op=async_op)

    dist.all_reduce = counted_all_reduce
    results = []
    for case in CASES:
        issued.clear()
        group = groups[case.tp]
        result = evaluate(case, group, group.rank(), case.tp)
        results.append(result | {"issued": list(issued)})
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


def _group_of(rank: int, size: int) -> dist.ProcessGroup:
    mine = None
    for start in range(0, WORLD, size):
        group = dist.new_group(list(range(start, start + size)))
        mine = group if start <= rank < start + size else mine
    return mine
