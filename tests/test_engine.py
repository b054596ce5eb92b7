"""The loops: figures that can be recomputed by hand, a clock that waits, the same numbers by every path."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from standin import Queued, Standin, job_of
from torch import nn
from torch.optim.lr_scheduler import CyclicLR

from pipeline import config, data, engine, model
from pipeline.backends.cpu import Cpu
from pipeline.errors import StageError

CLASSES = 3


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """So little work is done fastest by one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def samples(count, features=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, features, generator=generator)
    return data.Split(inputs, torch.randint(CLASSES, (count,), generator=generator))


def linear(features=4, classes=CLASSES, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(features, classes)


def trained(job, train, val, batch_size=4, progress=engine._silent):
    """Figures of every epoch, with the samples in their own order."""
    return list(
        engine.train(
            job, lambda epoch: data.batches(train, batch_size), lambda: data.batches(val, batch_size), progress
        )
    )


def softmax_by_hand(weight, bias, inputs, labels):
    """Each sample's loss, whether it was answered right, and the mean loss's gradients."""
    logits = inputs @ weight.T + bias
    shares = logits.exp() / logits.exp().sum(1, keepdim=True)
    losses = -shares[torch.arange(len(labels)), labels].log()
    error = (shares - F.one_hot(labels, CLASSES)) / len(labels)
    return losses, logits.argmax(1) == labels, error.T @ inputs, error.sum(0)


# --- figures


def test_figures_are_sums_over_samples_though_the_last_batch_is_short():
    train, val, network = samples(9), samples(6, seed=1), linear()
    weight, bias = (parameter.detach().clone().double() for parameter in network.parameters())
    (figures,) = trained(job_of(network, lr=0.5, steps=3), train, val)

    losses, right, means = [], [], []
    for start in (0, 4, 8):
        inputs, labels = train.inputs[start : start + 4].double(), train.labels[start : start + 4]
        loss, correct, weight_slope, bias_slope = softmax_by_hand(weight, bias, inputs, labels)
        weight, bias = weight - 0.5 * weight_slope, bias - 0.5 * bias_slope
        losses += loss.tolist()
        right += correct.tolist()
        means.append(loss.mean().item())
    assert figures["train/loss"] == pytest.approx(sum(losses) / 9, rel=1e-5)
    assert figures["train/accuracy"] == sum(right) / 9
    assert figures["train/loss"] != pytest.approx(sum(means) / 3, rel=1e-3)

    loss, correct, *_ = softmax_by_hand(weight, bias, val.inputs.double(), val.labels)
    assert figures["val/loss"] == pytest.approx(loss.mean().item(), rel=1e-5)
    assert figures["val/accuracy"] == correct.double().mean().item()
    assert torch.allclose(network.weight, weight.float(), atol=1e-6)
    assert figures["epoch"] == 1


def test_figures_are_plain_numbers():
    figures = trained(job_of(linear(), epochs=2), samples(4), samples(4))
    assert [row["epoch"] for row in figures] == [1, 2]
    assert {type(value) for row in figures for value in row.values()} <= {int, float}
    assert set(figures[0]) >= {"time/train_seconds", "time/val_seconds", "speed/train_images_per_second"}


def test_train_batches_are_asked_for_by_epoch():
    asked = []

    def batches(epoch):
        asked.append(epoch)
        return data.batches(samples(4), 4)

    list(engine.train(job_of(linear(), epochs=3), batches, lambda: data.batches(samples(4), 4)))
    assert asked == [1, 2, 3]


def test_progress_hears_of_every_batch_in_training_and_validation():
    heard = []
    trained(job_of(linear(), steps=3), samples(9), samples(6), progress=heard.append)
    assert heard == [4, 4, 1, 4, 2]


def test_the_network_trains_in_its_own_mode_and_validates_in_eval():
    network = nn.Sequential(linear(), nn.Dropout(0.5))
    modes, prepared = [], []
    network.register_forward_hook(lambda *_: modes.append(network.training))

    def set_mode():
        prepared.append(len(modes))
        network.train()

    trained(job_of(network, epochs=2, set_mode=set_mode), samples(8), samples(4))
    assert modes == [True, True, False] * 2
    assert prepared == [0, 3]


@pytest.mark.parametrize(("bad", "said"), [(math.nan, "nan"), (math.inf, "nan|inf")])
def test_a_loss_that_is_no_number_ends_the_training(bad, said):
    broken = samples(4)
    broken.inputs[0, 0] = bad
    job = job_of(linear(), epochs=3)
    good = samples(8)
    epochs = engine.train(
        job, lambda epoch: data.batches(broken if epoch == 2 else good, 4), lambda: data.batches(good, 4)
    )
    assert next(epochs)["epoch"] == 1
    with pytest.raises(engine.NonFiniteLossError, match=rf"^the training loss is ({said}) in epoch 2: lower lr"):
        next(epochs)
    assert issubclass(engine.NonFiniteLossError, StageError)


def test_a_validation_loss_that_is_no_number_ends_the_training():
    broken = samples(4)
    broken.inputs[3, 1] = math.nan
    with pytest.raises(engine.NonFiniteLossError, match=r"^the validation loss is nan in epoch 1: "):
        trained(job_of(linear()), samples(4), broken)


# --- learning rates


@pytest.mark.parametrize("per_batch", [True, False])
def test_the_rate_is_that_of_the_epochs_last_step(per_batch):
    job = job_of(linear(), lr=0.4, scheduler="cosine", epochs=3, steps=2, per_batch=per_batch)
    used = []
    job.optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    figures = trained(job, samples(8), samples(4))
    moves = [1, 3, 5] if per_batch else [0, 1, 2]
    expected = [0.2 * (1 + math.cos(math.pi * move / (6 if per_batch else 3))) for move in moves]
    assert [row["train/lr"] for row in figures] == pytest.approx(expected, rel=1e-9)
    assert [row["train/lr"] for row in figures] == used[1::2]
    assert not any("train/lr_applied" in row for row in figures)


def test_the_blogs_rates_are_shown_as_scheduled_and_as_applied():
    train = samples(49 * 2)
    job = job_of(
        linear(),
        optimizer="ranger21",
        options={"weight_decay": 0.0, "num_warm_up_iterations": 0},
        lr=0.1,
        scheduler="cyclic",
        scheduler_options={"base_lr": 1e-5, "max_lr": 0.1},
        epochs=10,
        steps=49,
        per_batch=False,
    )
    figures = trained(job, train, samples(4), batch_size=2)

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


def test_the_clock_is_never_read_before_the_device_is_waited_for():
    backend = Standin(peaks=[1.0, 2.0])
    job = job_of(Queued(linear(), backend, 1.0), backend=backend, epochs=2)
    trained(job, samples(8), samples(4))
    assert backend.calls.count("now") == 8  # an epoch: training and validation, each from and to
    for index, call in enumerate(backend.calls):
        if call == "now":
            assert backend.calls[index - 1] == "synchronise"


def test_queued_work_is_billed_to_training_or_validation_and_nothing_else_is():
    backend = Standin()
    job = job_of(Queued(linear(), backend, 0.25), backend=backend, epochs=2)
    rows = []
    for figures in engine.train(job, lambda epoch: data.batches(samples(12), 4), lambda: data.batches(samples(7), 4)):
        rows.append((figures["time/train_seconds"], figures["time/val_seconds"]))
        assert figures["speed/train_images_per_second"] == 12 / 0.75
        backend.queue(1000)  # the caller's checkpoint
    assert rows == [(0.75, 0.5), (0.75, 0.5)]
    assert job.clock.seconds == {"train": 1.5, "validate": 1.0}


def test_the_peak_is_an_epochs_own_taken_after_its_work_is_done():
    backend = Standin(peaks=[12.5, 3.0])
    job = job_of(Queued(linear(), backend, 1.0), backend=backend, epochs=2)
    figures = trained(job, samples(4), samples(4))
    assert [row["memory/peak_mib"] for row in figures] == [12.5, 3.0]
    epoch = ["reset", *["synchronise", "now"] * 4, "peak"]
    assert backend.calls == epoch * 2


def test_figures_that_cannot_be_had_are_absent():
    backend = Standin()
    job = job_of(Queued(linear(), backend, 1.0), backend=backend, on_features=True)
    (figures,) = trained(job, samples(4), samples(4))
    assert "memory/peak_mib" not in figures  # the backend does not tell
    assert "speed/train_images_per_second" not in figures  # no image passed the network
    assert figures["time/train_seconds"] == 1.0


def test_warm_up_takes_real_steps_then_waits_and_never_reads_the_clock():
    backend = Standin()
    network = linear()
    before = network.weight.detach().clone()
    job = job_of(Queued(network, backend, 1.0), backend=backend)
    batches = list(data.batches(samples(5), 4))
    engine.warm_up(job, batches, batches[1:])
    assert backend.calls == ["synchronise"]
    assert backend.time == 103.0  # two batches to train on, the last one to validate
    assert not torch.equal(network.weight, before)
    assert job.clock.seconds == {}


# --- evaluation and features


def test_evaluate_drops_nothing_and_gives_predictions_in_order():
    network = nn.Sequential(linear(), nn.Dropout(0.9))
    split = samples(11)
    state = copy.deepcopy(network.state_dict())
    predictions, heard = [], []
    loss, accuracy = engine.evaluate(network.train(), data.batches(split, 4), Cpu(), "fp32", predictions, heard.append)
    assert heard == [4, 4, 3]
    weight, bias = (parameter.double() for parameter in network.parameters())
    losses, right, *_ = softmax_by_hand(weight, bias, split.inputs.double(), split.labels)
    answers = (split.inputs.double() @ weight.T + bias).argmax(1)
    assert torch.equal(torch.cat(predictions), answers)
    assert loss == pytest.approx(losses.mean().item(), rel=1e-5)
    assert accuracy == right.double().mean().item() == (answers == split.labels).double().mean().item()
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_features_are_float32_in_the_order_of_the_samples():
    split, layer = samples(7), linear(classes=5)
    found = engine.compute_features(layer, data.batches(split, 3), Cpu(), "bf16")
    assert found.inputs.dtype == torch.float32
    assert not found.inputs.requires_grad
    exact = layer(split.inputs).detach()
    assert torch.allclose(found.inputs, exact, atol=0.05)
    assert not torch.equal(found.inputs, exact)  # bfloat16 has 8 bits of them
    assert torch.equal(found.labels, split.labels)


def test_bf16_is_for_the_network_alone():
    network = linear()
    seen = []
    network.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    job = job_of(network, precision="bf16")
    loss, logits = engine.step(job, *next(data.batches(samples(4), 4)))
    assert (loss.dtype, network.weight.dtype, network.weight.grad.dtype) == (torch.float32,) * 3
    engine.evaluate(network, data.batches(samples(4), 4), Cpu(), "bf16")
    assert seen == [torch.bfloat16, torch.bfloat16] == [logits.dtype] * 2


# --- the same numbers


def pictures(count, seed):
    """Coloured noise with the colour for a label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    noise = torch.randint(0, 200, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    noise[torch.arange(count), labels] += 55
    return data.Split(noise, labels)


def figures_of(*overrides, cached, seed=0):
    """Three epochs of a tiny ResNet's, with its features computed once or in every epoch."""
    recipe = config.load(["model=test_resnet.r160_in1k", "weights=random", "image_size=32", *overrides]).work
    torch.manual_seed(seed)
    net = model.build(recipe, CLASSES, None)
    train, val = pictures(22, 1), pictures(10, 2)

    def ready(batches):
        return ((data.prepare(images, 32), labels) for images, labels in batches)

    if cached:
        net.eval()
        train, val = (
            engine.compute_features(net.features, ready(data.batches(split, 8)), Cpu(), "fp32")
            for split in (train, val)
        )
    passed = (lambda batches: batches) if cached else ready
    job = job_of(
        net.head if cached else net,
        set_mode=lambda: model.set_mode(net, recipe.frozen_batch_norm),
        optimizer="adamw",
        lr=0.05 if recipe.trainable == "head" else 0.001,
        scheduler="cosine",
        epochs=3,
        steps=3,
        on_features=cached,
    )
    rows = engine.train(
        job,
        lambda epoch: passed(data.shuffled(train, 8, seed, epoch, flip=recipe.flip)),
        lambda: passed(data.batches(val, 8)),
    )
    kept = ("epoch", "train/loss", "train/accuracy", "val/loss", "val/accuracy", "train/lr")
    return [{key: row[key] for key in kept} for row in rows]


def test_features_computed_once_give_the_figures_of_features_computed_every_epoch():
    once, every = figures_of(cached=True), figures_of(cached=False)
    assert len(once) == 3
    for row, other in zip(once, every, strict=True):
        assert row == pytest.approx(other, abs=1e-4)
    assert abs(once[0]["train/loss"] - once[2]["train/loss"]) > 1e-2  # it did learn


@pytest.mark.parametrize(
    ("overrides", "cached"), [((), True), (("frozen_batch_norm=train",), False), (("recipe=finetune",), False)]
)
def test_the_same_seed_gives_the_same_figures_bit_for_bit(overrides, cached):
    first = figures_of(*overrides, cached=cached)
    assert first == figures_of(*overrides, cached=cached)
    assert first != figures_of(*overrides, cached=cached, seed=1)


def test_a_scaled_loss_gives_the_same_step():
    """fp16's way: the gradients are scaled up and down again, by powers of 2."""
    weights = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10)):
        job = dataclasses.replace(job_of(linear()), scaler=scaler)
        (inputs, labels), *_ = data.batches(samples(8), 8)
        loss, _ = engine.step(job, inputs, labels)
        weights.append(job.network.weight.detach().clone())
        assert loss.item() == pytest.approx(F.cross_entropy(linear()(inputs), labels).item())
    assert torch.allclose(*weights, atol=1e-7)
    assert not torch.allclose(weights[0], linear().weight)
