"""Print messages, warnings, progress bars and a line per epoch. Nothing that can't be printed ends a run."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from tqdm import tqdm


def say(text: str) -> None:
    """Print a line to stdout, unbuffered."""
    _print(text, sys.stdout)


def say_error(text: str) -> None:
    """Print a line to stderr."""
    _print(text, sys.stderr)


def warn(title: str, *lines: str) -> None:
    """Print a framed warning to stderr."""
    rule = "!" * 78
    framed = ["", rule, f"!!  {title}", *(f"!!  {line}" for line in lines), rule, ""]
    say_error("\n".join(framed))


def flush() -> None:
    """Write out what stdout and stderr still hold."""
    for stream in (sys.stdout, sys.stderr):
        _print("", stream, end="")


def _print(text: str, stream: TextIO | None, end: str = "\n") -> None:
    """Print text, with escapes for characters that the stream can't encode. If nobody reads the stream any more, or its
    disk is full, all that follows is dropped."""
    try:
        try:
            print(text, file=stream, end=end, flush=True)
        except UnicodeEncodeError:
            print(text.encode("ascii", "backslashreplace").decode(), file=stream, end=end, flush=True)
    except (OSError, ValueError):  # ValueError: it is closed
        with suppress(OSError, ValueError, AttributeError):  # else Python's own flush at the end fails, too
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[union-attr]


@contextmanager
def progress(title: str, images: int) -> Iterator[Callable[[int], Any]]:
    """Show a progress bar over `images`, if stderr is a terminal. Yields the function to call with each batch's size.

    Call it when a batch is queued. An asynchronous device may still be computing that batch.
    """
    with _bar(title, images) as bar:
        yield bar.update


@contextmanager
def epochs_progress(
    epochs: int, images: int
) -> Iterator[tuple[Callable[[int], Any], Callable[[Mapping[str, float]], None]]]:
    """Show a progress bar over `images` for each epoch. Yields a function to call with each batch's size, and one that
    ends an epoch and prints its metrics on a line."""
    with _bar(f"epoch 1/{epochs}", images) as bar:

        def finish(metrics: Mapping[str, float]) -> None:
            epoch = int(metrics["epoch"])
            bar.clear()
            say(epoch_line(epoch, epochs, metrics))
            if epoch < epochs:
                bar.set_description(f"epoch {epoch + 1}/{epochs}", refresh=False)
                bar.reset()

        yield bar.update, finish


def _bar(title: str, images: int) -> "tqdm[Any]":
    return tqdm(total=images, desc=title, unit=" images", unit_scale=True, leave=False, disable=not sys.stderr.isatty())


def epoch_line(epoch: int, epochs: int, metrics: Mapping[str, float]) -> str:
    """An epoch's metrics on one line."""
    speed = metrics.get("speed/train_images_per_second")
    lr = metrics.get("train/lr_applied", metrics["train/lr"])
    standard = {f"{split}/{name}" for split in ("train", "val") for name in ("loss", "accuracy", "lr", "lr_applied")}
    others = [name for name in metrics if name.startswith(("train/", "val/")) and name not in standard]
    return (
        f"epoch {epoch:>{len(str(epochs))}}/{epochs}"
        f"  loss {metrics['train/loss']:.4f}  accuracy {metrics['train/accuracy']:.2%}"
        f"  val loss {metrics['val/loss']:.4f}  val accuracy {metrics['val/accuracy']:.2%}"
        + "".join(f"  {name.replace('/', ' ')} {_format(name, metrics[name])}" for name in others)
        + f"  lr {lr:.2e}"
        f"  {metrics['time/train_seconds']:.2f} s + {metrics['time/val_seconds']:.2f} s"
        + (f"  {speed:,.0f} images/s" if speed else "")
    )


def _format(name: str, value: float) -> str:
    """Accuracies as percentages, all else with four digits."""
    return f"{value:.2%}" if name.endswith("accuracy") else f"{value:.4g}"
