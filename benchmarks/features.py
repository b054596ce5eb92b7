"""How much sooner a frozen network is trained when its features are computed once: both ways, side by side.

python -m benchmarks.features [-S key=value ...]; the settings are the pipeline's. Prints the ratio of
time/total_seconds for each pair, in turns, so that what disturbs the machine disturbs both, and their median.
"""

import os
import statistics
import sys
import tempfile
from pathlib import Path

from pipeline import cli, config, download, hardware, train

PAIRS = 3
SMALL = ["recipe=linear-probe", "weights=random", "data.source=synthetic", "data.limit=50", "epochs=5"]


def main(arguments: list[str]) -> None:
    """Trains PAIRS times each way in a store of its own, which is thrown away."""
    overrides = [word for setting in SMALL for word in ("-S", setting)]
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{Path(folder).as_posix()}/bench.db"
        for pair in range(PAIRS):
            seconds = {}
            for features in ("recompute", "cache"):
                settings = cli.parse_settings([*overrides, *arguments, "-S", f"features={features}"], __doc__ or "", "")
                seconds[features] = _trained(settings, Path(folder) / f"{pair}-{features}")
            ratios.append(seconds["recompute"] / seconds["cache"])
            print(
                f"pair {pair + 1}: recompute {seconds['recompute']:.2f} s, cache {seconds['cache']:.2f} s", flush=True
            )
    print(
        f"features once / each epoch: {statistics.median(ratios):.2f} times as fast (median of {PAIRS} pairs, "
        f"{min(ratios):.2f} to {max(ratios):.2f}) over {settings.work.epochs} epochs"
    )


def _trained(settings: config.Settings, folder: Path) -> float:
    for stage in (hardware, download):
        stage.run(settings, folder)
    total: float = train.run(settings, folder)["metrics"]["time/total_seconds"]
    return total


if __name__ == "__main__":
    main(sys.argv[1:])
