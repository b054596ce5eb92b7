"""A comparison as tables of text, as Markdown, on the terminal, as charts, and as JSON; `page` makes HTML of it."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from pipeline import plots, stats
from pipeline.claims import CLAIM_RUNS, PARITY, PARITY_SINGLE, Claim, factor, factors, large, percent
from pipeline.comparison import CURRENT, OWNED_HOURS, OWNED_YEARS, STEP, WORK, Comparison, Part, Row, Section, Table

TERMINAL_ROWS = 10
"""Machines, and sentences of a section, that the terminal shows; the report has all."""

NOTES = (
    f"n counts runs: a run is a repeat. Figures are medians over them, each with a {stats.LEVEL:.0%} interval "
    "(Student's t on logarithms); accuracies are means with Student's t. A single run has no interval.",
    "The speed-up is a ratio of geometric means. Its interval is Welch's t on logarithms with the critical value of "
    "Cochran and Cox (1950), which assumes no equal variances and keeps its level with few runs; by Bonferroni, the "
    f"intervals of a table hold together at {stats.LEVEL:.0%}. Faster and slower are said where the interval excludes "
    f"1 and both sides have {CLAIM_RUNS} runs or more.",
    f'"Finds" is the smallest difference that this comparison would have found in {stats.POWER:.0%} of cases: '
    "noncentral t, at the level that the table's intervals share.",
    "Where final accuracies differ beyond noise no speed-up is claimed: where the interval of their difference "
    f"excludes 0 and they are more than {100 * PARITY:g} points apart, or with a single run more than "
    f"{100 * PARITY_SINGLE:g}.",
    "Below n stands which differences the intervals of a row hold: repeats within one process show fewer than runs in "
    "several, and runs of one hour fewer than those of two days. Where several runs share a process, intervals of "
    "times and speeds are widened by what was measured between processes on that kind of device, for trainings alike "
    "(on features or on images), else the most on it or on any.",
    "End/start is the speed in the last third of the time over that in the first: below 1 where a machine got hot.",
    "The total time is copying to the device, features, training and validation; s/epoch is training alone. The time "
    "to an accuracy ends with the epoch that reached it; with some runs that never did, it is the median of all, and "
    "has no interval.",
    "Peak memory is what tensors held on a GPU, the whole process on a CPU: the two are not compared. Nor are energies "
    "of two sources, nor speeds of two workloads.",
    "Runs are compared by the version of the code that executed them (tag `software.execution`): what makes the same "
    "work faster here is no merit of a machine's.",
    "Tainted runs have rows of their own, and nothing is claimed of them unless `compare.tainted` says so.",
)
PRICE_NOTE = (
    f"A price to buy is spread over {OWNED_YEARS} years of full use ({OWNED_HOURS:,.0f} hours). Electricity is in no "
    "price. Nothing is converted between currencies. Break-even: hours of use after which buying costs less."
)


class Cell(NamedTuple):
    """A table's cell: what it says, and what a page says below it in small."""

    text: str = ""
    small: str = ""


Column = tuple[str, list[Cell]]


# --- tables


def tables(comparison: Comparison) -> Iterator[tuple[Part, Section, Table]]:
    """All tables in the order of the report."""
    for part in comparison.parts:
        for section in part.sections:
            for table in section.tables:
                yield part, section, table


def columns(section: Section, table: Table) -> list[Column]:
    """The table's columns; those with nothing in them are left out."""
    step = section.kind == STEP.name
    own: dict[str, Callable[[Row], Cell]] = {"machine": _name(table)}
    if table.settings is None:
        own["settings"] = lambda row: Cell(settings_in_words(row.settings))
    own["n"] = lambda row: Cell(str(len(row.runs)), row.spread)
    if step:
        own |= {
            "images/s": lambda row: _figure(row, STEP.key),
            "speed-up": lambda row: _speedup(row.claim),
            "finds": lambda row: _finds(row.claim),
            "end/start": lambda row: _figure(row, "last_to_first"),
            "images/J": lambda row: _with(_figure(row, "images_per_joule"), row.energy_source),
            "images per money": lambda row: _costs(row, large, "per "),
        }
    else:
        own |= {
            "total s": lambda row: _figure(row, WORK.key),
            "speed-up": lambda row: _speedup(row.claim),
            "finds": lambda row: _finds(row.claim),
            "s/epoch": lambda row: _figure(row, "epoch_seconds"),
            f"s to {section.target or 0:.0%}": _to_target,
            "images/s": _speed,
            "peak MiB": lambda row: _with(_figure(row, "peak_mib"), _of(row, "peak_mib")),
            "images/J": lambda row: _with(_figure(row, "images_per_joule"), row.energy_source),
            "accuracy": _accuracy,
            "cost": lambda row: _costs(row, factor, ""),
        }
    own |= {
        "tainted": lambda row: Cell(row.taints),
        "torch": lambda row: Cell(row.torch if _torch(table) is None else ""),
        "run": lambda row: Cell(row.shown["id"][:8]),
    }
    if len(table.rows) == 1:  # nothing to compare
        own = {heading: cell for heading, cell in own.items() if heading not in ("speed-up", "finds")}
    found = [(heading, [cell(row) for row in table.rows]) for heading, cell in own.items()]
    return [(heading, cells) for heading, cells in found if any(cell.text for cell in cells)]


def settings_in_words(settings: Mapping[str, str]) -> str:
    """`bf16, threads 4`: the precision, and what is not left to choose itself."""
    said = [settings["precision"] or "?"]
    said += [
        f"{key} {value}" for key, value in settings.items() if key != "precision" and value not in ("auto", "null", "")
    ]
    return ", ".join(said)


def _name(table: Table) -> Callable[[Row], Cell]:
    def cell(row: Row) -> Cell:
        return Cell(row.name, "reference" if row.claim.kind == "reference" and len(table.rows) > 1 else "")

    return cell


def _interval(estimate: stats.Estimate | stats.Contrast) -> str:
    """`1.49–1.55`; '' where there is none, or no spread, as of the memory of five equal runs."""
    if estimate.low is None or estimate.high is None:
        return ""
    low, high = factors(estimate.low, estimate.high, ratio=isinstance(estimate, stats.Contrast))
    return f"{low}–{high}" if low != high else ""


def _figure(row: Row, key: str) -> Cell:
    estimate = row.figures.get(key)
    return Cell(factor(estimate.value), _interval(estimate)) if estimate else Cell()


def _speedup(claim: Claim) -> Cell:
    notes = {"none": "no difference found", "few": "too few runs", "single": "single run"}
    if claim.kind == "parity":
        return Cell("no claim", "accuracies differ" if claim.accuracy else "accuracies not known")
    if claim.kind == "tainted":
        return Cell("no claim", "tainted")
    if claim.speedup is None:
        return Cell("1" if claim.kind == "reference" else "")
    said = [_interval(claim.speedup), notes.get(claim.kind, "")]
    return Cell(factor(claim.speedup.value), ", ".join(part for part in said if part))


def _finds(claim: Claim) -> Cell:
    detectable = claim.speedup.detectable if claim.speedup else None
    return Cell() if detectable is None else Cell(percent(detectable - 1))


def _to_target(row: Row) -> Cell:
    if row.reached is None:
        return Cell()
    count, known = row.reached
    estimate = row.figures.get("seconds_to_target")
    if estimate is None:
        return Cell("not reached", f"by {known - count} of {known} runs")
    return Cell(factor(estimate.value), _interval(estimate) if count == known else f"by {count} of {known} runs")


def _speed(row: Row) -> Cell:
    if "images_per_second" in row.figures:
        return _figure(row, "images_per_second")
    return _with(_figure(row, "feature_images_per_second"), "features")


def _with(cell: Cell, note: str) -> Cell:
    """The cell with a note in small, where it says anything."""
    return Cell(cell.text, ", ".join(part for part in (cell.small, note) if part)) if cell.text else cell


def _accuracy(row: Row) -> Cell:
    images = next((key for key in ("test_accuracy", "best_accuracy") if key in row.figures), None)
    if images is None:
        return Cell()
    value, low, high, _ = row.figures[images]
    ends = [] if low is None or high is None else [f"{100 * end:.2f}" for end in (max(low, 0), min(high, 1))]
    said = ["–".join(ends)] * (len(set(ends)) == 2) + ["validation"] * (images == "best_accuracy")
    return Cell(f"{value:.2%}", ", ".join(said))


def _costs(row: Row, number: Callable[[float], str], per: str) -> Cell:
    """The first of rented and bought in full, the other below it."""
    (how, value), *rest = row.costs.items() or [("", 0.0)]
    if not how:
        return Cell()
    return Cell(f"{number(value)} {per}{row.currency}", "; ".join([how, *(f"{number(v)} {how}" for how, v in rest)]))


# --- Markdown


def markdown(comparison: Comparison) -> str:
    """The whole report as Markdown."""
    parts = ["# Machines compared", span(comparison)]
    parts += [comparison.advice] if comparison.advice else []
    for part in comparison.parts:
        parts += [f"# {DEMO}"] if part.demo else []
        for section in part.sections:
            parts.append(f"## {heading(section)} (`{section.workload}`)")
            for table in section.tables:
                parts.append(f"### {table_title(table)}")
                parts.append("\n".join(f"- {_plain(claim.sentence)}" for claim in verdicts(section, table)))
                parts.append(_markdown_table(columns(section, table)))
                parts += map(_plain, remarks(table))
    parts += _price_parts(comparison)
    if comparison.parts:
        parts += ["## How to read this", "\n".join(f"- {note}" for note in NOTES)]
    return "\n\n".join(part for part in parts if part) + "\n"


DEMO = "DEMO: not the real thing"


def span(comparison: Comparison) -> str:
    """How many runs, of how many machines, when; '' where there is none."""
    if comparison.first is None or comparison.last is None:
        return ""
    days = [datetime.fromtimestamp(ms / 1000, UTC).date().isoformat() for ms in (comparison.first, comparison.last)]
    runs, machines = comparison.runs, comparison.machines
    when = days[0] if days[0] == days[1] else f"{days[0]} to {days[1]}"
    tainted = " Tainted runs are in what is claimed." if comparison.tainted else ""
    return f"{runs} run{'s' * (runs != 1)} of {machines} machine{'s' * (machines != 1)}, {when}.{tainted}"


def heading(section: Section) -> str:
    """What the machines of the section did."""
    title = f"Sustained speed: {section.title}" if section.kind == STEP.name else section.title
    return title if _is_current(section) else f"{title}, executed by version {section.version} of the code"


def place(part: Part, section: Section, table: Table) -> str:
    """A folder's name for the table."""
    version = "" if _is_current(section) else f"-version-{section.version}"
    kind = "best" if table.settings is None else "same-settings"
    return f"{'demo-' * part.demo}{section.kind}-{section.workload}{version}/{kind}"


def _is_current(section: Section) -> bool:
    return section.version == CURRENT


def table_title(table: Table) -> str:
    """Which of the two kinds of tables it is, and what all its rows share."""
    torch = _torch(table)
    version = f", torch {torch}" if torch else ""
    if table.settings is None:
        return f"Each machine at its best{version}"
    return f"Every machine at the same settings: {settings_in_words(table.settings)}{version}"


def _torch(table: Table) -> str | None:
    """The version of torch that all rows share."""
    versions = {row.torch for row in table.rows}
    return versions.pop() if len(versions) == 1 else None


def remarks(table: Table) -> list[str]:
    """Who isn't in it, and why; why nothing is compared."""
    said = []
    if table.absent:
        said.append(f"Not in this table, for no run of theirs is at its settings: {', '.join(table.absent)}.")
    if table.reference is None and len(table.rows) > 1:
        said.append("Nothing is compared here: no row is of the reference and may be claimed of.")
    return said


def verdicts(section: Section, table: Table) -> list[Claim]:
    """What is said in sentences; of the step that is repeated the table says it all."""
    return [] if section.kind == STEP.name else [row.claim for row in table.rows if row.claim.sentence]


def _plain(text: str) -> str:
    """A text that can't end a table's cell, or begin a tag."""
    return text.replace("|", "/").replace("<", "‹").replace(">", "›")


def _markdown_table(found: Sequence[Column]) -> str:
    def text(cell: Cell) -> str:
        return _plain(f"{cell.text} [{cell.small}]" if cell.small else cell.text)

    rows = [[heading for heading, _ in found]]
    rows += [list(map(text, row)) for row in zip(*(cells for _, cells in found), strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _price_parts(comparison: Comparison) -> list[str]:
    if comparison.prices is None:
        return []
    unused = [f"No run's hardware is called {_plain(name)}." for name in comparison.unused_prices]
    found = price_columns(comparison)
    return ["## Prices", _markdown_table(found) if found else "", PRICE_NOTE, " ".join(unused)]


def price_columns(comparison: Comparison) -> list[Column]:
    """The prices of machines that have runs; none where there is none."""
    used = {name: price for name, price in (comparison.prices or {}).items() if name not in comparison.unused_prices}
    if not used:
        return []

    def money(value: float | None, currency: str) -> Cell:
        return Cell(f"{value:,.10g} {currency}" if value else "")

    found: list[Column] = [
        ("hardware", [Cell(name) for name in used]),
        ("to buy", [money(price.buy, price.currency) for price in used.values()]),
        ("an hour", [money(price.per_hour, price.currency) for price in used.values()]),
        (
            "break-even hours",
            [
                Cell(f"{price.buy / price.per_hour:,.0f}" if price.buy and price.per_hour else "")
                for price in used.values()
            ],
        ),
        ("date", [Cell(price.date) for price in used.values()]),
        ("source", [Cell(price.source) for price in used.values()]),
    ]
    return [(heading, cells) for heading, cells in found if any(cell.text for cell in cells)]


# --- the terminal


def on_terminal(comparison: Comparison) -> str:
    """The ranking and what is claimed, short."""
    lines: list[str] = []
    # What is real; stand-ins only where there is nothing else.
    for part in comparison.parts[:1]:
        lines += [DEMO, ""] if part.demo else []
        for section in part.sections:
            several = [table for table in section.tables if len(table.rows) > 1]
            if section.kind == STEP.name:
                lines += _ranking(section)
            elif several:
                lines.append(f"{heading(section)} (workload {section.workload})")
                for table in several:
                    lines += [f"  {table_title(table)}"] * (len(section.tables) > 1)
                    told = [claim.sentence for claim in verdicts(section, table) if claim.kind != "tainted"]
                    lines += [f"  {sentence}" for sentence in told[:TERMINAL_ROWS]]
                    lines += _more(len(told))
                lines.append("")
    lines += [comparison.advice] if comparison.advice else []
    return "\n".join(lines).strip()


def _ranking(section: Section) -> list[str]:
    shown = ("machine", "settings", "n", "images/s", "speed-up", "tainted")
    lines = [f"{heading(section)} (step {section.workload})"]
    for table in section.tables:
        found = [(name, cells[:TERMINAL_ROWS]) for name, cells in columns(section, table) if name in shown]
        lines += [table_title(table), _markdown_table(found), *_more(len(table.rows)), ""]
    return lines


def _more(count: int) -> list[str]:
    return [f"  ... and {count - TERMINAL_ROWS} more in the report"] if count > TERMINAL_ROWS else []


def description(comparison: Comparison) -> str:
    """The comparison's run in MLflow, for a person to read; a server takes 5,000 characters."""
    text = "The report and its charts are this run's artifacts.\n\n" + on_terminal(comparison).replace("\n  ", "\n- ")
    return text if len(text) <= 5000 else text[:4980].rpartition("\n")[0] + "\n..."


# --- charts


def charts(section: Section, table: Table) -> dict[str, Figure]:
    """The charts of a table, by a short name; none of a machine that stands alone."""
    if len(table.rows) < 2:
        return {}
    settings = "" if table.settings is None else f", {settings_in_words(table.settings)}"
    step = section.kind == STEP.name
    found = {}
    if step:
        found["sustained"] = plots.bars(
            _bars(table, STEP.key), title=f"Sustained images a second{settings}", unit="images/s"
        )
    elif table.reference is not None:
        title = f"Speed-up against {table.reference}{settings}"
        found["speed-up"] = plots.ratios([_ratio(table, row) for row in table.rows], title=title, unit="times as fast")
        curves = [plots.Curve(_label(table, row), row.shown["link"], row.course) for row in table.rows if row.course]
        curves.sort(key=lambda curve: not curve.label.endswith("(reference)"))
        if curves:
            title = f"Validation accuracy against time{settings}"
            found["accuracy"] = plots.courses(curves, target=section.target, title=title)
    for name, key, title, unit in (
        ("memory", "peak_mib", "Peak memory", "MiB"),
        ("energy", "images_per_joule", "Images per joule, by source", "images/J"),
    ):
        if sum(key in row.figures for row in table.rows) > 1:
            found[name] = plots.bars(_bars(table, key), title=title + settings, unit=unit)
    return found


def _label(table: Table, row: Row) -> str:
    name = row.name if table.settings is not None else f"{row.name}, {settings_in_words(row.settings)}"
    marks = {"reference": " (reference)", "tainted": " (tainted)"}
    return name + marks.get(row.claim.kind, "")


def _bars(table: Table, key: str) -> list[plots.Bar]:
    """A bar for each row that has the figure, the largest first."""
    having = sorted((row for row in table.rows if key in row.figures), key=lambda row: -row.figures[key].value)
    return [
        plots.Bar(
            label=_label(table, row),
            text=f"{factor(row.figures[key].value)} {_of(row, key)}".strip(),
            link=row.shown["link"],
            look=row.claim.kind if row.claim.kind in ("reference", "tainted") else "plain",
            value=row.figures[key].value,
            low=row.figures[key].low,
            high=row.figures[key].high,
        )
        for row in having
    ]


def _of(row: Row, key: str) -> str:
    """What a figure is of, where bars of two such things are not to be compared."""
    return row.energy_source if key == "images_per_joule" else "process" * (key == "peak_mib" and row.device == "cpu")


def _ratio(table: Table, row: Row) -> plots.Bar:
    claim, cell = row.claim, _speedup(row.claim)
    said = cell.small if claim.kind in ("faster", "slower") else cell.small.rpartition(", ")[2]
    drawn = claim.speedup or (stats.Contrast(1, None, None, None) if claim.kind == "reference" else None)
    return plots.Bar(
        label=_label(table, row),
        text=f"{cell.text} [{said}]" if said else cell.text,
        link=row.shown["link"],
        look="few" if claim.kind == "single" else claim.kind,
        value=drawn.value if drawn else None,
        low=drawn.low if drawn else None,
        high=drawn.high if drawn else None,
    )


# --- for programs


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain values: what the dataclasses of `comparison`, `claims` and `stats` say, under their
    names; `schema` is raised when that changes. What is infinite is null."""
    return {"schema": 2, **_json(comparison)}


def _json(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {key: _json(inner) for key, inner in value._asdict().items()}
    if isinstance(value, Mapping):
        return {key: _json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
