"""What a training leaves: a record that says in plain JSON all that its run in MLflow shows.

`train` writes `record.json`: `id`, `name`, `experiment`, `started`, `ended` (milliseconds since 1970), `params`,
`tags`, `datasets`, `epochs` (each `at`, `figures`, `system`), `metrics`, `warnings`, `facts`, `hardware`. `evaluate`
writes its own `record.json`: `id` (the training's), `metrics`, `tags`, `datasets`, `ended`; `sustain` likewise: `id`,
`metrics`, `tags`, `series` (images a second by the second), `warnings`, `ended`.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import config, files
from pipeline.errors import UsageError

if TYPE_CHECKING:  # torch takes seconds to import, and `compare` does without it
    from pipeline.backends import Backend


def inputs_for(settings: config.Settings, folder: Path) -> dict[str, Any]:
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


def effective(settings: config.Settings) -> dict[str, Any]:
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
        "sustain_seconds": settings.sustain_seconds,
        "largest_batch": settings.largest_batch,
        "data": vars(settings.data) | {"path": config.shareable(settings.data.path)},
        "energy": vars(settings.energy),
        "compare": vars(settings.compare) | {"prices": config.shareable(settings.compare.prices)},
        "tracking": vars(settings.tracking),
        "recipes": {settings.recipe: work | {"weights": config.shareable(work["weights"])} | options},
    }


def params(settings: config.Settings) -> dict[str, str]:
    """The chosen recipe as `train.<key>`, the rest as `settings.<dotted key>`; no absolute path."""
    rest = effective(settings)
    del rest["recipes"]
    work = settings.work.resolved() | {"weights": config.shareable(settings.work.weights)}
    keyed = {f"train.{key}": value for key, value in config.flat(work).items()}
    keyed |= {f"settings.{key}": value for key, value in config.flat(rest).items()}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in keyed.items()}


def tags(
    settings: config.Settings,
    inputs: Mapping[str, Any],
    hardware: Mapping[str, Any],
    backend: "Backend",
    accelerator: Mapping[str, Any],
    conditions: Mapping[str, Any],
    fallback: list[str],
) -> dict[str, str]:
    """The run's tags; one whose fact is not known is left out."""
    known = {
        "hardware": accelerator["name"],
        "hardware.model": hardware.get("model"),
        "hardware.memory_gib": accelerator.get("memory_gib"),
        "hardware.cpu": hardware.get("cpu"),
        "hardware.cores": hardware.get("cores"),
        "hardware.gpu_cores": accelerator.get("gpu_cores"),
        "hardware.power_limit_watts": accelerator.get("power_limit_watts"),
        "machine": hardware["machine"],
        "label": settings.label,
        "device": f"{backend.kind}:{backend.index}" if backend.index else backend.kind,
        "backend": backend.name,
        "software.os": hardware.get("os"),
        "software.torch": hardware.get("torch"),
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


def warnings(
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


def experiment(settings: config.Settings, own: Mapping[str, str]) -> str:
    """The MLflow experiment of a run with the tags `own`: one with a fallback never stands among real ones."""
    return settings.tracking.experiment + ("-demo" if "fallback" in own else "")


def run_name(run_tags: Mapping[str, str]) -> str:
    """`<hardware> · <recipe> · <precision>`, announced as a demo where something in it is a fallback."""
    name = " · ".join((run_tags["hardware"], run_tags["recipe"], run_tags["precision"]))
    return f"DEMO · {name}" if "fallback" in run_tags else name


def datasets(inputs: Mapping[str, Any], counts: Mapping[str, int], seed: int) -> list[dict[str, str]]:
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


def description(record: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The run for a person to read in the UI, in Markdown: machine, work, result, speed, warnings. `found`: the records
    of later stages, by stage."""
    evaluation, sustained = found.get("evaluate"), found.get("sustain")
    own, facts, figures = record["tags"], record["facts"], record["metrics"]
    last = record["epochs"][-1]["figures"]
    hardware = [own["hardware"] + (f" with {own['hardware.memory_gib']} GiB" if "hardware.memory_gib" in own else "")]
    hardware += [
        own[key]
        for key in ("hardware.model", "hardware.cpu", "software.os")
        if own.get(key, own["hardware"]) != own["hardware"]
    ]
    epochs = len(record["epochs"])
    lines = [
        f"**Machine** {', '.join(hardware)}, torch {own['software.torch']}, on `{own['device']}`",
        "",
        f"**Work** `{own['recipe']}` (workload `{own['workload']}`): {facts['model']} with {own['weights']} weights, "
        f"{facts['trainable']:,} of {facts['parameters']:,} parameters trained on {facts['images']['train']:,} images "
        f"of {len(facts['classes'])} classes ({own['dataset']}) "
        f"for {epochs} epoch{'s' * (epochs != 1)}, {own['precision']}",
        "",
    ]
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
    lines += [result, "", f"**Machine's part** {facts['verdict']}", ""]
    speed = sustained["metrics"].get("speed/sustained_images_per_second") if sustained else None
    if sustained and speed:
        kept = sustained["metrics"].get("speed/sustained_last_to_first")
        lines += [
            f"**Sustained** {speed:,.0f} images/s of finetune's step (workload "
            f"`{sustained['tags']['sustained.workload']}`) for {sustained['metrics']['time/sustain_seconds']:.0f} s"
            + (f", the last third of them at {kept:.1%} of the first's speed" if kept else ""),
            "",
        ]
    said = [*record["warnings"], *(sustained["warnings"] if sustained else [])]
    if said:
        lines += ["**Warnings**", "", *(f"- {warning}" for warning in said)]
    return "\n".join(lines).strip() + "\n"
