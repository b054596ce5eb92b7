"""Find and select the device to train on. Each backend is one file here, a subclass of the interface in `base.py`."""

import importlib
import pkgutil
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.imports import without_garbage_collection

with without_garbage_collection():
    import torch

from pipeline.devices.base import Backend
from pipeline.errors import UsageError
from pipeline.profiling import system_info

__all__ = ["BACKENDS", "Backend", "available", "select", "torch_facts", "unused_gpu"]


def discover() -> tuple[type[Backend], ...]:
    """Import the modules of this package and return their backends, sorted by kind, with the CPU last."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    classes = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    backends = {backend for backend in classes if issubclass(backend, Backend) and hasattr(backend, "kind")}
    return tuple(sorted(backends, key=lambda backend: (backend.kind == "cpu", backend.kind)))


BACKENDS = discover()
"""All backends. `device: auto` takes the first that works."""


def available(backends: Sequence[type[Backend]] = BACKENDS) -> list[str]:
    """The values of `device` that work on this machine: `cuda`, and for several GPUs also `cuda:0`, `cuda:1`, ..."""
    names: list[str] = []
    for backend in backends:
        count = backend.count()
        names += [backend.kind] if count else []
        names += [f"{backend.kind}:{index}" for index in range(count)] if count > 1 else []
    return names


def select(device: str, backends: Sequence[type[Backend]] = BACKENDS) -> Backend:
    """The backend for the setting `device`. Raises UsageError, with the allowed devices, if there is none."""
    names = available(backends)
    kind, _, index = (names[0] if device == "auto" else device).partition(":")
    for backend in backends:
        if backend.kind == kind and int(index or 0) < backend.count():
            return backend(int(index or 0))
    reason = unused_gpu(backends=backends)
    why = f" ({reason})" if reason else ""
    raise UsageError(f'device: "{device}" is not there: expected auto | {" | ".join(names)}{why}')


def unused_gpu(
    gpus: Sequence[Mapping[str, Any]] | None = None, backends: Sequence[type[Backend]] = BACKENDS
) -> str | None:
    """Why this build of torch can't use the machine's GPU, and the command that helps. None if there is no such GPU.

    `device: auto` then trains on the CPU, and the user must be told that the figures are not the GPU's.
    """
    if available(backends) != ["cpu"]:  # asked first, since nvidia-smi takes a second
        return None
    gpu = next((gpu for gpu in (system_info.gpus() if gpus is None else gpus) if gpu.get("for_training")), None)
    if gpu is None:
        return None
    reasons = [reason for backend in backends if (reason := backend.why_unused(gpu))]
    return f"{gpu['name']} is there, but {reasons[0] if reasons else 'no backend supports it'}"


def torch_facts() -> dict[str, Any]:
    """The version and build options of torch."""
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
