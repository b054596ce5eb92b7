"""Peak rates of this machine, measured in seconds before a training, and how close the training came to them."""

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
"""Length of a timed window: thousands of times the clock's resolution, short enough to fall between other load."""

MIN_WINDOW_SECONDS = 1e-6
"""Least length that the first window, of one call, counts as: a coarse clock may read none."""

MIN_SIDE, MAX_SIDE = 512, 8192
"""Sides of the square matrices that are multiplied: MIN_SIDE, doubled up to MAX_SIDE."""

LONG_MATMUL_SECONDS = 0.02
"""A product that takes this long has filled the device: no larger one is tried."""

COPY_SIDE, CPU_COPY_SIDE = 8192, 5632
"""Side of the float32 matrix that is copied: 256 MiB; 121 MiB on a CPU, where it counts in the process's peak."""

MATMUL_SECONDS, COPY_SECONDS = 0.1, 0.3
"""How long products of one side, and copies, are measured."""

STEP_SECONDS, STEP_WINDOWS = 0.5, 3
"""How long the training's own step is measured, and in how many windows at least. A shorter training is not compared
with the peaks: its first steps are slow, and it may have had calmer moments than any window."""

MAX_VS_SYNTHETIC = 1.05
"""How many times the speed of one fixed batch a training may reach before its clock is doubted."""

MAX_UTILISATION = 4 * MAX_VS_SYNTHETIC
"""How many times the rate of matrix products it may reach: Winograd convolutions save up to 3 of 4 of the counted
multiplications (Lavin and Gray 2015)."""


@dataclass(frozen=True)
class Peaks:
    """The peak rates of one machine, for one training step at one precision."""

    matmul_flops: float
    """Floating-point operations a second of its fastest matrix product."""

    memory_bytes_per_second: float
    """Bytes read and written by a copy."""

    images_per_second: float
    """Of the training's own step, repeated on one fixed batch on the device."""


def time_calls(
    work: Callable[[], object],
    synchronize: Callable[[], None],
    *,
    seconds: float,
    min_windows: int = 2,
    now: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Seconds of one call of `work`, a mean for each window of about 50 ms, for `seconds` and at least `min_windows`.

    The first call is not timed. The device is synchronized at both ends of a window, not between its calls.
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
    """Floating-point operations a second of a square matrix product at `precision`: the fastest of the sides tried.

    A product of side n counts 2 n^3 operations, a multiply-add as two (Golub and Van Loan, Matrix Computations, section
    1.1). `backend.set_precision` must have set what float32 means. float32 is tried for bf16 and fp16 too: a device
    that only emulates these computes faster in float32. Needs up to 768 MiB on the device; raises torch's error where
    there is less.
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
    """Bytes read plus bytes written a second when the device copies 256 MiB (a CPU: 121) within its own memory.

    Counted like STREAM's copy (McCalpin 1995): a CPU that reads a cache line before it overwrites it moves half as much
    again. Where a last-level cache holds both matrices, this is in part its speed. Raises torch's error where there is
    too little memory.
    """
    source = _random_matrix(backend, torch.float32, COPY_SIDE if backend.asynchronous else CPU_COPY_SIDE, seed=0)
    target = torch.empty_like(source)
    seconds = min(time_calls(lambda: target.copy_(source), backend.synchronize, seconds=COPY_SECONDS))
    return (source.nbytes + target.nbytes) / seconds


def train_flops(
    net: nn.Module, inputs_shape: tuple[int, ...], *, set_mode: Callable[[nn.Module], None]
) -> float | None:
    """Floating-point operations of one sample in one training step: the forward pass, and the part of the backward pass
    that the trainable parameters need. None where they can't be counted.

    `inputs_shape`: of one sample, (C, H, W) or (D,). `set_mode` puts a copy of `net` into training mode. Products and
    convolutions count by their shapes, a multiply-add as two (torch/utils/flop_counter.py); element-wise work
    (normalisation, activations, the optimizer) counts nothing.
    """

    def step(net: nn.Module, inputs: Tensor) -> None:
        set_mode(net)
        labels = torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device)
        with torch.enable_grad():
            F.cross_entropy(net(inputs), labels).backward()  # type: ignore[no-untyped-call]

    return _flops_per_sample(net, inputs_shape, step)


def forward_flops(net: nn.Module, inputs_shape: tuple[int, ...]) -> float | None:
    """Floating-point operations of one sample in evaluation, counted like `train_flops`."""
    return _flops_per_sample(net, inputs_shape, lambda net, inputs: net.eval()(inputs))


def peak_metrics(peaks: Peaks) -> dict[str, float]:
    """The peak rates by their names in MLflow."""
    return {
        "ceiling/matmul_tflops": peaks.matmul_flops / 1e12,
        "ceiling/memory_gb_per_second": peaks.memory_bytes_per_second / 1e9,
        "ceiling/synthetic_images_per_second": peaks.images_per_second,
    }


def efficiency_metrics(images_per_second: float, peaks: Peaks, flops_per_image: float | None) -> dict[str, float]:
    """The peak rates, and how close a training at `images_per_second` came to them, by their names in MLflow.

    Model FLOPs utilisation is PaLM's (Chowdhery et al. 2022, appendix B), but relative to the measured rate of this
    machine's products, not to a data sheet. It is left out where `flops_per_image` is None.
    """
    metrics = peak_metrics(peaks) | {"efficiency/vs_synthetic": images_per_second / peaks.images_per_second}
    if flops_per_image is not None:
        utilisation = images_per_second * flops_per_image / peaks.matmul_flops
        metrics["efficiency/model_flops_utilisation"] = utilisation
    return metrics


def combine(measurements: Sequence[Peaks]) -> Peaks:
    """The fastest of each rate."""
    return Peaks(*(max(rates) for rates in zip(*map(astuple, measurements), strict=True)))


def describe(metrics: Mapping[str, float]) -> str:
    """The metrics of `efficiency_metrics` in a sentence, with the likely causes if one is above 1."""
    shares = [metrics["efficiency/vs_synthetic"], metrics.get("efficiency/model_flops_utilisation", 0.0)]
    # With one more digit above 1, so that 100.4% does not read as 100%.
    fixed_batch, utilisation = (f"{share:.1%}" if share > 1 else f"{share:.0%}" for share in shares)
    sentence = f"images passed at {fixed_batch} of the speed of one fixed batch"
    if shares[1]:
        sentence += f"; the model's operations took {utilisation} of the rate of this machine's matrix products"
    if max(shares) > 1:
        sentence += " (the machine was slower while that was measured, or convolutions need fewer operations)"
    return sentence


def implausible_reason(metrics: Mapping[str, float]) -> str | None:
    """Why the metrics of `efficiency_metrics` can't be right, in a sentence; None where they can. Other load makes
    peaks too low, so measure them again before doubting a clock."""
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
    """A function of its own, so that its matrices are freed before those of the next side are made."""
    left, right = (_random_matrix(backend, dtype, side, seed) for seed in range(2))
    product = torch.empty_like(left)
    return min(time_calls(lambda: torch.mm(left, right, out=product), backend.synchronize, seconds=MATMUL_SECONDS))


def _random_matrix(backend: Backend, dtype: torch.dtype, side: int, seed: int) -> Tensor:
    """(side, side) on the device: a normal block drawn on the CPU, repeated. Zeros would flatter: they switch few
    transistors, so that a card at its power limit clocks higher."""
    block = torch.randn(MIN_SIDE, MIN_SIDE, generator=torch.Generator().manual_seed(seed))
    return block.to(backend.device, dtype).repeat(side // MIN_SIDE, side // MIN_SIDE)


def _flops_per_sample(
    net: nn.Module, inputs_shape: tuple[int, ...], run: Callable[[nn.Module, Tensor], None]
) -> float | None:
    """Operations of `run` on a copy of `net` and a batch, counted on the meta device, where nothing is computed."""
    counter = flop_counter.FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward_flops}
    )
    try:
        meta_net = copy.deepcopy(net).to("meta")
        with counter, torch.no_grad():
            # Two samples: BatchNorm in training mode refuses one where it has one value a channel.
            run(meta_net, torch.empty((2, *inputs_shape), device="meta"))
    except Exception:  # a network may do anything that needs values; that must not end a training
        return None
    return counter.get_total_flops() / 2


def _convolution_backward_flops(
    grad_shape: Sequence[int],
    inputs_shape: Sequence[int],
    weight_shape: Sequence[int],
    *rest: Any,
    out_shape: object,
) -> int:
    """The gradients of inputs and of weights take the forward pass's operations each, where they are needed.

    torch 2.14's own formula for the weights' gradient forgets the groups, and so counts it `groups` times.
    """
    _bias_shape, _stride, _padding, _dilation, transposed, _output_padding, _groups, output_mask = rest
    forward: int = flop_counter.conv_flop_count(list(inputs_shape), list(weight_shape), list(grad_shape), transposed)
    return forward * int(output_mask[0] + output_mask[1])
