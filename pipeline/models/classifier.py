"""The timm model: what it starts from, what is frozen, checkpoints in and out."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pipeline import files
from pipeline.config import Recipe
from pipeline.errors import StageError, UsageError, nearest

BATCH_NORM = nn.modules.batchnorm._BatchNorm
"""The base of all BatchNorm layers, timm's own among them."""

IDENTITY = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
"""Mean and std that leave images as they are."""

Head = nn.Module


class Classifier(nn.Module):
    """A timm network that takes images from 0 to 1: it holds its own normalisation.

    `forward`: (B, 3, H, W) float32 in 0..1 -> logits (B, classes). `features`: the same images -> what the head
    (timm's `get_classifier`) takes, so that `head(features(images))` are the logits.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, net: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.net = net
        self.normalization = tuple(mean), tuple(std)
        # Not in the state: a checkpoint holds timm's names alone, and these in its metadata.
        scale = 1 / torch.tensor(std).view(1, 3, 1, 1)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", -torch.tensor(mean).view(1, 3, 1, 1) * scale, persistent=False)

    @property
    def head(self) -> Head:
        """The last layer, by timm's own name for it."""
        head: Head = self.net.get_classifier()  # type: ignore[operator]
        return head

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes)."""
        logits: Tensor = self.net(self._normalized(images))
        return logits

    def features(self, images: Tensor) -> Tensor:
        """What the head takes, (B, D) in most models."""
        maps = self.net.forward_features(self._normalized(images))  # type: ignore[operator]
        pooled: Tensor = self.net.forward_head(maps, pre_logits=True)  # type: ignore[operator]
        return pooled

    def _normalized(self, images: Tensor) -> Tensor:
        if self.normalization == IDENTITY:
            return images
        return torch.addcmul(self.shift, images, self.scale)  # (images - mean) / std in one pass


@dataclass(frozen=True)
class Checkpoint:
    """The facts that a checkpoint carries, all that is needed to use it."""

    model: str
    classes: tuple[str, ...]
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    epoch: int
    val_accuracy: float
    record: str
    """Id of the training that wrote it."""


def check(name: str) -> None:
    """Raises UsageError unless timm has a model `name`."""
    base = name.split(".")[0]
    if not timm.is_model(name):
        close = nearest(base, timm.list_models())
        hint = f"; did you mean {close}?" if close else ""
        raise UsageError(f'model: "{name}" is not allowed: expected a name that timm.list_models() has{hint}')
    tags = timm.list_pretrained(f"{base}.*")
    if "." in name and name not in tags:
        raise UsageError(f'model: "{name}" is not allowed: timm has {base} as {", ".join(tags) or base}')


def hub_file(name: str) -> tuple[str, str] | None:
    """Where timm gets the weights of `name`: (repository, file) on the Hugging Face hub; None where it has none."""
    check(name)
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=False)
    if cfg is None or not cfg.hf_hub_id:
        return None
    return cfg.hf_hub_id, cfg.hf_hub_filename or "model.safetensors"


def build(recipe: Recipe, classes: int, weights: Path | None) -> Classifier:
    """The recipe's model with a new head for `classes`, its parameters frozen or not as the recipe says.

    `weights`: a .safetensors file, or None for random ones. Raises UsageError where model, weights,
    `trainable` and `image_size` don't fit each other.
    """
    check(recipe.model)
    net = timm.create_model(recipe.model, pretrained=False, num_classes=classes)
    _try_size(net, recipe)
    mean, std = normalization(net, recipe.normalize)
    if weights is not None:
        _load_weights(net, recipe, classes, weights)
    model = Classifier(net, mean, std)
    if recipe.head_init == "xavier_normal":
        for module in model.head.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
    _freeze(model, recipe.trainable)
    return model


def normalization(net: nn.Module, normalize: bool) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and std of the pixels (0..1) that the weights were trained with, or (0, 1): none."""
    cfg: Mapping[str, Any] = net.pretrained_cfg  # type: ignore[assignment]
    return (cfg["mean"], cfg["std"]) if normalize else IDENTITY


def set_mode(model: nn.Module, frozen_batch_norm: str) -> None:
    """Training mode; BatchNorm layers whose own weights are frozen go by `frozen_batch_norm`: eval keeps their
    statistics as they are, train lets them move."""
    model.train()
    if frozen_batch_norm == "eval":
        for module in model.modules():
            if isinstance(module, BATCH_NORM) and _is_frozen(module):
                module.eval()


@torch.no_grad()
def caches_features(model: Classifier, recipe: Recipe, images: Tensor) -> bool:
    """Whether what the head takes is computed once: where it is the same in every epoch, unless told otherwise.

    `images` (B, 3, H, W) float32 in 0..1 on the model's device, to see that head and features make the model.
    Raises UsageError where `features: cache` asks for what can't be.
    """
    obstacle = _obstacle_to_caching(model, recipe, images)
    if recipe.features == "cache" and obstacle:
        raise UsageError(f'features: "cache" is not allowed here: {obstacle}; expected auto | recompute')
    return recipe.features != "recompute" and obstacle is None


def _obstacle_to_caching(model: Classifier, recipe: Recipe, images: Tensor) -> str | None:
    """What before the head learns, moves or is random; None where nothing does."""
    head = model.head
    own = set(head.parameters()) if isinstance(head, nn.Module) else set()
    if not own or any(p.requires_grad for p in model.parameters() if p not in own):
        return "more than the head is trained"
    if recipe.flip:
        return "flip: true shows other images in each epoch"
    inside = set(head.modules())
    for module in model.modules():
        if module in inside:
            continue
        if isinstance(module, BATCH_NORM) and recipe.frozen_batch_norm == "train":
            return "frozen_batch_norm: train moves the statistics before the head"
        if getattr(module, "drop_prob", 0.0) or (isinstance(module, nn.modules.dropout._DropoutNd) and module.p):
            return "the model drops units at random before its head"
    model.eval()
    if not torch.allclose(head(model.features(images)), model(images), rtol=1e-3, atol=1e-3):
        return "this model's logits are not its head's alone"
    return None


@torch.no_grad()
def folded(model: Classifier, images: Tensor) -> tuple[nn.Module, Callable[[], None]]:
    """Gives `model.features`, each BatchNorm folded into the convolution before it, for evaluation alone; without
    that where torch can't trace the model, or where it would change the features of `images` (B, 3, H, W). And a
    function that folds again, in the same memory, when the model's weights are others."""
    features = Features(model).eval()
    try:
        fused, pairs = _fused(features)
    except Exception:  # tracing runs the model's own code on stand-ins, which may raise anything
        return features, lambda: None

    def again() -> None:
        for both, convolution, norm in pairs:
            both.load_state_dict(fuse_conv_bn_eval(convolution.eval(), norm.eval()).state_dict())

    before, after = features(images), fused(images)
    # Far above what TF32 rounds away, far below what a layer left out would change.
    close = (after - before).abs().max() <= 1e-2 * before.abs().max()
    return (fused, again) if close else (features, lambda: None)


def _fused(network: nn.Module) -> tuple[nn.Module, list[tuple[nn.Conv2d, nn.Conv2d, nn.BatchNorm2d]]]:
    """A traced copy of `network` in which each BatchNorm2d that alone follows a Conv2d is part of that; and each such
    convolution, with the two of `network` that it is made of."""
    traced = torch.fx.symbolic_trace(network)
    pairs = []
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or type(traced.get_submodule(node.target)) is not nn.BatchNorm2d:
            continue
        before = node.args[0]
        if before.op != "call_module" or len(before.users) > 1:
            continue
        convolution = traced.get_submodule(before.target)
        if type(convolution) is nn.Conv2d:
            norm = cast(nn.BatchNorm2d, traced.get_submodule(node.target))
            pairs.append((fuse_conv_bn_eval(convolution, norm), convolution, norm))
            traced.add_submodule(before.target, pairs[-1][0])
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced, pairs


class Features(nn.Module):
    """`Classifier.features` as a module, for what takes modules alone."""

    def __init__(self, model: Classifier):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)."""
        return self.model.features(images)


def counts(model: nn.Module) -> tuple[int, int]:
    """Numbers of trainable parameters, and of all."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def save_checkpoint(path: Path, model: Classifier, facts: Checkpoint) -> None:
    """Writes the model's state (timm's names, on the CPU) and `facts` as one .safetensors file, whole or not."""
    state = {name: tensor.detach().to("cpu").contiguous() for name, tensor in model.net.state_dict().items()}
    with files.atomic_write(path) as aside:
        safetensors.torch.save_file(state, aside, metadata={"trainmark": json.dumps(vars(facts))})


def load_checkpoint(path: Path) -> tuple[Classifier, Checkpoint]:
    """The model of a checkpoint, whole, in evaluation mode on the CPU. Raises StageError where it can't be used."""
    metadata, state = _read_safetensors(path)
    try:
        stored: dict[str, Any] = json.loads(metadata["trainmark"])
        stored |= {key: tuple(value) for key, value in stored.items() if isinstance(value, list)}
        facts = Checkpoint(**stored)
    except (AttributeError, KeyError, TypeError, ValueError):
        what = "its metadata does not say which model it is"
        raise StageError(f"{path.name} is no checkpoint of ours: {what}") from None
    check(facts.model)
    net = timm.create_model(facts.model, pretrained=False, num_classes=len(facts.classes))
    _load_state(net, state, f"{path.name}: it says it is {facts.model} of {len(facts.classes)} classes")
    return Classifier(net, facts.mean, facts.std).eval(), facts


def _is_frozen(module: nn.Module) -> bool:
    return not any(p.requires_grad for p in module.parameters(recurse=False))


@torch.no_grad()
def _try_size(net: nn.Module, recipe: Recipe) -> None:
    """Many transformers take images of one size alone, which shows only when they get one."""
    net.eval()
    try:
        net(torch.zeros(1, 3, recipe.image_size, recipe.image_size))
    except (AssertionError, IndexError, RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        own = net.pretrained_cfg["input_size"][1]  # type: ignore[index]
        raise UsageError(
            f"image_size: {recipe.image_size} is not allowed with {recipe.model} ({reason}): its own is {own}"
        ) from None
    net.train()


def _freeze(model: Classifier, trainable: str | tuple[str, ...]) -> None:
    head = model.head if trainable != "all" else None
    if trainable == "head" and (not isinstance(head, nn.Module) or not list(head.parameters())):
        raise UsageError('trainable: "head" is not allowed: this model has no single head; expected all or prefixes')
    named = dict(model.net.named_parameters())
    if isinstance(trainable, tuple):
        for prefix in trainable:
            if not any(name.startswith(prefix) for name in named):
                close = nearest(prefix, sorted({name.split(".")[0] for name in named}))
                hint = f"; did you mean {close}?" if close else ""
                raise UsageError(f'trainable: no parameter\'s name starts with "{prefix}"{hint}')
    heads = set(head.parameters()) if trainable == "head" and head is not None else set()
    for name, parameter in named.items():
        parameter.requires_grad = (
            trainable == "all" or parameter in heads or (isinstance(trainable, tuple) and name.startswith(trainable))
        )


def _load_weights(net: nn.Module, recipe: Recipe, classes: int, path: Path) -> None:
    """Loads `path` into `net`; a head for the classes that `net` was published with is left out."""
    _, state = _read_safetensors(path)
    published = int(net.pretrained_cfg["num_classes"])  # type: ignore[index]
    names = net.pretrained_cfg["classifier"]  # type: ignore[index]
    heads = (names,) if isinstance(names, str) else tuple(names)
    for head in heads:
        bias = state.get(f"{head}.bias")
        if published != classes and bias is not None and len(bias) == published:
            fresh = net.state_dict()
            state |= {name: fresh[name] for name in state if name.startswith(f"{head}.") and name in fresh}
    _load_state(net, state, f"weights: {path.name} does not fit {recipe.model} with {classes} classes", UsageError)


def _load_state(net: nn.Module, state: dict[str, Tensor], what: str, error: type[StageError] = StageError) -> None:
    fresh = net.state_dict()
    missing, extra = sorted(set(fresh) - set(state)), sorted(set(state) - set(fresh))
    shapes = [name for name in fresh if name in state and fresh[name].shape != state[name].shape]
    for problem, names in (("lacks", missing), ("holds an unknown", extra)):
        if names:
            raise error(f"{what}: the file {problem} {names[0]}" + f" (and {len(names) - 1} more)" * (len(names) > 1))
    if shapes:
        name = shapes[0]
        raise error(f"{what}: {name} is {tuple(state[name].shape)}, expected {tuple(fresh[name].shape)}")
    net.load_state_dict(state)


def _read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise StageError(f"{path} is missing") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise StageError(f"{path} is no readable .safetensors file ({error})") from error
