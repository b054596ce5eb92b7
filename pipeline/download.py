"""Find data and weights, fetch what is missing, and describe them (inputs.json)."""

from pathlib import Path
from typing import Any

from pipeline import config, files, terminal
from pipeline.data import datasets, fetch, folder
from pipeline.models import weights


def run(settings: config.Settings, outputs: Path) -> dict[str, Any]:
    """Write `outputs/inputs.json`: sources, digests, counts, classes and fallbacks of data and weights.

    Before a download, raises UsageError for a setting that the training would refuse.
    """
    if _must_download(settings):
        from pipeline.training import setup  # imports torch, which takes seconds

        setup.check(settings.device, settings.work)
        weights.check(settings.work)
    data = datasets.resolve(settings.data, settings.work.image_size)
    initial = weights.resolve(settings.work)
    fallbacks = {}
    if data["reason"]:
        fallbacks["data"] = f"generated pictures in place of CIFAR-10 ({data['reason']})"
    if initial["reason"]:
        fallbacks["weights"] = f"random in place of pretrained ({initial['reason']})"
    inputs = {"data": data, "weights": initial, "fallback": list(fallbacks)}
    files.write_json(outputs / "inputs.json", inputs)
    _say_data(data, settings.work.image_size)
    terminal.say(f"weights  {initial['model']}: {initial['used']}")
    if fallbacks:
        terminal.warn(
            "DEMO: this is not the real thing, and its figures are not comparable with real runs",
            *(f"{name}: {fallback}" for name, fallback in fallbacks.items()),
            "the next run tries again; docs/devices.md says how to bring both by hand",
        )
    return inputs


def _say_data(data: dict[str, Any], image_size: int) -> None:
    classes, counts = data["classes"], data["counts"]
    size = "x".join(map(str, data["size"])) + " pixels" if data["size"] else "of many sizes"
    decoded = list(folder.decoded_size(data["size"], image_size))
    if decoded != data["size"]:
        size += f", squashed to {decoded[0]}x{decoded[1]}"
    terminal.say(f"data     {data['source']}: {counts['train']:,} train + {counts['test']:,} test, {size}")
    names = ", ".join(map(folder.printable, classes[:10]))
    terminal.say(f"classes  {len(classes)}: {names}" + (f", ... ({len(classes)} in all)" if len(classes) > 10 else ""))
    if data.get("left_out"):
        terminal.say(f"left out {folder.in_words(data['left_out'])}: docs/data.md says what is read")


def _must_download(settings: config.Settings) -> bool:
    """Whether CIFAR-10 or pretrained weights are needed and missing."""
    data, recipe = settings.data, settings.work
    needs_data = data.source in ("auto", "cifar10") and not (data.folder / fetch.ARCHIVE).exists()
    return needs_data or (recipe.weights == "pretrained" and not weights.is_cached(recipe.model))


if __name__ == "__main__":
    from pipeline import cli

    cli.main(run, __doc__)
