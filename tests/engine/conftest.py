"""Fixtures: the real ChatGLM3 tokenizer where it lies, the tiny one, and a GLM-4 folder built on the spot."""

import json
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from glm_rlhf.engine.commands.demo.toy_tokenizer import training_text
from glm_rlhf.engine.data.tokenizer.load import load_tokenizer
from glm_rlhf.engine.data.tokenizer.tiktoken_vocab import GLM4_SPLIT

REPOSITORY = Path(__file__).parents[2]

GLM4_MARKERS = [
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
]
GLM4_TEMPLATE = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the repository."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data is not there: {folder}")
    return folder


@pytest.fixture(scope="session")
def real_folder(shared_data: Path) -> Path:
    return shared_data / "chatglm3"


@pytest.fixture(scope="session")
def chatglm3(real_folder: Path):
    """The real ChatGLM3 tokenizer."""
    return load_tokenizer(real_folder)


@pytest.fixture(scope="session")
def chatglm2(real_folder: Path):
    """The same sentencepiece model, which is ChatGLM2's too, in ChatGLM2's form."""
    return load_tokenizer(real_folder, chat_format="chatglm2")


@pytest.fixture(scope="session")
def tiny():
    """The tokenizer committed under examples/."""
    return load_tokenizer(REPOSITORY / "examples" / "tiny_tokenizer")


@pytest.fixture(scope="session")
def glm4_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as GLM-4's: a small byte-level BPE with the markers as special added tokens."""
    folder = tmp_path_factory.mktemp("glm4")
    encoder = Tokenizer(models.BPE(ignore_merges=True))
    encoder.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GLM4_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    encoder.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    encoder.train_from_iterator(training_text(), trainer)
    encoder.add_special_tokens(GLM4_MARKERS)
    encoder.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": GLM4_TEMPLATE}), encoding="utf-8"
    )
    return folder


@pytest.fixture(scope="session")
def glm4(glm4_folder: Path):
    return load_tokenizer(glm4_folder)


@pytest.fixture(params=["tiny", "glm4"])
def either(request: pytest.FixtureRequest):
    """Both kinds of vocabulary: sentencepiece and byte-level BPE."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """The sentencepiece model committed under examples/."""
    return REPOSITORY / "examples" / "tiny_tokenizer" / "tokenizer.model"
