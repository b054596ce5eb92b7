"""Compare all bundles in this folder, in a temporary store of their own, and write compare.md, .json and .html."""

import os
import sys
import tempfile
from contextlib import chdir
from pathlib import Path

from pipeline import cli, compare, config, terminal
from pipeline.comparison import build, report
from pipeline.errors import StageError
from pipeline.tracking import bundles, publisher, store

RESULTS = Path(__file__).resolve().parent


def compare_bundles(folder: Path = RESULTS) -> build.Comparison:
    """Compare the bundles in `folder` and write the reports beside them. The same bundles give the same reports: a run
    has the id that it had where it was trained, and its link is to its bundle. Raises StageError without a bundle."""
    paths = sorted(folder.resolve().glob("*.zip"))
    if not paths:
        raise StageError(f"there is no bundle in {folder.name}/")
    bundle_names: dict[str, str] = {}
    # MLflow puts artifacts below the current folder; Windows keeps the store's file open.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch, chdir(scratch):
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{Path(scratch).as_posix()}/mlflow.db"
        for path in paths:
            bundles.import_runs([path])
            for row in store.finished_runs():
                bundle_names.setdefault(row["run_id"], path.name)
        rows = store.finished_runs()
        stored_ids = {row["tags"][publisher.IMPORTED_RUN_TAG]: row["run_id"] for row in rows}
        rows = [row | {"run_id": row["tags"][publisher.IMPORTED_RUN_TAG]} for row in rows]
        comparison = build.compare(
            sorted(rows, key=lambda row: (row["started"], row["run_id"]), reverse=True),
            lambda run_id: store.history(stored_ids[run_id], build.COURSES),
            lambda _, run_id: bundle_names[stored_ids[run_id]],
            config.load().compare,
            None,
        )
    compare.write_reports(comparison, folder)
    terminal.say("\n" + report.on_terminal(comparison) + "\n")
    terminal.say(f"report   {folder.name}/compare.html, compare.md, compare.json")
    return comparison


if __name__ == "__main__":
    with cli.exit_on_error("python -m results.compare"):
        cli.Parser(prog="python -m results.compare", description=__doc__).parse_args(sys.argv[1:])
        compare_bundles()
