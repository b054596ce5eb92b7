"""Backends are found, selected and refused by name, and each that works here keeps the interface's promises."""

import json

import pytest
import torch
from conftest import fails
from standin import Standin

from pipeline import config, devices
from pipeline.devices import BACKENDS
from pipeline.errors import OutOfMemoryError, StageError, UsageError
from pipeline.profiling import system_info

HERE = [backend for backend in BACKENDS if backend.count()]
"""The CPU, and the GPU of a machine that has one."""


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """Hide the GPU of the machine that runs the tests."""
    monkeypatch.setattr(system_info, "gpus", lambda: [])


@pytest.fixture
def precision_flags():
    """Restore torch's precision settings after the test."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def standins(**counts):
    """Backends with these kinds and numbers of devices."""
    return [
        type(kind, (Standin,), {"kind": kind, "count": lambda count=count: count}) for kind, count in counts.items()
    ]


# --- the registry


def test_every_backend_is_a_module_that_the_settings_allow():
    kinds = [backend.kind for backend in BACKENDS]
    assert kinds[-1] == "cpu" and len(set(kinds)) == len(kinds) >= 4
    for backend in BACKENDS:
        assert backend.__module__ == f"pipeline.devices.{backend.kind}"
        assert config.load([f"device={backend.kind}"]).device == backend.kind
    assert {"cpu", *config.GPUS} == set(kinds)  # no module that is not a backend is allowed


def test_a_backend_of_your_own_is_one_file(tmp_path, monkeypatch):
    (tmp_path / "pretend.py").write_text(
        "from pipeline.devices.base import Backend\n\n\n"
        "class Pretend(Backend):\n"
        "    kind = name = 'pretend'\n"
        "    count = classmethod(lambda cls: 1)\n"
        "    facts = lambda self: {'name': 'Mine'}\n"
        "    synchronize = lambda self: None\n"
    )
    monkeypatch.setattr(devices, "__path__", [*devices.__path__, str(tmp_path)])
    backends = devices.discover()
    assert sorted(backend.kind for backend in backends) == sorted([*(backend.kind for backend in BACKENDS), "pretend"])
    assert "pretend" in devices.available(backends)
    mine = devices.select("pretend", backends)
    assert mine.facts() == {"name": "Mine"}
    assert mine.memory_mib() == {} and mine.capacity_mib() is None and mine.free_bytes() is None
    assert mine.energy() is None and mine.gpu_uuid() is None and mine.record_event() is None
    assert mine.best_precision() == "fp32"
    assert mine.capture_graph(abs) is abs
    mine.release_memory()


@pytest.mark.parametrize(
    ("device", "counts", "chosen"),
    [
        ("auto", {"cuda": 1, "mps": 1, "cpu": 1}, ("cuda", 0)),
        ("auto", {"cuda": 0, "xpu": 2, "cpu": 1}, ("xpu", 0)),
        ("auto", {"cuda": 0, "cpu": 1}, ("cpu", 0)),
        ("cuda:0", {"cuda": 1, "cpu": 1}, ("cuda", 0)),
        ("cuda:1", {"cuda": 2, "cpu": 1}, ("cuda", 1)),
        ("cpu", {"cuda": 1, "cpu": 1}, ("cpu", 0)),
    ],
)
def test_a_device_is_selected(device, counts, chosen):
    backend = devices.select(device, standins(**counts))
    assert (backend.kind, backend.index) == chosen


@pytest.mark.parametrize(
    ("device", "counts", "expected"),
    [
        ("mps", {"cuda": 1, "mps": 0, "cpu": 1}, "auto | cuda | cpu"),
        ("cuda:1", {"cuda": 1, "cpu": 1}, "auto | cuda | cpu"),
        ("cuda:2", {"cuda": 2, "cpu": 1}, "auto | cuda | cuda:0 | cuda:1 | cpu"),
        ("xpu:0", {"xpu": 0, "cpu": 1}, "auto | cpu"),
    ],
)
def test_a_missing_device_is_refused_with_the_available_ones(device, counts, expected):
    message = fails(UsageError, devices.select, device, standins(**counts))
    assert message.startswith(f'device: "{device}" ') and message.endswith(f" {expected}")


# --- a GPU that torch can't use


@pytest.mark.parametrize("vendor", ["NVIDIA", "AMD", "Intel", "Apple", "Another"])
def test_a_gpu_that_torch_cannot_use_is_named_with_what_to_do(vendor, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    displays = {"vendor": "Intel", "name": "Intel UHD Graphics", "for_training": False}
    gpus = [displays, {"vendor": vendor, "name": "the card", "driver": "580.65", "for_training": True}]
    cpu_only = [
        type(backend.__name__, (backend,), {"count": lambda n=backend.kind == "cpu": int(n)}) for backend in BACKENDS
    ]
    message = devices.unused_gpu(gpus, cpu_only)
    assert message.startswith("the card is there, but ")
    monkeypatch.setattr(system_info, "gpus", lambda: gpus)
    assert message in fails(UsageError, devices.select, "cuda", cpu_only)
    assert devices.unused_gpu([displays], cpu_only) is None
    assert devices.unused_gpu(gpus, standins(cuda=1, cpu=1)) is None


# --- what each backend promises


@pytest.mark.parametrize("backend", HERE)
def test_precisions_are_supported_or_refused(backend, precision_flags):
    chosen = backend()
    for precision in ("fp32", "tf32", "bf16", "fp16"):
        if precision in chosen.precisions:
            chosen.set_precision(precision)
        else:
            message = fails(UsageError, chosen.set_precision, precision)
            assert message.startswith("precision: ") and message.endswith(" | ".join(chosen.precisions))
    assert chosen.best_precision() in chosen.precisions


@pytest.mark.parametrize("backend", HERE)
def test_fp32_never_uses_tf32(backend, precision_flags):
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True
    chosen = backend()
    chosen.set_precision("fp32")
    assert torch.get_float32_matmul_precision() == "highest"
    left, right = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    exact = left.double() @ right.double()
    product = (left.to(chosen.device) @ right.to(chosen.device)).cpu().double()
    assert (product - exact).norm() / exact.norm() < 1e-6


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_runs_the_network_in_the_precision(backend, precision, dtype):
    chosen = backend()
    if precision not in chosen.precisions:
        pytest.skip(f"no {precision} here")
    ones = torch.ones(2, 2, device=chosen.device)
    with chosen.autocast(precision):
        assert (ones @ ones).dtype == dtype


@pytest.mark.parametrize("backend", HERE)
def test_copies_have_the_values_at_the_start_of_the_copy(backend):
    chosen = backend()
    inputs, labels = torch.rand(64, 3, 32, 32), torch.arange(64)
    expected = inputs.clone()
    copies = chosen.to_device_async((inputs, labels))
    if chosen.device.type != "cpu":  # there a copy is the tensor itself
        inputs.zero_()
    first, second = copies()
    assert first.device == second.device == torch.zeros(1, device=chosen.device).device
    assert torch.equal(first.cpu(), expected) and torch.equal(second.cpu(), labels)
    assert chosen.to_device_async(())() == ()


@pytest.mark.parametrize("backend", HERE)
def test_memory_is_known_or_absent_and_never_0(backend):
    chosen = backend()
    chosen.reset_peak_memory()
    values = torch.ones(2**24, device=chosen.device)
    chosen.synchronize()
    memory = chosen.memory_mib()
    assert set(memory) <= {"peak", "peak_reserved", "current", "driver"}
    assert all(mebibytes >= 64 for mebibytes in memory.values())
    del values
    chosen.release_memory()
    capacity, free = chosen.capacity_mib(), chosen.free_bytes()
    assert capacity is None or free is None or 0 < free / 2**20 <= capacity


@pytest.mark.parametrize("backend", HERE)
def test_compile_and_graph_are_chosen_or_refused(backend):
    chosen = backend()
    assert chosen.compile_mode("auto", 1) == "off"
    for mode in ("off", "default", "reduce-overhead", "max-autotune"):
        if mode in chosen.compile_modes:
            assert chosen.compile_mode(mode, 1) == mode
        else:
            assert fails(UsageError, chosen.compile_mode, mode, 1).startswith("compile: ")
    assert chosen.use_cuda_graph(False, "off") is False
    assert chosen.use_cuda_graph("auto", "off") is chosen.supports_graphs
    if not chosen.supports_graphs:
        assert fails(UsageError, chosen.use_cuda_graph, True, "off").startswith("graph: ")
        assert chosen.capture_graph(abs) is abs and chosen.capture_error is None


# --- running out of memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("Allocation on device"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
    ids=["torch", "mps", "cpu", "windows", "cublas", "numpy"],
)
def test_an_out_of_memory_error_says_which_settings_to_lower(error):
    with pytest.raises(OutOfMemoryError) as caught, Standin().memory_errors():
        raise error
    assert "batch_size" in str(caught.value) and caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes cannot be multiplied"), ValueError("memory"), StageError("out of memory")]
)
def test_other_errors_are_not_changed(error):
    with pytest.raises(type(error)) as caught, Standin().memory_errors():
        raise error
    assert caught.value is error


@pytest.mark.parametrize("backend", HERE)
def test_facts_are_known_and_plain_json(backend):
    facts = backend().facts()
    assert facts["name"] and json.loads(json.dumps(facts)) == facts
    facts = devices.torch_facts()
    assert facts["torch"] == torch.__version__ and facts["threads"] == torch.get_num_threads()
    assert "\n" not in facts["build"]
