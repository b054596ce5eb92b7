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
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median, stdev
from typing import TYPE_CHECKING, Any

from pipeline import config, files
from pipeline.errors import UsageError
from pipeline.profiling import score_steps

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

DESCRIPTION_LENGTH = 8000
"""In characters: MLflow's limit of a tag. A description is one."""


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
        ("weights", config.shareable(settings.work.weights), inputs["weights"]["requested"]),
    ):
        if wanted != present:
            raise UsageError(
                f"{key}: {json.dumps(wanted)} is not what `download` looked at ({json.dumps(present)}): "
                "run `python -m pipeline.download` with the same settings first"
            )
    return inputs


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
        "sustain_seconds": settings.sustain_seconds,
        "largest_batch": settings.largest_batch,
        "data": vars(settings.data) | {"path": config.shareable(settings.data.path)},
        "energy": vars(settings.energy),
        "compare": vars(settings.compare) | {"prices": config.shareable(settings.compare.prices)},
        "tracking": vars(settings.tracking),
        "recipes": {settings.recipe: work | {"weights": config.shareable(work["weights"])} | options},
    }


def run_params(settings: config.Settings) -> dict[str, str]:
    """The chosen recipe as `train.<key>`, the rest as `settings.<dotted key>`, without absolute paths."""
    rest = effective_settings(settings)
    del rest["recipes"]
    work = settings.work.resolved() | {"weights": config.shareable(settings.work.weights)}
    keyed = {f"train.{key}": value for key, value in config.flat(work).items()}
    keyed |= {f"settings.{key}": value for key, value in config.flat(rest).items()}
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
    warnings = {
        f"DEMO: generated pictures in place of CIFAR-10 ({data['reason']})": "data" in inputs["fallback"],
        f"DEMO: random weights in place of pretrained ones ({weights['reason']})": "weights" in inputs["fallback"],
        f"DEMO: trained on the CPU beside a GPU: {unused_gpu}": unused_gpu is not None,
        "operators that Metal lacks may have run on the CPU (PYTORCH_ENABLE_MPS_FALLBACK)": (
            run_tags["backend"] == "mps" and os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK") == "1"
        ),
        "validated on the test split, on which the best epoch was chosen: its accuracy flatters": (
            settings.work.validation == "test"
        ),
        f"{settings.work.optimizer} overrides the schedule: train/lr is what the schedule said, train/lr_applied "
        "what was used": schedule_overridden,
    }
    return [sentence for sentence, applies in warnings.items() if applies]


def experiment_name(settings: config.Settings, run_tags: Mapping[str, str]) -> str:
    """The MLflow experiment of a run with these tags. A run with a fallback goes to the demo experiment."""
    return settings.tracking.experiment + ("-demo" if "fallback" in run_tags else "")


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


# --- descriptions in Markdown, for a person to read in the UI


def describe_run(record: Record, results: Mapping[str, Record]) -> str:
    """The machine, work, result, speed and warnings of a training. `results`: the records of later stages, by stage."""
    metrics, sustained = record["metrics"], results.get("sustain")
    result = (
        f"**Result** best validation accuracy {metrics['best/val_accuracy']:.2%} in epoch {metrics['best/epoch']:.0f}"
    )
    if "evaluate" in results:
        result += f", **test accuracy {results['evaluate']['metrics']['test/accuracy']:.2%}**"
    result += f"; {metrics['time/total_seconds']:.2f} s in all"
    if feature_speed := metrics.get("speed/feature_images_per_second"):
        result += f"; the frozen network's features computed once at {feature_speed:,.0f} images/s"
    else:
        speed = record["epochs"][-1]["figures"]["speed/train_images_per_second"]
        result += f"; last epoch {speed:,.0f} images/s"
    lines = [*_describe_work(record), result, "", f"**Machine's part** {record['facts']['verdict']}", ""]
    lines += _describe_sustained(sustained)
    warnings = [*record["warnings"], *(sustained["warnings"] if sustained else [])]
    if warnings:
        lines += ["**Warnings**", "", *(f"- {warning}" for warning in warnings)]
    return "\n".join(lines).strip() + "\n"


def describe_parent(repeats: Sequence[Mapping[str, Record]]) -> str:
    """The parent run of repeats, given the records of each by stage. Cut off where MLflow has no more room."""
    trainings = [repeat["train"] for repeat in repeats]
    evaluations = [repeat["evaluate"]["metrics"] for repeat in repeats if "evaluate" in repeat]
    sustained = [repeat["sustain"] for repeat in repeats if "sustain" in repeat]
    if len(sustained) > 1:
        sustained = [{**sustained[0], "metrics": summarise_metrics([result["metrics"] for result in sustained])}]
    lines = [
        *_describe_work(trainings[0]),
        f"**Repeats** {describe_spread([training['metrics'] for training in trainings], evaluations)}",
        "",
        *_describe_sustained(sustained[0] if sustained else None),
        *_repeats_table(repeats),
    ]
    warned: dict[str, list[str]] = {}
    for number, repeat in enumerate(repeats, 1):
        for warning in [sentence for result in repeat.values() for sentence in result.get("warnings", [])]:
            warned.setdefault(warning, []).append(str(number))
    if warned:
        lines += ["", "**Warnings**", ""]
        lines += [f"- {warning} (repeat {', '.join(numbers)})" for warning, numbers in warned.items()]
    text = "\n".join(lines) + "\n"
    if len(text) <= DESCRIPTION_LENGTH:
        return text
    ending = "\n\nMore in the repeats' own runs.\n"
    return text[: DESCRIPTION_LENGTH - len(ending)].rpartition("\n")[0] + ending


def describe_spread(repeats: Sequence[Metrics], evaluations: Sequence[Metrics]) -> str:
    """Time and accuracies of repeats in words, each as median and range. `evaluations`: their metrics on test images,
    if any."""

    def spread(rows: Sequence[Metrics], key: str, form: str, unit: str = "") -> str:
        values = [row[key] for row in rows]
        return f"{median(values):{form}}{unit} ({min(values):{form}} to {max(values):{form}})"

    words = [f"{spread(repeats, 'time/total_seconds', '.2f', ' s')} in all"]
    if evaluations:
        words.append(f"test accuracy {spread(evaluations, 'test/accuracy', '.2%')}")
    words.append(f"best validation accuracy {spread(repeats, 'best/val_accuracy', '.2%')}")
    return f"median and range of {len(repeats)}: {', '.join(words)}"


def _describe_work(record: Record) -> list[str]:
    """The machine and what it did, as lines."""
    tags, facts = record["tags"], record["facts"]
    hardware = [
        tags["hardware"] + (f" with {tags['hardware.memory_gib']} GiB" if "hardware.memory_gib" in tags else "")
    ]
    for key in ("hardware.model", "hardware.cpu", "software.os"):
        if tags.get(key, tags["hardware"]) != tags["hardware"]:
            hardware.append(tags[key])
    epochs = len(record["epochs"])
    return [
        f"**Machine** {', '.join(hardware)}, torch {tags['software.torch']}, on `{tags['device']}`",
        "",
        f"**Work** `{tags['recipe']}` (workload `{tags['workload']}`): {facts['model']} with {tags['weights']} "
        f"weights, {facts['trainable']:,} of {facts['parameters']:,} parameters trained on "
        f"{facts['images']['train']:,} images "
        f"of {len(facts['classes'])} classes ({tags['dataset']}) "
        f"for {epochs} epoch{'s' * (epochs != 1)}, {tags['precision']}",
        "",
    ]


def _describe_sustained(result: Record | None) -> list[str]:
    """The speeds of the sustained steps, as lines. None if no step was measured."""
    if result is None:
        return []
    metrics, tags = result["metrics"], result["tags"]
    speeds = [
        f"{step.title} {metrics[speed]:,.1f} images/s ({tags[score_steps.tag(step.name, 'precision')]}, "
        f"batch {metrics[score_steps.metric(step.name, 'batch_size')]:.0f})"
        for step in score_steps.STEPS
        if (speed := score_steps.metric(step.name, "images_per_second")) in metrics
    ]
    if "speed/sustained_images_per_second" in metrics:  # of bundles before schema 3
        speed = metrics["speed/sustained_images_per_second"]
        speeds.append(f"{speed:,.0f} images/s of the recipe finetune's step (workload `{tags['sustained.workload']}`)")
    return [f"**Sustained** {'; '.join(speeds)}", ""] if speeds else []


def _repeats_table(repeats: Sequence[Mapping[str, Record]]) -> list[str]:
    """A row for each repeat, as lines: seed, accuracies, seconds, and the speed of each sustained step."""
    metrics = [
        {key: value for result in repeat.values() for key, value in result["metrics"].items()} for repeat in repeats
    ]
    speeds = {step.title: score_steps.metric(step.name, "images_per_second") for step in score_steps.STEPS}
    columns = {
        "Test accuracy": ("test/accuracy", ".2%"),
        "Best validation accuracy": ("best/val_accuracy", ".2%"),
        "Seconds in all": ("time/total_seconds", ".2f"),
        **{title: (key, ",.1f") for title, key in speeds.items() if any(key in row for row in metrics)},
    }
    lines = [["Repeat", "Seed", *columns], ["---"] * (2 + len(columns))]
    for number, (repeat, row) in enumerate(zip(repeats, metrics, strict=True), 1):
        seed = repeat["train"]["params"].get("settings.seed", "")
        cells = [f"{row[key]:{form}}" if key in row else "" for key, form in columns.values()]
        lines.append([str(number), seed, *cells])
    return [f"| {' | '.join(line)} |" for line in lines]
