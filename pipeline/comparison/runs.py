"""Read a run: its metrics as figures that can be measurements, its tags as plain text, what disturbed it."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pipeline import config
from pipeline.profiling.system_state import BEHAVIORS

Run = Mapping[str, Any]
"""One of `store.finished_runs`: run_id, experiment_id, started, tags, metrics, params."""

WORK, SCORE = "", "sustained."
"""The two stages that are compared, by the prefix of their tags: the recipe's work and the machine's score."""

LARGEST = 1e300
"""MLflow's SQL stores keep infinity as the largest double."""


CONDITIONS = {
    "cores": ("hardware.usable_cores", "cores", ""),
    "memory_limit": ("hardware.memory_limit_gib", "memory limit", " GiB"),
    "threads": ("software.threads", "CPU threads", ""),
    "torch": ("software.torch", "torch", ""),
    "power_limit": ("hardware.power_limit_watts", "power limit", " W"),
}
"""The conditions that runs must share to be pooled: their tags, and their names and units for people."""


class Entity(NamedTuple):
    """One device of one machine under CONDITIONS, in their order; '' for an unknown one."""

    machine: str
    device: str
    label: str
    conditions: tuple[str, ...]


def clean(text: str) -> str:
    """A user's text on one line, without unprintable characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def tag_of(run: Run, key: str, default: str = "") -> str:
    """A tag, cleaned."""
    return clean(run["tags"].get(key, default))


def version_of(run: Run) -> str:
    """The version of the code that executed the run."""
    return tag_of(run, "software.execution", "1")


def execution_of(run: Run) -> dict[str, str]:
    """The settings that say how the work was executed."""
    return {key: clean(run["params"].get(f"train.{key}", "")) for key in config.EXECUTION_KEYS}


def entity_of(run: Run, stage: str = WORK) -> Entity:
    """The device, machine and conditions of a run. The score may have used another number of threads."""
    conditions = {key: tag_of(run, tag) for key, (tag, _, _) in CONDITIONS.items()}
    conditions["threads"] = tag_of(run, f"{stage}threads") or conditions["threads"]
    conditions["torch"] = re.sub(r"^(\d+\.\d+).*", r"\1", conditions["torch"])
    machine = tag_of(run, "machine") or tag_of(run, "hardware") or "?"
    return Entity(machine, tag_of(run, "device") or "?", tag_of(run, "label"), tuple(conditions.values()))


def started(run: Run, stage: str) -> int | None:
    """When the stage of a run began, in milliseconds. The score may be measured hours after the training."""
    text = run["tags"].get(f"{stage}started", "")
    return int(text) if text.isdecimal() else run["started"]


def planned_repeats(run: Run) -> int:
    """How many repeats were planned with this one; 1 for a single run."""
    text = run["tags"].get("repeats", "")
    return int(text) if text.isdecimal() else 1


def taints_of(run: Run, stage: str) -> list[str]:
    """What disturbed the stage from outside, a word each; a stand-in is such a disturbance."""
    stand_ins = [f"no real {word}" for word in tag_of(run, "fallback").split()]
    return [word for word in tag_of(run, f"{stage}taints").split() if word not in BEHAVIORS] + stand_ins


def behavior_of(runs: Iterable[Run], stage: str) -> list[str]:
    """What the machine itself did, such as throttling: a result, no taint. Older code put it among the taints."""
    tags = [tag_of(run, stage + key) for run in runs for key in ("taints", "behavior")]
    return sorted(BEHAVIORS.intersection(word for tag in tags for word in tag.split()))


def measurement(run: Run, metric: str) -> float | None:
    """A metric if it can be a measurement, else None."""
    value = run["metrics"].get(metric)
    return value if value is not None and is_measurement(value) else None


def fraction(run: Run, metric: str) -> float | None:
    """A metric if it is a fraction, else None."""
    value = run["metrics"].get(metric)
    return value if value is not None and is_fraction(value) else None


def measurements(runs: Iterable[Run], metric: str) -> list[float]:
    """The measurement of each run that has it."""
    return [value for run in runs if (value := measurement(run, metric)) is not None]


def is_measurement(value: float) -> bool:
    """Whether a figure is positive and finite."""
    return 0 < value < LARGEST


def is_fraction(value: float) -> bool:
    """Whether a figure lies between 0 and 1."""
    return 0 <= value <= 1
