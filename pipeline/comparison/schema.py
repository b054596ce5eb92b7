"""What a comparison says, as plain values: rows, tables and sections; compare.json is made of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline import config
from pipeline.comparison import stats
from pipeline.comparison.claims import Claim
from pipeline.comparison.costs import Costs


@dataclass(frozen=True)
class Head:
    """Who a row is of and on what it rests. `conditions`: those of `groups.CONDITIONS`; `runs`: those that count, and
    `left_out` the others of its group with their reasons; `planned`: how many were planned; `problem`: why nothing is
    claimed ('' where there is nothing); `behavior`: what the machine did, such as throttling; `sessions`: how many the
    runs make; `hours`: from the first start to the last."""

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
    """One group's work as it is shown. `figures` are by WORK_METRICS and those that COURSES give: epoch_seconds,
    images_per_second. `reached`: how many runs reached the target accuracy, of how many. `course`: seconds and
    validation accuracy by epoch of the run `shown`, the most typical one. `whole` is the claim of whole processes."""

    head: Head
    settings: Mapping[str, str]
    shown: Mapping[str, str]
    figures: Mapping[str, stats.Estimate]
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
    """One sustained step of one group: images a second in the last third and in the first, the precision, the batch,
    the hash of the work, watts and images per joule where they are known, and what is claimed of it."""

    speed: stats.Estimate
    values: Sequence[float]
    first_third: stats.Estimate | None
    precision: str
    batch_size: int | None
    workload: str
    images_per_joule: stats.Estimate | None
    watts: stats.Estimate | None
    claim: Claim = Claim("alone")


@dataclass(frozen=True)
class ScoreRow:
    """One machine's score: its steps by name; `watts` is the most that a step drew; `recipe`: with which it was run."""

    head: Head
    recipe: str
    shown: Mapping[str, str]
    steps: Mapping[str, StepFigures]
    energy_source: str
    watts: float | None
    costs: Costs | None

    @property
    def is_reference(self) -> bool:
        """Whether the other rows are compared with this one."""
        return any(figures.claim.kind == "reference" for figures in self.steps.values())


@dataclass(frozen=True)
class Other:
    """A group that is in no table, and why. `figure`: its typical total time or speed of the first step."""

    name: str
    settings: Mapping[str, str]
    runs: Sequence[Mapping[str, str]]
    figure: float | None
    reason: str


@dataclass(frozen=True)
class Table:
    """Rows that are compared with each other, best first. `settings` are those that all share, None where each machine
    is at its best; `level` is that of each row's interval, so that all `comparisons` hold together at 95%."""

    settings: Mapping[str, str] | None
    reference: str | None
    comparisons: int
    level: float
    rows: Sequence[Row]


@dataclass(frozen=True)
class Section:
    """Machines that did the same work, executed by one `version` of the code. `target`: the accuracy to which the time
    is given; `others`: groups that are in none of the tables."""

    workload: str
    version: str
    title: str
    target: float | None
    tables: Sequence[Table]
    others: Sequence[Other]


@dataclass(frozen=True)
class Score:
    """Every machine's sustained steps, the fastest first; `others`: groups that are not in the table."""

    reference: str | None
    level: float
    rows: Sequence[ScoreRow]
    others: Sequence[Other]


@dataclass(frozen=True)
class Part:
    """Real runs, or those with a stand-in: never in one table."""

    demo: bool
    score: Score | None
    sections: Sequence[Section]


@dataclass(frozen=True)
class Comparison:
    """All that the report says. `runs`: how many were read, each training once; `copies`: how many more were read of
    the same trainings in other experiments; `first`, `last`: when the oldest and the newest began, milliseconds since
    1970; `rules`: the settings that claims follow; `unused_prices`: names in the file of prices that no run has as its
    hardware; `advice`: what to do next, where there is nothing to compare."""

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
