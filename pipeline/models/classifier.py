"""A timm model as a classifier: its weights, what is frozen, its features."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from pipeline import terminal
from pipeline.config import Recipe
from pipeline.errors import StageError, UsageError, hint
from pipeline.imports import without_garbage_collection
from pipeline.startup import first_line

with without_garbage_collection():
    import timm

BATCH_NORM = nn.modules.batchnorm._BatchNorm
"""The base of all BatchNorm layers, timm's own among them."""

IDENTITY = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
"""Mean and std that leave images as they are."""


class Classifier(nn.Module):
    """A timm network that takes images from 0 to 1 and normalizes them itself.

    `forward`: (B, 3, H, W) float32 in 0..1 -> logits (B, classes). `features`: the same images -> the input of the
    head. In most models, `head(features(images))` are the logits; `caches_features` tests it.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, net: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.net = net
        self.normalization = tuple(mean), tuple(std)
        # Not persistent: a checkpoint's tensors have timm's names alone; mean and std are in its metadata.
        scale = 1 / torch.tensor(std).view(1, 3, 1, 1)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", -torch.tensor(mean).view(1, 3, 1, 1) * scale, persistent=False)

    @property
    def heads(self) -> list[nn.Module]:
        """The last layers, as timm defines them for the model: one in most models."""
        heads: Any = self.net.get_classifier()  # type: ignore[operator]
        return [heads] if isinstance(heads, nn.Module) else list(heads)

    @property
    def head(self) -> nn.Module:
        """The head of a model that has one: a module that maps pooled features (B, D) to logits."""
        (head,) = self.heads
        return nn.Sequential(nn.Unflatten(1, (-1, 1, 1)), head, nn.Flatten()) if isinstance(head, nn.Conv2d) else head

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes)."""
        logits: Tensor = self.net(self._normalize(images))
        return logits

    def features(self, images: Tensor) -> Tensor:
        """The input of the head, (B, D) in most models."""
        maps = self.net.forward_features(self._normalize(images))  # type: ignore[operator]
        pooled: Tensor = self.net.forward_head(maps, pre_logits=True)  # type: ignore[operator]
        return pooled

    def _normalize(self, images: Tensor) -> Tensor:
        if self.normalization == IDENTITY:
            return images
        return torch.addcmul(self.shift, images, self.scale)  # (images - mean) / std in one pass


class Features(nn.Module):
    """`Classifier.features` as a module, for what takes only modules."""

    def __init__(self, model: Classifier):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)."""
        return self.model.features(images)


def check_name(name: str) -> None:
    """Raise UsageError unless timm has a model `name`."""
    base = name.split(".")[0]
    if not timm.is_model(name):
        expected = f"expected a name that timm.list_models() has{hint(base, timm.list_models())}"
        raise UsageError(f'model: "{name}" is not allowed: {expected}')
    tags = timm.list_pretrained(f"{base}.*")
    if "." in name and name not in tags:
        raise UsageError(f'model: "{name}" is not allowed: timm has {base} as {", ".join(tags) or base}')


def create_network(name: str, classes: int) -> nn.Module:
    """timm's network `name` with random weights and a head for `classes`. Raises UsageError for an unknown name."""
    check_name(name)
    net: nn.Module = timm.create_model(name, pretrained=False, num_classes=classes)
    return net


def hub_file(name: str) -> tuple[str, str] | None:
    """Repository and file of timm's weights of `name` on the Hugging Face hub; None where it has none."""
    check_name(name)
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=False)
    if cfg is None or not cfg.hf_hub_id:
        return None
    return cfg.hf_hub_id, cfg.hf_hub_filename or "model.safetensors"


def build(recipe: Recipe, classes: int, weights: Path | None) -> Classifier:
    """The recipe's model with a new head for `classes`, its parameters frozen as the recipe says.

    `weights`: a .safetensors file, or None for random ones. Raises UsageError where model, weights, `trainable` and
    `image_size` don't fit each other.
    """
    net = create_network(recipe.model, classes)
    _check_image_size(net, recipe)
    cfg: Mapping[str, Any] = net.pretrained_cfg  # type: ignore[assignment]
    mean, std = (cfg["mean"], cfg["std"]) if recipe.normalize else IDENTITY
    if weights is not None:
        _load_weights(net, recipe, classes, weights)
    model = Classifier(net, mean, std)
    if recipe.head_init == "xavier_normal":
        for module in (module for head in model.heads for module in head.modules()):
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_normal_(module.weight)
    _freeze(model, recipe.trainable)
    return model


def set_train_mode(model: nn.Module, frozen_batch_norm: str) -> None:
    """Set the model to training mode. In BatchNorm layers whose weights are frozen, `frozen_batch_norm` decides: `eval`
    keeps the statistics, `train` updates them."""
    model.train()
    if frozen_batch_norm == "eval":
        for module in model.modules():
            if isinstance(module, BATCH_NORM) and not any(p.requires_grad for p in module.parameters(recurse=False)):
                module.eval()


def trains_batch_norm(model: nn.Module, recipe: Recipe) -> bool:
    """Whether a BatchNorm layer uses the statistics of the batch when `model` is trained. Sets the training mode."""
    set_train_mode(model, recipe.frozen_batch_norm)
    return any(module.training for module in model.modules() if isinstance(module, BATCH_NORM))


@torch.no_grad()
def caches_features(model: Classifier, recipe: Recipe, images: Tensor) -> bool:
    """Whether to compute the head's input only once: if it is the same in every epoch, and the recipe allows it.

    `images`: (B, 3, H, W) float32 in 0..1 on the model's device, to test if `head(features)` equals its logits. Raises
    UsageError if `features: cache` is impossible.
    """
    obstacle = _obstacle_to_caching(model, recipe, images)
    if recipe.features == "cache" and obstacle:
        raise UsageError(f'features: "cache" is not allowed here: {obstacle}; expected auto | recompute')
    if recipe.features == "auto" and recipe.trainable == "head" and obstacle:
        terminal.say(f"note     features are computed in every epoch: {obstacle}")
    return recipe.features != "recompute" and obstacle is None


def _obstacle_to_caching(model: Classifier, recipe: Recipe, images: Tensor) -> str | None:
    """Why the head's input changes between epochs, or can't be separated; None if it can be cached."""
    head_parameters = {parameter for head in model.heads for parameter in head.parameters()}
    if any(p.requires_grad for p in model.parameters() if p not in head_parameters):
        return "more than the head is trained"
    if recipe.flip:
        return "flip: true shows other images in each epoch"
    head_modules = {module for head in model.heads for module in head.modules()}
    for module in model.modules():
        if module in head_modules:
            continue
        if isinstance(module, BATCH_NORM) and recipe.frozen_batch_norm == "train":
            return "frozen_batch_norm: train moves the statistics before the head"
        if getattr(module, "drop_prob", 0.0) or (isinstance(module, nn.modules.dropout._DropoutNd) and module.p):
            return "the model drops units at random before its head"
    model.eval()
    logits = model(images)
    try:
        separable = torch.allclose(model.head(model.features(images)), logits, rtol=1e-3, atol=1e-3)
    except Exception:  # several heads, features that are no tensor, or a network without timm's forward_head
        separable = False
    return None if separable else "this model's logits are not its head's alone"


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """The number of trainable parameters, and of all parameters."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file, on the CPU. Raises StageError where it can't be read."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise StageError(f"{path} is missing") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise StageError(f"{path} is no readable .safetensors file ({error})") from error


def load_state(net: nn.Module, state: dict[str, Tensor], what: str, error: type[StageError] = StageError) -> None:
    """Load tensors into `net`. If names or shapes don't fit, raises `error` with a message that begins with `what`."""
    expected = net.state_dict()
    for problem, names in (("lacks", expected.keys() - state), ("holds an unknown", state.keys() - expected)):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise error(f"{what}: the file {problem} {min(names)}{more}")
    for name, tensor in expected.items():
        if tensor.shape != state[name].shape:
            raise error(f"{what}: {name} is {tuple(state[name].shape)}, expected {tuple(tensor.shape)}")
    net.load_state_dict(state)


@torch.no_grad()
def _check_image_size(net: nn.Module, recipe: Recipe) -> None:
    """Run the model once, since many transformers accept only one image size, and fail only when called."""
    net.eval()
    try:
        net(torch.zeros(1, 3, recipe.image_size, recipe.image_size))
    except (AssertionError, IndexError, RuntimeError, ValueError) as error:
        reason = first_line(error)
        expected = net.pretrained_cfg["input_size"][1]  # type: ignore[index]
        raise UsageError(
            f"image_size: {recipe.image_size} is not allowed with {recipe.model} ({reason}): its own is {expected}"
        ) from None
    net.train()


def _freeze(model: Classifier, trainable: str | tuple[str, ...]) -> None:
    parameters = dict(model.net.named_parameters())
    if trainable == "all":
        chosen = set(parameters)
    elif trainable == "head":
        head = {parameter for head in model.heads for parameter in head.parameters()}
        if not head:
            raise UsageError('trainable: "head" is not allowed: this model has no head; expected all or prefixes')
        chosen = {name for name, parameter in parameters.items() if parameter in head}
    else:
        for prefix in trainable:
            if not any(name.startswith(prefix) for name in parameters):
                layers = sorted({name.split(".")[0] for name in parameters})
                raise UsageError(f'trainable: no parameter\'s name starts with "{prefix}"{hint(prefix, layers)}')
        chosen = {name for name in parameters if name.startswith(tuple(trainable))}
    for name, parameter in parameters.items():
        parameter.requires_grad = name in chosen


def _load_weights(net: nn.Module, recipe: Recipe, classes: int, path: Path) -> None:
    """Load `path` into `net`. Skip the head if it was published for another number of classes, or not at all."""
    _, state = read_safetensors(path)
    initial = net.state_dict()
    if initial.keys() - state or state.keys() - initial.keys():
        state = _converted_state(recipe.model, path) or state
    cfg: Mapping[str, Any] = net.pretrained_cfg  # type: ignore[assignment]
    published, heads = int(cfg["num_classes"]), cfg["classifier"] or ()
    for head in (heads,) if isinstance(heads, str) else heads:
        weight = state.get(f"{head}.weight")
        if published != classes and (0 if weight is None else len(weight)) == published:
            state |= {name: initial[name] for name in initial if name.startswith(f"{head}.")}
    load_state(net, state, f"weights: {path.name} does not fit {recipe.model} with {classes} classes", UsageError)


def _converted_state(name: str, path: Path) -> dict[str, Tensor] | None:
    """The tensors of a published file under the names of timm's network: timm converts the files of some models. None
    if they don't fit the network."""
    with torch.random.fork_rng(devices=[]):  # the new head must not depend on it
        try:
            net = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(path)})
        except Exception:  # timm's converters raise anything on a file that is another model's
            return None
    return net.state_dict()
