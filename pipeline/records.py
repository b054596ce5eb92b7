"""What a training leaves: a record that says in plain JSON all that its run in MLflow shows.

`train` writes `record.json`: `id`, `name`, `experiment`, `started`, `ended` (milliseconds since 1970), `params`,
`tags`, `datasets`, `epochs` (each `at`, `figures`, `system`), `metrics`, `warnings`, `facts`. `evaluate` writes its
own `record.json`: `id` (the training's), `metrics`, `ended`.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pipeline import config


def params(settings: config.Settings) -> dict[str, str]:
    """The chosen recipe as `train.<key>`, the rest as `settings.<dotted key>`; no absolute path."""
    rest = {
        "recipe": settings.recipe,
        "device": settings.device,
        "seed": settings.seed,
        "label": settings.label,
        "repeats": settings.repeats,
        "data": vars(settings.data) | {"path": shareable(settings.data.path)},
        "tracking": vars(settings.tracking),
    }
    work = settings.work.resolved()
    work["weights"] = shareable(work["weights"])
    keyed = {f"train.{key}": value for key, value in config.flat(work).items()}
    keyed |= {f"settings.{key}": value for key, value in config.flat(rest).items()}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in keyed.items()}


def shareable(path: str) -> str:
    """A path as it may leave the machine: only the last part of one from outside the project."""
    inside = not (path.startswith(("/", "~", "\\")) or path[1:2] == ":" or ".." in path)
    return path if inside else path.replace("\\", "/").rstrip("/").split("/")[-1]


def tags(
    settings: config.Settings,
    inputs: Mapping[str, Any],
    hardware: Mapping[str, Any],
    device: str,
    backend: str,
    accelerator: Mapping[str, Any],
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
        "device": device,
        "backend": backend,
        "software.os": hardware.get("os"),
        "software.torch": hardware.get("torch"),
        "software.driver": accelerator.get("driver"),
        "recipe": settings.recipe,
        "precision": settings.work.precision,
        "dataset": inputs["data"]["source"],
        "weights": inputs["weights"]["used"],
        "workload": config.workload(settings.work, inputs),
        "fallback": " ".join(fallback) or None,
        "power_source": hardware.get("power_source"),
    }
    return {key: str(value) for key, value in known.items() if value is not None}


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
        rows.append({
            "name": f"{data['source']}-{split}",
            "digest": hashlib.sha256(identity.encode()).hexdigest()[:32],
            "source": json.dumps({"source": data["source"], "digest": data["digest"]}),
            "context": {"train": "training", "validation": "validation", "test": "testing"}[split],
            "profile": json.dumps({"images": count, "classes": len(data["classes"])}),
        })
    return rows


def description(record: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> str:
    """The run for a person to read in the UI, in Markdown: machine, work, result, warnings."""
    own, facts, figures = record["tags"], record["facts"], record["metrics"]
    last = record["epochs"][-1]["figures"]
    memory = f", {own['hardware.memory_gib']} GiB" if "hardware.memory_gib" in own else ""
    lines = [
        f"**Machine** {own['hardware']}{memory} (`{own['device']}`) in {own.get('hardware.model', 'a machine')}, "
        f"{own.get('hardware.cpu', 'unknown CPU')}, {own.get('software.os', '')}, torch {own.get('software.torch')}",
        "",
        f"**Work** `{own['recipe']}` (workload `{own['workload']}`): {facts['model']} with {own['weights']} weights, "
        f"{facts['trainable']:,} of {facts['parameters']:,} parameters trained on {facts['train_images']:,} images of "
        f"{len(facts['classes'])} classes ({own['dataset']}) for {len(record['epochs'])} epochs, {own['precision']}",
        "",
    ]
    result = f"**Result** best validation accuracy {figures['best/val_accuracy']:.2%} in epoch {figures['best/epoch']:.0f}"
    if evaluation is not None:
        result += f", **test accuracy {evaluation['metrics']['test/accuracy']:.2%}**"
    result += f"; {figures['time/total_seconds']:.2f} s in all"
    if "speed/feature_images_per_second" in figures:
        result += (
            f"; the frozen network's features computed once at {figures['speed/feature_images_per_second']:,.0f} images/s"
        )
    else:
        result += f"; last epoch {last['speed/train_images_per_second']:,.0f} images/s"
    lines += [result, ""]
    if record["warnings"]:
        lines += ["**Warnings**", "", *(f"- {warning}" for warning in record["warnings"])]
    return "\n".join(lines).strip() + "\n"
