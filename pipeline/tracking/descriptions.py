"""Descriptions of runs in Markdown, for a person to read in MLflow's UI."""

from collections.abc import Mapping, Sequence
from statistics import median

from pipeline.profiling import score_steps
from pipeline.tracking import records
from pipeline.tracking.records import Metrics, Record

MAX_LENGTH = 8000
"""In characters: MLflow's limit of a tag. A description is one."""


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
        sustained = [
            {**sustained[0], "metrics": records.summarise_metrics([result["metrics"] for result in sustained])}
        ]
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
    if len(text) <= MAX_LENGTH:
        return text
    ending = "\n\nMore in the repeats' own runs.\n"
    return text[: MAX_LENGTH - len(ending)].rpartition("\n")[0] + ending


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
