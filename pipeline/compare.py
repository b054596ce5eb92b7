"""Sets all machines side by side (reports/compare.md, .json, .html), and puts a cached run into an empty store."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from pipeline import config, files, plots, terminal
from pipeline.comparison import build, charts, page, report
from pipeline.tracking import publisher, records, store

REPORTS = config.ROOT / "reports"


def run(settings: config.Settings, folder: Path) -> build.Comparison:
    """Writes the reports, logs them and their charts as a run of their own, and says what came out."""
    experiment_id = _in_store(settings, folder)
    found = build.compare(
        store.finished_runs(),
        lambda run_id: store.history(run_id, build.COURSES),
        store.run_link,
        settings.compare,
        config.read_prices(settings.compare.prices),
    )
    drawn = write(found, REPORTS)
    if drawn:
        _log(settings.tracking.experiment, found, drawn)
    terminal.say("\n" + report.on_terminal(found) + "\n")
    terminal.say("report   reports/compare.html (a page that opens offline), compare.md, compare.json")
    terminal.say("browse   make ui   (or: python -m mlflow ui --backend-store-uri " + store.shown_uri() + ")")
    if experiment_id:
        terminal.say("         " + store.run_table_link(experiment_id))
    return found


def write(found: build.Comparison, folder: Path) -> dict[str, dict[str, str]]:
    """Writes compare.md, .json and .html. Returns the charts as SVG, by the place of their table and by name."""
    drawn = {
        place: {name: plots.svg(figure) for name, figure in figures.items()}
        for place, figures in charts.charts(found).items()
    }
    files.write_text(folder / "compare.md", report.markdown(found))
    files.write_json(folder / "compare.json", report.as_json(found))
    files.write_text(folder / "compare.html", page.html(found, drawn))
    return drawn


def _log(experiment: str, found: build.Comparison, drawn: Mapping[str, Mapping[str, str]]) -> None:
    """Puts the reports and the charts into the store's run for them, over those of the last time."""
    handle = store.comparison_run(experiment)
    if handle is None:
        return
    with store.end_on_failure(handle), tempfile.TemporaryDirectory() as folder:
        artifacts = {name: REPORTS / name for name in ("compare.html", "compare.md", "compare.json")}
        for place, pictures in drawn.items():
            for name, svg in pictures.items():
                file = Path(folder) / place / f"{name}.svg"
                files.write_text(file, svg)
                artifacts[f"charts/{place}/{name}.svg"] = file
        store.log_artifacts(handle, artifacts)
        store.set_tags(handle, {"mlflow.note.content": report.description(found)})
        store.end_run(handle, "FINISHED")


def _in_store(settings: config.Settings, folder: Path) -> str | None:
    """Makes sure that the training in `folder`, with all its repeats that are there and what later stages found, stands
    in the store; the id of its experiment."""
    trained = records.present_records(folder)
    if not trained:
        return None
    experiment = records.experiment_name(settings, trained[0]["tags"])
    changed = False
    for record in trained:
        folders = records.stage_folders(folder, records.repeat_number(record))
        if store.find_run(record["id"], experiment) is None:
            publisher.restore_run(record, experiment, folders)
            terminal.say(f"restored {record['name']}: the cached run was not in this store; nothing was trained")
            changed = True
        else:
            changed |= publisher.add_missing_stages(record, experiment, folders)
    if changed:
        publisher.update_parent(trained[0], experiment)
    handle = store.find_run(trained[0]["id"], experiment)
    return handle.experiment_id if handle else None


if __name__ == "__main__":
    from pipeline import cli

    cli.main(run, __doc__)
