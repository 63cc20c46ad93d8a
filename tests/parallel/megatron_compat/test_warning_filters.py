"""What the filters silence is still what upstream warns of, and nothing else."""

import importlib.util
import warnings
from pathlib import Path

import pytest
from upstream import Upstream, moved

from glm_rlhf.parallel.megatron_compat import warning_filters
from glm_rlhf.parallel.megatron_compat.warning_filters import MESSAGES, install

# Where upstream raises them: package, file in it.
WHERE = {
    "Transformer Engine and Apex are not installed": ("megatron", "core/optimizer/__init__.py"),
    "Apex is not installed": ("megatron", "core/models/gpt/gpt_layer_specs.py"),
    "full scope is deprecated": ("megatron", "core/transformer/transformer_config.py"),
    "The .grad attribute of a Tensor that is not a leaf": ("torch", "include/ATen/core/TensorBody.h"),
} | {message: ("torch", "distributed/distributed_c10d.py") for message in MESSAGES[4:]}


def check_text(message: str, text: str) -> None:
    package, file = WHERE[message]
    upstream = Upstream(patch="warning_filters.install", symbol=f"{package}:{file}")
    assert message in text, moved(upstream, f"does not warn of {message!r}")


@pytest.mark.parametrize("message", MESSAGES)
def test_upstream_still_warns_so(message):
    package, file = WHERE[message]
    (root,) = importlib.util.find_spec(package).submodule_search_locations
    check_text(message, Path(root, file).read_text(encoding="utf-8"))


@pytest.mark.parametrize("message", MESSAGES)
def test_a_warning_that_is_gone_is_named(message):
    with pytest.raises(AssertionError, match=r"^warning_filters\.install .* tested with .* does not warn of"):
        check_text(message, "another one")


def test_their_warnings_are_silent_and_ours_are_not():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        install()
        for message in MESSAGES:
            warnings.warn(f"{message}. And so on", stacklevel=1)
            warnings.warn(f"{message}. And so on", FutureWarning, stacklevel=1)
        deprecated = {"__name__": "megatron.core.inference.contexts", "__warningregistry__": {}}
        exec("import warnings; warnings.warn('old', DeprecationWarning)", deprecated)
        warnings.warn("ours", stacklevel=1)
        warnings.warn("ours too", DeprecationWarning, stacklevel=1)
    assert [str(one.message) for one in caught] == ["ours", "ours too"]


def test_the_package_installs_them_before_megatron_core_is_imported(monkeypatch):
    import glm_rlhf.parallel

    assert glm_rlhf.parallel.warning_filters is warning_filters
