"""Optimizers and learning rate schedules by name, refused in one line where they can't do the work.

An optimizer is looked up in four packages. A few change the learning rate that the schedule gave them:
`OVERRIDES` lists them, and `applied_lr` gives the rate that their last step used.
"""

import difflib
import importlib
import inspect
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, LRScheduler, OneCycleLR

from pipeline.errors import UsageError

PACKAGES = {
    "torch": "torch.optim",
    "torch_optimizer": "torch_optimizer",
    "pytorch_optimizer": "pytorch_optimizer",
    "timm": "timm.optim",
}
"""Prefix -> module, in the order in which a name without prefix is looked up."""

NOISE = (
    "This overload of",  # torch_optimizer calls torch in ways of 2019; torch tells once in a process
    "It is highly recommended to have 'opt_einsum'",  # timm's Kron, which does without
)
"""How the warnings begin that say nothing a user of these packages could act on."""

Options = Mapping[str, Any]
Build = Callable[..., torch.optim.Optimizer]


def check(
    optimizer: str,
    scheduler: str,
    *,
    optimizer_options: Options,
    scheduler_options: Options,
    lr: float,
    epochs: int,
    per_batch: bool,
    warmup_epochs: float,
) -> None:
    """Builds both for a model of one small matrix, so that a mistake shows before any data is touched.

    What depends on the model (`muon` takes matrices only) shows in `build_optimizer`. Raises UsageError.
    """
    steps = 100  # an epoch's steps aren't known yet; any plausible number does
    matrix = torch.nn.Parameter(torch.zeros(4, 4))
    built = build_optimizer(optimizer, [matrix], lr=lr, options=optimizer_options, total_steps=epochs * steps)
    build_scheduler(
        scheduler,
        built,
        options=scheduler_options,
        lr=lr,
        epochs=epochs,
        steps_per_epoch=steps,
        per_batch=per_batch,
        warmup_epochs=warmup_epochs,
    )


def build_optimizer(
    name: str,
    params: Sequence[torch.nn.Parameter],
    *,
    lr: float,
    options: Options,
    total_steps: int,
    fastest: Options | None = None,
) -> torch.optim.Optimizer:
    """The optimizer called `name`, such as `sgd` or `timm:lamb`, over `params` as one group.

    `options` are the class's own arguments. A class that asks for `num_iterations` (Ranger21) gets
    `total_steps`, the training's number of steps, unless `options` has it. timm's are made by its factory,
    with its defaults. `fastest` says how torch's own do the same arithmetic fastest on the device (fused,
    capturable), for those that take it and where `options` doesn't choose itself. Raises UsageError, in one
    line, for a name or an option that isn't there, a value that the class refuses, and an optimizer that can't
    train `params` by plain `step()` calls: it first takes two of them on small stand-ins, from gradients drawn
    at random.
    """
    cls, build = _find(name)
    setting = f"optimizer_options.{name}"
    accepted = _accepted(name, cls, options)
    for option, value in options.items():
        if option == "lr":
            raise _refused(f"{setting}.lr", value, "lr is a setting of its own")
        if option == "params":
            raise _refused(f"{setting}.params", value, "the model's trainable parameters are taken")
        if option not in accepted:
            raise _unknown(setting, option, accepted)
    filled: dict[str, Any] = {"num_iterations": total_steps} if "num_iterations" in accepted else {}
    if cls.__module__.startswith("torch.optim.") and not {"foreach", "fused"} & options.keys():
        filled |= {key: value for key, value in (fastest or {}).items() if key in accepted}

    def make(some: Sequence[torch.nn.Parameter], chosen: Options) -> torch.optim.Optimizer:
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in chosen.items()}
        with _without_noise():
            return build(some, lr=lr, **filled | values)

    def fault(chosen: Options) -> str | None:
        return _fault(params, lambda some: make(some, chosen))

    reason = fault(options)
    if reason is None:
        optimizer = make(params, options)
        _follow_override(optimizer)
        return optimizer
    for option, value in options.items():
        if fault({key: other for key, other in options.items() if key != option}) is None:
            raise _refused(f"{setting}.{option}", value, reason)
    if options and fault({}) is None:
        raise _refused(setting, dict(options), reason)
    raise _refused("optimizer", name, f"{reason}; expected one for any model, such as sgd or adamw")


def _names(package: str) -> dict[str, str]:
    """Lower-case name -> the package's own spelling."""
    module = importlib.import_module(PACKAGES[package])
    if package == "timm":
        return {name: name for name in module.list_optimizers()}
    base = torch.optim.Optimizer
    classes = {key: value for key, value in vars(module).items() if isinstance(value, type) and value is not base}
    return {key.lower(): key for key, value in classes.items() if issubclass(value, base)}


def _find(name: str) -> tuple[type, Build]:
    """The class called `name`, and what makes one from parameters, `lr` and options."""
    prefix, colon, bare = name.rpartition(":")
    if colon and prefix not in PACKAGES:
        prefixes = [f"{package}:" for package in PACKAGES]
        allowed = f"one of {', '.join(prefixes)} or none before the name"
        raise _refused("optimizer", name, f"expected {allowed}{_hint(prefix + colon, prefixes)}")
    packages = [prefix] if colon else list(PACKAGES)
    for package in packages:
        names = _names(package)
        if bare in names:
            break
    else:
        known = [prefix + colon + other for package in packages for other in _names(package)]
        allowed = f"a lower-case name from {', '.join(packages)}, alone or as in timm:lamb"
        raise _refused("optimizer", name, f"expected {allowed}{_hint(name, known)}")
    module = importlib.import_module(PACKAGES[package])
    if package != "timm":
        return getattr(module, names[bare]), getattr(module, names[bare])
    try:
        cls = module.get_optimizer_class(bare, bind_defaults=False)
    except (AssertionError, ImportError) as error:  # apex and bitsandbytes, which timm leaves to the user
        raise _refused("optimizer", name, _line(error)) from None
    return cls, partial(module.create_optimizer_v2, opt=bare)


def _accepted(name: str, cls: type, options: Options) -> list[str]:
    """The names of the options that `cls` takes; refuses a class that takes more than parameters and options.

    Only arguments written out count: what a class collects in **kwargs it would swallow without a word.
    """
    arguments = {
        key: argument
        for key, argument in inspect.signature(cls).parameters.items()
        if argument.kind not in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD)
    }
    first = next(iter(arguments))
    if first != "params":
        raise _refused("optimizer", name, f"it is made from {first}, not from parameters alone")
    accepted = [key for key in arguments if key not in ("params", "lr")]
    required = [key for key in accepted if arguments[key].default is inspect.Parameter.empty]
    missing = [key for key in required if key not in options and key != "num_iterations"]
    if missing:
        raise _refused("optimizer", name, f"it needs {', '.join(missing)} beside parameters")
    if "lr" not in arguments:
        raise _refused("optimizer", name, "it takes no learning rate")
    return accepted


def _fault(params: Sequence[torch.nn.Parameter], make: Build) -> str | None:
    """Why what `make` builds can't train parameters like `params`, or None; found by steps on small ones."""
    shapes = {(p.device, p.dtype, tuple(min(size, 4) for size in p.shape)) for p in params}
    devices = {p.device for p in params if p.device.type == "cuda"}
    generator = torch.Generator().manual_seed(0)

    def random(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    stage = ""
    # Some optimizers draw numbers, and the training must draw the same ones as if none had been drawn here.
    with torch.random.fork_rng(devices=devices), _without_noise():
        try:
            some = [torch.nn.Parameter(random(*shape)) for shape in sorted(shapes, key=str)]
            optimizer = make(some)
            if any("lr" not in group for group in optimizer.param_groups):
                return "it keeps no learning rate that a schedule could set"
            if hasattr(optimizer, "eval"):
                return "it wants to swap weights before each validation (its eval()), which is not done here"
            stage = "its step on plain gradients fails: "
            for _ in range(2):
                for parameter in some:
                    parameter.grad = random(parameter.device, parameter.dtype, tuple(parameter.shape))
                optimizer.step()
        except Exception as error:  # these packages raise all kinds, KeyError and AttributeError among them
            return stage + _line(error)
    return None


# --- optimizers that change the schedule's rate


def _state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The first parameter's state; empty before the first step of most optimizers."""
    return dict(next(iter(optimizer.state.values()), {}))


def _steps(optimizer: torch.optim.Optimizer) -> int:
    """Steps done so far, which some optimizers count in the group and others with each parameter."""
    return int(optimizer.param_groups[0].get("step", _state(optimizer).get("step", 0)))


def _group_lr(optimizer: torch.optim.Optimizer) -> float:
    return float(optimizer.param_groups[0]["lr"])


def _ranger21(optimizer: Any) -> float | None:
    # Not `current_lr`: Ranger21 sets that while it warms up or down only, and starts it at the highest rate.
    if optimizer.disable_lr_scheduler:
        return None
    step = _steps(optimizer) + 1
    warmed = optimizer.warm_up_dampening(_group_lr(optimizer), step)
    return float(optimizer.warm_down(warmed, step))


def _d_adapted(optimizer: torch.optim.Optimizer) -> float:
    """d * lr (arXiv:2301.07733, 2306.06101), d as the step begins; DAdaptSGD: by its first gradient norm."""
    rate = float(optimizer.param_groups[0]["d"]) * _group_lr(optimizer)
    if type(optimizer).__name__ != "DAdaptSGD":
        return rate
    params = [p for group in optimizer.param_groups for p in group["params"]]
    first = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    return rate / (optimizer.param_groups[0].get("g0_norm") or float(first) or 1.0)


def _relative_adafactor(optimizer: torch.optim.Optimizer) -> float | None:
    """The relative step of arXiv:1804.04235, before each tensor's own scale."""
    group, step = optimizer.param_groups[0], _steps(optimizer) + 1
    if not group["relative_step"]:
        return None
    return min(1e-6 * step if group["warmup_init"] else 1e-2, 1 / math.sqrt(step))


def _capped_adafactor(optimizer: torch.optim.Optimizer) -> float:
    return min(_group_lr(optimizer), 1 / math.sqrt(_steps(optimizer) + 1))


def _decayed_adagrad(optimizer: torch.optim.Optimizer) -> float | None:
    decay = optimizer.param_groups[0]["lr_decay"]
    return _group_lr(optimizer) / (1 + _steps(optimizer) * decay) if decay else None


def _averaged_sgd(optimizer: torch.optim.Optimizer) -> float:
    return float(_state(optimizer).get("eta", _group_lr(optimizer)))


def _rprop(optimizer: torch.optim.Optimizer) -> float:
    """Each weight has its own; this is their mean."""
    sizes = [state["step_size"].flatten() for state in optimizer.state.values()]
    return float(torch.cat(sizes).mean()) if sizes else _group_lr(optimizer)


def _warmed_apollo(optimizer: Any) -> float | None:
    step = _steps(optimizer) + 1
    if not optimizer.warmup_steps:
        return None
    if step >= optimizer.warmup_steps:
        return _group_lr(optimizer)
    start = optimizer.param_groups[0]["init_lr"]
    return float(start + (optimizer.lr - start) * step / optimizer.warmup_steps)


def _warmed_old_apollo(optimizer: torch.optim.Optimizer) -> float | None:
    group, step = optimizer.param_groups[0], _steps(optimizer)
    if not group["warmup"]:
        return None
    if step >= group["warmup"]:
        return _group_lr(optimizer)
    return float(group["init_lr"] + (group["base_lr"] - group["init_lr"]) * step / group["warmup"])


OVERRIDES: dict[str, tuple[str, Callable[[Any], float | None]]] = {
    "pytorch_optimizer.Ranger21": ("before", _ranger21),
    "pytorch_optimizer.DAdaptAdaGrad": ("before", _d_adapted),
    "pytorch_optimizer.DAdaptAdam": ("before", _d_adapted),
    "pytorch_optimizer.DAdaptAdan": ("before", _d_adapted),
    "pytorch_optimizer.DAdaptLion": ("before", _d_adapted),
    "pytorch_optimizer.DAdaptSGD": ("before", _d_adapted),
    "pytorch_optimizer.Prodigy": ("before", _d_adapted),
    "pytorch_optimizer.AdaFactor": ("before", _relative_adafactor),
    "torch_optimizer.Adafactor": ("before", _relative_adafactor),
    "torch.Adafactor": ("before", _capped_adafactor),
    "torch.Adagrad": ("before", _decayed_adagrad),
    "torch.ASGD": ("before", _averaged_sgd),
    "torch.Rprop": ("after", _rprop),
    "pytorch_optimizer.ApolloDQN": ("before", _warmed_apollo),
    "torch_optimizer.Apollo": ("before", _warmed_old_apollo),
    "pytorch_optimizer.ASGD": ("after", _group_lr),  # writes the rate that it chose over the schedule's
    "pytorch_optimizer.SWATS": ("before", _group_lr),  # likewise, for the next step
    "torch_optimizer.SWATS": ("before", _group_lr),
}
"""Package and class -> when to ask, before or after a step, and what gives that step's rate, or None where
the optimizer's options leave the schedule alone. To add an optimizer, add it here. Scaling by tensor or
weight, as in LAMB or Adam, is part of the update rule and no change of the rate."""


def _follow_override(optimizer: torch.optim.Optimizer) -> None:
    """Has `optimizer` note each step's own rate, in its first group, where it doesn't use the schedule's."""
    cls = type(optimizer)
    when, rate = OVERRIDES.get(f"{cls.__module__.partition('.')[0]}.{cls.__name__}", ("before", lambda _: None))
    if rate(optimizer) is None:
        return
    optimizer.param_groups[0]["applied_lr"] = None

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        optimizer.param_groups[0]["applied_lr"] = rate(optimizer)

    if when == "before":
        optimizer.register_step_pre_hook(note)
    else:
        optimizer.register_step_post_hook(note)


def overrides_schedule(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `optimizer`, from `build_optimizer`, takes another rate than its schedule's in some steps."""
    return "applied_lr" in optimizer.param_groups[0]


def capturable(optimizer: torch.optim.Optimizer, scheduler: LRScheduler) -> bool:
    """Whether a step of `optimizer` may be recorded and replayed: nothing in it is decided by the host, its schedule
    moves no more than the rate (`recorded_rates`), and its state begins as zeros (`forget`)."""
    cls, group = type(optimizer), optimizer.param_groups[0]
    adam = cls in (torch.optim.Adam, torch.optim.AdamW) and group["capturable"]
    sgd = cls is torch.optim.SGD and not group["dampening"]
    return bool((adam or sgd) and group["fused"]) and not getattr(scheduler, "cycle_momentum", False)


@contextmanager
def recorded_rates(optimizer: torch.optim.Optimizer, rates: Sequence[torch.Tensor]) -> Iterator[None]:
    """Inside, a step reads its rate from `rates`, a scalar float32 on the device for each group, where a recorded
    step finds at each replay what was written there before."""
    own = [group["lr"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, own, strict=True):
            group["lr"] = rate


def forget(optimizer: torch.optim.Optimizer) -> None:
    """Puts a `capturable` optimizer back to its beginning, its state where it is: a recorded step goes on using it."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                value.zero_()


def applied_lr(optimizer: torch.optim.Optimizer) -> float | None:
    """The learning rate that the last step of `optimizer`, from `build_optimizer`, really used, where it
    overrides the schedule; None where it uses the group's `lr`, and before the first step."""
    rate: float | None = optimizer.param_groups[0].get("applied_lr")
    return rate


# --- schedules


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


Rule = tuple[str, Callable[[Any], bool]]
ABOVE_0: Rule = ("a number above 0", lambda value: _number(value) and value > 0)
FROM_0: Rule = ("a number from 0", lambda value: _number(value) and value >= 0)
SHARE: Rule = ("a number from 0 to 1", lambda value: _number(value) and 0 <= value <= 1)
SWITCH: Rule = ("true | false", lambda value: isinstance(value, bool))
MODE: Rule = ("triangular | triangular2 | exp_range", ("triangular", "triangular2", "exp_range").__contains__)
ANNEAL: Rule = ("cos | linear", ("cos", "linear").__contains__)

MOMENTUM = {"cycle_momentum": SWITCH, "base_momentum": SHARE, "max_momentum": SHARE}
SCHEDULERS: dict[str, dict[str, Rule]] = {
    "cosine": {"T_max": ABOVE_0, "eta_min": FROM_0},
    "cyclic": {
        "base_lr": FROM_0,
        "max_lr": ABOVE_0,
        "step_size_up": ABOVE_0,
        "step_size_down": ABOVE_0,
        "mode": MODE,
        "gamma": ABOVE_0,
        **MOMENTUM,
    },
    "onecycle": {
        "pct_start": SHARE,
        "anneal_strategy": ANNEAL,
        "div_factor": ABOVE_0,
        "final_div_factor": ABOVE_0,
        "three_phase": SWITCH,
        **MOMENTUM,
    },
    "constant": {},
}
"""Schedule -> its options, named as in torch, and what each may hold (torch checks few of them)."""


def build_scheduler(
    name: str,
    optimizer: torch.optim.Optimizer,
    *,
    options: Options,
    lr: float,
    epochs: int,
    steps_per_epoch: int,
    per_batch: bool,
    warmup_epochs: float,
) -> LRScheduler:
    """The schedule called `name` on `optimizer`; its `step()` is due after each batch, or after each epoch.

    - constant: `lr`.
    - cosine: from `lr` to `eta_min` (default 0) in `T_max` epochs (default: all after the warm-up) and up
      again in as many, as torch's CosineAnnealingLR.
    - cyclic: torch's CyclicLR, by default from `base_lr` 1e-5 to `max_lr` `lr`; its `step_size_up` (default
      2000) counts calls of `step()`.
    - onecycle: torch's OneCycleLR over the whole training, with `lr` as its highest rate.

    The last two also cycle the optimizer's momentum or beta1, unless `cycle_momentum` is false. An option
    that is None takes its default. Over `warmup_epochs` the rate first climbs to `lr` in equal parts; cyclic
    and onecycle climb by themselves and refuse it. Raises UsageError, in one line, for whatever can't be
    done.
    """
    if name not in SCHEDULERS:
        raise _refused("scheduler", name, f"expected {' | '.join(SCHEDULERS)}{_hint(name, SCHEDULERS)}")
    setting = f"scheduler_options.{name}"
    given = {option: value for option, value in options.items() if value is not None}
    for option, value in given.items():
        if option not in SCHEDULERS[name]:
            raise _unknown(setting, option, SCHEDULERS[name])
        allowed, fits = SCHEDULERS[name][option]
        if not fits(value):
            raise _refused(f"{setting}.{option}", value, f"expected {allowed}")
    moves = steps_per_epoch if per_batch else 1  # of the schedule in an epoch
    warm = _warm_moves(name, epochs, moves, per_batch, warmup_epochs)
    if name in ("constant", "cosine"):
        lowest = given.get("eta_min", 0.0) / lr if name == "cosine" else 1.0
        if lowest > 1:
            raise _refused(f"{setting}.eta_min", given["eta_min"], f"expected at most lr, {lr}")
        fall = given["T_max"] * moves if "T_max" in given else epochs * moves - warm

        # torch's SequentialLR could join two schedulers, but some versions warn of their own calls.
        def factor(move: int) -> float:
            if move < warm:
                return float((move + 1) / (warm + 1))
            return float(lowest + (1 - lowest) * (1 + math.cos(math.pi * (move - warm) / fall)) / 2)

        return LambdaLR(optimizer, factor)
    if given.get("cycle_momentum", True) and not {"momentum", "betas"} & set(optimizer.defaults):
        reason = f"{type(optimizer).__name__} has neither momentum nor betas; expected false"
        raise _refused(f"{setting}.cycle_momentum", True, reason)
    try:
        if name == "onecycle":
            given["pct_start"] = float(given.get("pct_start", 0.3))  # torch refuses the whole numbers 0 and 1
            return OneCycleLR(optimizer, max_lr=lr, total_steps=epochs * moves, **given)
        rates = {"base_lr": 1e-5, "max_lr": lr} | given
        if rates["base_lr"] > rates["max_lr"]:
            raise _refused(f"{setting}.base_lr", rates["base_lr"], f"expected at most max_lr, {rates['max_lr']}")
        return CyclicLR(optimizer, **rates)
    except ZeroDivisionError:
        total = f"the {epochs * moves} steps of the schedule"
        raise _refused(f"{setting}.pct_start", given["pct_start"], f"it leaves a phase of {total} empty") from None
    except (TypeError, ValueError) as error:
        raise _refused(setting, dict(options), _line(error)) from None


def _warm_moves(name: str, epochs: int, moves: int, per_batch: bool, warmup_epochs: float) -> int:
    """The warm-up's length in moves of the schedule, of which an epoch has `moves`."""
    if warmup_epochs and name not in ("constant", "cosine"):
        raise _refused("warmup_epochs", warmup_epochs, f"{name} has its own climb; expected 0")
    if not 0 <= warmup_epochs < epochs:
        raise _refused("warmup_epochs", warmup_epochs, f"expected from 0 to below epochs, {epochs}")
    if not per_batch and warmup_epochs != int(warmup_epochs):
        raise _refused("warmup_epochs", warmup_epochs, "expected whole epochs, as the schedule moves by epochs")
    return min(round(warmup_epochs * moves), epochs * moves - 1)


# --- errors


@contextmanager
def _without_noise() -> Iterator[None]:
    with warnings.catch_warnings():
        for start in NOISE:
            warnings.filterwarnings("ignore", message=start)
        yield


def _line(error: Exception) -> str:
    """What `error` says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _refused(setting: str, value: Any, reason: str) -> UsageError:
    return UsageError(f"{setting}: {json.dumps(value, default=str)} is not allowed: {reason}")


def _unknown(setting: str, option: str, known: Iterable[str]) -> UsageError:
    allowed = " | ".join(known) or "no options"
    return UsageError(f"{setting}.{option}: unknown option: expected {allowed}{_hint(option, known)}")


def _hint(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name).lower(), list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
