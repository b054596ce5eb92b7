"""What may be said of one machine against another, and the sentence that says it, from the figures alone.

Faster or slower is said where the interval of the ratio excludes 1 and both sides have CLAIM_RUNS runs or more; not
where final accuracies differ beyond noise, or are not known: the reason stands in its place; and not of what is
tainted.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from pipeline import stats

CLAIM_RUNS = 3
"""Fewest runs of either side that carry a claim. Of two, one can't tell which is the odd one."""

PARITY = 0.005
"""Difference of accuracies, as a fraction, up to which speeds are compared however sure the difference is."""

PARITY_SINGLE = 0.01
"""The same where one side has a single run, whose noise isn't known."""


@dataclass(frozen=True)
class Side:
    """One of two that are compared: what each of its runs took in `seconds` (or their like: less is better), in how
    many `processes`, and what those can't show; their `accuracies` by the name of the images (None where the work has
    none), and what else a sentence may tell, by its words: the typical figure and what it was measured of, without
    which nothing is compared."""

    name: str
    seconds: Sequence[float]
    processes: int
    accuracies: Mapping[str, Sequence[float]] | None = None
    besides: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    taints: str = ""
    unseen: stats.Part = stats.NONE


@dataclass(frozen=True)
class Claim:
    """What is said against the reference. `kind` is one of reference, faster, slower, none (no difference found), few
    (fewer than CLAIM_RUNS runs), single (one run), parity (accuracies differ or are not known), tainted, alone (nothing
    to compare). `speedup` is above 1 where it is faster; `accuracy` is its own less the reference's."""

    kind: str
    sentence: str = ""
    speedup: stats.Contrast | None = None
    accuracy: stats.Contrast | None = None


def tainted(side: Side) -> Claim:
    """Of a side whose runs may not be claimed of."""
    return Claim("tainted", f"{side.name}: nothing is claimed, for what was measured is tainted ({side.taints}).")


def compared(me: Side, it: Side, where: str, level: float) -> Claim:
    """What is claimed of `me` against `it`, both with figures; `where` as in `on this work`; `level` is that of the
    speed-up's interval."""
    accuracy, differs, alike = _parity(me, it)
    if differs:
        return Claim("parity", f"{me.name}: no speed-up over {it.name} is claimed, for {differs}.", None, accuracy)
    speedup = stats.ratio(it.seconds, me.seconds, level, [it.unseen, me.unseen])
    counts = _counts(me, it)
    qualified = f"({counts}{', ' + alike if alike else ''})"
    if speedup.low is None or speedup.high is None or speedup.detectable is None:
        single = f"{_as_fast(me, it, speedup.value)} {where}, in a single run ({counts}): no claim."
        return Claim("single", single, speedup, accuracy)
    if min(len(me.seconds), len(it.seconds)) < CLAIM_RUNS:
        few = f"in too few runs for a claim ({counts}; {CLAIM_RUNS} each are needed)"
        return Claim("few", f"{_as_fast(me, it, speedup.value)} {where}, {few}.", speedup, accuracy)
    if speedup.low <= 1 <= speedup.high:
        could = f"one of {percent(speedup.detectable - 1)} could have been"
        none = f"{me.name}: no difference from {it.name} found {where}; {could} {qualified}."
        return Claim("none", none, speedup, accuracy)
    said = f"{_as_fast(me, it, speedup.low, speedup.high)} {where} {qualified}{_besides(me, it)}."
    return Claim("faster" if speedup.value > 1 else "slower", said, speedup, accuracy)


def _parity(me: Side, it: Side) -> tuple[stats.Contrast | None, str, str]:
    """The difference of final accuracies, why it forbids a claim (or ''), and how alike they are otherwise. Its
    interval is one of 95%: corrected for many machines, it would let larger differences pass."""
    if me.accuracies is None or it.accuracies is None:
        return None, "", ""
    images = next((images for images in me.accuracies if images in it.accuracies), None)
    if images is None:
        return None, "their accuracies are not known", ""
    mine, its = me.accuracies[images], it.accuracies[images]
    apart = stats.difference(mine, its)
    differ = f"their accuracies differ ({images} images): {percent(fmean(mine))} against {percent(fmean(its))}"
    if apart.low is None or apart.high is None:
        return apart, f"{differ}, single run" if abs(apart.value) > PARITY_SINGLE else "", ""
    if abs(apart.value) > PARITY and not apart.low <= 0 <= apart.high:
        low, high = sorted(abs(100 * bound) for bound in (apart.low, apart.high))
        return apart, f"{differ}, {low:.1f} to {high:.1f} points", ""
    within = max(-apart.low, apart.high)
    return apart, "", "same accuracy" + (f" to within {100 * within:.1f} points" if within > PARITY else "")


def _counts(me: Side, it: Side) -> str:
    """`n = 5 and 3`, and in how many processes where some runs share one."""
    sides = [(len(side.seconds), side.processes) for side in (me, it)]
    if all(runs == processes for runs, processes in sides):
        return f"n = {sides[0][0]} and {sides[1][0]}"
    if all(processes == 1 for _, processes in sides):
        return f"n = {sides[0][0]} and {sides[1][0]}, each in one process"
    words = [f"{runs} in {'one process' if own == 1 else f'{own} processes'}" for runs, own in sides]
    return f"n = {' and '.join(words)}"


def _as_fast(me: Side, it: Side, *times: float) -> str:
    """`A is 1.49 to 1.55 times as fast as B`, or where it is slower `A takes ... times as long as B`; `times`: one
    ratio, or an interval's ends, both above 1 or both below it."""
    faster = times[0] >= 1
    ends = times if faster else [1 / each if each else math.inf for each in reversed(times)]
    shown = " to ".join(dict.fromkeys(factors(*ends, ratio=True) if len(ends) == 2 else [factor(ends[0])]))
    return f"{me.name} {'is' if faster else 'takes'} {shown} times as {'fast' if faster else 'long'} as {it.name}"


def _besides(me: Side, it: Side) -> str:
    """What it takes for its speed, where both measured the same thing: `, at 0.6 of its memory`."""
    said = ""
    for words, (mine, source) in me.besides.items():
        its, other_source = it.besides.get(words, (0.0, ""))
        if source != other_source:
            continue
        share = mine / its
        if f"{share:.2g}" == "1":
            continue
        times = f"{share:.2g} of" if share < 1 else f"{share:.2g} times" if share < 10 else f"{share:,.0f} times"
        said += f", {words.format(times)}"
    return said


def factor(value: float) -> str:
    """Three significant digits: 0.0932, 0.604, 1.52, 31.5, 312; of more than 1,000 all that are before the point."""
    if not math.isfinite(value):
        return "∞"
    return f"{value:,.{_decimals(value)}f}" if value >= 0.1 or not value else f"{value:.3g}"


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
    if value > 1000:
        return "over 1,000%"
    return f"{value:.0f}%" if value >= 200 else f"{value:.1f}%" if value >= 1 else f"{value:.2g}%"


def large(value: float) -> str:
    """Four significant digits, in words from a million on."""
    for size, word in ((1e9, " billion"), (1e6, " million")):
        if value >= size:
            return f"{value / size:,.4g}{word}"
    return f"{value:,.0f}"
