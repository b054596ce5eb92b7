"""Which charts a report shows, and the data that they plot."""

import re
from collections.abc import Sequence

from matplotlib.figure import Figure

from pipeline.comparison import plots, stats
from pipeline.comparison.cells import ratio_cell, settings_in_words, step_facts
from pipeline.comparison.claims import Claim
from pipeline.comparison.formats import format_figure
from pipeline.comparison.groups import CURRENT_VERSION
from pipeline.comparison.schema import Comparison, Part, Row, Score, ScoreRow, Section, Table
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
    """A chart of each step's speed, and one of images per joule at the first step for each energy source."""
    by_name: dict[str, Figure] = {}
    for step in score_steps.STEPS:
        bars = [
            _bar(row, ", ".join([row.head.name, *step_facts(step, figures)]), figures.speed, figures.claim)
            for row in table.rows
            if (figures := row.steps.get(step.name))
        ]
        by_name |= _bar_chart(step.name, bars, f"Score: {step.title}", "images/s")
    first = score_steps.STEPS[0]
    by_source: dict[str, list[plots.Bar]] = {}
    for row in table.rows:
        figures = row.steps.get(first.name)
        if figures and figures.images_per_joule:
            bar = _bar(row, row.head.name, figures.images_per_joule, figures.claim)
            by_source.setdefault(row.energy_source, []).append(bar)
    for source, bars in by_source.items():
        by_name |= _bar_chart(f"energy-{source}", bars, f"Images per joule ({source}): {first.title}", "images/J")
    return by_name


def _work_charts(section: Section, table: Table) -> dict[str, Figure]:
    """Charts of the speed-up, the accuracy over time, the memory and the energy."""
    if len(table.rows) < 2:
        return {}
    settings = "" if table.settings is None else f", {settings_in_words(table.settings)}"
    by_name = {}
    if table.reference is not None:
        bars = [_ratio_bar(table, row) for row in table.rows]
        by_name["speed-up"] = plots.ratios(bars, title=f"Speed-up against {table.reference}{settings}")
        curves = [plots.Curve(_label(table, row), row.shown["link"], row.course) for row in table.rows if row.course]
        curves.sort(key=lambda curve: not curve.label.endswith("(reference)"))
        if curves:
            title = f"Validation accuracy against time{settings}"
            by_name["accuracy"] = plots.courses(curves, target=section.target, title=title)
    for key, name, words, unit in (
        ("peak_mib", "memory", "Peak memory", "MiB"),
        ("images_per_joule", "energy", "Images per joule", "images/J"),
    ):
        # One chart per kind of memory or source of energy, because figures of two kinds are not comparable.
        by_kind: dict[str, list[plots.Bar]] = {}
        for row in table.rows:
            if key in row.figures:
                kind = row.memory_of if name == "memory" else row.energy_source
                by_kind.setdefault(kind, []).append(_bar(row, _label(table, row), row.figures[key], row.claim))
        for kind, bars in by_kind.items():
            by_name |= _bar_chart(f"{name}-{kind}", bars, f"{words} ({kind}){settings}", unit)
    return by_name


def _bar_chart(name: str, bars: Sequence[plots.Bar], title: str, unit: str) -> dict[str, Figure]:
    """A chart by its file name, with the longest bar on top; empty for a single machine."""
    if len(bars) < 2:
        return {}
    bars = sorted(bars, key=lambda bar: -bar.estimate.value if bar.estimate else 0)
    return {_file_name(name): plots.bars(bars, title=title, unit=unit)}


def _file_name(text: str) -> str:
    """The text with underscores for characters that a file name should not have."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text)


def _bar(row: Row | ScoreRow, label: str, estimate: stats.Estimate, claim: Claim) -> plots.Bar:
    look = "problem" if row.head.problem else "reference" if claim.kind == "reference" else "plain"
    return plots.Bar(label, format_figure(estimate.value), row.shown["link"], look, estimate)


def _ratio_bar(table: Table, row: Row) -> plots.Bar:
    claim, cell = row.claim, ratio_cell(row.claim)
    speedup = None if claim.kind in WITHOUT_BAR else claim.speedup
    if claim.kind == "reference":
        speedup = stats.Contrast(1, None, None, None)
    text = f"{cell.text} [{cell.notes[-1]}]" if cell.notes else cell.text
    return plots.Bar(_label(table, row), text, row.shown["link"], claim.kind, speedup)


def _label(table: Table, row: Row) -> str:
    name = row.head.name if table.settings is not None else f"{row.head.name}, {settings_in_words(row.settings)}"
    return f"{name} (reference)" if row.claim.kind == "reference" else name
