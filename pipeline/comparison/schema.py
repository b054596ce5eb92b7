"""The results of a comparison as dataclasses. Their fields are the keys of compare.json."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline import config
from pipeline.comparison.claims import Claim
from pipeline.comparison.costs import Costs
from pipeline.comparison.stats import Estimate


@dataclass(frozen=True)
class Head:
    """The machine that a row is about, and its runs.

    `conditions`: by the keys of `runs.CONDITIONS`; `runs`: those that count; `left_out`: those that do not, each with
    its reason; `planned`: the number of planned runs; `problem`: why nothing is claimed ('' for none); `behavior`: what
    the machine did by itself, such as throttling; `sessions`: their number; `hours`: from the first start to the last.
    """

    name: str
    hardware: str
    label: str
    machine: str
    device: str
    backend: str
    memory_gib: str
    conditions: Mapping[str, str]
    torch: str
    runs: Sequence[Mapping[str, str]]
    left_out: Sequence[Mapping[str, str]]
    planned: int
    problem: str
    behavior: Sequence[str]
    sessions: int
    hours: float


@dataclass(frozen=True)
class Row:
    """A recipe's work on one machine.

    `figures`, and the `values` of all runs: by the keys of WORK_METRICS, epoch_seconds and images_per_second;
    `reached`: how many runs reached the target accuracy, and of how many; `shown`: the most typical run; `course`: that
    run's (seconds, validation accuracy) after each epoch; `claim`: about `total_seconds`; `whole`: about
    `process_seconds`.
    """

    head: Head
    settings: Mapping[str, str]
    shown: Mapping[str, str]
    figures: Mapping[str, Estimate]
    values: Mapping[str, Sequence[float]]
    memory_of: str
    energy_source: str
    reached: tuple[int, int] | None
    course: Sequence[tuple[float, float]]
    costs: Costs | None
    claim: Claim = Claim("alone")
    whole: Claim = Claim("alone")


@dataclass(frozen=True)
class StepFigures:
    """One sustained step on one machine. `speed` (of the last third) and `first_third`: images per second; `values`:
    the speed of each run; `workload`: a hash of the step, its batch and its duration."""

    speed: Estimate
    values: Sequence[float]
    first_third: Estimate | None
    precision: str
    batch_size: int | None
    workload: str
    images_per_joule: Estimate | None
    watts: Estimate | None
    claim: Claim = Claim("alone")


@dataclass(frozen=True)
class ScoreRow:
    """One machine's score. `steps`: by name; `watts`: the highest of all steps; `recipe`: what was trained before."""

    head: Head
    recipe: str
    shown: Mapping[str, str]
    steps: Mapping[str, StepFigures]
    energy_source: str
    watts: float | None
    costs: Costs | None

    @property
    def claim(self) -> Claim:
        """The claim about the first step that the machine ran."""
        return next(iter(self.steps.values())).claim


@dataclass(frozen=True)
class Other:
    """A group that is in no table, and why. `figure`: its median total time, or its median speed at the first step."""

    name: str
    settings: Mapping[str, str]
    runs: Sequence[Mapping[str, str]]
    figure: float | None
    reason: str


@dataclass(frozen=True)
class Table:
    """Rows that are compared with `reference`, the fastest first. `settings`: what all rows share, or None if each
    machine is at its best; `level`: of each row's interval, so that all `comparisons` hold together at 95%."""

    settings: Mapping[str, str] | None
    reference: str | None
    comparisons: int
    level: float
    rows: Sequence[Row]


@dataclass(frozen=True)
class Section:
    """Machines that did the same work with the same `version` of the code. `target`: the recipe's target accuracy;
    `others`: groups that are in no table."""

    workload: str
    version: str
    title: str
    target: float | None
    tables: Sequence[Table]
    others: Sequence[Other]


@dataclass(frozen=True)
class Score:
    """Every machine's sustained steps, the fastest first. `others`: groups that are not in the table."""

    reference: str | None
    level: float
    rows: Sequence[ScoreRow]
    others: Sequence[Other]


@dataclass(frozen=True)
class Part:
    """Either all real runs or all DEMO runs (with a stand-in). They are never in one table."""

    demo: bool
    score: Score | None
    sections: Sequence[Section]


@dataclass(frozen=True)
class Comparison:
    """The whole comparison. `runs`: the number of trainings; `copies`: the number of their copies in other experiments;
    `first`, `last`: the start of the oldest and of the newest run, in milliseconds since 1970; `rules`: the settings
    that claims follow; `unused_prices`: hardware in the price file that no run has; `advice`: what to do next if there
    is nothing to compare."""

    runs: int
    copies: int
    machines: int
    first: int | None
    last: int | None
    rules: config.Compare
    parts: Sequence[Part]
    prices: Mapping[str, config.Price] | None
    unused_prices: Sequence[str]
    advice: str
