"""Makes compare.md, .json and .html of all bundles that are here, in a store of their own that is thrown away."""

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


def run(folder: Path = RESULTS) -> build.Comparison:
    """Writes the comparison of the bundles in `folder` beside them. The same bundles give the same reports: a run is
    known by its id where it was trained, and its link is to its bundle. Raises StageError where there is no bundle."""
    paths = sorted(folder.resolve().glob("*.zip"))
    if not paths:
        raise StageError(f"there is no bundle in {folder.name}/")
    home: dict[str, str] = {}
    # MLflow puts artifacts below the current folder; Windows keeps the store's file open.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch, chdir(scratch):
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{Path(scratch).as_posix()}/mlflow.db"
        for path in paths:
            bundles.import_runs([path])
            for row in store.finished_runs():
                home.setdefault(row["run_id"], path.name)
        rows = store.finished_runs()
        there = {row["tags"][publisher.IMPORTED_RUN_TAG]: row["run_id"] for row in rows}
        rows = [row | {"run_id": row["tags"][publisher.IMPORTED_RUN_TAG]} for row in rows]
        found = build.compare(
            sorted(rows, key=lambda row: (row["started"], row["run_id"]), reverse=True),
            lambda run_id: store.history(there[run_id], build.COURSES),
            lambda _, run_id: home[there[run_id]],
            config.load().compare,
            None,
        )
    compare.write_reports(found, folder)
    terminal.say("\n" + report.on_terminal(found) + "\n")
    terminal.say(f"report   {folder.name}/compare.html, compare.md, compare.json")
    return found


if __name__ == "__main__":
    with cli.exit_on_error("python -m results.compare"):
        cli.Parser(prog="python -m results.compare", description=__doc__).parse_args(sys.argv[1:])
        run()
