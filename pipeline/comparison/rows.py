"""What the tables of work and of the score share: figures of runs, heads of rows, sides of claims, the reference."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from pipeline import config
from pipeline.comparison import claims, groups, stats
from pipeline.comparison.claims import Side
from pipeline.comparison.groups import Entity, Group, Run, clean
from pipeline.comparison.schema import Head, Other

LARGEST = 1e300
"""MLflow's SQL stores keep infinity as the largest double."""


@dataclass(frozen=True)
class Context:
    """What every table needs; see `compare`."""

    courses: Callable[[str], Mapping[str, Sequence[float]]]
    link: Callable[[str, str], str]
    settings: config.Compare
    prices: Mapping[str, config.Price]
    names: Mapping[Entity, str]


def execution_of(run: Run) -> dict[str, str]:
    """How the work was executed."""
    return {key: clean(run["params"].get(f"train.{key}", "")) for key in config.EXECUTION_KEYS}


def may_be_claimed_of(group: Group) -> bool:
    """Whether the group can carry a claim: no problem, and enough runs."""
    return not group.problem and len(group.runs) >= stats.FEWEST


def rules_for(context: Context, comparisons: int, where: str) -> claims.Rules:
    """The rules of a table in which so many comparisons are made."""
    settings = context.settings
    return claims.Rules(stats.shared(stats.LEVEL, comparisons), settings.smallest, settings.accuracy_margin, where)


def side_of(
    name: str,
    group: Group,
    runs: Sequence[Run],
    seconds: Sequence[float],
    accuracies: Mapping[str, Mapping[int, float]] | None = None,
    *,
    stage: str = "taints",
) -> Side:
    """The `runs` of a group, with what each took, as one side of a claim. `stage`: the tag of the stage's taints."""
    return Side(
        name=name,
        hardware=clean(runs[0]["tags"].get("hardware", "")),
        seconds=seconds,
        started=[started(run, stage) for run in runs],
        accuracies=accuracies,
        conditions={word: getattr(group.entity, key) for key, (word, _) in groups.CONDITIONS.items()},
        problem=group.problem,
    )


def started(run: Run, stage: str) -> int | None:
    """When the compared stage of a run began, in milliseconds: the training, or the score, which may be measured hours
    later. `stage`: the tag of its taints."""
    text = run["tags"].get("sustained.started", "") if stage.startswith("sustained.") else ""
    return int(text) if text.isdecimal() else run["started"]


def reference_index(context: Context, candidates: Mapping[int, Group]) -> int | None:
    """Of the groups that may be claimed of (else of all), the one asked for, else that with the most runs, the first
    by name."""
    wanted = context.settings.reference
    fit = {
        index: group
        for index, group in candidates.items()
        if wanted is None or any(is_machine(run, wanted) for run in group.everything)
    }
    return min(
        fit,
        key=lambda index: (
            bool(fit[index].problem), -len(fit[index].runs), context.names[fit[index].entity], fit[index].entity
        ),
        default=None,
    )  # fmt: skip


def is_machine(run: Run, machine: str) -> bool:
    """Whether the run is of the machine with this fingerprint, label or hardware name."""
    return machine in (run["tags"].get("machine"), run["tags"].get("label"), run["tags"].get("hardware"))


def head_of(context: Context, group: Group, stage: str) -> Head:
    """`stage`: the tag of its taints."""
    tags = group.runs[-1]["tags"]
    starts = [started(run, stage) for run in group.runs]
    known = [start for start in starts if start]
    versions = {clean(run["tags"].get("software.torch", "?")) for run in group.runs}
    return Head(
        name=context.names[group.entity],
        hardware=clean(tags.get("hardware", "")),
        label=group.entity.label,
        machine=group.entity.machine,
        device=group.entity.device,
        backend=clean(tags.get("backend", "")),
        memory_gib=clean(tags.get("hardware.memory_gib", "")),
        conditions={key: getattr(group.entity, key) for key in groups.CONDITIONS},
        torch=", ".join(sorted(versions)),
        runs=[link_to(context, run) for run in group.runs],
        left_out=[link_to(context, run) | {"reason": reason} for run, reason in group.left_out],
        planned=group.planned,
        problem=group.problem,
        behavior=groups.behavior(group.runs, stage),
        sessions=len(stats.sessions(starts)),
        hours=(max(known) - min(known)) / 3_600_000 if known else 0.0,
    )


def link_to(context: Context, run: Run) -> dict[str, str]:
    """The id of a run and the address of its page."""
    return {"id": run["run_id"], "link": context.link(run["experiment_id"], run["run_id"])}


def energy_source(runs: Sequence[Run], tag: str, metric: str) -> str:
    """Where the energy of all runs that have one was read; '' where that is not one source."""
    sources = {clean(run["tags"].get(tag, "")) for run in runs if metric in run["metrics"]}
    return sources.pop() if len(sources) == 1 else ""


def other_of(context: Context, group: Group, metric: str, reason: str) -> Other:
    """A group that is in no table; `metric`: its figure."""
    values = values_of(group.runs, metric)
    runs = [link_to(context, run) for run in group.everything]
    return Other(context.names[group.entity], group.settings, runs, median(values) if values else None, reason)


def values_of(runs: Iterable[Run], metric: str) -> list[float]:
    """The metric of each run that has it."""
    return [value for run in runs if (value := metric_of(run, metric)) is not None]


def metric_of(run: Run, key: str, *, share: bool = False) -> float | None:
    """A metric that can be a measurement, positive or a share from 0 to 1; else None."""
    value = run["metrics"].get(key)
    return value if value is not None and (is_share(value) if share else is_measured(value)) else None


def is_measured(value: float) -> bool:
    """Whether a positive figure can be a measurement."""
    return math.isfinite(value) and 0 < value < LARGEST


def is_share(value: float) -> bool:
    """Whether a figure is a fraction."""
    return math.isfinite(value) and 0 <= value <= 1
