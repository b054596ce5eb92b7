"""What this machine can do at most, measured in seconds before a training, and what the training made of it."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import flop_counter

from pipeline.devices import Backend

WINDOW_SECONDS = 0.05
"""What a window lasts: thousands of times what the clock resolves, and short enough to fall between other load."""

SHORTEST_WINDOW = 1e-6
"""What the first window, of one call, is taken to last at least: a coarse clock may tell none."""

SMALLEST_SIDE, LARGEST_SIDE = 512, 8192
"""Sides of the matrices that `matmul_flops` multiplies: the smallest, doubled up to the largest."""

LONG_PRODUCT_SECONDS = 0.02
"""A product that takes this long has filled the device: no larger one is tried."""

SIDE_SECONDS = 0.1
"""How long `matmul_flops` measures a side: of five sides in two formats, a second in all."""

COPIED_SIDE, HOST_COPIED_SIDE = 8192, 5632
"""Side of the float32 matrix that `memory_bytes_per_second` copies: 256 MiB; by a CPU, where it counts in the process's
peak memory, 121 MiB, which are no faster (64 are, with a last-level cache of 32)."""

COPY_SECONDS = 0.3
"""How long `memory_bytes_per_second` measures."""

STEP_SECONDS, STEP_WINDOWS = 0.5, 3
"""How long the training's own step is measured on one fixed batch: ten windows, or so many at least, where a step is
long. A training that was timed for less is held against none of it: it may have had calmer moments than any window, and
first steps are slow."""

TRUST = 1.05
"""How many times the speed of one fixed batch a training may reach before its clock is doubted."""

TRUST_PRODUCTS = 4 * TRUST
"""As TRUST, of the rate of products. No such bound is sharp: Winograd's convolutions save up to 3 of 4 of the
multiplications that are counted (Lavin and Gray 2015), and convolutions may come from a better library: ResNet-18's
forward pass took 0.96 to 1.06 of it on an AMD EPYC (float32, channels last)."""


@dataclass(frozen=True)
class Measured:
    """The ceilings of one machine, for one step of training at one precision."""

    matmul_flops: float
    """Floating-point operations a second of its best matrix product."""

    memory_bytes_per_second: float
    """Read and written by a copy."""

    images_per_second: float
    """Of the training's own step, again and again on one fixed batch that lies on the device: its fastest window."""

    slowest_images_per_second: float
    """Its slowest window."""

    @property
    def spread(self) -> float:
        """How much faster the fastest window of the step was than its slowest one, as a fraction."""
        return self.images_per_second / self.slowest_images_per_second - 1


def fastest(
    work: Callable[[], object],
    synchronize: Callable[[], None],
    *,
    seconds: float = 1.0,
    now: Callable[[], float] = time.perf_counter,
) -> float:
    """Least seconds of one call of `work` over `windows` for `seconds`.

    The least, since other load can only slow a machine down: the fastest window is nearest to its ceiling.
    """
    return min(windows(work, synchronize, seconds=seconds, now=now))


def windows(
    work: Callable[[], object],
    synchronize: Callable[[], None],
    *,
    seconds: float,
    least: int = 2,
    now: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Seconds of one call of `work` in each window of some 50 ms, for `seconds`, after a call that is not timed; of
    `least` windows, where these take longer. The device is waited for at both ends of a window, not between its calls.
    """

    def window(calls: int) -> float:
        synchronize()
        start = now()
        for _ in range(calls):
            work()
        synchronize()
        return now() - start

    work()
    passed = max(window(1), SHORTEST_WINDOW)
    found = [passed]
    calls = max(1, round(WINDOW_SECONDS / passed))
    while passed < seconds or len(found) < least:
        took = window(calls)
        found.append(took / calls)
        passed += took
    return found


def matmul_flops(backend: Backend, precision: str) -> float:
    """Floating-point operations a second of a square matrix product at `precision`: best of the sides tried.

    A product of side n is 2 n^3 operations, a multiply-add being two (Golub and Van Loan, Matrix Computations,
    section 1.1). The largest side is not always the fastest. Of float32, `backend.set_precision` must have said what
    it means. It is tried for bf16 and fp16 too, since a device without their units can compute in it instead: a CPU
    held to AVX2 did 2.5 GFLOP/s of bf16 products and 203 of float32. Needs up to 768 MiB on the device; raises
    what torch raises where there is less.
    """
    halves = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return max(_product_flops(backend, dtype) for dtype in {torch.float32, halves.get(precision, torch.float32)})


def memory_bytes_per_second(backend: Backend) -> float:
    """Bytes read plus bytes written a second when the device copies 256 MiB (a CPU: 121) to as much of its own memory.

    Counted as STREAM's copy is (McCalpin 1995): a CPU that reads a line before it overwrites it moves half as much
    again. Some servers' last-level caches hold more than both; what they tell is in part the cache's speed. Raises
    what torch raises where there is too little memory.
    """
    side = COPIED_SIDE if backend.asynchronous else HOST_COPIED_SIDE
    source = _normal(backend, torch.float32, side, seed=0)
    target = torch.empty_like(source)
    seconds = fastest(lambda: target.copy_(source), backend.synchronize, seconds=COPY_SECONDS)
    return (source.nbytes + target.nbytes) / seconds


def train_flops(
    net: nn.Module, inputs_shape: tuple[int, ...], *, set_mode: Callable[[nn.Module], None]
) -> float | None:
    """Floating-point operations of one sample in one step of training: the forward pass, and of the backward pass
    what the trainable parameters need. None where they can't be counted.

    `inputs_shape`: of one sample, (C, H, W) or (D,). `set_mode` puts a copy of `net` into training mode; `net`
    itself is left as it is. Counted are products and convolutions, by their shapes, a multiply-add as two
    (torch/utils/flop_counter.py); element-wise work (normalisation, activations, the optimizer) counts nothing.
    """

    def step(copied: nn.Module, inputs: Tensor) -> None:
        set_mode(copied)
        labels = torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device)
        with torch.enable_grad():
            F.cross_entropy(copied(inputs), labels).backward()  # type: ignore[no-untyped-call]

    return _flops_per_sample(net, inputs_shape, step)


def forward_flops(net: nn.Module, inputs_shape: tuple[int, ...]) -> float | None:
    """Floating-point operations of one sample in evaluation; counted as, and None where, `train_flops` says."""

    def forward(copied: nn.Module, inputs: Tensor) -> None:
        copied.eval()
        with torch.no_grad():
            copied(inputs)

    return _flops_per_sample(net, inputs_shape, forward)


def rates(ceilings: Measured) -> dict[str, float]:
    """The ceilings themselves, by the names that MLflow shows."""
    return {
        "ceiling/matmul_tflops": ceilings.matmul_flops / 1e12,
        "ceiling/memory_gb_per_second": ceilings.memory_bytes_per_second / 1e9,
        "ceiling/synthetic_images_per_second": ceilings.images_per_second,
    }


def efficiency(images_per_second: float, ceilings: Measured, flops_per_image: float | None) -> dict[str, float]:
    """What a training at `images_per_second` made of the machine, by the names that MLflow shows.

    Model FLOPs utilisation is that of PaLM (Chowdhery et al. 2022, appendix B), but over the rate of this machine's
    own products, not a data sheet's; it is left out where `flops_per_image` is None.
    """
    figures = rates(ceilings) | {"efficiency/vs_synthetic": images_per_second / ceilings.images_per_second}
    if flops_per_image is not None:
        utilisation = images_per_second * flops_per_image / ceilings.matmul_flops
        figures["efficiency/model_flops_utilisation"] = utilisation
    return figures


def best(taken: Sequence[Measured]) -> Measured:
    """The ceilings that several measurements found together: the fastest of each, and the slowest window of all."""
    return Measured(
        matmul_flops=max(each.matmul_flops for each in taken),
        memory_bytes_per_second=max(each.memory_bytes_per_second for each in taken),
        images_per_second=max(each.images_per_second for each in taken),
        slowest_images_per_second=min(each.slowest_images_per_second for each in taken),
    )


def verdict(figures: Mapping[str, float], ceilings: Measured) -> str:
    """These figures (`efficiency`'s) in a sentence for people. It names the cause of what is above 1."""
    share = figures["efficiency/vs_synthetic"]
    said = f"images passed at {_percent(share)} of the speed of one fixed batch"
    if share > 1:
        said += (
            f": the machine may have been slower while that was measured (its windows were {ceilings.spread:.1%} apart)"
        )
    utilisation = figures.get("efficiency/model_flops_utilisation")
    if utilisation is not None:
        said += f"; the model's operations took {_percent(utilisation)} of the rate of this machine's matrix products"
        if utilisation > 1:
            said += (
                ": its convolutions may need fewer operations than are counted, or it was slower while products were "
                "measured"
            )
    return said


def impossible(figures: Mapping[str, float], ceilings: Measured) -> str | None:
    """Why these figures (`efficiency`'s) can't be this machine's, in a sentence for people; None where they can.

    Other load while the ceilings were measured makes them look low, so measure them again before accusing a clock.
    """
    share = figures["efficiency/vs_synthetic"]
    utilisation = figures.get("efficiency/model_flops_utilisation", 0.0)
    speed = share * figures["ceiling/synthetic_images_per_second"]
    if share > TRUST:
        against = f"{share:.2f} times what this machine did with one fixed batch"
    elif utilisation > TRUST_PRODUCTS:
        against = f"{utilisation:.2f} times what the rate of its matrix products allows"
    else:
        return None
    return (
        f"{speed:,.0f} images/s is {against}: the clock was read too early, or the machine was slower whenever that "
        f"was measured (its windows were {ceilings.spread:.0%} apart)"
    )


def _percent(share: float) -> str:
    """Of a share just above 1 it shows that it is."""
    return f"{share:.1%}" if share > 1 else f"{share:.0%}"


def _product_flops(backend: Backend, dtype: torch.dtype) -> float:
    best, side = 0.0, SMALLEST_SIDE
    while True:
        seconds = _product_seconds(backend, dtype, side)
        best = max(best, 2 * side**3 / seconds)
        if seconds >= LONG_PRODUCT_SECONDS or side >= LARGEST_SIDE:
            return best
        side *= 2


def _product_seconds(backend: Backend, dtype: torch.dtype, side: int) -> float:
    """Its matrices are gone when it returns, before those of the next side are made."""
    left, right = (_normal(backend, dtype, side, seed) for seed in range(2))
    product = torch.empty_like(left)
    return fastest(lambda: torch.mm(left, right, out=product), backend.synchronize, seconds=SIDE_SECONDS)


def _normal(backend: Backend, dtype: torch.dtype, side: int, seed: int) -> Tensor:
    """(side, side) on the device: a random normal block made on the CPU, the same everywhere, repeated.

    Zeros would flatter: they switch few transistors, so that a card at its power limit clocks higher (He 2024,
    "Strangely, Matrix Multiplications on GPUs Run Faster When Given 'Predictable' Data!").
    """
    block = torch.randn(SMALLEST_SIDE, SMALLEST_SIDE, generator=torch.Generator().manual_seed(seed))
    times = side // SMALLEST_SIDE
    return block.to(backend.device, dtype).repeat(times, times)


def _flops_per_sample(
    net: nn.Module, inputs_shape: tuple[int, ...], run: Callable[[nn.Module, Tensor], None]
) -> float | None:
    """What `run` does to a copy of `net` with a batch, counted on the meta device, where nothing is computed."""
    counter = flop_counter.FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward_flops}
    )
    try:
        copied = copy.deepcopy(net).to("meta")
        with counter:
            # Two samples: BatchNorm in training mode refuses one where it has one value a channel.
            run(copied, torch.empty((2, *inputs_shape), device="meta"))
    except Exception:  # whatever a network does that needs values: no training shall end for want of a count
        return None
    return counter.get_total_flops() / 2


def _convolution_backward_flops(
    grad_shape: Sequence[int],
    inputs_shape: Sequence[int],
    weight_shape: Sequence[int],
    bias_shape: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    needed: Sequence[bool],
    out_shape: object,
) -> int:
    """The gradients of inputs and of weights take the forward pass's multiply-adds each, where needed.

    torch 2.14's own formula for the weights' forgets the groups: `groups` times too much, so 14 times too much
    for a whole step of EfficientNet-B0.
    """
    forward = flop_counter.conv_flop_count(list(inputs_shape), list(weight_shape), list(grad_shape), transposed)
    return forward * sum(needed[:2])
