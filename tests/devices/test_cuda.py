"""NVIDIA's and AMD's GPUs, with stand-ins for torch.cuda and pynvml. test_real_devices.py needs a real card."""

import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import fails
from nvml import UUID, Nvml, NVMLError

from pipeline.devices import BACKENDS
from pipeline.devices.cuda import Cuda, has_code_for
from pipeline.errors import UsageError
from pipeline.profiling import system_info

MIB = 2**20
CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


@pytest.fixture
def cards(monkeypatch):
    """Make torch report cards with these compute capabilities, and a build for these architectures."""

    def put(*capabilities, built=CU130, cuda="13.0", hip=None, **properties):
        properties = SimpleNamespace(**properties)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: capabilities[index])
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)

    return put


# --- generations


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((6, 1), CU130, False),
        ((6, 1), CU126, True),  # sm_60: a later minor version of the same major
        ((7, 0), CU130, False),  # sm_75 is the same major, but a later minor
        ((9, 0), ["sm_80", "sm_90a"], True),
        ((10, 3), ["sm_100f"], True),
        ((12, 0), CU126, False),
        ((12, 0), [*CU126, "compute_90"], True),  # PTX, which the driver compiles
        ((7, 0), ["compute_75"], False),
    ],
)
def test_a_build_of_torch_runs_on_the_cards_that_it_has_code_for(cards, capability, built, runs):
    cards(capability, built=built)
    assert has_code_for(0) is runs
    assert Cuda.count() == int(runs)


@pytest.mark.parametrize(
    ("capabilities", "options", "count"),
    [
        ([(9, 0), (8, 0)], {}, 2),
        ([(9, 0), (6, 1), (9, 0)], {}, 1),  # the third would be cuda:2 to CUDA
        ([(9, 0)], {"built": ["gfx90a"], "hip": "7.2", "cuda": None}, 1),
    ],
)
def test_cards_count_up_to_the_first_that_torch_has_no_code_for(cards, capabilities, options, count):
    cards(*capabilities, **options)
    assert Cuda.count() == count


@pytest.mark.parametrize(
    ("capability", "precisions", "best", "channels_last"),
    [
        ((6, 0), ("fp32", "fp16"), "fp16", False),
        ((6, 1), ("fp32", "fp16"), "fp32", False),
        ((7, 5), ("fp32", "fp16"), "fp16", True),
        ((8, 0), ("fp32", "tf32", "bf16", "fp16"), "bf16", True),
    ],
)
def test_precisions_follow_from_the_cards_generation(cards, capability, precisions, best, channels_last):
    cards((8, 0), capability)  # each card is asked for its own
    chosen = Cuda(1)
    assert (chosen.kind, chosen.name, chosen.precisions) == ("cuda", "cuda", precisions)
    assert chosen.device == torch.device("cuda:1") and chosen.asynchronous
    assert chosen.best_precision() == best
    assert chosen.channels_last("fp16") is channels_last and not chosen.channels_last("fp32")


@pytest.mark.parametrize(
    ("architecture", "best"),
    [("gfx906:sramecc+:xnack-", "fp16"), ("gfx90a:sramecc+:xnack-", "bf16"), ("gfx1030", "fp16"), ("gfx1100", "bf16")],
)
def test_amds_best_precision_follows_from_the_architecture(cards, architecture, best):
    cards((9, 0), hip="7.2", gcnArchName=architecture)
    chosen = Cuda()
    assert (chosen.name, chosen.precisions) == ("rocm", ("fp32", "bf16", "fp16"))
    assert chosen.best_precision() == best and not chosen.channels_last("bf16")


def test_tf32_is_off_unless_asked_for(cards):
    cards((8, 6))
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # torch's default for cuDNN
    chosen = Cuda()
    for precision, allowed in (("fp32", False), ("tf32", True), ("bf16", False)):
        chosen.set_precision(precision)
        assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is allowed
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize(("hip", "tuned"), [(None, True), ("7.0", False)])
def test_cudnn_is_autotuned_and_miopen_is_not(cards, monkeypatch, hip, tuned):
    cards((9, 0), hip=hip)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    Cuda().tune()
    assert torch.backends.cudnn.benchmark is tuned
    Cuda().tune(repeated=False)
    assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize(
    ("mode", "images", "chosen"),
    [("auto", 10**6, "off"), ("auto", 5 * 10**7, "default"), ("off", 5 * 10**7, "off"), ("default", 1, "default")],
)
def test_compile_auto_depends_on_the_number_of_images(cards, mode, images, chosen):
    cards((9, 0))
    assert Cuda().compile_mode(mode, images) == chosen


@pytest.mark.parametrize(("mode", "allowed"), [("off", True), ("default", True), ("reduce-overhead", False)])
def test_steps_are_captured_unless_torch_compile_captures_them(cards, mode, allowed):
    cards((8, 0))
    assert Cuda().use_cuda_graph("auto", mode) is allowed
    assert Cuda().use_cuda_graph(False, mode) is False
    if allowed:
        assert Cuda().use_cuda_graph(True, mode) is True
    else:
        assert fails(UsageError, Cuda().use_cuda_graph, True, mode).startswith("graph: ")


# --- why a card can't be used


@pytest.mark.parametrize(
    ("gpu", "options", "words"),
    [
        ({"vendor": "NVIDIA"}, {}, ["driver", "--gpus all"]),
        ({"vendor": "NVIDIA", "driver": "580.65"}, {"cuda": None}, ["without CUDA", "TORCH=cu130", "TORCH=cu126"]),
        ({"vendor": "NVIDIA", "driver": "470.1"}, {}, ["470.1", "CUDA 13.0", "update", "TORCH=cu126"]),
        ({"vendor": "NVIDIA", "driver": "580.65", "card": (5, 2)}, {}, [*CU130, "TORCH=cu126"]),
        ({"vendor": "AMD"}, {}, ["ROCm", "TORCH=rocm"]),
    ],
    ids=["no driver", "built without CUDA", "driver too old", "card too old", "AMD"],
)
def test_an_unusable_card_is_reported_with_what_to_do(cards, gpu, options, words):
    cards(*([gpu["card"]] if "card" in gpu else []), **options)
    message = Cuda.why_unused(gpu)
    assert [word for word in words if word not in message] == []
    assert all(backend.why_unused(gpu) is None for backend in BACKENDS if backend is not Cuda)


@pytest.mark.parametrize("driver", [{}, {"driver": "580.65"}])
@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles"])
def test_a_card_that_the_environment_hides_is_told_with_what_to_do(cards, monkeypatch, visible, driver):
    cards()
    gpu = {"vendor": "NVIDIA"} | driver
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert Cuda.why_unused(gpu) == f'CUDA_VISIBLE_DEVICES="{visible}" hides it: unset CUDA_VISIBLE_DEVICES'
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert "CUDA_VISIBLE_DEVICES" not in Cuda.why_unused(gpu)


# --- facts and memory


def test_memory_is_that_of_the_selected_card_and_includes_graphs(monkeypatch, cards):
    cards((8, 0), (8, 0), total_memory=61 * MIB)
    calls = []
    figures = {"max_memory_allocated": 2, "max_memory_reserved": 5, "memory_reserved": 4, "memory_allocated": 1}
    stand_ins = {name: mebibytes * MIB for name, mebibytes in figures.items()} | {"mem_get_info": (10 * MIB, 64 * MIB)}
    for name, result in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, result=result: calls.append(device) or result)
    chosen = Cuda(1)
    graphs = [torch.nn.Identity() for _ in range(2)]
    chosen._graph_pool._hidden |= {graphs[0]: 3 * MIB, graphs[1]: 7 * MIB}
    assert chosen.memory_mib() == {"peak": 2.0 + 7.0, "peak_reserved": 5.0, "driver": 54.0}
    assert chosen.free_bytes() == 13 * MIB  # 10 on the card, 3 in the allocator
    assert set(calls) == {torch.device("cuda:1")}
    assert chosen.capacity_mib() == 61.0
    del graphs[1]
    assert chosen.memory_mib()["peak"] == 2.0 + 3.0


# --- energy by NVML

TORCHS_UUID = {"uuid": UUID.removeprefix("GPU-")}
T4 = TORCHS_UUID | {
    "name": "Tesla T4", "major": 7, "minor": 5, "total_memory": 15 * 2**30, "multi_processor_count": 40,
}  # fmt: skip


@pytest.fixture
def card(cards, monkeypatch):
    """One card that torch sees and pynvml answers for."""

    def put(nvml_uuid=UUID, hip=None, properties=TORCHS_UUID, **answers):
        cards((8, 0), hip=hip, **properties)
        stand_in = Nvml(nvml_uuid, **answers)
        monkeypatch.setitem(sys.modules, "pynvml", stand_in)
        return stand_in

    return put


def test_a_card_counts_joules_and_keeps_nvml_open(card):
    counter = iter([5_000_000, NVMLError("Unknown Error"), 5_250_500])
    stand_in = card()
    stand_in.nvmlDeviceGetTotalEnergyConsumption = lambda handle: stand_in.answer(next(counter))
    chosen = Cuda()
    assert stand_in.opened == 0  # only when asked
    assert [chosen.energy() for _ in range(3)] == [("nvml", 5000.0), None, ("nvml", 5250.5)]
    assert stand_in.opened == 1
    assert chosen.gpu_uuid() == UUID


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(70_000, {"driver": "580.65", "power_limit_watts": 70.0}), (NVMLError("Not Supported"), {"driver": "580.65"})],
)
def test_facts_include_the_cards_driver_and_power_limit(card, monkeypatch, limit, expected):
    card(PowerManagementLimit=limit, properties=T4)
    monkeypatch.setattr(system_info, "gpus", lambda: pytest.fail("nvidia-smi takes a second"))
    facts = Cuda().facts()
    assert {key: facts[key] for key in ("driver", "power_limit_watts") if key in facts} == expected
    assert (facts["name"], facts["memory_gib"], facts["gpu_cores"]) == ("Tesla T4", 15.0, 40)
    assert facts["compute_capability"] == "7.5"
    assert "hip" not in facts and None not in facts.values()


def test_the_driver_is_nvidia_smis_where_nvml_knows_no_such_card(card, monkeypatch):
    card(nvml_uuid="GPU-another", properties=T4)
    gpus = [{"name": "Other", "driver": "1.0"}, {"name": "Tesla T4", "driver": "580.65"}]
    monkeypatch.setattr(system_info, "gpus", lambda: gpus)
    assert Cuda().facts()["driver"] == "580.65"


@pytest.mark.parametrize(
    "options",
    [
        {"TotalEnergyConsumption": NVMLError("Not Supported")},
        {"TotalEnergyConsumption": 0},
        {"TotalEnergyConsumption": 1000, "nvml_uuid": "another"},
        {"TotalEnergyConsumption": 1000, "properties": {}},
        {"TotalEnergyConsumption": 1000, "hip": "7.2"},
    ],
    ids=["before Volta", "0", "NVML does not find it", "torch has no UUID", "AMD"],
)
def test_a_card_without_a_counter_has_no_energy(card, options):
    card(**options)
    assert Cuda().energy() is None
