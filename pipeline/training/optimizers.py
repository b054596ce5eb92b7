"""Build optimizers and learning rate schedules by name.

An optimizer's name is looked up in REGISTERED, then in the packages of PACKAGES.

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

Then `-S optimizer=signsgd` trains with it. The constructor takes `params`, `lr`, and options by name. Users set the
options under `optimizer_options: {signsgd: {weight_decay: 0.1}}`. If there is an argument `num_iterations`, it receives
the number of steps of the whole training. Test the arithmetic in tests/training/test_optimizers.py, where the tests for
all registered optimizers find yours automatically.

Set `capturable=True` only if a CUDA graph can replay its step:
- it reads `group["lr"]` in every step, which may be a scalar tensor on the device;
- its Python code takes the same path in every step: no step counter in Python, no `.item()`, no `if` on a tensor;
- it keeps its state in `self.state`, in tensors that start as zeros and are updated in place.
"""

import importlib
import inspect
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, LRScheduler, OneCycleLR

from pipeline import config
from pipeline.errors import UsageError, hint

Options = Mapping[str, Any]
Group = dict[str, Any]
"""One of an optimizer's `param_groups`."""

PACKAGES = {
    "torch": "torch.optim",
    "torch_optimizer": "torch_optimizer",
    "pytorch_optimizer": "pytorch_optimizer",
    "timm": "timm.optim",
}
"""Package, as in `timm:lamb` -> its module. A name without a package is looked up in this order."""

REGISTERED: dict[str, type[Optimizer]] = {}
"""Optimizers defined in this file, by name. They take precedence over the packages' optimizers."""

CAPTURABLE: dict[type, Callable[[Group], bool]] = {
    Adam: lambda group: bool(group["fused"] and group["capturable"]),
    AdamW: lambda group: bool(group["fused"] and group["capturable"]),
    SGD: lambda group: bool(group["fused"] and not group["dampening"]),  # the first step ignores dampening
}
"""Class -> function that says whether a CUDA graph can replay its step with the options of this group. Steps of other
classes are never captured."""

IGNORED_WARNINGS = ("This overload of", "It is highly recommended to have 'opt_einsum'")
"""How warnings from these packages start that users can't act on."""


def register(name: str, *, capturable: bool = False) -> Callable[[type[Optimizer]], type[Optimizer]]:
    """A class decorator that registers an optimizer as `name`. The module's docstring explains `capturable`."""

    def add(cls: type[Optimizer]) -> type[Optimizer]:
        REGISTERED[name] = cls
        if capturable:
            CAPTURABLE[cls] = lambda group: True
        return cls

    return add


# Your own optimizers go here.


# --- optimizers


def build(
    recipe: config.Recipe, params: Sequence[Parameter], steps_per_epoch: int, device_options: Options | None = None
) -> tuple[Optimizer, LRScheduler]:
    """Build the recipe's optimizer for `params`, and its schedule. `device_options`: see `build_optimizer`."""
    resolved = recipe.resolved()
    optimizer = build_optimizer(
        recipe.optimizer,
        params,
        lr=recipe.lr,
        options=resolved["optimizer_options"],
        total_steps=steps_per_epoch * recipe.epochs,
        device_options=device_options,
    )
    scheduler = build_scheduler(
        recipe.scheduler,
        optimizer,
        options=resolved["scheduler_options"],
        lr=recipe.lr,
        epochs=recipe.epochs,
        scheduler_steps_per_epoch=steps_per_epoch if recipe.scheduler_step == "batch" else 1,
        warmup_epochs=recipe.warmup_epochs,
    )
    return optimizer, scheduler


def check(recipe: config.Recipe) -> None:
    """Build optimizer and schedule for one small matrix, to find mistakes before data is loaded. Raises UsageError.

    Mistakes that depend on the model are found later: `muon`, for example, takes matrices only.
    """
    if recipe.scheduler_step == "epoch" and recipe.warmup_epochs % 1:
        reason = "expected whole epochs, since scheduler_step is epoch"
        raise _not_allowed("warmup_epochs", recipe.warmup_epochs, reason)
    build(recipe, [Parameter(torch.zeros(4, 4))], steps_per_epoch=100)  # any plausible number of steps


@contextmanager
def _ignore_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        for start in IGNORED_WARNINGS:
            warnings.filterwarnings("ignore", message=start)
        yield


@_ignore_warnings()
def build_optimizer(
    name: str,
    params: Sequence[Parameter],
    *,
    lr: float,
    options: Options,
    total_steps: int,
    device_options: Options | None = None,
) -> Optimizer:
    """Build the optimizer called `name`, such as `sgd` or `timm:lamb`, for `params` as one group.

    - `options`: arguments of its class.
    - `total_steps`: number of steps of the training.
    - `device_options` (`fused`, `capturable`) make torch's own optimizers fast on the device. Each is passed if the
      class takes it and `options` contains neither `fused` nor `foreach`.

    Raises UsageError if the name or an option is unknown, if the class rejects a value, or if two trial steps on small
    tensors shaped like `params` fail.
    """
    cls, construct = _look_up(name)
    accepted = _option_names(name, cls)
    for option in options:
        if option not in accepted:
            raise _unknown_option(f"optimizer_options.{name}", option, accepted)
    defaults: dict[str, Any] = {"num_iterations": total_steps} if "num_iterations" in accepted else {}
    if cls.__module__.startswith("torch.optim.") and not {"foreach", "fused"} & options.keys():
        defaults |= {key: value for key, value in (device_options or {}).items() if key in accepted}

    def make(parameters: Sequence[Parameter], options: Options) -> Optimizer:
        arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
        return construct(parameters, lr=lr, **defaults | arguments)

    def trial_error(options: Options) -> str | None:
        return _trial_error(params, partial(make, options=options))

    reason = trial_error(options)
    if reason is not None:
        raise _find_cause(name, options, reason, trial_error)
    optimizer = make(params, options)
    if overrides_schedule(optimizer):
        optimizer.register_step_post_hook(_store_applied_lr)
    return optimizer


def _find_cause(name: str, options: Options, reason: str, trial_error: Callable[[Options], str | None]) -> UsageError:
    """The error for a trial that failed for `reason`. It names the option without which the trial succeeds, or else all
    options, or else the optimizer itself."""
    setting = f"optimizer_options.{name}"
    for option, value in options.items():
        if trial_error({key: options[key] for key in options if key != option}) is None:
            return _not_allowed(f"{setting}.{option}", value, reason)
    if options and trial_error({}) is None:
        return _not_allowed(setting, dict(options), reason)
    return _not_allowed("optimizer", name, f"{reason}; expected one for any model, such as sgd or adamw")


def _names(package: str) -> dict[str, str]:
    """The package's optimizers: name in lower case -> name in the package."""
    module = importlib.import_module(PACKAGES[package])
    if package == "timm":
        return {name: name for name in module.list_optimizers()}
    classes = {key: value for key, value in vars(module).items() if isinstance(value, type) and value is not Optimizer}
    return {key.lower(): key for key, value in classes.items() if issubclass(value, Optimizer)}


def _look_up(name: str) -> tuple[type, Callable[..., Optimizer]]:
    """The class called `name`, and the function that builds it from parameters, `lr` and options."""
    if name in REGISTERED:
        return REGISTERED[name], REGISTERED[name]
    prefix, colon, bare = name.rpartition(":")
    packages = [package for package in PACKAGES if not colon or package == prefix]
    package = next((package for package in packages if bare in _names(package)), None)
    if package is None:
        pairs = [(package, known) for package in PACKAGES for known in _names(package)]
        names = [*REGISTERED, *(known for _, known in pairs), *(f"{package}:{known}" for package, known in pairs)]
        allowed = f"a lower-case name from {', '.join(PACKAGES)}, alone or as in timm:lamb"
        raise _not_allowed("optimizer", name, f"expected {allowed}{hint(name, names)}")
    module = importlib.import_module(PACKAGES[package])
    if package != "timm":
        cls = getattr(module, _names(package)[bare])
        return cls, cls
    try:
        return module.get_optimizer_class(bare, bind_defaults=False), partial(module.create_optimizer_v2, opt=bare)
    except (AssertionError, ImportError) as error:  # some need another package
        raise _not_allowed("optimizer", name, _one_line(error)) from None


def _option_names(name: str, cls: type) -> list[str]:
    """The named arguments of `cls` except `params` and `lr`. **kwargs don't count: they accept any misspelt option."""
    parameters = inspect.signature(cls).parameters
    arguments = [key for key, parameter in parameters.items() if parameter.kind != parameter.VAR_KEYWORD]
    if "lr" not in arguments:
        raise _not_allowed("optimizer", name, "it takes no learning rate")
    return [key for key in arguments if key not in ("params", "lr")]


def _trial_error(params: Sequence[Parameter], build: Callable[[Sequence[Parameter]], Optimizer]) -> str | None:
    """Take two steps on tensors like `params`, but with sides of at most 4. Returns why they fail, or None."""
    shapes = {(p.device, p.dtype, tuple(min(size, 4) for size in p.shape)) for p in params}
    devices = {p.device for p in params if p.device.type == "cuda"}
    generator = torch.Generator().manual_seed(0)

    def random(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    prefix = ""
    # The trial must not change the random numbers that the training will draw.
    with torch.random.fork_rng(devices=devices):
        try:
            trial_params = [Parameter(random(*shape)) for shape in sorted(shapes, key=str)]
            optimizer = build(trial_params)
            if any("lr" not in group for group in optimizer.param_groups):
                return "it keeps no learning rate that a schedule could set"
            if hasattr(optimizer, "eval"):
                return "it must swap weights by its eval() before each validation, which is not supported"
            prefix = "its step on plain gradients fails: "
            for _ in range(2):
                for parameter in trial_params:
                    parameter.grad = random(parameter.device, parameter.dtype, tuple(parameter.shape))
                optimizer.step()
        except Exception as error:  # even KeyError and AttributeError
            return prefix + _one_line(error)
    return None


# --- capturing a step in a CUDA graph


def capturable(optimizer: Optimizer, scheduler: LRScheduler) -> bool:
    """Whether a CUDA graph can replay a step of `optimizer`. `scheduler` must change nothing but the learning rate."""
    is_capturable = CAPTURABLE.get(type(optimizer))
    if is_capturable is None or getattr(scheduler, "cycle_momentum", False):
        return False
    return all(is_capturable(group) for group in optimizer.param_groups)


def reset_state(optimizer: Optimizer) -> None:
    """Zero the state of a `capturable` optimizer, in place, since the captured step uses this memory."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()


# --- resuming

PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.Size, Tensor)
"""Types that a state file may hold, also in lists, tuples and dicts."""

NOT_STATE = ("state", "param_groups", "defaults", "_optimizer_")
"""How the names of attributes start that `torch.optim.Optimizer` keeps for itself."""


def state(optimizer: Optimizer) -> dict[str, Any] | None:
    """All that `restore` needs: torch's state, and what some optimizers keep as attributes. None if part of it is an
    object of a package's own class, such as a queue of gradients, which `restore` could not set exactly."""
    saved = optimizer.state_dict()
    groups = [{key: value for key, value in group.items() if not _is_fixed(value)} for group in saved["param_groups"]]
    saved = saved | {"param_groups": groups}
    attributes = {
        key: value for key, value in vars(optimizer).items() if not key.startswith(NOT_STATE) and not _is_fixed(value)
    }
    result = {"state": saved, "attributes": attributes}
    return result if _is_plain(result) else None


def restore(optimizer: Optimizer, saved: Mapping[str, Any], *, in_place: bool) -> None:
    """Set what `state` returned. `in_place`: the tensors of the optimizer's state stay, since a captured step uses
    them."""
    saved_state = saved["state"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if in_place:
        for number, values in saved_state["state"].items():
            present = optimizer.state[parameters[number]]
            for key, value in values.items():
                if isinstance(value, Tensor):
                    present[key].copy_(value)
                else:
                    present[key] = value
        for group, values in zip(optimizer.param_groups, saved_state["param_groups"], strict=True):
            group.update({key: value for key, value in values.items() if key != "params"})
    else:
        pairs = zip(optimizer.param_groups, saved_state["param_groups"], strict=True)
        groups = [{**group, **values} for group, values in pairs]  # an option that is not saved stays as it was built
        optimizer.load_state_dict({**saved_state, "param_groups": groups})
        for key, value in saved_state["state"].items():  # torch made every tensor the parameter's dtype
            owner = parameters[key] if isinstance(key, int) else key
            optimizer.state[owner] = _with_dtypes(optimizer.state[owner], value)
    vars(optimizer).update(saved["attributes"])


def _is_plain(value: Any) -> bool:
    if type(value) is dict:
        return all(map(_is_plain, value.keys())) and all(map(_is_plain, value.values()))
    return all(map(_is_plain, value)) if type(value) in (list, tuple) else type(value) in PLAIN


def _is_fixed(value: Any) -> bool:
    """Whether training can't change a value that is not plain, such as a function: a new optimizer has the same."""
    return inspect.isroutine(value) or isinstance(value, type | Enum)


def _with_dtypes(value: Any, saved: Any) -> Any:
    """`value` with the dtypes of `saved`, which has the same structure."""
    if isinstance(saved, Tensor):
        return value if value.dtype == saved.dtype else saved.to(value.device)
    if isinstance(saved, dict):
        return {key: _with_dtypes(value[key], saved[key]) for key in saved}
    return type(saved)(map(_with_dtypes, value, saved)) if type(saved) in (list, tuple) else value


# --- Ranger21's own schedule


def overrides_schedule(optimizer: Any) -> bool:
    """Whether `optimizer` is a Ranger21 that overrides the schedule's learning rate in some steps."""
    return type(optimizer).__name__ == "Ranger21" and not optimizer.disable_lr_scheduler


def applied_lr(optimizer: Optimizer) -> float | None:
    """The learning rate that Ranger21 used in its last step; None for other optimizers, and before the first step."""
    rate: float | None = optimizer.param_groups[0].get("applied_lr")
    return rate


def _store_applied_lr(optimizer: Any, *_: Any) -> None:
    group = optimizer.param_groups[0]
    # Ranger21 sets its own `current_lr` only while it warms up or down.
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
"""Schedule -> option, named as in torch -> type. torch itself checks few of them."""


def build_scheduler(
    name: str,
    optimizer: Optimizer,
    *,
    options: Options,
    lr: float,
    epochs: int,
    scheduler_steps_per_epoch: int,
    warmup_epochs: float,
) -> LRScheduler:
    """Build the schedule called `name` for `optimizer`. Call its `step()` `scheduler_steps_per_epoch` times an epoch.

    - constant: `lr`.
    - cosine: from `lr` down to `eta_min` (default 0) in `T_max` epochs (default: all epochs after the warm-up), then up
      again in as many, like torch's CosineAnnealingLR.
    - cyclic: torch's CyclicLR between `base_lr` (default 1e-5) and `max_lr` (default `lr`). `step_size_up` (default
      2000) counts calls of `step()`.
    - onecycle: torch's OneCycleLR over the whole training, with `lr` as its highest rate.

    For constant and cosine, the rate first rises linearly to `lr` over `warmup_epochs`. Cyclic and onecycle also cycle
    the optimizer's momentum or beta1, unless `cycle_momentum` is false. Raises UsageError for a bad option or value.
    """
    setting = f"scheduler_options.{name}"
    arguments = _read_options(setting, options, SCHEDULERS[name])
    total_steps = epochs * scheduler_steps_per_epoch
    if warmup_epochs >= epochs:
        raise _not_allowed("warmup_epochs", warmup_epochs, f"expected less than epochs, {epochs}")
    if name in ("constant", "cosine"):
        warmup_steps = min(round(warmup_epochs * scheduler_steps_per_epoch), total_steps - 1)
        lowest = arguments.get("eta_min", 0.0) / lr if name == "cosine" else 1.0
        if lowest > 1:
            raise _not_allowed(f"{setting}.eta_min", arguments["eta_min"], f"expected at most lr, {lr}")
        decay_steps = total_steps - warmup_steps
        if "T_max" in arguments:
            decay_steps = arguments["T_max"] * scheduler_steps_per_epoch
        factor = partial(_lr_factor, warmup_steps=warmup_steps, lowest=lowest, decay_steps=decay_steps)
        return LambdaLR(optimizer, factor)
    if warmup_epochs:
        raise _not_allowed("warmup_epochs", warmup_epochs, f"{name} has a warm-up of its own; expected 0")
    if arguments.get("cycle_momentum", True) and not {"momentum", "betas"} & set(optimizer.defaults):
        reason = f"{type(optimizer).__name__} has neither momentum nor betas; expected false"
        raise _not_allowed(f"{setting}.cycle_momentum", True, reason)
    try:
        if name == "onecycle":
            return OneCycleLR(optimizer, max_lr=lr, total_steps=total_steps, **arguments)
        rates = {"base_lr": 1e-5, "max_lr": lr} | arguments
        if rates["base_lr"] > rates["max_lr"]:
            raise _not_allowed(f"{setting}.base_lr", rates["base_lr"], f"expected at most max_lr, {rates['max_lr']}")
        return CyclicLR(optimizer, **rates)
    except ZeroDivisionError:
        reason = f"one of its phases would have none of the schedule's {total_steps} steps"
        raise _not_allowed(f"{setting}.pct_start", arguments["pct_start"], reason) from None


def _read_options(setting: str, options: Options, types: Mapping[str, Any]) -> dict[str, Any]:
    """`options` as these types, without those that are None, which means the default."""
    for option in options:
        if option not in types:
            raise _unknown_option(setting, option, types)
    return {
        option: config.read_value(f"{setting}.{option}", value, types[option])
        for option, value in options.items()
        if value is not None
    }


def _lr_factor(step: int, warmup_steps: int, lowest: float, decay_steps: float) -> float:
    """The learning rate at `step` as a multiple of `lr`: a linear warm-up, then a cosine from 1 to `lowest`.

    This replaces torch's SequentialLR, some versions of which warn about their own calls.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return lowest + (1 - lowest) * (1 + math.cos(math.pi * (step - warmup_steps) / decay_steps)) / 2


# --- errors


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _not_allowed(setting: str, value: Any, reason: str) -> UsageError:
    return UsageError(f"{setting}: {json.dumps(value, default=str)} is not allowed: {reason}")


def _unknown_option(setting: str, option: str, known: Iterable[str]) -> UsageError:
    allowed = " | ".join(known) or "no options"
    return UsageError(f"{setting}.{option}: unknown option: expected {allowed}{hint(option, known)}")
