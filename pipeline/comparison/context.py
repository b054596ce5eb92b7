"""What the tables of work and of the score need: settings, names, links, and the heads and sides made with them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from pipeline import config
from pipeline.comparison import stats
from pipeline.comparison.claims import Side
from pipeline.comparison.groups import Group
from pipeline.comparison.runs import CONDITIONS, WORK, Entity, Run, measurements
from pipeline.comparison.schema import Head, Other


@dataclass(frozen=True)
class Context:
    """`courses`, `link`, `settings` and `prices`: see `build.compare`; `names`: what each entity is called."""

    courses: Callable[[str], Mapping[str, Sequence[float]]]
    link: Callable[[str, str], str]
    settings: config.Compare
    prices: Mapping[str, config.Price]
    names: Mapping[Entity, str]

    def name(self, group: Group) -> str:
        """The display name of the group's entity."""
        return self.names[group.entity]

    def run_link(self, run: Run) -> dict[str, str]:
        """The id of a run and the address of its page."""
        return {"id": run.run_id, "link": self.link(run.experiment_id, run.run_id)}

    def baseline(self, groups: Sequence[Group]) -> Group | None:
        """The group that the others are compared with: of the reference asked for, else of any machine, one without a
        problem, then the one with the most runs, then the first by name. None if no group is of the reference."""
        reference = self.settings.reference
        eligible = [group for group in groups if reference is None or any(run.ran_on(reference) for run in group.runs)]
        return min(
            eligible,
            key=lambda group: (bool(group.problem), -len(group.runs), self.name(group), group.entity),
            default=None,
        )

    def head(self, group: Group, stage: str) -> Head:
        """Whom a row of the stage's table is of, and on what evidence it rests."""
        latest = group.runs[-1]
        starts = [run.start(stage) for run in group.runs]
        known = [start for start in starts if start]
        return Head(
            name=self.name(group),
            hardware=latest.tag("hardware"),
            label=group.entity.label,
            machine=group.entity.machine,
            device=group.entity.device,
            backend=latest.tag("backend"),
            memory_gib=latest.tag("hardware.memory_gib"),
            conditions=dict(zip(CONDITIONS, group.entity.conditions, strict=True)),
            torch=", ".join(sorted({run.tag("software.torch", "?") for run in group.runs})),
            runs=[self.run_link(run) for run in group.runs],
            left_out=[self.run_link(run) | {"reason": reason} for run, reason in group.excluded],
            planned=group.planned,
            problem=group.problem,
            behavior=sorted(set().union(*(run.behavior(stage) for run in group.runs))),
            sessions=len(stats.sessions(starts)),
            hours=(max(known) - min(known)) / 3_600_000 if known else 0.0,
        )

    def other(self, group: Group, metric: str, reason: str) -> Other:
        """A group that is in no table. `metric`: its figure."""
        values = measurements(group.runs, metric)
        runs = [self.run_link(run) for run in group.all_runs]
        return Other(self.name(group), group.settings, runs, median(values) if values else None, reason)


def claimable(group: Group) -> bool:
    """Whether the group can carry a claim: no problem, and enough runs."""
    return not group.problem and len(group.runs) >= stats.MIN_UNITS


def energy_source(runs: Sequence[Run], tag: str, metric: str) -> str:
    """The source of the runs' energy `metric`; '' where it is not the same for all."""
    sources = {run.tag(tag) for run in runs if metric in run.metrics}
    return sources.pop() if len(sources) == 1 else ""


def make_side(
    name: str,
    group: Group,
    seconds: Sequence[tuple[Run, float]],
    accuracies: Mapping[str, Mapping[int, float]] | None = None,
    stage: str = WORK,
) -> Side:
    """One side of a claim. `seconds`: the runs of a group with what each took."""
    return Side(
        name=name,
        hardware=group.runs[0].tag("hardware"),
        seconds=[value for _, value in seconds],
        started=[run.start(stage) for run, _ in seconds],
        accuracies=accuracies,
        conditions=dict(zip((name for _, name, _ in CONDITIONS.values()), group.entity.conditions, strict=True)),
        problem=group.problem,
    )
