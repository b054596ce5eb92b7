"""The tables of a comparison as columns of text, for Markdown, the terminal and HTML.

Machine, figure, ratio and number of runs stand first, because a narrow screen shows only the first columns.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from pipeline import config
from pipeline.comparison import costs, stats
from pipeline.comparison.claims import Claim, too_wide
from pipeline.comparison.formats import format_duration, format_figure, format_interval, format_large, format_ratio
from pipeline.comparison.groups import DISTURBED
from pipeline.comparison.runs import CONDITIONS
from pipeline.comparison.schema import Comparison, Head, Other, Row, Score, ScoreRow, Section, StepFigures, Table
from pipeline.profiling import score_steps

FIRST_THIRD = 0.03
"""Show the speed of the first third if it differs from the last third's by at least this share."""

BEHAVIOR = {
    "throttled": "got hot: throttled",
    "thermal": "got hot: thermal pressure",
    "drift": "speed drifted",
}
"""What the machine did by itself, in words."""

KINDS = {
    "none": "no difference found",
    "small": "difference not established",
    "few": "too few runs",
    "parity": "no claim: accuracy",
    "problem": "no claim",
}
"""Why a ratio is not claimed, by the kind of its claim."""


class Cell(NamedTuple):
    """A cell: its text, notes in small print, and links as (text, address)."""

    text: str = ""
    notes: Sequence[str] = ()
    links: Sequence[tuple[str, str]] = ()


class Column(NamedTuple):
    """A column. `words`: its cells are text, aligned left."""

    heading: str
    cells: Sequence[Cell]
    words: bool = False


def _columns(rows: Sequence[object], cells: Mapping[str, Callable[..., Cell]], words: Iterable[str]) -> list[Column]:
    """Build the columns from a function per heading. Empty columns are left out."""
    columns = [Column(heading, [cell(row) for row in rows], heading in words) for heading, cell in cells.items()]
    return [column for column in columns if any(cell.text or cell.notes for cell in column.cells)]


# --- the score


def score_columns(table: Score) -> list[Column]:
    """Columns of the score: images/s of each step, with the ratio to the reference below."""
    first, *others = score_steps.STEPS
    cells: dict[str, Callable[[ScoreRow], Cell]] = {
        "machine": lambda row: _name(row.head, reference=row.is_reference, several=len(table.rows) > 1),
        first.title: lambda row: _step(first, row),
        "n": lambda row: _count(row.head),
    }
    cells |= {step.title: lambda row, step=step: _step(step, row) for step in others}  # type: ignore[misc]
    cells |= {
        "memory": lambda row: _machine_memory(row.head),
        "watts": lambda row: Cell(format_figure(row.watts), [row.energy_source]) if row.watts else Cell(),
        "images/J": _efficiency,
        "images per money": _images_for_money,
    }
    cells |= _conditions([row.head for row in table.rows])
    if len({row.recipe for row in table.rows}) > 1:
        cells["recipe"] = lambda row: Cell(row.recipe)
    cells["run"] = lambda row: _runs(row.head, row.shown)
    return _columns(table.rows, cells, ("machine", "recipe", "run"))


def step_speed(row: ScoreRow, step: score_steps.Step) -> str:
    """A step's speed and its ratio to the reference: `1,020 (1/140)`."""
    figures = row.steps.get(step.name)
    if figures is None:
        return ""
    ratio = figures.claim.speedup
    return format_figure(figures.speed.value) + (f" ({format_ratio(ratio.value)})" if ratio else "")


def step_facts(step: score_steps.Step, figures: StepFigures) -> list[str]:
    """What a reader must know of a step's figure: the precision that the device chose, and a reduced batch."""
    facts = [figures.precision] if step.best_precision and figures.precision else []
    if figures.batch_size not in (None, step.batch_size):
        facts.append(f"batch {figures.batch_size}")
    return facts


def _step(step: score_steps.Step, row: ScoreRow) -> Cell:
    figures = row.steps.get(step.name)
    if figures is None:
        return Cell()
    ratio = ratio_cell(figures.claim)
    notes = [_ratio_note(ratio.text, figures.claim), *ratio.notes]
    notes += [fact for fact in step_facts(step, figures) if not figures.claim.reason.startswith(fact)]
    first_third, speed = figures.first_third, figures.speed.value
    if first_third is not None and abs(first_third.value - speed) >= FIRST_THIRD * speed:
        notes.append(f"first third {format_figure(first_third.value)}")
    return Cell(format_figure(speed), [note for note in notes if note])


def _ratio_note(text: str, claim: Claim) -> str:
    """A ratio as a note below its figure: `140 times` or `1/140`."""
    if claim.speedup is None:
        return text if claim.kind == "other" else ""
    return text if "/" in text else f"{text} times"


def _machine_memory(head: Head) -> Cell:
    if not head.memory_gib:
        return Cell()
    return Cell(f"{head.memory_gib} GiB", ["RAM" if head.backend in ("cpu", "mps") else "card"])


def _efficiency(row: ScoreRow) -> Cell:
    figures = row.steps.get(score_steps.STEPS[0].name)
    if figures is None or figures.images_per_joule is None:
        return Cell()
    return _estimate(figures.images_per_joule, score_steps.STEPS[0].title, row.energy_source)


def _images_for_money(row: ScoreRow) -> Cell:
    if row.costs is None:
        return Cell()
    return _money(row.costs, format_large, f"per {row.costs.currency}")


# --- the work of a recipe


def work_columns(section: Section, table: Table) -> list[Column]:
    """Columns of a recipe's work: its own time, then the time of the whole process."""
    several = len(table.rows) > 1
    cells: dict[str, Callable[[Row], Cell]] = {
        "machine": lambda row: _name(
            row.head,
            reference=row.claim.kind == "reference",
            several=several,
            settings=None if table.settings is not None else row.settings,
        ),
        "total s": lambda row: _figure(row, "total_seconds"),
    }
    cells |= {"speed-up": lambda row: ratio_cell(row.claim)} if several else {}
    cells |= {"n": lambda row: _count(row.head), "process s": lambda row: _figure(row, "process_seconds")}
    cells |= {"process speed-up": _process_ratio} if several else {}
    cells["s/epoch"] = lambda row: _figure(row, "epoch_seconds")
    if section.target is not None:
        cells[f"s to {100 * section.target:.3g}%"] = _to_target
    cells |= {
        "images/s": _speed,
        "accuracy": _accuracy,
        "peak MiB": lambda row: _figure(row, "peak_mib", row.memory_of),
        "images/J": lambda row: _figure(row, "images_per_joule", row.energy_source),
        "cost": lambda row: _money(row.costs, format_figure, row.costs.currency) if row.costs else Cell(),
    }
    cells |= _conditions([row.head for row in table.rows])
    cells["run"] = lambda row: _runs(row.head, row.shown)
    return _columns(table.rows, cells, ("machine", "run"))


def settings_in_words(settings: Mapping[str, str]) -> str:
    """The precision, then every setting that is not the default: `bf16, threads 4`."""
    words = [settings["precision"] or "?"]
    words += [
        f"{key} {value}" for key, value in settings.items() if key != "precision" and value not in ("auto", "null", "")
    ]
    return ", ".join(words)


def ratio_cell(claim: Claim) -> Cell:
    """The ratio to the reference with its interval, or the reason why there is none."""
    if claim.kind == "reference":
        return Cell("1")
    if claim.speedup is None:
        return Cell("not compared", [claim.reason]) if claim.kind == "other" else Cell()
    notes = [_interval(claim.speedup), KINDS.get(claim.kind, "")]
    return Cell(format_ratio(claim.speedup.value), [note for note in dict.fromkeys(notes) if note])


def _process_ratio(row: Row) -> Cell:
    return ratio_cell(row.whole) if "process_seconds" in row.figures else Cell()


def _figure(row: Row, key: str, *notes: str) -> Cell:
    estimate = row.figures.get(key)
    return _estimate(estimate, *notes) if estimate else Cell()


def _estimate(estimate: stats.Estimate, *notes: str) -> Cell:
    return Cell(format_figure(estimate.value), [note for note in (_interval(estimate), *notes) if note])


def _to_target(row: Row) -> Cell:
    if row.reached is None:
        return Cell()
    count, known = row.reached
    return _figure(row, "seconds_to_target") if count == known else Cell(f"reached by {count} of {known}")


def _speed(row: Row) -> Cell:
    if "images_per_second" in row.figures:
        return _figure(row, "images_per_second")
    return _figure(row, "feature_images_per_second", "features")


def _accuracy(row: Row) -> Cell:
    images = next((key for key in ("test_accuracy", "best_accuracy") if key in row.figures), None)
    if images is None:
        return Cell()
    value, low, high, _ = row.figures[images]
    ends = [] if low is None or high is None else [f"{100 * end:.2f}" for end in (max(low, 0), min(high, 1))]
    notes = ["–".join(ends)] * (len(set(ends)) == 2) + ["validation"] * (images == "best_accuracy")
    return Cell(f"{value:.2%}", notes)


# --- cells of both


def _name(head: Head, *, reference: bool, several: bool, settings: Mapping[str, str] | None = None) -> Cell:
    """The machine, with notes: its settings if rows differ in them, whether it is the reference, its behavior."""
    notes = [settings_in_words(settings)] if settings is not None else []
    notes += ["reference"] if reference and several else []
    notes += [BEHAVIOR.get(word, word) for word in head.behavior]
    return Cell(head.name, notes)


def _count(head: Head) -> Cell:
    """How many of the planned runs count, why the others do not, and in how many sessions or minutes."""
    count = len(head.runs)
    reasons = Counter(run["reason"] for run in head.left_out)
    disturbed = sum(number for reason, number in reasons.items() if reason.startswith(DISTURBED))
    notes = [f"{number} {reason}" for reason, number in reasons.items()]
    if (missing := head.planned - count - disturbed) > 0:
        notes.append(f"{missing} missing")
    if head.sessions >= stats.MIN_SESSIONS:
        notes.append(f"{head.sessions} sessions")
    elif count > 1:
        notes.append(f"within {format_duration(60 * head.hours)}")
    return Cell(f"{count} of {head.planned}" if count < head.planned else str(count), notes)


def _conditions(heads: Sequence[Head]) -> dict[str, Callable[[Row | ScoreRow], Cell]]:
    """A column for each condition in which rows differ. torch is shown with its whole version."""

    def text(head: Head, key: str) -> str:
        value = head.torch if key == "torch" else head.conditions[key]
        return f"{value}{CONDITIONS[key][2]}" if value else "not known"

    return {
        word: lambda row, key=key: Cell(text(row.head, key))  # type: ignore[misc]
        for key, (_, word, _) in CONDITIONS.items()
        if len({text(head, key) for head in heads}) > 1
    }


def _runs(head: Head, shown: Mapping[str, str]) -> Cell:
    """Links to the runs: the most typical one by its id, the others by number."""
    others = [run for run in head.runs if run["id"] != shown["id"]]
    links = [(shown["id"][:8], shown["link"]), *((str(place), run["link"]) for place, run in enumerate(others, 2))]
    return Cell(shown["id"][:8], links=links)


def _interval(estimate: stats.Estimate | stats.Contrast) -> str:
    """`1.49–1.55`; '' without an interval, or if both ends read the same."""
    low, high = estimate.low, estimate.high
    if low is None or high is None:
        return ""
    if too_wide(low, high):
        return KINDS["few"]
    ratio = isinstance(estimate, stats.Contrast)
    if ratio and high < 1:
        ends = [f"1/{end}" for end in reversed(format_interval(1 / high, 1 / low, ratio=True))]
    else:
        ends = list(format_interval(low, high, ratio=ratio))
    return "–".join(ends) if ends[0] != ends[1] else ""


def _money(cost: costs.Costs, number: Callable[[float], str], unit: str) -> Cell:
    """The cost if rented, else if bought, with the other as a note."""
    by_way = {"rented": cost.rented, "bought": cost.bought}
    known = {way: value for way, value in by_way.items() if value is not None}
    if not known:
        return Cell()
    (way, value), *rest = known.items()
    notes = [way, *(f"{name}: {number(other)}" for name, other in rest)]
    if cost.bought is not None and not cost.with_electricity:
        notes.append("electricity left out")
    return Cell(f"{number(value)} {unit}", notes)


# --- runs outside the tables


class Absent(NamedTuple):
    """Runs that count in no row, and why."""

    name: str
    settings: str
    runs: Sequence[Mapping[str, str]]
    figure: float | None
    reason: str


def absent_from_work(section: Section) -> list[Absent]:
    """The runs of a section that count in none of its tables."""
    rows = [row for table in section.tables for row in table.rows]
    heads = [(row.head, settings_in_words(row.settings)) for row in rows]
    return _left_out(heads) + [_other(other, settings_in_words(other.settings)) for other in section.others]


def absent_from_score(table: Score) -> list[Absent]:
    """The runs that have a score and count in no row of its table."""
    others = [_other(other, other.settings["recipe"]) for other in table.others]
    return _left_out([(row.head, row.recipe) for row in table.rows]) + others


def _left_out(heads: Iterable[tuple[Head, str]]) -> list[Absent]:
    """Runs that do not count in their row, by reason. A row may stand in two tables."""
    runs_by_reason: dict[tuple[str, str, str], dict[str, Mapping[str, str]]] = {}
    for head, settings in heads:
        for run in head.left_out:
            runs_by_reason.setdefault((head.name, settings, run["reason"]), {})[run["id"]] = run
    return [
        Absent(name, settings, [*runs.values()], None, reason)
        for (name, settings, reason), runs in runs_by_reason.items()
    ]


def _other(other: Other, settings: str) -> Absent:
    return Absent(other.name, settings, other.runs, other.figure, other.reason)


def absent_columns(rows: Sequence[Absent], figure: str) -> list[Column]:
    """`figure`: the heading of their figures, such as `total s`."""
    cells: dict[str, Callable[[Absent], Cell]] = {
        "machine": lambda row: Cell(row.name),
        "why": lambda row: Cell(row.reason),
        "n": lambda row: Cell(str(len(row.runs))),
        figure: lambda row: Cell(format_figure(row.figure) if row.figure else ""),
        "run with": lambda row: Cell(row.settings),
        "runs": lambda row: Cell(
            " ".join(run["id"][:8] for run in row.runs), links=[(run["id"][:8], run["link"]) for run in row.runs]
        ),
    }
    return _columns(rows, cells, ("machine", "why", "run with", "runs"))


# --- prices


def price_columns(comparison: Comparison) -> list[Column]:
    """The prices of hardware that has runs."""
    used = [item for item in (comparison.prices or {}).items() if item[0] not in comparison.unused_prices]
    watts = _watts(comparison)
    cells: dict[str, Callable[[tuple[str, config.Price]], Cell]] = {
        "hardware": lambda item: Cell(item[0], [f"in {item[1].machine}"] if item[1].machine else ()),
        "to buy": lambda item: _amount(item[1].buy, item[1].currency),
        "an hour": lambda item: _amount(item[1].per_hour, item[1].currency),
        "a kWh": lambda item: _amount(item[1].per_kwh, item[1].currency),
        "hours a day": lambda item: Cell(f"{item[1].hours_per_day:g}" if item[1].hours_per_day else ""),
        "watts": lambda item: Cell(format_figure(watts[item[0]]) if item[0] in watts else ""),
        "break-even hours": lambda item: _break_even(item[1], watts.get(item[0])),
        "date": lambda item: Cell(item[1].date),
        "source": lambda item: Cell(item[1].source, links=_web(item[1].source)),
    }
    return _columns(used, cells, ("hardware", "date", "source"))


def _watts(comparison: Comparison) -> dict[str, float]:
    """The highest power of any step, in watts, by hardware. DEMO runs do not count."""
    most: dict[str, float] = {}
    for part in comparison.parts:
        for row in part.score.rows if part.score and not part.demo else ():
            if row.watts is not None:
                most[row.head.hardware] = max(row.watts, most.get(row.head.hardware, 0.0))
    return most


def _amount(value: float | None, currency: str) -> Cell:
    return Cell(f"{value:,.10g} {currency}" if value is not None else "")


def _break_even(price: config.Price, watts: float | None) -> Cell:
    hours = costs.break_even_hours(price, watts)
    if hours is None:
        return Cell()
    notes = []
    if hours != float("inf") and price.hours_per_day:
        notes.append(f"{hours / price.hours_per_day:,.0f} days of {price.hours_per_day:g} hours")
    if price.per_kwh is None or watts is None:
        notes.append("electricity left out")
    return Cell("never" if hours == float("inf") else f"{hours:,.0f}", notes)


def _web(text: str) -> list[tuple[str, str]]:
    return [(text, text)] if text.startswith(("https://", "http://")) else []
