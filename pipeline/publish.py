"""Puts what a training left into MLflow: right after it, or again from DVC's cache, by the same code."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline import files, records, terminal, tracking


def training(handle: tracking.Handle, record: Mapping[str, Any], folder: Path) -> None:
    """Logs all but the epochs of a training that left `folder`: figures, pictures, checkpoint, model."""
    from pipeline import model  # torch takes seconds to import, and only what is missing needs it

    tracking.log_figures(handle, record["metrics"], record["ended"])
    tracking.set_tags(handle, record["tags"])  # some are known at the end alone
    tracking.log_files(
        handle,
        {
            "hardware.json": folder / "hardware.json",
            "params.yaml": folder / "params.yaml",
            "checkpoints/best.safetensors": folder / "best.safetensors",
        }
        | {f"plots/{path.name}": path for path in sorted((folder / "plots").iterdir())},
    )
    classifier, facts = model.load_checkpoint(folder / "best.safetensors")
    requirements = [f"{package}=={version(package).split('+')[0]}" for package in ("mlflow", "torch", "numpy")]
    tracking.log_model(handle, classifier, facts.image_size, len(facts.classes), requirements)
    _describe(handle, record, {})


def evaluation(handle: tracking.Handle, result: Mapping[str, Any], folder: Path) -> None:
    """Logs the evaluation `result` of a training, which left `folder`."""
    tracking.log_figures(handle, result["metrics"], result["ended"])
    tracking.log_datasets(handle, result["datasets"])
    tracking.log_files(handle, {f"plots/{path.name}": path for path in sorted((folder / "plots").iterdir())})
    tracking.set_tags(handle, result["tags"])


def sustained(handle: tracking.Handle, result: Mapping[str, Any], folder: Path) -> None:
    """Logs what `sustain` measured beside a training; its course by the second."""
    tracking.log_figures(handle, result["metrics"], result["ended"])
    tracking.log_series(handle, "sustained/images_per_second", result["series"], result["ended"])
    tracking.set_tags(handle, result["tags"])


LATER = {"evaluate": evaluation, "sustain": sustained}
"""What later stages add to a training's run: by the stage's folder, how its record is logged."""


def results(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The records that later stages left for this training, by stage."""
    found = {
        stage: files.read_json(folder / stage / "record.json")
        for stage in LATER
        if (folder / stage / "record.json").exists()
    }
    return {stage: result for stage, result in found.items() if result["id"] == record["id"]}


def complete(stage: str, record: Mapping[str, Any], result: Mapping[str, Any], experiment: str, folder: Path) -> None:
    """Adds `result`, which `stage` just left in `folder`, to the training's run; one that is missing from this store
    is made anew, whole."""
    handle = tracking.find(record["id"], experiment)
    if handle is None:
        restore(record, experiment, folder)
    elif tracking.is_deleted(handle):
        terminal.say(f"note     the run was deleted in this store: what `{stage}` found is not put there")
    else:
        tracking.resume(handle)
        with tracking.ended_by_failure(handle):
            LATER[stage](handle, result, folder / stage)
            _describe(handle, record, results(record, folder))
            tracking.end(handle, "FINISHED", result["ended"])


def restore(record: Mapping[str, Any], experiment: str, folder: Path) -> tracking.Handle:
    """Makes the run of a cached training, and of what later stages found, anew, whole and marked."""
    handle = tracking.start(dict(record) | {"experiment": experiment})
    with tracking.ended_by_failure(handle):
        tracking.set_tags(handle, {"restored": "from the cache of `dvc repro`; nothing was trained"})
        for epoch in record["epochs"]:
            tracking.log_epoch(handle, epoch)
        training(handle, record, folder / "train")
        found = results(record, folder)
        for stage, result in found.items():
            LATER[stage](handle, result, folder / stage)
        _describe(handle, record, found)
        tracking.mark(handle, record)  # last: a run made by half is not taken for the training's
        tracking.end(handle, "FINISHED", max([record["ended"], *(result["ended"] for result in found.values())]))
    return handle


def _describe(handle: tracking.Handle, record: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    tracking.set_tags(handle, {"mlflow.note.content": records.description(record, found)})
