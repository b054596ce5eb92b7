"""Whether claims are fair: count false and missed claims in made-up stores. The noise is drawn from no measurement.

python -m benchmarks.simulation [--trials N] [--seed N] [--json FILE]

A trial is a store of a few machines with n processes each, compared as `compare` does it. Logarithms of times are
normal; of Student's t with two degrees of freedom; of two modes (each process chooses a kernel); of AR(1) drift from
process to process; or share an effect of their hour. Spreads are standard deviations. Student's t has none, so its
quartiles are those of a normal of that spread. Every session of every machine is drawn anew. In one session processes
start five minutes apart; in three, they are spread evenly over sessions that start two hours apart.

Each share is printed with its standard error. The exit status is 1 if a share misses its goal by more than chance
explains. Shares without a goal tell what to expect where nothing is promised.
"""

import argparse
import math
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator

from benchmarks import results
from pipeline import config, files
from pipeline.comparison import build, stats
from pipeline.comparison.claims import Claim
from pipeline.profiling import score_steps, system_state

COUNTS = (3, 5, 10)
"""Processes of each machine."""

MACHINES = {2: 1.0, 5: 0.4, 20: 0.15}
"""Machines in a store, and the share of the trials that are made of it, since many machines take long."""

SESSIONS = {"one session": 1, "three sessions": 3}
MINUTE = 60_000
BETWEEN_PROCESSES, BETWEEN_SESSIONS = 5 * MINUTE, 120 * MINUTE

SETTINGS = replace(config.load([]).compare, reference=None)
"""As in params.yaml; the reference is the first machine."""

FIGURES = (
    "time/total_seconds",
    "time/process_seconds",
    *(score_steps.metric(step.name, "images_per_second") for step in score_steps.STEPS),
)
"""The metrics by which machines are compared."""

CLAIMED = ("faster", "slower")
CHANCE = 2.0
"""A share may miss its goal by this many standard errors."""

Draw = Callable[[Generator, Sequence[int]], np.ndarray]
"""Draws the noise of one machine, in logarithms of time, from the numbers of processes in its sessions."""


Fields = dict[str, Any]
"""A run's, as `store.finished_runs` gives them."""


class Goal(NamedTuple):
    """The most that a share may be, or the least."""

    limit: float
    least: bool = False


MOST_FALSE = Goal(0.065)
"""Stores of equal machines in which any is claimed to differ."""

MOST_SMALL, MOST_ALMOST = Goal(0.01), Goal(0.065)
"""Differences claimed in one session: of up to 2%, and just below `compare.smallest`."""

MOST_LOSS, MOST_AT_MARGIN = Goal(0.05), Goal(0.065)
"""Losses of accuracy that pass as none: of twice the margin, and as large as the margin (the test's level is 5%)."""

MOST_DRIFT = Goal(1.5 * system_state.DRIFT_P)
"""Drifts seen where there is none."""

LEAST_FOUND, LEAST_PARITY = Goal(0.9, least=True), Goal(0.8, least=True)
"""Differences that are found, and equal accuracies that pass."""


class Result(NamedTuple):
    """A share of trials, with its place in a table."""

    row: str
    column: str
    share: float
    trials: int
    goal: Goal | None

    @property
    def error(self) -> float:
        """The standard error, with one hit and one miss added, so that a share of 0 has one too."""
        share = (self.share * self.trials + 1) / (self.trials + 2)
        return math.sqrt(share * (1 - share) / self.trials)

    @property
    def missed(self) -> bool:
        """Whether the goal is missed by more than chance explains."""
        if self.goal is None:
            return False
        limit = self.goal.limit
        slack = CHANCE * math.sqrt(limit * (1 - limit) / self.trials)
        return self.share < limit - slack if self.goal.least else self.share > limit + slack


@dataclass(frozen=True)
class Trials:
    """How many trials make a share, and the seed. All shares of a row see the same noise."""

    count: int
    seed: int

    def share(
        self, row: str, column: str, trial: Callable[[Generator], bool], goal: Goal | None = None, part: float = 1.0
    ) -> Result:
        """The share of trials in which `trial` is true. `part`: of how many of the trials it is made."""
        generator = np.random.default_rng([self.seed, zlib.crc32(row.encode())])
        count = max(round(part * self.count), 2)
        return Result(row, column, sum(trial(generator) for _ in range(count)) / count, count, goal)


# --- noise


def normal(spread: float) -> Draw:
    """Independent normal noise."""
    return lambda generator, sizes: generator.normal(0, spread, sum(sizes))


def student(spread: float) -> Draw:
    """Student's t with two degrees of freedom, whose quartile is sqrt(2/3), scaled to the quartiles of a normal."""
    scale = spread * 0.67449 / math.sqrt(2 / 3)
    return lambda generator, sizes: scale * generator.standard_t(2, sum(sizes))


def modes(apart: float, spread: float) -> Draw:
    """Two modes; each process is in either with probability 1/2."""
    return lambda generator, sizes: (
        apart * generator.integers(0, 2, sum(sizes)) + generator.normal(0, spread, sum(sizes))
    )


def drift(spread: float, phi: float = 0.7, *, anew: bool = True) -> Draw:
    """Stationary AR(1) noise from process to process. `anew`: each session starts afresh."""
    return lambda generator, sizes: (
        spread * np.concatenate([autoregressive(generator, phi, n) for n in (sizes if anew else [sum(sizes)])])
    )


def hours(effect: float, spread: float) -> Draw:
    """A normal effect of each session, and independent normal noise of each process."""
    return lambda generator, sizes: (
        np.repeat(generator.normal(0, effect, len(sizes)), sizes) + generator.normal(0, spread, sum(sizes))
    )


def autoregressive(generator: Generator, phi: float, count: int) -> np.ndarray:
    """Stationary AR(1) noise with a standard deviation of 1."""
    values = generator.normal(0, 1, count)
    for step in range(1, count):
        values[step] = phi * values[step - 1] + math.sqrt(1 - phi**2) * values[step]
    return values


INDEPENDENT: dict[str, Draw] = {
    "normal 1%": normal(0.01),
    "normal 5%": normal(0.05),
    "t2 1%": student(0.01),
    "modes 4% apart, 0.5%": modes(0.04, 0.005),
    "modes 4% apart, 0.05%": modes(0.04, 0.0005),
}
"""Noise that is independent from process to process."""

SHARED: dict[str, Draw] = {
    "drift 1%": drift(0.01),
    "drift 5%": drift(0.05),
    "hours 0.48%, 0.05%": hours(0.0048, 0.0005),
    "hours 0.48%, 0.5%": hours(0.0048, 0.005),
    "hours 1.3%, 0.05%": hours(0.013, 0.0005),
    "hours 1.3%, 0.5%": hours(0.013, 0.005),
}
"""Noise that the processes of a session share. Repeats within a session do not show it: goals need three sessions."""

HARDER = "hours 1.3%, 0.05%"
"""Noise for which there is no goal in one session."""


# --- stores


def planned_set(
    machine: int, sizes: Sequence[int], metrics: Sequence[Mapping[str, float]], first_seed: int = 0
) -> list[Fields]:
    """One machine's planned set of runs. `sizes`: runs in each session. Unless `metrics` say otherwise, the accuracy is
    the same for every machine."""
    starts = [
        1_750_000_000_000 + session * BETWEEN_SESSIONS + process * BETWEEN_PROCESSES
        for session, size in enumerate(sizes)
        for process in range(size)
    ]
    name = f"M{machine:02}"
    tags = {
        "machine": name, "hardware": name, "device": "cpu", "backend": "cpu", "workload": "made",
        "repeats.id": name, "repeats": str(len(metrics)), "software.execution": str(config.EXECUTION_VERSION),
        **{score_steps.tag(step.name, "workload"): step.name for step in score_steps.STEPS},
    }  # fmt: skip
    return [
        {
            "run_id": f"{name}.{number}",
            "experiment_id": "0",
            "started": started,
            "tags": tags,
            "metrics": {"test/accuracy": 0.75, **run_metrics},
            "params": {"settings.seed": str(first_seed + number), "train.precision": "fp32"},
        }
        for number, (started, run_metrics) in enumerate(zip(starts, metrics, strict=True))
    ]


def compare(runs: Sequence[Fields]) -> tuple[list[Any], list[Any]]:
    """The rows of the work's only table, by machine, the reference first; and the rows of the score."""
    courses = dict.fromkeys(build.COURSES, ())
    (part,) = build.compare(runs, lambda _: courses, lambda *_: "", SETTINGS, None).parts
    ((table,),) = (section.tables for section in part.sections)
    return sorted(table.rows, key=lambda row: row.head.machine), list(part.score.rows if part.score else ())


def store_claims(
    generator: Generator, draw: Draw, sessions: int, machines: int, count: int, slower: float = 0.0
) -> list[Claim]:
    """The claims about all machines but the reference. Their times are drawn alike, but the first of them is slower by
    the share `slower`."""
    sizes = [len(range(session, count, sessions)) for session in range(sessions)]
    runs: list[Fields] = []
    for machine in range(machines):
        seconds = np.exp(draw(generator, sizes)) * (1 + slower * (machine == 1))
        runs += planned_set(machine, sizes, [{"time/total_seconds": float(value)} for value in seconds])
    return [row.claim for row in compare(runs)[0][1:]]


# --- tables


def false_claims(trials: Trials) -> Iterator[Result]:
    """Stores of equal machines in which any is called faster or slower."""
    for (name, draw), (design, sessions) in product((INDEPENDENT | SHARED).items(), SESSIONS.items()):
        goal = None if name in SHARED and sessions < stats.MIN_SESSIONS else MOST_FALSE
        for (machines, part), count in product(MACHINES.items(), COUNTS):
            trial = partial(any_claimed, draw=draw, sessions=sessions, machines=machines, count=count)
            yield trials.share(f"{name}; {design}; {machines} machines", f"n = {count}", trial, goal, part)
    draw = drift(0.01, anew=False)
    for (machines, part), count in product(MACHINES.items(), COUNTS):
        trial = partial(any_claimed, draw=draw, sessions=count, machines=machines, count=count)
        row = f"drift 1% that goes on; a process a session; {machines} machines"
        yield trials.share(row, f"n = {count}", trial, part=part)


def any_claimed(generator: Generator, **store: Any) -> bool:
    """Whether any machine of a store is called faster or slower."""
    return any(claim.kind in CLAIMED for claim in store_claims(generator, **store))


def false_claims_by_column(trials: Trials) -> Iterator[Result]:
    """Stores of equal machines with several independent figures each, in which any is called faster or slower."""
    for machines, part in {2: 0.5, 5: 0.2}.items():
        for column, goal in {"work": MOST_FALSE, "process": MOST_FALSE, "score": MOST_FALSE, "any": None}.items():
            trial = partial(any_claimed_in_column, machines=machines, column=column)
            yield trials.share(f"normal 1%; three sessions; {machines} machines; n = 5", column, trial, goal, part)


def any_claimed_in_column(generator: Generator, machines: int, column: str) -> bool:
    """Whether a column of the report calls any machine faster or slower."""
    runs: list[Fields] = []
    for machine in range(machines):
        noise = np.exp(generator.normal(0, 0.01, (5, len(FIGURES)))).tolist()
        runs += planned_set(machine, (2, 2, 1), [dict(zip(FIGURES, values, strict=True)) for values in noise])
    work, score = compare(runs)
    kinds = {
        "work": [row.claim.kind for row in work],
        "process": [row.whole.kind for row in work],
        "score": [step.claim.kind for row in score for step in row.steps.values()],
    }
    kinds["any"] = kinds["work"] + kinds["process"] + kinds["score"]
    return any(kind in CLAIMED for kind in kinds[column])


def small_differences(trials: Trials) -> Iterator[Result]:
    """Two machines in one session, one of them slower by less than may be claimed there: how often it is claimed, and
    how often by an interval that misses the truth."""
    noises = {"normal 0.5%": normal(0.005), "normal 1%": INDEPENDENT["normal 1%"]}
    noises |= {name: SHARED[name] for name in ("drift 1%", "hours 0.48%, 0.05%", "hours 0.48%, 0.5%", HARDER)}
    for (name, draw), slower, wrong, count in product(noises.items(), (0.0, 0.01, 0.02, 0.029), (False, True), COUNTS):
        goal = None if wrong or name == HARDER else MOST_ALMOST if slower > 0.02 else MOST_SMALL
        trial = partial(difference_claimed, draw=draw, count=count, slower=slower, wrong=wrong)
        column = f"n = {count}" + ", wrong" * wrong
        yield trials.share(f"{name}; slower by {slower:.1%}", column, trial, goal, 0.5)


def difference_claimed(generator: Generator, *, draw: Draw, count: int, slower: float, wrong: bool) -> bool:
    """Whether the second machine is called faster or slower. `wrong`: by an interval without the truth."""
    (claim,) = store_claims(generator, draw, sessions=1, machines=2, count=count, slower=slower)
    if claim.kind not in CLAIMED:
        return False
    assert claim.speedup and claim.speedup.low is not None and claim.speedup.high is not None
    return not (wrong and claim.speedup.low <= 1 / (1 + slower) <= claim.speedup.high)


def differences_found(trials: Trials) -> Iterator[Result]:
    """Stores in which a slower machine is called slower; n = 5."""
    for slower, name, draw, design, goal in (
        (0.1, "normal 1%", INDEPENDENT["normal 1%"], "one session", LEAST_FOUND),
        (0.1, "normal 1%", INDEPENDENT["normal 1%"], "three sessions", LEAST_FOUND),
        (0.03, "normal 0.37%", normal(0.0037), "three sessions", LEAST_FOUND),
        (0.03, "normal 0.68%", normal(0.0068), "three sessions", None),
        (0.03, "hours 0.48%, 0.05%", SHARED["hours 0.48%, 0.05%"], "three sessions", None),
    ):
        for machines, part in MACHINES.items():
            trial = partial(called_slower, slower=slower, draw=draw, sessions=SESSIONS[design], machines=machines)
            row = f"{slower:.0%} found; {name}; {design}"
            yield trials.share(row, f"{machines} machines", trial, goal if machines == 2 else None, part)


def called_slower(generator: Generator, **store: Any) -> bool:
    """Whether the second machine of a store is called slower."""
    return store_claims(generator, count=5, **store)[0].kind == "slower"


def parity(trials: Trials) -> Iterator[Result]:
    """Accuracies that pass as equal: by `stats.equivalence` alone, and of a machine twice as fast in a comparison."""
    for loss, spread, goal in (
        (0.02, 0.009, MOST_LOSS),
        (0.01, 0.009, MOST_AT_MARGIN),
        (0.0, 0.0046 / math.sqrt(2), None),
    ):
        for paired, whole, count in product((True, False), (False, True), COUNTS):
            equal = LEAST_PARITY if count == 5 and paired else None
            trial = partial(passes, loss=loss, spread=spread, paired=paired, whole=whole, count=count)
            row = f"loss of {100 * loss:.0f} points; {100 * spread:.2f} points a side; "
            row += ("paired" if paired else "unpaired") + ("; claims" if whole else "; test alone")
            yield trials.share(row, f"n = {count}", trial, goal if loss else equal)


def passes(generator: Generator, *, loss: float, spread: float, paired: bool, whole: bool, count: int) -> bool:
    """Whether accuracies by seed pass as equal though one side's are worse by `loss`. `whole`: in a comparison."""
    better, worse = (mean + generator.normal(0, spread, count) for mean in (0.75, 0.75 - loss))
    first_seed = 0 if paired else count
    if not whole:
        sides = dict(enumerate(better.tolist())), dict(enumerate(worse.tolist(), first_seed))
        return stats.equivalence(*sides, SETTINGS.accuracy_margin).established
    runs: list[Fields] = []
    for machine, (accuracies, seconds, seed) in enumerate(((better, 2.0, 0), (worse, 1.0, first_seed))):
        times = seconds * np.exp(generator.normal(0, 0.01, count))
        metrics = [
            {"time/total_seconds": float(time), "test/accuracy": float(accuracy)}
            for time, accuracy in zip(times, accuracies, strict=True)
        ]
        runs += planned_set(machine, (count,), metrics, seed)
    return bool(compare(runs)[0][1].claim.kind == "faster")


def false_drifts(trials: Trials) -> Iterator[Result]:
    """Series of times without a trend in which `system_state.behavior` sees a drift."""
    for phi, spread, count in product((0.0, 0.7, 0.9), (0.03, 0.1), (6, 12, 30, 100, 300)):
        goal = MOST_DRIFT if phi <= system_state.DRIFT_PHI else None
        trial = partial(drift_seen, phi=phi, spread=spread, count=count)
        yield trials.share(f"AR(1), phi = {phi}; {spread:.0%}", f"{count} times", trial, goal)


def drift_seen(generator: Generator, *, phi: float, spread: float, count: int) -> bool:
    """Whether a drift is seen in a series without a trend."""
    return "drift" in system_state.behavior({}, {}, np.exp(spread * autoregressive(generator, phi, count)).tolist())


TABLES: Mapping[str, Callable[[Trials], Iterator[Result]]] = {
    "Stores in which any of the alike machines is called faster or slower": false_claims,
    "The same by columns of the report, each with noise of its own; any: of all columns": false_claims_by_column,
    "Differences called in one session, 2 machines": small_differences,
    "Slower machines called slower, n = 5": differences_found,
    "Accuracies that pass as equal": parity,
    "Drift seen in noise without a trend": false_drifts,
}


def print_table(title: str, shares: Sequence[Result]) -> None:
    """Print shares in per cent with their standard errors, a line for each row."""
    rows: dict[str, dict[str, Result]] = {}
    for result in shares:
        rows.setdefault(result.row, {})[result.column] = result
    columns = list(dict.fromkeys(result.column for result in shares))
    width = max(map(len, rows))
    print(f"{title} (%)\n{'':{width}} {'goal':>7} " + " ".join(f"{name:>13}" for name in columns))
    for row, cells in rows.items():
        goals = {result.goal for result in cells.values() if result.goal}
        goal = "".join(f"{'>=' if goal.least else '<='} {100 * goal.limit:g}" for goal in goals)
        print(f"{row:{width}} {goal:>7} " + " ".join(f"{_percent(cells[name]):>13}" for name in columns))
    print(flush=True)


def _percent(result: Result) -> str:
    return f"{'!' if result.missed else ''}{100 * result.share:.1f} ± {100 * result.error:.1f}"


def main(words: Sequence[str]) -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=results.whole, default=1000, metavar="N", help="of most shares (1000)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to leave all shares")
    arguments = parser.parse_args(words)
    trials = Trials(arguments.trials, arguments.seed)
    tables = {}
    for title, table in TABLES.items():
        tables[title] = list(table(trials))
        print_table(title, tables[title])
    if arguments.json:
        as_json = {
            title: [result._asdict() | {"error": result.error, "missed": result.missed} for result in shares]
            for title, shares in tables.items()
        }
        files.write_json(arguments.json, as_json)
    missed = [(title, result) for title, shares in tables.items() for result in shares if result.missed]
    if missed:
        sys.exit("\n".join(f"{title}: {cell.row}, {cell.column}: {_percent(cell)}" for title, cell in missed))


if __name__ == "__main__":
    main(sys.argv[1:])
