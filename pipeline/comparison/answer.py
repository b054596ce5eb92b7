"""The answer at the top of a report: what may be claimed about the machines, in a few sentences."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pipeline.comparison.claims import Claim
from pipeline.comparison.formats import format_count, format_figure, format_interval
from pipeline.comparison.groups import CURRENT_VERSION
from pipeline.comparison.schema import Comparison, Head, Part, Score, Section
from pipeline.profiling import score_steps

NAMED = 3
"""At most this many machines are named; the table has all."""

CLAIMED = ("faster", "slower")
UNDECIDED = ("none", "small")


class _Row(NamedTuple):
    """A row of a table. `name`: the machine's, with its precision if machines differ in it."""

    name: str
    head: Head
    claim: Claim


class _Compared(NamedTuple):
    """A table's rows, and the name of the row that they are compared with. `where`: e.g. `at convnet fp32`."""

    reference: str
    rows: Sequence[_Row]
    where: str


def answer(comparison: Comparison) -> str:
    """The strongest claims about real runs, then the machines that are not compared, with the reasons. Without a claim:
    the ratio, why it is no claim, and how to get one."""
    part = next((part for part in comparison.parts if not part.demo), None)
    if part is None:
        return comparison.advice
    candidates = _compared_steps(part.score) if part.score else []
    if not candidates and not comparison.advice:
        candidates = _compared_work(part.sections)
    if not candidates:
        return " ".join(text for text in (_only_machine(part), comparison.advice) if text)

    def rank(compared: _Compared) -> tuple[bool, bool]:
        claims = [row.claim for row in compared.rows]
        return not any(claim.kind in CLAIMED for claim in claims), not any(map(_ratio, claims))

    return " ".join(_sentences(min(candidates, key=rank), _unscored(part) if part.score else {}))


def _compared_steps(table: Score) -> list[_Compared]:
    """Each step that several machines ran, the reference among them."""
    compared = []
    for step in score_steps.STEPS:
        rows = []
        for row in table.rows:
            if figures := row.steps.get(step.name):
                precision = f" at {figures.precision}" if step.best_precision else ""
                rows.append(_Row(row.head.name + precision, row.head, figures.claim))
        compared += _with_reference(rows, f"at {step.title}")
    return compared


def _compared_work(sections: Sequence[Section]) -> list[_Compared]:
    """Each table of several machines with a reference, those at the same settings first."""
    tables = [(section, table) for section in sections for table in section.tables]
    compared = []
    for section, table in sorted(tables, key=lambda item: item[1].settings is None):
        rows = []
        for row in table.rows:
            precision = f" at {row.settings['precision']}" if table.settings is None else ""
            rows.append(_Row(row.head.name + precision, row.head, row.claim))
        compared += _with_reference(rows, f"at {section.title}")
    return compared


def _with_reference(rows: Sequence[_Row], where: str) -> list[_Compared]:
    """The rows as a list of one; empty without a reference, or without a row to compare with it."""
    references = [row.name for row in rows if row.claim.kind == "reference"]
    return [_Compared(references[0], rows, where)] if references and len(rows) > 1 else []


def _sentences(compared: _Compared, unscored: Mapping[str, str]) -> list[str]:
    claimed = [row for row in compared.rows if row.claim.kind in CLAIMED]
    claimed.sort(key=lambda row: -abs(math.log(_ratio(row.claim))))
    sentences = [_claim_sentence(compared, row) for row in claimed[:NAMED]]
    if len(claimed) > NAMED:
        sentences.append(f"{len(claimed) - NAMED} more are in the table.")
    others = [row for row in compared.rows if row.claim.kind not in (*CLAIMED, "reference")]
    if not claimed:
        undecided = [row for row in others if row.claim.kind in UNDECIDED]
        for row in [*undecided, *(row for row in others if _ratio(row.claim))][:1]:
            others.remove(row)
            sentences += [row.claim.sentence] if undecided else _why_no_claim(compared, row)
    if names := [row.name for row in others if row.claim.kind in UNDECIDED]:
        sentences.append(f"No difference from {compared.reference} is established for {_join(names)}.")
    reasons = {row.name: row.head.problem or row.claim.reason for row in others if row.claim.kind not in UNDECIDED}
    reasons |= unscored
    if reasons:
        not_compared = [f"{name} ({reason})" if reason else name for name, reason in reasons.items()]
        sentences.append(f"Not compared: {_join(not_compared)}.")
    return sentences


def _claim_sentence(compared: _Compared, row: _Row) -> str:
    """`A: 140 times B at convnet fp32 (139 to 141; 5 runs each in 3 sessions).` The faster machine is named first."""
    contrast = row.claim.speedup
    assert contrast is not None and contrast.low is not None and contrast.high is not None
    bounds = (contrast.low, contrast.high) if contrast.value >= 1 else (1 / contrast.high, 1 / contrast.low)
    low, high = format_interval(*bounds, ratio=True)
    basis = f"{low} to {high}; {row.claim.basis}" if low != high else row.claim.basis
    return f"{_ratio_text(compared, row)} ({basis})."


def _why_no_claim(compared: _Compared, row: _Row) -> list[str]:
    """The ratio, why it is no claim, and the command that may give one."""
    # Another planned set counts only under another label.
    label = " -S label=NAME" if any(row.head.planned > 1 for row in compared.rows) else ""
    advice = f"For a claim, run `python -m pipeline.run -S repeats=5{label}` on each machine."
    basis = f" ({row.claim.basis})" if row.claim.basis else ""
    return [f"{_ratio_text(compared, row)}.", f"This is no claim: {row.claim.reason}{basis}.", advice]


def _ratio_text(compared: _Compared, row: _Row) -> str:
    ratio = _ratio(row.claim)
    first, second = (row.name, compared.reference) if ratio >= 1 else (compared.reference, row.name)
    return f"{first}: {format_figure(max(ratio, 1 / ratio))} times {second} {compared.where}"


def _ratio(claim: Claim) -> float:
    """The ratio; 0 if there is none."""
    return claim.speedup.value if claim.speedup else 0.0


def _join(words: Sequence[str]) -> str:
    more = [f"{len(words) - NAMED} more"] if len(words) > NAMED else []
    return ", ".join([*words[:NAMED], *more])


def _unscored(part: Part) -> dict[str, str]:
    """Machines that have runs but no score, with the reason."""
    assert part.score is not None
    scored = {row.head.name for row in part.score.rows} | {other.name for other in part.score.others}
    missing: dict[str, str] = {}
    for section in part.sections:
        is_current = section.version == CURRENT_VERSION
        reason = "no score" if is_current else f"measured by version {section.version} of the code"
        names = [row.head.name for table in section.tables for row in table.rows]
        for name in [*names, *(other.name for other in section.others)]:
            if name not in scored:
                missing.setdefault(name, reason)
    return missing


def _only_machine(part: Part) -> str:
    """The figure of the only machine."""
    speeds = [
        (row.head, f"{format_figure(row.steps[step.name].speed.value)} images/s at {step.title}")
        for row in (part.score.rows if part.score else ())
        for step in score_steps.STEPS
        if step.name in row.steps
    ]
    times = [
        (row.head, f"{format_figure(row.figures['total_seconds'].value)} s for {section.title}")
        for section in part.sections
        for table in section.tables
        for row in table.rows
        if "total_seconds" in row.figures
    ]
    for head, figure in (speeds + times)[:1]:
        return f"{head.name}: {figure} ({format_count(len(head.runs), 'run')})."
    return ""
