"""Compare all machines of the store in one report (reports/compare.html, compare.md, compare.json).

A cached training that the store lacks is put into it first, without training again.
"""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from pipeline import config, files, terminal
from pipeline.comparison import build, charts, page, plots, report
from pipeline.tracking import location, pending, publisher, records, store

REPORTS = config.ROOT / "reports"


def run(settings: config.Settings, folder: Path, reports: Path | None = None) -> build.Comparison:
    """Compare all finished runs. Write the reports, log them with their charts as a run of their own, and print the
    answer. `folder`: the stages' outputs; `reports`: REPORTS if not given."""
    reports = reports or REPORTS
    publisher.deliver_all()
    experiment_id = _restore_cached(settings, folder)
    comparison = build.compare(
        store.finished_runs(),
        lambda run_id: store.history(run_id, build.COURSES),
        store.run_link,
        settings.compare,
        config.read_prices(settings.compare.prices),
    )
    svgs = write_reports(comparison, reports)
    if svgs:
        _log_reports(location.experiment_name(settings.tracking.experiment), comparison, reports, svgs)
    terminal.say("\n" + report.on_terminal(comparison) + "\n")
    terminal.say("report   reports/compare.html (a page that opens offline), compare.md, compare.json")
    if location.store_uri().startswith("http"):
        terminal.say("browse   " + (store.run_table_link(experiment_id) if experiment_id else location.public_uri()))
    else:
        terminal.say("browse   make ui   (or: python -m mlflow ui --backend-store-uri " + location.shown_uri() + ")")
        if experiment_id:
            terminal.say("         " + store.run_table_link(experiment_id))
    return comparison


def write_reports(comparison: build.Comparison, folder: Path) -> dict[str, dict[str, str]]:
    """Write compare.md, .json and .html. Returns the charts as SVG, by the place of their table and by name."""
    svgs = {
        place: {name: plots.svg(figure) for name, figure in figures.items()}
        for place, figures in charts.charts(comparison).items()
    }
    files.write_text(folder / "compare.md", report.markdown(comparison))
    files.write_json(folder / "compare.json", report.as_json(comparison))
    files.write_text(folder / "compare.html", page.html(comparison, svgs))
    return svgs


def _log_reports(
    experiment: str, comparison: build.Comparison, reports: Path, svgs: Mapping[str, Mapping[str, str]]
) -> None:
    """Log reports and charts to the comparison's own run in the store, over the previous ones."""
    handle = store.comparison_run(experiment)
    if handle is None:
        return
    with tempfile.TemporaryDirectory() as scratch:
        artifacts = {name: reports / name for name in ("compare.html", "compare.md", "compare.json")}
        for place, by_name in svgs.items():
            for name, svg in by_name.items():
                artifacts[f"charts/{place}/{name}.svg"] = path = Path(scratch) / place / f"{name}.svg"
                files.write_text(path, svg)
        store.log_artifacts(handle, artifacts)
        store.set_tags(handle, {"mlflow.note.content": report.description(comparison)})
        store.end_run(handle, "FINISHED")


def _restore_cached(settings: config.Settings, folder: Path) -> str | None:
    """Put the training in `folder`, its repeats and later stages into the store where it lacks them. Returns the id of
    their experiment; None if nothing was trained, or if the run was deleted by its user."""
    trained = records.present_records(folder)
    if not trained:
        return None
    experiment = records.experiment_name(settings, trained[0]["tags"])
    for record in trained:
        folders = records.stage_folders(folder, records.repeat_number(record))
        target = pending.target(experiment, publisher.RESTORED)
        if store.find_run(record["id"], experiment, target["run_id"]) is None:
            publisher.put_run(record, folders, target)
            terminal.say(f"restored {record['name']}: the cached run was not in this store; nothing was trained")
        else:
            publisher.put_run(record, folders, target | {"marks": {}})
    handle = store.find_run(trained[0]["id"], experiment, os.environ.get("MLFLOW_RUN_ID"))
    return handle.experiment_id if handle else None


if __name__ == "__main__":
    from pipeline import cli

    cli.main(run, __doc__)
