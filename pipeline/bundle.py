"""Carry runs from one MLflow store to another in one small file: `export [--out FILE]`, `import FILE...`."""

from collections.abc import Sequence
from pathlib import Path

from pipeline import cli, config
from pipeline.tracking import bundles

OUT = config.ROOT / "reports" / "bundle.zip"
"""The default path of an exported bundle."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command `export` or `import`."""
    parser = cli.Parser(prog="python -m pipeline.bundle", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write all finished runs of the store to one file")
    export.add_argument("--out", type=_path, default=OUT, metavar="FILE", help="(default: reports/bundle.zip)")
    export.add_argument("--experiment", metavar="NAME", help="only the runs of this experiment")
    export.add_argument("--with-models", action="store_true", help="with checkpoints: some 45 MB a run")
    export.add_argument("--without-pictures", action="store_true", help="some 10 KB a run instead of 300")
    imports = commands.add_parser("import", help="put the runs of bundles into the store")
    imports.add_argument("paths", type=_path, nargs="+", metavar="FILE", help="a bundle, or a folder of bundles")
    options = parser.parse_args(arguments)
    if options.command == "import":
        bundles.import_runs(options.paths)
        return
    bundles.export_runs(
        options.out,
        experiment=options.experiment,
        with_models=options.with_models,
        with_pictures=not options.without_pictures,
    )


def _path(text: str) -> Path:
    return Path(text).expanduser()


if __name__ == "__main__":
    with cli.exit_on_error("python -m pipeline.bundle"):
        main()
