"""The report of a comparison as Markdown, terminal text and JSON. `page` makes the HTML."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pipeline import config
from pipeline.comparison import costs, stats
from pipeline.comparison.answer import answer
from pipeline.comparison.cells import (
    FIRST_THIRD,
    Cell,
    Column,
    absent_columns,
    absent_from_score,
    absent_from_work,
    price_columns,
    score_columns,
    settings_in_words,
    step_speed,
    work_columns,
)
from pipeline.comparison.claims import Claim
from pipeline.comparison.formats import format_percent
from pipeline.comparison.groups import CURRENT_VERSION
from pipeline.comparison.schema import Comparison, Head, Part, Score, Section, Table
from pipeline.profiling import score_steps

SCHEMA = 3
"""Version of compare.json."""

TERMINAL_ROWS = 10
"""The terminal shows this many machines of the score and sentences of a table; the report has all."""

DEMO = "DEMO: not the real thing"
TITLE = "Machines compared"
PRICE_NOTE = (
    f"A bought machine's price is spread over {costs.OWNED_YEARS} years, at `hours_per_day` hours a day (24 if not "
    "given). Watts are the most that a step of the score drew; those of a card or a processor leave out the rest of a "
    "machine. Break-even: hours of use after which buying costs less than renting, buy / (per_hour - kW x per_kwh). "
    "Nothing is converted between currencies."
)


def notes(rules: config.Compare) -> list[str]:
    """How to read the report: the rules that its claims follow."""
    return [
        "A run is one process. n counts the runs that count, of those planned before the first one started. A set that "
        "is incomplete, or that runs were added to, carries no claim.",
        f"Runs that start within an hour make one session. From {stats.MIN_SESSIONS} sessions on, the unit of evidence "
        "is the session (the geometric mean of its runs), else the run. With fewer sessions intervals are widened by "
        f"{format_percent(rules.smallest)} and no smaller difference is claimed, because the hours of one machine "
        "differ.",
        f"Figures are medians with a {stats.LEVEL:.0%} interval (Student's t on logarithms); accuracies are means. "
        f"Fewer than {stats.MIN_UNITS} units give no interval.",
        "A speed-up is a ratio of geometric means; 1/140 is a 140th of the speed. Its interval is Welch's t on "
        "logarithms with the critical value of Cochran and Cox (1950). By Bonferroni, the intervals of a column hold "
        f"together at {stats.LEVEL:.0%}. Faster or slower is claimed where the interval excludes 1.",
        "A speed-up of a recipe's work is claimed only if accuracies are equivalent: two one-sided tests, margin "
        f"{100 * rules.accuracy_margin:g} in 100 images, paired by seed where both sides ran the same seeds.",
        "A disturbance from outside (load, battery, swapping, stand-ins) takes a run out of the figures, unless "
        "`compare.tainted` lets it in. What a machine does by itself (it gets hot, throttles, drifts) is a result.",
        "Runs are pooled if they share machine, device, label, usable cores, memory limit, CPU threads, torch "
        "(major.minor), power limit and all settings of execution. Runs of another version of the code carry no claim.",
        "The score is the median speed in the last third of each step; the steps are the same on all machines. The "
        f"first third's speed is shown where it differs by {FIRST_THIRD:.0%} or more. Best: at the device's best "
        "precision. A machine's first planned set counts.",
        "Total s is the work itself: copying to the device, features, training, validation. Process s is the whole "
        "process with imports, setup and compiling, without downloads and decoding. Costs are of the process.",
        "Memory is of tensors, of a whole process or of the driver, and energy of the source that is named: figures of "
        "two kinds are not comparable, and no ratio of them is given.",
    ]


# --- texts of every format


def span(comparison: Comparison) -> str:
    """How many runs of how many machines, and when; '' without runs."""
    if comparison.first is None or comparison.last is None:
        return ""
    days = [datetime.fromtimestamp(ms / 1000, UTC).date().isoformat() for ms in (comparison.first, comparison.last)]
    when = days[0] if days[0] == days[1] else f"{days[0]} to {days[1]}"
    text = f"{_counted(comparison.runs, 'run')} of {_counted(comparison.machines, 'machine')}, {when}."
    if comparison.copies:
        text += f" {comparison.copies} cop{'y' if comparison.copies == 1 else 'ies'} in another experiment not counted."
    if comparison.rules.tainted:
        text += " Disturbed runs are in the figures (compare.tainted)."
    return text


def _counted(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1)}"


def heading(section: Section) -> str:
    """The work of the section."""
    if section.version == CURRENT_VERSION:
        return section.title
    return f"{section.title}, measured by version {section.version} of the code: no claims"


def table_title(table: Table) -> str:
    """The kind of table, and what all its rows share."""
    versions = {row.head.torch for row in table.rows}
    torch = f", torch {versions.pop()}" if len(versions) == 1 else ""
    if table.settings is None:
        return f"Each machine at its best{torch}"
    return f"Every machine at the same settings: {settings_in_words(table.settings)}{torch}"


def work_claims(section: Section, table: Table) -> list[tuple[str, str]]:
    """Each row's kind of claim and its sentences, about the work and then about the whole process. Empty for runs of
    another version of the code."""
    if section.version != CURRENT_VERSION:
        return []
    claims = []
    for row in table.rows:
        sentences = _sentences(row.head, row.claim)
        if row.whole.kind in ("faster", "slower", "none", "small"):
            sentences.append(row.whole.sentence)
        claims.append((row.claim.kind, " ".join(sentences)))
    return [(kind, text) for kind, text in claims if text]


def score_claims(table: Score) -> list[tuple[str, str]]:
    """Each row's kind of claim and its sentence, about the first step. The table has the ratios of the others."""
    claims = []
    for row in table.rows:
        claim = next((figures.claim for figures in row.steps.values()), Claim("alone"))
        claims.append((claim.kind, " ".join(_sentences(row.head, claim))))
    return [(kind, text) for kind, text in claims if text]


def _sentences(head: Head, claim: Claim) -> list[str]:
    """The claim's sentence, then the row's problem if the claim does not name it."""
    sentences = [claim.sentence] if claim.sentence else []
    if head.problem and claim.kind != "problem":
        sentences.append(f"{head.name}: no claim. {head.problem[0].upper()}{head.problem[1:]}.")
    return sentences


def no_reference(table: Score | Table) -> str:
    """A sentence for tables with several rows and no reference."""
    several = len(table.rows) > 1 and table.reference is None
    return "Nothing is compared here: no row is of the reference and has this figure." if several else ""


def unused_prices(comparison: Comparison) -> list[str]:
    """A sentence for each price whose hardware has no run."""
    return [f"No run's hardware is called {name}." for name in comparison.unused_prices]


# --- Markdown


def markdown(comparison: Comparison) -> str:
    """The whole report as Markdown."""
    texts = [f"# {TITLE}", _plain(answer(comparison)), span(comparison)]
    for part in comparison.parts:
        texts += [f"# {DEMO}"] if part.demo else []
        texts += _markdown_part(part)
    if comparison.prices is not None:
        prices = price_columns(comparison)
        texts += ["## Prices", _markdown_table(prices), PRICE_NOTE, *map(_plain, unused_prices(comparison))]
    if comparison.parts:
        texts += ["## How to read this", _bullets(notes(comparison.rules))]
    return "\n\n".join(text for text in texts if text) + "\n"


def _markdown_part(part: Part) -> list[str]:
    texts = []
    if part.score:
        texts += ["## Score", _markdown_table(score_columns(part.score))]
        texts += [_bullets(text for _, text in score_claims(part.score)), no_reference(part.score)]
        texts += _markdown_absent(absent_columns(absent_from_score(part.score), "images/s"))
    for section in part.sections:
        texts.append(f"## {_plain(heading(section))} (`{section.workload}`)")
        for table in section.tables:
            texts += [f"### {_plain(table_title(table))}", _markdown_table(work_columns(section, table))]
            texts += [_bullets(text for _, text in work_claims(section, table)), no_reference(table)]
        texts += _markdown_absent(absent_columns(absent_from_work(section), "total s"))
    return texts


def _markdown_absent(columns: Sequence[Column]) -> list[str]:
    return ["Not in the figures above:", _markdown_table(columns)] if columns else []


def _bullets(texts: Iterable[str]) -> str:
    return "\n".join(f"- {_plain(text)}" for text in texts)


def _plain(text: str) -> str:
    """Replace the characters that would end a table's cell or begin a tag."""
    return text.replace("|", "/").replace("<", "‹").replace(">", "›")


def _markdown_table(columns: Sequence[Column]) -> str:
    def text(cell: Cell) -> str:
        note = "; ".join(cell.notes)
        return _plain(f"{cell.text} [{note}]" if note else cell.text)

    rows = [[column.heading for column in columns]]
    rows += [list(map(text, row)) for row in zip(*(column.cells for column in columns), strict=True)]
    if len(rows) == 1:
        return ""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


# --- the terminal


def on_terminal(comparison: Comparison) -> str:
    """The answer, the score and the claims about the work, in short."""
    lines = [answer(comparison), ""]
    # DEMO runs are shown only if there are no real ones.
    for part in comparison.parts[:1]:
        lines += [DEMO, ""] if part.demo else []
        if part.score:
            lines += ["Score (images/s, and the ratio to the reference)", _short_score(part.score)]
            lines += [*_more(len(part.score.rows)), ""]
        for section in part.sections:
            tables = [(table, work_claims(section, table)) for table in section.tables if len(table.rows) > 1]
            tables = [(table, claims) for table, claims in tables if claims]
            if tables:
                lines.append(f"{heading(section)} (workload {section.workload})")
                for table, claims in tables:
                    lines += [f"  {table_title(table)}"] * (len(section.tables) > 1)
                    lines += [f"  {sentence}" for _, sentence in claims[:TERMINAL_ROWS]]
                    lines += _more(len(claims))
                lines.append("")
    return "\n".join(lines).strip()


def _short_score(table: Score) -> str:
    rows = table.rows[:TERMINAL_ROWS]
    whole = {column.heading: column.cells for column in score_columns(table)}
    columns = [Column(word, [Cell(cell.text) for cell in whole[word][: len(rows)]]) for word in ("machine", "n")]
    steps = [Column(step.title, [Cell(step_speed(row, step)) for row in rows]) for step in score_steps.STEPS]
    measured = [column for column in steps if any(cell.text for cell in column.cells)]
    return _markdown_table([columns[0], *measured, columns[1]])


def _more(count: int) -> list[str]:
    return [f"  ... and {count - TERMINAL_ROWS} more in the report"] if count > TERMINAL_ROWS else []


def description(comparison: Comparison) -> str:
    """The description of the comparison's run in MLflow; a server takes 5,000 characters."""
    text = on_terminal(comparison).replace("\n  ", "\n- ")
    text += "\n\nThe report and its charts are this run's artifacts."
    return text if len(text) <= 5000 else text[:4980].rpartition("\n")[0] + "\n..."


# --- for programs


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain values: the answer, then the fields of the dataclasses in `schema`, `claims` and `stats`.
    SCHEMA is raised when these change. Infinite values become null."""
    rules = dataclasses.replace(comparison.rules, prices=config.public_path(comparison.rules.prices))
    shareable = dataclasses.replace(comparison, rules=rules)
    return {"schema": SCHEMA, "answer": answer(comparison), **_json(shareable)}


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
