"""What a person sees while it runs."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from tqdm import tqdm


def say(text: str) -> None:
    """One line on stdout, at once."""
    print(text, flush=True)


def shout(title: str, *lines: str) -> None:
    """A warning that can't be overlooked, on stderr: a figure under it is not what it seems."""
    rule = "!" * 78
    print("\n".join(["", rule, f"!!  {title}", *(f"!!  {line}" for line in lines), rule, ""]), file=sys.stderr, flush=True)


@contextmanager
def progress(title: str, images: int) -> Iterator[Callable[[int], None]]:
    """A bar of `images` with images/s and what is left; gives the function to call with each batch's size.

    Silent where stderr is not a terminal. It is drawn at most ten times a second, and counts batches as they
    are queued: an asynchronous device may still be working on some of them.
    """
    with tqdm(
        total=images, desc=title, unit=" images", unit_scale=True, leave=False, disable=not sys.stderr.isatty()
    ) as bar:
        yield lambda count: bar.update(count) and None


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
