"""Ceilings are measured with the device waited for, counted as defined, and held against a training rightly."""

import functools
import math

import pytest
import timm
import torch
from standin import Standin
from torch import nn

from pipeline import ceilings, model
from pipeline.backends.cpu import Cpu

MEASURED = ceilings.Measured(
    matmul_flops=2e12,
    memory_bytes_per_second=5e10,
    images_per_second=1000.0,
    median_images_per_second=1000.0,
    queueing_share=0.3,
)


WAITED = "limited by data: real images passed at"


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
    ceilings.fastest(scripted(backend, [2.0] * 9), backend.synchronise, seconds=8, now=backend.now)
    before = [backend.calls[index - 1] for index, call in enumerate(backend.calls) if call == "now"]
    assert before == ["synchronise"] * 8


def test_the_fastest_window_counts(backend):
    work = scripted(backend, [0.5, 4.0, 3.0, 5.0])  # the first is not timed
    assert ceilings.fastest(work, backend.synchronise, seconds=12, now=backend.now) == 3
    assert windows_of(backend.calls) == [1, 1, 1]


def test_two_windows_are_timed_of_the_slowest_work(backend):
    work = scripted(backend, [9.0, 7.0, 8.0])
    assert ceilings.fastest(work, backend.synchronise, seconds=1, now=backend.now) == 7
    assert windows_of(backend.calls) == [1, 1]


def test_every_window_is_told_as_many_as_are_asked_for_at_least(backend):
    work = scripted(backend, [9.0, 3.0, 1.0, 2.0, 7.0])
    assert ceilings.windows(work, backend.synchronise, seconds=1, least=3, now=backend.now) == [3, 1, 2]
    assert windows_of(backend.calls) == [1, 1, 1]


def test_fast_work_is_called_many_times_a_window(backend):
    call = 2**-8
    work = scripted(backend, [5.0, 2 * call, *[call] * 6, *[call / 2] * 6])
    assert ceilings.fastest(work, backend.synchronise, seconds=8.5 * call, now=backend.now) == call / 2
    assert windows_of(backend.calls) == [1, 6, 6]  # 50 ms are 6.4 times the first window


def test_work_too_fast_for_the_clock(backend):
    work = scripted(backend, [0.0, 0.0, *[2**-20] * 50_000])
    assert ceilings.fastest(work, backend.synchronise, seconds=0, now=backend.now) == 2**-20
    assert windows_of(backend.calls) == [1, 50_000]


def test_by_itself_it_times_for_about_the_seconds_asked():
    assert ceilings.fastest(lambda: sum(range(1000)), lambda: None, seconds=0.001) > 0


def busying(backend, asked):
    """What keeps `backend` busy; the seconds asked for go to `asked`."""

    def busy(seconds):
        asked.append(seconds)
        return lambda: backend.queue(seconds)

    return busy


def test_a_device_that_queues_everything_has_no_queueing_share(backend):
    backend.queue(50)  # of before: waited for first
    work, asked = scripted(backend, [2.0] * 5), []
    assert ceilings.queueing_share(work, backend.synchronise, busying(backend, asked), now=backend.now) == 0
    assert backend.calls == ["synchronise", "now", "work", "now", "synchronise", "now"] * 5
    assert asked == []


@pytest.mark.parametrize(("host", "share"), [(2.0, 1.0), (1.9, 0.95)])
def test_a_host_that_takes_as_long_as_the_device_is_waited_for(backend, host, share):
    def work():
        backend.time += host
        backend.queue(2 - host)

    asked = []
    found = ceilings.queueing_share(work, backend.synchronise, busying(backend, asked), now=backend.now)
    assert found == pytest.approx(share)
    assert asked == [pytest.approx(6)]


@pytest.mark.parametrize("after", [0.0, 0.1])
def test_a_step_that_waits_for_the_device_has_no_queueing_share(backend, after):
    def work():
        backend.queue(2.0)
        backend.synchronise()  # as `.item()` does
        backend.queue(after)

    assert ceilings.queueing_share(work, backend.synchronise, busying(backend, []), now=backend.now) is None


def test_the_median_queueing_share_counts(backend):
    host = iter([8.0, 0.0, 1.0, 0.0, 2.0])

    def work():
        took = next(host)
        backend.time += took
        backend.queue(8 - took)

    assert ceilings.queueing_share(work, backend.synchronise, busying(backend, []), now=backend.now) == 1 / 8


def test_a_device_is_kept_busy_by_so_many_products_as_take_the_seconds_asked(backend, monkeypatch):
    products = []
    monkeypatch.setattr(ceilings, "BUSY_SIDE", ceilings.SMALLEST_SIDE)
    monkeypatch.setattr(ceilings, "fastest", lambda work, synchronise, seconds: 0.4)
    monkeypatch.setattr(torch, "mm", lambda left, right, out: products.append((left.shape, out.dtype)))
    monkeypatch.setattr(backend, "synchronise", None)  # nothing is waited for
    ceilings.busy(backend, 1.0)()
    assert products == [((512, 512), torch.float32)] * 3


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
        monkeypatch.setattr(ceilings, name, value)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_products_on_the_cpu(small, precision):
    state = torch.get_rng_state()
    with torch.no_grad():
        rate = ceilings.matmul_flops(Cpu(), precision)
    assert math.isfinite(rate)
    assert rate > 0
    assert torch.equal(state, torch.get_rng_state())  # the training's random choices stay what they were


def rates(monkeypatch, table):
    """Lets products take the seconds in `table`, by format and side; gives those that were timed."""
    timed = []

    def seconds(backend, dtype, side):
        timed.append((dtype, side))
        return table[dtype][side]

    monkeypatch.setattr(ceilings, "_product_seconds", seconds)
    return timed


def test_the_best_side_counts_and_none_larger_than_a_long_product(monkeypatch):
    timed = rates(monkeypatch, {torch.float32: {512: 0.001, 1024: 0.004, 2048: 0.04}})
    assert ceilings.matmul_flops(Cpu(), "fp32") == 2 * 1024**3 / 0.004
    assert timed == [(torch.float32, side) for side in (512, 1024, 2048)]


def test_no_side_is_larger_than_the_largest(monkeypatch):
    timed = rates(monkeypatch, {torch.float32: {512 * 2**power: 1e-4 for power in range(5)}})
    assert ceilings.matmul_flops(Cpu(), "tf32") == 2 * 8192**3 / 1e-4
    assert len(timed) == 5


@pytest.mark.parametrize(("half", "expected"), [(0.05, 2 * 512**3 / 0.03), (0.02, 2 * 512**3 / 0.02)])
def test_a_format_that_is_only_emulated_is_no_ceiling(monkeypatch, half, expected):
    timed = rates(monkeypatch, {torch.float32: {512: 0.03}, torch.bfloat16: {512: half}})
    assert ceilings.matmul_flops(Cpu(), "bf16") == expected
    assert set(timed) == {(torch.float32, 512), (torch.bfloat16, 512)}


def test_what_is_multiplied_is_random_and_the_same_everywhere(small):
    first, again = (ceilings._normal(Cpu(), torch.bfloat16, 64, seed=0) for _ in range(2))
    assert first.shape == (64, 64)
    assert first.dtype == torch.bfloat16
    assert torch.equal(first, again)
    assert first.count_nonzero() == 64 * 64
    assert not torch.equal(first, ceilings._normal(Cpu(), torch.bfloat16, 64, seed=1))


def test_copies_on_the_cpu(small):
    rate = ceilings.memory_bytes_per_second(Cpu())
    assert math.isfinite(rate)
    assert rate > 0


@pytest.mark.parametrize(("asynchronous", "side"), [(False, 64), (True, 128)])
def test_a_copy_counts_what_it_reads_and_what_it_writes(small, monkeypatch, asynchronous, side):
    monkeypatch.setattr(Cpu, "asynchronous", asynchronous)
    monkeypatch.setattr(ceilings, "fastest", lambda work, synchronise, *, seconds: (work(), 0.5)[1])
    assert ceilings.memory_bytes_per_second(Cpu()) == 2 * side * side * 4 / 0.5


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
    assert ceilings.forward_flops(resnet("all"), (3, 96, 96)) == sum(convolutions().values()) + HEAD


def test_a_step_that_trains_all_of_it():
    forward = sum(convolutions().values()) + HEAD
    # Backward: gradients of weights and of inputs, but nobody asks for those of the images.
    expected = 3 * forward - convolutions()["conv1"]
    assert ceilings.train_flops(resnet("all"), (3, 96, 96), set_mode=train_mode) == expected


@pytest.mark.parametrize("frozen_batch_norm", ["train", "eval"])
def test_a_step_that_trains_the_head_alone(frozen_batch_norm):
    mode = functools.partial(model.set_mode, frozen_batch_norm=frozen_batch_norm)
    expected = sum(convolutions().values()) + 2 * HEAD
    assert ceilings.train_flops(resnet("head"), (3, 96, 96), set_mode=mode) == expected


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
    assert ceilings.forward_flops(net, (3, 6, 6)) == first + forward
    assert ceilings.train_flops(net, (3, 6, 6), set_mode=train_mode) == 2 * first + 3 * forward


def test_a_head_on_features():
    head = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    assert ceilings.forward_flops(head, (16,)) == 2 * 16 * 8 + 2 * 8 * 3
    with torch.no_grad():  # the caller's: gradients are counted all the same
        assert ceilings.train_flops(head, (16,), set_mode=train_mode) == 2 * (2 * 16 * 8) + 3 * (2 * 8 * 3)


def test_counting_leaves_no_trace():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(64, 2)).eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()
    assert ceilings.train_flops(net, (3, 6, 6), set_mode=train_mode)
    assert ceilings.forward_flops(net.train(), (3, 6, 6))
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
    assert ceilings.forward_flops(Choosing(), (4,)) is None
    assert ceilings.train_flops(Choosing(), (4,), set_mode=train_mode) is None
    assert ceilings.forward_flops(nn.Linear(4, 2), (5,)) is None
    frozen = nn.Linear(4, 2).requires_grad_(False)
    assert ceilings.train_flops(frozen, (4,), set_mode=train_mode) is None


def test_efficiency():
    assert ceilings.efficiency(800.0, MEASURED, 5e8) == {
        "efficiency/vs_synthetic": 0.8,
        "efficiency/model_flops_utilisation": 0.2,
        "ceiling/matmul_tflops": 2.0,
        "ceiling/memory_gb_per_second": 50.0,
        "ceiling/synthetic_images_per_second": 1000.0,
    }
    assert ceilings.rates(MEASURED).items() < ceilings.efficiency(800.0, MEASURED, None).items()
    without = ceilings.efficiency(800.0, MEASURED, None)
    assert set(ceilings.efficiency(800.0, MEASURED, 5e8)) - set(without) == {"efficiency/model_flops_utilisation"}


def measured(queueing_share):
    return ceilings.Measured(2e12, 5e10, 1000.0, 1000.0, queueing_share)


@pytest.mark.parametrize(
    ("images_per_second", "queueing_share", "limited", "sentence"),
    [
        (830, 0.3, "data", f"{WAITED} 83% of the speed of one fixed batch at its fastest, 83.0% at its median"),
        (949, 0.99, "data", f"{WAITED} 95% of the speed of one fixed batch at its fastest, 94.9% at its median"),
        (950, 0.9, "compute", "limited by compute: 95% of the speed of one fixed batch"),
        (
            950,
            0.97,
            "launches",
            "limited by launches: queueing a step took 97% of its time, so that the device waited for the host",
        ),
        (980, None, "compute", "limited by compute: 98% of the speed of one fixed batch"),
    ],
)
def test_what_limits(images_per_second, queueing_share, limited, sentence):
    here = measured(queueing_share)
    figures = ceilings.efficiency(images_per_second, here, None)
    assert ceilings.limit(figures, here) == limited
    assert limited in ceilings.LIMITED
    assert ceilings.verdict(figures, here) == sentence


def test_compute_is_held_against_products_where_operations_were_counted():
    figures = ceilings.efficiency(980.0, MEASURED, 7e8)
    assert ceilings.verdict(figures, MEASURED) == (
        "limited by compute: 98% of the speed of one fixed batch, 34% of the rate of this machine's own matrix products"
    )


@pytest.mark.parametrize(
    ("images_per_second", "median", "limited", "sentence"),
    [
        (
            700,
            600,
            "compute",
            "limited by compute: 70% of the speed of one fixed batch at its fastest, 116.7% at its median",
        ),
        (
            700,
            736,
            "compute",
            "limited by compute: 70% of the speed of one fixed batch at its fastest, 95.1% at its median",
        ),
        (700, 738, "data", f"{WAITED} 70% of the speed of one fixed batch at its fastest, 94.9% at its median"),
        (960, 700, "compute", "limited by compute: 96% of the speed of one fixed batch"),
    ],
)
def test_data_limits_what_is_slower_than_a_fixed_batch_mostly_is(images_per_second, median, limited, sentence):
    here = ceilings.Measured(2e12, 5e10, 1000.0, median, None)
    figures = ceilings.efficiency(images_per_second, here, None)
    assert (ceilings.limit(figures, here), ceilings.verdict(figures, here)) == (limited, sentence)


@pytest.mark.parametrize(
    ("synthetic", "utilisation", "reason"),
    [
        (1.05, 4.2, None),
        (0.5, None, None),
        (1.31, 0.4, "clock not trusted: 1,310 images/s is 1.31 times what this machine did with one fixed batch"),
        (1.051, None, "clock not trusted: 1,051 images/s is 1.05 times what this machine did with one fixed batch"),
        (12.345, 9.0, "clock not trusted: 12,345 images/s is 12.35 times what this machine did with one fixed batch"),
        (1.0, 4.3, "clock not trusted: 1,000 images/s is 4.30 times what the rate of its matrix products allows"),
    ],
)
def test_what_no_clock_can_be_trusted_with(synthetic, utilisation, reason):
    flops = None if utilisation is None else utilisation / 1000 * MEASURED.matmul_flops
    figures = ceilings.efficiency(1000.0 * synthetic, MEASURED, flops)
    if utilisation is not None:
        figures["efficiency/model_flops_utilisation"] = utilisation
    assert ceilings.impossible(figures) == reason


@pytest.mark.parametrize(("spread", "accused"), [(1.0, True), (1.2, True), (1.25, False)])
def test_a_machine_whose_speed_changed_may_have_been_faster_by_as_much(spread, accused):
    figures = ceilings.efficiency(1300.0, MEASURED, None)
    assert (ceilings.impossible(figures, spread) is not None) == accused
    of_products = figures | {"efficiency/vs_synthetic": 1.0, "efficiency/model_flops_utilisation": 5.2}
    assert (ceilings.impossible(of_products, spread) is not None) == accused
