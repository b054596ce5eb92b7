"""What a training leaves: a record that says in plain JSON all that its run in MLflow shows.

`train` writes `record.json`: `id`, `name`, `experiment`, `started`, `ended` (milliseconds since 1970), `params`,
`tags`, `datasets`, `epochs` (each `at`, `figures`, `system`), `metrics`, `warnings`, `facts`, `hardware`. `evaluate`
writes its own `record.json`: `id` (the training's), `metrics`, `tags`, `datasets`, `ended`; `sustain` likewise: `id`,
`metrics`, `tags`, `series` (the courses of the steps, by metric), `warnings`, `ended`.

A repeat is a training of its own, in a process of its own. Tags say which: `repeats.id`, which all repeats of a set
share, `repeat`, counted from 1, `repeats`, how many are planned, and `repeat.pause_seconds`, the time since the
previous one ended.
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

STAGES = ("train", "evaluate", "sustain")
"""Those that leave a record."""

KNOWN_LATE = frozenset({"data.placement", "energy.source", "taints", "behavior"})
"""Tags that a training gets by its end."""

OF_ONE_REPEAT = frozenset({"repeat", "repeat.pause_seconds"})
"""Tags that say which of the repeats it is; the run above the repeats has none of them."""

WORDS = frozenset({"taints", "behavior"})
"""Tags that hold words (with a prefix such as `sustained.` too): above repeats stand the words of any of them."""

DESCRIPTION_LENGTH = 8000
"""In characters: MLflow's limit of a tag, which a description is."""


def stage_folders(outputs: Path, repeat: int = 1) -> dict[str, Path]:
    """Where each stage leaves the files of a repeat in `outputs`, by stage: of the first one, where those of a single
    training are."""
    own = Path() if repeat == 1 else Path("repeats", str(repeat))
    return {stage: outputs / stage / own for stage in STAGES}


def repeat_number(record: Record) -> int:
    """Which repeat it is, counted from 1; a single training is the first."""
    return int(record["tags"].get("repeat", 1))


def planned_repeats(outputs: Path) -> int:
    """How many repeats the training in `outputs` was planned to have; 1 for a single one, and where there is none."""
    first = stage_folders(outputs)["train"] / "record.json"
    return int(files.read_json(first)["tags"].get("repeats", 1)) if first.exists() else 1


def training_records(outputs: Path) -> list[dict[str, Any]]:
    """The records that `train` left in `outputs`, one for each repeat. Raises StageError where one is missing."""
    repeats = range(1, planned_repeats(outputs) + 1)
    return [files.read_json(stage_folders(outputs, repeat)["train"] / "record.json") for repeat in repeats]


def present_records(outputs: Path) -> list[dict[str, Any]]:
    """As `trained`, of the repeats that are there."""
    paths = [
        stage_folders(outputs, repeat)["train"] / "record.json" for repeat in range(1, planned_repeats(outputs) + 1)
    ]
    return [files.read_json(path) for path in paths if path.exists()]


def load_inputs(settings: config.Settings, folder: Path) -> dict[str, Any]:
    """What `download` left in `folder`. Raises UsageError where it looked at other data or weights."""
    inputs: dict[str, Any] = files.read_json(folder / "inputs.json")
    for key, wanted, have in (
        ("data.source", settings.data.source, inputs["data"]["requested"]),
        ("data.limit", settings.data.limit, inputs["data"]["limit"]),
        ("model", settings.work.model, inputs["weights"]["model"]),
        ("weights", config.shareable(settings.work.weights), inputs["weights"]["requested"]),
    ):
        if wanted != have:
            raise UsageError(
                f"{key}: {json.dumps(wanted)} is not what `download` looked at ({json.dumps(have)}): "
                "run `python -m pipeline.download` with the same settings first"
            )
    return inputs


def effective_settings(settings: config.Settings) -> dict[str, Any]:
    """The settings as a run's own params.yaml: the chosen recipe alone, no absolute path."""
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
    """The chosen recipe as `train.<key>`, the rest as `settings.<dotted key>`; no absolute path."""
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
    conditions: Mapping[str, Any],
    fallback: list[str],
) -> dict[str, str]:
    """The run's tags; one whose fact is not known is left out. `accelerator`: the backend's facts, and `threads`, those
    that torch uses on the CPU."""
    known = {
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
        "power_source": conditions.get("power_source"),
    }
    return {key: str(value) for key, value in known.items() if value is not None}


def run_warnings(
    settings: config.Settings,
    inputs: Mapping[str, Any],
    own: Mapping[str, str],
    unused_gpu: str | None,
    schedule_overridden: bool,
) -> list[str]:
    """What a reader must know before believing the run's figures, a sentence each."""
    data, weights = inputs["data"], inputs["weights"]
    said = {
        f"DEMO: generated pictures in place of CIFAR-10 ({data['reason']})": "data" in inputs["fallback"],
        f"DEMO: random weights in place of pretrained ones ({weights['reason']})": "weights" in inputs["fallback"],
        f"DEMO: trained on the CPU beside a GPU: {unused_gpu}": unused_gpu is not None,
        "operators that Metal lacks may have run on the CPU (PYTORCH_ENABLE_MPS_FALLBACK)": (
            own["backend"] == "mps" and os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK") == "1"
        ),
        "validated on the test split, on which the best epoch was chosen: its accuracy flatters": (
            settings.work.validation == "test"
        ),
        f"{settings.work.optimizer} overrides the schedule: train/lr is what the schedule said, train/lr_applied "
        "what was used": schedule_overridden,
    }
    return [sentence for sentence, holds in said.items() if holds]


def experiment_name(settings: config.Settings, own: Mapping[str, str]) -> str:
    """The MLflow experiment of a run with the tags `own`: one with a fallback never stands among real ones."""
    return settings.tracking.experiment + ("-demo" if "fallback" in own else "")


def run_name(run_tags: Mapping[str, str]) -> str:
    """`<hardware> · <recipe> · <precision>`, announced as a demo where something in it is a fallback; with ` · 2/5`
    after it for a repeat, ` × 5` for the run above the repeats."""
    name = " · ".join((run_tags["hardware"], run_tags["recipe"], run_tags["precision"]))
    if "repeat" in run_tags:
        name += f" · {run_tags['repeat']}/{run_tags['repeats']}"
    elif "repeats" in run_tags:
        name += f" × {run_tags['repeats']}"
    return f"DEMO · {name}" if "fallback" in run_tags else name


def dataset_inputs(inputs: Mapping[str, Any], counts: Mapping[str, int], seed: int) -> list[dict[str, str]]:
    """Each split as MLflow takes a dataset: what it is for, where it is from, and a digest of its own."""
    data = inputs["data"]
    rows = []
    for split, count in counts.items():
        # A split of train is another one under another seed; MLflow's digests have at most 36 characters.
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


def describe_run(record: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The run for a person to read in the UI, in Markdown: machine, work, result, speed, warnings. `found`: the records
    of later stages, by stage."""
    evaluation, sustained = found.get("evaluate"), found.get("sustain")
    figures = record["metrics"]
    last = record["epochs"][-1]["figures"]
    result = (
        f"**Result** best validation accuracy {figures['best/val_accuracy']:.2%} in epoch {figures['best/epoch']:.0f}"
    )
    if evaluation is not None:
        result += f", **test accuracy {evaluation['metrics']['test/accuracy']:.2%}**"
    result += f"; {figures['time/total_seconds']:.2f} s in all"
    features = figures.get("speed/feature_images_per_second")
    if features:
        result += f"; the frozen network's features computed once at {features:,.0f} images/s"
    else:
        result += f"; last epoch {last['speed/train_images_per_second']:,.0f} images/s"
    lines = [*_work(record), result, "", f"**Machine's part** {record['facts']['verdict']}", "", *_sustained(sustained)]
    said = [*record["warnings"], *(sustained["warnings"] if sustained else [])]
    if said:
        lines += ["**Warnings**", "", *(f"- {warning}" for warning in said)]
    return "\n".join(lines).strip() + "\n"


def _work(record: Record) -> list[str]:
    """The machine and what it did, as lines of Markdown."""
    own, facts = record["tags"], record["facts"]
    hardware = [own["hardware"] + (f" with {own['hardware.memory_gib']} GiB" if "hardware.memory_gib" in own else "")]
    hardware += [
        own[key]
        for key in ("hardware.model", "hardware.cpu", "software.os")
        if own.get(key, own["hardware"]) != own["hardware"]
    ]
    epochs = len(record["epochs"])
    return [
        f"**Machine** {', '.join(hardware)}, torch {own['software.torch']}, on `{own['device']}`",
        "",
        f"**Work** `{own['recipe']}` (workload `{own['workload']}`): {facts['model']} with {own['weights']} weights, "
        f"{facts['trainable']:,} of {facts['parameters']:,} parameters trained on {facts['images']['train']:,} images "
        f"of {len(facts['classes'])} classes ({own['dataset']}) "
        f"for {epochs} epoch{'s' * (epochs != 1)}, {own['precision']}",
        "",
    ]


def _sustained(result: Record | None) -> list[str]:
    """The speeds that the machine keeps up, as lines of Markdown; none where they were not measured."""
    if result is None:
        return []
    figures, own = result["metrics"], result["tags"]
    said = [
        f"{step.title} {figures[speed]:,.1f} images/s ({own[score_steps.tag(step.name, 'precision')]}, "
        f"batch {figures[score_steps.metric(step.name, 'batch_size')]:.0f})"
        for step in score_steps.STEPS
        if (speed := score_steps.metric(step.name, "images_per_second")) in figures
    ]
    if "speed/sustained_images_per_second" in figures:  # of bundles before schema 3
        speed = figures["speed/sustained_images_per_second"]
        said.append(f"{speed:,.0f} images/s of the recipe finetune's step (workload `{own['sustained.workload']}`)")
    return [f"**Sustained** {'; '.join(said)}", ""] if said else []


# --- repeats


def parent_fields(record: Record) -> dict[str, Any]:
    """What the run above the repeats begins with, of the record of any of them, as `tracking.start` takes it."""
    own = {key: value for key, value in record["tags"].items() if key not in OF_ONE_REPEAT | KNOWN_LATE}
    return {
        "name": run_name(own),
        "experiment": record["experiment"],
        "started": record["started"],
        "params": {key: value for key, value in record["params"].items() if key != "settings.seed"},
        "tags": own,
        "datasets": [],
    }


def final_metrics(record: Record) -> dict[str, float]:
    """All figures of a training by their names, those by epoch as they were in the last one."""
    found: dict[str, float] = record["epochs"][-1]["figures"] | record["metrics"]
    return {key: value for key, value in found.items() if key != "epoch"}


def summarise_metrics(repeats: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The figures of at least two repeats as one: of those that all have, the median under the same name, and the
    sample standard deviation under `std/<name>`."""
    shared = [key for key in repeats[0] if all(key in each for each in repeats)]
    return {
        **{key: median(each[key] for each in repeats) for key in shared},
        **{f"std/{key}": stdev(each[key] for each in repeats) for key in shared},
    }


def write_summary(outputs: Path, stage: str, trained: Sequence[Record], repeats: Sequence[Mapping[str, float]]) -> None:
    """Writes what `stage` found of all repeats: their figures to `repeats/figures.csv`, a row each, and where there are
    several, their summary in place of the first one's metrics.json."""
    folder = stage_folders(outputs)[stage]
    text = io.StringIO()
    names = ["repeat", "seed", *dict.fromkeys(key for each in repeats for key in each)]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for record, found in zip(trained, repeats, strict=True):
        writer.writerow({"repeat": repeat_number(record), "seed": record["params"]["settings.seed"], **found})
    files.write_text(folder / "repeats" / "figures.csv", text.getvalue())
    if len(repeats) > 1:
        files.write_json(folder / "metrics.json", summarise_metrics(repeats))


def median_epochs(repeats: Sequence[Record]) -> list[dict[str, Any]]:
    """The epochs of the records of repeats as one course, each with the median of every figure that all have."""
    merged = []
    for epochs in zip(*(record["epochs"] for record in repeats), strict=False):
        every = [epoch["figures"] for epoch in epochs]
        shared = [key for key in every[0] if all(key in each for each in every)]
        medians = {key: median(each[key] for each in every) for key in shared} | {"epoch": every[0]["epoch"]}
        merged.append({"at": max(epoch["at"] for epoch in epochs), "figures": medians, "system": []})
    return merged


def shared_tags(repeats: Sequence[Mapping[str, str | None]]) -> dict[str, str | None]:
    """The tags that stand above repeats, of all tags of each: what all share, and the words of any (see WORDS); the
    rest None."""
    every = {key: value for each in repeats for key, value in each.items() if key not in OF_ONE_REPEAT}
    shared = {key: value if all(each.get(key) == value for each in repeats) else None for key, value in every.items()}
    for key in shared:
        if key.rpartition(".")[2] in WORDS:
            words = dict.fromkeys(word for each in repeats for word in (each.get(key) or "").split())
            shared[key] = " ".join(words) or None
    return shared


def describe_spread(repeats: Sequence[Mapping[str, float]], evaluations: Sequence[Mapping[str, float]]) -> str:
    """Time and accuracy of repeats in words, each as median and range; `evaluations`: their figures on test images,
    where there are any."""

    def said(values: Sequence[float], form: str, unit: str = "") -> str:
        return f"{median(values):{form}}{unit} ({min(values):{form}} to {max(values):{form}})"

    words = [f"{said([each['time/total_seconds'] for each in repeats], '.2f', ' s')} in all"]
    if evaluations:
        words.append(f"test accuracy {said([each['test/accuracy'] for each in evaluations], '.2%')}")
    words.append(f"best validation accuracy {said([each['best/val_accuracy'] for each in repeats], '.2%')}")
    return f"median and range of {len(repeats)}: {', '.join(words)}"


def describe_parent(repeats: Sequence[Mapping[str, Record]]) -> str:
    """The run above the repeats for a person to read, in Markdown. `repeats`: of each its records by stage, in order.
    What MLflow has no room for is left out at the end, which says so."""
    trainings = [each["train"] for each in repeats]
    evaluations = [each["evaluate"]["metrics"] for each in repeats if "evaluate" in each]
    warned: dict[str, list[str]] = {}
    for number, each in enumerate(repeats, 1):
        for warning in [sentence for stage in each.values() for sentence in stage.get("warnings", [])]:
            warned.setdefault(warning, []).append(str(number))
    sustained = [each["sustain"] for each in repeats if "sustain" in each]
    if len(sustained) > 1:
        sustained = [{**sustained[0], "metrics": summarise_metrics([each["metrics"] for each in sustained])}]
    lines = [
        *_work(trainings[0]),
        f"**Repeats** {describe_spread([each['metrics'] for each in trainings], evaluations)}",
        "",
        *_sustained(sustained[0] if sustained else None),
        *_table(repeats),
    ]
    if warned:
        lines += ["", "**Warnings**", ""]
        lines += [f"- {warning} (repeat {', '.join(numbers)})" for warning, numbers in warned.items()]
    return _fitting(lines)


def _table(repeats: Sequence[Mapping[str, Record]]) -> list[str]:
    """A row for each repeat, as lines of Markdown: its seed, accuracies and seconds, and the images/s of each sustained
    step that was measured."""
    speeds = {step.title: score_steps.metric(step.name, "images_per_second") for step in score_steps.STEPS}
    figures = [{**each["train"]["metrics"], **_later(each, "evaluate"), **_later(each, "sustain")} for each in repeats]
    forms = {
        "Test accuracy": ("test/accuracy", ".2%"),
        "Best validation accuracy": ("best/val_accuracy", ".2%"),
        "Seconds in all": ("time/total_seconds", ".2f"),
        **{title: (key, ",.1f") for title, key in speeds.items() if any(key in each for each in figures)},
    }
    rows = [["Repeat", "Seed", *forms], ["---"] * (2 + len(forms))]
    for number, (each, own) in enumerate(zip(repeats, figures, strict=True), 1):
        seed = each["train"]["params"].get("settings.seed", "")
        rows.append([str(number), seed, *(f"{own[key]:{form}}" if key in own else "" for key, form in forms.values())])
    return [f"| {' | '.join(row)} |" for row in rows]


def _later(repeat: Mapping[str, Record], stage: str) -> Mapping[str, float]:
    """The figures of a later stage, where there are any."""
    metrics: Mapping[str, float] = repeat[stage]["metrics"] if stage in repeat else {}
    return metrics


def _fitting(lines: Sequence[str]) -> str:
    """As many of the lines as MLflow takes."""
    rest = "\n\nMore in the repeats' own runs.\n"
    text = "\n".join(lines) + "\n"
    if len(text) <= DESCRIPTION_LENGTH:
        return text
    return text[: DESCRIPTION_LENGTH - len(rest)].rpartition("\n")[0] + rest
