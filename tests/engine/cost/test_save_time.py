"""Expected size of a checkpoint: that of one which was written."""

import pytest
from safetensors.torch import load_file
from saved_runs import save_steps, tiny_run

from glm_rlhf.engine.config.plan import ClusterSection
from glm_rlhf.engine.cost.save_time import ASSUMED_DISK_BYTES_PER_S, checkpoint_bytes, save_s
from glm_rlhf.parallel.spec.presets import preset


def test_a_checkpoint_has_the_expected_size(tmp_path):
    save_steps(tmp_path / "run", {}, [1])
    with tiny_run(tmp_path / "other") as run:
        glm = run.state.bare_chunks[0].glm
    (file,) = (tmp_path / "run" / "step_1").glob("*.safetensors")
    sizes = {name: tensor.nbytes for name, tensor in load_file(file).items()}
    of_the_model = sum(size for name, size in sizes.items() if not name.startswith("rank"))
    assert checkpoint_bytes([(glm, False)], itemsize=4) == of_the_model


def test_the_time_is_that_of_the_bytes():
    glm = preset("chatglm3-6b")
    one = checkpoint_bytes([(glm, False)], itemsize=2)
    assert one == pytest.approx(14 * 6.24e9, rel=0.01)  # 2 + 4 + 8 bytes per parameter
    both = checkpoint_bytes([(glm, False), (glm, True)], itemsize=2)
    assert one < both < 2 * one  # the critic has no output layer
    assert save_s(one) == one / 1e9
    assert ClusterSection().disk == ASSUMED_DISK_BYTES_PER_S
