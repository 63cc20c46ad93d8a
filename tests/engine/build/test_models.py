"""What commands on a model have in common."""

import json

import pytest

from glm_rlhf.engine.build.models import answer_seed, stop_ids_of
from glm_rlhf.engine.config.load import load_config
from glm_rlhf.engine.config.sections import GenerateConfig
from glm_rlhf.parallel.spec.presets import preset
from glm_rlhf.parallel.storage.hf_config import write_config

GLM = preset("tiny-glm")


def test_answers_follow_from_the_runs_seed_unless_they_have_their_own():
    needed = ["model.path=m", "data.path=d", "run.seed=7"]
    assert answer_seed(load_config(GenerateConfig, None, needed)) == 7
    assert answer_seed(load_config(GenerateConfig, None, [*needed, "generation.seed=0"])) == 0


def folder_with(tmp_path, eos):
    write_config(GLM, tmp_path)
    path = tmp_path / "config.json"
    path.write_text("\ufeff" + json.dumps(json.loads(path.read_text()) | {"eos_token_id": eos}))
    return load_config(GenerateConfig, None, [f"model.path={tmp_path}", "data.path=d"])


@pytest.mark.parametrize("eos, expected", [(None, set()), (2, {2}), ([2, 127], {2, 127}), ([], set())])
def test_ids_that_end_an_answer_are_read_without_a_tokenizer(tmp_path, eos, expected):
    assert stop_ids_of(folder_with(tmp_path, eos), None, GLM) == expected


@pytest.mark.parametrize("eos", ["2", 128, -1, 2.0, True, {"a": 2}, [2, None], [[2]], ["2"], [0] * 9 + [128]])
def test_odd_ids_are_refused_without_a_tokenizer(tmp_path, eos):
    with pytest.raises(ValueError, match=r"config\.json: eos_token_id .* model\.path.* ids from 0 to 127"):
        stop_ids_of(folder_with(tmp_path, eos), None, GLM)
