"""Import, then export from the ranks that hold the model: the same bytes, whatever the layout."""

from pathlib import Path

import pytest
import torch
from layout_params import layout_params
from safetensors.torch import load_file
from tiny_models import FAMILIES, save_folder

from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.weights.export import export_model
from glm_rlhf.parallel.weights.load import load_model

LAYOUTS = {
    "tp4": {"tp": 4},
    "tp2 pp2 sp": {"tp": 2, "pp": 2, "sequence_parallel": True},
    "pp2 vpp2": {"pp": 2, "vpp": 2},
    "pp2 cp2": {"pp": 2, "cp": 2},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: save_folder(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


def import_export(folders: dict[str, Path], axes: dict, target: Path) -> None:
    with open_topology(Layout(**axes)) as topology:
        for family, folder in folders.items():
            chunks, created = load_model(folder, topology, dtype=torch.float32)
            assert created == ()
            export_model(chunks, target / family, topology=topology, source=folder)


@pytest.mark.parametrize("axes", layout_params(LAYOUTS, quick=("tp4", "tp2 pp2 sp")))
def test_export_after_import_gives_the_same_bytes(ranks, folders, tmp_path, axes):
    ranks.run(import_export, folders, axes, tmp_path)
    for family, folder in folders.items():
        before, after = tensors_of(folder), tensors_of(tmp_path / family)
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def export_twice(folder: Path, target: Path) -> list[str]:
    said = []
    with open_topology(Layout(tp=2, pp=2)) as topology:
        chunks, _ = load_model(folder, topology, dtype=torch.float32)
        for _ in range(2):
            try:
                export_model(chunks, target, topology=topology, source=folder)
                said.append("")
            except ValueError as error:
                said.append(str(error))
    return said


def test_a_target_that_exists_is_refused_on_every_rank_and_left_as_it_is(ranks, folders, tmp_path):
    for first, second in ranks.run(export_twice, folders["glm"], tmp_path / "model"):
        assert first == ""
        assert str(tmp_path / "model") in second
    assert tensors_of(tmp_path / "model").keys() == tensors_of(folders["glm"]).keys()
