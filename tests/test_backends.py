"""Which device trains: chosen in order, refused by name, told apart from what torch can't use."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from standin import Standin

from pipeline import backends, machine
from pipeline.backends import Backend
from pipeline.backends.cpu import Cpu
from pipeline.backends.cuda import Cuda, runs_on
from pipeline.backends.mps import Mps
from pipeline.backends.xpu import Xpu
from pipeline.errors import StageError, UsageError

MAXWELL = {"vendor": "NVIDIA", "name": "NVIDIA GeForce GTX 970", "for_training": True}
CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


def there(**counts):
    """Stand-in backends in the order of BACKENDS, `counts` of each kind."""

    def made(name):
        return type(name.title(), (Standin,), {"kind": name, "count": classmethod(lambda _: counts.get(name, 0))})

    return tuple(made(backend.kind) for backend in backends.BACKENDS)


def line(call, *args):
    with pytest.raises(UsageError) as caught:
        call(*args)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """The machine that runs the tests may have one."""
    monkeypatch.setattr(machine, "gpus", lambda: [])


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
    chosen = backends.select("auto", there(**counts))
    assert (chosen.kind, chosen.index) == (kind, 0)


def test_a_device_is_taken_by_its_name():
    two = there(cuda=2, cpu=1)
    for device, kind, index in (("cuda", "cuda", 0), ("cuda:0", "cuda", 0), ("cuda:1", "cuda", 1), ("cpu", "cpu", 0)):
        chosen = backends.select(device, two)
        assert (chosen.kind, chosen.index) == (kind, index)
    assert backends.select("cuda:0", there(cuda=1, cpu=1)).index == 0
    assert backends.available(two) == ["cuda", "cuda:0", "cuda:1", "cpu"]
    assert backends.available(there(cuda=1, mps=1, cpu=1)) == ["cuda", "mps", "cpu"]


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
    assert line(backends.select, device, there(**counts)) == (f'device: "{device}" is not there: expected {expected}')


def test_the_refusal_says_why_a_gpu_that_is_there_cannot_be_used(monkeypatch):
    monkeypatch.setattr(backends, "unused_gpu", lambda: "NVIDIA GeForce GTX 970 is there, but old")
    assert line(backends.select, "cuda", there(cpu=1)) == (
        'device: "cuda" is not there: expected auto | cpu (NVIDIA GeForce GTX 970 is there, but old)'
    )


def test_the_real_ones_offer_the_cpu_everywhere():
    assert [backend.kind for backend in backends.BACKENDS] == ["cuda", "mps", "xpu", "cpu"]
    assert backends.available()[-1] == "cpu"
    assert isinstance(backends.select("cpu"), Cpu)


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
    assert chosen.pinned_memory


def test_each_card_is_asked_for_its_own_generation(card):
    card((8, 0), (7, 5))
    assert Cuda(1).precisions == ("fp32", "fp16")
    assert Cuda(1).device == torch.device("cuda:1")


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
    with pytest.raises(StageError) as caught, Standin().memory_errors():
        raise error
    assert str(caught.value) == (
        "mps is out of memory: lower batch_size, image_size or data.limit, or choose a smaller model"
    )
    assert caught.value.__cause__ is error
    assert caught.type is StageError


def test_torchs_own_allocator_is_understood():
    with pytest.raises(StageError, match=r"^cpu is out of memory: "), Cpu().memory_errors():
        torch.empty(2**50, dtype=torch.uint8)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("memory"), KeyboardInterrupt()],
)
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as caught, Cpu().memory_errors():
        raise error
    assert caught.value is error


def test_without_an_error_nothing_happens():
    with Cpu().memory_errors():
        pass


# --- the CPU


def test_the_cpus_peak_is_the_process_and_grows_with_what_it_holds():
    cpu = Cpu()
    cpu.reset_peak_memory()
    before = cpu.peak_memory_mib()
    held = torch.ones(200 * 2**20, dtype=torch.uint8)
    peak = cpu.peak_memory_mib()
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
    cpu = Cpu()
    cpu.reset_peak_memory()
    held = torch.ones(200 * 2**20, dtype=torch.uint8)
    high = cpu.peak_memory_mib()
    del held
    assert cpu.peak_memory_mib() >= high - 1
    cpu.reset_peak_memory()
    assert cpu.peak_memory_mib() < high - 150


def test_the_cpu_is_one_device_without_an_index_named_by_the_machine(monkeypatch):
    monkeypatch.setattr(machine, "facts", lambda: {"cpu": "AMD EPYC", "memory_gib": 23.5})
    cpu = Cpu()
    assert cpu.device == torch.zeros(1).device == torch.device("cpu")
    assert (Cpu.count(), cpu.channels_last("fp32"), cpu.pinned_memory) == (1, True, False)
    facts = cpu.facts()
    assert (facts["name"], facts["memory_gib"]) == ("AMD EPYC", 23.5)
    assert cpu.synchronise() is None


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
    monkeypatch.setattr(machine, "gpus", lambda: [other, *cards])
    monkeypatch.setattr(machine, "power_limit_watts", lambda name: limit if name == "Tesla T4" else 450.0)
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
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: asked.append(("peak", device)) or 2**21)
    second = Cuda(1)
    second.reset_peak_memory()
    second.synchronise()
    assert second.peak_memory_mib() == 2.0
    assert asked == [(what, torch.device("cuda:1")) for what in ("reset", "wait", "peak")]


# --- Apple


class Metal:
    """What torch.mps tells; `memory` is what its driver holds."""

    def __init__(self, monkeypatch):
        self.memory, self.waited = 0, 0
        monkeypatch.setattr(torch.mps, "synchronize", self.synchronise)
        monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: self.memory)
        monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12 * 2**30)

    def synchronise(self):
        self.waited += 1


@pytest.fixture
def metal(monkeypatch):
    return Metal(monkeypatch)


def test_metals_peak_is_sampled_whenever_the_device_is_waited_for(metal):
    mps = Mps()
    assert mps.peak_memory_mib() is None  # not 0
    for mebibytes in (3, 8, 5):
        metal.memory = mebibytes * 2**20
        mps.synchronise()
    assert (metal.waited, mps.peak_memory_mib()) == (3, 8.0)
    metal.memory = 100 * 2**20  # nobody waited meanwhile
    assert mps.peak_memory_mib() == 8.0
    mps.reset_peak_memory()
    assert mps.peak_memory_mib() is None
    metal.memory = 2 * 2**20
    mps.synchronise()
    assert mps.peak_memory_mib() == 2.0


def test_metal_is_one_device_without_an_index(metal, monkeypatch):
    mps = Mps()
    assert mps.device == torch.device("mps")
    assert mps.device.index is None
    assert (mps.channels_last("bf16"), mps.pinned_memory, mps.precisions) == (False, False, ("fp32", "bf16"))
    for is_there in (True, False):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda is_there=is_there: is_there)
        assert Mps.count() == int(is_there)


def test_the_chip_is_named_by_the_machine_not_by_torch(metal, monkeypatch):
    chip = {"vendor": "Apple", "name": "Apple M3 Pro", "for_training": True, "cores": 18}
    here = {"cpu": "Apple M3 Pro", "memory_gib": 36.0, "gpus": [chip]}
    monkeypatch.setattr(machine, "facts", lambda: here)
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    facts = Mps().facts()
    assert (facts["name"], facts["gpu_cores"], facts["memory_gib"]) == ("Apple M3 Pro", 18, 36.0)
    assert (facts["recommended_memory_gib"], facts["mps_cpu_fallback"]) == (12.0, True)
    del here["gpus"]
    monkeypatch.delenv("PYTORCH_ENABLE_MPS_FALLBACK")
    facts = Mps().facts()
    assert (facts["name"], facts["mps_cpu_fallback"]) == ("Apple M3 Pro", False)
    assert "gpu_cores" not in facts


# --- a backend that offers nothing


def test_a_backend_that_tells_no_peak_tells_none():
    backend = Backend()
    backend.reset_peak_memory()
    assert backend.peak_memory_mib() is None


# --- a GPU that torch can't use


@pytest.fixture
def unused(monkeypatch):
    """What is said of a machine's GPUs where torch offers the CPU alone."""
    monkeypatch.setattr(torch, "__version__", "2.14.1+test")

    def said(*gpus, devices=("cpu",)):
        monkeypatch.setattr(machine, "gpus", lambda: list(gpus))
        monkeypatch.setattr(backends, "available", lambda: list(devices))
        return backends.unused_gpu()

    return said


def test_no_gpu_is_unused_where_there_is_none(unused):
    assert unused() is None
    assert unused({"vendor": "Intel", "name": "Intel UHD Graphics", "for_training": False}) is None


@pytest.mark.parametrize("devices", [("cuda", "cpu"), ("cuda", "cuda:0", "cuda:1", "cpu"), ("mps", "cpu")])
def test_no_gpu_is_unused_where_one_is_used(unused, devices):
    assert unused(MAXWELL | {"driver": "580.65"}, devices=devices) is None


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
    facts = backends.torch_facts()
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
