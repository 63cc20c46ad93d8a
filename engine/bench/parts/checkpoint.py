"""Rows of checkpoints: how long a save blocks and a restore takes, against torch.save and torch.load."""

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from glm_rlhf.engine.bench.harness import Answer, Contender, Problem, measure
from glm_rlhf.engine.bench.parts.models import next_token_loss
from glm_rlhf.engine.bench.report import Row
from glm_rlhf.engine.bench.sizes import Sizes
from glm_rlhf.parallel.checkpoint.restore import checkpoint_at, restore
from glm_rlhf.parallel.checkpoint.save import CheckpointWriter, step_folders
from glm_rlhf.parallel.checkpoint.shards import stored_tensors
from glm_rlhf.parallel.model.glm import build_model
from glm_rlhf.parallel.model.packing import pack
from glm_rlhf.parallel.optim.training_state import AdamSettings, TrainingState
from glm_rlhf.parallel.pipeline.schedule import run_micro_batches
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.weights.load import randomize_weights


def checkpoint_rows(sizes: Sizes, topology: Topology, *, budget_s: float, command: str) -> list[Row]:
    """Return saving and restoring a policy in training: weights and Adam's moments, on this rank."""
    state = _trained(sizes, topology)
    num_weights = sum(parameter.numel() for chunk in state.bare_chunks for parameter in chunk.parameters())
    tensors, _ = stored_tensors("policy", state)
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    shape = f"{num_weights / 1e6:.1f} M parameters, {num_bytes / 1e6:.0f} MB"
    steps = itertools.count(1)
    with (
        tempfile.TemporaryDirectory() as name,
        CheckpointWriter(Path(name) / "beside", topology=topology, keep_last=1) as asynchronous,
        CheckpointWriter(Path(name) / "waited", topology=topology, keep_last=1, is_async=False) as waited,
    ):
        peer = Path(name) / "peer.pt"
        kept = [tensor.clone() for tensor in tensors.values()]

        def stored() -> dict[str, torch.Tensor]:
            return stored_tensors("policy", state)[0]  # a restore may have made new ones

        def save_asynchronously() -> None:
            asynchronous.save(next(steps), {"policy": state}, state={})
            state.wait_for_readers()  # the optimizer's next step waits here until the tensors are copied

        def ours_load(writer: CheckpointWriter = waited) -> None:
            newest = next(iter(step_folders(writer.folder).values()))
            restore(state, checkpoint_at(newest, topology=topology), "policy")

        def torch_load() -> None:
            content = torch.load(peer, weights_only=True)
            for name, tensor in stored().items():
                tensor.copy_(content[name])

        def clear() -> None:
            for tensor in stored().values():
                tensor.zero_()

        def restored_by(load: Callable[[], None]) -> Callable[[object], Answer]:
            def answer(_result: object) -> Answer:
                asynchronous.finish()
                clear()
                load()
                return list(stored().values())

            return answer

        def loading(name: str, load: Callable[[], None]) -> Contender:
            return Contender(
                name=name, run=load, prepare=clear, answer=lambda _result: list(stored().values())
            )

        save = [
            Contender(
                name="ours, beside training: what it holds up",
                run=save_asynchronously,
                prepare=asynchronous.finish,
                answer=restored_by(lambda: ours_load(asynchronous)),
            ),
            Contender(
                name="ours, waited for",
                run=lambda: waited.save(next(steps), {"policy": state}, state={}),
                answer=restored_by(ours_load),
            ),
            Contender(
                name="torch.save, not synced",
                run=lambda: torch.save(stored(), peer),
                answer=restored_by(torch_load),
            ),
        ]
        load = [loading("ours, checksums compared", ours_load), loading("torch.load, copied", torch_load)]
        saved, loaded = (
            measure(
                Problem(contenders=contenders, expected=lambda: kept, tolerance=0.0),
                device=torch.device("cpu"),  # host time: what counts is what the run waits for
                budget_s=budget_s,
                warm_up_runs=1,
            )
            for contenders in (save, load)
        )
    texts = {"save": "checkpoint of a policy in training", "restore": "the same, read back"}
    return [
        Row(
            row=row,
            what=what,
            shape=shape,
            command=command,
            entries=entries,
            work=(num_bytes / 1e6, "MB"),
        )
        for (row, what), entries in zip(texts.items(), (saved, loaded), strict=True)
    ]


def _trained(sizes: Sizes, topology: Topology) -> TrainingState:
    """Return a policy after one step, so that Adam's moments are there."""
    chunks = build_model(sizes.model, topology, dtype=sizes.dtype)
    randomize_weights(chunks, seed=1)
    state = TrainingState(chunks, AdamSettings(lr=1e-4), topology=topology)
    tokens_T = torch.randint(
        0, sizes.model.vocab_size, (sizes.length,), generator=torch.Generator().manual_seed(2)
    )
    batch = pack([tokens_T]).to(topology.device)
    state.zero_grad()
    run_micro_batches(
        state.chunks, [batch], next_token_loss([batch], sizes.length), topology=topology, forward_only=False
    )
    state.step()
    return state
