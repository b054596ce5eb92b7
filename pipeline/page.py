"""A comparison as one HTML page that needs nothing else: no script, font or image of another place."""

from collections.abc import Mapping, Sequence
from html import escape

from pipeline import report
from pipeline.claims import Claim
from pipeline.comparison import Comparison, Row, Section, Table

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 90rem; color: #111; background: #fff;
  font: 1rem/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  overflow-wrap: break-word; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .3rem; border-top: 2px solid #111; padding-top: .6rem; }
h3 { font-size: 1.05rem; margin: 1.4rem 0 .4rem; }
p, ul { margin: .4rem 0; max-width: 62rem; }
a { color: #0072B2; }
code { font-size: .9em; }
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
tr.tainted td { color: #555; font-style: italic; background: #fafafa; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem 1.5rem;
  align-items: start; margin: .6rem 0; }
figure { margin: 0; max-width: 30rem; }
figure svg { display: block; width: 100%; height: auto; }
figure svg a text { fill: #00588a; text-decoration: underline; }
.key { font-size: .85rem; color: #333; }
.hint { display: none; font-size: .85rem; color: #444; }
@media (max-width: 40rem) {
  body { padding: .8rem; }
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

MARKS = {"faster": "▲", "slower": "▼", "none": "=", "few": "?", "single": "?", "parity": "✕", "tainted": "✕"}
KEY = (
    "Filled bar: faster; hatched: slower; white: no difference found; white with a dotted edge: too few runs for a "
    "claim; grey: the reference; no bar: no claim. The line across a bar's end is its interval. A name leads to its "
    "run in MLflow's UI (`make ui`)."
)
FEW = 12
"""Rows that fit on a page, and on a screen with all that belongs to them."""

WORDS = ("machine", "settings", "tainted", "torch", "run", "hardware", "source", "date")


def html(comparison: Comparison, drawn: Sequence[Mapping[str, str]]) -> str:
    """The whole report as one HTML page; `drawn` has the charts of each of `report.tables`, as SVG."""
    body = ["<h1>Machines compared</h1>", _paragraph(report.span(comparison)), _paragraph(comparison.advice)]
    figures = iter(drawn)
    for part in comparison.parts:
        body += [f'<p class="demo">{report.DEMO}</p>'] if part.demo else []
        for section in part.sections:
            body.append(f"<h2>{escape(report.heading(section))} <code>{escape(section.workload)}</code></h2>")
            for table in section.tables:
                body += _table_parts(section, table, next(figures))
    prices = report.price_columns(comparison)
    if comparison.prices is not None:
        body += ["<h2>Prices</h2>", _html_table(prices, []) if prices else "", _paragraph(report.PRICE_NOTE)]
        body += [_paragraph(f"No run's hardware is called {name}.") for name in comparison.unused_prices]
    if comparison.parts:
        body += ["<h2>How to read this</h2>", _list(report.NOTES)]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Machines compared</title><style>{STYLE}</style></head>",
            "<body>",
            *(part for part in body if part),
            "</body></html>\n",
        ]
    )


def _table_parts(section: Section, table: Table, drawn: Mapping[str, str]) -> list[str]:
    verdicts = _verdicts(report.verdicts(section, table))
    few = len(table.rows) <= FEW  # more would push the table out of sight
    return [
        f"<h3>{escape(report.table_title(table))}</h3>",
        verdicts if few else "",
        '<p class="hint">The table is wider than the screen: push it sideways.</p>',
        _html_table(report.columns(section, table), table.rows),
        *map(_paragraph, report.remarks(table)),
        _figures(table, drawn) if drawn else "",
        f'<p class="key">{_code(KEY)}</p>' if "speed-up" in drawn else "",
        "" if few else verdicts,
    ]


def _verdicts(claims: Sequence[Claim]) -> str:
    told = [
        f'<li class="{claim.kind}"><b>{MARKS[claim.kind]}</b>'
        f"{escape(claim.sentence).replace('n = ', 'n&nbsp;=&nbsp;')}</li>"
        for claim in claims
    ]
    return f'<ul class="claims">{"".join(told)}</ul>' if told else ""


def _figures(table: Table, drawn: Mapping[str, str]) -> str:
    size = "short" if len(table.rows) <= FEW else "long"
    figures = [
        f'<figure class="{size}" role="group" aria-label="{escape(name)}, as in the table above">{svg}</figure>'
        for name, svg in drawn.items()
    ]
    return f'<div class="charts">{"".join(figures)}</div>'


def _html_table(found: Sequence[report.Column], rows: Sequence[Row]) -> str:
    """`rows` are those that the cells are of: their runs' ids are links."""
    words = {heading: ' class="words"' if heading in WORDS else "" for heading, _ in found}
    head = "".join(f'<th scope="col"{words[heading]}>{escape(heading)}</th>' for heading, _ in found)
    lines = []
    for place in range(len(found[0][1])):
        cells = []
        for heading, column in found:
            cell = column[place]
            text = (
                _runs(rows[place])
                if heading == "run"
                else _linked(cell.text)
                if heading == "source"
                else escape(cell.text)
            )
            small = "".join(f"<small>{escape(part)}</small>" for part in cell.small.split(", ") if part)
            cells.append(f"<td{words[heading]}>{text}{small}</td>")
        kind = rows[place].claim.kind if rows else ""
        shown = f' class="{kind}"' if kind in ("reference", "tainted") else ""
        lines.append(f"<tr{shown}>{''.join(cells)}</tr>")
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _runs(row: Row) -> str:
    """Links to the most typical run by its id, and to all others by their numbers."""
    first = f'<a href="{escape(row.shown["link"])}">{escape(row.shown["id"][:8])}</a>'
    others = [run for run in row.runs if run["id"] != row.shown["id"]]
    numbered = [f'<a href="{escape(run["link"])}">{number}</a>' for number, run in enumerate(others, 2)]
    return first + (f"<small>{' '.join(numbered)}</small>" if numbered else "")


def _linked(text: str) -> str:
    shown = escape(text)
    return f'<a href="{shown}">{shown}</a>' if text.startswith(("https://", "http://")) else shown


def _paragraph(text: str) -> str:
    return f"<p>{_code(text)}</p>" if text else ""


def _list(texts: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{_code(text)}</li>' for text in texts)}</ul>"


def _code(text: str) -> str:
    """Escaped, with what is between backticks as code."""
    parts = escape(text).split("`")
    if len(parts) % 2 == 0:  # a backtick of a user's
        return "`".join(parts)
    return "".join(f"<code>{part}</code>" if place % 2 else part for place, part in enumerate(parts))
