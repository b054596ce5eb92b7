"""Which device trains: one small file a backend, behind the interface in `base.py`."""

import re
from typing import Any

import torch

from pipeline.devices.base import Backend
from pipeline.devices.cpu import Cpu
from pipeline.devices.cuda import Cuda
from pipeline.devices.mps import Mps
from pipeline.devices.xpu import Xpu
from pipeline.errors import UsageError
from pipeline.profiling import system_info

BACKENDS: tuple[type[Backend], ...] = (Cuda, Mps, Xpu, Cpu)
"""In the order in which `device: auto` prefers them."""

__all__ = ["BACKENDS", "Backend", "available", "select", "torch_facts", "unused_gpu"]


def available(backends: tuple[type[Backend], ...] = BACKENDS) -> list[str]:
    """The values of `device` that can be had here: `cuda` and, of several, `cuda:0`, `cuda:1`."""
    names: list[str] = []
    for backend in backends:
        count = backend.count()
        names += [backend.kind] if count else []
        names += [f"{backend.kind}:{index}" for index in range(count)] if count > 1 else []
    return names


def select(device: str, backends: tuple[type[Backend], ...] = BACKENDS) -> Backend:
    """The backend for a value of `device`. Raises UsageError with the devices that are there."""
    there = available(backends)
    kind, _, index = (there[0] if device == "auto" else device).partition(":")
    if device != "auto" and device not in there and device != f"{kind}:0":
        unused = unused_gpu()
        why = f" ({unused})" if unused and kind != "cpu" else ""
        raise UsageError(f'device: "{device}" is not there: expected auto | {" | ".join(there)}{why}')
    for backend in backends:
        if backend.kind == kind and backend.count():
            return backend(int(index or 0))
    raise UsageError(f'device: "{device}" is not there: expected auto | {" | ".join(there)}')


def unused_gpu() -> str | None:
    """Names a GPU that is in this machine but can't be used by this build of torch, why, and the command that
    puts it right; None where there is no such GPU. Training on the CPU beside it would be the worst fallback:
    a figure under which the reader imagines the GPU."""
    gpu = next((gpu for gpu in system_info.gpus() if gpu.get("for_training")), None)
    if gpu is None or available() != ["cpu"]:
        return None
    return f"{gpu['name']} is there, but {_why_unused(gpu)}"


def _why_unused(gpu: dict[str, Any]) -> str:
    build = f"this torch {torch.__version__}"
    if gpu["vendor"] == "NVIDIA":
        if "driver" not in gpu:
            return "its driver does not answer: install or repair it; in a container, start that with --gpus all"
        if torch.version.cuda is None:
            return f"{build} is built without CUDA: make run TORCH=cu130 (cards before Turing: TORCH=cu126)"
        if torch.cuda.device_count() == 0:
            return (
                f"its driver {gpu['driver']} does not serve CUDA {torch.version.cuda}: update the driver, "
                "or make run TORCH=cu126"
            )
        return f"{build} has code for {' '.join(torch.cuda.get_arch_list())} alone: make run TORCH=cu126"
    if gpu["vendor"] == "AMD":
        return f"{build} is built without ROCm: make run TORCH=rocm7.2 (Linux only)"
    if gpu["vendor"] == "Intel":
        return f"{build} does not see it: make run TORCH=xpu"
    if not torch.backends.mps.is_built():
        return f"{build} has no MPS: use Python for arm64, not x86_64"
    return "macOS does not offer it to torch: MPS needs macOS 14 or newer"


def torch_facts() -> dict[str, Any]:
    """What this build of torch is and can do."""
    return {
        "torch": torch.__version__,
        "git": torch.version.git_version,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "mps_built": torch.backends.mps.is_built(),
        "mps_available": torch.backends.mps.is_available(),
        "build": re.sub(r"\s*\n\s*", "; ", torch.__config__.show().strip()),
        "threads": torch.get_num_threads(),
    }
