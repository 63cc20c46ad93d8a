"""The command `doctor`: versions, fast paths, and whether the ranks reach each other."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from glm_rlhf.engine.config.tools import DoctorConfig
from glm_rlhf.engine.health.connectivity import exchange, join, try_collectives
from glm_rlhf.engine.health.survey import RankSurvey, survey_rank
from glm_rlhf.parallel.runtime.launch import Launch, read_launch


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorReport:
    """The report, on rank 0."""

    world_size: int
    """Number of launched ranks."""
    surveys: tuple[RankSurvey, ...]
    """One for each rank that answered, rank 0 first."""
    silent_ranks: tuple[int, ...]
    """Ranks that did not answer in time."""
    differences: tuple[str, ...]
    """Versions and fast paths of other ranks that differ from rank 0: one sentence each."""

    @property
    def is_healthy(self) -> bool:
        """Whether every rank answered and every collective worked."""
        return not self.silent_ranks and all(
            collective.is_ok for survey in self.surveys for collective in survey.collectives
        )


def run(config: DoctorConfig) -> int:
    """Return 0 if all ranks answer and reach each other, else 1; rank 0 prints the report.

    Every rank of a launch calls this. Without torchrun it reports on this machine only.
    """
    report = diagnose(read_launch(), timeout_s=config.doctor.timeout_s)
    if report is None:
        return 0
    sys.stdout.write(to_json(report) if config.doctor.json else to_text(report))
    return 0 if report.is_healthy else 1


def diagnose(launch: Launch, *, timeout_s: float) -> DoctorReport | None:
    """Return the report on rank 0, None on other ranks; every rank calls this.

    Args:
        launch: the place of this process.
        timeout_s: longest rendezvous, collective and exchange of results, in seconds each.

    Raises:
        ValueError: the environment does not give the rendezvous address, or nothing answers there.
    """
    rank, world_size = launch.rank, launch.world_size
    if world_size == 1:
        survey = survey_rank(rank=0, local_rank=None)
        return DoctorReport(world_size=1, surveys=(survey,), silent_ranks=(), differences=())
    store = join(launch, timeout_s)
    survey = survey_rank(rank=rank, local_rank=launch.local_rank)
    outcomes = try_collectives(store, rank=rank, world_size=world_size, timeout_s=timeout_s)
    survey = replace(survey, collectives=outcomes)
    texts = exchange(store, survey.to_json(), rank=rank, world_size=world_size, timeout_s=timeout_s)
    if rank != 0:
        return None
    surveys = tuple(RankSurvey.from_json(text) for text in texts if text is not None)
    return DoctorReport(
        world_size=world_size,
        surveys=surveys,
        silent_ranks=tuple(other for other, text in enumerate(texts) if text is None),
        differences=tuple(differences(surveys)),
    )


def differences(surveys: Sequence[RankSurvey]) -> Iterator[str]:
    """Yield one sentence for each version or fast path of a later rank that differs from the first rank's."""
    first, *others = surveys
    for survey in others:
        for here, there in zip(first.versions, survey.versions, strict=True):
            if here != there:
                yield (
                    f"rank {survey.rank} on {survey.host}: {there.name} {there.version}, "
                    f"rank {first.rank} has {here.version}"
                )
        for here, there in zip(first.fast_paths, survey.fast_paths, strict=True):
            if here.is_active != there.is_active:
                active = "active" if there.is_active else "not active"
                yield f"rank {survey.rank} on {survey.host}: {there.name} is {active} ({there.reason})"


def to_json(report: DoctorReport) -> str:
    """Return the report as one JSON object, versions and fast paths those of the first rank."""
    first = report.surveys[0]
    content = {
        "is_healthy": report.is_healthy,
        "world_size": report.world_size,
        "versions": {entry.name: entry.version for entry in first.versions},
        "fast_paths": [asdict(path) for path in first.fast_paths],
        "ranks": [
            {
                "rank": survey.rank,
                "host": survey.host,
                "devices": survey.devices,
                "collectives": [asdict(collective) for collective in survey.collectives],
            }
            for survey in report.surveys
        ],
        "silent_ranks": report.silent_ranks,
        "differences": report.differences,
    }
    return json.dumps(content, indent=2) + "\n"  # ASCII: a terminal without UTF-8 escapes in another way


def to_text(report: DoctorReport) -> str:
    """Return the report as aligned tables, versions and fast paths those of the first rank."""
    first = report.surveys[0]
    parts = ["versions", *_aligned([(entry.name, entry.version) for entry in first.versions]), ""]
    parts += ["fast paths", *_fast_paths(first), ""]
    parts += ["ranks", *_aligned([(f"rank {s.rank}", s.host, d) for s in report.surveys for d in s.devices])]
    if report.world_size > 1:
        parts += ["", f"all-reduce over {report.world_size} ranks", *_collectives(report)]
    parts += [f"  rank {rank}: no answer" for rank in report.silent_ranks]
    if report.differences:
        parts += ["", "differences between ranks", *(f"  {text}" for text in report.differences)]
    return "\n".join(parts) + "\n"


def _fast_paths(survey: RankSurvey) -> Iterator[str]:
    """Yield, for each purpose, the implementation in use, then all candidates with reasons."""
    rows = [("yes" if path.is_active else "no", path.name, path.reason) for path in survey.fast_paths]
    purpose = None
    for path, row in zip(survey.fast_paths, _aligned(rows, indent=4), strict=True):
        if path.purpose != purpose:
            purpose = path.purpose
            same = [other for other in survey.fast_paths if other.purpose == purpose]
            used = next((other.name for other in same if other.is_active), path.used_instead)
            yield f"  {purpose}: {used}"
        yield row


def _collectives(report: DoctorReport) -> list[str]:
    """Return one line per failed outcome, and rank 0's outcomes, which stand for all that are ok."""
    shown = [
        (collective.backend, f"rank {survey.rank}", "ok" if collective.is_ok else "FAILED", collective.detail)
        for survey in report.surveys
        for collective in survey.collectives
        if not collective.is_ok or survey.rank == 0
    ]
    return _aligned(shown)


def _aligned(rows: Sequence[tuple[str, ...]], *, indent: int = 2) -> list[str]:
    """Return rows with aligned columns."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        (
            " " * indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
