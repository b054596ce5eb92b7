"""Optimizers and schedules by name; the blog's learning rates, figure by figure; refusals in one line."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from pipeline.errors import UsageError
from pipeline.training import optimizers

BLOG = {"weight_decay": 0.0, "num_warm_up_iterations": 0}


def parameters():
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((5, 3), (5,))]


def optimizer_of(name="sgd", options=None, params=None, lr=0.1, total_steps=20, fastest=None):
    params = parameters() if params is None else params
    return optimizers.build_optimizer(
        name, params, lr=lr, options=options or {}, total_steps=total_steps, fastest=fastest
    )


def scheduler_of(name, optimizer=None, epochs=10, steps=5, per_batch=False, warmup=0.0, lr=0.1, **options):
    return optimizers.build_scheduler(
        name,
        optimizer or optimizer_of(lr=lr),
        options=options,
        lr=lr,
        epochs=epochs,
        steps_per_epoch=steps,
        per_batch=per_batch,
        warmup_epochs=warmup,
    )


def checked(optimizer="sgd", scheduler="constant", optimizer_options=None, scheduler_options=None, warmup_epochs=0):
    optimizers.check(
        optimizer,
        scheduler,
        optimizer_options=optimizer_options or {},
        scheduler_options=scheduler_options or {},
        lr=0.1,
        epochs=10,
        per_batch=True,
        warmup_epochs=warmup_epochs,
    )


def step(optimizer):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def rates(scheduler, moves):
    """The rate of each of `moves` moves, with a step of the optimizer in each."""
    found = []
    for _ in range(moves):
        found.append(scheduler.optimizer.param_groups[0]["lr"])
        step(scheduler.optimizer)
        scheduler.step()
    return found


def refusal(call, *args, **kwargs):
    with pytest.raises(UsageError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- names


@pytest.mark.parametrize(
    ("name", "module", "cls"),
    [
        ("sgd", "torch.optim.sgd", "SGD"),
        ("adam", "torch.optim.adam", "Adam"),
        ("adamw", "torch.optim.adamw", "AdamW"),
        ("ranger", "pytorch_ranger.ranger", "Ranger"),  # which torch_optimizer takes it from
        ("torch_optimizer:lamb", "torch_optimizer.lamb", "Lamb"),
        ("lamb", "torch_optimizer.lamb", "Lamb"),
        ("pytorch_optimizer:lamb", "pytorch_optimizer.optimizer.lamb", "Lamb"),
        ("timm:lamb", "timm.optim.lamb", "Lamb"),
        ("ranger21", "pytorch_optimizer.optimizer.ranger21", "Ranger21"),
        ("nadamw", "timm.optim.nadamw", "NAdamW"),
    ],
)
def test_name_is_looked_up_in_the_packages_order(name, module, cls):
    options = BLOG if name == "ranger21" else {}
    found = type(optimizer_of(name, options))
    assert (found.__module__, found.__name__) == (module, cls)


def test_timm_comes_from_its_factory_with_all_parameters_in_one_group():
    optimizer = optimizer_of("timm:sgd", {"weight_decay": 0.1})
    assert [len(group["params"]) for group in optimizer.param_groups] == [2]
    group = optimizer.param_groups[0]
    assert (group["nesterov"], group["momentum"], group["weight_decay"]) == (True, 0.9, 0.1)


def test_unknown_names_are_refused_with_the_nearest():
    packages = "torch, torch_optimizer, pytorch_optimizer, timm"
    assert refusal(optimizer_of, "adamww") == (
        f'optimizer: "adamww" is not allowed: expected a lower-case name from {packages}, '
        "alone or as in timm:lamb; did you mean adamw?"
    )
    assert refusal(optimizer_of, "SGD").endswith("; did you mean sgd?")
    assert refusal(optimizer_of, "timm:lambb") == (
        'optimizer: "timm:lambb" is not allowed: expected a lower-case name from timm, '
        "alone or as in timm:lamb; did you mean timm:lamb?"
    )
    assert refusal(optimizer_of, "tim:lamb") == (
        'optimizer: "tim:lamb" is not allowed: expected one of torch:, torch_optimizer:, pytorch_optimizer:, '
        "timm: or none before the name; did you mean timm:?"
    )
    assert refusal(scheduler_of, "cosin") == (
        'scheduler: "cosin" is not allowed: expected cosine | cyclic | onecycle | constant; did you mean cosine?'
    )


# --- options


def test_options_reach_the_optimizer_and_lists_become_tuples():
    group = optimizer_of("adamw", {"betas": [0.8, 0.99], "weight_decay": 0.3}).param_groups[0]
    assert (group["betas"], group["weight_decay"], group["lr"]) == ((0.8, 0.99), 0.3, 0.1)


def test_unknown_option_is_refused_by_name():
    line = refusal(optimizer_of, "sgd", {"momentumm": 0.9})
    assert line.startswith("optimizer_options.sgd.momentumm: unknown option: expected momentum | dampening | ")
    assert line.endswith("; did you mean momentum?")


def test_option_that_kwargs_would_swallow_is_refused():
    line = refusal(optimizer_of, "ranger21", {"weight_decai": 0.0})
    assert line.startswith("optimizer_options.ranger21.weight_decai: unknown option: expected num_iterations | ")
    assert line.endswith("; did you mean weight_decay?")


def test_unknown_option_of_timm_is_refused_though_its_factory_takes_it():
    line = refusal(optimizer_of, "timm:lamb", {"layer_decay": 0.5})
    assert line.startswith("optimizer_options.timm:lamb.layer_decay: unknown option: expected ")


@pytest.mark.parametrize("option", ["lr", "params"])
def test_lr_and_params_are_no_options(option):
    assert refusal(optimizer_of, "sgd", {option: 1}) == (
        f"optimizer_options.sgd.{option}: 1 is not allowed: "
        + ("lr is a setting of its own" if option == "lr" else "the model's trainable parameters are taken")
    )


@pytest.mark.parametrize(
    ("name", "options", "setting", "reason"),
    [
        ("sgd", {"weight_decay": 0, "momentum": -1}, "momentum: -1", "Invalid momentum value: -1"),
        (
            "sgd",
            {"momentum": "0.9"},
            'momentum: "0.9"',
            "'<' not supported between instances of 'str' and 'float'",
        ),
        (
            "sgd",
            {"nesterov": True},
            "nesterov: true",
            "Nesterov momentum requires a momentum and zero dampening",
        ),
        ("adam", {"betas": 0.9, "eps": 1e-8}, "betas: 0.9", "'float' object is not subscriptable"),
        ("timm:lamb", {"betas": [0.9]}, "betas: [0.9]", ""),
    ],
)
def test_wrong_value_is_refused_by_name_in_the_packages_own_words(name, options, setting, reason):
    line = refusal(optimizer_of, name, options)
    assert line.startswith(f"optimizer_options.{name}.{setting} is not allowed: ")
    assert reason in line


def test_two_wrong_values_are_shown_together():
    line = refusal(optimizer_of, "sgd", {"momentum": -1, "weight_decay": -2})
    assert line.startswith('optimizer_options.sgd: {"momentum": -1, "weight_decay": -2} is not allowed: Invalid ')


# --- how torch's own are fastest

FASTEST = {"fused": True, "capturable": True}
"""As on CUDA; torch takes both on the CPU, too, where it's fused."""


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("adamw", {"fused": True, "capturable": True}),
        ("adam", {"fused": True, "capturable": True}),
        ("sgd", {"fused": True}),
        ("adagrad", {"fused": True}),
        ("adafactor", {}),
        ("muon", {}),
        ("timm:adamw", {"fused": True, "capturable": True}),  # torch's by another name
        ("timm:nadamw", {}),  # timm's own, though it takes `capturable`
        ("timm:lamb", {}),
        ("torch_optimizer:ranger", {}),
    ],
)
def test_torchs_own_optimizers_get_the_fastest_options_that_they_take(name, taken):
    params = [nn.Parameter(torch.ones(3, 3))]
    group = optimizer_of(name, params=params, fastest=FASTEST).param_groups[0]
    assert {key: value for key, value in group.items() if key in FASTEST and value} == taken
    plain = optimizer_of(name, params=params).param_groups[0]
    assert {key: value for key, value in group.items() if key not in FASTEST} == {
        key: value for key, value in plain.items() if key not in FASTEST
    }
    assert not {key for key, value in plain.items() if key in FASTEST and value}


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({"foreach": True}, {}),
        ({"foreach": False}, {}),
        ({"fused": False}, {}),
        ({"fused": True}, {"fused": True}),
        ({"capturable": False}, {"fused": True}),
        ({"weight_decay": 0.1}, {"fused": True, "capturable": True}),
    ],
)
def test_who_chooses_how_gets_what_was_chosen(options, taken):
    group = optimizer_of("adamw", options, fastest=FASTEST).param_groups[0]
    assert {key: value for key, value in group.items() if key in FASTEST and value} == taken
    assert {key: group[key] for key in options} == options


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "adagrad"])
def test_the_fastest_way_does_the_same_arithmetic(name):
    weights = []
    for fastest in (None, FASTEST):
        params = parameters()
        optimizer = optimizer_of(name, {"weight_decay": 0.1}, params, fastest=fastest)
        torch.manual_seed(0)
        for _ in range(5):
            step(optimizer)
        weights.append(params[0].detach())
    assert torch.allclose(*weights, rtol=1e-5, atol=1e-6)


# --- steps that can be recorded


@pytest.mark.parametrize(
    ("name", "options", "schedule", "can"),
    [
        ("adamw", {}, "cosine", True),
        ("adam", {"amsgrad": True}, "constant", True),
        ("sgd", {}, "cosine", True),
        ("sgd", {"momentum": 0.9, "nesterov": True}, "cyclic-rate", True),
        ("sgd", {"momentum": 0.9, "dampening": 0.1}, "cosine", False),  # its first step is another one
        ("adamw", {"fused": False}, "cosine", False),
        ("adamw", {"foreach": True}, "cosine", False),
        ("adamw", {"capturable": False}, "cosine", False),
        ("sgd", {"foreach": True}, "cosine", False),
        ("adamw", {}, "onecycle", False),  # it moves beta1
        ("adamw", {}, "onecycle-rate", True),
        ("sgd", {"momentum": 0.9}, "cyclic", False),  # it moves momentum
        ("adagrad", {}, "cosine", False),
        ("timm:nadamw", {}, "cosine", False),
        ("ranger21", BLOG, "cosine", False),
    ],
)
def test_which_optimizers_can_be_recorded(name, options, schedule, can):
    optimizer = optimizer_of(name, options, fastest=FASTEST)
    kind, _, rate_only = schedule.partition("-")
    scheduler = scheduler_of(kind, optimizer, **({"cycle_momentum": False} if rate_only else {}))
    assert optimizers.capturable(optimizer, scheduler) is can


def test_nothing_can_be_recorded_that_is_not_made_the_fastest_way():
    for name in ("adamw", "adam", "sgd"):
        optimizer = optimizer_of(name)
        assert optimizers.capturable(optimizer, scheduler_of("constant", optimizer)) is False


def test_inside_the_rates_are_those_given_and_afterwards_the_optimizers_own():
    optimizer = torch.optim.SGD(
        [{"params": [part], "lr": lr} for part, lr in zip(parameters(), (0.1, 0.2), strict=True)]
    )
    rates = [torch.tensor(0.5), torch.tensor(0.25)]
    with optimizers.recorded_rates(optimizer, rates):
        assert all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, rates, strict=True))
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
    with pytest.raises(ZeroDivisionError), optimizers.recorded_rates(optimizer, rates):
        raise ZeroDivisionError
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


@pytest.mark.parametrize(
    ("name", "options"),
    [("adamw", {}), ("adam", {"amsgrad": True}), ("sgd", {"momentum": 0.9, "nesterov": True}), ("sgd", {})],
)
def test_what_is_forgotten_is_so_in_its_own_memory_and_training_starts_anew(name, options):
    params = parameters()
    optimizer = optimizer_of(name, options, params, fastest=FASTEST)
    assert optimizers.capturable(optimizer, scheduler_of("constant", optimizer))
    weights = []
    for _ in range(2):
        with torch.no_grad():
            for parameter, fresh in zip(params, parameters(), strict=True):
                parameter.copy_(fresh)
        torch.manual_seed(0)
        for _ in range(3):
            step(optimizer)
        weights.append(params[0].detach().clone())
        state = [value for each in optimizer.state.values() for value in each.values()]
        assert all(value.any() for value in state)
        optimizers.forget(optimizer)
        assert not any(value.any() for value in state)  # the tensors that were there before
    assert torch.equal(*weights)
    assert len(state) == {"adamw": 6, "adam": 8, "sgd": 2 if options else 0}[name]


# --- optimizers that don't suit


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "lbfgs",
            "its step on plain gradients fails: LBFGS.step() missing 1 required positional arg",
        ),
        ("sparseadam", "its step on plain gradients fails: SparseAdam does not support dense gradients"),
        ("muon", "Muon only supports 2D parameters"),
        ("adahessian", "its step on plain gradients fails: Gradient tensor 0 does not have grad_fn"),
        ("lookahead", "it is made from optimizer, not from parameters alone"),
        ("lomo", "it is made from model, not from parameters alone"),
        ("sam", "it needs base_optimizer beside parameters"),
        ("alig", "it takes no learning rate"),
        ("a2grad", "it keeps no learning rate that a schedule could set"),
        ("schedulefreeadamw", "it wants to swap weights before each validation"),
        ("bnbsgd8bit", "CUDA required" if not torch.cuda.is_available() else ""),
    ],
)
def test_optimizer_that_cannot_do_the_work_is_refused(name, reason):
    line = refusal(optimizer_of, name)
    assert line.startswith(f'optimizer: "{name}" is not allowed: {reason}')


def test_muon_takes_matrices():
    matrix = nn.Parameter(torch.ones(3, 3))
    step(optimizer_of("muon", params=[matrix]))
    assert not torch.equal(matrix, torch.ones(3, 3))


def test_trial_leaves_parameters_gradients_and_random_numbers_alone():
    params = parameters()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    optimizer_of("pytorch_optimizer:kron", params=params)  # its steps draw numbers
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(was, now) for was, now in zip(parameters(), params, strict=True))
    assert all(parameter.grad is None for parameter in params)


@pytest.mark.slow
@pytest.mark.parametrize("package", optimizers.PACKAGES)
def test_every_optimizer_steps_or_is_refused_in_one_line(package):
    accepted = 0
    for name in optimizers._names(package):
        try:
            optimizer = optimizer_of(f"{package}:{name}")
        except UsageError as error:
            assert "\n" not in str(error)
            continue
        scheduler = scheduler_of("constant", optimizer, warmup=1)
        for _ in range(3):
            step(optimizer)
            assert (optimizers.applied_lr(optimizer) is not None) == optimizers.overrides_schedule(optimizer)
            scheduler.step()
        accepted += 1
    assert accepted > 10


# --- the rate that was applied


def test_blog_rates_figure_by_figure():
    torch.manual_seed(0)
    head = nn.Linear(512, 10)
    optimizer = optimizer_of("ranger21", BLOG, list(head.parameters()), lr=0.1, total_steps=490)
    scheduler = scheduler_of("cyclic", optimizer, epochs=10, steps=49, base_lr=1e-5, max_lr=0.1)
    used = []
    warm_down = optimizer.warm_down

    def spy(lr, iteration):
        used.append(warm_down(lr, iteration))
        return used[-1]

    optimizer.warm_down = spy
    lr, applied = [], []
    for _ in range(10):
        for _ in range(49):
            step(optimizer)
            # The last rate asked of `warm_down` is the step's own: optim asks before the step.
            assert optimizers.applied_lr(optimizer) == used[-1]
        lr.append(optimizer.param_groups[0]["lr"])
        applied.append(optimizers.applied_lr(optimizer))
        scheduler.step()
    assert lr == pytest.approx([1e-5 + (0.1 - 1e-5) * epoch / 2000 for epoch in range(10)], rel=1e-9)
    assert applied[:7] == lr[:7]
    assert [round(rate, 4) for rate in applied[7:9]] == [0.0705, 0.0353]
    assert applied[9] == pytest.approx(3e-5, rel=1e-9)
    assert optimizers.overrides_schedule(optimizer)


def test_schedule_rules_where_nothing_overrides_it():
    for optimizer in (
        optimizer_of("sgd"),
        optimizer_of("ranger21", {**BLOG, "disable_lr_scheduler": True}),
        optimizer_of("pytorch_optimizer:adafactor", {"relative_step": False}),
        optimizer_of("adagrad"),
    ):
        step(optimizer)
        assert optimizers.applied_lr(optimizer) is None
        assert not optimizers.overrides_schedule(optimizer)


def test_ranger21_gets_the_trainings_steps_unless_told_otherwise():
    assert optimizer_of("ranger21", BLOG, total_steps=100).start_warm_down == 72
    assert optimizer_of("ranger21", {**BLOG, "num_iterations": 50}, total_steps=100).start_warm_down == 36


@pytest.mark.parametrize(
    ("name", "options", "direction"),
    [
        ("pytorch_optimizer:asgd", {}, lambda gradient, weight: gradient),
        ("asgd", {"lambd": 0.5}, lambda gradient, weight: gradient + 0.5 * weight),  # its own decay
        ("dadaptsgd", {"momentum": 0.0, "d0": 1e-5}, lambda gradient, weight: gradient),
        ("dadaptlion", {"d0": 1e-5}, lambda gradient, weight: 1.0),
        ("rprop", {}, lambda gradient, weight: 1.0),
    ],
)
def test_applied_lr_is_what_moved_the_weight(name, options, direction):
    weight = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = optimizer_of(name, options, [weight], lr=1.0)
    found = []
    for gradient in (2.0, 0.5, 0.75, 1.5) * 2:
        before = weight.item()
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        found.append(optimizers.applied_lr(optimizer))
        assert before - weight.item() == pytest.approx(found[-1] * direction(gradient, before), rel=1e-5)
    assert len(set(found)) > 1


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("adafactor", {}, lambda step: min(0.9, step**-0.5)),
        ("pytorch_optimizer:adafactor", {"warmup_init": True}, lambda step: 1e-6 * step),
        ("torch_optimizer:adafactor", {}, lambda step: 0.01),
        ("adagrad", {"lr_decay": 0.5}, lambda step: 0.9 / (1 + (step - 1) * 0.5)),
        ("apollodqn", {"warmup_steps": 2, "init_lr": 0.1}, lambda step: (0.5, 0.9, 0.9)[step - 1]),
        ("apollo", {"warmup": 2, "init_lr": 0.1}, lambda step: (0.1, 0.5, 0.9)[step - 1]),
        ("prodigy", {"d0": 0.01}, lambda step: 0.009),
        ("dadaptadam", {"d0": 0.01}, lambda step: 0.009),
    ],
)
def test_applied_lr_by_the_class_own_rule(name, options, expected):
    optimizer = optimizer_of(name, options, lr=0.9)
    assert optimizers.overrides_schedule(optimizer)
    assert optimizers.applied_lr(optimizer) is None
    for number in (1, 2, 3) if "d0" not in options else (1,):
        step(optimizer)
        assert optimizers.applied_lr(optimizer) == pytest.approx(expected(number), rel=1e-6)


# --- schedules


@pytest.mark.parametrize("per_batch", [False, True])
def test_cosine_is_torchs(per_batch):
    moves = 20 if per_batch else 4
    torchs = CosineAnnealingLR(optimizer_of(), T_max=moves, eta_min=0.01)
    ours = scheduler_of("cosine", epochs=4, steps=5, per_batch=per_batch, T_max=None, eta_min=0.01)
    assert rates(ours, moves + 3) == pytest.approx(rates(torchs, moves + 3), rel=1e-6)


def test_cosine_counts_t_max_in_epochs():
    found = rates(scheduler_of("cosine", epochs=4, steps=5, per_batch=True, T_max=2), 20)
    assert found[0] == 0.1
    assert found[5] == pytest.approx(0.05)
    assert found[10] == pytest.approx(0, abs=1e-12)


def test_warm_up_climbs_in_equal_parts_and_leaves_the_rest_to_the_schedule():
    found = rates(scheduler_of("cosine", epochs=3, steps=4, per_batch=True, warmup=1), 12)
    assert found[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert found[4:] == pytest.approx([0.05 * (1 + math.cos(math.pi * move / 8)) for move in range(8)])
    assert rates(scheduler_of("constant", epochs=5, warmup=2), 5) == pytest.approx([0.1 / 3, 0.2 / 3, 0.1, 0.1, 0.1])
    assert rates(scheduler_of("constant", steps=4, per_batch=True, warmup=0.5), 3)[2] == 0.1


def test_constant_stays():
    assert rates(scheduler_of("constant"), 12) == [0.1] * 12


def test_cyclic_by_default_climbs_to_lr_in_2000_moves_and_cycles_momentum():
    scheduler = scheduler_of("cyclic", optimizer_of("sgd", {"momentum": 0.5}), max_lr=None)
    assert rates(scheduler, 3) == pytest.approx([1e-5 + (0.1 - 1e-5) * move / 2000 for move in range(3)])
    assert scheduler.optimizer.param_groups[0]["momentum"] == pytest.approx(0.9 - 0.1 * 3 / 2000)


def test_cyclic_cycles_beta1_and_leaves_beta2():
    scheduler = scheduler_of("cyclic", optimizer_of("adam"), step_size_up=2)
    assert rates(scheduler, 5) == pytest.approx([1e-5, 0.050005, 0.1, 0.050005, 1e-5])
    assert scheduler.optimizer.param_groups[0]["betas"] == pytest.approx((0.85, 0.999))


@pytest.mark.parametrize("name", ["cyclic", "onecycle"])
def test_momentum_cannot_cycle_where_there_is_none(name):
    assert refusal(scheduler_of, name, optimizer_of("adagrad")) == (
        f"scheduler_options.{name}.cycle_momentum: true is not allowed: "
        "Adagrad has neither momentum nor betas; expected false"
    )
    rates(scheduler_of(name, optimizer_of("adagrad"), cycle_momentum=False), 2)


@pytest.mark.parametrize("per_batch", [False, True])
def test_onecycle_ends_with_the_training(per_batch):
    moves = 50 if per_batch else 10
    scheduler = scheduler_of("onecycle", per_batch=per_batch, pct_start=0.2, div_factor=10, final_div_factor=100)
    found = rates(scheduler, moves)
    assert found[0] == pytest.approx(0.01)
    assert max(found) == found[moves // 5 - 1] == pytest.approx(0.1)
    assert found[-1] == pytest.approx(0.0001)


@pytest.mark.parametrize("name", optimizers.SCHEDULERS)
@pytest.mark.parametrize("per_batch", [False, True])
def test_no_schedule_warns_or_fails_at_its_end(name, per_batch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(rates(scheduler_of(name, epochs=2, per_batch=per_batch), 10 if per_batch else 2)) > 0


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        (
            "cyclic",
            {"max_lrr": 1},
            "scheduler_options.cyclic.max_lrr: unknown option: expected base_lr | max_lr | ",
        ),
        (
            "constant",
            {"eta_min": 1},
            "scheduler_options.constant.eta_min: unknown option: expected no options",
        ),
        (
            "cyclic",
            {"max_lr": "1e-1"},
            'scheduler_options.cyclic.max_lr: "1e-1" is not allowed: expected a number above 0',
        ),
        (
            "cyclic",
            {"mode": "up"},
            'scheduler_options.cyclic.mode: "up" is not allowed: expected triangular | ',
        ),
        (
            "cyclic",
            {"base_lr": 0.2},
            "scheduler_options.cyclic.base_lr: 0.2 is not allowed: expected at most max_lr, 0.1",
        ),
        (
            "cosine",
            {"T_max": 0},
            "scheduler_options.cosine.T_max: 0 is not allowed: expected a number above 0",
        ),
        (
            "cosine",
            {"eta_min": 0.2},
            "scheduler_options.cosine.eta_min: 0.2 is not allowed: expected at most lr, 0.1",
        ),
        (
            "onecycle",
            {"pct_start": 2},
            "scheduler_options.onecycle.pct_start: 2 is not allowed: expected a num",
        ),
        (
            "onecycle",
            {"pct_start": 0.1},
            "scheduler_options.onecycle.pct_start: 0.1 is not allowed: it leaves a phase of the 10 steps",
        ),
        (
            "onecycle",
            {"cycle_momentum": 1},
            "scheduler_options.onecycle.cycle_momentum: 1 is not allowed: expected true | false",
        ),
    ],
)
def test_scheduler_options_are_refused_by_name(name, options, line):
    assert refusal(scheduler_of, name, **options).startswith(line)


@pytest.mark.parametrize(
    ("name", "warmup", "reason"),
    [
        ("onecycle", 1, "1 is not allowed: onecycle has its own climb; expected 0"),
        ("cyclic", 1, "1 is not allowed: cyclic has its own climb; expected 0"),
        ("cosine", 10, "10 is not allowed: expected from 0 to below epochs, 10"),
        ("cosine", -1, "-1 is not allowed: expected from 0 to below epochs, 10"),
        ("cosine", 0.5, "0.5 is not allowed: expected whole epochs, as the schedule moves by epochs"),
    ],
)
def test_warm_up_that_cannot_be_is_refused(name, warmup, reason):
    assert refusal(scheduler_of, name, warmup=warmup) == f"warmup_epochs: {reason}"


# --- the early check


def test_check_passes_what_the_recipes_say():
    checked("ranger21", "cyclic", BLOG, {"base_lr": 1e-5, "max_lr": 0.1})
    checked("adamw", "cosine", {"weight_decay": 0.01}, {"eta_min": 0.0}, warmup_epochs=1)
    checked("adamw", "onecycle", {"weight_decay": 0.05}, {"pct_start": 0.2})
    checked("muon")  # whether the model has vectors isn't known yet


def test_check_refuses_before_there_is_a_model():
    assert refusal(checked, "adamww").startswith('optimizer: "adamww" is not allowed')
    assert refusal(checked, optimizer_options={"momentum": -1}).startswith("optimizer_options.sgd.momentum: -1 ")
    assert refusal(checked, scheduler="cosin").startswith('scheduler: "cosin" is not allowed')
    assert refusal(checked, scheduler="cyclic", warmup_epochs=1).startswith("warmup_epochs: 1 is not allowed")
    assert refusal(checked, "adagrad", "cyclic").startswith("scheduler_options.cyclic.cycle_momentum: true ")


def test_half_an_epoch_of_warm_up_on_a_single_step_an_epoch():
    """Small data: the schedule moves by batches, of which an epoch has one."""
    scheduler = scheduler_of("cosine", epochs=4, steps=1, per_batch=True, warmup=0.5)
    assert scheduler.get_last_lr() == [pytest.approx(0.1)]
