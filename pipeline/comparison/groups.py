"""Runs become groups: which runs may be pooled, which of them count as evidence, and why the others do not.

A group is one planned set of processes of one device of one machine, under conditions that all its runs share. Every
run stands in exactly one group: among the runs that count, or left out with its reason.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline import config
from pipeline.profiling.system_state import BEHAVIORS

Run = Mapping[str, Any]
"""As `tracking.finished_runs` gives it."""

CURRENT = str(config.EXECUTION_VERSION)
"""As the tag `software.execution` of today's runs has it."""

DISTURBED, STAND_IN = "disturbed", "no real "
"""How the reason of a run begins that something outside the machine disturbed, and how a stand-in is called."""


class Entity(NamedTuple):
    """One device of one machine, under the conditions that runs must share to be pooled; '' where one is not known."""

    machine: str
    device: str
    label: str
    cores: str
    memory_limit: str
    threads: str
    torch: str
    power_limit: str


CONDITIONS = {
    "cores": ("cores", ""),
    "memory_limit": ("memory limit", " GiB"),
    "threads": ("CPU threads", ""),
    "torch": ("torch", ""),
    "power_limit": ("power limit", " W"),
}
"""The conditions of an Entity, with their names and units for people."""


class LeftOut(NamedTuple):
    """A run that does not count, and why."""

    run: Run
    reason: str


@dataclass(frozen=True)
class Group:
    """Runs of one entity with the same settings. `runs`: those that count, oldest first; `planned`: how many were
    planned; `problem`: why nothing is claimed of them ('' where there is nothing)."""

    entity: Entity
    settings: Mapping[str, str]
    runs: Sequence[Run]
    left_out: Sequence[LeftOut]
    planned: int
    problem: str

    @property
    def everything(self) -> list[Run]:
        """All its runs, those left out too."""
        return [*self.runs, *(each.run for each in self.left_out)]


def entity_of(run: Run) -> Entity:
    """The run's device, machine and conditions, by its tags."""
    tags = run["tags"]

    def tag(key: str) -> str:
        return clean(tags.get(key, ""))

    version = re.match(r"\d+\.\d+", tag("software.torch"))
    return Entity(
        machine=tag("machine") or tag("hardware") or "?",
        device=tag("device") or "?",
        label=tag("label"),
        cores=tag("hardware.usable_cores"),
        memory_limit=tag("hardware.memory_limit_gib"),
        threads=tag("software.threads"),
        torch=version[0] if version else tag("software.torch"),
        power_limit=tag("hardware.power_limit_watts"),
    )


def group(
    runs: Iterable[Run],
    settings_of: Callable[[Run], Mapping[str, str]],
    taints_tag: str,
    *,
    allow_tainted: bool,
) -> list[Group]:
    """The groups of `runs`. `taints_tag` names what disturbed the stage that is compared; such runs count only if
    `allow_tainted`."""
    alike: dict[tuple[Entity, tuple[tuple[str, str], ...]], list[Run]] = {}
    sizes: Counter[str] = Counter()
    for run in runs:
        alike.setdefault((entity_of(run), tuple(settings_of(run).items())), []).append(run)
        sizes[_set_of(run)] += 1
    return [
        _evidence(entity, dict(settings), sorted(members, key=_start), sizes, taints_tag, allow_tainted=allow_tainted)
        for (entity, settings), members in alike.items()
    ]


def _evidence(
    entity: Entity,
    settings: Mapping[str, str],
    runs: Sequence[Run],
    sizes: Mapping[str, int],
    taints_tag: str,
    *,
    allow_tainted: bool,
) -> Group:
    """Decides which runs count. The first planned set does; single trials before it do not, and runs after it end every
    claim: whoever adds runs until a difference shows will find one. `sizes`: how many runs of each set there are,
    in whatever group."""
    planned, counted, left_out, problem = _planned_set(runs, sizes)
    if (version := counted[0]["tags"].get("software.execution", "1")) != CURRENT:
        problem = f"measured by version {clean(version)} of the code"
    clear, disturbed = list(counted), []
    if not allow_tainted:
        clear = [run for run in counted if not taints(run, taints_tag)]
        disturbed = [run for run in counted if taints(run, taints_tag)]
    if clear:
        left_out += [LeftOut(run, _disturbance([run], taints_tag)) for run in disturbed]
    else:
        clear = disturbed
        problem = problem or _disturbance(disturbed, taints_tag)
    return Group(entity, settings, clear, left_out, planned, problem)


def _planned_set(runs: Sequence[Run], sizes: Mapping[str, int]) -> tuple[int, list[Run], list[LeftOut], str]:
    """Of runs in the order of their starts: how many were planned, those of the plan, the others with their reasons,
    and the problem with the plan."""
    sets: dict[str, list[Run]] = {}
    for run in runs:
        sets.setdefault(_set_of(run), []).append(run)
    first = next((members for members in sets.values() if _planned(members[0]) > 1), None)
    if first is None:
        problem = f"{len(runs)} single runs were not planned as a set" if len(runs) > 1 else ""
        return 1, list(runs), [], problem
    planned = _planned(first[0])
    others = [run for members in sets.values() if members is not first for run in members]
    earlier = [run for run in others if _planned(run) == 1 and _start(run) < _start(first[0])]
    later = [run for run in others if _planned(run) > 1 or _start(run) > _start(first[0])]
    left_out = [LeftOut(run, "tried before the planned set") for run in earlier]
    left_out += [LeftOut(run, "added after the planned set") for run in later]
    problem = ""
    elsewhere = sizes[_set_of(first[0])] - len(first)
    if elsewhere:
        problem = f"{elsewhere} of {planned} planned runs ran under other conditions or settings"
    elif len(first) < planned:
        problem = f"{len(first)} of {planned} planned runs are there"
    elif later:
        problem = f"{len(later)} run{'s were' if len(later) > 1 else ' was'} added after the {planned} planned ones"
    return planned, first, left_out, problem


def _set_of(run: Run) -> str:
    """What all runs of one planned set share, and no other run has."""
    return str(run["tags"].get("repeats.id", run["run_id"]))


def _planned(run: Run) -> int:
    text = run["tags"].get("repeats", "")
    return int(text) if text.isdecimal() else 1


def _start(run: Run) -> tuple[int, str]:
    return run["started"] or 0, run["run_id"]


def _disturbance(runs: Iterable[Run], tag: str) -> str:
    words = sorted({word for run in runs for word in taints(run, tag)})
    only_stand_ins = all(word.startswith(STAND_IN) for word in words)
    return ", ".join(words) if only_stand_ins else f"{DISTURBED} ({', '.join(words)})"


def taints(run: Run, tag: str) -> list[str]:
    """What somebody else did to the run, a word each; a stand-in is one of these things."""
    stand_ins = [f"{STAND_IN}{word}" for word in clean(run["tags"].get("fallback", "")).split()]
    return [word for word in clean(run["tags"].get(tag, "")).split() if word not in BEHAVIORS] + stand_ins


def behavior(runs: Iterable[Run], taints_tag: str) -> list[str]:
    """What the machine itself did in these runs, such as throttling: a result, no taint. Runs by older code have it
    among their taints."""
    tags = [run["tags"] for run in runs]
    keys = (taints_tag, taints_tag.replace("taints", "behavior"))
    words = {word for own in tags for key in keys for word in clean(own.get(key, "")).split()}
    return sorted(words & BEHAVIORS)


def names(runs: Iterable[Run]) -> dict[Entity, str]:
    """Each entity's hardware and label; entities of one name are told apart by what they differ in."""
    plain: dict[Entity, str] = {}
    for run in runs:
        entity = entity_of(run)
        hardware = clean(run["tags"].get("hardware", "")) or "?"
        plain.setdefault(entity, hardware + (f" ({entity.label})" if entity.label else ""))
    count = Counter(plain.values())
    alike = {name: [entity for entity in plain if plain[entity] == name] for name in count}
    return {
        entity: name if count[name] == 1 else f"{name} [{_difference(entity, alike[name])}]"
        for entity, name in plain.items()
    }


def _difference(entity: Entity, others: Sequence[Entity]) -> str:
    words = []
    if len({other.machine for other in others}) > 1:
        words.append(entity.machine[:6])
    if len({other.device for other in others}) > 1:
        words.append(entity.device)
    for key, (word, unit) in CONDITIONS.items():
        if len({getattr(other, key) for other in others}) > 1:
            value = getattr(entity, key)
            words.append(f"{word} {value}{unit}" if value else f"{word} unknown")
    return ", ".join(words)


def clean(text: str) -> str:
    """A user's text on one line, without what can't be printed."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
