"""The report of a comparison as Markdown, terminal text and JSON. `page` makes the HTML."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline import config
from pipeline.comparison import content
from pipeline.comparison.answer import answer
from pipeline.comparison.cells import Cell, Column, price_columns, score_columns
from pipeline.comparison.formats import format_figure, format_ratio
from pipeline.comparison.schema import Comparison, Score, ScoreRow
from pipeline.profiling import score_steps

SCHEMA = 3
"""The version of compare.json."""

TERMINAL_ROWS = 10
"""The terminal shows at most this many machines of the score and claims of a table; the report has all."""


# --- Markdown


def markdown(comparison: Comparison) -> str:
    """The whole report as Markdown."""
    texts = [f"# {content.TITLE}", _plain(answer(comparison)), content.span(comparison)]
    for part in comparison.parts:
        texts += [f"# {content.DEMO}"] if part.demo else []
        for section in content.section_texts(part):
            texts += _section(section)
    if comparison.prices is not None:
        texts += ["## Prices", _table(price_columns(comparison)), content.PRICE_NOTE]
        texts += map(_plain, content.unused_prices(comparison))
    if comparison.parts:
        texts += ["## How to read this", _bullets(content.notes(comparison.rules))]
    return "\n\n".join(text for text in texts if text) + "\n"


def _section(section: content.SectionText) -> list[str]:
    texts = [f"## {_plain(section.heading)}" + (f" (`{section.workload}`)" if section.workload else "")]
    for table in section.tables:
        texts += [f"### {_plain(table.title)}"] if table.title else []
        texts += [_table(table.columns), _bullets(text for _, text in table.claims), table.note]
    return texts + (["Not in the figures above:", _table(section.absent)] if section.absent else [])


def _bullets(texts: Iterable[str]) -> str:
    return "\n".join(f"- {_plain(text)}" for text in texts)


def _plain(text: str) -> str:
    """Replace the characters that would end a table's cell or begin a tag."""
    return text.replace("|", "/").replace("<", "‹").replace(">", "›")


def _table(columns: Sequence[Column]) -> str:
    rows = [[column.heading for column in columns]]
    rows += [list(map(_cell, row)) for row in zip(*(column.cells for column in columns), strict=True)]
    if len(rows) == 1:
        return ""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _cell(cell: Cell) -> str:
    note = "; ".join(cell.notes)
    return _plain(f"{cell.text} [{note}]" if note else cell.text)


# --- the terminal


def on_terminal(comparison: Comparison) -> str:
    """The answer, the score and the claims about the work, in short. DEMO runs are shown only without real ones."""
    lines = [answer(comparison), ""]
    for part in comparison.parts[:1]:
        lines += [content.DEMO, ""] if part.demo else []
        if part.score:
            lines += ["Score (images/s, and the ratio to the reference)", _short_score(part.score)]
            lines += [*_more(len(part.score.rows)), ""]
        for section in content.section_texts(part):
            tables = [table for table in section.tables if len(table.row_kinds) > 1 and table.claims]
            if section.workload and tables:
                lines.append(f"{section.heading} (workload {section.workload})")
                for table in tables:
                    lines += [f"  {table.title}"] * (len(section.tables) > 1)
                    lines += [f"  {sentences}" for _, sentences in table.claims[:TERMINAL_ROWS]]
                    lines += _more(len(table.claims))
                lines.append("")
    return "\n".join(lines).strip()


def _short_score(table: Score) -> str:
    rows = table.rows[:TERMINAL_ROWS]
    cells = {column.heading: [Cell(cell.text) for cell in column.cells[: len(rows)]] for column in score_columns(table)}
    steps = [Column(step.title, [_short_step(row, step) for row in rows]) for step in score_steps.STEPS]
    measured = [column for column in steps if any(cell.text for cell in column.cells)]
    return _table([Column("machine", cells["machine"]), *measured, Column("n", cells["n"])])


def _short_step(row: ScoreRow, step: score_steps.Step) -> Cell:
    """A step's speed and its ratio to the reference: `1,020 (1/140)`."""
    figures = row.steps.get(step.name)
    if figures is None:
        return Cell()
    ratio = figures.claim.speedup
    return Cell(format_figure(figures.speed.value) + (f" ({format_ratio(ratio.value)})" if ratio else ""))


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
