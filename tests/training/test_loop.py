"""The loops: figures that can be recomputed by hand, a clock that waits, the same numbers by every path."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from loops import CLASSES, linear, make_loop, samples, train, train_resnet, without_times
from standin import Away, Capturing, EventStandin, Queued, Standin
from torch import nn
from torch.optim.lr_scheduler import CyclicLR

from pipeline import terminal
from pipeline.data import batching
from pipeline.devices.cpu import Cpu
from pipeline.errors import StageError
from pipeline.training import loop

pytestmark = pytest.mark.usefixtures("one_thread")


def softmax_by_hand(weight, bias, inputs, labels):
    """Each sample's loss, whether it was answered right, and the mean loss's gradients."""
    logits = inputs @ weight.T + bias
    shares = logits.exp() / logits.exp().sum(1, keepdim=True)
    losses = -shares[torch.arange(len(labels)), labels].log()
    error = (shares - F.one_hot(labels, CLASSES)) / len(labels)
    return losses, logits.argmax(1) == labels, error.T @ inputs, error.sum(0)


# --- figures


def test_figures_are_sums_over_samples_though_the_last_batch_is_short():
    training, validation, network = samples(9), samples(6, seed=1), linear()
    weight, bias = (parameter.detach().clone().double() for parameter in network.parameters())
    (figures,) = train(make_loop(network, lr=0.5, steps=3), training, validation)

    losses, right, means = [], [], []
    for start in (0, 4, 8):
        inputs, labels = training.inputs[start : start + 4].double(), training.labels[start : start + 4]
        loss, correct, weight_slope, bias_slope = softmax_by_hand(weight, bias, inputs, labels)
        weight, bias = weight - 0.5 * weight_slope, bias - 0.5 * bias_slope
        losses += loss.tolist()
        right += correct.tolist()
        means.append(loss.mean().item())
    assert figures["train/loss"] == pytest.approx(sum(losses) / 9, rel=1e-5)
    assert figures["train/accuracy"] == sum(right) / 9
    assert figures["train/loss"] != pytest.approx(sum(means) / 3, rel=1e-3)

    loss, correct, *_ = softmax_by_hand(weight, bias, validation.inputs.double(), validation.labels)
    assert figures["val/loss"] == pytest.approx(loss.mean().item(), rel=1e-5)
    assert figures["val/accuracy"] == correct.double().mean().item()
    assert torch.allclose(network.weight, weight.float(), atol=1e-6)


def test_the_network_trains_in_its_own_mode_and_validates_in_eval():
    network = nn.Sequential(linear(), nn.Dropout(0.5))
    modes, prepared = [], []
    network.register_forward_hook(lambda *_: modes.append(network.training))

    def set_train_mode():
        prepared.append(len(modes))
        network.train()

    train(make_loop(network, epochs=2, set_train_mode=set_train_mode), samples(8), samples(4))
    assert modes == [True, True, False] * 2
    assert prepared == [0, 3]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["training", "validation"])
def test_a_loss_that_is_no_number_ends_the_training(bad, which):
    broken, good = samples(4), samples(8)
    broken.inputs[3, 1] = bad
    later = iter([good, broken])
    epochs = loop.train(
        make_loop(linear(), epochs=3),
        lambda epoch: batching.batches(broken if epoch == 2 and which == "training" else good, 4, Cpu()),
        lambda: batching.batches(next(later) if which == "validation" else good, 4, Cpu()),
    )
    assert next(epochs)["epoch"] == 1
    with pytest.raises(loop.NonFiniteLossError, match=rf"^the {which} loss is (nan|inf) in epoch 2") as caught:
        next(epochs)
    assert isinstance(caught.value, StageError)


# --- learning rates


@pytest.mark.parametrize("per_batch", [True, False])
def test_the_rate_is_that_of_the_epochs_last_step(per_batch):
    train_loop = make_loop(linear(), lr=0.4, scheduler="cosine", epochs=3, steps=2, schedule_per_batch=per_batch)
    used = []
    train_loop.optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    figures = train(train_loop, samples(8), samples(4))
    moves = [1, 3, 5] if per_batch else [0, 1, 2]
    expected = [0.2 * (1 + math.cos(math.pi * move / (6 if per_batch else 3))) for move in moves]
    assert [row["train/lr"] for row in figures] == pytest.approx(expected, rel=1e-9)
    assert [row["train/lr"] for row in figures] == used[1::2]
    assert not any("train/lr_applied" in row for row in figures)


def test_the_blogs_rates_are_shown_as_scheduled_and_as_applied():
    train_loop = make_loop(
        linear(),
        optimizer="ranger21",
        options={"weight_decay": 0.0, "num_warm_up_iterations": 0},
        lr=0.1,
        scheduler="cyclic",
        scheduler_options={"base_lr": 1e-5, "max_lr": 0.1},
        epochs=10,
        steps=49,
        schedule_per_batch=False,
    )
    figures = train(train_loop, samples(49 * 2), samples(4), batch_size=2)

    alone = torch.optim.SGD(linear().parameters(), lr=0.1, momentum=0.9)
    torchs = CyclicLR(alone, base_lr=1e-5, max_lr=0.1)
    expected = []
    for _ in range(10):
        expected.append(torchs.get_last_lr()[0])
        alone.step()
        torchs.step()
    assert [row["train/lr"] for row in figures] == pytest.approx(expected, rel=1e-12)
    # Past 72 % of its steps Ranger21 goes down in a line from the highest rate, whatever the schedule says.
    assert [row["train/lr_applied"] for row in figures[:7]] == pytest.approx(expected[:7], rel=1e-12)
    assert [round(row["train/lr_applied"], 4) for row in figures[7:9]] == [0.0705, 0.0353]
    assert figures[9]["train/lr_applied"] == pytest.approx(3e-5, rel=1e-9)


# --- the clock, and what a backend can't tell


def test_the_clock_and_the_peak_are_read_when_the_device_has_done_an_epochs_work():
    backend = Standin(peaks=[12.5, 3.0])
    figures = train(make_loop(Queued(linear(), backend, 1.0), backend=backend, epochs=2), samples(8), samples(4))
    assert [row["memory/peak_mib"] for row in figures] == [12.5, 3.0]
    # An epoch: training and validation, each from and to.
    assert backend.calls == ["reset", *["synchronize", "now"] * 4, "peak"] * 2


def test_queued_work_is_billed_to_training_or_validation_and_nothing_else_is():
    backend = Standin()
    train_loop = make_loop(Queued(linear(), backend, 0.25), backend=backend, epochs=2)
    rows = []
    for figures in loop.train(
        train_loop,
        lambda epoch: batching.batches(samples(12), 4, backend),
        lambda: batching.batches(samples(7), 4, backend),
    ):
        rows.append((figures["time/train_seconds"], figures["time/val_seconds"]))
        assert figures["speed/train_images_per_second"] == 12 / 0.75
        backend.queue(1000)  # the caller's checkpoint
    assert rows == [(0.75, 0.5), (0.75, 0.5)]
    assert train_loop.clock.seconds == {"train": 1.5, "validate": 1.0}


@pytest.mark.parametrize(
    ("memory", "capacity", "share"),
    [
        ({"peak": 12.5, "peak_reserved": 14.0, "driver": 16.0}, 50.0, 0.25),
        ({"peak": 12.5}, None, None),
        ({"driver": 16.0}, 50.0, None),
        ({}, 50.0, None),
    ],
)
def test_what_a_backend_does_not_tell_of_its_memory_is_absent(memory, capacity, share):
    backend = Standin()
    backend.memory_mib, backend.capacity_mib = lambda: memory, lambda: capacity
    (figures,) = train(make_loop(Queued(linear(), backend, 1.0), backend=backend), samples(4), samples(4))
    expected = {f"memory/{name}_mib": mib for name, mib in memory.items()}
    expected |= {"memory/peak_share": share} if share else {}
    assert {name: value for name, value in figures.items() if name.startswith("memory/")} == expected


def test_steps_are_timed_in_training_alone():
    backend = EventStandin()
    train_loop = make_loop(Queued(linear(), backend, 0.25), backend=backend, epochs=2)
    batches = list(batching.batches(samples(4 * 4), 4, backend))
    loop.warm_up(train_loop, batches, batches)
    assert backend.calls.count("event") == 1  # whether there are events
    train(train_loop, samples(9 * 4), samples(16))
    assert train_loop.times.seconds == [0.25] * 4  # the fourth and the eighth of nine, then the 12th and the 16th


def test_the_warm_up_takes_real_steps_then_waits_and_never_reads_the_clock():
    backend, network = Standin(), linear()
    before = network.weight.detach().clone()
    train_loop = make_loop(Queued(network, backend, 1.0), backend=backend)
    batches = list(batching.batches(samples(5), 4, backend))
    loop.warm_up(train_loop, batches, batches[1:])
    assert backend.calls == ["synchronize"]
    assert backend.time == 103.0  # two batches to train on, the last one to validate
    assert not torch.equal(network.weight, before)
    assert train_loop.clock.seconds == {}


# --- a step


def test_bf16_is_for_the_network_alone():
    network, seen, added = linear(), [], []
    network.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    train_loop = make_loop(network, precision="bf16")
    add = train_loop.metrics.add

    def spy(loss, logits, labels):
        added.extend([loss.dtype, logits.dtype])
        add(loss, logits, labels)

    train_loop.metrics.add = spy
    train(train_loop, samples(4), samples(4))
    assert seen == [torch.bfloat16] * 2
    assert [*added, network.weight.dtype, network.weight.grad.dtype] == [torch.float32] * 6


def test_a_scaled_loss_gives_the_same_step():
    """fp16's way: the gradients are scaled up and down again, by powers of 2."""
    weights, losses = [], []
    for scaler in (torch.amp.GradScaler("cpu", enabled=False), torch.amp.GradScaler("cpu", init_scale=2.0**10)):
        train_loop = make_loop(linear())
        train_loop.scaler = scaler
        train_loop.step(*next(batching.batches(samples(8), 8, Cpu())))
        weights.append(train_loop.network.weight.detach().clone())
        losses.append(train_loop.metrics.read(8))
    assert losses[0] == losses[1]
    assert torch.allclose(*weights, atol=1e-7)
    assert not torch.allclose(weights[0], linear().weight)
    scaled = [make_loop(linear(), precision=name).scaler.is_enabled() for name in ("fp32", "bf16", "fp16")]
    assert scaled == [False, False, True]


# --- restarts, and captured steps

WAYS = [
    ({"options": {"momentum": 0.9, "nesterov": True}}, "_train_step"),
    ({"optimizer": "adamw", "scheduler": "cosine"}, "_train_step"),
    ({"optimizer": "adamw", "scheduler": "cosine", "schedule_per_batch": False}, "_train_step"),
    ({"optimizer": "adamw", "precision": "bf16"}, "_train_step"),
    ({"optimizer": "adamw", "precision": "fp16"}, "_compute_gradients"),
    ({"options": {"momentum": 0.9, "dampening": 0.1}}, "_compute_gradients"),
    ({"optimizer": "adamw", "scheduler": "onecycle"}, "_compute_gradients"),  # it moves beta1
    ({"optimizer": "timm:nadamw", "scheduler": "cosine"}, "_compute_gradients"),
]
"""Options of a loop, and what of its step is captured."""


def outcome(backend, chosen, *, use_cuda_graph, trainings=0):
    """The figures that two epochs of three steps give, and the weights, after a warm-up and so many trainings."""
    network = nn.Sequential(linear(classes=5), nn.Tanh(), linear(5, seed=1))
    train_loop = make_loop(
        network, backend=backend, steps=3, lr=0.05, **{"epochs": 2, "use_cuda_graph": use_cuda_graph} | chosen
    )
    splits = samples(10), samples(6, seed=1)
    beginning = copy.deepcopy(network.state_dict())
    for number in range(trainings):
        if number == 0:
            loop.warm_up(train_loop, *(list(batching.batches(split, 4, backend)) for split in splits))
        else:
            train(train_loop, *splits)
        assert not torch.equal(network[0].weight, beginning["0.weight"])
        network.load_state_dict(beginning)
        train_loop.restart()
        assert all(parameter.grad is None for parameter in network.parameters())
    return without_times(train(train_loop, *splits)), network.state_dict()


@pytest.mark.parametrize(("chosen", "captured"), WAYS)
def test_a_captured_step_does_what_an_eager_one_does(chosen, captured):
    expected, eager = outcome(Cpu(), chosen, use_cuda_graph=False)
    rows = []
    for trainings in (1, 3):
        backend = Capturing()
        figures, weights = outcome(backend, chosen, use_cuda_graph=True, trainings=trainings)
        assert backend.captured == [(captured, 4), (captured, 2), ("eval_step", 4), ("eval_step", 2)]
        assert backend.called.count(captured) == 3 + 6 * trainings
        for row, other in zip(figures, expected, strict=True):
            assert row == pytest.approx(other, rel=1e-5)
            assert row["train/lr"] == other["train/lr"]
        assert all(torch.allclose(value, eager[name], rtol=1e-4, atol=1e-6) for name, value in weights.items())
        rows.append(figures)
    assert rows[0] == rows[1]


@pytest.mark.parametrize("use_cuda_graph", [False, True])
def test_a_restart_puts_the_scale_back_where_a_captured_step_reads_it(use_cuda_graph):
    train_loop = make_loop(linear(), backend=Capturing(), precision="fp16", use_cuda_graph=use_cuda_graph)
    inputs, labels = next(batching.batches(samples(4), 4, Cpu()))
    train_loop.step(inputs * 1e9, labels)  # too much for fp16
    scale = train_loop.scaler._scale
    assert scale.item() == 2**15
    train_loop.restart()
    assert train_loop.scaler._scale is scale
    assert scale.item() == 2**16


def test_a_parameter_that_has_no_part_in_the_loss_keeps_its_value():
    network = linear()
    network.register_parameter("unused", nn.Parameter(torch.ones(2)))
    for options in ({"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.1}):  # captured whole or not
        train_loop = make_loop(
            network, backend=Capturing(), options=options | {"weight_decay": 0.1}, use_cuda_graph=True
        )
        loop.warm_up(train_loop, batching.batches(samples(8), 4, Cpu()), [])
        assert network.unused.tolist() == [1, 1]


# --- evaluation and features


@pytest.mark.parametrize("backend", [Cpu, Capturing])
def test_an_evaluation_drops_nothing_and_gives_predictions_in_order(backend):
    network, split, backend = nn.Sequential(linear(), nn.Dropout(0.9)), samples(23), backend()
    state = copy.deepcopy(network.state_dict())
    metrics = loop.RunningMetrics(torch.device("cpu"))
    eval_step = loop.make_eval_step(
        network.train(), loop.unchanged, backend, "fp32", metrics, use_cuda_graph=backend.supports_graphs
    )
    loop.evaluate(network, eval_step, metrics, batching.batches(split, 4, backend))
    predictions, progress = [], []
    means = loop.evaluate(
        network, eval_step, metrics, batching.batches(split, 4, backend), predictions, progress.append
    )
    assert progress == [4, 4, 4, 4, 4, 3]
    weight, bias = (parameter.double() for parameter in network.parameters())
    losses, right, *_ = softmax_by_hand(weight, bias, split.inputs.double(), split.labels)
    assert torch.equal(torch.cat(predictions), (split.inputs.double() @ weight.T + bias).argmax(1))
    assert means["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert means["accuracy"] == pytest.approx(right.double().mean().item(), abs=1e-12)
    assert len({prediction.data_ptr() for prediction in predictions}) == 6
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_features_are_float32_in_the_order_of_the_batches():
    split, layer, memory = samples(7), linear(classes=5), torch.empty(3, 5)
    order, progress = torch.tensor([3, 1, 0, 2, 6, 5, 4]), []

    def step(inputs):
        return memory[: len(inputs)].copy_(layer(inputs))  # overwritten by each batch, as a captured step does

    features = loop.compute_features(step, split, batching.batches(split, 3, Cpu(), order), progress.append)
    assert progress == [3, 3, 1]
    assert features.inputs.dtype == torch.float32 and not features.inputs.requires_grad
    assert torch.allclose(features.inputs, layer(split.inputs[order]).detach())
    assert torch.equal(features.labels, split.labels[order])
    assert features.inputs.untyped_storage().nbytes() == 7 * 5 * 4  # one tensor, nothing beside it


# --- the same numbers


def test_features_computed_once_give_the_figures_of_features_computed_every_epoch():
    once, every = train_resnet(cached=True), train_resnet(cached=False)
    assert len(once) == 3
    for row, other in zip(once, every, strict=True):
        assert row == pytest.approx(other, abs=1e-4)
    assert abs(once[0]["train/loss"] - once[2]["train/loss"]) > 1e-2  # it did learn


@pytest.mark.parametrize(
    ("overrides", "cached"), [((), True), (("frozen_batch_norm=train",), False), (("recipe=finetune",), False)]
)
def test_the_same_seed_gives_the_same_figures_bit_for_bit(overrides, cached):
    first = train_resnet(*overrides, cached=cached)
    assert first == train_resnet(*overrides, cached=cached)
    assert first != train_resnet(*overrides, cached=cached, seed=1)


@pytest.mark.parametrize(("overrides", "cached"), [((), True), (("recipe=finetune", "flip=true"), False)])
def test_samples_in_host_memory_give_the_same_figures_bit_for_bit(overrides, cached):
    backend = Away()
    figures = train_resnet(*overrides, cached=cached, backend=backend, on_device=False)
    assert figures == train_resnet(*overrides, cached=cached)
    assert len(backend.sent) == 3 * (3 + 2) + (5 if cached else 0)


@pytest.mark.parametrize("backend", [Cpu, Capturing])
def test_a_metric_that_is_added_is_a_mean_over_samples_of_both_splits(monkeypatch, backend):
    monkeypatch.setitem(loop.METRICS, "margin", lambda logits, labels: logits[:, 0] - logits[:, 1])
    split, backend = samples(10), backend()
    train_loop = make_loop(linear(), backend=backend, use_cuda_graph=backend.supports_graphs, lr=0.0)
    batches = lambda *_: batching.batches(split, 4, backend)  # noqa: E731
    loop.warm_up(train_loop, batches(), batches())
    (figures,) = loop.train(train_loop, batches, batches)
    with torch.no_grad():
        logits = train_loop.network(split.inputs)
    for name in ("train/margin", "val/margin"):
        assert figures[name] == pytest.approx((logits[:, 0] - logits[:, 1]).mean().item(), rel=1e-5)
    assert f"train margin {figures['train/margin']:.4g}" in terminal.epoch_line(1, 1, figures)
