"""Offloaded contents are restored bit for bit, and take no device memory meanwhile."""

import numpy as np
import torch
from tiny_training import Case, make_batches, make_chunks, train_step

from glm_rlhf.parallel.optim.state_access import num_steps_of, parts_of
from glm_rlhf.parallel.optim.training_state import AdamSettings, TrainingState
from glm_rlhf.parallel.runtime.cpu_offload import CpuOffload
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout

CPU = torch.device("cpu")


def test_storages_are_offloaded_whole_and_once():
    whole, other = torch.arange(12.0), torch.arange(3)
    rows = whole.view(3, 4)[1:]
    offload = CpuOffload(lambda: [rows, whole, other], device=CPU)
    assert offload.offloaded_bytes == 0
    offload.offload()
    assert offload.offloaded_bytes == 12 * 4 + 3 * 8
    assert whole.untyped_storage().nbytes() == other.untyped_storage().nbytes() == 0
    offload.offload()  # they are there already
    offload.prefetch()
    offload.wait()
    assert offload.offloaded_bytes == 0
    assert rows.tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]]
    assert other.tolist() == [0, 1, 2]


def test_memory_of_others_stays():
    lent, own = torch.from_numpy(np.ones(4, dtype=np.float32)), torch.ones(2)
    offload = CpuOffload(lambda: [lent, own], device=CPU)
    offload.offload()
    assert offload.offloaded_bytes == 8
    assert lent.tolist() == [1.0] * 4
    offload.wait()
    assert own.tolist() == [1.0] * 2


def test_what_changes_is_copied_each_time_and_what_does_not_once():
    tensors = {True: torch.zeros(4), False: torch.zeros(4)}
    for changes, tensor in tensors.items():
        offload = CpuOffload(lambda tensor=tensor: [tensor], device=CPU, changes=changes)
        for _ in range(2):
            offload.offload()
            offload.wait()
            tensor += 1
        offload.offload()
        offload.wait()
    assert tensors[True].tolist() == [2.0] * 4
    assert tensors[False].tolist() == [0.0] * 4


def test_tensors_that_come_later_are_offloaded_too():
    tensors = [torch.ones(2)]
    offload = CpuOffload(lambda: tensors, device=CPU)
    offload.offload()
    offload.wait()
    tensors.append(torch.full((5,), 2.0))
    offload.offload()
    assert offload.offloaded_bytes == 7 * 4
    offload.wait()
    assert [tensor.sum().item() for tensor in tensors] == [2.0, 10.0]


def train_three_steps(offloads: bool) -> tuple[list[torch.Tensor], list[tuple[int, int]]]:
    """Weights and moments after three bf16 steps on dp 2 × tp 2; bytes offloaded, and those still held."""
    case = Case(dtype=torch.bfloat16, settings=AdamSettings(lr=1e-2))
    with open_topology(Layout(tp=2)) as topology:
        chunks = make_chunks(case, topology)
        state = TrainingState(chunks, case.settings, topology=topology)
        addresses = [p.data_ptr() for chunk in chunks for p in chunk.parameters()]
        batches = make_batches(case, topology)[topology.dp_rank :: topology.dp]
        bytes_offloaded = []
        for _ in range(3):
            if offloads:
                buffers = [buffer for chunk in state.chunks for buffer in chunk.buffers]
                parts = list(parts_of(state))
                held = sum(p.weight.numel() * 4 for p in parts)
                held += sum(a.numel() * 4 for p in parts for a in p.moments.values())
                held += sum(buffer.grad_data.numel() * 4 for buffer in buffers)
                bytes_offloaded.append((state.offload(), held))
                assert all(buffer.grad_data.untyped_storage().nbytes() == 0 for buffer in buffers)
                assert all(part.weight.untyped_storage().nbytes() == 0 for part in parts)
                state.prefetch()
            train_step(case, state, batches, topology)
            assert state.step().is_applied
        assert [p.data_ptr() for chunk in chunks for p in chunk.parameters()] == addresses
        if offloads:
            state.offload()  # reading the state restores it
        assert num_steps_of(state) == 3
        found = [weight.detach().clone() for chunk in chunks for weight in chunk.parameters()]
        for part in parts_of(state):
            found += [part.weight.detach().clone(), *(a.clone() for a in part.moments.values())]
        return found, bytes_offloaded


def test_training_continues_bit_for_bit_after_offloading(ranks):
    plain, offloaded = (ranks.run(train_three_steps, offloads) for offloads in (False, True))
    for (expected, _), (found, bytes_offloaded) in zip(plain, offloaded, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert len(bytes_offloaded) == 3
        for done, held in bytes_offloaded:
            assert done == held > 0
