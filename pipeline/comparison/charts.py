"""Which charts a report shows, and the data that they plot."""

import re
from collections.abc import Sequence

from matplotlib.figure import Figure

from pipeline.comparison import plots, stats
from pipeline.comparison.cells import ratio_cell, settings_in_words, step_facts
from pipeline.comparison.formats import format_figure
from pipeline.comparison.groups import CURRENT_VERSION
from pipeline.comparison.schema import Comparison, Head, Part, Row, Score, Section, StepFigures, Table
from pipeline.profiling import score_steps

WITHOUT_BAR = ("parity", "problem", "other", "alone")
"""Kinds of claims that get no bar, because their ratio is not a result."""


def charts(comparison: Comparison) -> dict[str, dict[str, Figure]]:
    """The charts by folder, one for each table, and by name. A table with a single machine has no charts."""
    figures_by_folder: dict[str, dict[str, Figure]] = {}
    for part in comparison.parts:
        if part.score:
            figures_by_folder[score_folder(part)] = _score_charts(part.score)
        for section in part.sections:
            for table in section.tables:
                figures_by_folder[work_folder(part, section, table)] = _work_charts(section, table)
    return {folder: figures for folder, figures in figures_by_folder.items() if figures}


def score_folder(part: Part) -> str:
    """The folder of the score's charts."""
    return "demo-score" if part.demo else "score"


def work_folder(part: Part, section: Section, table: Table) -> str:
    """The folder of the charts for a table of a recipe's work."""
    version = "" if section.version == CURRENT_VERSION else f"-version-{section.version}"
    kind = "best" if table.settings is None else "same-settings"
    return f"{_file_name('demo-' * part.demo + f'work-{section.workload}{version}')}/{kind}"


def _score_charts(table: Score) -> dict[str, Figure]:
    by_name = {}
    for step in score_steps.STEPS:
        rows = [(row, row.steps[step.name]) for row in table.rows if step.name in row.steps]
        if len(rows) > 1:
            bars = [
                _bar(
                    row.head,
                    figures.speed,
                    label=", ".join([row.head.name, *step_facts(step, figures)]),
                    link=row.shown["link"],
                    kind=figures.claim.kind,
                )
                for row, figures in rows
            ]
            by_name[step.name] = plots.bars(_sorted(bars), title=f"Score: {step.title}", unit="images/s")
    by_name |= _efficiency(table, score_steps.STEPS[0])
    return by_name


def _efficiency(table: Score, step: score_steps.Step) -> dict[str, Figure]:
    """Charts of images per joule for one step: one chart per energy source."""
    by_source: dict[str, list[plots.Bar]] = {}
    for row in table.rows:
        figures: StepFigures | None = row.steps.get(step.name)
        if figures and figures.images_per_joule:
            bar = _bar(
                row.head, figures.images_per_joule, label=row.head.name, link=row.shown["link"], kind=figures.claim.kind
            )
            by_source.setdefault(row.energy_source, []).append(bar)
    return {
        _file_name(f"energy-{source}"): plots.bars(
            _sorted(bars), title=f"Images per joule ({source}): {step.title}", unit="images/J"
        )
        for source, bars in by_source.items()
        if len(bars) > 1
    }


def _work_charts(section: Section, table: Table) -> dict[str, Figure]:
    if len(table.rows) < 2:
        return {}
    settings = "" if table.settings is None else f", {settings_in_words(table.settings)}"
    by_name = {}
    if table.reference is not None:
        title = f"Speed-up against {table.reference}{settings}"
        bars = [_ratio_bar(table, row) for row in table.rows]
        by_name["speed-up"] = plots.ratios(bars, title=title, unit="times as fast")
        curves = [plots.Curve(_label(table, row), row.shown["link"], row.course) for row in table.rows if row.course]
        curves.sort(key=lambda curve: not curve.label.endswith("(reference)"))
        if curves:
            title = f"Validation accuracy against time{settings}"
            by_name["accuracy"] = plots.courses(curves, target=section.target, title=title)
    by_name |= _by_kind(table, "peak_mib", "memory", f"Peak memory ({{}}){settings}", "MiB")
    by_name |= _by_kind(table, "images_per_joule", "energy", f"Images per joule ({{}}){settings}", "images/J")
    return by_name


def _by_kind(table: Table, key: str, name: str, title: str, unit: str) -> dict[str, Figure]:
    """One chart per kind of memory or source of energy, because figures of two kinds are not comparable."""
    kinds: dict[str, list[plots.Bar]] = {}
    for row in table.rows:
        if key in row.figures:
            kind = row.memory_of if key == "peak_mib" else row.energy_source
            bar = _bar(
                row.head, row.figures[key], label=_label(table, row), link=row.shown["link"], kind=row.claim.kind
            )
            kinds.setdefault(kind, []).append(bar)
    return {
        _file_name(f"{name}-{kind}"): plots.bars(_sorted(bars), title=title.format(kind), unit=unit)
        for kind, bars in kinds.items()
        if len(bars) > 1
    }


def _file_name(text: str) -> str:
    """The text with underscores for characters that a file name should not have."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text)


def _bar(head: Head, estimate: stats.Estimate, *, label: str, link: str, kind: str) -> plots.Bar:
    look = "problem" if head.problem else "reference" if kind == "reference" else "plain"
    return plots.Bar(label, format_figure(estimate.value), link, look, estimate.value, estimate.low, estimate.high)


def _sorted(bars: Sequence[plots.Bar]) -> list[plots.Bar]:
    """Bars from the largest to the smallest."""
    return sorted(bars, key=lambda bar: -(bar.value or 0))


def _label(table: Table, row: Row) -> str:
    name = row.head.name if table.settings is not None else f"{row.head.name}, {settings_in_words(row.settings)}"
    return f"{name} (reference)" if row.claim.kind == "reference" else name


def _ratio_bar(table: Table, row: Row) -> plots.Bar:
    claim, cell = row.claim, ratio_cell(row.claim)
    speedup = None if claim.kind in WITHOUT_BAR else claim.speedup
    if claim.kind == "reference":
        speedup = stats.Contrast(1, None, None, None)
    return plots.Bar(
        label=_label(table, row),
        text=f"{cell.text} [{cell.notes[-1]}]" if cell.notes else cell.text,
        link=row.shown["link"],
        look=claim.kind,
        value=speedup.value if speedup else None,
        low=speedup.low if speedup else None,
        high=speedup.high if speedup else None,
    )
