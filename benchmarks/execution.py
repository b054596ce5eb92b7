"""The fastest way to run a recipe's step: precision x memory layout x autotuning x compiling, side by side.

python -m benchmarks.execution [DEVICE [BATCH]] trains in every way, ROUNDS times, on the same random images on the
device (uint8, 32 x 32, resized there to 96). It prints the median and range of the images per second.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from pipeline import config, devices
from pipeline.data import batching
from pipeline.models import classifier

STEPS, ROUNDS = 20, 3


def step_of(
    backend: devices.Backend, recipe: config.Recipe, layout: bool, compiled: str, batch: int
) -> Callable[[], None]:
    """One training step of `recipe` on a fixed batch."""
    torch.manual_seed(0)
    net = classifier.build(recipe, 10, None).to(backend.device)
    net = net.to(memory_format=torch.channels_last if layout else torch.contiguous_format)
    classifier.set_train_mode(net, recipe.frozen_batch_norm)
    forward = net if compiled == "off" else torch.compile(net, mode=compiled, dynamic=False)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 32, 32, 3), dtype=torch.uint8, generator=generator).to(backend.device)
    labels = torch.randint(0, 10, (batch,), generator=generator).to(backend.device)

    def step() -> None:
        inputs = batching.prepare(images, recipe.image_size, channels_last=layout)
        with backend.autocast(recipe.precision):
            logits = forward(inputs)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def speed(backend: devices.Backend, step: Callable[[], None], batch: int) -> float:
    """Images per second over STEPS steps."""
    backend.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    backend.synchronize()
    return STEPS * batch / (time.perf_counter() - start)


def main(device: str, batch: int) -> None:
    """Print a line for each way, the fastest last."""
    backend = devices.select(device)
    print(backend.facts()["name"], "torch", torch.__version__, f"batch {batch}")
    autotune = (False, True) if backend.kind == "cuda" else (False,)
    compiles = ("off", "default", "max-autotune-no-cudagraphs") if backend.kind == "cuda" else ("off",)
    for name in ("blog", "finetune"):
        ways = {}
        for precision, layout, tuned, compiled in itertools.product(
            backend.precisions, (False, True), autotune, compiles
        ):
            if (compiled != "off" and (not tuned or not layout)) or (
                compiled.startswith("max") and precision != "bf16"
            ):
                continue
            backend.set_precision(precision)
            torch.backends.cudnn.benchmark = tuned
            recipe = config.load([f"recipe={name}", "weights=random", f"precision={precision}"]).work
            step = step_of(backend, recipe, layout, compiled, batch)
            start = time.perf_counter()
            for _ in range(5):
                step()
            backend.synchronize()
            key = (precision, "channels_last" if layout else "contiguous", "benchmark" if tuned else "", compiled)
            ways[key] = [time.perf_counter() - start]
            ways[key] += [speed(backend, step, batch) for _ in range(ROUNDS)]
        for key, (setup, *speeds) in sorted(ways.items(), key=lambda item: statistics.median(item[1][1:])):
            print(
                f"{name:9} {' '.join(key):50} {statistics.median(speeds):>9,.0f} images/s "
                f"({min(speeds):,.0f} to {max(speeds):,.0f}), first five steps {setup:.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", nargs="?", default="auto")
    parser.add_argument("batch", nargs="?", default=1024, type=int)
    main(**vars(parser.parse_args()))
