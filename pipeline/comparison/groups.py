"""Put runs into groups: which runs may be pooled, which of them count as evidence, and why the others do not.

A group holds the runs of one device of one machine under the same conditions and settings. Every run is in exactly one
group, where it either counts or is excluded with a reason. The runs that count are those of one planned set.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline import config
from pipeline.comparison import stats
from pipeline.comparison.runs import CONDITIONS, SCORE, WORK, Entity, Run
from pipeline.profiling import score_steps

CURRENT_VERSION = str(config.EXECUTION_VERSION)
"""The tag `software.execution` of runs by the current code."""

VERSIONS = {WORK: CURRENT_VERSION, SCORE: str(score_steps.VERSION)}
"""The current version of the code, by stage."""

DISTURBED = "disturbed"
"""The reason for excluding a disturbed run begins with this word."""


@dataclass(frozen=True, eq=False)
class Group:
    """Runs of one entity with the same settings. `runs`: those that count, oldest first; `excluded`: the others,
    each with the reason; `planned`: the number of planned runs; `problem`: why nothing is claimed ('' for none)."""

    entity: Entity
    settings: Mapping[str, str]
    runs: Sequence[Run]
    excluded: Sequence[tuple[Run, str]]
    planned: int
    problem: str

    @property
    def all_runs(self) -> list[Run]:
        """The runs that count and the excluded ones."""
        return [*self.runs, *(run for run, _ in self.excluded)]

    @property
    def claimable(self) -> bool:
        """Whether claims about the group are possible: it has no problem and enough runs."""
        return not self.problem and len(self.runs) >= stats.MIN_UNITS


def group_runs(
    runs: Iterable[Run], settings_of: Callable[[Run], Mapping[str, str]], stage: str, *, allow_tainted: bool
) -> list[Group]:
    """Group the runs that may be pooled.

    `settings_of`: what the runs of a group share besides their entity; `stage`: WORK or SCORE; `allow_tainted`: whether
    disturbed runs count.
    """
    pooled: dict[tuple[Entity, tuple[tuple[str, str], ...]], list[Run]] = {}
    set_sizes: Counter[str] = Counter()
    for run in runs:
        pooled.setdefault((run.entity(stage), tuple(settings_of(run).items())), []).append(run)
        set_sizes[run.set_id] += 1
    groups = [
        _first_planned_set(entity, dict(settings), sorted(members, key=_order), set_sizes)
        for (entity, settings), members in pooled.items()
    ]
    return [_check_runs(group, stage, allow_tainted=allow_tainted) for group in groups]


def _first_planned_set(
    entity: Entity, settings: Mapping[str, str], runs: Sequence[Run], set_sizes: Mapping[str, int]
) -> Group:
    """Make a group in which the first planned set of `runs` counts. The runs are in the order of their starts.

    `set_sizes`: the runs of each planned set, over all groups. Single runs before the set are trials. Runs after it end
    every claim, because adding runs until a difference shows will always show one.
    """
    sets: dict[str, list[Run]] = {}
    for run in runs:
        sets.setdefault(run.set_id, []).append(run)
    first_set = next((members for members in sets.values() if members[0].planned > 1), None)
    if first_set is None:
        problem = f"{len(runs)} single runs were not planned as a set" if len(runs) > 1 else ""
        return Group(entity, settings, runs, [], 1, problem)
    planned = first_set[0].planned
    others = [run for members in sets.values() if members is not first_set for run in members]
    earlier = [run for run in others if _order(run) < _order(first_set[0])]
    later = [run for run in others if run not in earlier]
    problem = ""
    if in_other_groups := set_sizes[first_set[0].set_id] - len(first_set):
        problem = f"{in_other_groups} of {planned} planned runs had other conditions or settings"
    elif len(first_set) < planned:
        problem = f"only {len(first_set)} of {planned} planned runs are in the store"
    elif later:
        problem = f"{len(later)} run{'s were' if len(later) > 1 else ' was'} added after the {planned} planned ones"
    excluded = [(run, "tried before the planned set") for run in earlier]
    excluded += [(run, "added after the planned set") for run in later]
    return Group(entity, settings, first_set, excluded, planned, problem)


def _check_runs(group: Group, stage: str, *, allow_tainted: bool) -> Group:
    """Exclude disturbed runs. Add a problem if all are disturbed, or measured by another version of the code."""
    problem = group.problem
    if (version := group.runs[0].version(stage)) != VERSIONS[stage]:
        problem = f"measured by version {version} of the code"
    disturbed = [] if allow_tainted else [run for run in group.runs if run.taints(stage)]
    if len(disturbed) == len(group.runs):
        return replace(group, problem=problem or _disturbance(disturbed, stage))
    undisturbed = [run for run in group.runs if run not in disturbed]
    excluded = [*group.excluded, *((run, _disturbance([run], stage)) for run in disturbed)]
    return replace(group, runs=undisturbed, excluded=excluded, problem=problem)


def _order(run: Run) -> tuple[int, str]:
    return run.started or 0, run.run_id


def _disturbance(runs: Iterable[Run], stage: str) -> str:
    """What disturbed the runs: `disturbed (battery, load)`, or `no real data` for stand-ins alone."""
    words = sorted({word for run in runs for word in run.taints(stage)})
    only_stand_ins = all(word.startswith("no real ") for word in words)
    return ", ".join(words) if only_stand_ins else f"{DISTURBED} ({', '.join(words)})"


def display_names(runs: Iterable[Run]) -> dict[Entity, str]:
    """The display name of each entity: hardware and label, and what differs if several have the same name."""
    names: dict[Entity, str] = {}
    for run in runs:
        for entity in (run.entity(WORK), run.entity(SCORE)):
            label = f" ({entity.label})" if entity.label else ""
            names.setdefault(entity, (run.tag("hardware") or "?") + label)
    namesakes: dict[str, list[Entity]] = {}
    for entity, name in names.items():
        namesakes.setdefault(name, []).append(entity)
    return {
        entity: name if len(namesakes[name]) == 1 else f"{name} [{_difference(entity, namesakes[name])}]"
        for entity, name in names.items()
    }


def _difference(entity: Entity, namesakes: Sequence[Entity]) -> str:
    """What distinguishes an entity from its namesakes: `cuda:1, power limit 700 W`."""
    texts = [entity.machine[:6], entity.device]
    for value, (_, name, unit) in zip(entity.conditions, CONDITIONS.values(), strict=True):
        texts.append(f"{name} {value}{unit}" if value else f"{name} unknown")
    columns = zip(*((other.machine, other.device, *other.conditions) for other in namesakes), strict=True)
    return ", ".join(text for text, values in zip(texts, columns, strict=True) if len(set(values)) > 1)
