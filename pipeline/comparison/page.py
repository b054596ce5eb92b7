"""The report of a comparison as one self-contained HTML page: no script, no font or image from elsewhere."""

from collections.abc import Mapping, Sequence
from html import escape

from pipeline.comparison import content
from pipeline.comparison.answer import answer
from pipeline.comparison.cells import Cell, Column, price_columns
from pipeline.comparison.schema import Comparison

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 104rem; color: #111; background: #fff;
  font: 1rem/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  overflow-wrap: break-word; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .3rem; border-top: 2px solid #111; padding-top: .6rem; }
h3 { font-size: 1.05rem; margin: 1.4rem 0 .4rem; }
p, ul { margin: .4rem 0; max-width: 62rem; }
a { color: #0072B2; }
code { font-size: .9em; }
.answer { font-size: 1.25rem; font-weight: 600; max-width: 48rem; margin: .6rem 0; }
.demo { border: 3px dashed #D55E00; padding: .5rem .8rem; font-weight: bold; }
.claims { list-style: none; padding: 0; }
.claims li { padding: .25rem 0 .25rem 1.7rem; text-indent: -1.7rem; }
.claims b { display: inline-block; width: 1.7rem; text-indent: 0; text-align: center; }
.faster b { color: #0072B2; }
.slower b { color: #D55E00; }
.table { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .55rem; text-align: right; vertical-align: top; border-bottom: 1px solid #ccc; }
th { vertical-align: bottom; border-bottom: 2px solid #111; white-space: nowrap; }
td { min-width: 3.2rem; }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff; text-align: left; min-width: 9rem;
  max-width: 16rem; border-right: 1px solid #ccc; }
th.words, td.words { text-align: left; }
td small { display: block; color: #444; white-space: nowrap; }
td.words small, td:first-child small { white-space: normal; }
tr.reference td { background: #f0f0f0; }
tr.problem td { color: #555; font-style: italic; background: #fafafa; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem 1.5rem;
  align-items: start; margin: .6rem 0; }
figure { margin: 0; max-width: 30rem; }
figure svg { display: block; width: 100%; height: auto; }
figure svg a text { fill: #00588a; text-decoration: underline; }
.key { font-size: .85rem; color: #333; }
.hint { display: none; font-size: .85rem; color: #444; }
@media (max-width: 40rem) {
  body { padding: .8rem; }
  .answer { font-size: 1.05rem; }
  .hint { display: block; }
  table { font-size: .82rem; }
  th, td { padding: .3rem .35rem; }
  td { min-width: 0; }
  th:first-child, td:first-child { min-width: 7rem; max-width: 7rem; }
  td small { white-space: normal; }
}
@media print {
  @page { size: A4 landscape; margin: 1cm; }
  body { max-width: none; padding: 0; font-size: 9pt; }
  .table { overflow: visible; }
  table { font-size: 8pt; }
  thead { display: table-header-group; }
  th, td { padding: .15rem .3rem; min-width: 0; }
  th:first-child, td:first-child { position: static; min-width: 0; }
  td small { white-space: normal; }
  tr, figure.short, .claims li { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .charts { grid-template-columns: repeat(3, 1fr); }
  a { color: inherit; text-decoration: none; }
}
"""

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
            f"<title>{content.TITLE}</title><style>{STYLE}</style></head>",
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
