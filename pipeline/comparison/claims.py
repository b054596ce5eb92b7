"""What may be said of one machine against another, and the sentence that says it, from the figures alone.

Faster or slower is said where the interval of the ratio excludes 1, both sides have three units or more, the planned
number of runs was reached, and accuracies are shown to be equal. With fewer than three sessions on a side, the interval
is widened by the smallest difference that may be claimed, and must lie beyond it: the hours of one machine differ by
about 1%, and runs of one hour do not show that.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.comparison import stats

TOLD_OF_ANY = ("torch",)
"""Conditions that a sentence names where two machines differ in them; of one kind of hardware all are named."""

TELLING = 2.0
"""A comparison that would have missed a machine twice as fast tells nothing: it has too few runs."""

WIDEST = 10.0
"""An interval whose ends are further apart than by this factor tells nothing either."""


@dataclass(frozen=True)
class Side:
    """One of two that are compared: what each of its runs took in `seconds` (or their like: less is better) and when it
    `started` (milliseconds), its `accuracies` by kind of images and seed (None where the work has none), the
    `conditions` it ran under by name, and the `problem` for which nothing is claimed of it ('' where there is none)."""

    name: str
    hardware: str
    seconds: Sequence[float]
    started: Sequence[int | None]
    accuracies: Mapping[str, Mapping[int, float]] | None = None
    conditions: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""

    @property
    def sessions(self) -> int:
        """How many sessions its runs make."""
        return len(stats.sessions(self.started))

    @property
    def units(self) -> list[float]:
        """Its units of evidence."""
        return stats.units(self.seconds, self.started)


@dataclass(frozen=True)
class Claim:
    """What is said against the reference. `kind` is one of reference, faster, slower, none (no difference found), small
    (no difference that so few sessions may claim), few (too few runs), parity (accuracies not shown to be equal),
    problem (of the runs themselves), other (another precision or step), alone (nothing to compare). `speedup` is above
    1 where it is faster; `accuracy` is its own less the reference's. `basis`: on what it rests, such as `5 runs each in
    3 sessions`; `reason`: why no difference is claimed, in a few words."""

    kind: str
    sentence: str = ""
    speedup: stats.Contrast | None = None
    accuracy: stats.Equivalence | None = None
    basis: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Rules:
    """By what is claimed: `level` of the speed-up's interval, the `smallest` difference that few sessions may claim and
    the `margin` of accuracies, both fractions; `where`: `on this work`."""

    level: float
    smallest: float
    margin: float
    where: str


def compared(candidate: Side, reference: Side, rules: Rules) -> Claim:
    """What is claimed of `candidate` against `reference`, both with figures."""
    first, second = reference.units, candidate.units
    speedup = stats.ratio(first, second, rules.level)
    bare = stats.Contrast(speedup.value, None, None, None)
    names = f"{candidate.name} against {reference.name}"
    for side in (candidate, reference):
        if side.problem:
            reason = f"{side.name}: {side.problem}"
            return Claim("problem", f"{names}: no claim. {reason}.", bare, reason=reason)
    low, high, detectable = speedup.low, speedup.high, speedup.detectable
    if low is None or high is None or detectable is None or too_wide(low, high):
        ratio = times_as_fast(candidate, reference, speedup.value)
        basis = evidence(candidate, reference)
        few = f"{ratio} {rules.where}; too few runs for a claim ({basis}): plan -S repeats=5 on both."
        return Claim("few", few, speedup, basis=basis, reason="too few runs")
    accuracy = _equivalence(candidate, reference, rules.margin)
    if accuracy is not None and not accuracy.established:
        reason = parity_words(accuracy)
        return Claim("parity", f"{names}: no claim, {reason}.", bare, accuracy, reason=reason)
    brief = min(candidate.sessions, reference.sessions) < stats.SESSIONS
    smallest = 1 + rules.smallest if brief else 1.0
    low, high, detectable = _widened(speedup.value, high, detectable, smallest)
    speedup = speedup._replace(low=low, high=high, detectable=detectable)
    basis = ", ".join(_qualifications(candidate, reference, accuracy))
    if low <= 1 <= high:
        could = f"one of {percent(detectable - 1)} would have been" if detectable < TELLING else "too few runs"
        none = f"{candidate.name}: no difference from {reference.name} found {rules.where}; {could} ({basis})."
        return Claim("none", none, speedup, accuracy, basis, "no difference found")
    if brief and low <= smallest and high >= 1 / smallest:
        least = f"a difference of more than {percent(rules.smallest)} is not established"
        why = f"a smaller one needs {stats.SESSIONS} sessions on each side"
        small = f"{candidate.name} against {reference.name} {rules.where}: {least} ({basis}); {why}."
        return Claim("small", small, speedup, accuracy, basis, least)
    sentence = f"{times_as_fast(candidate, reference, low, high)} {rules.where} ({basis})."
    return Claim("faster" if speedup.value > 1 else "slower", sentence, speedup, accuracy, basis)


def _widened(value: float, high: float, detectable: float, smallest: float) -> tuple[float, float, float]:
    """The ends of an interval whose half-width, on logarithms, has that of `smallest` added in quadrature, and what is
    then detectable beyond `smallest`. A `smallest` of 1 changes nothing."""
    half, extra = math.log(high / value), math.log(smallest)
    wide = math.hypot(half, extra)
    return value * math.exp(-wide), value * math.exp(wide), detectable * math.exp(wide - half + extra)


def too_wide(low: float, high: float) -> bool:
    """Whether an interval of positive values tells nothing."""
    return low <= 0 or high > WIDEST * low


def _equivalence(candidate: Side, reference: Side, margin: float) -> stats.Equivalence | None:
    """Of final accuracies on images that both have; None where the work has no accuracy."""
    if candidate.accuracies is None or reference.accuracies is None:
        return None
    images = next((images for images in candidate.accuracies if images in reference.accuracies), None)
    if images is None:
        return stats.Equivalence(math.nan, None, None, 0, established=False)
    return stats.equivalence(candidate.accuracies[images], reference.accuracies[images], margin)


def parity_words(accuracy: stats.Equivalence) -> str:
    """Why equal accuracy is not established, with the worst difference that the data leave open."""
    if accuracy.low is None or accuracy.high is None:
        known = "not known on both sides" if math.isnan(accuracy.difference) else "of too few seeds"
        return f"accuracy not established ({known})"
    worse = -accuracy.low >= accuracy.high
    points = 100 * (-accuracy.low if worse else accuracy.high)
    return f"accuracy not established (could be up to {points:.1f} points {'worse' if worse else 'better'})"


def _qualifications(candidate: Side, reference: Side, accuracy: stats.Equivalence | None) -> list[str]:
    """On what a sentence rests: runs and sessions, accuracy, conditions in which the sides differ."""
    words = [evidence(candidate, reference)]
    if accuracy is not None and accuracy.low is not None and accuracy.high is not None:
        within = 100 * max(-accuracy.low, accuracy.high)
        words.append("equal accuracy" + (f" to within {within:.1f} points" if within >= 0.05 else ""))
    for name, value in candidate.conditions.items():
        other = reference.conditions.get(name, "")
        told = name in TOLD_OF_ANY or candidate.hardware == reference.hardware
        if told and value != other:
            words.append(f"{name} {value or 'not known'} and {other or 'not known'}")
    return words


def evidence(candidate: Side, reference: Side) -> str:
    """`5 runs each in 3 sessions`, `5 and 3 runs, all within 12 minutes` `5 runs each, of A all within 1 minute`."""
    counts = len(candidate.seconds), len(reference.seconds)
    runs = (
        f"{counts[0]} run{'s' * (counts[0] > 1)} each"
        if counts[0] == counts[1]
        else f"{counts[0]} and {counts[1]} runs"
    )
    sessions = candidate.sessions, reference.sessions
    if min(sessions) >= stats.SESSIONS:
        return f"{runs} in {sessions[0] if sessions[0] == sessions[1] else '{} and {}'.format(*sessions)} sessions"
    if max(sessions) >= stats.SESSIONS:
        brief = min((candidate, reference), key=lambda side: side.sessions)
        return f"{runs}, of {brief.name} all within {duration(_lasted(brief))}"
    longest = max(_lasted(candidate), _lasted(reference))
    known = None not in (*candidate.started, *reference.started)
    return f"{runs}, all within {duration(longest)}" if max(counts) > 1 and known else runs


def _lasted(side: Side) -> float:
    """Minutes from the first start to the last."""
    known = [start for start in side.started if start is not None]
    return (max(known) - min(known)) / 60_000 if known else 0.0


def duration(minutes: float) -> str:
    """Minutes in words, rounded up: `12 minutes`, `3.5 hours`, `3 days`."""
    minutes = max(1, math.ceil(minutes))
    if minutes < 120:
        return f"{minutes} minute{'s' * (minutes > 1)}"
    hours = minutes / 60
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.0f} days"


def times_as_fast(candidate: Side, reference: Side, *times: float) -> str:
    """`A is 1.49 to 1.55 times as fast as B`, or where it is slower `A takes ... times as long as B`; `times`: one
    ratio, or an interval's ends."""
    faster = times[0] >= 1
    ends = times if faster else [1 / value if value else math.inf for value in reversed(times)]
    shown = " to ".join(dict.fromkeys(factors(*ends, ratio=True) if len(ends) == 2 else [factor(ends[0])]))
    verb, how = ("is", "fast") if faster else ("takes", "long")
    return f"{candidate.name} {verb} {shown} times as {how} as {reference.name}"


def factor(value: float) -> str:
    """Three significant digits: 0.0932, 0.604, 1.52, 31.5, 312; of more than 1,000 all that are before the point."""
    if not math.isfinite(value):
        return "∞"
    return f"{value:,.{_decimals(value)}f}" if value >= 0.1 or not value else f"{value:.3g}"


def ratio_words(value: float) -> str:
    """A ratio as a table has it: `1.52`, and under 1 as a fraction: `1/140`."""
    return factor(value) if value >= 1 or not value else f"1/{factor(1 / value)}"


def factors(low: float, high: float, *, ratio: bool = False) -> tuple[str, str]:
    """Both ends of an interval, with the decimals that tell them apart; a ratio's from 1 too, where that is outside."""
    if high > 3 * low or high < (1 + 1e-6) * low:  # the last: equal, but for a logarithm's last digits
        return factor(low), factor(high)
    for decimals in range(_decimals(high), 7):
        ends = f"{low:,.{decimals}f}", f"{high:,.{decimals}f}"
        plain = [float(end.replace(",", "")) for end in ends]
        at_one = ratio and any(shown == 1 != exact for shown, exact in zip(plain, (low, high), strict=True))
        if plain[0] < plain[1] and not at_one:
            break
    return ends


def _decimals(value: float) -> int:
    return 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3


def percent(fraction: float) -> str:
    """Two significant digits or more: 0.31%, 3.1%, 31.4%, 98.8%, 312%."""
    value = 100 * fraction
    return f"{value:,.0f}%" if value >= 200 else f"{value:.1f}%" if value >= 1 else f"{value:.2g}%"


def large(value: float) -> str:
    """Four significant digits, in words from a million on."""
    for size, word in ((1e9, " billion"), (1e6, " million")):
        if value >= size:
            return f"{value / size:,.4g}{word}"
    return f"{value:,.0f}"
