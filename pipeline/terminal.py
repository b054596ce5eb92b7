"""What a person sees while it runs."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn

from tqdm import tqdm


def say(text: str) -> None:
    """One line on stdout, at once."""
    print(text, flush=True)


def shout(title: str, *lines: str) -> None:
    """A warning that can't be overlooked, on stderr: a figure under it is not what it seems."""
    rule = "!" * 78
    print(
        "\n".join(["", rule, f"!!  {title}", *(f"!!  {line}" for line in lines), rule, ""]), file=sys.stderr, flush=True
    )


@contextmanager
def progress(title: str, images: int) -> Iterator[Callable[[int], None]]:
    """A bar of `images` with images/s and what is left; gives the function to call with each batch's size.

    Silent where stderr is not a terminal. It is drawn at most ten times a second, and counts batches as they
    are queued: an asynchronous device may still be working on some of them.
    """
    with _bar(title, images) as bar:
        yield lambda count: _advance(bar, count)


@contextmanager
def epochs_progress(
    epochs: int, images: int
) -> Iterator[tuple[Callable[[int], None], Callable[[Mapping[str, float]], None]]]:
    """A bar an epoch of `images`; gives the function to call with each batch's size, and the one to call with
    an epoch's figures, which leaves them as a line."""
    with _bar(f"epoch 1/{epochs}", images) as bar:

        def finish(figures: Mapping[str, float]) -> None:
            bar.clear()
            say(epoch_line(int(figures["epoch"]), epochs, figures))
            if figures["epoch"] < epochs:
                bar.set_description(f"epoch {int(figures['epoch']) + 1}/{epochs}", refresh=False)
                bar.reset()

        yield lambda count: _advance(bar, count), finish


def _advance(bar: "tqdm[NoReturn]", count: int) -> None:
    bar.update(count)


def _bar(title: str, images: int) -> "tqdm[NoReturn]":
    return tqdm(total=images, desc=title, unit=" images", unit_scale=True, leave=False, disable=not sys.stderr.isatty())


def epoch_line(epoch: int, epochs: int, figures: Mapping[str, float]) -> str:
    """An epoch's figures on one line."""
    speed = figures.get("speed/train_images_per_second")
    lr = figures.get("train/lr_applied", figures["train/lr"])
    return (
        f"epoch {epoch:>{len(str(epochs))}}/{epochs}"
        f"  loss {figures['train/loss']:.4f}  accuracy {figures['train/accuracy']:.2%}"
        f"  val loss {figures['val/loss']:.4f}  val accuracy {figures['val/accuracy']:.2%}  lr {lr:.2e}"
        f"  {figures['time/train_seconds']:.2f} s + {figures['time/val_seconds']:.2f} s"
        + (f"  {speed:,.0f} images/s" if speed else "")
    )
