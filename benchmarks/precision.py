"""Whether a faster number format costs accuracy: every precision of the device against fp32, over seeds.

python -m benchmarks.precision [--whole] [--recipes finetune,linear-probe] [--seeds N] [-S key=value ...]; the settings
are the pipeline's. Without --whole the job is small and made. Each seed gives the head's first weights (and a random
network's) and the order of the images; all precisions take it in turns, by `bare.train`, and what is held out for
validation stays the same.

Printed are the last epoch's validation accuracy, mean and range over the seeds, and the difference of its mean from
fp32's with a 95% interval (`stats.difference`). The exit status is 1 if a precision differs from fp32 by more than 0.5
points and the interval excludes 0.
"""

import dataclasses
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import bare, results
from pipeline import devices
from pipeline.comparison import stats

SMALL = (
    "weights=random", "data.source=synthetic", "data.limit=60", "batch_size=60", "image_size=32", "epochs=3",
    "warmup_epochs=0",
)  # fmt: skip


def measure_recipe(name: str, arguments: Any) -> dict[str, Any]:
    """Train one recipe at every precision with every seed. Returns the figures by precision."""
    overrides = [*(() if arguments.whole else SMALL), *arguments.overrides, f"recipe={name}"]
    settings = results.settings_of(overrides)
    splits = bare.splits_of(settings)
    precisions = devices.select(settings.device).precisions
    accuracies: dict[str, list[float]] = {precision: [] for precision in precisions}
    seconds: dict[str, list[float]] = {precision: [] for precision in precisions}
    for turn in range(arguments.seeds):
        for precision in precisions:
            settings = results.settings_of([*overrides, f"precision={precision}"])
            settings = dataclasses.replace(settings, seed=settings.seed + turn)
            trained = bare.train(settings, splits)
            accuracies[precision].append(trained["epochs"][-1]["val/accuracy"])
            seconds[precision].append(trained["seconds"])
            figures = f"{accuracies[precision][-1]:.2%} in {seconds[precision][-1]:.2f} s"
            print(f"{name} seed {settings.seed} {precision}: {figures}", flush=True)
    by_precision: dict[str, Any] = {}
    for precision in precisions:
        contrast = stats.difference(accuracies[precision], accuracies["fp32"])
        assert contrast.high is not None
        by_precision[precision] = {
            "accuracy": results.ratios(accuracies[precision]),
            "mean accuracy": statistics.fmean(accuracies[precision]),
            "minus fp32": contrast.value,
            "half of its 95% interval": contrast.high - contrast.value,
            "fp32 seconds / its": results.ratios(
                [a / b for a, b in zip(seconds["fp32"], seconds[precision], strict=True)]
            ),
            "differs": differs(contrast),
        }
    return {
        "epochs": settings.work.epochs,
        "images": {split: len(images) for split, images in splits.items()},
        "precisions": by_precision,
    }


def differs(contrast: stats.Contrast) -> bool:
    """Whether accuracies are farther apart than is allowed, and beyond noise."""
    assert contrast.low is not None and contrast.high is not None
    return abs(contrast.value) > results.ACCURACIES_WITHIN and not contrast.low <= 0 <= contrast.high


def print_table(recipes: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a line for each recipe and precision."""
    print(
        f"{'recipe':13} {'precision':10} {'accuracy':>9}  {'range':17} {'minus fp32, points':22} {'times as fast':>13}"
    )
    for name, recipe in recipes.items():
        for precision, figures in recipe["precisions"].items():
            accuracy = figures["accuracy"]
            spread = f"{accuracy['min']:.2%} to {accuracy['max']:.2%}"
            apart = f"{100 * figures['minus fp32']:+.2f} ± {100 * figures['half of its 95% interval']:.2f}"
            apart = "" if precision == "fp32" else apart + (" DIFFERS" if figures["differs"] else "")
            speed = figures["fp32 seconds / its"]["median"]
            print(f"{name:13} {precision:10} {figures['mean accuracy']:>9.2%}  {spread:17} {apart:22} {speed:>13.2f}")


def main(words: Sequence[str]) -> None:
    """Compare the precisions of the recipes; print a table and write it as JSON."""
    parser = results.parser(__doc__, "--seeds")
    parser.add_argument("--recipes", default="finetune,linear-probe", help="which, separated by commas (both)")
    parser.add_argument("--whole", action="store_true", help="the recipes as params.yaml has them, on its data")
    arguments = parser.parse_args(words)
    if arguments.seeds < stats.MIN_UNITS:
        parser.error(f"--seeds: {arguments.seeds} is not allowed: expected at least {stats.MIN_UNITS}, for an interval")
    conditions = results.conditions_of(results.settings_of(arguments.overrides), arguments.overrides)
    recipes = {name: measure_recipe(name, arguments) for name in arguments.recipes.split(",")}
    print_table(recipes)
    results.write("precision", conditions, {"seeds": arguments.seeds, "recipes": recipes})
    wrong = [
        f"{name} {precision}"
        for name, recipe in recipes.items()
        for precision, figures in recipe["precisions"].items()
        if figures["differs"]
    ]
    if wrong:
        sys.exit(f"accuracies differ from fp32's by more than 0.5 points, beyond noise: {', '.join(wrong)}")


if __name__ == "__main__":
    main(sys.argv[1:])
