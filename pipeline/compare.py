"""Sets the runs of all machines side by side (reports/compare.md), and puts a cached run into an empty store."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from pipeline import config, files, publish, records, terminal, tracking

REPORT = config.ROOT / "reports" / "compare.md"
COLUMNS = (
    "hardware",
    "label",
    "precision",
    "test accuracy",
    "images/s",
    "sustained",
    "s/epoch",
    "total s",
    "peak MiB",
    "taints",
    "run",
)


def run(settings: config.Settings, folder: Path) -> str:
    """Writes the table of all finished runs to `reports/compare.md` and the terminal."""
    experiment_id = _in_store(settings, folder)
    text = report(tracking.finished_runs())
    files.write_text(REPORT, text)
    terminal.say("\n" + text)
    terminal.say("browse   make ui   (or: python -m mlflow ui --backend-store-uri " + tracking.shown_uri() + ")")
    if experiment_id:
        terminal.say("         " + tracking.link(experiment_id))
    return text


def report(runs: Sequence[Mapping[str, Any]]) -> str:
    """The runs of each workload in a table of its own, most accurate first; runs with a fallback apart.

    Each run has `run_id`, `tags` and `metrics`, as `tracking.finished_runs` gives them.
    """
    # One training may stand in several experiments of a store; it is one run all the same.
    once = {run["tags"].get(tracking.RECORD_TAG, run["run_id"]): run for run in runs}.values()
    if not once:
        return "No finished runs yet.\n"
    parts = []
    for real, title in ((True, "# Runs by work and hardware"), (False, "# DEMO: not the real thing")):
        chosen = [run for run in once if ("fallback" not in run["tags"]) == real]
        ordered = sorted(chosen, key=lambda run: (run["tags"]["workload"], -run["metrics"].get("test/accuracy", -1)))
        tables = [_table(list(group)) for _, group in groupby(ordered, key=lambda run: run["tags"]["workload"])]
        if tables:
            parts += [title, *tables]
    parts.append(
        "Only runs of one workload are the same work. Each row is a single run: rows that differ by a few per cent "
        "may be the same."
    )
    return "\n\n".join(parts) + "\n"


def _table(runs: Sequence[Mapping[str, Any]]) -> str:
    tags = runs[0]["tags"]
    rows = [COLUMNS, *(_row(run) for run in runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    fallback = f", fallback: {tags['fallback']}" if "fallback" in tags else ""
    heading = (
        f"## {tags['recipe']} on {tags['dataset']} (workload `{tags['workload']}`, {tags['weights']} weights{fallback})"
    )
    return heading + "\n\n" + "\n".join(lines)


def _row(run: Mapping[str, Any]) -> tuple[str, ...]:
    """A cell a column; a figure that the run does not have is left empty."""
    tags, metrics = run["tags"], run["metrics"]

    def figure(key: str, form: str) -> str:
        return format(metrics[key], form) if key in metrics else ""

    speed = figure("speed/train_images_per_second", ",.0f")
    features = figure("speed/feature_images_per_second", ",.0f")
    return (
        _cell(tags.get("hardware", "")),
        _cell(tags.get("label", "")),
        tags.get("precision", ""),
        figure("test/accuracy", ".2%"),
        speed or (f"{features} (features)" if features else ""),
        figure("speed/sustained_images_per_second", ",.0f"),
        figure("time/train_seconds", ".2f"),
        figure("time/total_seconds", ".2f"),
        figure("memory/peak_mib", ",.0f"),
        _cell(tags.get("taints", "")),
        run["run_id"][:8],
    )


def _cell(text: str) -> str:
    """A text that can't end a table's cell."""
    return " ".join(text.split()).replace("|", "/")


def _in_store(settings: config.Settings, folder: Path) -> str | None:
    """Makes sure that the training in `folder` stands in the store; the id of its experiment."""
    if not (folder / "train" / "record.json").exists():
        return None
    record = files.read_json(folder / "train" / "record.json")
    experiment = records.experiment(settings, record["tags"])
    handle = tracking.find(record["id"], experiment)
    if handle is None:
        handle = publish.restore(record, experiment, folder)
        terminal.say(f"restored {record['name']}: the cached run was not in this store; nothing was trained")
    return handle.experiment_id


if __name__ == "__main__":
    from pipeline import cli

    cli.main(run, __doc__)
