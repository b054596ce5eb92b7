"""What a report says, section by section. `report` and `page` write it as Markdown and HTML."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from pipeline import config
from pipeline.comparison import cells, charts, costs, stats
from pipeline.comparison.cells import FIRST_THIRD, Column, settings_in_words
from pipeline.comparison.formats import format_count, format_percent
from pipeline.comparison.groups import CURRENT_VERSION
from pipeline.comparison.schema import Comparison, Part, Row, Score, ScoreRow, Table

TITLE = "Machines compared"
DEMO = "DEMO: not the real thing"
PRICE_NOTE = (
    f"A bought machine's price is spread over {costs.OWNED_YEARS} years, at `hours_per_day` hours a day (24 if not "
    "given). Watts: the highest of the score's steps; those of a card or processor leave out the rest of the machine. "
    "Break-even: hours of use after which buying costs less than renting, buy / (per_hour - kW x per_kwh). "
    "Nothing is converted between currencies."
)


class TableText(NamedTuple):
    """A table with what belongs to it.

    `title`: '' for the score; `row_kinds`: problem, reference or '' for each row; `claims`: (kind, sentences) of each
    row that has any; `note`: '' or why nothing is compared; `folder`: of its charts.
    """

    title: str
    columns: Sequence[Column]
    row_kinds: Sequence[str]
    claims: Sequence[tuple[str, str]]
    note: str
    folder: str


class SectionText(NamedTuple):
    """The score, or one workload. `workload`: '' for the score; `absent`: the table of runs that no table has."""

    heading: str
    workload: str
    tables: Sequence[TableText]
    absent: Sequence[Column]


def section_texts(part: Part) -> list[SectionText]:
    """The sections of a part, the score first."""
    texts = []
    if score := part.score:
        table_text = _table_text("", cells.score_columns(score), score, charts.score_folder(part))
        texts.append(SectionText("Score", "", [table_text], cells.absent_from_score(score)))
    for section in part.sections:
        heading, tables = section.title, []
        for table in section.tables:
            folder = charts.work_folder(part, section, table)
            tables.append(_table_text(_title(table), cells.work_columns(section, table), table, folder))
        if section.version != CURRENT_VERSION:
            heading += f", measured by version {section.version} of the code: no claims"
            tables = [table_text._replace(claims=[]) for table_text in tables]
        texts.append(SectionText(heading, section.workload, tables, cells.absent_from_work(section)))
    return texts


def _title(table: Table) -> str:
    """The kind of table, and what all its rows share."""
    versions = {row.head.torch for row in table.rows}
    torch = f", torch {versions.pop()}" if len(versions) == 1 else ""
    if table.settings is None:
        return f"Each machine at its best{torch}"
    return f"Every machine at the same settings: {settings_in_words(table.settings)}{torch}"


def _table_text(title: str, columns: Sequence[Column], table: Score | Table, folder: str) -> TableText:
    row_kinds, claims = [], []
    for row in table.rows:
        reference = "reference" if row.claim.kind == "reference" else ""
        row_kinds.append("problem" if row.head.problem else reference)
        if sentences := _claim_sentences(row):
            claims.append((row.claim.kind, " ".join(sentences)))
    no_reference = len(table.rows) > 1 and table.reference is None
    note = "Nothing is compared here: the reference has no row with this figure." if no_reference else ""
    return TableText(title, columns, row_kinds, claims, note, folder)


def _claim_sentences(row: Row | ScoreRow) -> list[str]:
    """The claim, the row's problem if the claim does not name it, and the claim about the whole process."""
    sentences = [row.claim.sentence] if row.claim.sentence else []
    if row.head.problem and row.claim.kind != "problem":
        sentences.append(f"{row.head.name}: no claim. {row.head.problem[0].upper()}{row.head.problem[1:]}.")
    if isinstance(row, Row) and row.whole.kind in ("faster", "slower", "none", "small"):
        sentences.append(row.whole.sentence)
    return sentences


def span(comparison: Comparison) -> str:
    """How many runs of how many machines, and when; '' without runs."""
    if comparison.first is None or comparison.last is None:
        return ""
    days = [datetime.fromtimestamp(ms / 1000, UTC).date().isoformat() for ms in (comparison.first, comparison.last)]
    when = " to ".join(dict.fromkeys(days))
    text = f"{format_count(comparison.runs, 'run')} of {format_count(comparison.machines, 'machine')}, {when}."
    if comparison.copies:
        copies = "1 copy" if comparison.copies == 1 else f"{comparison.copies} copies"
        text += f" Not counted: {copies} in another experiment."
    if comparison.rules.tainted:
        text += " The figures include disturbed runs (compare.tainted)."
    return text


def unused_prices(comparison: Comparison) -> list[str]:
    """A sentence for each price whose hardware has no run."""
    return [f"The price file has {name}, but no run's hardware has that name." for name in comparison.unused_prices]


def notes(rules: config.Compare) -> list[str]:
    """How to read the report: the rules that its claims follow."""
    return [
        "A run is one process. n is the number of runs in the figures, of those that were planned before the first one "
        "started. Nothing is claimed of a set that is incomplete, or that runs were added to.",
        f"Runs that start within an hour make one session. With {stats.MIN_SESSIONS} sessions or more, each session "
        "counts as one measurement (the geometric mean of its runs); with fewer, each run does. But the speed of a "
        "machine changes from hour to hour. So with fewer sessions the interval is widened by "
        f"{format_percent(rules.smallest)}, and no smaller difference is claimed.",
        f"Figures are medians with a {stats.LEVEL:.0%} interval (Student's t on logarithms); accuracies are means. "
        f"Fewer than {stats.MIN_UNITS} measurements give no interval.",
        "A speed-up is a ratio of geometric means; 1/140 is a 140th of the speed. Its interval is Welch's t on "
        "logarithms with the critical value of Cochran and Cox (1950), widened so that all intervals of a column hold "
        f"together at {stats.LEVEL:.0%} (Bonferroni). Faster or slower is claimed if the interval excludes 1.",
        "A speed-up of a recipe's work is claimed only if both sides are equally accurate, to within "
        f"{100 * rules.accuracy_margin:g} in 100 images: two one-sided tests, paired by seed if both sides ran the "
        "same seeds.",
        "A run that was disturbed from outside (load, battery, swapping, stand-ins) is left out of the figures, unless "
        "`compare.tainted` is true. What a machine does by itself (it gets hot, throttles, drifts) is a result.",
        "Runs are pooled if they share machine, device, label, usable cores, memory limit, CPU threads, torch "
        "(major.minor), power limit and all execution settings. Nothing is claimed of another version of the code.",
        "The score is the median speed in the last third of each step; the steps are the same on all machines. The "
        f"first third's speed is shown if it differs by {FIRST_THIRD:.0%} or more. `best`: at the device's best "
        "precision. Only a machine's first planned set counts.",
        "`total s` is the work itself: copying to the device, features, training, validation. `process s` is the whole "
        "process with imports, setup and compiling, without downloads and decoding. Costs are those of the process.",
        "Memory is that of tensors, of a whole process or of the driver, and energy that of the source named beside "
        "it. Figures of two kinds are not comparable, so no ratio of them is given.",
    ]
