"""Optimizers and learning rate schedules by name.

An optimizer's name is looked up in `OWN`, then in the packages that `PACKAGES` lists.

To add an optimizer of your own, write its class in this file and register it:

    @register("signsgd", capturable=True)
    class SignSGD(Optimizer):
        '''Steps along the sign of each gradient (arXiv:1802.04434).'''

        def __init__(self, params: Iterable[Parameter], lr: float, weight_decay: float = 0.0):
            super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            '''Take one step.'''
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        decay = 1 - group["lr"] * group["weight_decay"]
                        parameter.mul_(decay).sub_(group["lr"] * parameter.grad.sign())

Then `-S optimizer=signsgd` trains with it. Its constructor takes `params`, `lr`, and its options by name, which
users set under `optimizer_options: {signsgd: {weight_decay: 0.1}}`. A class with an argument `num_iterations` gets the
number of steps of the whole training. Add a test of its arithmetic to tests/training/test_optimizers.py; the tests of
all registered optimizers there find it by themselves.

Set `capturable=True` only if a CUDA graph can replay its step:
- it reads `group["lr"]` in every step, and works when that is a scalar tensor on the device;
- its Python code takes the same path in every step: no step counter, no `.item()`, no test of a tensor's value;
- it keeps its state in `self.state` in tensors, updates them in place, and they start as zeros.
"""

import importlib
import inspect
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, LRScheduler, OneCycleLR

from pipeline import config
from pipeline.errors import UsageError, nearest

Options = Mapping[str, Any]
Group = dict[str, Any]
"""One of an optimizer's `param_groups`."""

PACKAGES = {
    "torch": "torch.optim",
    "torch_optimizer": "torch_optimizer",
    "pytorch_optimizer": "pytorch_optimizer",
    "timm": "timm.optim",
}
"""Prefix -> module, in the order in which a name without prefix is looked up."""

OWN: dict[str, type[Optimizer]] = {}
"""Optimizers of this file by name; they take precedence over those of packages."""

CAPTURABLE: dict[type, Callable[[Group], bool]] = {
    Adam: lambda group: bool(group["fused"] and group["capturable"]),
    AdamW: lambda group: bool(group["fused"] and group["capturable"]),
    SGD: lambda group: bool(group["fused"] and not group["dampening"]),  # dampening leaves out the first step
}
"""Class -> whether a CUDA graph can replay its step with a group's options. Other classes can't be captured."""

NOISE = ("This overload of", "It is highly recommended to have 'opt_einsum'")
"""How the warnings of these packages begin that users can do nothing about."""


def register(name: str, *, capturable: bool = False) -> Callable[[type[Optimizer]], type[Optimizer]]:
    """A class decorator that adds an optimizer by `name`; see the module's docstring for `capturable`."""

    def add(cls: type[Optimizer]) -> type[Optimizer]:
        OWN[name] = cls
        if capturable:
            CAPTURABLE[cls] = lambda group: True
        return cls

    return add


# Your own optimizers go here.


# --- building an optimizer and its schedule


def build(
    recipe: config.Recipe, params: Sequence[Parameter], steps_per_epoch: int, fastest: Options | None = None
) -> tuple[Optimizer, LRScheduler]:
    """The recipe's optimizer over `params`, and its schedule. See `build_optimizer` for `fastest`."""
    chosen = recipe.resolved()
    optimizer = build_optimizer(
        recipe.optimizer,
        params,
        lr=recipe.lr,
        options=chosen["optimizer_options"],
        total_steps=steps_per_epoch * recipe.epochs,
        fastest=fastest,
    )
    scheduler = build_scheduler(
        recipe.scheduler,
        optimizer,
        options=chosen["scheduler_options"],
        lr=recipe.lr,
        epochs=recipe.epochs,
        moves_per_epoch=steps_per_epoch if recipe.scheduler_step == "batch" else 1,
        warmup_epochs=recipe.warmup_epochs,
    )
    return optimizer, scheduler


def check(recipe: config.Recipe) -> None:
    """Build both for a model of one small matrix, so that a mistake shows before any data is touched.

    What depends on the model shows when they are built for it: `muon` takes matrices only. Raises UsageError.
    """
    if recipe.scheduler_step == "epoch" and recipe.warmup_epochs % 1:
        reason = "expected whole epochs, as the schedule moves by epochs"
        raise _refused("warmup_epochs", recipe.warmup_epochs, reason)
    build(recipe, [Parameter(torch.zeros(4, 4))], steps_per_epoch=100)  # any plausible number of steps


@contextmanager
def _without_noise() -> Iterator[None]:
    with warnings.catch_warnings():
        for start in NOISE:
            warnings.filterwarnings("ignore", message=start)
        yield


@_without_noise()
def build_optimizer(
    name: str,
    params: Sequence[Parameter],
    *,
    lr: float,
    options: Options,
    total_steps: int,
    fastest: Options | None = None,
) -> Optimizer:
    """Build the optimizer called `name`, such as `sgd` or `timm:lamb`, over `params` as one group.

    `options` are arguments of its class. `fastest` are arguments that make torch's own optimizers fast on the device
    (`fused`, `capturable`); they apply where the class takes them and `options` doesn't choose an implementation.
    `total_steps` is the number of steps of the training. Raises UsageError if a name or an option is unknown, if the
    class refuses a value, or if two trial steps on small stand-ins of `params` fail.
    """
    cls, construct = _find(name)
    setting = f"optimizer_options.{name}"
    accepted = _option_names(name, cls)
    for option in options:
        if option not in accepted:
            raise _unknown(setting, option, accepted)
    defaults: dict[str, Any] = {"num_iterations": total_steps} if "num_iterations" in accepted else {}
    if cls.__module__.startswith("torch.optim.") and not {"foreach", "fused"} & options.keys():
        defaults |= {key: value for key, value in (fastest or {}).items() if key in accepted}

    def make(parameters: Sequence[Parameter], chosen: Options) -> Optimizer:
        arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in chosen.items()}
        return construct(parameters, lr=lr, **defaults | arguments)

    def trial(chosen: Options) -> str | None:
        return _trial_error(params, partial(make, chosen=chosen))

    reason = trial(options)
    if reason is None:
        optimizer = make(params, options)
        if overrides_schedule(optimizer):
            optimizer.register_step_post_hook(_note_applied_lr)
        return optimizer
    for option, value in options.items():
        if trial({key: other for key, other in options.items() if key != option}) is None:
            raise _refused(f"{setting}.{option}", value, reason)
    if options and trial({}) is None:
        raise _refused(setting, dict(options), reason)
    raise _refused("optimizer", name, f"{reason}; expected one for any model, such as sgd or adamw")


def _names(package: str) -> dict[str, str]:
    """Lower-case name -> the package's own spelling."""
    module = importlib.import_module(PACKAGES[package])
    if package == "timm":
        return {name: name for name in module.list_optimizers()}
    classes = {key: value for key, value in vars(module).items() if isinstance(value, type) and value is not Optimizer}
    return {key.lower(): key for key, value in classes.items() if issubclass(value, Optimizer)}


def _find(name: str) -> tuple[type, Callable[..., Optimizer]]:
    """The class called `name`, and the function that builds one from parameters, `lr` and options."""
    if name in OWN:
        return OWN[name], OWN[name]
    prefix, colon, bare = name.rpartition(":")
    packages = [package for package in PACKAGES if not colon or package == prefix]
    package = next((package for package in packages if bare in _names(package)), None)
    if package is None:
        known = [*OWN, *(other for each in PACKAGES for other in _names(each))]
        known += [f"{each}:{other}" for each in PACKAGES for other in _names(each)]
        allowed = f"a lower-case name from {', '.join(PACKAGES)}, alone or as in timm:lamb"
        raise _refused("optimizer", name, f"expected {allowed}{_hint(name, known)}")
    module = importlib.import_module(PACKAGES[package])
    if package != "timm":
        cls = getattr(module, _names(package)[bare])
        return cls, cls
    try:
        return module.get_optimizer_class(bare, bind_defaults=False), partial(module.create_optimizer_v2, opt=bare)
    except (AssertionError, ImportError) as error:  # it needs a package that timm doesn't install
        raise _refused("optimizer", name, _one_line(error)) from None


def _option_names(name: str, cls: type) -> list[str]:
    """The named arguments of `cls` beside `params` and `lr`: its **kwargs would swallow a misspelt option."""
    arguments = [key for key, each in inspect.signature(cls).parameters.items() if each.kind != each.VAR_KEYWORD]
    if "lr" not in arguments:
        raise _refused("optimizer", name, "it takes no learning rate")
    return [key for key in arguments if key not in ("params", "lr")]


def _trial_error(params: Sequence[Parameter], build: Callable[[Sequence[Parameter]], Optimizer]) -> str | None:
    """Take two steps on small stand-ins of `params`; return why they fail, or None."""
    shapes = {(p.device, p.dtype, tuple(min(size, 4) for size in p.shape)) for p in params}
    devices = {p.device for p in params if p.device.type == "cuda"}
    generator = torch.Generator().manual_seed(0)

    def random(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    prefix = ""
    # Some optimizers draw random numbers. The training must draw the same ones as without this trial.
    with torch.random.fork_rng(devices=devices):
        try:
            stand_ins = [Parameter(random(*shape)) for shape in sorted(shapes, key=str)]
            optimizer = build(stand_ins)
            if any("lr" not in group for group in optimizer.param_groups):
                return "it keeps no learning rate that a schedule could set"
            if hasattr(optimizer, "eval"):
                return "it must swap weights before each validation by its eval(), which is not supported"
            prefix = "its step on plain gradients fails: "
            for _ in range(2):
                for parameter in stand_ins:
                    parameter.grad = random(parameter.device, parameter.dtype, tuple(parameter.shape))
                optimizer.step()
        except Exception as error:  # the packages raise all kinds, KeyError and AttributeError among them
            return prefix + _one_line(error)
    return None


# --- capturing a step in a CUDA graph


def capturable(optimizer: Optimizer, scheduler: LRScheduler) -> bool:
    """Whether a CUDA graph can replay a step of `optimizer`. The schedule may then change nothing but the rate."""
    can = CAPTURABLE.get(type(optimizer))
    if can is None or getattr(scheduler, "cycle_momentum", False):
        return False
    return all(can(group) for group in optimizer.param_groups)


def reset_state(optimizer: Optimizer) -> None:
    """Set the state of a `capturable` optimizer back to zeros in place, where its captured step finds it."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()


# --- Ranger21's own schedule


def overrides_schedule(optimizer: Any) -> bool:
    """Whether `optimizer` replaces the schedule's rate by its own in some steps, as Ranger21 does."""
    return type(optimizer).__name__ == "Ranger21" and not optimizer.disable_lr_scheduler


def applied_lr(optimizer: Optimizer) -> float | None:
    """The rate that Ranger21 applied in its last step; None for other optimizers, and before the first step."""
    rate: float | None = optimizer.param_groups[0].get("applied_lr")
    return rate


def _note_applied_lr(optimizer: Any, *_: Any) -> None:
    group = optimizer.param_groups[0]
    # Not `current_lr`, which Ranger21 sets only while it warms up or down.
    group["applied_lr"] = float(
        optimizer.warm_down(optimizer.warm_up_dampening(group["lr"], group["step"]), group["step"])
    )


# --- schedules

Fraction = Annotated[float, Field(ge=0, le=1), "a number from 0 to 1"]
_MOMENTUM: dict[str, Any] = {"cycle_momentum": bool, "base_momentum": Fraction, "max_momentum": Fraction}

SCHEDULERS: dict[str, dict[str, Any]] = {
    "cosine": {"T_max": PositiveFloat, "eta_min": NonNegativeFloat},
    "cyclic": {
        "base_lr": NonNegativeFloat,
        "max_lr": PositiveFloat,
        "step_size_up": PositiveFloat,
        "step_size_down": PositiveFloat,
        "mode": Literal["triangular", "triangular2", "exp_range"],
        "gamma": PositiveFloat,
        **_MOMENTUM,
    },
    "onecycle": {
        "pct_start": Fraction,
        "anneal_strategy": Literal["cos", "linear"],
        "div_factor": PositiveFloat,
        "final_div_factor": PositiveFloat,
        "three_phase": bool,
        **_MOMENTUM,
    },
    "constant": {},
}
"""Schedule -> its options, named as in torch, and their types: torch itself checks few of them."""


def build_scheduler(
    name: str,
    optimizer: Optimizer,
    *,
    options: Options,
    lr: float,
    epochs: int,
    moves_per_epoch: int,
    warmup_epochs: float,
) -> LRScheduler:
    """Build the schedule called `name` on `optimizer`. Its `step()` is called `moves_per_epoch` times an epoch.

    - constant: `lr`.
    - cosine: from `lr` to `eta_min` (default 0) in `T_max` epochs (default: all after the warm-up) and up again in as
      many, as torch's CosineAnnealingLR.
    - cyclic: torch's CyclicLR, by default from `base_lr` 1e-5 to `max_lr` `lr`; `step_size_up` (default 2000) counts
      calls of `step()`.
    - onecycle: torch's OneCycleLR over the whole training, with `lr` as its highest rate.

    The last two also cycle the optimizer's momentum or beta1, unless `cycle_momentum` is false. With constant and
    cosine, the rate first climbs to `lr` in equal parts over `warmup_epochs`. Raises UsageError for what can't be done.
    """
    setting = f"scheduler_options.{name}"
    types, given = SCHEDULERS[name], {}
    for option, value in options.items():
        if option not in types:
            raise _unknown(setting, option, types)
        if value is not None:  # None stands for the default
            given[option] = config.read_value(f"{setting}.{option}", value, types[option])
    moves = epochs * moves_per_epoch
    if warmup_epochs >= epochs:
        raise _refused("warmup_epochs", warmup_epochs, f"expected less than epochs, {epochs}")
    if name in ("constant", "cosine"):
        warmup = min(round(warmup_epochs * moves_per_epoch), moves - 1)
        lowest = given.get("eta_min", 0.0) / lr if name == "cosine" else 1.0
        if lowest > 1:
            raise _refused(f"{setting}.eta_min", given["eta_min"], f"expected at most lr, {lr}")
        fall = given["T_max"] * moves_per_epoch if "T_max" in given else moves - warmup
        return LambdaLR(optimizer, partial(_factor, warmup=warmup, lowest=lowest, fall=fall))
    if warmup_epochs:
        raise _refused("warmup_epochs", warmup_epochs, f"{name} has its own climb; expected 0")
    if given.get("cycle_momentum", True) and not {"momentum", "betas"} & set(optimizer.defaults):
        reason = f"{type(optimizer).__name__} has neither momentum nor betas; expected false"
        raise _refused(f"{setting}.cycle_momentum", True, reason)
    try:
        if name == "onecycle":
            return OneCycleLR(optimizer, max_lr=lr, total_steps=moves, **given)
        rates = {"base_lr": 1e-5, "max_lr": lr} | given
        if rates["base_lr"] > rates["max_lr"]:
            raise _refused(f"{setting}.base_lr", rates["base_lr"], f"expected at most max_lr, {rates['max_lr']}")
        return CyclicLR(optimizer, **rates)
    except ZeroDivisionError:
        reason = f"it leaves a phase of the {moves} steps of the schedule empty"
        raise _refused(f"{setting}.pct_start", given["pct_start"], reason) from None


def _factor(move: int, warmup: int, lowest: float, fall: float) -> float:
    """The rate as a share of `lr`: it climbs for `warmup` moves, then falls to `lowest` in `fall` moves by a cosine.

    One function for both parts, since torch's SequentialLR warns of its own calls in some versions.
    """
    if move < warmup:
        return (move + 1) / (warmup + 1)
    return lowest + (1 - lowest) * (1 + math.cos(math.pi * (move - warmup) / fall)) / 2


# --- errors


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _refused(setting: str, value: Any, reason: str) -> UsageError:
    return UsageError(f"{setting}: {json.dumps(value, default=str)} is not allowed: {reason}")


def _unknown(setting: str, option: str, known: Iterable[str]) -> UsageError:
    allowed = " | ".join(known) or "no options"
    return UsageError(f"{setting}.{option}: unknown option: expected {allowed}{_hint(option, known)}")


def _hint(name: str, known: Iterable[str]) -> str:
    close = nearest(name, known)
    return f"; did you mean {close}?" if close else ""
