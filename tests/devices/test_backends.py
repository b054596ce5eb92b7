"""Which device trains: chosen in order, refused by name, told apart from what torch can't use."""

import platform
import subprocess
import sys
import weakref
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from standin import Standin

from pipeline import config, devices
from pipeline.devices import Backend, cpu, mps
from pipeline.devices.cpu import Cpu
from pipeline.devices.cuda import Cuda, runs_on
from pipeline.devices.mps import Mps
from pipeline.devices.xpu import Xpu
from pipeline.errors import OutOfMemoryError, StageError, UsageError
from pipeline.profiling import system_info

MAXWELL = {"vendor": "NVIDIA", "name": "NVIDIA GeForce GTX 970", "for_training": True}
CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
MIB = 2**20
CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


def there(**counts):
    """Stand-in backends in the order of BACKENDS, `counts` of each kind."""

    def made(name):
        return type(name.title(), (Standin,), {"kind": name, "count": classmethod(lambda _: counts.get(name, 0))})

    return tuple(made(backend.kind) for backend in devices.BACKENDS)


def line(call, *args):
    with pytest.raises(UsageError) as caught:
        call(*args)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """The machine that runs the tests may have one."""
    monkeypatch.setattr(system_info, "gpus", lambda: [])


@pytest.fixture
def flags():
    """Puts torch's number formats back."""
    old = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(old[0])
    torch.backends.cudnn.allow_tf32 = old[1]


@pytest.fixture
def card(monkeypatch):
    """Pretends that torch, built for some architectures, sees cards of these compute capabilities."""

    def put(*capabilities, built=CU130, cuda="13.0", hip=None):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: capabilities[index])
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)

    return put


# --- choice


@pytest.mark.parametrize(
    ("counts", "kind"),
    [
        ({"cuda": 1, "mps": 1, "xpu": 1, "cpu": 1}, "cuda"),
        ({"mps": 1, "xpu": 1, "cpu": 1}, "mps"),
        ({"xpu": 2, "cpu": 1}, "xpu"),
        ({"cpu": 1}, "cpu"),
    ],
)
def test_auto_takes_the_first_that_is_there(counts, kind):
    chosen = devices.select("auto", there(**counts))
    assert (chosen.kind, chosen.index) == (kind, 0)


def test_a_device_is_taken_by_its_name():
    two = there(cuda=2, cpu=1)
    for device, kind, index in (("cuda", "cuda", 0), ("cuda:0", "cuda", 0), ("cuda:1", "cuda", 1), ("cpu", "cpu", 0)):
        chosen = devices.select(device, two)
        assert (chosen.kind, chosen.index) == (kind, index)
    assert devices.select("cuda:0", there(cuda=1, cpu=1)).index == 0
    assert devices.available(two) == ["cuda", "cuda:0", "cuda:1", "cpu"]
    assert devices.available(there(cuda=1, mps=1, cpu=1)) == ["cuda", "mps", "cpu"]


@pytest.mark.parametrize(
    ("device", "counts", "expected"),
    [
        ("cuda", {"cpu": 1}, "auto | cpu"),
        ("mps", {"cuda": 1, "cpu": 1}, "auto | cuda | cpu"),
        ("cuda:1", {"cuda": 1, "cpu": 1}, "auto | cuda | cpu"),
        ("cuda:2", {"cuda": 2, "cpu": 1}, "auto | cuda | cuda:0 | cuda:1 | cpu"),
        ("xpu:0", {"cpu": 1}, "auto | cpu"),
    ],
)
def test_a_device_that_is_not_there_is_refused_with_those_that_are(device, counts, expected):
    assert line(devices.select, device, there(**counts)) == (f'device: "{device}" is not there: expected {expected}')


def test_the_refusal_says_why_a_gpu_that_is_there_cannot_be_used(monkeypatch):
    monkeypatch.setattr(devices, "unused_gpu", lambda: "NVIDIA GeForce GTX 970 is there, but old")
    assert line(devices.select, "cuda", there(cpu=1)) == (
        'device: "cuda" is not there: expected auto | cpu (NVIDIA GeForce GTX 970 is there, but old)'
    )


def test_the_real_ones_offer_the_cpu_everywhere():
    assert [backend.kind for backend in devices.BACKENDS] == ["cuda", "mps", "xpu", "cpu"]
    assert devices.available()[-1] == "cpu"
    assert isinstance(devices.select("cpu"), Cpu)


# --- precision


def test_a_precision_that_the_backend_cannot_do_is_refused():
    assert line(Standin().set_precision, "bf16") == 'precision: "bf16" is not allowed on mps: expected fp32'
    assert line(Cpu().set_precision, "tf32") == 'precision: "tf32" is not allowed on cpu: expected fp32 | bf16'
    Standin().set_precision("fp32")


@pytest.mark.parametrize("backend", [Cpu, Xpu])
def test_fp32_is_fp32_whatever_was_allowed_before(backend, flags):
    torch.set_float32_matmul_precision("medium")
    backend().set_precision("fp32")
    assert torch.get_float32_matmul_precision() == "highest"


def test_tf32_is_off_unless_asked_for(card, flags):
    card((8, 6))
    chosen = Cuda()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # cudnn's is torch's default
    for precision, allowed in (("fp32", False), ("tf32", True), ("bf16", False)):
        chosen.set_precision(precision)
        assert torch.backends.cuda.matmul.allow_tf32 is allowed
        assert torch.backends.cudnn.allow_tf32 is allowed


@pytest.mark.parametrize(
    ("capability", "hip", "name", "precisions", "channels_last"),
    [
        ((6, 1), None, "cuda", ("fp32", "fp16"), False),
        ((7, 5), None, "cuda", ("fp32", "fp16"), True),
        ((8, 0), None, "cuda", ("fp32", "tf32", "bf16", "fp16"), True),
        ((12, 0), None, "cuda", ("fp32", "tf32", "bf16", "fp16"), True),
        ((9, 0), "7.2", "rocm", ("fp32", "bf16", "fp16"), False),
    ],
)
def test_a_card_offers_what_its_generation_can_do(card, capability, hip, name, precisions, channels_last):
    card(capability, hip=hip)
    chosen = Cuda()
    assert (chosen.kind, chosen.name, chosen.precisions) == ("cuda", name, precisions)
    assert chosen.channels_last("fp16") is channels_last
    assert not chosen.channels_last("fp32")  # slower without tensor cores
    assert chosen.asynchronous


def test_each_card_is_asked_for_its_own_generation(card):
    card((8, 0), (7, 5))
    assert Cuda(1).precisions == ("fp32", "fp16")
    assert Cuda(1).device == torch.device("cuda:1")


@pytest.mark.parametrize(
    ("capability", "best"),
    [((5, 2), "fp32"), ((6, 0), "fp16"), ((6, 1), "fp32"), ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"),
     ((8, 6), "bf16"), ((12, 0), "bf16")],
)  # fmt: skip
def test_a_cards_best_precision_is_one_that_it_computes_in_itself(card, capability, best):
    card(capability)
    assert Cuda().best_precision() == best in Cuda().precisions


@pytest.mark.parametrize(
    ("architecture", "best"),
    [("gfx900", "fp16"), ("gfx906:sramecc+:xnack-", "fp16"), ("gfx908", "bf16"), ("gfx90a:sramecc+:xnack-", "bf16"),
     ("gfx90c", "fp16"), ("gfx942", "bf16"), ("gfx1030", "fp16"), ("gfx1100", "bf16"), ("gfx1201", "bf16")],
)  # fmt: skip
def test_amds_best_precision_goes_by_the_architecture(card, monkeypatch, architecture, best):
    card((9, 0), hip="7.2")
    properties = SimpleNamespace(gcnArchName=architecture)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert Cuda().best_precision() == best in Cuda().precisions


@pytest.mark.parametrize(
    ("flags", "has_onednn", "best"),
    [
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, True, "fp32"),
        ({"avx512_bf16": True}, True, "bf16"),
        ({"amx_bf16": True}, True, "bf16"),
        ({"neon": True, "bf16": True}, True, "bf16"),
        ({"neon": True, "bf16": True}, False, "fp32"),  # a Mac's processor: nothing in torch uses it there
        ({}, True, "fp32"),
    ],
)
def test_a_processors_best_precision_is_bf16_where_its_instructions_are_used(monkeypatch, flags, has_onednn, best):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: has_onednn)
    assert Cpu().best_precision() == best


@pytest.mark.parametrize(
    ("chip", "best"),
    [("Apple M1", "fp16"), ("Apple M2 Ultra", "fp16"), ("Apple M3 Pro", "bf16"), ("Apple M4", "bf16"),
     ("Apple M10", "bf16"), ("Apple GPU", "bf16")],
)  # fmt: skip
def test_apples_first_two_generations_only_emulate_bf16(metal, monkeypatch, chip, best):
    monkeypatch.setattr(system_info, "facts", lambda: {"gpus": [{"vendor": "Apple", "name": chip}]})
    assert Mps().best_precision() == best in Mps.precisions


@pytest.mark.parametrize(("has_matrix_units", "best"), [(True, "bf16"), (False, "fp32")])
def test_intels_best_precision_is_that_of_its_matrix_units(monkeypatch, has_matrix_units, best):
    properties = SimpleNamespace(has_subgroup_matrix_multiply_accumulate=has_matrix_units)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda index: properties)
    assert Xpu().best_precision() == best in Xpu.precisions


def test_a_backend_that_tells_nothing_has_fp32():
    assert Standin().best_precision() == "fp32"


@pytest.mark.parametrize(("precision", "enabled"), [("fp32", False), ("bf16", True)])
def test_autocast_is_for_bf16_alone(precision, enabled):
    with Cpu().autocast(precision):
        assert torch.is_autocast_enabled("cpu") is enabled
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if enabled else torch.float32)


# --- memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.OutOfMemoryError("Allocation on device"),
        MemoryError(),
    ],
    ids=["cuda", "mps", "cpu", "windows", "cublas", "torch", "numpy"],
)
def test_running_out_of_memory_ends_with_what_to_lower(error):
    with pytest.raises(OutOfMemoryError) as caught, Standin().memory_errors():
        raise error
    assert str(caught.value) == (
        "mps is out of memory: lower batch_size, image_size or data.limit, or choose a smaller model"
    )
    assert caught.value.__cause__ is error
    assert isinstance(caught.value, StageError)


def test_torchs_own_allocator_is_understood():
    with pytest.raises(OutOfMemoryError, match=r"^cpu is out of memory: "), Cpu().memory_errors():
        torch.empty(2**50, dtype=torch.uint8)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("memory"),
        StageError("out of memory"),  # it has its one line
        KeyboardInterrupt(),
    ],
)
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as caught, Cpu().memory_errors():
        raise error
    assert caught.value is error


def test_without_an_error_nothing_happens():
    with Cpu().memory_errors():
        pass


@pytest.mark.parametrize(("backend", "module"), [(Cuda, torch.cuda), (Mps, torch.mps), (Xpu, torch.xpu)])
def test_memory_that_is_let_go_goes_back_to_the_device_cycles_included(monkeypatch, card, backend, module):
    card((8, 0))
    tensor = torch.ones(3)
    held, gone = {"tensor": tensor}, []
    held["itself"] = held
    alive = weakref.ref(tensor)
    monkeypatch.setattr(module, "empty_cache", lambda: gone.append(alive() is None))
    chosen = backend()
    del tensor, held
    chosen.release_memory()
    assert gone == [True]


@pytest.mark.parametrize("backend", [Backend, Cpu])
def test_where_torch_keeps_no_memory_there_is_none_to_release(backend):
    assert backend().release_memory() is None


# --- the CPU


def test_the_cpus_peak_is_the_process_and_grows_with_what_it_holds():
    chosen = Cpu()
    chosen.reset_peak_memory()
    before = chosen.memory_mib()["peak"]
    held = torch.ones(200 * 2**20, dtype=torch.uint8)
    peak = chosen.memory_mib()["peak"]
    assert before > 50  # torch alone takes more
    assert peak >= before
    if sys.platform == "linux":  # elsewhere an earlier peak may hide it
        assert peak > before + 150
    assert held[-1] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a peak")
def test_the_cpus_peak_is_that_since_the_reset():
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("a sandbox without clear_refs")
    chosen = Cpu()
    chosen.reset_peak_memory()
    held = torch.ones(200 * 2**20, dtype=torch.uint8)
    high = chosen.memory_mib()["peak"]
    del held
    assert chosen.memory_mib()["peak"] >= high - 1
    chosen.reset_peak_memory()
    assert chosen.memory_mib()["peak"] < high - 150


def test_what_the_cpu_does_not_tell_is_absent(monkeypatch):
    monkeypatch.setattr(Cpu, "_peak_mib", lambda self: None)
    assert Cpu().memory_mib() == {}


@pytest.mark.parametrize(
    ("limit", "left", "capacity", "free"),
    [(None, None, 16, 8), (4, 1, 4, 1), (12, 10, 12, 8), (64, 60, 16, 8)],
    ids=["none", "limit", "others need it", "high limit"],
)
def test_the_cpus_memory_is_what_the_container_may_have(monkeypatch, limit, left, capacity, free):
    monkeypatch.setattr(cpu.psutil, "virtual_memory", lambda: SimpleNamespace(total=16 * MIB, available=8 * MIB))
    limits = cpu.cgroup.Limits(None, limit and limit * MIB, left and left * MIB)
    monkeypatch.setattr(cpu.cgroup, "limits", lambda: limits)
    assert (Cpu().capacity_mib(), Cpu().free_bytes()) == (capacity, free * MIB)


def test_this_machines_own_memory_is_told():
    assert 0 < Cpu().free_bytes() / MIB < Cpu().capacity_mib()


def test_the_cpu_is_one_device_without_an_index_named_by_the_machine(monkeypatch):
    monkeypatch.setattr(system_info, "facts", lambda: {"cpu": "AMD EPYC", "memory_gib": 23.5})
    chosen = Cpu()
    assert chosen.device == torch.zeros(1).device == torch.device("cpu")
    assert (Cpu.count(), chosen.channels_last("fp32"), chosen.asynchronous) == (1, True, False)
    facts = chosen.facts()
    assert (facts["name"], facts["memory_gib"]) == ("AMD EPYC", 23.5)
    assert chosen.synchronize() is None


# --- CUDA


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((6, 1), CU130, False),
        ((6, 1), CU126, True),  # sm_60: a later minor version of the same major
        ((5, 2), CU126, True),
        ((3, 5), CU126, False),
        ((7, 0), CU130, False),  # sm_75 is the same major, but a later minor
        ((7, 5), CU130, True),
        ((8, 9), CU130, True),
        ((9, 0), ["sm_80", "sm_90a"], True),
        ((10, 3), CU130, True),
        ((10, 3), ["sm_100a"], False),  # an `a` is for that card alone
        ((10, 3), ["sm_100f"], True),  # an `f` for its family
        ((10, 3), ["sm_103a"], True),
        ((12, 0), CU126, False),
        ((12, 0), [*CU126, "compute_90"], True),  # PTX, which the driver compiles
        ((12, 0), [*CU126, "compute_90a"], False),
        ((7, 0), ["compute_75"], False),
        ((8, 0), [], False),
    ],
)
def test_a_build_runs_on_the_cards_that_it_has_code_for(card, capability, built, runs):
    card(capability, built=built)
    assert runs_on(0) is runs
    assert Cuda.count() == int(runs)


def test_amds_cards_need_no_list(card):
    card((9, 0), built=["gfx90a", "gfx1100"], hip="7.2", cuda=None)
    assert runs_on(0)
    assert Cuda.count() == 1


def test_no_card_is_none(card):
    card()
    assert Cuda.count() == 0


@pytest.mark.parametrize(
    ("drivers", "limit", "expected"),
    [
        (["580.65", "580.65"], 70.0, {"driver": "580.65", "power_limit_watts": 70.0}),
        (["580.65", "570.0"], None, {}),
        ([None], 70.0, {"power_limit_watts": 70.0}),
        ([], None, {}),
    ],
)
def test_the_vendors_facts_are_those_that_all_cards_of_the_name_share(monkeypatch, card, drivers, limit, expected):
    card((7, 5))
    cards = [{"vendor": "NVIDIA", "name": "Tesla T4"} | ({"driver": d} if d else {}) for d in drivers]
    other = {"vendor": "NVIDIA", "name": "Other", "driver": "1.0"}
    monkeypatch.setattr(system_info, "gpus", lambda: [other, *cards])
    monkeypatch.setattr(system_info, "power_limit_watts", lambda name: limit if name == "Tesla T4" else 450.0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    properties = SimpleNamespace(name="Tesla T4", total_memory=15 * 2**30, multi_processor_count=40, major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    facts = Cuda().facts()
    assert {key: facts[key] for key in ("driver", "power_limit_watts") if key in facts} == expected
    assert (facts["name"], facts["memory_gib"], facts["gpu_cores"]) == ("Tesla T4", 15.0, 40)
    assert facts["compute_capability"] == "7.5"
    assert "hip" not in facts
    assert None not in facts.values()


def test_cudas_memory_and_waiting_are_of_the_device_itself(monkeypatch, card):
    card((8, 0), (8, 0))
    asked = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: asked.append(("wait", device)))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: asked.append(("reset", device)))
    figures = {"max_memory_allocated": 2, "max_memory_reserved": 5, "memory_reserved": 4, "memory_allocated": 1}
    for name, mebibytes in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, held=mebibytes: asked.append(device) or held * MIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append(device) or (10 * MIB, 64 * MIB))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=(60 + index) * MIB)
    )
    second = Cuda(1)
    graphs = [torch.nn.Identity() for _ in range(2)]
    second._recorder._hidden |= {graphs[0]: 3 * MIB, graphs[1]: 7 * MIB}
    second.reset_peak_memory()
    second.synchronize()
    assert asked == [(what, torch.device("cuda:1")) for what in ("reset", "wait")]
    del asked[:]
    assert second.memory_mib() == {"peak": 2.0 + 7.0, "peak_reserved": 5.0, "driver": 54.0}
    assert second.free_bytes() == 13 * MIB  # 10 on the card, 3 in the allocator
    assert set(asked) == {torch.device("cuda:1")}
    assert second.capacity_mib() == 61.0
    del graphs[1]
    assert second.memory_mib()["peak"] == 2.0 + 3.0
    del graphs[:]
    assert second.memory_mib()["peak"] == 2.0


class Queues:
    """What torch.cuda does with streams and events, told in `calls` in order; `current` is the stream in use."""

    def __init__(self, monkeypatch):
        self.calls, self.current, self.made = [], self.Stream(self, "main"), 0
        monkeypatch.setattr(torch.cuda, "Stream", self.stream)
        monkeypatch.setattr(torch.cuda, "stream", self.using)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "Event", lambda **options: self.Event(self, options))

    def stream(self, device):
        self.made += 1
        return self.Stream(self, f"side of {device}")

    @contextmanager
    def using(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    class Stream:
        def __init__(self, queues, name):
            self.queues, self.name = queues, name

        def record_event(self):
            self.queues.calls.append(f"event on {self.name}")
            return self.name

        def wait_event(self, event):
            self.queues.calls.append(f"{self.name} waits for {event}")

    class Event:
        def __init__(self, queues, options):
            self.queues, self.options = queues, options

        def record(self, stream):
            self.queues.calls.append(f"mark on {stream.name}, {self.options}")

        def elapsed_time(self, later):
            return 250.0

    class Tensor:
        def __init__(self, queues, name):
            self.queues, self.name = queues, name

        def pin_memory(self):
            self.queues.calls.append(f"pin {self.name}")
            return self

        def to(self, device, non_blocking):
            self.queues.calls.append(f"copy {self.name} to {device} on {self.queues.current.name}, {non_blocking=}")
            return type(self)(self.queues, self.name.upper())

        def record_stream(self, stream):
            self.queues.calls.append(f"{self.name} is read on {stream.name}")


@pytest.fixture
def queues(monkeypatch):
    return Queues(monkeypatch)


def test_cuda_copies_on_a_stream_of_its_own_and_the_reader_waits_for_it(queues, card):
    card((8, 0), (8, 0))
    chosen = Cuda(1)
    assert queues.made == 0
    arrived = chosen.to_device_async((queues.Tensor(queues, "a"), queues.Tensor(queues, "b")))
    side = "side of cuda:1"
    assert queues.calls == [
        "pin a", f"copy a to cuda:1 on {side}, non_blocking=True",
        "pin b", f"copy b to cuda:1 on {side}, non_blocking=True",
        f"event on {side}",
    ]  # fmt: skip
    del queues.calls[:]
    queues.current = queues.Stream(queues, "the reader's")
    assert [tensor.name for tensor in arrived()] == ["A", "B"]
    assert queues.calls == [
        f"the reader's waits for {side}",
        "A is read on the reader's",
        "B is read on the reader's",
    ]
    chosen.to_device_async(())
    assert queues.made == 1  # one for all copies


def test_cudas_mark_is_an_event_on_the_current_stream(queues, card):
    card((8, 0))
    first, last = Cuda().record_event(), Cuda().record_event()
    assert queues.calls == ["mark on main, {'enable_timing': True}"] * 2
    assert Cuda().elapsed_seconds(first, last) == 0.25


def test_what_cuda_cannot_record_is_called_as_it_is_and_why_is_kept(monkeypatch, card):
    card((8, 0))
    chosen = Cuda()

    def record(function, tensors):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCUDA kernel errors might be")

    monkeypatch.setattr(chosen._recorder, "record", record)
    assert chosen.capture_error is None
    doubled = chosen.capture_graph(lambda tensor: 2 * tensor)
    assert chosen.capture_error is None
    assert doubled(torch.ones(2)).tolist() == [2, 2]
    assert chosen.capture_error == "CUDA error: operation not permitted when stream is capturing"
    assert Cuda().capture_error is None


def test_all_that_cuda_records_shares_one_recorder_a_device(card):
    card((8, 0), (8, 0))
    chosen = Cuda(1)
    recorders = {chosen.capture_graph(abs)._recorder for _ in range(2)}
    assert recorders == {chosen._recorder}
    assert chosen._recorder._device == torch.device("cuda:1")


@pytest.mark.cuda
def test_a_real_card_gets_what_was_sent_and_tells_time_and_memory():
    chosen = devices.select("cuda")
    chosen.reset_peak_memory()
    matrix, sums = torch.ones(4096, 4096, device=chosen.device), []
    first = chosen.record_event()
    for index in range(12):
        if index % 3 == 0:  # idle: the copy is read at once, so that it must be waited for
            chosen.synchronize()
        host = torch.full((2**22,), index, dtype=torch.int32)
        arrived = chosen.to_device_async((host,))
        host.zero_()  # what was sent may be written anew
        (numbers,) = arrived()
        if index % 3 == 1:  # busy: the copy is read late, when its memory is free, and the next one was sent
            for _ in range(20):
                matrix @ matrix
        sums.append(numbers.sum())
        del numbers, arrived
    last = chosen.record_event()
    chosen.synchronize()
    assert [total.item() / 2**22 for total in sums] == list(range(12))
    assert 0 < chosen.elapsed_seconds(first, last) < 60
    memory = chosen.memory_mib()
    assert 64 < memory["peak"] <= memory["peak_reserved"] < memory["driver"] <= chosen.capacity_mib()
    assert 0 < chosen.free_bytes() / MIB < chosen.capacity_mib()


# --- Intel


@pytest.mark.parametrize(("told", "free"), [(True, 13), (False, 63)])
def test_intels_memory_is_known_even_where_the_driver_does_not_tell_it(monkeypatch, told, free):
    figures = {"max_memory_allocated": 2, "max_memory_reserved": 5, "memory_reserved": 4, "memory_allocated": 1}
    for name, mebibytes in figures.items():
        monkeypatch.setattr(torch.xpu, name, lambda device, held=mebibytes: held * MIB)

    def mem_get_info(device):
        if not told:
            raise RuntimeError("The device (Intel Arc) doesn't support querying the available free memory.")
        return 10 * MIB, 64 * MIB

    monkeypatch.setattr(torch.xpu, "mem_get_info", mem_get_info)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda index: SimpleNamespace(total_memory=64 * MIB))
    chosen = Xpu()
    assert chosen.memory_mib() == {"peak": 2.0, "peak_reserved": 5.0}
    assert (chosen.capacity_mib(), chosen.free_bytes()) == (64.0, free * MIB)


# --- Apple


class Metal:
    """What torch.mps tells; `memory` is what its driver holds, `held` what tensors do, `free` the machine's RAM."""

    def __init__(self, monkeypatch):
        self.memory, self.held, self.free, self.waited = 0, 0, 0, 0
        monkeypatch.setattr(torch.mps, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: self.memory)
        monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: self.held)
        monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12 * 2**30)
        monkeypatch.setattr(mps.psutil, "virtual_memory", lambda: SimpleNamespace(available=self.free))

    def synchronize(self):
        self.waited += 1


@pytest.fixture
def metal(monkeypatch):
    return Metal(monkeypatch)


def test_metals_peak_is_sampled_whenever_the_device_is_waited_for(metal):
    chosen = Mps()
    assert "peak" not in chosen.memory_mib()  # not 0
    for mebibytes in (3, 8, 5):
        metal.memory = mebibytes * MIB
        chosen.synchronize()
    assert (metal.waited, chosen.memory_mib()["peak"]) == (3, 8.0)
    metal.memory, metal.held = 100 * MIB, 40 * MIB  # nobody waited meanwhile
    assert chosen.memory_mib() == {"peak": 8.0, "current": 40.0, "driver": 100.0}
    chosen.reset_peak_memory()
    assert chosen.memory_mib() == {"current": 40.0, "driver": 100.0}
    metal.memory = 2 * MIB
    chosen.synchronize()
    assert chosen.memory_mib()["peak"] == 2.0


@pytest.mark.parametrize(
    ("taken", "ram", "free"),
    [(2, 14, 10), (2, 3, 3), (13, 14, 0)],
    ids=["Metal's limit", "other processes", "beyond what is recommended"],
)
def test_metals_memory_is_a_part_of_the_one_that_all_processes_share(metal, taken, ram, free):
    metal.memory, metal.held, metal.free = taken * 2**30, 2**30, ram * 2**30
    assert (Mps().capacity_mib(), Mps().free_bytes()) == (12 * 2**10, free * 2**30)


def test_metal_is_one_device_without_an_index(metal, monkeypatch):
    chosen = Mps()
    assert chosen.device == torch.device("mps")
    assert chosen.device.index is None
    assert (chosen.channels_last("bf16"), chosen.asynchronous, chosen.precisions) == (False, True, Mps.precisions)
    for is_there in (True, False):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda is_there=is_there: is_there)
        assert Mps.count() == int(is_there)


def test_the_chip_is_named_by_the_machine_not_by_torch(metal, monkeypatch):
    chip = {"vendor": "Apple", "name": "Apple M3 Pro", "for_training": True, "cores": 18}
    here = {"cpu": "Apple M3 Pro", "memory_gib": 36.0, "gpus": [chip]}
    monkeypatch.setattr(system_info, "facts", lambda: here)
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    facts = Mps().facts()
    assert (facts["name"], facts["gpu_cores"], facts["memory_gib"]) == ("Apple M3 Pro", 18, 36.0)
    assert (facts["recommended_memory_gib"], facts["mps_cpu_fallback"]) == (12.0, True)
    del here["gpus"]
    monkeypatch.delenv("PYTORCH_ENABLE_MPS_FALLBACK")
    facts = Mps().facts()
    assert (facts["name"], facts["mps_cpu_fallback"]) == ("Apple M3 Pro", False)
    assert "gpu_cores" not in facts


# --- recording

BY_ITSELF = ("reduce-overhead", "max-autotune")
"""Modes of torch.compile that record."""


@pytest.mark.parametrize(
    ("graph", "mode", "recorded"),
    [
        *((graph, mode, graph is not False) for graph in ("auto", True, False) for mode in ("off", "default")),
        *((graph, mode, False) for graph in ("auto", False) for mode in BY_ITSELF),
    ],
)
def test_launches_are_recorded_unless_told_otherwise_or_compiling_does_so(card, graph, mode, recorded):
    card((8, 0))
    assert Cuda().recorded(graph, mode) is recorded


@pytest.mark.parametrize("mode", BY_ITSELF)
def test_launches_are_not_recorded_twice(card, mode):
    card((8, 0))
    assert line(Cuda().recorded, True, mode) == (
        f'graph: true is not allowed with compile: "{mode}", which records by itself'
    )


@pytest.mark.parametrize("backend", [Cpu, Mps, Xpu, Standin])
def test_a_backend_that_cannot_record_leaves_a_function_as_it_is(backend):
    chosen = backend()
    for graph in ("auto", False):
        assert chosen.recorded(graph, "off") is False
    for mode in ("off", "default", *BY_ITSELF):
        assert line(chosen.recorded, True, mode) == (
            f"graph: true is not allowed on {chosen.kind}: expected auto | false"
        )
    assert chosen.capture_graph(abs) is abs
    assert chosen.capture_error is None


def test_torchs_optimizers_are_fused_where_that_is_faster():
    assert [dict(backend.optimizer_options) for backend in (Cuda, Cpu, Mps, Xpu)] == [
        {"fused": True, "capturable": True}, {"fused": True}, {}, {},
    ]  # fmt: skip


# --- a backend that offers nothing


def test_a_backend_that_tells_nothing_of_its_memory_tells_none():
    backend = Backend()
    backend.reset_peak_memory()
    assert backend.memory_mib() == {}
    assert (backend.capacity_mib(), backend.free_bytes()) == (None, None)


def test_a_backend_without_marks_of_its_own_gives_none():
    backend = Backend()
    assert backend.record_event() is None
    with pytest.raises(NotImplementedError):
        backend.elapsed_seconds(None, None)


@pytest.mark.parametrize("backend", [Cpu, Standin])
def test_a_plain_copy_is_the_tensor_itself_where_it_is_there_already(backend):
    inputs, labels = torch.ones(2, 3), torch.tensor([0, 1])
    arrived = backend().to_device_async((inputs, labels))
    first, second = arrived()
    assert first is inputs
    assert second is labels
    assert backend().to_device_async(())() == ()


def test_a_plain_copy_is_done_when_it_was_sent(monkeypatch):
    monkeypatch.setattr(Standin, "device", torch.device("meta"))
    host = torch.ones(2, 3)
    copied = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **options: copied.append((args, options)) or self)
    arrived = Standin().to_device_async((host,))
    assert copied == [((torch.device("meta"),), {})]  # nothing non-blocking
    assert arrived() == (host,)
    assert len(copied) == 1


# --- a GPU that torch can't use


@pytest.fixture
def unused(monkeypatch):
    """What is said of a machine's GPUs where torch offers the CPU alone."""
    monkeypatch.setattr(torch, "__version__", "2.14.1+test")

    def said(*gpus, available=("cpu",)):
        monkeypatch.setattr(system_info, "gpus", lambda: list(gpus))
        monkeypatch.setattr(devices, "available", lambda: list(available))
        return devices.unused_gpu()

    return said


def test_no_gpu_is_unused_where_there_is_none(unused):
    assert unused() is None
    assert unused({"vendor": "Intel", "name": "Intel UHD Graphics", "for_training": False}) is None


@pytest.mark.parametrize("available", [("cuda", "cpu"), ("cuda", "cuda:0", "cuda:1", "cpu"), ("mps", "cpu")])
def test_no_gpu_is_unused_where_one_is_used(unused, available):
    assert unused(MAXWELL | {"driver": "580.65"}, available=available) is None


def test_a_driver_that_does_not_answer(unused, card):
    card()
    said = unused(MAXWELL)
    assert said.startswith("NVIDIA GeForce GTX 970 is there, but its driver does not answer: ")


def test_a_torch_without_cuda(unused, card):
    card(cuda=None)
    said = unused(MAXWELL | {"driver": "580.65"})
    assert said.startswith(
        "NVIDIA GeForce GTX 970 is there, but this torch 2.14.1+test is built without CUDA: make run "
    )
    assert "TORCH=cu126" in said  # for a card as old as this


def test_a_driver_too_old_for_the_build(unused, card):
    card()
    said = unused(MAXWELL | {"driver": "470.1"})
    assert "its driver 470.1 does not serve CUDA 13.0: update the driver" in said


def test_a_card_too_old_for_the_build(unused, card):
    card((5, 2))
    said = unused(MAXWELL | {"driver": "580.65"})
    assert "2.14.1+test has code for sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 alone: make run TORCH=cu126" in said


@pytest.mark.parametrize(("vendor", "command"), [("AMD", "TORCH=rocm"), ("Intel", "TORCH=xpu")])
def test_other_makers_cards_need_another_torch(unused, vendor, command):
    said = unused({"vendor": vendor, "name": f"{vendor} card", "for_training": True})
    assert said.startswith(f"{vendor} card is there, but this torch 2.14.1+test ")
    assert command in said


@pytest.mark.parametrize(("is_built", "word"), [(False, "arm64"), (True, "macOS 14")])
def test_apples_gpu_needs_a_python_for_it_and_a_macos_of_now(unused, monkeypatch, is_built, word):
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: is_built)
    assert word in unused({"vendor": "Apple", "name": "Apple M1", "for_training": True})


def test_a_gpu_that_trains_is_named_before_one_that_displays(unused, card):
    card(cuda=None)
    integrated = {"vendor": "Intel", "name": "Intel UHD Graphics", "for_training": False}
    assert unused(integrated, MAXWELL | {"driver": "1"}).startswith(MAXWELL["name"])


# --- torch itself


def test_torchs_facts_are_plain():
    facts = devices.torch_facts()
    assert facts["torch"] == torch.__version__
    assert "\n" not in facts["build"]
    assert facts["threads"] == torch.get_num_threads()


@pytest.mark.parametrize(
    ("mode", "images", "chosen"),
    [
        ("auto", 1_000_000, "off"),
        ("auto", 50_000_000, "default"),
        ("off", 50_000_000, "off"),
        ("default", 1, "default"),
    ],
)
def test_compile_auto_goes_by_the_images(card, mode, images, chosen):
    card((9, 0))
    assert Cuda().compile_mode(mode, images) == chosen


def test_compile_modes_that_a_backend_lacks_are_refused():
    assert Cpu().compile_mode("auto", 10**12) == "off"
    with pytest.raises(UsageError, match=r'compile: "reduce-overhead" is not allowed on cpu: expected auto \| off'):
        Cpu().compile_mode("reduce-overhead", 1)


@pytest.mark.parametrize(
    ("cards", "count"),
    [([(9, 0), (8, 0)], 2), ([(9, 0), (6, 1)], 1), ([(6, 1), (9, 0)], 0), ([(9, 0), (6, 1), (9, 0)], 1)],
)
def test_a_card_that_torch_has_no_code_for_is_never_counted_in(card, cards, count):
    card(*cards)
    assert Cuda.count() == count


@pytest.mark.parametrize(("hip", "tuned"), [(None, True), ("7.0", False)])
def test_cudnn_tries_its_kernels_and_miopen_does_not(card, monkeypatch, hip, tuned):
    card((9, 0))
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    Cuda().tune()
    assert torch.backends.cudnn.benchmark is tuned
    Cuda().tune(repeated=False)
    assert not torch.backends.cudnn.benchmark


TWICE = """
import resource, sys, torch
from pipeline.devices.cpu import Cpu
if sys.argv[1] == "kept":
    Cpu().tune()
for _ in range(12):  # an aligned block takes some more, so that the first ones don't fit where one was freed
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_cpu_keeps_what_was_freed():
    def faults(how):
        done = subprocess.run(
            [sys.executable, "-c", TWICE, how], cwd=config.ROOT, capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert faults("kept") < 10
    assert faults("given back") > 30  # 16,384 pages of 4 KiB
