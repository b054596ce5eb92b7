"""The records that stages write: plain JSON that holds all that a run in MLflow shows.

`train` writes `record.json`: `id`, `name`, `experiment`, `started`, `ended` (milliseconds since 1970), `params`,
`tags`, `datasets`, `epochs` (each `at`, `figures`, `system`), `metrics`, `warnings`, `facts`, `hardware`. `evaluate`
writes its own: `id` (the training's), `metrics`, `tags`, `datasets`, `ended`. So does `sustain`: `id`, `metrics`,
`tags`, `series` (the courses of the steps, by metric), `warnings`, `ended`.

A repeat is a training in a process of its own. Its tags are `repeats.id`, which all repeats of a set share, `repeat`,
counted from 1, `repeats`, the planned number, and `repeat.pause_seconds`, the time since the previous one ended.
"""

import csv
import hashlib
import io
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median, stdev
from typing import TYPE_CHECKING, Any

from pipeline import config, files
from pipeline.errors import UsageError
from pipeline.tracking import location

if TYPE_CHECKING:  # torch takes seconds to import, and `compare` does without it
    from pipeline.devices import Backend

Record = Mapping[str, Any]
Metrics = Mapping[str, float]

STAGES = ("train", "evaluate", "sustain")
"""The stages that write a record."""

LATE_TAGS = frozenset({"data.placement", "energy.source", "taints", "behavior"})
"""Tags that a training gets only at its end."""

REPEAT_TAGS = frozenset({"repeat", "repeat.pause_seconds"})
"""Tags that tell the repeats of a set apart. The parent run has none of them."""

WORD_TAGS = frozenset({"taints", "behavior"})
"""Tags that hold words, also under a prefix such as `sustained.`. The parent run has the words of all repeats."""


def now() -> int:
    """Milliseconds since 1970, as MLflow counts time."""
    return time.time_ns() // 1_000_000


# --- where records are


def stage_folders(outputs: Path, repeat: int = 1) -> dict[str, Path]:
    """The folder of each stage for a repeat, by stage. The first repeat's is that of a single training."""
    subfolder = Path() if repeat == 1 else Path("repeats", str(repeat))
    return {stage: outputs / stage / subfolder for stage in STAGES}


def repeat_number(record: Record) -> int:
    """The number of a repeat, from 1. A single training is the first."""
    return int(record["tags"].get("repeat", 1))


def planned_repeats(outputs: Path) -> int:
    """The number of repeats that the training in `outputs` was planned to have. 1 if it is single or missing."""
    first = stage_folders(outputs)["train"] / "record.json"
    return int(files.read_json(first)["tags"].get("repeats", 1)) if first.exists() else 1


def training_records(outputs: Path) -> list[dict[str, Any]]:
    """The records of all planned repeats in `outputs`. Raises StageError if one is missing."""
    return [files.read_json(path) for path in _training_paths(outputs)]


def present_records(outputs: Path) -> list[dict[str, Any]]:
    """The records of those repeats in `outputs` that are there."""
    return [files.read_json(path) for path in _training_paths(outputs) if path.exists()]


def _training_paths(outputs: Path) -> list[Path]:
    repeats = range(1, planned_repeats(outputs) + 1)
    return [stage_folders(outputs, repeat)["train"] / "record.json" for repeat in repeats]


def load_inputs(settings: config.Settings, folder: Path) -> dict[str, Any]:
    """Read what `download` left in `folder`. Raises UsageError if that was for other data or weights."""
    inputs: dict[str, Any] = files.read_json(folder / "inputs.json")
    for key, wanted, present in (
        ("data.source", settings.data.source, inputs["data"]["requested"]),
        ("data.limit", settings.data.limit, inputs["data"]["limit"]),
        ("model", settings.work.model, inputs["weights"]["model"]),
        ("weights", config.public_path(settings.work.weights), inputs["weights"]["requested"]),
    ):
        if wanted != present:
            raise UsageError(
                f"{key}: {json.dumps(wanted)} is not what `download` looked at ({json.dumps(present)}): "
                "run `python -m pipeline.download` with the same settings first"
            )
    return inputs


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Up to three keys whose values differ, in words; '' if there is none."""
    keys = [key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key)]
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


# --- what a training's record begins with


def effective_settings(settings: config.Settings) -> dict[str, Any]:
    """The settings as a run's own params.yaml: only the chosen recipe, and no absolute path."""
    work = settings.work.resolved()
    chosen = {"optimizer_options": work["optimizer"], "scheduler_options": work["scheduler"]}
    options = {key: {name: work[key]} for key, name in chosen.items()}
    return {
        "recipe": settings.recipe,
        "device": settings.device,
        "seed": settings.seed,
        "label": settings.label,
        "repeats": settings.repeats,
        "repeat_pause": settings.repeat_pause,
        "resume": settings.resume,
        "sustain_seconds": settings.sustain_seconds,
        "largest_batch": settings.largest_batch,
        "data": vars(settings.data) | {"path": config.public_path(settings.data.path)},
        "energy": vars(settings.energy),
        "compare": vars(settings.compare) | {"prices": config.public_path(settings.compare.prices)},
        "tracking": vars(settings.tracking),
        "recipes": {settings.recipe: work | {"weights": config.public_path(work["weights"])} | options},
    }


def run_params(settings: config.Settings) -> dict[str, str]:
    """The chosen recipe as `train.<key>`, the rest as `settings.<dotted key>`, without absolute paths."""
    rest = effective_settings(settings)
    del rest["recipes"]
    work = settings.work.resolved() | {"weights": config.public_path(settings.work.weights)}
    keyed = {f"train.{key}": value for key, value in config.flatten(work).items()}
    keyed |= {f"settings.{key}": value for key, value in config.flatten(rest).items()}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in keyed.items()}


def run_tags(
    settings: config.Settings,
    inputs: Mapping[str, Any],
    hardware: Mapping[str, Any],
    backend: "Backend",
    accelerator: Mapping[str, Any],
    system_state: Mapping[str, Any],
    fallback: list[str],
) -> dict[str, str]:
    """The run's tags, without those whose fact is not known. `accelerator`: the backend's facts, and `threads`, the
    number that torch uses on the CPU."""
    tags = {
        "hardware": accelerator["name"],
        "hardware.model": hardware.get("model"),
        "hardware.memory_gib": accelerator.get("memory_gib"),
        "hardware.cpu": hardware.get("cpu"),
        "hardware.cores": hardware.get("cores"),
        "hardware.usable_cores": hardware.get("usable_cores", hardware.get("logical_cores")),
        "hardware.memory_limit_gib": hardware.get("memory_limit_gib"),
        "hardware.gpu_cores": accelerator.get("gpu_cores"),
        "hardware.power_limit_watts": accelerator.get("power_limit_watts"),
        "machine": hardware["machine"],
        "label": settings.label,
        "device": f"{backend.kind}:{backend.index}" if backend.index else backend.kind,
        "backend": backend.name,
        "software.os": hardware.get("os"),
        "software.torch": hardware.get("torch"),
        "software.threads": accelerator.get("threads"),
        "software.execution": config.EXECUTION_VERSION,
        "software.driver": accelerator.get("driver"),
        "recipe": settings.recipe,
        "precision": settings.work.precision,
        "dataset": inputs["data"]["source"],
        "weights": inputs["weights"]["used"],
        "workload": config.workload(settings.work, inputs),
        "fallback": " ".join(fallback) or None,
        "power_source": system_state.get("power_source"),
    }
    return {key: str(value) for key, value in tags.items() if value is not None}


def run_warnings(
    settings: config.Settings,
    inputs: Mapping[str, Any],
    run_tags: Mapping[str, str],
    unused_gpu: str | None,
    schedule_overridden: bool,
) -> list[str]:
    """What a reader must know before believing the run's metrics, a sentence each."""
    data, weights = inputs["data"], inputs["weights"]
    left_out = ", ".join(f"{count:,} {kind}" for kind, count in data.get("left_out", {}).items())
    warnings = {
        f"DEMO: generated pictures in place of CIFAR-10 ({data['reason']})": "data" in inputs["fallback"],
        f"DEMO: random weights in place of pretrained ones ({weights['reason']})": "weights" in inputs["fallback"],
        f"DEMO: trained on the CPU beside a GPU: {unused_gpu}": unused_gpu is not None,
        "operators that Metal lacks may have run on the CPU (PYTORCH_ENABLE_MPS_FALLBACK)": (
            run_tags["backend"] == "mps" and os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK") == "1"
        ),
        f"left out of the data: {left_out} (docs/data.md says what is read)": bool(left_out),
        "validated on the test split, on which the best epoch was chosen: its accuracy flatters": (
            settings.work.validation == "test"
        ),
        f"{settings.work.optimizer} overrides the schedule: train/lr is what the schedule said, train/lr_applied "
        "what was used": schedule_overridden,
    }
    return [sentence for sentence, applies in warnings.items() if applies]


def experiment_name(settings: config.Settings, run_tags: Mapping[str, str]) -> str:
    """The MLflow experiment of a run with these tags. A run with a fallback goes to the demo experiment."""
    return location.experiment_name(settings.tracking.experiment) + ("-demo" if "fallback" in run_tags else "")


def run_name(run_tags: Mapping[str, str]) -> str:
    """`<hardware> · <recipe> · <precision>`, then ` · 2/5` for a repeat or ` × 5` for the parent run of repeats. A run
    with a fallback begins with `DEMO · `."""
    name = " · ".join((run_tags["hardware"], run_tags["recipe"], run_tags["precision"]))
    if "repeat" in run_tags:
        name += f" · {run_tags['repeat']}/{run_tags['repeats']}"
    elif "repeats" in run_tags:
        name += f" × {run_tags['repeats']}"
    return f"DEMO · {name}" if "fallback" in run_tags else name


def dataset_inputs(inputs: Mapping[str, Any], counts: Mapping[str, int], seed: int) -> list[dict[str, str]]:
    """Each split as an MLflow dataset: its name, digest, source, context and profile. `counts`: images by split."""
    data = inputs["data"]
    rows = []
    for split, count in counts.items():
        # The seed chooses what is in train and validation. MLflow's digests have at most 36 characters.
        identity = json.dumps([data["digest"], data["limit"], split, count, None if split == "test" else seed])
        rows.append(
            {
                "name": f"{data['source']}-{split}",
                "digest": hashlib.sha256(identity.encode()).hexdigest()[:32],
                "source": json.dumps({"source": data["source"], "digest": data["digest"]}),
                "context": {"train": "training", "validation": "validation", "test": "testing"}[split],
                "profile": json.dumps({"images": count, "classes": data["classes"]}, ensure_ascii=False),
            }
        )
    return rows


# --- repeats


def parent_fields(record: Record) -> dict[str, Any]:
    """What the parent run of a repeat begins with, as `store.start_run` takes it."""
    tags = {key: value for key, value in record["tags"].items() if key not in REPEAT_TAGS | LATE_TAGS}
    return {
        "name": run_name(tags),
        "experiment": record["experiment"],
        "started": record["started"],
        "params": {key: value for key, value in record["params"].items() if key != "settings.seed"},
        "tags": tags,
        "datasets": [],
    }


def final_metrics(record: Record) -> dict[str, float]:
    """All metrics of a training by name. Metrics of each epoch have the last one's value."""
    metrics: dict[str, float] = record["epochs"][-1]["figures"] | record["metrics"]
    return {key: value for key, value in metrics.items() if key != "epoch"}


def summarise_metrics(repeats: Sequence[Metrics]) -> dict[str, float]:
    """Of the metrics that all of two or more repeats have, the median under the same name and the sample standard
    deviation as `std/<name>`."""
    columns = _shared_columns(repeats)
    return {
        **{key: median(values) for key, values in columns.items()},
        **{f"std/{key}": stdev(values) for key, values in columns.items()},
    }


def median_epochs(repeats: Sequence[Record]) -> list[dict[str, Any]]:
    """The epochs of the records of repeats as one course: the median of every figure that all of them have."""
    merged = []
    for epochs in zip(*(record["epochs"] for record in repeats), strict=False):
        columns = _shared_columns([epoch["figures"] for epoch in epochs])
        medians = {key: median(values) for key, values in columns.items()} | {"epoch": epochs[0]["figures"]["epoch"]}
        merged.append({"at": max(epoch["at"] for epoch in epochs), "figures": medians, "system": []})
    return merged


def _shared_columns(rows: Sequence[Metrics]) -> dict[str, list[float]]:
    """The values of every key that all rows have."""
    return {key: [row[key] for row in rows] for key in rows[0] if all(key in row for row in rows)}


def shared_tags(repeats: Sequence[Mapping[str, str | None]]) -> dict[str, str | None]:
    """The tags of the parent run, from all tags of each repeat: those that are equal, and the words of any repeat (see
    WORD_TAGS). Every other tag is None."""
    shared: dict[str, str | None] = {}
    for key in dict.fromkeys(key for tags in repeats for key in tags if key not in REPEAT_TAGS):
        values = [tags.get(key) for tags in repeats]
        if key.rpartition(".")[2] in WORD_TAGS:
            shared[key] = " ".join(dict.fromkeys(word for value in values for word in (value or "").split())) or None
        else:
            shared[key] = values[0] if len(set(values)) == 1 else None
    return shared


def write_summary(outputs: Path, stage: str, trained: Sequence[Record], repeats: Sequence[Metrics]) -> None:
    """Write the metrics of all repeats of `stage` to `repeats/figures.csv`, a row each. If there are several, write
    their summary over the first one's metrics.json."""
    folder = stage_folders(outputs)[stage]
    text = io.StringIO()
    names = ["repeat", "seed", *dict.fromkeys(key for metrics in repeats for key in metrics)]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for record, metrics in zip(trained, repeats, strict=True):
        writer.writerow({"repeat": repeat_number(record), "seed": record["params"]["settings.seed"], **metrics})
    files.write_text(folder / "repeats" / "figures.csv", text.getvalue())
    if len(repeats) > 1:
        files.write_json(folder / "metrics.json", summarise_metrics(repeats))
