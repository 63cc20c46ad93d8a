"""What commands on models share: layouts, tokenizers, ids that end an answer, models loaded from a config."""

from pathlib import Path
from typing import Literal, Protocol

import torch

from glm_rlhf.engine.build.same_tokenizer import check_same_tokenizer
from glm_rlhf.engine.config.sections import (
    GenerationSection,
    ModelSection,
    ParallelSection,
    RunSection,
    TokenizerSection,
)
from glm_rlhf.engine.config.training import TrainingRunSection
from glm_rlhf.engine.data.tokenizer.chat_tokenizer import Tokenizer
from glm_rlhf.engine.data.tokenizer.load import has_tokenizer, load_tokenizer
from glm_rlhf.engine.data.tokenizer.stop_ids import declared_stop_ids
from glm_rlhf.parallel.model.glm import GLMModel, Role
from glm_rlhf.parallel.runtime.consensus import raise_on_all_ranks
from glm_rlhf.parallel.runtime.log import log
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.spec.model_config import GLMConfig
from glm_rlhf.parallel.storage.model_folder import open_folder, plain_file
from glm_rlhf.parallel.storage.text_files import read_json
from glm_rlhf.parallel.weights.load import load_model

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Types by the names that configs use."""


class _HasDtype(Protocol):
    @property
    def dtype(self) -> Literal["bf16", "fp32"]:
        """Precision of weights and activations."""


class ReadsText(Protocol):
    """A root config of a command whose model may have a tokenizer."""

    @property
    def tokenizer(self) -> TokenizerSection:
        """The section that may name it."""

    @property
    def tokenizer_path(self) -> Path:
        """Where it is looked for."""


class LoadsModel(ReadsText, Protocol):
    """A root config of a command on a model."""

    @property
    def run(self) -> RunSection | TrainingRunSection:
        """Names the seed."""

    @property
    def model(self) -> ModelSection:
        """The model."""

    @property
    def train(self) -> _HasDtype:
        """Its precision."""


class DrawsAnswers(Protocol):
    """A root config of a command whose model answers prompts."""

    @property
    def run(self) -> RunSection | TrainingRunSection:
        """Names the seed of everything."""

    @property
    def generation(self) -> GenerationSection:
        """May name another for answers, and ids that end them."""

    @property
    def model(self) -> ModelSection:
        """The model."""


def load_main_model(
    config: LoadsModel, topology: Topology, *, role: Role = "policy", recompute_layers: bool = False
) -> tuple[list[GLMModel], tuple[str, ...], Tokenizer | None]:
    """Return what `load_model` does of a command's `model.path`, and its tokenizer; every rank calls this.

    Raises:
        ValueError: a folder or a tokenizer that cannot be read, or that do not belong together.
    """
    chunks, created = load_model(
        config.model.path,
        topology,
        role=role,
        dtype=DTYPES[config.train.dtype],
        seed=config.run.seed,
        recompute_layers=recompute_layers,
    )
    with raise_on_all_ranks("reading the tokenizer"):
        tokenizer = find_tokenizer(config, chunks[0].glm)
    return chunks, created, tokenizer


def answer_seed(config: DrawsAnswers) -> int:
    """Return the seed that answers follow from."""
    return config.run.seed if config.generation.seed is None else config.generation.seed


def layout_of(axes: ParallelSection) -> Layout:
    """Return the layout that a config asks for."""
    return Layout(tp=axes.tp, pp=axes.pp, vpp=axes.vpp, cp=axes.cp, sequence_parallel=axes.sequence_parallel)


def find_tokenizer(config: ReadsText, glm: GLMConfig) -> Tokenizer | None:
    """Return the tokenizer, or None where none is named and none lies beside the model: ids need none.

    Raises:
        ValueError: a damaged tokenizer, or one with more ids than the model has rows.
    """
    folder = config.tokenizer_path
    if config.tokenizer.path is None and not has_tokenizer(folder):
        return None
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > glm.vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} ids, the model's embedding only "
            f"{glm.vocab_size} rows: they do not belong together"
        )
    return tokenizer


def stop_ids_of(config: DrawsAnswers, tokenizer: Tokenizer | None, glm: GLMConfig) -> frozenset[int]:
    """Return the ids that end an answer: the model's own, and those that the config adds.

    Raises:
        ValueError: the config adds one that the model cannot draw.
    """
    added = config.generation.stop_ids
    if beyond := [token for token in added if token >= glm.vocab_size]:
        raise ValueError(
            f"generation.stop_ids holds {beyond[0]}, the model's vocabulary ends at {glm.vocab_size - 1}: no "
            "answer would end so"
        )
    return frozenset(added) | _own_stop_ids(config.model.path, tokenizer, glm)


def _own_stop_ids(folder: str | Path, tokenizer: Tokenizer | None, glm: GLMConfig) -> set[int]:
    """Return the ids that end a model's answers: the tokenizer's, without one those of config.json."""
    if tokenizer is not None:
        return set(tokenizer.stop_ids)
    path = plain_file(open_folder(folder), "config.json")
    whose = "the policy in model.path"
    return set(declared_stop_ids(read_json(path), path, num_ids=glm.vocab_size, whose=whose))


def load_other(
    key: str,
    path: str | Path,
    topology: Topology,
    *,
    role: Role,
    dtype: torch.dtype,
    beside: GLMConfig,
    tokenizer: Tokenizer | None,
    tokenizer_path: str | Path,
    seed: int = 1234,
    recompute_layers: bool = False,
) -> tuple[list[GLMModel], tuple[str, ...]]:
    """Return what `load_model` does of a model that another one's ids go through; every rank calls this.

    Args:
        key: of the config, that named the folder.
        path: the folder.
        topology, role, dtype, seed, recompute_layers: as for `load_model`.
        beside: shape of the command's own model.
        tokenizer, tokenizer_path: of the command's own model, and its folder.

    Raises:
        ValueError: as `load_model`; or its vocabulary has another size, its tokenizer other ids, or it is to
            give rewards and the folder has no scalar head, whose place a new one would take.
    """
    with raise_on_all_ranks(f"comparing the tokenizer of {key} with the policy's"):
        unchecked = check_same_tokenizer(key, path, tokenizer, tokenizer_path)
    if unchecked is not None:
        log(unchecked, topology)
    chunks, created = load_model(
        path, topology, role=role, dtype=dtype, seed=seed, recompute_layers=recompute_layers
    )
    glm = chunks[0].glm
    if role == "reward" and created:
        raise ValueError(
            f"{key} is {path}, which has no scalar head: give a reward model, as the command reward makes one"
        )
    if glm.vocab_size != beside.vocab_size:
        raise ValueError(
            f"{key} has {glm.vocab_size} rows in its vocabulary, model.path {beside.vocab_size}: they "
            "do not read the same ids"
        )
    return chunks, created
