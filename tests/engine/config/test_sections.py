"""The settings of the commands: defaults, ranges, impossible combinations, documentation."""

import dataclasses
import pickle
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from glm_rlhf.engine.cli import COMMANDS, Command
from glm_rlhf.engine.config import sections
from glm_rlhf.engine.config.keys import keys_of
from glm_rlhf.engine.config.load import ConfigError, load_config
from glm_rlhf.engine.config.sections import GenerateConfig, ScoreConfig
from glm_rlhf.engine.config.tools import ConvertConfig, DoctorConfig
from glm_rlhf.engine.config.training import LabelConfig

ROOTS = (ConvertConfig, DoctorConfig, ScoreConfig)
REQUIRED = {
    ConvertConfig: ["model.path=source", "convert.to=target"],
    DoctorConfig: [],
    ScoreConfig: ["model.path=model", "data.path=data.jsonl"],
}
STABLE_KEYS = {
    *("run.name", "run.output", "run.seed", "model.path", "tokenizer.path"),
    *("parallel.tp", "parallel.pp", "parallel.vpp", "parallel.cp", "parallel.sequence_parallel"),
    *("data.path", "data.out", "data.max_prompt_tokens", "train.dtype", "train.micro_batch_tokens"),
}


def _load(root: type, *overrides: str):
    return load_config(root, overrides=[*REQUIRED[root], *overrides])


def test_score_has_the_keys_of_the_public_contract():
    assert set(keys_of(ScoreConfig)) >= STABLE_KEYS


@pytest.mark.parametrize("root", ROOTS)
def test_every_key_has_a_description(root: type):
    silent = [key.path for key in keys_of(root).values() if len(key.meaning) < 10]
    assert silent == []


@pytest.mark.parametrize("root", ROOTS)
def test_only_the_named_keys_are_required(root: type):
    required = {key.path for key in keys_of(root).values() if key.is_required}
    assert required == {override.partition("=")[0] for override in REQUIRED[root]}
    _load(root)


@pytest.mark.parametrize("root", ROOTS)
def test_a_config_never_changes(root: type):
    loaded = _load(root)
    section = getattr(loaded, dataclasses.fields(loaded)[0].name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(section, dataclasses.fields(section)[0].name, "other")
    assert pickle.loads(pickle.dumps(loaded)) == loaded


def test_the_same_key_means_the_same_in_every_command():
    meanings: dict[str, tuple] = {}
    for root in ROOTS:
        for key in keys_of(root).values():
            description = (key.accepts, key.meaning)
            assert meanings.setdefault(key.path, description) == description, (
                f"{key.path} differs in {root.__name__}"
            )


def test_the_run_folder_follows_the_name_of_the_run():
    assert _load(ScoreConfig).run.output == "outputs/score"
    assert _load(ConvertConfig).run.output == "outputs/convert"
    assert _load(ScoreConfig, "run.name=night").run.output == "outputs/night"
    assert _load(ScoreConfig, "run.name=night", "run.output=/tmp/a").run.output == "/tmp/a"
    assert _load(ScoreConfig, "run.name=night", "run.output=/big/<run.name>/1").run.output == "/big/night/1"


def test_derived_paths_follow_the_config():
    assert _load(ScoreConfig).out_path == Path("outputs/score/score.jsonl")
    assert _load(ScoreConfig, "data.out=there.jsonl").out_path == Path("there.jsonl")
    assert _load(ScoreConfig).tokenizer_path == Path("model")
    assert _load(ScoreConfig, "tokenizer.path=words").tokenizer_path == Path("words")


def test_a_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert _load(ScoreConfig, "data.path=~/d.jsonl").data.path == "/home/someone/d.jsonl"


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("7", 7), ("5GB", 5 * 10**9), ("512MiB", 2**29), ("1.5 GB", 15 * 10**8), ("64 KiB", 65536)],
)
def test_a_size_is_bytes_or_text_with_a_unit(text: str, num_bytes: int):
    assert _load(ConvertConfig, f"convert.max_shard_bytes={text}").convert.max_shard_bytes == num_bytes


@pytest.mark.parametrize(
    ("root", "override", "complaint"),
    [
        (
            ScoreConfig,
            "parallel.tp=0",
            "parallel.tp is 0 (a whole number), it must be a whole number, at least 1",
        ),
        (ScoreConfig, "parallel.cp=-2", "at least 1"),
        (
            ScoreConfig,
            "parallel.timeout_s=0",
            "parallel.timeout_s is 0 (a whole number), it must be a number, above 0",
        ),
        (ScoreConfig, "parallel.timeout_s=.inf", "parallel.timeout_s is inf"),
        (ScoreConfig, "parallel.timeout_s=.nan", "parallel.timeout_s is nan"),
        (ScoreConfig, "parallel.vpp=2", "parallel.vpp is 2 with parallel.pp 1"),
        (
            ScoreConfig,
            "parallel.sequence_parallel=true",
            "parallel.sequence_parallel is true with parallel.tp 1",
        ),
        (ScoreConfig, "run.seed=-1", "at least 0"),
        (ScoreConfig, "run.seed=2147483648", "at most 2147483647"),
        (ScoreConfig, "run.name=a/b", "the name of one folder"),
        (ScoreConfig, "run.name=..", "the name of one folder"),
        (ScoreConfig, "train.dtype=fp16", "train.dtype is 'fp16' (text), it must be one of bf16, fp32"),
        (ScoreConfig, "data.on_error=ignore", "one of raise, skip"),
        (ScoreConfig, "data.out=./data.jsonl", "data.out and data.path are both data.jsonl"),
        (ConvertConfig, "convert.to=./source/", "convert.to and model.path are both source"),
        (ConvertConfig, "convert.max_shard_bytes=0", "a size in bytes, above 0"),
        (ConvertConfig, "convert.max_shard_bytes=5Gb", "a number with B, KB, MB, GB, TB"),
        (ConvertConfig, "convert.format=llama", "one of same, chatglm, glm, glm4"),
        (DoctorConfig, "doctor.timeout_s=-1", "above 0"),
    ],
)
def test_an_impossible_value_or_combination_is_refused(root: type, override: str, complaint: str):
    with pytest.raises(ConfigError) as caught:
        _load(root, override)
    assert complaint in str(caught.value)


@pytest.mark.parametrize("number", ["1e-45", "1e-320", "0.00009", "1e40", "-1", ".inf", ".nan", "1e400"])
def test_a_temperature_that_fp32_cannot_divide_by_is_refused(number: str):
    for root, required in ((GenerateConfig, "model.path=m"), (LabelConfig, "reward.path=r")):
        with pytest.raises(ConfigError) as caught:
            load_config(
                root, None, ["model.path=m", "data.path=d", required, f"generation.temperature={number}"]
            )
        assert "generation.temperature is " in str(caught.value)
        assert "from 0.0001 to 10000" in str(caught.value)


@pytest.mark.parametrize("number", [0, 0.0001, 10000])
def test_zero_and_both_ends_are_temperatures(number: float):
    assert sections.GenerationSection(temperature=number).temperature == number


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_no_number_of_any_command_is_nan_or_infinite(command: Command):
    required = [f"{key}=1" for key in _required(command.config)]
    numbers = [key for key in keys_of(command.config).values() if key.value_type in (int, float, tuple)]
    for key in numbers:
        for value in (".nan", "-.inf", "1e400", "[.nan]", "[0.9, .inf]"):
            with pytest.raises(ConfigError, match=re.escape(key.path)):
                load_config(command.config, None, [*required, f"{key.path}={value}"])


def _required(root: type) -> list[str]:
    return [path for path, key in keys_of(root).items() if key.is_required]


def test_sections_are_checked_when_built_in_python_too():
    with pytest.raises(ValidationError):
        sections.ParallelSection(tp="2")
    with pytest.raises(ValidationError):
        sections.ParallelSection(tensor_parallel=2)
    with pytest.raises(ValueError, match=r"parallel\.vpp is 2"):
        sections.ParallelSection(vpp=2)


def test_a_root_reads_its_file(tmp_path: Path):
    file = tmp_path / "score.yaml"
    file.write_text("model:\n  path: m\ndata:\n  path: d\nparallel:\n  tp: 2\n", encoding="utf-8")
    assert ScoreConfig.from_yaml(file).parallel.tp == 2
