"""Checkpoints: a model's weights and all facts that are needed to use them, in one .safetensors file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch

from pipeline import files
from pipeline.errors import StageError
from pipeline.models import classifier


@dataclass(frozen=True)
class Checkpoint:
    """The facts that a checkpoint carries."""

    model: str
    classes: tuple[str, ...]
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    epoch: int
    val_accuracy: float
    record: str
    """Id of the training that wrote it."""


def save(path: Path, model: classifier.Classifier, facts: Checkpoint) -> None:
    """Write the model's state (timm's names, on the CPU) and `facts`, as a whole file or not at all."""
    state = {name: tensor.detach().to("cpu").contiguous() for name, tensor in model.net.state_dict().items()}
    content = safetensors.torch.save(state, metadata={"trainmark": json.dumps(vars(facts))})
    with files.atomic_write(path) as temporary:
        temporary.write_bytes(content)  # `save_file` would raise its own error if the disk is full


def load(path: Path, model: classifier.Classifier | None = None) -> tuple[classifier.Classifier, Checkpoint]:
    """The model of a checkpoint, in evaluation mode, and its facts: `model` with the checkpoint's weights, or a new
    one on the CPU. Raises StageError if unusable."""
    metadata, state = classifier.read_safetensors(path)
    try:
        stored: dict[str, Any] = json.loads(metadata["trainmark"])
        stored |= {key: tuple(value) for key, value in stored.items() if isinstance(value, list)}
        facts = Checkpoint(**stored)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise StageError(f"{path.name} is no checkpoint of ours: its metadata does not say which model it is") from None
    net = model.net if model is not None else classifier.create_network(facts.model, len(facts.classes))
    what = f"{path.name}: it says it is {facts.model} of {len(facts.classes)} classes"
    classifier.load_state(net, state, what)
    if model is None:
        model = classifier.Classifier(net, facts.mean, facts.std)
    return model.eval(), facts
