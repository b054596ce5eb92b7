"""What may be claimed about one machine against another, and the sentence that states it.

A machine is called faster or slower if the interval of the ratio excludes 1, both sides have three units or more, all
planned runs are in the store, and the accuracies are equivalent. The speed of one machine varies by about 1% from hour
to hour, and runs of one hour do not show that. So with fewer than three sessions on a side, the interval is widened by
the smallest difference that may be claimed, and must lie beyond that difference.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline import config
from pipeline.comparison import stats
from pipeline.comparison.formats import format_count, format_duration, format_figure, format_interval, format_percent

ALWAYS_NAMED = ("torch",)
"""Conditions that a claim always names if the two sides differ. It names the others only for equal hardware."""

USEFUL_EFFECT = 2.0
"""A comparison that would not find a machine twice as fast has too few runs."""

WIDEST = 10.0
"""An interval is useless if its ends differ by more than this factor."""


@dataclass(frozen=True)
class Side:
    """One of the two machines of a claim. `seconds`: the time of each run, or seconds per image; `started`: when each
    run started, in milliseconds; `accuracies`: by kind of images and by seed, None for work without accuracies;
    `conditions`: by displayed name; `problem`: why nothing may be claimed ('' for none)."""

    name: str
    hardware: str
    seconds: Sequence[float]
    started: Sequence[int | None]
    accuracies: Mapping[str, Mapping[int, float]] | None = None
    conditions: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""

    @property
    def sessions(self) -> int:
        """The number of sessions of the runs."""
        return len(stats.sessions(self.started))

    @property
    def units(self) -> list[float]:
        """The units of evidence."""
        return stats.units(self.seconds, self.started)

    @property
    def duration(self) -> str:
        """From the first start to the last, in words."""
        return format_duration(60 * stats.span_hours(self.started))


@dataclass(frozen=True)
class Claim:
    """The result of comparing a candidate with a baseline.

    `kind`: reference (the baseline itself), faster, slower, none (no difference found), small (too small a difference
    for so few sessions), few (too few runs), parity (accuracies not shown to be equal), problem (with the runs), other
    (another precision or step), alone (nothing to compare with). `speedup`: above 1 if the candidate is faster;
    `accuracy`: the candidate's minus the baseline's; `basis`: the evidence, such as `5 runs each in 3 sessions`;
    `reason`: why no difference is claimed.
    """

    kind: str
    sentence: str = ""
    speedup: stats.Contrast | None = None
    accuracy: stats.Equivalence | None = None
    basis: str = ""
    reason: str = ""


def compare(candidate: Side, baseline: Side, settings: config.Compare, level: float, where: str) -> Claim:
    """Compare `candidate` with `baseline`; both need `seconds`. `level`: of the speed-up's interval. `where`: part of
    the sentence, such as `on this work`."""
    speedup = stats.ratio(baseline.units, candidate.units, level)
    without_interval = stats.Contrast(speedup.value, None, None, None)
    names = f"{candidate.name} against {baseline.name}"
    for side in (candidate, baseline):
        if side.problem:
            reason = f"{side.name}: {side.problem}"
            return Claim("problem", f"{names}: no claim. {reason}.", without_interval, reason=reason)
    if speedup.low is None or speedup.high is None or too_wide(speedup.low, speedup.high):
        ratio, basis = _times_as_fast(candidate, baseline, speedup.value), _evidence(candidate, baseline)
        sentence = f"{ratio} {where}; too few runs for a claim ({basis}): plan -S repeats=5 on both."
        return Claim("few", sentence, speedup, basis=basis, reason="too few runs")
    accuracy = _equivalence(candidate, baseline, settings.accuracy_margin)
    if accuracy is not None and not accuracy.established:
        reason = _why_not_equal(accuracy)
        return Claim("parity", f"{names}: no claim, {reason}.", without_interval, accuracy, reason=reason)
    return _verdict(candidate, baseline, settings.smallest, where, speedup, accuracy)


def _verdict(
    candidate: Side,
    baseline: Side,
    smallest: float,
    where: str,
    speedup: stats.Contrast,
    accuracy: stats.Equivalence | None,
) -> Claim:
    """The claim about two comparable sides. `smallest`: the smallest difference that may be claimed of few sessions."""
    few_sessions = min(candidate.sessions, baseline.sessions) < stats.MIN_SESSIONS
    floor = 1 + smallest if few_sessions else 1.0
    low, high, detectable = _widen(speedup, floor)
    speedup = stats.Contrast(speedup.value, low, high, detectable)
    basis = ", ".join(
        [_evidence(candidate, baseline), *_equal_accuracy(accuracy), *_differing_conditions(candidate, baseline)]
    )
    if low <= 1 <= high:
        power = "too few runs"
        if detectable < USEFUL_EFFECT:
            power = f"a difference of {format_percent(detectable - 1)} would have been found"
        sentence = f"{candidate.name}: no difference from {baseline.name} found {where}; {power} ({basis})."
        return Claim("none", sentence, speedup, accuracy, basis, "no difference found")
    if few_sessions and low <= floor and high >= 1 / floor:
        reason = f"a difference of more than {format_percent(smallest)} is not established"
        sentence = (
            f"{candidate.name} against {baseline.name} {where}: {reason} ({basis}); "
            f"to claim less, run {stats.MIN_SESSIONS} sessions on each side."
        )
        return Claim("small", sentence, speedup, accuracy, basis, reason)
    sentence = f"{_times_as_fast(candidate, baseline, low, high)} {where} ({basis})."
    return Claim("faster" if speedup.value > 1 else "slower", sentence, speedup, accuracy, basis)


def _widen(speedup: stats.Contrast, floor: float) -> tuple[float, float, float]:
    """Widen the interval by `floor`, the smallest ratio that may be claimed: add its logarithm to the half-width in
    quadrature. A `floor` of 1 changes nothing. Returns both ends, and the smallest effect that would be detected."""
    assert speedup.high is not None and speedup.detectable is not None
    half_width, extra = math.log(speedup.high / speedup.value), math.log(floor)
    widened = math.hypot(half_width, extra)
    detectable = speedup.detectable * math.exp(widened - half_width + extra)
    return speedup.value * math.exp(-widened), speedup.value * math.exp(widened), detectable


def too_wide(low: float, high: float) -> bool:
    """Whether the ends of an interval differ by more than WIDEST."""
    return low <= 0 or high > WIDEST * low


def _equivalence(candidate: Side, baseline: Side, margin: float) -> stats.Equivalence | None:
    """Compare accuracies on the first kind of images that both sides have; None for work without accuracies."""
    if candidate.accuracies is None or baseline.accuracies is None:
        return None
    for images, by_seed in candidate.accuracies.items():
        if images in baseline.accuracies:
            return stats.equivalence(by_seed, baseline.accuracies[images], margin)
    return stats.Equivalence(math.nan, None, None, 0, established=False)


def _why_not_equal(accuracy: stats.Equivalence) -> str:
    """Why equal accuracy is not established: the largest difference that the data do not exclude."""
    if accuracy.low is None or accuracy.high is None:
        cause = "not measured on the same images" if math.isnan(accuracy.difference) else "too few seeds"
        return f"equal accuracy not established ({cause})"
    worse = -accuracy.low >= accuracy.high
    points = 100 * (-accuracy.low if worse else accuracy.high)
    return f"equal accuracy not established (could be up to {points:.1f} points {'worse' if worse else 'better'})"


def _equal_accuracy(accuracy: stats.Equivalence | None) -> list[str]:
    if accuracy is None or accuracy.low is None or accuracy.high is None:
        return []
    points = 100 * max(-accuracy.low, accuracy.high)
    return ["equal accuracy" + (f" to within {points:.1f} points" if points >= 0.05 else "")]


def _differing_conditions(candidate: Side, baseline: Side) -> list[str]:
    """The conditions that differ and must be named: `torch 2.11 and 2.14`."""
    same_hardware = candidate.hardware == baseline.hardware
    pairs = {name: (value, baseline.conditions.get(name, "")) for name, value in candidate.conditions.items()}
    return [
        f"{name} {first or 'not known'} and {second or 'not known'}"
        for name, (first, second) in pairs.items()
        if first != second and (same_hardware or name in ALWAYS_NAMED)
    ]


def _evidence(candidate: Side, baseline: Side) -> str:
    """`5 runs each in 3 sessions`, `5 and 3 runs, all within 12 minutes`, `5 runs each, those of A within 1 minute`."""
    first, second = len(candidate.seconds), len(baseline.seconds)
    runs = f"{format_count(first, 'run')} each" if first == second else f"{first} and {second} runs"
    sessions = candidate.sessions, baseline.sessions
    if min(sessions) >= stats.MIN_SESSIONS:
        return f"{runs} in {' and '.join(map(str, dict.fromkeys(sessions)))} sessions"
    if max(sessions) >= stats.MIN_SESSIONS:
        fewer = min((candidate, baseline), key=lambda side: side.sessions)
        return f"{runs}, those of {fewer.name} within {fewer.duration}"
    if max(first, second) == 1 or None in (*candidate.started, *baseline.started):
        return runs
    longer = max((candidate, baseline), key=lambda side: stats.span_hours(side.started))
    return f"{runs}, all within {longer.duration}"


def _times_as_fast(candidate: Side, baseline: Side, *ratios: float) -> str:
    """`A is 1.49 to 1.55 times as fast as B`, or `A takes ... times as long as B`. `ratios`: one ratio, or the two ends
    of an interval."""
    faster = ratios[0] >= 1
    ends = ratios if faster else [1 / ratio for ratio in reversed(ratios)]
    texts = format_interval(*ends, ratio=True) if len(ends) == 2 else [format_figure(ends[0])]
    verb, adjective = ("is", "fast") if faster else ("takes", "long")
    return f"{candidate.name} {verb} {' to '.join(dict.fromkeys(texts))} times as {adjective} as {baseline.name}"
