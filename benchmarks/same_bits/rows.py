"""The table of runs: every training command in every layout, and the variants in some."""

from collections.abc import Collection
from dataclasses import dataclass

from benchmarks.same_bits.variants import VARIANTS, Variant

COMMANDS = ("ppo", "sft", "reward", "dpo")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLayout:
    """Ranks and how a model is laid out over them; the rest of the world is data parallel."""

    world: int
    """Number of ranks."""
    options: tuple[str, ...] = ()
    """`section.key=value` each."""


LAYOUTS = {
    "one": RankLayout(world=1),
    "tp2": RankLayout(world=2, options=("parallel.tp=2",)),
    "pp2": RankLayout(world=2, options=("parallel.pp=2",)),
    "tp2_pp2": RankLayout(world=4, options=("parallel.tp=2", "parallel.pp=2")),
    "cp2_dp2": RankLayout(world=4, options=("parallel.cp=2",)),
    "tp2_sp_dp2": RankLayout(world=4, options=("parallel.tp=2", "parallel.sequence_parallel=true")),
    "pp2_vpp2": RankLayout(world=2, options=("parallel.pp=2", "parallel.vpp=2")),
    "tp4": RankLayout(world=4, options=("parallel.tp=4",)),
}

_COMMON = (
    "model.path={inputs}/chatglm",
    "optimizer.lr=1e-3",
    "train.steps=2",
    "train.dtype=fp32",
    "train.global_batch_size=4",
    "train.micro_batch_tokens=48",
    "observe.tensorboard=false",
)
_OF_COMMAND = {
    "ppo": (
        "data.path={inputs}/prompts.jsonl",
        "reward.function=answer_rules:low_ids",
        "critic.lr=1e-3",
        "generation.max_new_tokens=10",
        "generation.num_samples=2",
        "generation.page_size=4",
        # One id in eight ends an answer, so that lengths differ.
        "generation.stop_ids=[3, 11, 19, 27, 35, 43, 51, 59, 67, 75, 83, 91]",
        "train.sample_every=0",
    ),
    "sft": ("data.path={inputs}/demonstrations.jsonl",),
    "reward": ("data.path={inputs}/pairs.jsonl",),
    "dpo": ("data.path={inputs}/pairs.jsonl",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRun:
    """One run of a row."""

    layout: RankLayout
    """Its ranks."""
    settings: dict[str, str]
    """Value by key, under the new names; {inputs} stands for the folder of inputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRow:
    """A command in a layout, run in both trees."""

    command: str
    """Name of the command."""
    layout: str
    """Name of the layout."""
    variant: Variant
    """The optional path that it takes."""

    @property
    def name(self) -> str:
        """What the report calls it."""
        return f"{self.command} {self.layout} {self.variant.name}".rstrip()

    @property
    def runs(self) -> list[RowRun]:
        """Its runs, one after another in the same run folder."""
        variant = self.variant
        runs = [self._run(self.layout, variant.options)]
        if variant.then is not None:
            runs.append(self._run(variant.then_layout or self.layout, variant.options + variant.then))
        return runs

    def _run(self, name: str, options: tuple[str, ...]) -> RowRun:
        layout = LAYOUTS[name]
        arguments = (*_COMMON, *_OF_COMMAND[self.command], *layout.options, *options)
        return RowRun(layout=layout, settings=dict(option.split("=", 1) for option in arguments))


BASE = Variant(name="")


def all_rows() -> list[TableRow]:
    """Return the whole table: base rows first, then the variants."""
    rows = [TableRow(command=command, layout=name, variant=BASE) for command in COMMANDS for name in LAYOUTS]
    for command in COMMANDS:
        for variant, *layouts in VARIANTS[command]:
            rows += [TableRow(command=command, layout=name, variant=variant) for name in layouts]
    return rows


def chosen_rows(
    commands: Collection[str] = (), layouts: Collection[str] = (), variants: Collection[str] = ()
) -> list[TableRow]:
    """Return the rows of these commands, layouts and variants; an empty collection stands for all."""
    return [
        row
        for row in all_rows()
        if (not commands or row.command in commands)
        and (not layouts or row.layout in layouts)
        and (not variants or row.variant.name in variants)
    ]
