"""A model of another tokenizer is refused although it has as many rows."""

import json
import random
import shutil

import pytest
from sentencepiece import sentencepiece_model_pb2
from tiny_models import SHAPE, make_model, save_folder
from training_curves import write_lines

from glm_rlhf.engine.build.same_tokenizer import check_same_tokenizer
from glm_rlhf.engine.cli import main
from glm_rlhf.engine.data.tokenizer.load import load_tokenizer

ROWS = 704


def shuffled(folder):
    """Give a folder's ordinary pieces other ids, as another training of the tokenizer does."""
    model = sentencepiece_model_pb2.ModelProto()
    path = folder / "tokenizer.model"
    model.ParseFromString(path.read_bytes())
    normal = [piece for piece in model.pieces if piece.type == 1]
    texts = [(piece.piece, piece.score) for piece in normal]
    random.Random(7).shuffle(texts)
    for piece, (text, score) in zip(normal, texts, strict=True):
        piece.piece, piece.score = text, score
    path.write_bytes(model.SerializeToString())
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_model):
    """A policy and a reward model with one tokenizer, and copies of both with another."""
    root = tmp_path_factory.mktemp("models")
    assert SHAPE["vocab_size"] < ROWS
    for name, has_score in (("policy", False), ("reward", True)):
        folder = save_folder(root / name, "glm", make_model("glm", has_score=has_score, vocab_size=ROWS))
        for path in tiny_model.parent.iterdir():
            if path.name.startswith("tokenizer"):
                shutil.copy(path, folder)
        shuffled(shutil.copytree(folder, root / f"other_{name}"))
    return root


def check(folders, other, own="policy"):
    return check_same_tokenizer("reward.path", folders / other, load_tokenizer(folders / own), folders / own)


def test_the_same_tokenizer_is_accepted_however_its_files_are_written(folders, tmp_path):
    assert check(folders, "reward") is None
    assert check(folders, "policy") is None
    copy = shutil.copytree(folders / "reward", tmp_path / "copy")
    config = json.loads((copy / "tokenizer_config.json").read_text()) | {"padding_side": "left"}
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    assert check(folders, copy) is None


def test_another_tokenizer_of_as_many_rows_is_refused(folders):
    with pytest.raises(
        ValueError, match=r"reward\.path is .*other_reward, whose tokenizer gives other texts"
    ):
        check(folders, "other_reward")


def test_a_tokenizer_with_other_special_tokens_is_refused(folders, tmp_path):
    """As ChatGLM2's and ChatGLM3's, which may have the same pieces."""
    copy = shutil.copytree(folders / "reward", tmp_path / "copy")
    (copy / "tokenizer_config.json").write_text('{"name_or_path": "THUDM/chatglm2-6b"}')
    with pytest.raises(ValueError, match=r"to 4 ids .*: id 636 is no token there and '<\|system\|>' here"):
        check(folders, copy)
    (copy / "tokenizer_config.json").unlink()  # its version cannot be seen: the pieces are compared
    assert check(folders, copy) is None


def test_a_folder_without_a_tokenizer_is_reported(folders, tmp_path):
    (tmp_path / "bare").mkdir()
    assert "bare, has no tokenizer" in check(folders, tmp_path / "bare")
    said = check_same_tokenizer("reward.path", folders / "reward", None, tmp_path / "bare")
    assert said.startswith("the policy, ")
    assert check_same_tokenizer("reward.path", tmp_path / "bare", None, tmp_path / "other") is None


def test_every_command_and_role_refuses_another_tokenizer(folders, tmp_path, capfd):
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt_tokens": [5, 6]}] * 2)
    pair = {"prompt_tokens": [5], "chosen_tokens": [6, 2], "rejected_tokens": [7, 2]}
    pairs = write_lines(tmp_path / "pairs.jsonl", [pair] * 2)
    common = [f"model.path={folders / 'policy'}", f"run.output={tmp_path / 'out'}", "train.dtype=fp32"]
    training = ["train.steps=1", "train.global_batch_size=2", "observe.tensorboard=false"]
    other = {name: folders / f"other_{name}" for name in ("policy", "reward")}
    answers = [f"data.path={prompts}", "generation.max_new_tokens=2"]
    reward = f"reward.path={folders / 'reward'}"
    lines = [
        ["dpo", f"data.path={pairs}", *training, f"reference.path={other['policy']}"],
        ["evaluate", *answers, f"reward.path={other['reward']}"],
        ["evaluate", *answers, reward, f"against.path={other['policy']}"],
        ["label", *answers, f"reward.path={other['reward']}"],
        ["ppo", *answers, *training, f"reward.path={other['reward']}"],
        ["ppo", *answers, *training, reward, f"critic.path={other['reward']}"],
        ["ppo", *answers, *training, reward, f"reference.path={other['policy']}"],
    ]
    for line in lines:
        assert main([line[0], *common, *line[1:]]) == 2, line
        last = capfd.readouterr().err.strip().splitlines()[-1]
        assert "whose tokenizer gives other texts" in last
        key = next(part.split("=")[0] for part in reversed(line) if "other_" in part)
        assert f"{key} is" in last
