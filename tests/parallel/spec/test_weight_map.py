"""The table of names matches the published folders, and selects the weights of each pipeline stage."""

import json
import re
from dataclasses import replace

import pytest
from tiny_models import FAMILIES, save_folder
from weight_folders import load_all

from glm_rlhf.parallel.spec.presets import preset
from glm_rlhf.parallel.spec.weight_map import NOT_WEIGHTS, names_within, weights_of


def their_names(config, **part):
    part = {"layers": range(config.num_layers)} | part
    return [name for weight in weights_of(config, **part) for name in weight.hf_names]


def test_the_published_chatglm3_index_is_the_table(shared_data):
    index = json.loads((shared_data / "chatglm3" / "pytorch_model.bin.index.json").read_text())
    published = set(index["weight_map"])
    config = preset("chatglm3-6b")
    not_weights = {name for name in published if NOT_WEIGHTS["chatglm"].fullmatch(name)}
    assert not_weights == {"transformer.rotary_pos_emb.inv_freq"}
    assert sorted(their_names(config)) == sorted(published - not_weights)
    shapes = {}
    for weight in weights_of(config, layers=range(config.num_layers)):
        shapes |= names_within(weight, config)
    num_elements = sum(shape[0] * (shape[1] if len(shape) == 2 else 1) for shape in shapes.values())
    # float16, and 32 numbers of inv_freq
    assert 2 * (num_elements + 32) == index["metadata"]["total_size"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_is_what_transformers_saves(tmp_path, family):
    tensors = load_all(save_folder(tmp_path, family))
    config = replace(preset(f"tiny-{family}"), hidden_size=48, head_size=8, ffn_size=64, vocab_size=96)
    shapes = {}
    for weight in weights_of(config, layers=range(4)):
        shapes |= names_within(weight, config)
    saved = {name: tuple(tensor.shape) for name, tensor in tensors.items() if "inv_freq" not in name}
    assert shapes == saved


def test_32_billion_parameters_are_what_the_name_says():
    config = preset("glm-4-0414-32b")
    total = 0
    for weight in weights_of(config, layers=range(config.num_layers)):
        for shape in names_within(weight, config).values():
            total += shape[0] * (shape[1] if len(shape) == 2 else 1)
    assert total == 32_566_081_536  # 32.57 B in the files of the published model


def test_a_stage_holds_its_own_part():
    config = preset("tiny-glm")
    middle = [w.name for w in weights_of(config, layers=(2, 1), has_embedding=False, has_head=False)]
    assert [re.match(r"decoder\.layers\.(\d)", name)[1] for name in middle] == ["2"] * 7 + ["1"] * 7
    last = [w.name for w in weights_of(config, layers=(), has_embedding=False)]
    assert last == ["decoder.final_layernorm.weight", "output_layer.weight"]
    scalar = [w.name for w in weights_of(config, layers=(), has_embedding=False, role="critic")]
    assert scalar == ["decoder.final_layernorm.weight", "value_head.weight"]


@pytest.mark.parametrize(
    "name, has_score_bias, heads",
    [
        ("tiny-glm", False, ["score.weight"]),
        ("tiny-glm", True, ["score.weight", "score.bias"]),
        ("chatglm3-6b", False, ["classifier_head.weight", "classifier_head.bias"]),
        ("glm-4-0414-32b", False, ["score.weight"]),
    ],
)
def test_the_scalar_head_has_the_bias_that_the_familys_class_has(name, has_score_bias, heads):
    config = replace(preset(name), has_score_bias=has_score_bias)
    rows = weights_of(config, layers=(), has_embedding=False, role="reward")
    assert [row.hf_names[0] for row in rows if row.section == "value_head"] == heads


def test_a_tied_head_is_read_from_the_embedding_where_that_is_on_another_stage():
    config = replace(preset("tiny-glm"), has_tied_head=True)
    whole = [w.name for w in weights_of(config, layers=())]
    assert whole == ["embedding.word_embeddings.weight", "decoder.final_layernorm.weight"]
    *_, head = weights_of(config, layers=(), has_embedding=False)
    assert (head.name, head.hf_names) == ("output_layer.weight", ("model.embed_tokens.weight",))


def test_what_is_not_in_the_model_is_refused():
    config = preset("tiny-glm")
    with pytest.raises(ValueError, match="layer 4 is not one of the model's 4 layers"):
        weights_of(config, layers=[4])
    with pytest.raises(ValueError, match="role is 'actor'"):
        weights_of(config, layers=[], role="actor")
    with pytest.raises(ValueError, match="has_sandwich_norms is True for the family glm"):
        weights_of(replace(config, has_sandwich_norms=True), layers=[])
