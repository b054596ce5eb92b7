"""Puts what a training left into MLflow: right after it, or again from DVC's cache, by the same code."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline import records, tracking


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
    _describe(handle, record, None)


def evaluation(handle: tracking.Handle, record: Mapping[str, Any], result: Mapping[str, Any], folder: Path) -> None:
    """Logs the evaluation `result` of the training `record`, which left `folder`."""
    tracking.log_figures(handle, result["metrics"], result["ended"])
    tracking.log_datasets(handle, result["datasets"])
    tracking.log_files(handle, {f"plots/{path.name}": path for path in sorted((folder / "plots").iterdir())})
    tracking.set_tags(handle, result["tags"])
    _describe(handle, record, result)


def restore(
    record: Mapping[str, Any], result: Mapping[str, Any] | None, experiment: str, folder: Path
) -> tracking.Handle:
    """Makes the run of a cached training, and of its evaluation where there is one, anew, whole and marked."""
    handle = tracking.start(dict(record) | {"experiment": experiment})
    with tracking.ended_by_failure(handle):
        tracking.set_tags(handle, {"restored": "from the cache of `dvc repro`; nothing was trained"})
        for epoch in record["epochs"]:
            tracking.log_epoch(handle, epoch)
        training(handle, record, folder / "train")
        if result is not None:
            evaluation(handle, record, result, folder / "evaluate")
        tracking.mark(handle, record)  # last: a run made by half is not taken for the training's
        tracking.end(handle, "FINISHED", (result or record)["ended"])
    return handle


def _describe(handle: tracking.Handle, record: Mapping[str, Any], result: Mapping[str, Any] | None) -> None:
    tracking.set_tags(handle, {"mlflow.note.content": records.description(record, result)})
