"""On a real GPU: the same work gives the same losses as on the CPU, and the clock waits for the device."""

import copy
import gc
import time

import pytest
import torch
from loops import make_loop, train_resnet
from torch import nn

from pipeline import devices, download, hardware, train
from pipeline.data import batching
from pipeline.profiling.clock import Clock
from pipeline.training import loop

DEVICES = [pytest.param("cuda", marks=pytest.mark.cuda), pytest.param("mps", marks=pytest.mark.mps)]


@pytest.fixture
def trained(settings_of, tmp_path, monkeypatch):
    """Train a tiny ResNet. Returns the record."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{(tmp_path / 'store.db').as_posix()}")

    def run(*overrides):
        folder = tmp_path / " ".join(overrides).replace(":", "")
        small = ("weights=random", "model=test_resnet.r160_in1k", "image_size=32", "epochs=2", "batch_size=16")
        settings = settings_of(*overrides, *small, "lr=1e-4")
        for stage in (hardware, download):
            stage.run(settings, folder)
        return train.run(settings, folder)

    return run


@pytest.fixture
def backend():
    return devices.select("cuda")


@pytest.fixture
def deterministic(monkeypatch):
    """Use deterministic convolutions: their sums are always in the same order."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def figures(record, name):
    return [epoch["figures"][name] for epoch in record["epochs"]]


def losses(rows):
    return [row[name] for row in rows for name in ("train/loss", "val/loss")]


@pytest.mark.parametrize("device", DEVICES)
def test_it_trains_as_the_cpu_does(device, trained):
    on_cpu, on_device = (trained("recipe=finetune", f"device={name}") for name in ("cpu", device))
    assert on_device["tags"]["device"] == device
    assert figures(on_device, "train/loss") == pytest.approx(figures(on_cpu, "train/loss"), rel=1e-3)
    assert figures(on_device, "val/loss") == pytest.approx(figures(on_cpu, "val/loss"), rel=1e-2)
    assert figures(on_device, "memory/peak_mib")[-1] > 0


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("recipe", ["finetune", "linear-probe", "blog"])
def test_a_compiled_training_has_the_losses_of_an_eager_one(recipe, trained):
    losses = {}
    for mode in ("off", "default", "reduce-overhead"):
        record = trained(f"recipe={recipe}", "device=cuda", f"compile={mode}")
        assert record["facts"]["compile"] == mode
        losses[mode] = figures(record, "train/loss")
        torch.compiler.reset()
    assert losses["default"] == pytest.approx(losses["off"], rel=1e-3)
    assert losses["reduce-overhead"] == pytest.approx(losses["off"], rel=1e-3)


@pytest.mark.cuda
def test_tf32_is_on_only_where_asked_for(backend):
    if "tf32" not in backend.precisions:
        pytest.skip("no TF32 here")
    left, right = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0))
    exact = left.double() @ right.double()
    for precision, lowest, highest in (("fp32", 0, 1e-6), ("tf32", 1e-5, 1e-2), ("fp32", 0, 1e-6)):
        backend.set_precision(precision)
        error = ((left.cuda() @ right.cuda()).cpu().double() - exact).norm() / exact.norm()
        assert lowest < error < highest


@pytest.mark.cuda
def test_batches_are_the_same_as_on_the_cpu(backend):
    cpu = torch.device("cpu")
    backend.set_precision("fp32")
    images = torch.randint(256, (8, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = batching.Split(images, torch.arange(8))
    for flip in (False, True):
        ours, theirs = (
            list(batching.shuffled_batches(split.to(device), 3, devices.select(device.type), 2**63 - 1, 2, flip=flip))
            for device in (cpu, backend.device)
        )
        for (inputs, labels), (other_inputs, other_labels) in zip(ours, theirs, strict=True):
            assert torch.equal(inputs, other_inputs.cpu()) and torch.equal(labels, other_labels.cpu())
    for size in (16, 32, 48, 96):
        for channels_last in (False, True):
            expected = batching.prepare(images, size, channels_last=channels_last)
            prepared = batching.prepare(images.to(backend.device), size, channels_last=channels_last).cpu()
            difference = (prepared - expected).abs() * 255
            assert difference.max() < 1.001 and difference.mean() < 0.05


# --- CUDA graphs


@pytest.mark.cuda
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 2e-2), ("fp16", 1e-2)])
@pytest.mark.parametrize("recipe", ["finetune", "linear-probe"])
def test_a_captured_training_has_the_losses_of_an_eager_one(deterministic, precision, tolerance, recipe):
    # By AdamW: fused and capturable, so that the whole step is captured, unless its loss is scaled (fp16).
    rows = {}
    for use_cuda_graph in (False, True):
        backend = devices.select("cuda")
        if precision not in backend.precisions:
            pytest.skip(f"no {precision} here")
        rows[use_cuda_graph] = train_resnet(
            f"recipe={recipe}",
            f"precision={precision}",
            cached=recipe == "linear-probe",
            backend=backend,
            use_cuda_graph=use_cuda_graph,
        )
        assert backend.capture_error is None
        assert (backend._graph_pool._pool is not None) is use_cuda_graph
    assert losses(rows[True]) == pytest.approx(losses(rows[False]), rel=tolerance)
    assert [row["train/lr"] for row in rows[True]] == [row["train/lr"] for row in rows[False]]
    first, *_, last = (row["train/loss"] for row in rows[True])
    assert abs(first - last) > 3 * tolerance * first  # it learnt more than the two may differ by


@pytest.mark.cuda
@pytest.mark.parametrize("use_cuda_graph", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_samples_in_host_memory_give_the_losses_of_samples_on_the_device(deterministic, use_cuda_graph, cached):
    recipe = ("recipe=linear-probe",) if cached else ("recipe=finetune", "flip=true")
    device, host = (
        train_resnet(
            *recipe,
            "precision=fp32",
            cached=cached,
            backend=devices.select("cuda"),
            use_cuda_graph=use_cuda_graph,
            on_device=on_device,
        )
        for on_device in (True, False)
    )
    assert losses(host) == pytest.approx(losses(device), rel=1e-3)


@pytest.mark.cuda
def test_a_function_that_synchronizes_is_not_captured_and_the_device_still_works(backend):
    ones = torch.ones(5, device=backend.device)
    call = backend.capture_graph(lambda tensor: torch.full((3,), tensor.sum().item(), device=tensor.device))
    for factor in (1, 2, 3):
        assert call(factor * ones).tolist() == [5 * factor] * 3
    error = backend.capture_error
    assert error and "\n" not in error
    # Random numbers, copies and graphs are as before.
    assert 0.4 < torch.rand(100_000, device=backend.device).mean().item() < 0.6
    assert backend.to_device_async((torch.arange(4),))()[0].tolist() == [0, 1, 2, 3]
    backend.release_memory()
    again = backend.capture_graph(lambda tensor: 2 * tensor + torch.zeros(5, device=tensor.device))
    for factor in (1, 2, 3):
        assert again(factor * ones).tolist() == [2 * factor] * 5
    assert backend.capture_error == error


# --- memory


def peak_of(use_cuda_graph):
    """Peak memory in MiB of steps of a network, mostly its activations."""
    gc.collect()
    torch.cuda.empty_cache()
    backend = devices.select("cuda")
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3)).to(backend.device)
    train_loop = make_loop(network, backend=backend, optimizer="adamw", use_cuda_graph=use_cuda_graph)
    inputs = torch.randn(256, 3, 64, 64, device=backend.device)
    labels = torch.arange(256, device=backend.device) % 3
    beginning = copy.deepcopy(network.state_dict())
    loop.warm_up(train_loop, [(inputs, labels)], [(inputs, labels)])
    network.load_state_dict(beginning)
    train_loop.restart()
    backend.release_memory()
    backend.reset_peak_memory()
    for _ in range(3):
        train_loop.step(inputs, labels)
    backend.synchronize()
    assert backend.capture_error is None
    memory = backend.memory_mib()
    assert memory["peak"] < memory["driver"]
    return memory["peak"]


@pytest.mark.cuda
def test_the_peak_of_captured_steps_includes_a_graphs_temporary_tensors():
    eager, captured = peak_of(use_cuda_graph=False), peak_of(use_cuda_graph=True)
    assert eager > 256  # two layers' activations, 128 MiB each
    assert captured > 0.9 * eager


@pytest.mark.cuda
def test_copies_are_right_whether_the_device_is_idle_or_busy(backend):
    matrix, sums = torch.ones(4096, 4096, device=backend.device), []
    for index in range(12):
        if index % 3 == 0:  # idle: the copy is read at once, so that it must be waited for
            backend.synchronize()
        host = torch.full((2**22,), index, dtype=torch.int32)
        copies = backend.to_device_async((host,))
        host.zero_()
        (numbers,) = copies()
        if index % 3 == 1:  # busy: the copy is read late, when it was freed here and the next one was started
            for _ in range(20):
                matrix @ matrix
        sums.append(numbers.sum())
        del numbers, copies
    assert [total.item() / 2**22 for total in sums] == list(range(12))


# --- time


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
def test_a_span_agrees_with_the_cards_own_clock(backend):
    matrix = torch.randn(4096, 4096, device=backend.device)

    def measure(products):
        """The seconds between two CUDA events, and those of the clock."""
        clock = Clock(backend.synchronize)
        with clock.span("work") as span:
            first = backend.record_event()
            for _ in range(products):
                torch.mm(matrix, matrix)
            last = backend.record_event()
        return backend.elapsed_seconds(first, last), span.seconds

    measure(3)
    by_events, _ = measure(10)
    # Some 200 ms, in which the launches before and after the events, and the waiting, are little.
    by_events, by_clock = measure(max(10, round(0.2 / by_events * 10)))
    assert by_clock == pytest.approx(by_events, rel=0.01)
