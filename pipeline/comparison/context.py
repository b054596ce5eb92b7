"""What the tables of the work and the score share: settings, names, links, and parts of rows and claims."""

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
    """The arguments of `build.compare`, and `names`: the display name of each entity."""

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
        """The group that the others are compared with; None if no group ran on `settings.reference`.

        Groups without a problem come first, then those with the most runs, then those first by name."""
        reference = self.settings.reference
        eligible = [group for group in groups if reference is None or any(run.ran_on(reference) for run in group.runs)]
        return min(
            eligible,
            key=lambda group: (bool(group.problem), -len(group.runs), self.name(group), group.entity),
            default=None,
        )

    def head(self, group: Group, stage: str) -> Head:
        """The machine that a row is about, and the runs that count for `stage`."""
        latest = group.runs[-1]
        starts = [run.start(stage) for run in group.runs]
        resumed = [(run, "resumed: only its accuracy counts") for run in group.runs if run.is_resumed and stage == WORK]
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
            left_out=[self.run_link(run) | {"reason": reason} for run, reason in [*group.excluded, *resumed]],
            planned=group.planned,
            problem=group.problem,
            behavior=sorted(set().union(*(run.behavior(stage) for run in group.runs))),
            sessions=len(stats.sessions(starts)),
            hours=stats.span_hours(starts),
        )

    def other(self, group: Group, metric: str, reason: str) -> Other:
        """A group that is in no table. `metric`: whose median is shown as its figure."""
        values = measurements(group.runs, metric)
        runs = [self.run_link(run) for run in group.all_runs]
        return Other(self.name(group), group.settings, runs, median(values) if values else None, reason)


def energy_source(runs: Sequence[Run], tag: str, metric: str) -> str:
    """The `tag` of the runs that have the energy `metric`; '' if they differ or no run has it."""
    sources = {run.tag(tag) for run in runs if metric in run.metrics}
    return sources.pop() if len(sources) == 1 else ""


def make_side(
    name: str,
    group: Group,
    seconds: Sequence[tuple[Run, float]],
    accuracies: Mapping[str, Mapping[int, float]] | None = None,
    stage: str = WORK,
) -> Side:
    """One side of a claim. `seconds`: the runs of the group, each with its time."""
    return Side(
        name=name,
        hardware=group.runs[0].tag("hardware"),
        seconds=[value for _, value in seconds],
        started=[run.start(stage) for run, _ in seconds],
        accuracies=accuracies,
        conditions=dict(zip((name for _, name, _ in CONDITIONS.values()), group.entity.conditions, strict=True)),
        problem=group.problem,
    )
