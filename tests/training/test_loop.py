"""The loops: figures that can be recomputed by hand, a clock that waits, the same numbers by every path."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from standin import Away, Marked, Queued, Recording, Standin, job_of
from torch import nn
from torch.optim.lr_scheduler import CyclicLR

from pipeline import config
from pipeline.data import batching
from pipeline.devices.cpu import Cpu
from pipeline.errors import StageError
from pipeline.models import classifier
from pipeline.training import loop

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
    return batching.Split(inputs, torch.randint(CLASSES, (count,), generator=generator))


def linear(features=4, classes=CLASSES, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(features, classes)


def trained(job, train, val, batch_size=4, progress=loop.silent):
    """Figures of every epoch, with the samples in their own order."""
    return list(
        loop.train(
            job,
            lambda epoch: batching.batches(train, batch_size, job.backend),
            lambda: batching.batches(val, batch_size, job.backend),
            progress,
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
        return batching.batches(samples(4), 4, Cpu())

    list(loop.train(job_of(linear(), epochs=3), batches, lambda: batching.batches(samples(4), 4, Cpu())))
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
    epochs = loop.train(
        job,
        lambda epoch: batching.batches(broken if epoch == 2 else good, 4, Cpu()),
        lambda: batching.batches(good, 4, Cpu()),
    )
    assert next(epochs)["epoch"] == 1
    with pytest.raises(loop.NonFiniteLossError, match=rf"^the training loss is ({said}) in epoch 2: lower lr"):
        next(epochs)
    assert issubclass(loop.NonFiniteLossError, StageError)


def test_a_validation_loss_that_is_no_number_ends_the_training():
    broken = samples(4)
    broken.inputs[3, 1] = math.nan
    with pytest.raises(loop.NonFiniteLossError, match=r"^the validation loss is nan in epoch 1: "):
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
            assert backend.calls[index - 1] == "synchronize"


def test_queued_work_is_billed_to_training_or_validation_and_nothing_else_is():
    backend = Standin()
    job = job_of(Queued(linear(), backend, 0.25), backend=backend, epochs=2)
    rows = []
    epochs = loop.train(
        job, lambda epoch: batching.batches(samples(12), 4, backend), lambda: batching.batches(samples(7), 4, backend)
    )
    for figures in epochs:
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
    epoch = ["reset", *["synchronize", "now"] * 4, "peak"]
    assert backend.calls == epoch * 2


def test_figures_that_cannot_be_had_are_absent():
    backend = Standin()
    job = job_of(Queued(linear(), backend, 1.0), backend=backend, on_features=True)
    (figures,) = trained(job, samples(4), samples(4))
    assert not [name for name in figures if name.startswith("memory/")]  # the backend does not tell
    assert "speed/train_images_per_second" not in figures  # no image passed the network
    assert figures["time/train_seconds"] == 1.0


def test_all_that_a_backend_tells_of_its_memory_is_shown():
    backend = Standin()
    backend.memory_mib = lambda: {"peak": 3.0, "peak_reserved": 4.5, "driver": 6.0}
    (figures,) = trained(job_of(Queued(linear(), backend, 1.0), backend=backend), samples(4), samples(4))
    assert {name: value for name, value in figures.items() if name.startswith("memory/")} == {
        "memory/peak_mib": 3.0,
        "memory/peak_reserved_mib": 4.5,
        "memory/driver_mib": 6.0,
    }


@pytest.mark.parametrize(("peaks", "capacity", "share"), [([12.5], 50.0, 0.25), ([12.5], None, None), ([], 50.0, None)])
def test_the_peaks_share_needs_a_peak_and_a_capacity(peaks, capacity, share):
    backend = Standin(peaks=peaks)
    backend.capacity_mib = lambda: capacity
    (figures,) = trained(job_of(Queued(linear(), backend, 1.0), backend=backend), samples(4), samples(4))
    assert figures.get("memory/peak_share") == share


def test_steps_are_timed_in_training_alone():
    backend = Marked()
    job = job_of(Queued(linear(), backend, 0.25), backend=backend, epochs=2)
    batches = list(batching.batches(samples(4 * 4), 4, backend))
    loop.warm_up(job, batches, batches)
    assert backend.calls.count("mark") == 1  # whether there are marks
    trained(job, samples(9 * 4), samples(16))
    assert job.times.seconds == [0.25] * 4  # the fourth and the eighth of nine, then the 12th and the 16th
    job = job_of(linear(), epochs=2)
    trained(job, samples(12), samples(8))
    assert len(job.times.seconds) == 2 * 3


def test_warm_up_takes_real_steps_then_waits_and_never_reads_the_clock():
    backend = Standin()
    network = linear()
    before = network.weight.detach().clone()
    job = job_of(Queued(network, backend, 1.0), backend=backend)
    batches = list(batching.batches(samples(5), 4, backend))
    loop.warm_up(job, batches, batches[1:])
    assert backend.calls == ["synchronize"]
    assert backend.time == 103.0  # two batches to train on, the last one to validate
    assert not torch.equal(network.weight, before)
    assert job.clock.seconds == {}


# --- a step


def test_a_step_adds_to_the_totals_and_an_epoch_starts_them_anew():
    network, split = linear(), samples(9)
    weight, bias = (parameter.detach().clone().double() for parameter in network.parameters())
    job = job_of(network, lr=0.5)
    memory = [total.data_ptr() for total in (job.totals._loss, job.totals._correct)]
    losses, right = [], []
    for inputs, labels in batching.batches(split, 4, Cpu()):
        loss, correct, weight_slope, bias_slope = softmax_by_hand(weight, bias, inputs.double(), labels)
        weight, bias = weight - 0.5 * weight_slope, bias - 0.5 * bias_slope
        losses += loss.tolist()
        right += correct.tolist()
        job.step(inputs, labels)
        found = job.totals.read(len(losses))
        assert found == (pytest.approx(sum(losses) / len(losses), rel=1e-5), sum(right) / len(right))
    job.totals.reset()
    assert job.totals.read(9) == (0, 0)
    # Where a recorded step adds to them.
    assert memory == [total.data_ptr() for total in (job.totals._loss, job.totals._correct)]


def test_what_is_ready_goes_to_the_network_in_training_and_validation():
    seen = []
    network = linear()
    network.register_forward_hook(lambda module, inputs, _: seen.append(inputs[0]))
    split = batching.Split(torch.arange(16, dtype=torch.uint8).view(4, 4), torch.tensor([0, 1, 2, 0]))
    trained(job_of(network, ready=lambda inputs: inputs.float() / 16), split, split)
    assert len(seen) == 2
    assert all(torch.equal(inputs, torch.arange(16.0).view(4, 4) / 16) for inputs in seen)


def test_bf16_is_for_the_network_alone():
    network = linear()
    seen, losses = [], []
    network.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    job = job_of(network, precision="bf16")
    add = job.totals.add
    job.totals.add = lambda loss, logits, labels: losses.append(loss.dtype) or add(loss, logits, labels)
    trained(job, samples(4), samples(4))
    assert seen == [torch.bfloat16] * 2
    assert [*losses, network.weight.dtype, network.weight.grad.dtype] == [torch.float32] * 4


def test_a_scaled_loss_gives_the_same_step():
    """fp16's way: the gradients are scaled up and down again, by powers of 2."""
    weights, losses = [], []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10)):
        job = job_of(linear())
        job.scaler = scaler
        job.step(*next(batching.batches(samples(8), 8, Cpu())))
        weights.append(job.network.weight.detach().clone())
        losses.append(job.totals.read(8))
    assert losses[0] == losses[1]
    assert torch.allclose(*weights, atol=1e-7)
    assert not torch.allclose(weights[0], linear().weight)


def test_only_fp16_is_scaled():
    assert [job_of(linear(), precision=name).scaler is not None for name in ("fp32", "bf16", "fp16")] == [
        False,
        False,
        True,
    ]


# --- back to the beginning, and recorded steps

WAYS = [
    ({"options": {"momentum": 0.9, "nesterov": True}}, "_whole_steps"),
    ({"optimizer": "adamw", "scheduler": "cosine"}, "_whole_steps"),
    ({"optimizer": "adamw", "precision": "bf16"}, "_whole_steps"),
    ({"optimizer": "adamw", "precision": "fp16"}, "_gradients"),
    ({"options": {"momentum": 0.9, "dampening": 0.1}}, "_gradients"),
    ({"optimizer": "adamw", "scheduler": "onecycle"}, "_gradients"),  # it moves beta1
    ({"optimizer": "ranger21", "options": {"num_warm_up_iterations": 0}}, "_gradients"),
]
"""What a job is made of, and what of its step can be recorded."""

never_warmed = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
"""Where the first step is a recorded one that no plain one came before."""


def outcome(backend, chosen, *, recorded, warm):
    """The figures that two epochs of three steps give, and the weights, with steps taken and taken back before."""
    network = nn.Sequential(linear(classes=5), nn.Tanh(), linear(5, seed=1))
    job = job_of(network, backend=backend, epochs=2, steps=3, lr=0.05, recorded=recorded, **chosen)
    train, val = samples(10), samples(6, seed=1)
    beginning = copy.deepcopy(network.state_dict())
    if warm:
        batches = [list(batching.batches(split, 4, backend)) for split in (train, val)]
        loop.warm_up(job, *batches)
        assert not torch.equal(network[0].weight, beginning["0.weight"])
        network.load_state_dict(beginning)
        job.restart()
        assert all(parameter.grad is None for parameter in network.parameters())
    rows = trained(job, train, val)
    figures = [value for row in rows for name, value in row.items() if name.startswith(("train/", "val/"))]
    return figures, network.state_dict()


@never_warmed
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize(("chosen", "what"), WAYS)
def test_after_a_restart_nothing_is_left_of_the_warm_up(chosen, what, recorded):
    figures, weights = outcome(Recording(), chosen, recorded=recorded, warm=True)
    # Nothing is called to record it here: the first step is the training's own.
    expected, fresh = outcome(Recording(warm_ups=0), chosen, recorded=recorded, warm=False)
    assert figures == expected
    assert all(torch.equal(value, fresh[name]) for name, value in weights.items())


@pytest.mark.parametrize(("chosen", "what"), WAYS)
def test_after_a_restart_a_whole_training_is_the_same_again(chosen, what):
    network = nn.Sequential(linear(classes=5), nn.Tanh(), linear(5, seed=1))
    job = job_of(network, backend=Recording(), epochs=2, steps=3, lr=0.05, recorded=True, **chosen)
    beginning = copy.deepcopy(network.state_dict())
    loop.warm_up(job, *(list(batching.batches(split, 4, job.backend)) for split in (samples(10), samples(6, seed=1))))
    found = []
    for _ in range(3):
        network.load_state_dict(beginning)
        job.restart()
        rows = trained(job, samples(10), samples(6, seed=1))
        found.append([{key: row[key] for key in row if key.startswith(("train/", "val/"))} for row in rows])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(("chosen", "what"), WAYS)
def test_a_recorded_step_does_what_an_unrecorded_one_does(chosen, what):
    backend = Recording()
    figures, weights = outcome(backend, chosen, recorded=True, warm=True)
    assert backend.recorder.recorded == [(what, 4), (what, 2), ("score", 4), ("score", 2)]  # once for each size
    assert [name for name in backend.recorder.replayed if name != "score"] == [what] * 9
    expected, plain = outcome(Cpu(), chosen, recorded=False, warm=False)
    assert figures == pytest.approx(expected, rel=1e-6)
    assert all(torch.allclose(value, plain[name], rtol=1e-5, atol=1e-7) for name, value in weights.items())
    backend = Recording()
    outcome(backend, chosen, recorded=False, warm=True)
    assert backend.recorder.recorded == []


def test_a_recorded_step_reads_the_schedules_rate_where_it_was_recorded():
    backend = Recording()
    chosen = {"optimizer": "adamw", "lr": 0.1, "scheduler": "cosine", "epochs": 2, "steps": 3, "recorded": True}
    job = job_of(linear(), backend=backend, **chosen)
    split = samples(12)
    loop.warm_up(job, batching.batches(split, 4, backend), [])
    job.restart()
    used = []

    def note(optimizer, *_):
        (rate,) = [group["lr"] for group in optimizer.param_groups]
        used.append((rate.data_ptr(), rate.item()))

    job.optimizer.register_step_pre_hook(note)
    rows = trained(job, split, split)
    expected = [0.05 * (1 + math.cos(math.pi * move / 6)) for move in range(6)]
    assert [rate for _, rate in used] == pytest.approx(expected, rel=1e-6)
    assert {memory for memory, _ in used} == {job._rates[0][0].data_ptr()}
    assert [row["train/lr"] for row in rows] == pytest.approx([expected[2], expected[5]], rel=1e-12)


@pytest.mark.parametrize("per_batch", [True, False])
def test_eight_steps_of_a_head_that_are_recorded_as_one_are_those_taken_one_by_one(per_batch):
    chosen = {"optimizer": "adamw", "lr": 0.1, "scheduler": "cosine", "epochs": 2, "steps": 10, "batch_size": 4}
    outcomes, train, val = [], samples(4 * 9 + 2), samples(6, seed=1)
    for backend in (Cpu(), Recording()):
        network, alone = linear(), isinstance(backend, Recording)
        job = job_of(network, backend=backend, recorded=alone, on_features=True, per_batch=per_batch, **chosen)
        assert job.at_once == (8 * 4 if alone else 4)
        if alone:
            loop.warm_up(job, *(batching.batches(split, job.at_once, backend) for split in (train, val)))
            network.load_state_dict(linear().state_dict())
            job.restart()
            del backend.recorder.replayed[:]
        rows = trained(job, train, val, batch_size=job.at_once)
        outcomes.append([value for row in rows for key, value in row.items() if key.startswith(("train/", "val/"))])
        outcomes[-1] += network.weight.flatten().tolist()
    assert outcomes[1] == pytest.approx(outcomes[0], rel=1e-5, abs=1e-6)
    assert backend.recorder.recorded[:2] == [("_whole_steps", 32), ("_whole_steps", 6)]
    assert [name for name in backend.recorder.replayed if name != "score"] == ["_whole_steps"] * 4


def test_no_step_is_dropped_where_more_come_than_are_taken_at_once():
    job = job_of(linear(), backend=Recording(), recorded=True, batch_size=4)  # of a whole network: one at a time
    assert job.at_once == 4
    with pytest.raises(IndexError):
        job.step(*next(batching.batches(samples(5), 5, job.backend)))


def test_of_steps_recorded_as_one_their_mean_is_timed():
    backend = Marked()
    backend.captured, backend.optimizer_options = Recording().captured, Recording.optimizer_options
    job = job_of(Queued(linear(), backend, 0.25), backend=backend, on_features=True, batch_size=4, recorded=True)
    train, val = samples(3 * 32 + 8), samples(4)
    loop.warm_up(job, batching.batches(train, job.at_once, backend), batching.batches(val, 4, backend))
    job.restart()
    trained(job, train, val, batch_size=job.at_once)
    assert job.times.seconds == [0.25]  # of the fourth stretch, which has two steps


@pytest.mark.parametrize("recorded", [False, True])
def test_a_restart_puts_the_scale_back_where_a_recorded_step_reads_it(recorded):
    job = job_of(linear(), backend=Recording(), precision="fp16", recorded=recorded)
    inputs, labels = next(batching.batches(samples(4), 4, Cpu()))
    job.step(inputs * 1e9, labels)  # too much for fp16
    scale = job.scaler._scale
    assert scale.item() == 2**15
    job.restart()
    assert job.scaler._scale is scale
    assert scale.item() == 2**16


def test_a_parameter_that_has_no_part_in_the_loss_keeps_its_value():
    network = linear()
    network.register_parameter("unused", nn.Parameter(torch.ones(2)))
    backend = Recording()
    for options in ({"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.1}):  # recorded whole or not
        job = job_of(network, backend=backend, options=options, recorded=True)
        loop.warm_up(job, batching.batches(samples(8), 4, backend), [])
        assert network.unused.tolist() == [1, 1]


# --- evaluation and features


def test_evaluate_drops_nothing_and_gives_predictions_in_order():
    network = nn.Sequential(linear(), nn.Dropout(0.9))
    split = samples(11)
    state = copy.deepcopy(network.state_dict())
    predictions, heard = [], []
    totals = loop.RunningMetrics(torch.device("cpu"))
    score = loop.make_eval_step(network.train(), lambda inputs: inputs, Cpu(), "fp32", totals)
    for _ in range(2):  # the second time says nothing of the first
        predictions.clear()
        loss, accuracy = loop.evaluate(
            network, score, totals, batching.batches(split, 4, Cpu()), predictions, heard.append
        )
    assert heard == [4, 4, 3] * 2
    weight, bias = (parameter.double() for parameter in network.parameters())
    losses, right, *_ = softmax_by_hand(weight, bias, split.inputs.double(), split.labels)
    answers = (split.inputs.double() @ weight.T + bias).argmax(1)
    assert torch.equal(torch.cat(predictions), answers)
    assert loss == pytest.approx(losses.mean().item(), rel=1e-5)
    assert accuracy == right.double().mean().item() == (answers == split.labels).double().mean().item()
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_predictions_outlive_the_memory_that_a_recorded_scorer_writes_them_to():
    network, split, backend = linear(), samples(23), Recording()
    totals = loop.RunningMetrics(backend.device)
    score = loop.make_eval_step(network, lambda inputs: inputs, backend, "fp32", totals, recorded=True)
    loop.evaluate(network, score, totals, batching.batches(split, 4, backend))  # recorded
    predictions = []
    loss, _ = loop.evaluate(network, score, totals, batching.batches(split, 4, backend), predictions)
    assert backend.recorder.recorded == [("score", 4), ("score", 3)]
    assert torch.equal(torch.cat(predictions), network(split.inputs).argmax(1))
    assert loss == pytest.approx(F.cross_entropy(network(split.inputs), split.labels).item(), rel=1e-5)
    assert len({prediction.data_ptr() for prediction in predictions}) == 6


def test_features_are_float32_in_the_order_of_the_samples():
    split, layer = samples(7), linear(classes=5)
    order = torch.tensor([3, 1, 0, 2, 6, 5, 4])
    heard = []
    found = loop.compute_features(
        lambda inputs: layer(inputs).bfloat16(), split, batching.batches(split, 3, Cpu(), order), heard.append
    )
    assert heard == [3, 3, 1]
    assert found.inputs.dtype == torch.float32
    assert not found.inputs.requires_grad
    assert torch.equal(found.inputs, layer(split.inputs[order]).detach().bfloat16().float())
    assert torch.equal(found.labels, split.labels[order])


def test_features_are_copied_from_memory_that_is_written_anew_for_each_batch():
    split, memory = samples(10), torch.empty(4, 2)

    def features(inputs):
        return memory[: len(inputs)].copy_(inputs[:, :2])

    found = loop.compute_features(features, split, batching.batches(split, 4, Cpu()))
    assert torch.equal(found.inputs, split.inputs[:, :2])
    assert found.inputs.untyped_storage().nbytes() == 10 * 2 * 4  # one tensor, nothing beside it


def test_features_lie_where_the_samples_do():
    """As for samples in host memory, whose batches are computed on the device."""
    split = samples(6)
    found = loop.compute_features(
        lambda inputs: inputs, split.to(torch.device("meta")), batching.batches(split, 4, Cpu())
    )
    assert (found.inputs.device.type, found.labels.device.type) == ("meta", "meta")
    assert (found.inputs.shape, found.labels.dtype) == ((6, 4), torch.int64)


# --- the same numbers


def pictures(count, seed):
    """Coloured noise with the colour for a label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    noise = torch.randint(0, 200, (count, 32, 32, 3), generator=generator, dtype=torch.uint8)
    noise[torch.arange(count), :, :, labels] += 55
    return batching.Split(noise, labels)


def figures_of(*overrides, cached, seed=0, backend=None, recorded=False, on_device=True, batch_size=8):
    """Three epochs of a tiny ResNet's, with its features computed once or in every epoch, from samples on the device
    or in host memory."""
    backend = backend or Cpu()
    recipe = config.load(["model=test_resnet.r160_in1k", "weights=random", "image_size=32", *overrides]).work
    backend.set_precision(recipe.precision)
    torch.manual_seed(seed)
    net = classifier.build(recipe, CLASSES, None).to(backend.device)
    beginning = copy.deepcopy(net.state_dict())
    splits = [pictures(22, 1), pictures(10, 2)]
    if on_device:
        splits = [split.to(backend.device) for split in splits]

    def ready(images):
        return batching.prepare(images, 32)

    if cached:
        net.eval()
        splits = [
            loop.compute_features(
                lambda images: net.features(ready(images)), split, batching.batches(split, 8, backend)
            )
            for split in splits
        ]
    train, val = splits
    job = job_of(
        net.head if cached else net,
        backend=backend,
        ready=(lambda inputs: inputs) if cached else ready,
        set_mode=lambda: classifier.set_train_mode(net, recipe.frozen_batch_norm),
        optimizer="adamw",
        lr=0.05 if recipe.trainable == "head" else 0.001,
        scheduler="cosine",
        epochs=3,
        steps=math.ceil(22 / batch_size),
        batch_size=batch_size,
        precision=recipe.precision,
        on_features=cached,
        recorded=recorded,
    )
    if recorded:
        loop.warm_up(job, batching.batches(train, job.at_once, backend), batching.batches(val, batch_size, backend))
        net.load_state_dict(beginning)
        job.restart()
    rows = loop.train(
        job,
        lambda epoch: batching.shuffled_batches(train, job.at_once, backend, seed, epoch, flip=recipe.flip),
        lambda: batching.batches(val, batch_size, backend),
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


@pytest.mark.parametrize(("overrides", "cached"), [((), True), (("recipe=finetune", "flip=true"), False)])
def test_samples_in_host_memory_give_the_same_figures_bit_for_bit(overrides, cached):
    backend = Away()
    found = figures_of(*overrides, cached=cached, backend=backend, on_device=False)
    assert found == figures_of(*overrides, cached=cached)
    assert len(backend.sent) == 3 * (3 + 2) + (5 if cached else 0)
