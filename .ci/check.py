"""Reads the store after the main job: one finished run that learnt something, all its figures, pictures and files."""

import sqlite3
import sys
from contextlib import closing
from pathlib import Path

SCORE = [f"sustained/{step}_images_per_second" for step in ("convnet_fp32", "convnet_best", "transformer_best")]


def main() -> None:
    """Ends with a message and status 1 where something is missing."""
    with closing(sqlite3.connect("mlflow.db")) as store:
        runs = store.execute(
            "select run_uuid, status, artifact_uri from runs where lifecycle_stage = 'active'"
        ).fetchall()
        if [status for _, status, _ in runs] != ["FINISHED"]:
            sys.exit(f"expected one finished run, found {runs}")
        ((run, _, artifacts),) = runs
        metrics = dict(store.execute("select key, value from latest_metrics where run_uuid = ?", (run,)))
        tags = dict(store.execute("select key, value from tags where run_uuid = ?", (run,)))
    if metrics["test/accuracy"] < 0.6:  # three classes: 0.33 is chance
        sys.exit(f"learnt nothing: test/accuracy is {metrics['test/accuracy']}")
    for key in SCORE:
        if not metrics.get(key, 0) > 0:
            sys.exit(f"a step of the score was not measured: {key} is missing")
    if not metrics.get("ceiling/synthetic_images_per_second", 0) > 0:
        sys.exit("the machine's own ceilings were not measured: ceiling/synthetic_images_per_second is missing")
    for name in ("plots/samples.png", "plots/confusion_matrix.png", "checkpoints/best.safetensors", "hardware.json"):
        if not (Path(artifacts.removeprefix("file://")) / name).stat().st_size:
            sys.exit(f"{name} is empty")
    print(
        f"main job: {tags['mlflow.runName']}, test accuracy {metrics['test/accuracy']:.2%}, "
        f"{metrics[SCORE[0]]:,.1f} images/s of the convnet at fp32 sustained"
    )


if __name__ == "__main__":
    main()
