"""The report of a comparison as one self-contained HTML page: no script, no font or image from elsewhere."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from pipeline.comparison import content
from pipeline.comparison.answer import answer
from pipeline.comparison.cells import Cell, Column, price_columns
from pipeline.comparison.schema import Comparison

STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")

MARKS = {
    "faster": "▲", "slower": "▼", "none": "=", "small": "≈", "few": "?", "parity": "✕", "problem": "✕", "other": "✕",
}  # fmt: skip
"""The mark of each kind of claim."""

KEY = (
    "Filled bar: faster; hatched: slower; white: no difference found; white with a dashed edge: the difference is not "
    "established; with a dotted edge: too few runs; grey: the reference; no bar: no claim. The line across a bar's end "
    "is its interval. A name leads to its run in MLflow's UI (`make ui`)."
)
HINT = '<p class="hint">The table is wider than the screen. Scroll sideways.</p>'

SHORT = 12
"""A chart of more rows may be split over printed pages."""


def html(comparison: Comparison, svgs: Mapping[str, Mapping[str, str]]) -> str:
    """The whole report as one HTML page. `svgs`: the charts, by the folders and names of `charts.charts`."""
    body = [
        f"<h1>{content.TITLE}</h1>",
        f'<p class="answer">{_code(answer(comparison))}</p>',
        _paragraph(content.span(comparison)),
    ]
    for part in comparison.parts:
        body += [f'<p class="demo">{content.DEMO}</p>'] if part.demo else []
        for section in content.section_texts(part):
            body += _section(section, svgs)
    if comparison.prices is not None:
        body += ["<h2>Prices</h2>", _table(price_columns(comparison)), _paragraph(content.PRICE_NOTE)]
        body += map(_paragraph, content.unused_prices(comparison))
    if comparison.parts:
        notes = "".join(f"<li>{_code(note)}</li>" for note in content.notes(comparison.rules))
        body += ["<h2>How to read this</h2>", f"<ul>{notes}</ul>"]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{content.TITLE}</title><style>\n{STYLE}</style></head>",
            "<body>",
            *(element for element in body if element),
            "</body></html>\n",
        ]
    )


def _section(section: content.SectionText, svgs: Mapping[str, Mapping[str, str]]) -> list[str]:
    workload = f" <code>{escape(section.workload)}</code>" if section.workload else ""
    elements = [f"<h2>{escape(section.heading)}{workload}</h2>"]
    for table in section.tables:
        charts = svgs.get(table.folder, {})
        elements += [
            f"<h3>{escape(table.title)}</h3>" if table.title else "",
            HINT,
            _table(table.columns, table.row_kinds),
            _claims(table.claims),
            _paragraph(table.note),
            _figures(len(table.row_kinds), charts),
            f'<p class="key">{_code(KEY)}</p>' if "speed-up" in charts else "",
        ]
    return elements + (["<h3>Not in the figures above</h3>", _table(section.absent)] if section.absent else [])


def _claims(claims: Sequence[tuple[str, str]]) -> str:
    items = [f'<li class="{kind}"><b>{MARKS.get(kind, "✕")}</b>{escape(text)}</li>' for kind, text in claims]
    return f'<ul class="claims">{"".join(items)}</ul>' if items else ""


def _figures(rows: int, charts: Mapping[str, str]) -> str:
    size = "short" if rows <= SHORT else "long"
    figures = [
        f'<figure class="{size}" role="group" aria-label="{escape(name)}, as in the table above">{svg}</figure>'
        for name, svg in charts.items()
    ]
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def _table(columns: Sequence[Column], row_kinds: Sequence[str] = ()) -> str:
    """A table. `row_kinds`: the CSS class of each row, or ''."""
    if not columns:
        return ""
    classes = [' class="words"' if column.is_text else "" for column in columns]
    head = [
        f'<th scope="col"{kind}>{escape(column.heading)}</th>' for column, kind in zip(columns, classes, strict=True)
    ]
    rows = []
    for number, row in enumerate(zip(*(column.cells for column in columns), strict=True)):
        cells = [f"<td{kind}>{_cell(cell)}</td>" for cell, kind in zip(row, classes, strict=True)]
        kind = f' class="{row_kinds[number]}"' if row_kinds and row_kinds[number] else ""
        rows.append(f"<tr{kind}>{''.join(cells)}</tr>")
    return (
        f'<div class="table"><table><thead><tr>{"".join(head)}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _cell(cell: Cell) -> str:
    links = [f'<a href="{escape(address)}">{escape(text)}</a>' for text, address in cell.links]
    notes = "".join(f"<small>{escape(note)}</small>" for note in cell.notes)
    return (" ".join(links) or escape(cell.text)) + notes


def _paragraph(text: str) -> str:
    return f"<p>{_code(text)}</p>" if text else ""


def _code(text: str) -> str:
    """Escape the text and turn backticks into <code>."""
    parts = escape(text).split("`")
    if len(parts) % 2 == 0:  # an unpaired backtick, from a user's text
        return "`".join(parts)
    return "".join(f"<code>{part}</code>" if number % 2 else part for number, part in enumerate(parts))
