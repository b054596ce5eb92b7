"""The tables of a report as columns of text, for Markdown, the terminal and HTML.

Machine, figure, ratio and number of runs come first, because a narrow screen shows only the first columns.
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
"""Show the speed of the first third if it differs from the last third's by at least this fraction."""

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

TEXT_HEADINGS = ("machine", "recipe", "run", "runs", "run with", "why", "hardware", "date", "source")
"""Columns that hold text. The others hold numbers and are aligned right."""


class Cell(NamedTuple):
    """A cell: its text, notes in small print, and links as (text, address)."""

    text: str = ""
    notes: Sequence[str] = ()
    links: Sequence[tuple[str, str]] = ()


class Column(NamedTuple):
    """A column of a table."""

    heading: str
    cells: Sequence[Cell]

    @property
    def is_text(self) -> bool:
        """Whether the cells hold text and not numbers."""
        return self.heading in TEXT_HEADINGS


def _columns(rows: Iterable[Mapping[str, Cell]]) -> list[Column]:
    """Turn rows, each with the same headings, into columns. Leave out empty columns."""
    rows = list(rows)
    columns = [Column(heading, [row[heading] for row in rows]) for heading in (rows[0] if rows else ())]
    return [column for column in columns if any(cell.text or cell.notes for cell in column.cells)]


# --- the score


def score_columns(table: Score) -> list[Column]:
    """The columns of the score: images/s of each step, with the ratio to the reference as a note."""
    first, *others = score_steps.STEPS
    several_recipes = len({row.recipe for row in table.rows}) > 1
    differing = _differing_conditions([row.head for row in table.rows])
    return _columns(
        {
            "machine": _name(row, several=len(table.rows) > 1),
            first.title: _step(first, row),
            "n": _count(row.head),
            **{step.title: _step(step, row) for step in others},
            "memory": _machine_memory(row.head),
            "watts": Cell(format_figure(row.watts), [row.energy_source]) if row.watts else Cell(),
            "images/J": _efficiency(row, first),
            "images per money": _money(row.costs, format_large, "per "),
            **_conditions(row.head, differing),
            "recipe": Cell(row.recipe if several_recipes else ""),
            "run": _runs(row.head, row.shown),
        }
        for row in table.rows
    )


def step_facts(step: score_steps.Step, figures: StepFigures) -> list[str]:
    """What a reader must know about a step's figure: the precision, if the device chose it, and a reduced batch."""
    facts = [figures.precision] if step.best_precision and figures.precision else []
    if figures.batch_size not in (None, step.batch_size):
        facts.append(f"batch {figures.batch_size}")
    return facts


def _step(step: score_steps.Step, row: ScoreRow) -> Cell:
    figures = row.steps.get(step.name)
    if figures is None:
        return Cell()
    claim, ratio, speed = figures.claim, ratio_cell(figures.claim), figures.speed.value
    notes = [*ratio.notes, *(fact for fact in step_facts(step, figures) if not claim.reason.startswith(fact))]
    if claim.kind != "reference" and ratio.text:
        notes.insert(0, f"{ratio.text} times" if claim.speedup and "/" not in ratio.text else ratio.text)
    first_third = figures.first_third
    if first_third is not None and abs(first_third.value - speed) >= FIRST_THIRD * speed:
        notes.append(f"first third {format_figure(first_third.value)}")
    return Cell(format_figure(speed), notes)


def _machine_memory(head: Head) -> Cell:
    if not head.memory_gib:
        return Cell()
    return Cell(f"{head.memory_gib} GiB", ["RAM" if head.backend in ("cpu", "mps") else "card"])


def _efficiency(row: ScoreRow, step: score_steps.Step) -> Cell:
    figures = row.steps.get(step.name)
    return _estimate(figures.images_per_joule if figures else None, step.title, row.energy_source)


# --- the work of a recipe


def work_columns(section: Section, table: Table) -> list[Column]:
    """The columns of a recipe's work: the time of the work itself, then that of the whole process."""
    several = len(table.rows) > 1
    differing = _differing_conditions([row.head for row in table.rows])
    target = f"{100 * section.target:.3g}%" if section.target is not None else "target"
    return _columns(
        {
            "machine": _name(row, settings_in_words(row.settings) if table.settings is None else "", several=several),
            "total s": _figure(row, "total_seconds"),
            "speed-up": ratio_cell(row.claim) if several else Cell(),
            "n": _count(row.head),
            "process s": _figure(row, "process_seconds"),
            "process speed-up": ratio_cell(row.whole) if several and "process_seconds" in row.figures else Cell(),
            "s/epoch": _figure(row, "epoch_seconds"),
            f"s to {target}": _to_target(row),
            "images/s": _speed(row),
            "accuracy": _accuracy(row),
            "peak MiB": _figure(row, "peak_mib", row.memory_of),
            "images/J": _figure(row, "images_per_joule", row.energy_source),
            "cost": _money(row.costs, format_figure),
            **_conditions(row.head, differing),
            "run": _runs(row.head, row.shown),
        }
        for row in table.rows
    )


def settings_in_words(settings: Mapping[str, str]) -> str:
    """The precision, then every setting that is not the default: `bf16, threads 4`."""
    others = [(key, value) for key, value in settings.items() if key != "precision"]
    changed = [f"{key} {value}" for key, value in others if value not in ("auto", "null", "")]
    return ", ".join([settings["precision"] or "?", *changed])


def ratio_cell(claim: Claim) -> Cell:
    """The ratio to the reference with its interval, or the reason why there is none."""
    if claim.kind == "reference":
        return Cell("1")
    if claim.speedup is None:
        return Cell("not compared", [claim.reason]) if claim.kind == "other" else Cell()
    notes = [_interval(claim.speedup), KINDS.get(claim.kind, "")]
    return Cell(format_ratio(claim.speedup.value), [note for note in dict.fromkeys(notes) if note])


def _figure(row: Row, key: str, *notes: str) -> Cell:
    return _estimate(row.figures.get(key), *notes)


def _to_target(row: Row) -> Cell:
    if row.reached is None:
        return Cell()
    reached, timed = row.reached
    return _figure(row, "seconds_to_target") if reached == timed else Cell(f"reached by {reached} of {timed}")


def _speed(row: Row) -> Cell:
    if "images_per_second" in row.figures:
        return _figure(row, "images_per_second")
    return _figure(row, "feature_images_per_second", "features")


def _accuracy(row: Row) -> Cell:
    key = "test_accuracy" if "test_accuracy" in row.figures else "best_accuracy"
    if key not in row.figures:
        return Cell()
    value, low, high, _ = row.figures[key]
    ends = [] if low is None or high is None else [f"{100 * end:.2f}" for end in (max(low, 0), min(high, 1))]
    notes = ["–".join(ends)] if len(set(ends)) == 2 else []
    return Cell(f"{value:.2%}", notes + ["validation"] * (key == "best_accuracy"))


# --- cells of both tables


def _name(row: Row | ScoreRow, settings: str = "", *, several: bool) -> Cell:
    """The machine. Notes: its settings, whether it is the reference of several rows, and what it did by itself."""
    notes = [settings] if settings else []
    notes += ["reference"] if several and row.claim.kind == "reference" else []
    return Cell(row.head.name, notes + [BEHAVIOR.get(word, word) for word in row.head.behavior])


def _count(head: Head) -> Cell:
    """How many of the planned runs count. Notes: why the others do not, and the sessions or the time span."""
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


def _differing_conditions(heads: Sequence[Head]) -> list[str]:
    """The conditions (keys of CONDITIONS) in which rows differ."""
    return [key for key in CONDITIONS if len({_condition(head, key) for head in heads}) > 1]


def _conditions(head: Head, keys: Iterable[str]) -> dict[str, Cell]:
    return {CONDITIONS[key][1]: Cell(_condition(head, key)) for key in keys}


def _condition(head: Head, key: str) -> str:
    value = head.torch if key == "torch" else head.conditions[key]  # the conditions have torch without its patch level
    return f"{value}{CONDITIONS[key][2]}" if value else "not known"


def _runs(head: Head, shown: Mapping[str, str]) -> Cell:
    """Links to the runs: the most typical one by its id, the others by number."""
    others = [run for run in head.runs if run["id"] != shown["id"]]
    links = [(shown["id"][:8], shown["link"]), *((str(number), run["link"]) for number, run in enumerate(others, 2))]
    return Cell(shown["id"][:8], links=links)


def _estimate(estimate: stats.Estimate | None, *notes: str) -> Cell:
    if estimate is None:
        return Cell()
    return Cell(format_figure(estimate.value), [note for note in (_interval(estimate), *notes) if note])


def _interval(estimate: stats.Estimate | stats.Contrast) -> str:
    """The interval as `1.49–1.55`; '' if there is none, or if both ends read the same."""
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


def _money(cost: costs.Costs | None, number: Callable[[float], str], per: str = "") -> Cell:
    """The cost of renting, else of buying, with the other as a note. `per`: stands before the currency."""
    by_way = {"rented": cost.rented, "bought": cost.bought} if cost else {}
    amounts = [(way, number(amount)) for way, amount in by_way.items() if amount is not None]
    if cost is None or not amounts:
        return Cell()
    (way, amount), *others = amounts
    notes = [way, *(f"{way}: {amount}" for way, amount in others)]
    if cost.bought is not None and not cost.with_electricity:
        notes.append("electricity left out")
    return Cell(f"{amount} {per}{cost.currency}", notes)


# --- runs outside the tables


class Absent(NamedTuple):
    """Runs that count in no row, and why."""

    name: str
    settings: str
    runs: Sequence[Mapping[str, str]]
    figure: float | None
    reason: str


def absent_from_work(section: Section) -> list[Column]:
    """The runs of a section that count in none of its tables."""
    rows = [(row.head, settings_in_words(row.settings)) for table in section.tables for row in table.rows]
    return _absent_columns(rows, [(other, settings_in_words(other.settings)) for other in section.others], "total s")


def absent_from_score(table: Score) -> list[Column]:
    """The runs that have a score and count in no row of its table."""
    rows = [(row.head, row.recipe) for row in table.rows]
    return _absent_columns(rows, [(other, other.settings["recipe"]) for other in table.others], "images/s")


def _absent_columns(
    rows: Sequence[tuple[Head, str]], others: Sequence[tuple[Other, str]], figure_heading: str
) -> list[Column]:
    """The runs that do not count in their row, and those without a row, each with their settings in words."""
    left_out: dict[tuple[str, str, str], dict[str, Mapping[str, str]]] = {}
    for head, settings in rows:
        for run in head.left_out:  # by id, because a row may be in two tables
            left_out.setdefault((head.name, settings, run["reason"]), {})[run["id"]] = run
    absent = [
        Absent(name, settings, [*runs.values()], None, reason) for (name, settings, reason), runs in left_out.items()
    ]
    absent += [Absent(other.name, settings, other.runs, other.figure, other.reason) for other, settings in others]
    return _columns(
        {
            "machine": Cell(row.name),
            "why": Cell(row.reason),
            "n": Cell(str(len(row.runs))),
            figure_heading: Cell(format_figure(row.figure) if row.figure else ""),
            "run with": Cell(row.settings),
            "runs": Cell(
                " ".join(run["id"][:8] for run in row.runs),
                links=[(run["id"][:8], run["link"]) for run in row.runs],
            ),
        }
        for row in absent
    )


# --- prices


def price_columns(comparison: Comparison) -> list[Column]:
    """The prices of hardware that has runs."""
    watts = _watts(comparison)
    return _columns(
        {
            "hardware": Cell(hardware, [f"in {price.machine}"] if price.machine else ()),
            "to buy": _amount(price.buy, price.currency),
            "an hour": _amount(price.per_hour, price.currency),
            "a kWh": _amount(price.per_kwh, price.currency),
            "hours a day": Cell(f"{price.hours_per_day:g}" if price.hours_per_day else ""),
            "watts": Cell(format_figure(watts[hardware]) if hardware in watts else ""),
            "break-even hours": _break_even(price, watts.get(hardware)),
            "date": Cell(price.date),
            "source": _source(price.source),
        }
        for hardware, price in (comparison.prices or {}).items()
        if hardware not in comparison.unused_prices
    )


def _watts(comparison: Comparison) -> dict[str, float]:
    """The highest power of any step, in watts, by hardware. DEMO runs do not count."""
    watts: dict[str, float] = {}
    for score in (part.score for part in comparison.parts if part.score and not part.demo):
        for row in score.rows:
            if row.watts is not None:
                watts[row.head.hardware] = max(row.watts, watts.get(row.head.hardware, 0.0))
    return watts


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


def _source(text: str) -> Cell:
    is_address = text.startswith(("https://", "http://"))  # a price file may be someone else's: no javascript:
    return Cell(text, links=[(text, text)] if is_address else [])
