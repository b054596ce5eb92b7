"""Measure this machine's peak rates before a training, in seconds, and compare the training with them."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import flop_counter

from pipeline.devices import Backend

WINDOW_SECONDS = 0.05
"""Length of a timed window: thousands of times the clock's resolution, but short enough to fall between other load."""

MIN_WINDOW_SECONDS = 1e-6
"""Lower limit for the length of the first window, which has one call: a coarse clock may measure 0."""

MIN_SIDE, MAX_SIDE = 512, 8192
"""Smallest and largest side of the square matrices to multiply. Sides double in between."""

LONG_MATMUL_SECONDS = 0.02
"""A product that takes this long uses the whole device. No larger one is tried."""

COPY_SIDE, CPU_COPY_SIDE = 8192, 5632
"""Sides of the float32 matrix to copy: 256 MiB, or 121 MiB on a CPU, since it counts in the process's peak memory."""

MATMUL_SECONDS, COPY_SECONDS = 0.1, 0.3
"""How long to measure the products of one side, and the copies."""

STEP_SECONDS, STEP_WINDOWS = 0.5, 3
"""How long to measure the training's own step, and the least number of windows. A training that is shorter than this is
not compared with the peaks: its first steps are slow, or other load may have spared it but no window."""

MAX_VS_SYNTHETIC = 1.05
"""The highest plausible speed of a training, relative to the speed with one fixed batch."""

MAX_UTILISATION = 4 * MAX_VS_SYNTHETIC
"""The highest plausible rate of a training's operations, relative to the rate of matrix products. Winograd convolutions
save up to 3/4 of the counted multiplications (Lavin and Gray 2015)."""


@dataclass(frozen=True)
class Peaks:
    """A machine's peak rates, for one training step at one precision."""

    matmul_flops: float
    """Floating-point operations per second of the fastest matrix product."""

    memory_bytes_per_second: float
    """Bytes read plus bytes written by a copy."""

    images_per_second: float
    """Speed of the training's own step, repeated on one fixed batch on the device."""


def time_calls(
    work: Callable[[], object],
    synchronize: Callable[[], None],
    *,
    seconds: float,
    min_windows: int = 2,
    now: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Call `work` for `seconds` and at least `min_windows` windows of about 50 ms. Returns the mean seconds per call in
    each window.

    The first call is not timed. The device is synchronized before and after a window, not between its calls.
    """

    def window(calls: int) -> float:
        synchronize()
        start = now()
        for _ in range(calls):
            work()
        synchronize()
        return now() - start

    work()
    total = max(window(1), MIN_WINDOW_SECONDS)
    means = [total]
    calls = max(1, round(WINDOW_SECONDS / total))
    while total < seconds or len(means) < min_windows:
        elapsed = window(calls)
        means.append(elapsed / calls)
        total += elapsed
    return means


def matmul_flops(backend: Backend, precision: str) -> float:
    """Floating-point operations per second of the fastest square matrix product at `precision`, over several sides.

    A product of side n has 2 n^3 operations: a multiply-add counts as two (Golub and Van Loan, Matrix Computations,
    section 1.1). Call `backend.set_precision` before. For bf16 and fp16, float32 is tried too, since it is faster on a
    device that emulates them. Needs up to 768 MiB on the device, and raises torch's error if there is less.
    """
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    best = 0.0
    for dtype in {torch.float32, half}:
        side, seconds = MIN_SIDE, 0.0
        while side <= MAX_SIDE and seconds < LONG_MATMUL_SECONDS:
            seconds = _matmul_seconds(backend, dtype, side)
            best = max(best, 2 * side**3 / seconds)
            side *= 2
    return best


def memory_bytes_per_second(backend: Backend) -> float:
    """Bytes read plus bytes written per second when the device copies 256 MiB (a CPU: 121) within its own memory.

    The bytes count as in STREAM's copy (McCalpin 1995), although a CPU that reads a cache line before it overwrites it
    moves half as much again. If a last-level cache holds both matrices, the result is partly its speed. Raises torch's
    error if there is too little memory.
    """
    source = _random_matrix(backend, torch.float32, COPY_SIDE if backend.asynchronous else CPU_COPY_SIDE, seed=0)
    target = torch.empty_like(source)
    seconds = min(time_calls(lambda: target.copy_(source), backend.synchronize, seconds=COPY_SECONDS))
    return (source.nbytes + target.nbytes) / seconds


def train_flops(
    net: nn.Module, inputs_shape: tuple[int, ...], *, set_mode: Callable[[nn.Module], None]
) -> float | None:
    """Floating-point operations per sample of a training step: the forward pass, and the part of the backward pass that
    the trainable parameters need. None if they can't be counted.

    `inputs_shape` is the shape of one sample, (C, H, W) or (D,). `set_mode` puts a copy of `net` into training mode.
    Matrix products and convolutions are counted by their shapes, a multiply-add as two (torch/utils/flop_counter.py).
    Element-wise operations (normalization, activations, optimizer) are not counted.
    """

    def step(net: nn.Module, inputs: Tensor) -> None:
        set_mode(net)
        labels = torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device)
        with torch.enable_grad():
            F.cross_entropy(net(inputs), labels).backward()  # type: ignore[no-untyped-call]

    return _flops_per_sample(net, inputs_shape, step)


def forward_flops(net: nn.Module, inputs_shape: tuple[int, ...]) -> float | None:
    """Floating-point operations per sample of a forward pass in evaluation mode, counted like `train_flops`."""
    return _flops_per_sample(net, inputs_shape, lambda net, inputs: net.eval()(inputs))


def peak_metrics(peaks: Peaks) -> dict[str, float]:
    """The peak rates as MLflow metrics."""
    return {
        "ceiling/matmul_tflops": peaks.matmul_flops / 1e12,
        "ceiling/memory_gb_per_second": peaks.memory_bytes_per_second / 1e9,
        "ceiling/synthetic_images_per_second": peaks.images_per_second,
    }


def efficiency_metrics(images_per_second: float, peaks: Peaks, flops_per_image: float | None) -> dict[str, float]:
    """The MLflow metrics of the peak rates, and of how close a training at `images_per_second` came to them.

    Model FLOPs utilisation is defined as for PaLM (Chowdhery et al. 2022, appendix B), but relative to this machine's
    measured rate of matrix products, not to a data sheet. It is left out if `flops_per_image` is None.
    """
    metrics = peak_metrics(peaks) | {"efficiency/vs_synthetic": images_per_second / peaks.images_per_second}
    if flops_per_image is not None:
        utilisation = images_per_second * flops_per_image / peaks.matmul_flops
        metrics["efficiency/model_flops_utilisation"] = utilisation
    return metrics


def combine(measurements: Sequence[Peaks]) -> Peaks:
    """The highest of each rate."""
    return Peaks(*(max(rates) for rates in zip(*map(astuple, measurements), strict=True)))


def describe(metrics: Mapping[str, float]) -> str:
    """A sentence for the metrics of `efficiency_metrics`, with the likely causes if one is above 1."""
    shares = [metrics["efficiency/vs_synthetic"], metrics.get("efficiency/model_flops_utilisation", 0.0)]
    # Above 1, show one more digit, so that 100.4% does not appear as 100%.
    fixed_batch, utilisation = (f"{share:.1%}" if share > 1 else f"{share:.0%}" for share in shares)
    sentence = f"images passed at {fixed_batch} of the speed of one fixed batch"
    if shares[1]:
        sentence += f"; the model's operations took {utilisation} of the rate of this machine's matrix products"
    if max(shares) > 1:
        sentence += " (the machine was slower while that was measured, or convolutions need fewer operations)"
    return sentence


def implausible_reason(metrics: Mapping[str, float]) -> str | None:
    """A sentence that says why the metrics of `efficiency_metrics` can't be right; None if they can.

    Other load on the machine makes the peaks too low. So measure them again before you report this.
    """
    share = metrics["efficiency/vs_synthetic"]
    utilisation = metrics.get("efficiency/model_flops_utilisation", 0.0)
    speed = share * metrics["ceiling/synthetic_images_per_second"]
    if share > MAX_VS_SYNTHETIC:
        excess = f"{share:.2f} times what this machine did with one fixed batch"
    elif utilisation > MAX_UTILISATION:
        excess = f"{utilisation:.2f} times what the rate of its matrix products allows"
    else:
        return None
    return f"{speed:,.0f} images/s is {excess}: the clock was read too early, or the machine was slower before"


def _matmul_seconds(backend: Backend, dtype: torch.dtype, side: int) -> float:
    """Seconds of one product. A function of its own, so that its matrices are freed before larger ones are created."""
    left, right = (_random_matrix(backend, dtype, side, seed) for seed in range(2))
    product = torch.empty_like(left)
    return min(time_calls(lambda: torch.mm(left, right, out=product), backend.synchronize, seconds=MATMUL_SECONDS))


def _random_matrix(backend: Backend, dtype: torch.dtype, side: int, seed: int) -> Tensor:
    """A (side, side) matrix on the device that repeats one block of normal random numbers. Not zeros: they switch fewer
    transistors, so that a card at its power limit would run at a higher clock."""
    block = torch.randn(MIN_SIDE, MIN_SIDE, generator=torch.Generator().manual_seed(seed))
    return block.to(backend.device, dtype).repeat(side // MIN_SIDE, side // MIN_SIDE)


def _flops_per_sample(
    net: nn.Module, inputs_shape: tuple[int, ...], run: Callable[[nn.Module, Tensor], None]
) -> float | None:
    """Count the operations of `run` on a copy of `net` on the meta device, where nothing is computed."""
    counter = flop_counter.FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward_flops}
    )
    try:
        meta_net = copy.deepcopy(net).to("meta")
        with counter, torch.no_grad():
            # Two samples, since BatchNorm in training mode rejects a single value per channel.
            run(meta_net, torch.empty((2, *inputs_shape), device="meta"))
    except Exception:  # a network may need real values, which must not end the training
        return None
    return counter.get_total_flops() / 2


def _convolution_backward_flops(
    grad_shape: Sequence[int],
    inputs_shape: Sequence[int],
    weight_shape: Sequence[int],
    *rest: Any,
    out_shape: object,
) -> int:
    """Operations of a convolution's backward pass: as many as the forward pass for each of the two gradients, of inputs
    and of weights, that is needed.

    torch 2.14's own formula ignores the groups, and so counts the weights' gradient `groups` times.
    """
    _bias_shape, _stride, _padding, _dilation, transposed, _output_padding, _groups, output_mask = rest
    forward: int = flop_counter.conv_flop_count(list(inputs_shape), list(weight_shape), list(grad_shape), transposed)
    return forward * int(output_mask[0] + output_mask[1])
