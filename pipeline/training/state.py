"""The state of a training after an epoch, from which a later process resumes it.

A state is one file of tensors and plain values. Its name holds the epoch and the start of the file's SHA-256. It is
read without pickle's code (`weights_only`).
"""

import hashlib
import io
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline import config, files, terminal
from pipeline.devices import Backend
from pipeline.errors import StageError
from pipeline.startup import first_line
from pipeline.training import optimizers
from pipeline.training.setup import TrainingSetup

KEEP = 2
"""How many states stay: the newest may be damaged."""

State = dict[str, Any]


def save(folder: Path, training: TrainingSetup, record: dict[str, Any]) -> bool:
    """Write the state after the last epoch of `record` into `folder`, and delete those that are older than KEEP.

    Saves the weights that are trained and all buffers: the rest is the same in a new model. Returns whether the state
    of the optimizer can be saved; if not, nothing is written. Raises StageError if the file can't be written.
    """
    loop, backend = training.loop, training.loop.backend
    optimizer = optimizers.state(loop.optimizer)
    if optimizer is None:
        name = training.recipe.optimizer
        terminal.say(f"note     the state of {name} can't be saved: if this training is interrupted, it starts anew")
        return False
    content = {
        "record": json.dumps(record),
        "net": {name: tensor.detach().to("cpu") for name, tensor in _changing(training).items()},
        "optimizer": optimizer,
        "scheduler": loop.scheduler.state_dict(),
        "scaler": loop.scaler.state_dict(),
        "random": torch.get_rng_state(),
        "numpy_random": [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
        "device_random": backend.random_state(),
        "seconds": dict(loop.clock.seconds),
        "unaccounted": loop.clock.unaccounted(),
        "step_seconds": list(loop.times.seconds),
    }
    epoch = len(record["epochs"])
    temporary = folder / "state"
    buffer = io.BytesIO()
    torch.save(content, buffer)  # into a file, torch would hide that the disk is full
    with files.atomic_write(temporary) as path:
        path.write_bytes(buffer.getbuffer())
    temporary.replace(folder / f"{epoch:06}-{_digest(temporary)}.pt")
    files.sync_folder(folder)
    for old in sorted(folder.glob("*.pt"))[:-KEEP]:
        old.unlink()
    return True


def execution_identity(backend: Backend) -> dict[str, Any]:
    """What must be the same, besides the settings, when a training is resumed: device, threads, timm and our code."""
    code = hashlib.sha256()
    for room in ("data", "devices", "models", "training"):
        for path in sorted((config.ROOT / "pipeline" / room).glob("*.py")):
            code.update(path.read_bytes())
    return {
        "device used": f"{backend.facts()['name']} ({backend.device})",
        "threads used": torch.get_num_threads(),
        "timm": version("timm"),
        "code": code.hexdigest()[:16],
    }


def load_newest(folder: Path) -> State | None:
    """The newest state in `folder` that is whole. Each damaged one is named in the terminal. None if there is none."""
    for path in sorted(folder.glob("*.pt"), reverse=True):
        try:
            if path.stem.rpartition("-")[2] != _digest(path):
                raise ValueError("its content is not what was written")
            content: State = torch.load(path, map_location="cpu", weights_only=True)
            return content | {"record": json.loads(content["record"])}
        except Exception as error:  # whatever torch makes of a damaged file
            reason = first_line(error)
            terminal.say(f"note     the state {path.name} can't be used ({reason}): the one before it is tried")
    return None


def restore(training: TrainingSetup, saved: State) -> None:
    """Set a training to a saved state, in place. Call it when all preparation is done, right before the next epoch.

    Raises StageError if the state is of another model or optimizer.
    """
    loop, backend = training.loop, training.loop.backend
    present = _changing(training)
    try:
        with torch.no_grad():
            for name, tensor in saved["net"].items():
                present[name].copy_(tensor)
        optimizers.restore(loop.optimizer, saved["optimizer"], in_place=loop.captures_optimizer)
        loop.scheduler.load_state_dict(saved["scheduler"])
        loop.scaler.load_state_dict(saved["scaler"])
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        raise StageError(f"the training can't be resumed ({error!r}): -S resume=never starts anew") from error
    loop.times.seconds = list(saved["step_seconds"])
    if saved["device_random"] is not None:
        backend.set_random_state(saved["device_random"])
    torch.set_rng_state(saved["random"])
    np.random.set_state(tuple(saved["numpy_random"]))
    loop.clock.resume(saved["seconds"], saved["unaccounted"])


def _changing(training: TrainingSetup) -> dict[str, Tensor]:
    """The tensors of the model that training changes, by name."""
    net = training.net
    trained = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    return {**trained, **dict(net.named_buffers())}


def _digest(path: Path) -> str:
    """The first 16 digits of a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
