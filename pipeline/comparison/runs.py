"""One finished run: its figures, its conditions, and what disturbed it."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from pipeline import config
from pipeline.profiling.system_state import BEHAVIORS

WORK, SCORE = "", "sustained."
"""The two stages that are compared: the recipe's work and the machine's score. Each value is a prefix of tags."""

SMALLEST, LARGEST = 1e-100, 1e100
"""No measurement lies outside, so ratios are finite. MLflow's SQL stores write infinity as 1.8e308."""

CONDITIONS = {
    "cores": ("hardware.usable_cores", "cores", ""),
    "memory_limit": ("hardware.memory_limit_gib", "memory limit", " GiB"),
    "threads": ("software.threads", "CPU threads", ""),
    "torch": ("software.torch", "torch", ""),
    "power_limit": ("hardware.power_limit_watts", "power limit", " W"),
}
"""The conditions that runs must share to be pooled, as (tag, displayed name, unit)."""


class Entity(NamedTuple):
    """One device of one machine under certain `conditions`: values in the order of CONDITIONS, '' if unknown."""

    machine: str
    device: str
    label: str
    conditions: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """A finished training, as `store.finished_runs` returns it. `started`: milliseconds since 1970."""

    run_id: str
    experiment_id: str
    started: int | None
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    params: Mapping[str, str]
    name: str = ""

    def tag(self, key: str, default: str = "") -> str:
        """The tag as one line of printable text."""
        return clean(self.tags.get(key, default))

    def version(self, stage: str) -> str:
        """The version of the code that executed the stage."""
        return self.tag(f"{stage}execution") or self.tag("software.execution", "1")

    @property
    def execution(self) -> dict[str, str]:
        """The execution settings (`config.EXECUTION_KEYS`) of the training."""
        return {key: clean(self.params.get(f"train.{key}", "")) for key in config.EXECUTION_KEYS}

    @property
    def planned(self) -> int:
        """The planned number of runs in this run's set; 1 for a single run."""
        repeats = self.tags.get("repeats", "")
        return int(repeats) if repeats.isdecimal() else 1

    @property
    def set_id(self) -> str:
        """The id of the planned set; a single run has its own id."""
        return self.tags.get("repeats.id", self.run_id)

    def entity(self, stage: str = WORK) -> Entity:
        """The device, machine and conditions. The score may use another number of threads than the training."""
        conditions = {key: self.tag(tag) for key, (tag, _, _) in CONDITIONS.items()}
        conditions["threads"] = self.tag(f"{stage}threads") or conditions["threads"]
        conditions["torch"] = re.sub(r"^(\d+\.\d+).*", r"\1", conditions["torch"])
        machine = self.tag("machine") or self.tag("hardware") or "?"
        return Entity(machine, self.tag("device") or "?", self.tag("label"), tuple(conditions.values()))

    def ran_on(self, machine: str) -> bool:
        """Whether `machine` is the fingerprint, label or hardware of the run's machine."""
        return machine in [self.tags.get(tag) for tag in ("machine", "label", "hardware")]

    def start(self, stage: str) -> int | None:
        """When the stage began, in milliseconds since 1970. The score may be measured hours after the training."""
        text = self.tags.get(f"{stage}started", "")
        return int(text) if text.isdecimal() else self.started

    def taints(self, stage: str) -> list[str]:
        """What disturbed the stage from outside, one word each. A stand-in counts as a disturbance."""
        stand_ins = [f"no real {word}" for word in self.tag("fallback").split()]
        return [word for word in self.tag(f"{stage}taints").split() if word not in BEHAVIORS] + stand_ins

    def behavior(self, stage: str) -> frozenset[str]:
        """What the machine did by itself, such as throttling. Older code wrote it among the taints."""
        return BEHAVIORS.intersection(self.tag(f"{stage}taints").split() + self.tag(f"{stage}behavior").split())

    @property
    def is_resumed(self) -> bool:
        """Whether the training was interrupted and resumed: then only its accuracies are comparable."""
        return "resumed" in self.tags

    def measurement(self, metric: str) -> float | None:
        """The metric if it is positive and of a size that can be measured, else None. A resumed training has no time,
        speed or energy: its parts ran at other times."""
        if self.is_resumed and metric.startswith(("time/", "speed/train", "speed/feature", "energy/")):
            return None
        value = self.metrics.get(metric)
        return value if value is not None and is_measurement(value) else None

    def fraction(self, metric: str) -> float | None:
        """The metric if it lies between 0 and 1, else None."""
        value = self.metrics.get(metric)
        return value if value is not None and is_fraction(value) else None


def measurements(runs: Iterable[Run], metric: str) -> list[float]:
    """The values of a metric, of the runs that measured it."""
    return [value for run in runs if (value := run.measurement(metric)) is not None]


def most_typical(runs: Sequence[Run], metric: str) -> Run:
    """The run whose metric is closest to the median; the first run if none has it."""
    values = measurements(runs, metric)
    center = median(values) if values else 0.0
    return min(runs, key=lambda run: abs((run.measurement(metric) or math.inf) - center))


def is_measurement(value: float) -> bool:
    """Whether the value is positive and of a size that can be measured."""
    return SMALLEST < value < LARGEST


def is_fraction(value: float) -> bool:
    """Whether the value lies between 0 and 1."""
    return 0 <= value <= 1


def clean(text: str) -> str:
    """A user's text as one line, without unprintable characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
