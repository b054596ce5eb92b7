"""Peak rates are measured on a synchronized device, operations are counted, and a training is compared with them."""

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

PEAKS = roofline.Peaks(matmul_flops=2e12, memory_bytes_per_second=5e10, images_per_second=1000.0)


@pytest.fixture
def time_scripted():
    """Time work whose calls take these seconds, on a stand-in for an asynchronous device.

    Returns the means that `time_calls` gives, and the device with its `calls`.
    """

    def run(durations, **options):
        device = Standin()
        remaining = iter(durations)

        def work():
            device.calls.append("work")
            device.queue(next(remaining))

        return roofline.time_calls(work, device.synchronize, now=device.now, **options), device

    return run


def test_no_clock_is_read_before_the_device_is_synchronized(time_scripted):
    _, device = time_scripted([2.0] * 9, seconds=8)
    before = [device.calls[index - 1] for index, call in enumerate(device.calls) if call == "now"]
    assert before == ["synchronize"] * 8


CALL = 2**-8


@pytest.mark.parametrize(
    ("durations", "options", "means", "calls"),
    [
        ([0.5, 4.0, 3.0, 5.0], {"seconds": 12}, [4, 3, 5], [1, 1, 1]),  # the first is not timed
        ([9.0, 3.0, 1.0, 2.0, 7.0], {"seconds": 1, "min_windows": 3}, [3, 1, 2], [1, 1, 1]),
        # 50 ms are 6.4 times the first window.
        ([5.0, 2 * CALL, *[CALL] * 6, *[CALL / 2] * 6], {"seconds": 8.5 * CALL}, [2 * CALL, CALL, CALL / 2], [1, 6, 6]),
        # Faster than the clock can tell.
        ([0.0, 0.0, *[2**-20] * 50_000], {"seconds": 0}, [1e-6, 2**-20], [1, 50_000]),
    ],
    ids=["first", "three windows", "fast", "too fast"],
)
def test_each_window_has_the_mean_of_its_calls(time_scripted, durations, options, means, calls):
    measured, device = time_scripted(durations, **options)
    readings = [index for index, call in enumerate(device.calls) if call == "now"]
    windows = zip(readings[::2], readings[1::2], strict=True)
    assert measured == means
    assert [device.calls[start:end].count("work") for start, end in windows] == calls


@pytest.fixture
def small(monkeypatch):
    """Use small sizes and short times."""
    for name, value in {
        "WINDOW_SECONDS": 1e-4, "MIN_SIDE": 16, "MAX_SIDE": 64, "MATMUL_SECONDS": 0,
        "COPY_SIDE": 128, "CPU_COPY_SIDE": 64, "COPY_SECONDS": 0,
    }.items():  # fmt: skip
        monkeypatch.setattr(roofline, name, value)


@pytest.mark.parametrize(
    ("precision", "seconds", "expected", "timed"),
    [
        # A product that takes 20 ms ends the search; the fastest side counts.
        ("fp32", {torch.float32: [0.001, 0.004, 0.04]}, 2 * 1024**3 / 0.004, 3),
        ("tf32", {torch.float32: [1e-4] * 5}, 2 * 8192**3 / 1e-4, 5),
        ("bf16", {torch.float32: [0.03], torch.bfloat16: [0.02]}, 2 * 512**3 / 0.02, 2),
        # A device that only emulates a format computes faster in float32.
        ("bf16", {torch.float32: [0.03], torch.bfloat16: [0.05]}, 2 * 512**3 / 0.03, 2),
    ],
)
def test_the_fastest_side_and_format_are_taken(monkeypatch, precision, seconds, expected, timed):
    sides = []

    def matmul_seconds(backend, dtype, side):
        sides.append(side)
        return seconds[dtype][int(math.log2(side // 512))]

    monkeypatch.setattr(roofline, "_matmul_seconds", matmul_seconds)
    assert roofline.matmul_flops(Cpu(), precision) == expected
    assert len(sides) == timed


def test_matrices_are_random_and_do_not_change_torchs_random_numbers(small):
    state = torch.get_rng_state()
    matrix = roofline._random_matrix(Cpu(), torch.bfloat16, 64, seed=0)
    assert matrix.shape == (64, 64) and matrix.count_nonzero() == 64 * 64
    assert 0 < roofline.matmul_flops(Cpu(), "bf16") < math.inf
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("asynchronous", "side"), [(False, 64), (True, 128)])
def test_a_copy_counts_the_bytes_it_reads_and_writes(small, monkeypatch, asynchronous, side):
    monkeypatch.setattr(Cpu, "asynchronous", asynchronous)
    assert 0 < roofline.memory_bytes_per_second(Cpu()) < math.inf
    monkeypatch.setattr(roofline, "time_calls", lambda work, synchronize, *, seconds: (work(), [0.5])[1])
    assert roofline.memory_bytes_per_second(Cpu()) == 2 * side * side * 4 / 0.5


def resnet(trainable):
    net = timm.create_model("resnet18", pretrained=False, num_classes=10)
    for name, parameter in net.named_parameters():
        parameter.requires_grad = trainable == "all" or name.startswith("fc.")
    return net


@functools.cache
def convolutions():
    """Layer -> operations of ResNet-18's convolutions on an image of 96 x 96, from the layers' shapes."""
    operations = {}

    def count(name, layer, args, output):
        height, width = output.shape[2:]
        kernel = layer.kernel_size[0] * layer.kernel_size[1]
        operations[name] = 2 * kernel * layer.in_channels * layer.out_channels * height * width

    net = resnet("all").eval()
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(functools.partial(count, name))
    with torch.no_grad():
        net(torch.zeros(1, 3, 96, 96))
    return operations


HEAD = 2 * 512 * 10


def train_mode(net):
    net.train()


def test_operations_of_a_resnet_and_of_its_training_step():
    forward = sum(convolutions().values()) + HEAD
    assert len(convolutions()) == 20
    assert roofline.forward_flops(resnet("all"), (3, 96, 96)) == forward
    # Backward: gradients of weights and of inputs, but nobody asks for those of the images.
    expected = 3 * forward - convolutions()["conv1"]
    assert roofline.train_flops(resnet("all"), (3, 96, 96), set_mode=train_mode) == expected


@pytest.mark.parametrize("frozen_batch_norm", ["train", "eval"])
def test_a_step_that_trains_the_head_alone(frozen_batch_norm):
    mode = functools.partial(classifier.set_train_mode, frozen_batch_norm=frozen_batch_norm)
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


def test_counting_changes_neither_the_network_nor_random_numbers():
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
    """A network with a branch on a tensor's value, which the meta device does not have."""

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
    metrics = roofline.efficiency_metrics(800.0, PEAKS, 5e8)
    assert metrics == {
        "efficiency/vs_synthetic": 0.8,
        "efficiency/model_flops_utilisation": 0.2,
        "ceiling/matmul_tflops": 2.0,
        "ceiling/memory_gb_per_second": 50.0,
        "ceiling/synthetic_images_per_second": 1000.0,
    }
    uncounted = roofline.efficiency_metrics(800.0, PEAKS, None)
    assert metrics.keys() - uncounted.keys() == {"efficiency/model_flops_utilisation"}


@pytest.mark.parametrize(
    ("images_per_second", "utilisation", "shown"),
    [(830, None, ["83% of"]), (980, 0.343, ["98% of", "34% of"]), (1004, 1.99, ["100.4% of", "199.0% of"])],
)
def test_the_sentence_has_the_shares_and_explains_those_above_1(images_per_second, utilisation, shown):
    flops = utilisation and utilisation / images_per_second * PEAKS.matmul_flops
    sentence = roofline.describe(roofline.efficiency_metrics(images_per_second, PEAKS, flops))
    assert all(text in sentence for text in shown)
    assert ("slower" in sentence) == (images_per_second > 1000)


@pytest.mark.parametrize(
    ("share", "utilisation", "shown"),
    [
        (1.05, 4.2, None),
        (1.31, 0.4, "1,310 images/s is 1.31 times"),
        (1.0, 4.3, "1,000 images/s is 4.30 times"),
    ],
)
def test_a_speed_far_above_the_peaks_is_implausible(share, utilisation, shown):
    flops = utilisation and utilisation / (1000.0 * share) * PEAKS.matmul_flops
    reason = roofline.implausible_reason(roofline.efficiency_metrics(1000.0 * share, PEAKS, flops))
    assert (reason is None) if shown is None else shown in reason


def test_measurements_combine_to_the_highest_rates():
    assert roofline.combine([PEAKS, roofline.Peaks(3e12, 4e10, 900.0)]) == roofline.Peaks(3e12, 5e10, 1000.0)
