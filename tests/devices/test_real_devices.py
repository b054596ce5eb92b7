"""On a real GPU: the same work gives the CPU's figures, recorded or not; the clock waits for the device."""

import copy
import gc
import time

import pytest
import torch
from standin import job_of
from test_loop import figures_of
from torch import nn

from pipeline import devices, download, hardware, train
from pipeline.data import batching
from pipeline.profiling.clock import Clock, StepTimes
from pipeline.training import loop

DEVICES = [pytest.param("cuda", marks=pytest.mark.cuda), pytest.param("mps", marks=pytest.mark.mps)]


@pytest.mark.parametrize("device", DEVICES)
def test_trains_as_the_cpu_does(device, settings_of, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{(tmp_path / 'store.db').as_posix()}")
    figures = {}
    for name in ("cpu", device):
        settings = settings_of("recipe=finetune", "weights=random", "model=test_resnet.r160_in1k", "image_size=32",
                               "epochs=2", "batch_size=16", "lr=1e-4", f"device={name}")  # fmt: skip
        for stage in (hardware, download):
            stage.run(settings, tmp_path / name)
        record = train.run(settings, tmp_path / name)
        figures[name] = [epoch["figures"] for epoch in record["epochs"]]
        assert record["tags"]["device"] == name
        assert figures[name][-1]["memory/peak_mib"] > 0
    for ours, theirs in zip(figures["cpu"], figures[device], strict=True):
        assert theirs["train/loss"] == pytest.approx(ours["train/loss"], rel=1e-3)
        assert theirs["val/loss"] == pytest.approx(ours["val/loss"], rel=1e-2)


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("recipe", ["finetune", "linear-probe", "blog"])
def test_a_compiled_training_has_the_losses_of_one_that_is_not(recipe, settings_of, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{(tmp_path / 'store.db').as_posix()}")
    losses = {}
    for mode in ("off", "default", "reduce-overhead"):
        settings = settings_of(f"recipe={recipe}", "weights=random", "model=test_resnet.r160_in1k", "image_size=32",
                               "epochs=2", "batch_size=16", "lr=1e-4", "device=cuda", f"compile={mode}")  # fmt: skip
        for stage in (hardware, download):
            stage.run(settings, tmp_path / mode)
        record = train.run(settings, tmp_path / mode)
        assert record["facts"]["compile"] == mode
        losses[mode] = [epoch["figures"]["train/loss"] for epoch in record["epochs"]]
        torch.compiler.reset()
    assert losses["default"] == pytest.approx(losses["off"], rel=1e-3)
    assert losses["reduce-overhead"] == pytest.approx(losses["off"], rel=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_a_span_lasts_as_long_as_the_work_it_queued(device):
    backend = devices.select(device)
    matrix = torch.randn(4096, 4096, device=backend.device)
    matrix @ matrix
    clock = Clock(backend.synchronize)
    with clock.span("work") as span:
        start = time.perf_counter()
        for _ in range(50):
            matrix @ matrix
        queued = time.perf_counter() - start
    assert span.seconds > 2 * queued  # the clock waited for more than the queueing took


@pytest.mark.cuda
def test_fp32_is_fp32():
    backend = devices.select("cuda")
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(512, 512, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()

    def error():
        return ((left.cuda() @ right.cuda()).cpu().double() - exact).norm() / exact.norm()

    backend.set_precision("fp32")
    assert error() < 1e-6
    if "tf32" in backend.precisions:
        backend.set_precision("tf32")
        assert 1e-5 < error() < 1e-2
        backend.set_precision("fp32")


# --- on a card that records


@pytest.fixture
def deterministic():
    """Convolutions that add up in one order: the same kernels then give the same numbers."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


def losses(rows):
    return [row[name] for row in rows for name in ("train/loss", "val/loss")]


@pytest.mark.cuda
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 2e-2), ("fp16", 1e-2)])
@pytest.mark.parametrize("recipe", ["finetune", "linear-probe"])
def test_a_recorded_training_has_the_losses_of_an_unrecorded_one(deterministic, precision, tolerance, recipe):
    # By AdamW: fused and capturable, so that all of a step is recorded, unless its loss is scaled (fp16).
    rows = {}
    for recorded in (False, True):
        backend = devices.select("cuda")
        if precision not in backend.precisions:
            pytest.skip(f"no {precision} here")
        rows[recorded] = figures_of(
            f"recipe={recipe}", f"precision={precision}", cached=recipe == "linear-probe", backend=backend,
            recorded=recorded, batch_size=2 if recipe == "linear-probe" else 8,  # a head: 8 and 3 steps
        )  # fmt: skip
        assert backend.capture_error is None
        assert (backend._recorder._pool is not None) is recorded
    assert losses(rows[True]) == pytest.approx(losses(rows[False]), rel=tolerance)
    assert [row["train/lr"] for row in rows[True]] == [row["train/lr"] for row in rows[False]]
    first, *_, last = (row["train/loss"] for row in rows[True])
    assert abs(first - last) > 3 * tolerance * first  # it learnt more than the two may differ by


@pytest.mark.cuda
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_samples_in_host_memory_give_the_losses_of_samples_on_the_device(deterministic, recorded, cached):
    recipe = ("recipe=linear-probe",) if cached else ("recipe=finetune", "flip=true")
    device, host = (
        figures_of(
            *recipe,
            "precision=fp32",
            cached=cached,
            backend=devices.select("cuda"),
            recorded=recorded,
            on_device=there,
        )
        for there in (True, False)
    )
    assert losses(host) == pytest.approx(losses(device), rel=1e-3)
    assert losses(host)[0] == pytest.approx(losses(device)[0], rel=1e-4)


@pytest.mark.cuda
def test_orders_and_images_are_the_cpus():
    backend, cpu = devices.select("cuda"), torch.device("cpu")
    backend.set_precision("fp32")
    for seed, stream in ((0, 2), (2**63 - 1, 7)):
        assert torch.equal(
            batching._splitmix64(1000, seed, stream, backend.device).cpu(),
            batching._splitmix64(1000, seed, stream, cpu),
        )
    images = torch.randint(256, (8, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = batching.Split(images, torch.arange(8))
    for flip in (False, True):
        here, there = (
            list(batching.shuffled_batches(split.to(device), 3, devices.select(device.type), 5, 2, flip=flip))
            for device in (cpu, backend.device)
        )
        for (inputs, labels), (others, answers) in zip(here, there, strict=True):
            assert torch.equal(inputs, others.cpu())
            assert torch.equal(labels, answers.cpu())
    for size in (16, 32, 48, 96):
        for channels_last in (False, True):
            expected = batching.prepare(images, size, channels_last=channels_last)
            found = batching.prepare(images.to(backend.device), size, channels_last=channels_last).cpu()
            off = (found - expected).abs() * 255
            assert off.max() < 1.001
            assert off.mean() < 0.05


@pytest.mark.cuda
def test_what_waits_for_the_device_is_not_recorded_and_the_device_goes_on_working():
    backend = devices.select("cuda")

    def filled(tensor):
        return torch.full((3,), tensor.sum().item(), device=tensor.device)

    call, ones = backend.capture_graph(filled), torch.ones(5, device=backend.device)
    for factor in (1, 2, 3):
        assert call(factor * ones).tolist() == [5 * factor] * 3
    fault = backend.capture_error
    assert fault
    assert "\n" not in fault
    # Random numbers, products, new memory, and graphs are as before.
    backend.synchronize()
    assert 0.4 < torch.rand(100_000, device=backend.device).mean().item() < 0.6
    assert (torch.ones(64, 64, device=backend.device) @ torch.ones(64, 64, device=backend.device)).unique().item() == 64
    assert torch.zeros(2**24, device=backend.device).sum().item() == 0
    assert backend.to_device_async((torch.arange(4),))()[0].tolist() == [0, 1, 2, 3]
    backend.release_memory()
    again = backend.capture_graph(lambda tensor: 2 * tensor + torch.zeros(5, device=tensor.device))
    for factor in (1, 2, 3):
        assert again(factor * ones).tolist() == [2 * factor] * 5
    assert backend.capture_error == fault  # that one could be recorded


@pytest.mark.cuda
def test_what_was_recorded_writes_to_the_same_memory_and_leaves_its_arguments_alone():
    backend = devices.select("cuda")
    call = backend.capture_graph(lambda tensor: tensor.mul_(2) + 1)
    given = torch.arange(4.0, device=backend.device)
    first = call(given)
    assert first.tolist() == [1, 3, 5, 7]
    assert given.tolist() == [0, 1, 2, 3]
    second = call(given + 1)
    assert second.data_ptr() == first.data_ptr()
    assert second.tolist() == [3, 5, 7, 9]
    other = call(torch.ones(2, device=backend.device))
    assert other.tolist() == [3, 3]
    assert call(given).tolist() == [1, 3, 5, 7]


def peak_of(recorded):
    """MiB at most, of some steps of a network whose images between layers are most of it."""
    backend = devices.select("cuda")
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3)).to(backend.device)
    job = job_of(network, backend=backend, optimizer="adamw", recorded=recorded)
    inputs = torch.randn(256, 3, 64, 64, device=backend.device)
    labels = torch.arange(256, device=backend.device) % 3
    beginning = copy.deepcopy(network.state_dict())
    loop.warm_up(job, [(inputs, labels)], [(inputs, labels)])
    network.load_state_dict(beginning)
    job.restart()
    backend.release_memory()
    backend.reset_peak_memory()
    for _ in range(3):
        job.step(inputs, labels)
    backend.synchronize()
    assert backend.capture_error is None
    memory = backend.memory_mib()
    assert memory["peak"] < memory["driver"]
    return memory["peak"]


@pytest.mark.cuda
def test_the_peak_of_recorded_steps_is_told_whole():
    # What a graph takes and frees within itself, torch's allocator doesn't count when it's replayed.
    peaks = []
    for recorded in (False, True):
        gc.collect()
        torch.cuda.empty_cache()
        peaks.append(peak_of(recorded))
    eager, recorded = peaks
    assert eager > 256  # two layers' images, 128 MiB each
    assert recorded > 0.9 * eager


@pytest.mark.cuda
def test_a_span_agrees_with_the_cards_own_clock():
    backend = devices.select("cuda")
    matrix = torch.randn(4096, 4096, device=backend.device)

    def marked(count):
        """Seconds by two of CUDA's events, and by the clock."""
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        clock = Clock(backend.synchronize)
        with clock.span("work") as span:
            first.record()
            for _ in range(count):
                torch.mm(matrix, matrix)
            last.record()
        return first.elapsed_time(last) / 1000, span.seconds

    marked(3)
    seconds, _ = marked(10)
    # Some 200 ms, in which the launches before and after the events, and the waiting, are little.
    seconds, by_clock = marked(max(10, round(0.2 / seconds * 10)))
    assert by_clock == pytest.approx(seconds, rel=0.01)


@pytest.mark.cuda
def test_what_a_graph_takes_beside_the_allocators_count_is_told_while_the_graph_is_there():
    backend = devices.select("cuda")
    doubled = backend.capture_graph(lambda tensor: (tensor * 2).relu().sum())
    assert float(doubled(torch.ones(2**20, device=backend.device))) == 2**21
    backend.release_memory()
    backend.reset_peak_memory()
    with_graph = backend.memory_mib()["peak"]
    del doubled
    backend.release_memory()
    backend.reset_peak_memory()
    assert backend.memory_mib()["peak"] <= with_graph - 10  # the input's copy and two temporaries, of 4 MiB each


@pytest.mark.cuda
def test_every_fourth_step_is_timed_by_the_cards_marks():
    backend = devices.select("cuda")
    matrix = torch.randn(4096, 4096, device=backend.device)
    torch.mm(matrix, matrix)
    clock = Clock(backend.synchronize)
    times = StepTimes(backend, clock.now)
    with clock.span("train") as span:
        for number in range(1, 13):
            with times.step():
                for _ in range(20 if number == 8 else 5):
                    torch.mm(matrix, matrix)
    assert times.seconds == []
    times.collect()
    assert len(times.seconds) == 3  # the fourth, the eighth and the twelfth
    short, long, last = times.seconds
    # Of 75 products in all; the card's speed may change meanwhile.
    assert long > 2 * max(short, last)
    assert short == pytest.approx(span.seconds * 5 / 75, rel=0.5)
    assert long == pytest.approx(span.seconds * 20 / 75, rel=0.5)
