"""The answer at the top of a report: what may be claimed about the machines, in a few sentences."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.comparison.claims import Claim
from pipeline.comparison.formats import format_figure, format_interval
from pipeline.comparison.groups import CURRENT_VERSION
from pipeline.comparison.schema import Comparison, Head, Part, Score, Section, Table
from pipeline.profiling import score_steps

NAMED = 3
"""At most this many machines are named; the table has all."""

CLAIMED = ("faster", "slower")
UNDECIDED = ("none", "small")


@dataclass(frozen=True)
class _Compared:
    """Claims of machines against `reference`. `where`: e.g. `at convnet fp32`. Rows are (name, head, claim); the name
    includes the precision if machines differ in it."""

    reference: str
    rows: Sequence[tuple[str, Head, Claim]]
    where: str


def answer(comparison: Comparison) -> str:
    """The strongest claims about real runs, then the machines that are not compared, with the reasons. Without a claim:
    the ratio, why it is no claim, and how to get one."""
    part = next((part for part in comparison.parts if not part.demo), None)
    if part is None:
        return comparison.advice
    compared = _compare_scores(part.score) if part.score else None
    if compared is None and not comparison.advice:
        compared = _compare_work(part.sections)
    if compared is None:
        return " ".join(text for text in (_only_machine(part), comparison.advice) if text)
    return " ".join(_sentences(compared, _unscored(part) if part.score else {}))


def _compare_scores(table: Score) -> _Compared | None:
    """Choose a step that several machines ran, preferably one with a claim, else one with a ratio."""
    if table.reference is None:
        return None
    steps = []
    for step in score_steps.STEPS:
        rows = []
        for row in table.rows:
            if figures := row.steps.get(step.name):
                name = f"{row.head.name} at {figures.precision}" if step.best_precision else row.head.name
                rows.append((name, row.head, figures.claim))
        reference = next((name for name, _, claim in rows if claim.kind == "reference"), None)
        if len(rows) > 1 and reference is not None:
            steps.append(_Compared(reference, rows, f"at {step.title}"))

    def rank(compared: _Compared) -> tuple[bool, bool]:
        claims = [claim for _, _, claim in compared.rows]
        return not any(claim.kind in CLAIMED for claim in claims), not any(map(_ratio, claims))

    return min(steps, key=rank, default=None)


def _compare_work(sections: Sequence[Section]) -> _Compared | None:
    """Choose a table with several machines, preferably one with a claim, else one at the same settings."""
    tables = [(section, table) for section in sections for table in section.tables if len(table.rows) > 1]

    def rank(item: tuple[Section, Table]) -> tuple[bool, bool]:
        table = item[1]
        return not any(row.claim.kind in CLAIMED for row in table.rows), table.settings is None

    for section, table in sorted(tables, key=rank):
        if table.reference is not None:
            rows = []
            for row in table.rows:
                at = f" at {row.settings['precision']}" if table.settings is None else ""
                rows.append((row.head.name + at, row.head, row.claim))
            return _Compared(table.reference, rows, f"at {section.title}")
    return None


def _sentences(compared: _Compared, unscored: Mapping[str, str]) -> list[str]:
    claimed = [(name, claim) for name, _, claim in compared.rows if claim.kind in CLAIMED]
    claimed.sort(key=lambda item: -abs(math.log(_ratio(item[1]) or 1)))
    sentences = [_claim_sentence(compared, name, claim) for name, claim in claimed[:NAMED]]
    if len(claimed) > NAMED:
        sentences.append(f"{len(claimed) - NAMED} more are in the table.")
    others = [row for row in compared.rows if row[2].kind not in (*CLAIMED, "reference")]
    if not claimed:
        first = next((row for row in others if row[2].kind in UNDECIDED), None)
        first = first or next((row for row in others if _ratio(row[2])), None)
        if first is not None:
            others.remove(first)
            sentences += _why_no_claim(compared, first[0], first[2])
    undecided = [name for name, _, claim in others if claim.kind in UNDECIDED]
    if undecided:
        sentences.append(f"No difference from {compared.reference} is established for {_join(undecided)}.")
    reasons = {name: head.problem or claim.reason for name, head, claim in others if claim.kind not in UNDECIDED}
    reasons |= unscored
    if reasons:
        not_compared = [f"{name} ({reason})" if reason else name for name, reason in reasons.items()]
        sentences.append(f"Not compared: {_join(not_compared)}.")
    return sentences


def _claim_sentence(compared: _Compared, name: str, claim: Claim) -> str:
    """`A: 140 times B at convnet fp32 (139 to 141; 5 runs each in 3 sessions).` The faster machine is named first."""
    contrast = claim.speedup
    assert contrast is not None and contrast.low is not None and contrast.high is not None
    faster = contrast.value >= 1
    ends = format_interval(
        *((contrast.low, contrast.high) if faster else (1 / contrast.high, 1 / contrast.low)), ratio=True
    )
    interval = [f"{ends[0]} to {ends[1]}"] if ends[0] != ends[1] else []
    return f"{_ratio_text(compared, name, claim)} ({'; '.join([*interval, claim.basis])})."


def _why_no_claim(compared: _Compared, name: str, claim: Claim) -> list[str]:
    if claim.kind in UNDECIDED:
        return [claim.sentence]
    # Another planned set counts only under another label.
    label = " -S label=NAME" if any(head.planned > 1 for _, head, _ in compared.rows) else ""
    advice = f"For a claim, run `python -m pipeline.run -S repeats=5{label}` on each machine."
    basis = f" ({claim.basis})" if claim.basis else ""
    return [f"{_ratio_text(compared, name, claim)}.", f"This is no claim: {claim.reason}{basis}.", advice]


def _ratio_text(compared: _Compared, name: str, claim: Claim) -> str:
    ratio = _ratio(claim) or 1.0
    first, second = (name, compared.reference) if ratio >= 1 else (compared.reference, name)
    return f"{first}: {format_figure(max(ratio, 1 / ratio))} times {second} {compared.where}"


def _ratio(claim: Claim) -> float | None:
    return claim.speedup.value if claim.speedup else None


def _join(words: Sequence[str]) -> str:
    more = [f"{len(words) - NAMED} more"] if len(words) > NAMED else []
    return ", ".join([*words[:NAMED], *more])


def _unscored(part: Part) -> dict[str, str]:
    """Machines that have runs but no score, with the reason."""
    assert part.score is not None
    scored = {row.head.name for row in part.score.rows} | {other.name for other in part.score.others}
    missing: dict[str, str] = {}
    for section in part.sections:
        reason = (
            "no score" if section.version == CURRENT_VERSION else f"measured by version {section.version} of the code"
        )
        heads: list[Head] = [row.head for table in section.tables for row in table.rows]
        for name in (*(head.name for head in heads), *(other.name for other in section.others)):
            if name not in scored:
                missing.setdefault(name, reason)
    return missing


def _only_machine(part: Part) -> str:
    """The figure of the only machine."""
    for row in part.score.rows if part.score else ():
        for step in score_steps.STEPS:
            if step.name in row.steps:
                speed = format_figure(row.steps[step.name].speed.value)
                return f"{row.head.name}: {speed} images/s at {step.title} ({_run_count(row.head)})."
    for section in part.sections:
        for table in section.tables:
            for work in table.rows:
                if "total_seconds" in work.figures:
                    seconds = format_figure(work.figures["total_seconds"].value)
                    return f"{work.head.name}: {seconds} s for {section.title} ({_run_count(work.head)})."
    return ""


def _run_count(head: Head) -> str:
    count = len(head.runs)
    return f"{count} run{'s' * (count != 1)}"
