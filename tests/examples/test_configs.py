"""Every example config is one that its command accepts, for the model and the GPUs that it names."""

from pathlib import Path

import pytest

from glm_rlhf.engine.build.models import layout_of
from glm_rlhf.engine.cli import COMMANDS
from glm_rlhf.engine.config.load import load_config
from glm_rlhf.parallel.spec.presets import preset

EXAMPLES = Path(__file__).parents[2] / "examples"
MODELS = {"chatglm3_6b": "chatglm3-6b", "glm4_9b": "glm-4-9b", "glm4_32b": "glm-4-0414-32b"}
COMMAND_OF = {command.name: command for command in COMMANDS}


def configs(folder: str) -> list[Path]:
    found = sorted((EXAMPLES / folder).glob("*.yaml"))
    assert found, f"no config in {folder}"
    return found


def load(path: Path) -> object:
    """The config of an example; its name begins with that of its command."""
    return load_config(COMMAND_OF[path.stem.partition("_")[0]].config, path)


@pytest.mark.parametrize("path", configs("tiny"), ids=lambda path: path.stem)
def test_a_tiny_example_is_accepted(path):
    assert load(path).train.dtype == "fp32"


@pytest.mark.parametrize(
    "path",
    [path for folder in MODELS for path in configs(folder)],
    ids=lambda path: str(path.relative_to(EXAMPLES)),
)
def test_a_large_example_fits_its_model_and_its_gpus(path):
    config, layout = load(path), layout_of(load(path).parallel)
    layout.check_model(preset(MODELS[path.parent.name]))
    num_gpus = int(path.stem.rpartition("_")[2].removesuffix("gpu"))
    assert config.train.global_batch_size >= layout.dp(num_gpus)
    assert path.name in path.read_text().splitlines()[1] + path.read_text().splitlines()[2]
    assert f"on {num_gpus} GPUs" in path.read_text()


def test_every_large_model_has_every_stage_on_8_and_on_64():
    for folder in MODELS:
        wanted = {f"{stage}_{gpus}gpu" for stage in ("sft", "reward", "dpo", "ppo") for gpus in (8, 64)}
        wanted -= {"ppo_8gpu"} if folder == "glm4_32b" else set()  # its four roles need 32
        assert wanted <= {path.stem for path in configs(folder)}
