"""Measure the score: repeat fixed training steps, the same for every recipe, until the machine is warm."""

from pipeline import repeats

if __name__ == "__main__":
    repeats.start_stage(__doc__, "sustain")

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline import config, devices, files, terminal
from pipeline.profiling import score_steps, system_state
from pipeline.profiling.score_steps import Step
from pipeline.tracking import pending, records
from pipeline.training import sustained

RunStep = Callable[[Step, str, str, float], sustained.StepRun | None]
"""See `sustained.run_step`."""


def run(
    settings: config.Settings,
    folder: Path,
    number: int = 1,
    steps: Sequence[Step] = score_steps.STEPS,
    run_step: RunStep = sustained.run_step,
    largest_batch: Callable[[Step, str], int | None] = sustained.largest_batch,
) -> dict[str, Any]:
    """Measure `steps` for `sustain_seconds` each, as part of the run in which repeat `number` (from 1) was trained.

    Writes `folder/sustain` and returns its record. For 0 seconds it measures nothing and leaves the run as it is.
    """
    folders = records.stage_folders(folder, number)
    record = files.read_json(folders["train"] / "record.json")
    result: dict[str, Any] = {"id": record["id"], "metrics": {}, "tags": {}, "series": {}, "warnings": []}
    if settings.sustain_seconds:
        started = records.now()
        result |= _measure(settings, steps, run_step)
        result["tags"]["sustained.started"] = str(started)
    result["ended"] = records.now()
    repeats.clear_outputs(folder, "sustain", number, records.planned_repeats(folder))
    _write(result, record, settings, folders)
    if settings.sustain_seconds and settings.largest_batch:
        # Search only after everything else is written: the system may kill the process.
        largest = largest_batch(steps[0], settings.device)
        if largest is not None:
            terminal.say(f"sustain  {steps[0].title}: the largest batch that fits is {largest:,}")
            result["metrics"]["memory/largest_batch_size"] = largest
            _write(result, record, settings, folders)
    return result


def _measure(settings: config.Settings, steps: Sequence[Step], run_step: RunStep) -> dict[str, Any]:
    """Measure the steps. Returns metrics, tags, series and warnings. Equal steps run once and share figures."""
    backend = devices.select(settings.device)
    best, gpu = backend.best_precision(), backend.gpu_uuid()
    before = system_state.sample(gpu)  # while the device is idle
    metrics: dict[str, float] = {}
    tags: dict[str, str | None] = {}
    series: dict[str, list[float]] = {}
    taints: dict[str, str] = {}
    behavior: dict[str, list[str]] = {}
    warnings: list[str] = []
    step_runs: dict[tuple[str, int, int, str], sustained.StepRun | None] = {}
    for step in steps:
        precision = best if step.best_precision else "fp32"
        work = (step.model, step.image_size, step.batch_size, precision)
        if work not in step_runs:
            step_runs[work] = step_run = run_step(step, precision, settings.device, settings.sustain_seconds)
            after = system_state.sample(gpu)
            taints = system_state.taints(before, after) | taints
            seconds = [piece.seconds for piece in step_run.slices] if step_run else []
            for word, sentence in system_state.behavior(before, after, seconds).items():
                behavior.setdefault(word, []).append(f"{step.title}: {sentence}")
        step_run = step_runs[work]
        if step_run is None:
            warnings.append(f"{step.title} was not measured: not even a batch of one image fits the memory")
            continue
        figures = step_run.figures()
        metrics |= {score_steps.metric(step.name, figure): value for figure, value in figures.items()}
        series[score_steps.metric(step.name, "course")] = [piece.speed for piece in step_run.slices]
        workload = score_steps.workload(step, step_run.batch_size, settings.sustain_seconds)
        tags[score_steps.tag(step.name, "workload")] = workload
        tags[score_steps.tag(step.name, "precision")] = precision
        _announce(step, precision, figures)
    tags |= {
        "sustained.taints": " ".join(taints) or None,
        "sustained.behavior": " ".join(behavior) or None,
        "sustained.energy_source": " ".join({run.energy[0] for run in step_runs.values() if run and run.energy})
        or None,
        "sustained.threads": str(torch.get_num_threads()),
        "sustained.execution": str(score_steps.VERSION),
    }
    warnings += [f"while steps were repeated, {sentence}" for sentence in taints.values()]
    warnings += itertools.chain.from_iterable(behavior.values())
    for sentence in warnings:
        terminal.say(f"note     {sentence}")
    return {"metrics": metrics, "tags": tags, "series": series, "warnings": warnings}


def _write(
    result: Mapping[str, Any], record: Mapping[str, Any], settings: config.Settings, folders: Mapping[str, Path]
) -> None:
    """Write the record, and leave it for the store. A second call replaces the first one's."""
    files.write_json(folders["sustain"] / "metrics.json", result["metrics"])
    files.write_json(folders["sustain"] / "record.json", result)
    if result["metrics"] or result["warnings"]:
        pending.submit(record, folders, records.experiment_name(settings, record["tags"]))


def _announce(step: Step, precision: str, figures: Mapping[str, float]) -> None:
    power = f", {figures['watts']:,.0f} W" if "watts" in figures else ""
    terminal.say(
        f"sustain  {step.title} ({precision}, batch {figures['batch_size']:.0f}): "
        f"{figures['images_per_second']:,.1f} images/s in the last third of {figures['seconds']:.0f} s, "
        f"{figures['first_third_images_per_second']:,.1f} in the first{power}"
    )


if __name__ == "__main__":
    repeats.run_stage(run, __doc__)
