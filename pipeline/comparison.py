"""One machine against another: runs become groups, groups tables, and tables what may be claimed of them.

A run is a repeat. The runs of one device of one machine, of one workload and with the same execution settings, are a
group: a row. Repeats of one process can't show what differs between processes: their intervals of times and speeds are
widened by what was measured of that (`noise`), and rows say which kind of spread they hold. Rows stand in two kinds of
tables that are never mixed: every machine at the same settings, and each at its best. In each table all rows are
compared with one reference, by intervals that hold together (`stats.shared`); `claims` says what follows. Tainted runs
have rows of their own, unless the settings let them into claims.

Everything here is plain values, of which `dataclasses.asdict` makes compare.json; nothing knows of MLflow or files.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from statistics import median
from typing import Any

from pipeline import claims, config, noise, stats
from pipeline.claims import Claim, Side
from pipeline.errors import UsageError

Run = Mapping[str, Any]
"""As `tracking.finished_runs` gives it."""

Sample = Mapping[str, Sequence[float]]
"""A figure's values by process: the tag `repeats.id` of repeats, else the run itself."""

Place = tuple[str, str]
"""A machine's fingerprint and its device: what is compared is a device of a machine."""

OWNED_YEARS = 3
OWNED_HOURS = OWNED_YEARS * 365.25 * 24
"""Hours of full use over which the price of a bought machine is spread."""

CURRENT = str(config.EXECUTION_VERSION)
"""As the tag `software.execution` of today's runs has it."""

COURSES = ("val/accuracy", "time/train_seconds", "time/val_seconds")
"""The metrics of which every epoch is read."""

LARGEST = 1e300
"""MLflow's SQL stores keep infinity as the largest double."""


@dataclass(frozen=True)
class Kind:
    """What differs between the two kinds of sections: a workload, and the step that is repeated. `key` is the figure
    that machines are compared by; a run's `figures` are its metrics under other names."""

    name: str
    key: str
    lower_is_better: bool
    figures: Mapping[str, str]
    settings: Sequence[str]
    taints: str
    energy_source: str
    where: str


WORK = Kind(
    name="work",
    key="total_seconds",
    lower_is_better=True,
    figures={
        "total_seconds": "time/total_seconds",
        "feature_images_per_second": "speed/feature_images_per_second",
        "peak_mib": "memory/peak_mib",
        "images_per_joule": "energy/images_per_joule",
        "test_accuracy": "test/accuracy",
        "best_accuracy": "best/val_accuracy",
    },
    settings=config.EXECUTION_KEYS,
    taints="taints",
    energy_source="energy.source",
    where="on this work",
)
STEP = Kind(
    name="step",
    key="sustained_images_per_second",
    lower_is_better=False,
    figures={
        "sustained_images_per_second": "speed/sustained_images_per_second",
        "last_to_first": "speed/sustained_last_to_first",
        "images_per_joule": "energy/sustained_images_per_joule",
    },
    settings=[key for key in config.EXECUTION_KEYS if key != "features"],  # a whole step has no use for them
    taints="sustained.taints",
    energy_source="sustained.energy_source",
    where="at this step",
)
ACCURACIES = ("test_accuracy", "best_accuracy")
"""Figures from 0 to 1, of which means are taken: their noise is not relative."""

TIMED = (
    "total_seconds", "epoch_seconds", "seconds_to_target", "images_per_second", "feature_images_per_second",
    "sustained_images_per_second",
)  # fmt: skip
"""Times and speeds: figures whose spread between processes is known."""


@dataclass(frozen=True)
class Group:
    """Runs of one place with the same settings, newest first; `barred` where nothing may be claimed of them. `samples`
    are by the keys of a kind's figures, of the runs that have it."""

    place: Place
    settings: Mapping[str, str]
    barred: bool
    runs: Sequence[Run]
    samples: Mapping[str, Sample]


@dataclass(frozen=True)
class Row:
    """One group as it is shown. `figures` and `values` are by the keys of the kind's figures and those that COURSES
    give: epoch_seconds, images_per_second, seconds_to_target. `reached`: how many runs reached the target, and of how
    many that is known. `course`: seconds and validation accuracy by epoch of the run `shown`, the most typical one.
    `processes`: how many runs each has; `spread`: the differences that the intervals hold, '' for a single run.
    `costs`: of one such job, or images for one unit of `currency`; by `rented` and `bought`."""

    name: str
    machine: str
    device: str
    hardware: str
    label: str
    settings: Mapping[str, str]
    torch: str
    taints: str
    runs: Sequence[Mapping[str, str]]
    processes: Sequence[int]
    spread: str
    shown: Mapping[str, str]
    figures: Mapping[str, stats.Estimate]
    values: Mapping[str, Sequence[float]]
    energy_source: str
    reached: tuple[int, int] | None
    course: Sequence[tuple[float, float]]
    costs: Mapping[str, float]
    currency: str
    claim: Claim = Claim("alone")


@dataclass(frozen=True)
class Table:
    """Rows that are compared with each other, best first. `settings` are those that all share, None where each machine
    is at its best; `level` is that of each row's interval, so that all `comparisons` hold together at 95%; `absent`
    names machines that have no run at these settings."""

    settings: Mapping[str, str] | None
    reference: str | None
    comparisons: int
    level: float
    rows: Sequence[Row]
    absent: Sequence[str]


@dataclass(frozen=True)
class Section:
    """Machines that did the same, by the name of its Kind, executed by one `version` of the code. `target`: the
    accuracy to which the time is given, the lowest final validation accuracy of a group's median run, rounded down to a
    whole per cent."""

    kind: str
    workload: str
    version: str
    title: str
    target: float | None
    tables: Sequence[Table]


@dataclass(frozen=True)
class Part:
    """Real runs, or those with a stand-in: never in one table."""

    demo: bool
    sections: Sequence[Section]


@dataclass(frozen=True)
class Comparison:
    """All that the report says. `first`, `last`: when the oldest and the newest run began, in milliseconds since 1970;
    `between`: as `compare` was given it; `unused_prices`: names in the file of prices that no run has as its hardware;
    `advice`: what to do next, where there is nothing to compare."""

    runs: int
    machines: int
    first: int | None
    last: int | None
    tainted: bool
    between: noise.Measured
    parts: Sequence[Part]
    prices: Mapping[str, config.Price] | None
    unused_prices: Sequence[str]
    advice: str


@dataclass(frozen=True)
class Context:
    """What every table needs; see `compare`."""

    courses: Callable[[str], Mapping[str, Sequence[float]]]
    link: Callable[[str, str], str]
    settings: config.Compare
    prices: Mapping[str, config.Price]
    between: noise.Measured
    names: Mapping[Place, str]
    incomplete: Collection[str]


def compare(
    runs: Iterable[Run],
    courses: Callable[[str], Mapping[str, Sequence[float]]],
    link: Callable[[str, str], str],
    settings: config.Compare,
    prices: Mapping[str, config.Price] | None,
    between: noise.Measured,
) -> Comparison:
    """`runs` come newest first. `courses` gives the COURSES of a run by its id, and is asked for those of shown rows
    alone; `link`, from the ids of experiment and run, where its page is. `between`: how logarithms of times differ
    between processes (`noise.between`), on one backend at least. Raises UsageError where no run is of the machine
    `settings.reference`."""
    # One training may stand in several experiments of a store; it is one run all the same.
    found: dict[str, Run] = {}
    for run in runs:
        found.setdefault(run["tags"].get("record", run["run_id"]), run)
    once = list(found.values())
    _check_reference(once, settings.reference)
    context = Context(cache(courses), link, settings, prices or {}, between, _names(once), _incomplete(once))
    parts = []
    for demo in (False, True):
        chosen = [run for run in once if ("fallback" in run["tags"]) == demo]
        if chosen:
            stepped = [run for run in chosen if _metric(run, STEP.figures[STEP.key])]
            steps = [_section(context, STEP, *same) for same in _alike(stepped, "sustained.workload")]
            works = [_section(context, WORK, *same) for same in _alike(chosen, "workload")]
            parts.append(Part(demo, steps + works))
    began = [run["started"] for run in once if run["started"]]
    hardware = {run["tags"].get("hardware") for run in once}
    return Comparison(
        runs=len(once),
        machines=len({_place(run)[0] for run in once}),
        first=min(began, default=None),
        last=max(began, default=None),
        tainted=settings.tainted,
        between=between,
        parts=parts,
        prices=prices,
        unused_prices=[name for name in prices or () if name not in hardware],
        advice=_advice(once, parts),
    )


def clean(text: str) -> str:
    """A user's text on one line, without what can't be printed."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


# --- what stands in which table


def _alike(runs: Sequence[Run], tag: str) -> list[tuple[str, str, list[Run]]]:
    """The runs by their work, which a tag tells, and by the version of what executed it; this version's first, and of
    those, what most machines did."""
    found: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if tag in run["tags"]:
            found.setdefault((run["tags"][tag], run["tags"].get("software.execution", "1")), []).append(run)

    def order(item: tuple[tuple[str, str], list[Run]]) -> tuple[Any, ...]:
        (workload, version), same = item
        return version != CURRENT, -len({_place(run) for run in same}), -len(same), workload, version

    return [(*key, same) for key, same in sorted(found.items(), key=order)]


def _section(context: Context, kind: Kind, workload: str, version: str, runs: Sequence[Run]) -> Section:
    groups = _groups(context, kind, runs)
    choices = _choices(kind, groups)
    if kind is STEP:
        # What was asked for: the fastest machine's last step goes the least beyond it.
        lasting = [seconds for run in runs if (seconds := _metric(run, "time/sustain_seconds"))]
        title = f"{config.SUSTAINED}'s step, repeated" + (f" for {min(lasting):.0f} s" if lasting else "")
        target = None
    else:
        tags = runs[0]["tags"]
        title = clean(f"{tags.get('recipe')} on {tags.get('dataset')} with {tags.get('weights')} weights")
        target = _target(context, [group for chosen, _ in choices for group in chosen])
    tables = [_table(context, kind, groups, chosen, settings, target) for chosen, settings in choices]
    return Section(kind.name, clean(workload), clean(version), title, target, tables)


def _groups(context: Context, kind: Kind, runs: Sequence[Run]) -> list[Group]:
    found: dict[tuple[Place, tuple[str, ...], bool], list[Run]] = {}
    for run in runs:
        settings = tuple(clean(run["params"].get(f"train.{key}", "")) for key in kind.settings)
        barred = bool(_taints(context, kind, run)) and not context.settings.tainted
        found.setdefault((_place(run), settings, barred), []).append(run)
    groups = []
    for (place, settings, barred), alike in found.items():
        samples = {
            figure: _sample(alike, partial(_metric, key=metric, share=figure in ACCURACIES))
            for figure, metric in kind.figures.items()
        }
        named = dict(zip(kind.settings, settings, strict=True))
        groups.append(Group(place, named, barred, alike, {key: found for key, found in samples.items() if found}))
    return groups


def _choices(kind: Kind, groups: Sequence[Group]) -> list[tuple[list[Group], Mapping[str, str] | None]]:
    """The groups of each table, and the settings that they share: all at the same settings (fp32; of those, what most
    machines have run), and each machine at its best. The second is left out where it would say the same."""
    alike: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        if group.settings["precision"] == "fp32":
            alike.setdefault(tuple(group.settings.values()), []).append(group)
    best: dict[Place, Group] = {}
    for group in sorted(groups, key=lambda group: (group.barred, *_order(kind, group))):
        best.setdefault(group.place, group)
    if not alike:
        return [(list(best.values()), None)]
    same = min(alike.values(), key=_commonness)
    shown = {id(group) for group in same}
    if all(id(group) in shown for group in best.values()):
        return [(same, same[0].settings)]
    return [(same, same[0].settings), (list(best.values()), None)]


def _commonness(groups: Sequence[Group]) -> tuple[int, int, int, tuple[str, ...]]:
    clear = {group.place for group in groups if not group.barred}
    places = {group.place for group in groups}
    return -len(clear), -len(places), -sum(len(group.runs) for group in groups), tuple(groups[0].settings.values())


def _order(kind: Kind, group: Group) -> tuple[Any, ...]:
    """Sorts groups from the fastest to the slowest, those without the figure last."""
    if kind.key not in group.samples:
        return (True, 0.0, -len(group.runs), *group.settings.values())
    values = _values(group.samples[kind.key])
    speed = median(values) if kind.lower_is_better else -median(values)
    return (False, speed, -len(values), *group.settings.values())


def _table(
    context: Context,
    kind: Kind,
    groups: Sequence[Group],
    chosen: Sequence[Group],
    settings: Mapping[str, str] | None,
    target: float | None,
) -> Table:
    ordered = sorted(chosen, key=lambda group: (*_order(kind, group), context.names[group.place]))
    rows = [_row(context, kind, group, target) for group in ordered]
    sides = [_side(context, kind, group, row, named=settings is None) for group, row in zip(ordered, rows, strict=True)]
    reference = _reference(context, kind, ordered)
    # A best was picked among several groups: every pair that it might have been counts as a comparison.
    tried = Counter(group.place for group in (chosen if settings else groups) if _may_be_compared(kind, group))
    comparisons, level, against = 0, stats.LEVEL, None
    if reference is not None:
        against = sides[ordered.index(reference)]
        comparisons = sum(
            tried[group.place] * tried[reference.place]
            for group in ordered
            if group is not reference and _may_be_compared(kind, group) and _fewer(kind.key, group, reference) > 1
        )
        level = stats.shared(stats.LEVEL, comparisons)
    told = []
    for group, row, side in zip(ordered, rows, sides, strict=True):
        claim = row.claim
        if group.barred:
            claim = claims.tainted(side)
        elif group is reference:
            claim = Claim("reference")
        elif against is not None and kind.key in group.samples:
            claim = claims.compared(side, against, kind.where, level)
        told.append(replace(row, claim=claim))
    there = {group.place for group in chosen}
    absent = sorted({context.names[group.place] for group in groups if group.place not in there})
    return Table(settings, against.name if against else None, comparisons, level, told, absent)


def _side(context: Context, kind: Kind, group: Group, row: Row, *, named: bool) -> Side:
    """`named`: by its precision too, which the rows of its table don't share."""
    sample = group.samples.get(kind.key, {})
    values = _values(sample)
    besides = {}
    if "peak_mib" in row.figures:  # of the whole process on a CPU, else of tensors on the device
        of = "process" if row.device == "cpu" else "device"
        besides["at {} its memory"] = (row.figures["peak_mib"].value, of)
    if "images_per_joule" in row.figures:
        words = f"with {{}} its images per joule ({row.energy_source})"
        besides[words] = (row.figures["images_per_joule"].value, row.energy_source)
    accuracies = {"test": "test_accuracy", "validation": "best_accuracy"}
    return Side(
        name=f"{row.name} at {row.settings['precision']}" if named else row.name,
        seconds=values if kind.lower_is_better else [1 / value for value in values],
        processes=len(sample),
        accuracies={images: _values(group.samples[key]) for images, key in accuracies.items() if key in group.samples}
        if kind is WORK
        else None,
        unseen=_unseen(context, group, sample),
        besides=besides,
        taints=row.taints,
    )


def _may_be_compared(kind: Kind, group: Group) -> bool:
    return not group.barred and kind.key in group.samples


def _fewer(key: str, one: Group, other: Group) -> int:
    """Runs with this figure, of the side that has fewer."""
    return min(len(_values(group.samples[key])) for group in (one, other))


def _reference(context: Context, kind: Kind, groups: Sequence[Group]) -> Group | None:
    """Of the groups that may be claimed of, the one asked for, else that with the most runs, the first by name."""
    fit = [group for group in groups if _may_be_compared(kind, group)]
    if context.settings.reference is not None:
        fit = [group for group in fit if any(_is(run, context.settings.reference) for run in group.runs)]
    return min(
        fit,
        key=lambda group: (-len(_values(group.samples[kind.key])), context.names[group.place], group.place),
        default=None,
    )


def _is(run: Run, machine: str) -> bool:
    return machine in (run["tags"].get("machine"), run["tags"].get("label"), run["tags"].get("hardware"))


def _check_reference(runs: Sequence[Run], reference: str | None) -> None:
    if reference is None or not runs or any(_is(run, reference) for run in runs):
        return
    known = sorted({clean(run["tags"][tag]) for run in runs for tag in ("hardware", "label") if run["tags"].get(tag)})
    close = config.nearest(reference, known)
    raise UsageError(
        f'compare.reference: no run in this store is of "{clean(reference)}": expected null | a fingerprint | '
        + " | ".join(known[:10])
        + (" | ..." if len(known) > 10 else "")
        + (f"; did you mean {close}?" if close else "")
    )


# --- a run's own


def _place(run: Run) -> Place:
    tags = run["tags"]
    return clean(tags.get("machine") or tags.get("hardware", "?")), clean(tags.get("device", "?"))


def _metric(run: Run, key: str, *, share: bool = False) -> float | None:
    """A metric that can be a measurement, positive or a share from 0 to 1; else None."""
    value = run["metrics"].get(key)
    return value if value is not None and (_is_share(value) if share else _is_measured(value)) else None


def _is_measured(value: float) -> bool:
    return math.isfinite(value) and 0 < value < LARGEST


def _is_share(value: float) -> bool:
    return math.isfinite(value) and 0 <= value <= 1


def _taints(context: Context, kind: Kind, run: Run) -> list[str]:
    """What disturbed the run, a word each; a stand-in does so too, and that others of its process are missing."""
    stand_ins = [f"no real {each}" for each in clean(run["tags"].get("fallback", "")).split()]
    lacking = ["incomplete"] * (_process(run) in context.incomplete)
    return clean(run["tags"].get(kind.taints, "")).split() + lacking + stand_ins


def _process(run: Run) -> str:
    """In which process it ran: by the id that its repeats share, else by its own."""
    return str(run["tags"].get("repeats.id", run["run_id"]))


def _incomplete(runs: Sequence[Run]) -> set[str]:
    """The processes of which fewer repeats are in the store than were planned: who knows why the others are not."""
    there = Counter(map(_process, runs))
    return {_process(run) for run in runs if there[_process(run)] < _planned(run)}


def _planned(run: Run) -> int:
    told = run["tags"].get("repeats", "")
    return int(told) if told.isdecimal() else 1


def _sample(runs: Iterable[Run], read: Callable[[Run], float | None]) -> dict[str, list[float]]:
    """What `read` gives of the runs that have it, by process."""
    found: dict[str, list[float]] = {}
    for run in runs:
        value = read(run)
        if value is not None:
            found.setdefault(_process(run), []).append(value)
    return found


def _values(sample: Sample) -> list[float]:
    return [value for own in sample.values() for value in own]


def _unseen(context: Context, group: Group, sample: Sample) -> stats.Part:
    """What these times or speeds can't show of what differs between processes. Where the group's own processes differ
    by more than was measured on its backend, that stands for it."""
    sizes = [len(own) for own in sample.values()]
    if max(sizes, default=1) == 1:
        return stats.NONE
    on_features = "feature_images_per_second" in group.samples
    backend = group.runs[0]["tags"].get("backend", "")
    known = noise.known(context.between, backend, "features" if on_features else "images")
    own = noise.components([[math.log(value) for value in values] for values in sample.values()])
    return stats.between_processes(sizes, max(known.deviation**2, own[1] if own else 0.0), known.degrees)


def _names(runs: Iterable[Run]) -> dict[Place, str]:
    """Each place's hardware and label, as its newest runs have them; what is named alike is told apart."""
    found: dict[Place, dict[str, str]] = {}
    for run in runs:
        own = found.setdefault(_place(run), {})
        for tag in ("hardware", "label"):
            if run["tags"].get(tag):
                own.setdefault(tag, clean(run["tags"][tag]))
    plain = {
        place: own.get("hardware", "?") + (f" ({own['label']})" if "label" in own else "")
        for place, own in found.items()
    }
    count = Counter(plain.values())
    return {place: name if count[name] == 1 else f"{name} [{place[0][:6]} {place[1]}]" for place, name in plain.items()}


def _timeline(context: Context, run: Run) -> list[tuple[float, float]]:
    """Seconds from the beginning, and validation accuracy, after each epoch; empty where that isn't known. The last
    epoch ends with `time/total_seconds`, which has in it what came before the first."""
    accuracy, training, validation = (context.courses(run["run_id"])[key] for key in COURSES)
    total = _metric(run, WORK.figures[WORK.key])
    if total is None or not accuracy or not len(accuracy) == len(training) == len(validation):
        return []
    lasting = [sum(epoch) for epoch in zip(training, validation, strict=True)]
    ends = [total - math.fsum(lasting[done:]) for done in range(1, len(lasting) + 1)]
    if not (all(map(_is_share, accuracy)) and all(map(_is_measured, ends)) and ends == sorted(ends)):
        return []
    return list(zip(ends, accuracy, strict=True))


def _target(context: Context, groups: Sequence[Group]) -> float | None:
    """The accuracy to which the time is given; None where none is known, and at 0. Groups that may be claimed of decide
    where there are any."""
    clear = [group for group in groups if not group.barred] or groups
    finals = []
    for group in clear:
        last = [course[-1][1] for course in (_timeline(context, run) for run in group.runs) if course]
        if last:
            finals.append(median(last))
    return math.floor(100 * min(finals) + 1e-9) / 100 or None if finals else None


# --- a row


def _row(context: Context, kind: Kind, group: Group, target: float | None) -> Row:
    tags = group.runs[0]["tags"]
    samples = dict(group.samples)
    if kind is WORK:
        samples |= _by_epoch(context, group)
    figures = {key: _estimate(context, group, key, sample) for key, sample in samples.items()}
    shown, course, reached = group.runs[0], [], None
    if kind.key in figures:
        middle = figures[kind.key].value
        shown = min(group.runs, key=lambda run: abs((_metric(run, kind.figures[kind.key]) or math.inf) - middle))
    if kind is WORK:
        course = _timeline(context, shown)
        if target:
            figures_to, reached = _to_target(context, group, target)
            figures |= figures_to
    sources = {
        run["tags"].get(kind.energy_source, "")
        for run in group.runs
        if kind.figures["images_per_joule"] in run["metrics"]
    }
    if len(sources) > 1 or "" in sources:  # not of the same thing, or who knows of what
        figures.pop("images_per_joule", None)
    processes = list(Counter(map(_process, group.runs)).values())
    price = context.prices.get(tags.get("hardware", ""))
    return Row(
        name=context.names[group.place],
        machine=group.place[0],
        device=group.place[1],
        hardware=clean(tags.get("hardware", "")),
        label=clean(tags.get("label", "")),
        settings=group.settings,
        torch=clean(", ".join(sorted({run["tags"].get("software.torch", "?") for run in group.runs}))),
        taints=", ".join(sorted({word for run in group.runs for word in _taints(context, kind, run)})),
        runs=[_reference_to(context, run) for run in group.runs],
        processes=processes,
        spread=_spread(group.runs, processes),
        shown=_reference_to(context, shown),
        figures=figures,
        values={key: _values(sample) for key, sample in samples.items()},
        energy_source=clean(" and ".join(sorted(sources))),
        reached=reached,
        course=course,
        costs=_costs(kind, price, figures) if price else {},
        currency=price.currency if price else "",
    )


def _reference_to(context: Context, run: Run) -> dict[str, str]:
    return {"id": run["run_id"], "link": context.link(run["experiment_id"], run["run_id"])}


def _estimate(context: Context, group: Group, key: str, sample: Sample) -> stats.Estimate:
    if key in ACCURACIES:
        return stats.mean(_values(sample))
    return stats.typical(_values(sample), unseen=_unseen(context, group, sample) if key in TIMED else stats.NONE)


def _spread(runs: Sequence[Run], processes: Sequence[int]) -> str:
    """Which differences the runs hold: within a process, or between how many, and over how many hours."""
    if len(processes) == 1:
        return "within one process" if len(runs) > 1 else ""
    fewest, most = min(processes), max(processes)
    sizes = "" if most == 1 else f" of {most}" if fewest == most else f" of {fewest} to {most}"
    began = [run["started"] for run in runs if run["started"]]
    hours = (max(began) - min(began)) / 3_600_000 if began else 0.0
    return f"between {len(processes)} processes{sizes}, over {hours:,.{0 if hours >= 10 else 1}f} hours"


def _by_epoch(context: Context, group: Group) -> dict[str, Sample]:
    """Figures of each run that are medians over its epochs: `epoch_seconds` (training alone) and
    `images_per_second`."""

    def lasting(run: Run) -> list[float]:
        return [value for value in context.courses(run["run_id"])["time/train_seconds"] if _is_measured(value)]

    def middle(run: Run) -> float | None:
        return median(seconds) if (seconds := lasting(run)) else None

    def speed(run: Run) -> float | None:
        seconds, last = lasting(run), _metric(run, "speed/train_images_per_second")
        # That is of the last epoch; every epoch has the same images.
        return last * (seconds[-1] / median(seconds)) if seconds and last is not None else None

    found = {"epoch_seconds": _sample(group.runs, middle), "images_per_second": _sample(group.runs, speed)}
    return {key: sample for key, sample in found.items() if sample}


def _to_target(
    context: Context, group: Group, target: float
) -> tuple[dict[str, stats.Estimate], tuple[int, int] | None]:
    """`seconds_to_target`, where at least half of the runs reached it: the others' time is longer than any, which has a
    median all the same, but no interval. And how many did, of how many."""

    def reached(run: Run) -> float | None:
        course = _timeline(context, run)
        return next((seconds for seconds, accuracy in course if accuracy >= target), math.inf) if course else None

    sample = _sample(group.runs, reached)
    times = _values(sample)
    if not times:
        return {}, None
    count = sum(map(math.isfinite, times))
    if count == len(times):
        key = "seconds_to_target"
        return {key: _estimate(context, group, key, sample)}, (count, len(times))
    middle = median(times)
    known = {"seconds_to_target": stats.Estimate(middle, None, None, len(times))} if math.isfinite(middle) else {}
    return known, (count, len(times))


def _costs(kind: Kind, price: config.Price, figures: Mapping[str, stats.Estimate]) -> dict[str, float]:
    """Of one such job, or, at the step, images for one unit of money; to rent, and bought, the price then spread over
    OWNED_HOURS. Electricity is in neither."""
    if kind.key not in figures:
        return {}
    hourly = {"rented": price.per_hour, "bought": price.buy and price.buy / OWNED_HOURS}
    measured = figures[kind.key].value
    return {
        how: cost * measured / 3600 if kind is WORK else measured * 3600 / cost for how, cost in hourly.items() if cost
    }


def _advice(runs: Sequence[Run], parts: Sequence[Part]) -> str:
    """What to do next where no two machines can be compared; '' where they can."""
    if not runs:
        return "No finished runs yet: `dvc repro` (or `make run`) makes the first one."
    real = [section for part in parts if not part.demo for section in part.sections]
    if any(len({(row.machine, row.device) for row in table.rows}) > 1 for section in real for table in section.tables):
        return ""
    machines = {_place(run) for run in runs if "fallback" not in run["tags"]}
    if not machines:
        return (
            "Nothing to compare: every run is a DEMO, with a stand-in for data, weights or GPU. Put right what its "
            "warning says, and run it again."
        )
    if len(machines) == 1:
        return (
            "One machine so far. Run the same on another, with MLFLOW_TRACKING_URI naming this store, or bring its "
            "runs here: `python -m pipeline.bundle export` there, `import` here. The two will then be compared."
        )
    return (
        f"{len(machines)} machines, but no two did the same work with the same version of this code: run one recipe on "
        "the same data with the same settings on both, such as `python -m pipeline.run -S recipe=linear-probe`."
    )
