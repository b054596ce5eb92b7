"""Optimizers and schedules by name, your own optimizers, CUDA graphs, and refusals in one line."""

import dataclasses
import math
import warnings

import pytest
import torch
from loops import linear, make_loop, samples, train, without_times
from standin import Capturing
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from pipeline import config
from pipeline.devices.cpu import Cpu
from pipeline.errors import UsageError
from pipeline.training import optimizers

BLOG = {"weight_decay": 0.0, "num_warm_up_iterations": 0}
FASTEST = {"fused": True, "capturable": True}
"""CUDA's options. torch accepts both on the CPU too."""


def parameters():
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((5, 3), (5,))]


def optimizer_of(name="sgd", options=None, params=None, lr=0.1, total_steps=20, fastest=None):
    params = parameters() if params is None else params
    return optimizers.build_optimizer(
        name, params, lr=lr, options=options or {}, total_steps=total_steps, device_options=fastest
    )


def scheduler_of(name, optimizer=None, epochs=10, moves=1, warmup=0.0, **options):
    return optimizers.build_scheduler(
        name,
        optimizer or optimizer_of(),
        options=options,
        lr=0.1,
        epochs=epochs,
        scheduler_steps_per_epoch=moves,
        warmup_epochs=warmup,
    )


def check(optimizer="sgd", scheduler="constant", optimizer_options=None, scheduler_options=None, warmup_epochs=0):
    recipe = dataclasses.replace(
        config.load().recipes["finetune"],
        optimizer=optimizer,
        optimizer_options={optimizer: optimizer_options or {}},
        scheduler=scheduler,
        scheduler_options={scheduler: scheduler_options or {}},
        scheduler_step="epoch",
        epochs=10,
        lr=0.1,
        warmup_epochs=warmup_epochs,
    )
    optimizers.check(recipe)


def step(optimizer):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def rates(scheduler, moves):
    """The learning rates of `moves` steps of optimizer and schedule."""
    values = []
    for _ in range(moves):
        values.append(scheduler.optimizer.param_groups[0]["lr"])
        step(scheduler.optimizer)
        scheduler.step()
    return values


def refusal(call, *args, **kwargs):
    """The error message of `call`, one line, split into the setting and the rest."""
    with pytest.raises(UsageError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    setting, _, rest = str(caught.value).partition(": ")
    return setting.removesuffix(":"), rest


# --- names


@pytest.mark.parametrize(
    ("name", "module", "cls"),
    [
        ("sgd", "torch.optim.sgd", "SGD"),
        ("ranger", "pytorch_ranger.ranger", "Ranger"),  # which torch_optimizer takes it from
        ("lamb", "torch_optimizer.lamb", "Lamb"),
        ("pytorch_optimizer:lamb", "pytorch_optimizer.optimizer.lamb", "Lamb"),
        ("timm:lamb", "timm.optim.lamb", "Lamb"),
        ("nadamw", "timm.optim.nadamw", "NAdamW"),
    ],
)
def test_a_name_is_looked_up_in_the_order_of_packages(name, module, cls):
    built = type(optimizer_of(name))
    assert (built.__module__, built.__name__) == (module, cls)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("adamww", "adamw"), ("SGD", "sgd"), ("timm:lambb", "timm:lamb"), ("tim:lamb", "timm:lamb")],
)
def test_an_unknown_optimizer_is_refused_with_a_suggestion(name, nearest):
    setting, rest = refusal(optimizer_of, name)
    assert setting == "optimizer" and f'"{name}"' in rest and rest.endswith(f"did you mean {nearest}?")


# --- options


def test_options_reach_the_optimizer_and_lists_become_tuples():
    group = optimizer_of("adamw", {"betas": [0.8, 0.99], "weight_decay": 0.3}).param_groups[0]
    assert (group["betas"], group["weight_decay"], group["lr"]) == ((0.8, 0.99), 0.3, 0.1)


@pytest.mark.parametrize(
    ("name", "option", "expected"),
    [
        ("sgd", "momentumm", "did you mean momentum?"),
        ("sgd", "lr", "momentum"),
        ("ranger21", "weight_decai", "did you mean weight_decay?"),  # its **kwargs would swallow it
        ("timm:lamb", "layer_decay", "weight_decay"),  # timm's factory would take it
    ],
)
def test_an_unknown_option_is_refused_with_the_allowed_ones(name, option, expected):
    setting, rest = refusal(optimizer_of, name, {option: 0.5})
    assert setting == f"optimizer_options.{name}.{option}" and expected in rest


@pytest.mark.parametrize(
    ("name", "options", "option"),
    [
        ("sgd", {"weight_decay": 0, "momentum": -1}, "momentum"),
        ("sgd", {"momentum": "0.9"}, "momentum"),
        ("sgd", {"nesterov": True}, "nesterov"),
        ("adam", {"betas": 0.9, "eps": 1e-8}, "betas"),
        ("timm:lamb", {"betas": [0.9]}, "betas"),
    ],
)
def test_a_wrong_value_is_refused_by_name(name, options, option):
    setting, rest = refusal(optimizer_of, name, options)
    assert setting == f"optimizer_options.{name}.{option}"
    assert rest.startswith(str(options[option]).lower()) or f'"{options[option]}"' in rest


# --- how torch's own are fastest


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("adamw", {}, {"fused": True, "capturable": True}),
        ("sgd", {}, {"fused": True}),
        ("adafactor", {}, {}),
        ("timm:adamw", {}, {"fused": True, "capturable": True}),  # torch's by another name
        ("timm:nadamw", {}, {}),  # timm's own, though it takes `capturable`
        ("torch_optimizer:ranger", {}, {}),
        ("adamw", {"foreach": True}, {}),
        ("adamw", {"fused": False}, {}),
        ("adamw", {"capturable": False}, {"fused": True}),
    ],
)
def test_torchs_optimizers_get_the_devices_options_unless_the_user_chooses(name, options, expected):
    group = optimizer_of(name, options, fastest=FASTEST).param_groups[0]
    assert {key: value for key, value in group.items() if key in FASTEST and value} == expected
    plain = optimizer_of(name, options).param_groups[0]
    assert {**group, "params": None, **dict.fromkeys(FASTEST)} == {**plain, "params": None, **dict.fromkeys(FASTEST)}


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "adagrad"])
def test_the_devices_options_do_not_change_the_result(name):
    weights = []
    for fastest in (None, FASTEST):
        params = parameters()
        optimizer = optimizer_of(name, {"weight_decay": 0.1}, params, fastest=fastest)
        torch.manual_seed(0)
        for _ in range(5):
            step(optimizer)
        weights.append(params[0].detach())
    assert torch.allclose(*weights, rtol=1e-5, atol=1e-6)


# --- optimizers of your own, and steps in a CUDA graph


class SignSGD(torch.optim.Optimizer):
    """The example of the module's docstring, with momentum."""

    def __init__(self, params, lr, momentum=0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                mean = state.setdefault("mean", torch.zeros_like(parameter))
                mean.mul_(group["momentum"]).add_(parameter.grad)
                parameter.sub_(group["lr"] * mean.sign())


@pytest.fixture
def own(monkeypatch):
    """Register `SignSGD` as `signsgd_here`, whose step can be captured, and as `lamb`, which hides a package's. The
    name `signsgd` must stay free for whoever adds the docstring's example."""
    monkeypatch.setattr(optimizers, "REGISTERED", dict(optimizers.REGISTERED))
    monkeypatch.setattr(optimizers, "CAPTURABLE", dict(optimizers.CAPTURABLE))
    optimizers.register("signsgd_here", capturable=True)(SignSGD)
    optimizers.register("lamb")(type("Lamb", (SignSGD,), {}))


def test_your_own_optimizer_is_found_by_its_name(own):
    weight = nn.Parameter(torch.tensor([2.0, -2.0]))
    optimizer = optimizer_of("signsgd_here", {"momentum": 0.5}, [weight])
    weight.grad = torch.tensor([3.0, -0.5])
    optimizer.step()
    assert weight.tolist() == pytest.approx([1.9, -1.9])
    assert isinstance(optimizer_of("lamb"), SignSGD) and not isinstance(optimizer_of("timm:lamb"), SignSGD)
    assert refusal(optimizer_of, "signsgd_heree")[1].endswith("did you mean signsgd_here?")
    assert refusal(optimizer_of, "signsgd_here", {"momentun": 1})[0] == "optimizer_options.signsgd_here.momentun"
    check("signsgd_here", optimizer_options={"momentum": 0.9})


@pytest.mark.parametrize(
    ("name", "options", "schedule", "expected"),
    [
        ("signsgd_here", {"momentum": 0.9}, "cosine", True),
        ("lamb", {}, "cosine", False),  # not registered as capturable
        ("adamw", {}, "cosine", True),
        ("adam", {"amsgrad": True}, "constant", True),
        ("sgd", {"momentum": 0.9, "nesterov": True}, "cyclic-rate", True),
        ("sgd", {"momentum": 0.9, "dampening": 0.1}, "cosine", False),
        ("adamw", {"fused": False}, "cosine", False),
        ("adamw", {"capturable": False}, "cosine", False),
        ("sgd", {"foreach": True}, "cosine", False),
        ("adamw", {}, "onecycle", False),  # it moves beta1
        ("adamw", {}, "onecycle-rate", True),
        ("adagrad", {}, "cosine", False),
        ("timm:nadamw", {}, "cosine", False),
        ("ranger21", BLOG, "cosine", False),
    ],
)
def test_which_steps_can_be_captured(own, name, options, schedule, expected):
    kind, _, rate_only = schedule.partition("-")
    for fastest in (FASTEST, None):  # without the device's options a package's step is never captured
        optimizer = optimizer_of(name, options, fastest=fastest)
        scheduler = scheduler_of(kind, optimizer, **({"cycle_momentum": False} if rate_only else {}))
        assert optimizers.capturable(optimizer, scheduler) is (expected and bool(fastest or name == "signsgd_here"))


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "signsgd_here", *optimizers.REGISTERED])
def test_a_captured_step_trains_as_an_eager_one(own, name):
    figures = []
    for backend in (Cpu(), Capturing()):
        train_loop = make_loop(
            linear(),
            backend=backend,
            optimizer=name,
            scheduler="cosine",
            epochs=3,
            steps=3,
            use_cuda_graph=isinstance(backend, Capturing),
        )
        if not optimizers.capturable(train_loop.optimizer, train_loop.scheduler) and isinstance(backend, Capturing):
            pytest.skip("its step is not captured")
        for _ in range(3):  # the first time, capturing takes steps of its own
            train_loop.network.load_state_dict(linear().state_dict())
            train_loop.restart()
            figures.append(without_times(train(train_loop, samples(12), samples(6, seed=1))))
    assert ("_train_step", 4) in backend.captured
    eager, _, _, _, captured, again = figures
    assert captured == again
    assert captured == [pytest.approx(row, rel=1e-5) for row in eager]


# --- optimizers that don't suit


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lbfgs", "its step on plain gradients fails"),
        ("sparseadam", "does not support dense gradients"),
        ("muon", "2D"),
        ("lookahead", ""),  # it wraps another one
        ("sam", ""),
        ("lomo", ""),  # it takes the model
        ("alig", "learning rate"),
        ("a2grad", "learning rate"),
        ("schedulefreeadamw", "eval()"),
        ("bnbsgd8bit", "CUDA required" if not torch.cuda.is_available() else ""),
    ],
)
def test_an_optimizer_that_cannot_train_any_model_is_refused(name, reason):
    setting, rest = refusal(optimizer_of, name)
    assert setting == "optimizer" and rest.startswith(f'"{name}"') and reason in rest


def test_the_trial_changes_no_parameters_gradients_or_random_numbers():
    params = parameters()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    optimizer_of("pytorch_optimizer:kron", params=params)  # its steps draw numbers
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(*pair) for pair in zip(parameters(), params, strict=True))
    assert all(parameter.grad is None for parameter in params)


# --- Ranger21's own schedule


@pytest.mark.parametrize(
    ("name", "options"), [("sgd", {}), ("ranger21", {**BLOG, "disable_lr_scheduler": True}), ("prodigy", {})]
)
def test_only_ranger21_reports_an_applied_rate(name, options):
    optimizer = optimizer_of(name, options)
    step(optimizer)
    assert optimizers.applied_lr(optimizer) is None and not optimizers.overrides_schedule(optimizer)


def test_ranger21_gets_the_number_of_steps_unless_the_user_sets_it():
    assert optimizer_of("ranger21", BLOG, total_steps=100).start_warm_down == 72
    assert optimizer_of("ranger21", {**BLOG, "num_iterations": 50}, total_steps=100).start_warm_down == 36


# --- schedules


@pytest.mark.parametrize("moves", [1, 5])
def test_cosine_equals_torchs_cosine(moves):
    torchs = CosineAnnealingLR(optimizer_of(), T_max=4 * moves, eta_min=0.01)
    built = scheduler_of("cosine", epochs=4, moves=moves, T_max=None, eta_min=0.01)
    assert rates(built, 4 * moves + 3) == pytest.approx(rates(torchs, 4 * moves + 3), rel=1e-6)


def test_the_warm_up_is_linear_and_then_the_schedule_follows():
    values = rates(scheduler_of("cosine", epochs=3, moves=4, warmup=1), 12)
    assert values[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert values[4:] == pytest.approx([0.05 * (1 + math.cos(math.pi * move / 8)) for move in range(8)])
    assert rates(scheduler_of("constant", epochs=5, warmup=2), 5) == pytest.approx([0.1 / 3, 0.2 / 3, 0.1, 0.1, 0.1])
    assert rates(scheduler_of("constant", moves=4, warmup=0.5), 3)[2] == 0.1
    assert rates(scheduler_of("cosine", epochs=4, warmup=0.5), 1) == [pytest.approx(0.1)]  # one batch an epoch


@pytest.mark.parametrize("moves", [1, 5])
def test_onecycle_ends_with_the_training(moves):
    scheduler = scheduler_of("onecycle", moves=moves, pct_start=0.2, div_factor=10, final_div_factor=100)
    values = rates(scheduler, 10 * moves)
    assert [values[0], values[2 * moves - 1], values[-1]] == pytest.approx([0.01, 0.1, 0.0001])
    assert max(values) == values[2 * moves - 1]


@pytest.mark.parametrize("name", optimizers.SCHEDULERS)
@pytest.mark.parametrize("moves", [1, 5])
def test_no_schedule_warns_or_fails_at_its_end(name, moves):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(0 <= rate <= 0.1 + 1e-9 for rate in rates(scheduler_of(name, epochs=2, moves=moves), 2 * moves))


@pytest.mark.parametrize(
    ("name", "options", "setting", "expected"),
    [
        ("cyclic", {"max_lrr": 1}, "max_lrr", "did you mean max_lr?"),
        ("constant", {"eta_min": 1}, "eta_min", "no options"),
        ("cyclic", {"max_lr": "1e-1"}, "max_lr", "number"),
        ("cyclic", {"max_lr": math.nan}, "max_lr", "number"),
        ("cyclic", {"mode": "up"}, "mode", "triangular | triangular2 | exp_range"),
        ("cyclic", {"base_lr": 0.2}, "base_lr", "at most max_lr, 0.1"),
        ("cosine", {"T_max": 0}, "T_max", "above 0"),
        ("cosine", {"eta_min": -1}, "eta_min", "from 0"),
        ("cosine", {"eta_min": 0.2}, "eta_min", "at most lr, 0.1"),
        ("onecycle", {"pct_start": 2}, "pct_start", "from 0 to 1"),
        ("onecycle", {"pct_start": 0.1}, "pct_start", "10 steps"),
        ("onecycle", {"cycle_momentum": 1}, "cycle_momentum", "true | false"),
    ],
)
def test_scheduler_options_are_refused_by_name(name, options, setting, expected):
    key, rest = refusal(scheduler_of, name, **options)
    assert key == f"scheduler_options.{name}.{setting}" and expected in rest


@pytest.mark.parametrize("name", ["cyclic", "onecycle"])
def test_momentum_cannot_cycle_without_momentum(name):
    setting, rest = refusal(scheduler_of, name, optimizer_of("adagrad"))
    assert setting == f"scheduler_options.{name}.cycle_momentum" and rest.endswith("expected false")
    rates(scheduler_of(name, optimizer_of("adagrad"), cycle_momentum=False), 2)


@pytest.mark.parametrize(
    ("name", "warmup", "expected"),
    [
        ("onecycle", 1, "expected 0"),
        ("cyclic", 1, "expected 0"),
        ("cosine", 10, "less than epochs, 10"),
        ("cosine", 0.5, "whole epochs"),
    ],
)
def test_an_impossible_warm_up_is_refused(name, warmup, expected):
    setting, rest = refusal(check, scheduler=name, warmup_epochs=warmup)
    assert setting == "warmup_epochs" and rest.startswith(f"{float(warmup)} ") and expected in rest


# --- the early check


def test_check_needs_no_model():
    assert refusal(check, "adamww")[0] == "optimizer"
    assert refusal(check, optimizer_options={"momentum": -1})[0] == "optimizer_options.sgd.momentum"
    assert refusal(check, scheduler="cosine", scheduler_options={"T_max": 0})[0] == "scheduler_options.cosine.T_max"
