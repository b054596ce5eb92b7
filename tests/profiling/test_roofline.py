"""Ceilings are measured with the device waited for, counted as defined, and held against a training rightly."""

import functools
import math

import pytest
import timm
import torch
from standin import Standin
from torch import nn

from pipeline.devices.cpu import Cpu
from pipeline.models import classifier
from pipeline.profiling import roofline

MEASURED = roofline.Measured(
    matmul_flops=2e12, memory_bytes_per_second=5e10, images_per_second=1000.0, slowest_images_per_second=800.0
)


@pytest.fixture
def backend():
    return Standin()


def scripted(backend, durations):
    """Work whose calls keep `backend` busy for these seconds, one after the other."""
    left = iter(durations)

    def work():
        backend.calls.append("work")
        backend.queue(next(left))

    return work


def windows_of(calls):
    """Calls of `work` between two readings of the clock, window by window."""
    readings = [index for index, call in enumerate(calls) if call == "now"]
    return [calls[start:end].count("work") for start, end in zip(readings[::2], readings[1::2], strict=True)]


def test_no_clock_is_read_before_the_device_is_waited_for(backend):
    roofline.fastest(scripted(backend, [2.0] * 9), backend.synchronize, seconds=8, now=backend.now)
    before = [backend.calls[index - 1] for index, call in enumerate(backend.calls) if call == "now"]
    assert before == ["synchronize"] * 8


def test_the_fastest_window_counts(backend):
    work = scripted(backend, [0.5, 4.0, 3.0, 5.0])  # the first is not timed
    assert roofline.fastest(work, backend.synchronize, seconds=12, now=backend.now) == 3
    assert windows_of(backend.calls) == [1, 1, 1]


def test_two_windows_are_timed_of_the_slowest_work(backend):
    work = scripted(backend, [9.0, 7.0, 8.0])
    assert roofline.fastest(work, backend.synchronize, seconds=1, now=backend.now) == 7
    assert windows_of(backend.calls) == [1, 1]


def test_every_window_is_told_as_many_as_are_asked_for_at_least(backend):
    work = scripted(backend, [9.0, 3.0, 1.0, 2.0, 7.0])
    assert roofline.windows(work, backend.synchronize, seconds=1, least=3, now=backend.now) == [3, 1, 2]
    assert windows_of(backend.calls) == [1, 1, 1]


def test_fast_work_is_called_many_times_a_window(backend):
    call = 2**-8
    work = scripted(backend, [5.0, 2 * call, *[call] * 6, *[call / 2] * 6])
    assert roofline.fastest(work, backend.synchronize, seconds=8.5 * call, now=backend.now) == call / 2
    assert windows_of(backend.calls) == [1, 6, 6]  # 50 ms are 6.4 times the first window


def test_work_too_fast_for_the_clock(backend):
    work = scripted(backend, [0.0, 0.0, *[2**-20] * 50_000])
    assert roofline.fastest(work, backend.synchronize, seconds=0, now=backend.now) == 2**-20
    assert windows_of(backend.calls) == [1, 50_000]


def test_by_itself_it_times_for_about_the_seconds_asked():
    assert roofline.fastest(lambda: sum(range(1000)), lambda: None, seconds=0.001) > 0


@pytest.fixture
def small(monkeypatch):
    """Sizes and times that a test can afford."""
    for name, value in {
        "WINDOW_SECONDS": 1e-4,
        "SMALLEST_SIDE": 16,
        "LARGEST_SIDE": 64,
        "SIDE_SECONDS": 0,
        "COPIED_SIDE": 128,
        "HOST_COPIED_SIDE": 64,
        "COPY_SECONDS": 0,
    }.items():
        monkeypatch.setattr(roofline, name, value)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_products_on_the_cpu(small, precision):
    state = torch.get_rng_state()
    with torch.no_grad():
        rate = roofline.matmul_flops(Cpu(), precision)
    assert math.isfinite(rate)
    assert rate > 0
    assert torch.equal(state, torch.get_rng_state())  # the training's random choices stay what they were


def rates(monkeypatch, table):
    """Lets products take the seconds in `table`, by format and side; gives those that were timed."""
    timed = []

    def seconds(backend, dtype, side):
        timed.append((dtype, side))
        return table[dtype][side]

    monkeypatch.setattr(roofline, "_product_seconds", seconds)
    return timed


def test_the_best_side_counts_and_none_larger_than_a_long_product(monkeypatch):
    timed = rates(monkeypatch, {torch.float32: {512: 0.001, 1024: 0.004, 2048: 0.04}})
    assert roofline.matmul_flops(Cpu(), "fp32") == 2 * 1024**3 / 0.004
    assert timed == [(torch.float32, side) for side in (512, 1024, 2048)]


def test_no_side_is_larger_than_the_largest(monkeypatch):
    timed = rates(monkeypatch, {torch.float32: {512 * 2**power: 1e-4 for power in range(5)}})
    assert roofline.matmul_flops(Cpu(), "tf32") == 2 * 8192**3 / 1e-4
    assert len(timed) == 5


@pytest.mark.parametrize(("half", "expected"), [(0.05, 2 * 512**3 / 0.03), (0.02, 2 * 512**3 / 0.02)])
def test_a_format_that_is_only_emulated_is_no_ceiling(monkeypatch, half, expected):
    timed = rates(monkeypatch, {torch.float32: {512: 0.03}, torch.bfloat16: {512: half}})
    assert roofline.matmul_flops(Cpu(), "bf16") == expected
    assert set(timed) == {(torch.float32, 512), (torch.bfloat16, 512)}


def test_what_is_multiplied_is_random_and_the_same_everywhere(small):
    first, again = (roofline._normal(Cpu(), torch.bfloat16, 64, seed=0) for _ in range(2))
    assert first.shape == (64, 64)
    assert first.dtype == torch.bfloat16
    assert torch.equal(first, again)
    assert first.count_nonzero() == 64 * 64
    assert not torch.equal(first, roofline._normal(Cpu(), torch.bfloat16, 64, seed=1))


def test_copies_on_the_cpu(small):
    rate = roofline.memory_bytes_per_second(Cpu())
    assert math.isfinite(rate)
    assert rate > 0


@pytest.mark.parametrize(("asynchronous", "side"), [(False, 64), (True, 128)])
def test_a_copy_counts_what_it_reads_and_what_it_writes(small, monkeypatch, asynchronous, side):
    monkeypatch.setattr(Cpu, "asynchronous", asynchronous)
    monkeypatch.setattr(roofline, "fastest", lambda work, synchronize, *, seconds: (work(), 0.5)[1])
    assert roofline.memory_bytes_per_second(Cpu()) == 2 * side * side * 4 / 0.5


def resnet(trainable):
    net = timm.create_model("resnet18", pretrained=False, num_classes=10)
    for name, parameter in net.named_parameters():
        parameter.requires_grad = trainable == "all" or name.startswith("fc.")
    return net


@functools.cache
def convolutions():
    """Operations of each of ResNet-18's convolutions on one image of 96 x 96, by hand from its layers' shapes."""
    found = {}

    def note(name, layer, args, output):
        height, width = output.shape[2:]
        kernel = layer.kernel_size[0] * layer.kernel_size[1]
        found[name] = 2 * kernel * layer.in_channels * layer.out_channels * height * width

    net = resnet("all").eval()
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(functools.partial(note, name))
    with torch.no_grad():
        net(torch.zeros(1, 3, 96, 96))
    return found


HEAD = 2 * 512 * 10


def train_mode(net):
    net.train()


def test_forward_operations_of_a_resnet():
    assert len(convolutions()) == 20
    assert roofline.forward_flops(resnet("all"), (3, 96, 96)) == sum(convolutions().values()) + HEAD


def test_a_step_that_trains_all_of_it():
    forward = sum(convolutions().values()) + HEAD
    # Backward: gradients of weights and of inputs, but nobody asks for those of the images.
    expected = 3 * forward - convolutions()["conv1"]
    assert roofline.train_flops(resnet("all"), (3, 96, 96), set_mode=train_mode) == expected


@pytest.mark.parametrize("frozen_batch_norm", ["train", "eval"])
def test_a_step_that_trains_the_head_alone(frozen_batch_norm):
    mode = functools.partial(classifier.set_mode, frozen_batch_norm=frozen_batch_norm)
    expected = sum(convolutions().values()) + 2 * HEAD
    assert roofline.train_flops(resnet("head"), (3, 96, 96), set_mode=mode) == expected


@pytest.mark.parametrize(
    ("grouped", "forward"),
    [
        (nn.Conv2d(8, 12, 3, padding=1, groups=4), 2 * 9 * (8 // 4) * 12 * 6 * 6),
        (nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8), 2 * 9 * 8 * 3 * 3),
        (nn.ConvTranspose2d(8, 12, 2, stride=2, groups=4), 2 * 4 * 8 * (12 // 4) * 6 * 6),
    ],
    ids=["grouped", "depthwise", "transposed"],
)
def test_grouped_convolutions(grouped, forward):
    first = 2 * 3 * 8 * 6 * 6
    net = nn.Sequential(nn.Conv2d(3, 8, 1), grouped, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert roofline.forward_flops(net, (3, 6, 6)) == first + forward
    assert roofline.train_flops(net, (3, 6, 6), set_mode=train_mode) == 2 * first + 3 * forward


def test_a_head_on_features():
    head = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    assert roofline.forward_flops(head, (16,)) == 2 * 16 * 8 + 2 * 8 * 3
    with torch.no_grad():  # the caller's: gradients are counted all the same
        assert roofline.train_flops(head, (16,), set_mode=train_mode) == 2 * (2 * 16 * 8) + 3 * (2 * 8 * 3)


def test_counting_leaves_no_trace():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(64, 2)).eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()
    assert roofline.train_flops(net, (3, 6, 6), set_mode=train_mode)
    assert roofline.forward_flops(net.train(), (3, 6, 6))
    assert net.training
    assert all(module.training for module in net.modules())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


class Choosing(nn.Module):
    """Goes by what it is shown, which the meta device can't tell."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, inputs):
        return self.layer(inputs if inputs.sum() > 0 else -inputs)


def test_what_cannot_be_counted_is_left_out():
    assert roofline.forward_flops(Choosing(), (4,)) is None
    assert roofline.train_flops(Choosing(), (4,), set_mode=train_mode) is None
    assert roofline.forward_flops(nn.Linear(4, 2), (5,)) is None
    frozen = nn.Linear(4, 2).requires_grad_(False)
    assert roofline.train_flops(frozen, (4,), set_mode=train_mode) is None


def test_efficiency():
    assert roofline.efficiency(800.0, MEASURED, 5e8) == {
        "efficiency/vs_synthetic": 0.8,
        "efficiency/model_flops_utilisation": 0.2,
        "ceiling/matmul_tflops": 2.0,
        "ceiling/memory_gb_per_second": 50.0,
        "ceiling/synthetic_images_per_second": 1000.0,
    }
    assert roofline.rates(MEASURED).items() < roofline.efficiency(800.0, MEASURED, None).items()
    without = roofline.efficiency(800.0, MEASURED, None)
    assert set(roofline.efficiency(800.0, MEASURED, 5e8)) - set(without) == {"efficiency/model_flops_utilisation"}


@pytest.mark.parametrize(
    ("images_per_second", "utilisation", "said"),
    [
        (830, None, "images passed at 83% of the speed of one fixed batch"),
        (1000, None, "images passed at 100% of the speed of one fixed batch"),
        (
            980,
            0.343,
            "images passed at 98% of the speed of one fixed batch; the model's operations took 34% of the rate of this "
            "machine's matrix products",
        ),
    ],
)
def test_the_verdict_says_the_shares_without_a_guess_at_what_limits(images_per_second, utilisation, said):
    flops = utilisation and utilisation / images_per_second * MEASURED.matmul_flops
    assert roofline.verdict(roofline.efficiency(images_per_second, MEASURED, flops), MEASURED) == said


def test_nothing_above_1_is_said_without_its_cause():
    faster = roofline.verdict(roofline.efficiency(1004.0, MEASURED, None), MEASURED)
    assert "100.4% of the speed of one fixed batch: the machine may have been slower" in faster
    assert "its windows were 25.0% apart" in faster
    flops = 1.99 / 900 * MEASURED.matmul_flops
    products = roofline.verdict(roofline.efficiency(900.0, MEASURED, flops), MEASURED)
    assert "90% of the speed of one fixed batch;" in products
    assert "199.0% of the rate of this machine's matrix products: " in products


@pytest.mark.parametrize(
    ("share", "utilisation", "said"),
    [
        (1.05, 4.2, None),
        (0.5, None, None),
        (1.31, 0.4, "1,310 images/s is 1.31 times what this machine did with one fixed batch: "),
        (1.051, None, "1,051 images/s is 1.05 times what this machine did with one fixed batch: "),
        (12.345, 9.0, "12,345 images/s is 12.35 times what this machine did with one fixed batch: "),
        (1.0, 4.3, "1,000 images/s is 4.30 times what the rate of its matrix products allows: "),
    ],
)
def test_what_no_clock_can_be_trusted_with(share, utilisation, said):
    figures = roofline.efficiency(1000.0 * share, MEASURED, None)
    if utilisation is not None:
        figures["efficiency/model_flops_utilisation"] = utilisation
    doubt = roofline.impossible(figures, MEASURED)
    if said is None:
        assert doubt is None
    else:
        assert doubt.startswith(said) and doubt.endswith("(its windows were 25% apart)")


def test_several_measurements_are_one_with_the_best_of_each_and_the_slowest_window():
    other = roofline.Measured(
        matmul_flops=3e12, memory_bytes_per_second=4e10, images_per_second=900.0, slowest_images_per_second=700.0
    )
    best = roofline.best([MEASURED, other])
    assert best == roofline.Measured(3e12, 5e10, 1000.0, 700.0) and best.spread == pytest.approx(3 / 7)
    assert roofline.best([MEASURED]) == MEASURED
