"""A training that was interrupted goes on to the bit, or is not resumed at all; a damaged state is never used."""

import errno
import pickle
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from loops import images_of, make_loop, make_setup, recipe_of, samples, without_times
from standin import Capturing, Standin
from torch import nn

from pipeline.data import batching
from pipeline.devices.cpu import Cpu
from pipeline.errors import StageError, UsageError
from pipeline.training import loop, optimizers, setup, state

pytestmark = pytest.mark.usefixtures("one_thread")

EPOCHS = 6


def new_training(*, backend=None, **options):
    """A small network with dropout and BatchNorm, and its loop, as a new process builds them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 3))
    options = {"optimizer": "adamw", "lr": 0.01, "epochs": EPOCHS, "steps": 3} | options
    train_loop = make_loop(net, backend=backend, **options)
    return SimpleNamespace(net=net, loop=train_loop, recipe=SimpleNamespace(optimizer=options["optimizer"]))


def small_epochs(training, first):
    backend = training.loop.backend
    return loop.train(
        training.loop,
        lambda epoch: batching.shuffled_batches(samples(12), 5, backend, 0, epoch),
        lambda: batching.batches(samples(6, seed=1), 5, backend),
        first_epoch=first,
    )


def trained(training, epochs, folder, until=EPOCHS, record=None):
    """Train until an epoch, saving the state after each. Returns the record."""
    record = record or {"epochs": []}
    for figures in epochs(training, len(record["epochs"]) + 1):
        record["epochs"].append({"figures": figures})
        state.save(folder, training, record)
        if len(record["epochs"]) == until:
            break
    return record


def resumed(training, folder):
    """Set a new training to the newest state. Returns its record. Random numbers were drawn in between."""
    torch.manual_seed(77)
    np.random.seed(77)
    saved = state.load_newest(folder)
    state.restore(training, saved)
    return saved["record"]


def outcome(training, record):
    """All that must not depend on an interruption."""
    optimizer = training.loop.optimizer
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    tensors = {name: tensor.detach().clone() for name, tensor in training.net.state_dict().items()}
    figures = without_times(epoch["figures"] for epoch in record["epochs"])
    random = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()
    return figures, tensors, groups, training.loop.scaler.state_dict(), random


def same(one, other):
    tensors = [outcome[1] for outcome in (one, other)]
    equal = all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    return equal and [part for part in one if part is not one[1]] == [part for part in other if part is not other[1]]


def compare(build, epochs, folder):
    """Train unbroken, and with two interruptions. Returns both outcomes."""

    def begun():
        training = build()
        torch.manual_seed(1)
        np.random.seed(1)
        return training

    training = begun()
    unbroken = outcome(training, trained(training, epochs, folder / "unbroken"))
    trained(begun(), epochs, folder / "resumed", until=1)
    for until in (3, EPOCHS):
        training = build()
        record = resumed(training, folder / "resumed")
        trained(training, epochs, folder / "resumed", until, record)
    return unbroken, outcome(training, record)


# --- to the bit

OPTIMIZERS = [
    "sgd", "adam", "adamw", "rmsprop", "ranger21", "ranger", "radam", "nadam", "timm:lamb", "timm:nadamw", "lion",
    "adabelief", "adafactor", "pytorch_optimizer:kron", "pytorch_optimizer:adafactor", "timm:muon",
    "pytorch_optimizer:madgrad", "pytorch_optimizer:scion", "prodigy", "soap",
]  # fmt: skip
"""Those of params.yaml, and those that keep unlike states: in Python, in bfloat16, by name, drawn from numpy."""
WAYS = [
    {"options": {"momentum": 0.9, "nesterov": True}, "optimizer": "sgd", "scheduler": "cyclic"},
    {"optimizer": "ranger21", "scheduler": "cyclic", "schedule_per_batch": False},
    {"scheduler": "onecycle"},
    {"scheduler": "onecycle", "optimizer": "sgd", "options": {"momentum": 0.9}},  # it moves the momentum
    {"scheduler": "cosine", "schedule_per_batch": False},
    {"scheduler": "cosine", "precision": "bf16"},
    {"scheduler": "constant", "precision": "fp16"},
    {"options": {"foreach": True}},
    {"options": {"amsgrad": True, "weight_decay": 0.1}, "backend": Capturing},  # CUDA's options, eager
]


@pytest.mark.parametrize(
    "options", [*WAYS, *({"optimizer": name, "scheduler": "cosine"} for name in OPTIMIZERS)], ids=str
)
def test_a_training_that_was_interrupted_goes_on_to_the_bit(options, tmp_path):
    backend = options.get("backend", Cpu)
    unbroken, again = compare(lambda: new_training(**options | {"backend": backend()}), small_epochs, tmp_path)
    assert same(unbroken, again) and len(unbroken[0]) == EPOCHS
    assert unbroken[0][1] != unbroken[0][2]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("package", optimizers.PACKAGES)
def test_every_optimizer_goes_on_to_the_bit_or_has_no_state(package, tmp_path):
    exact = []
    for name in set(optimizers._names(package)) - {"kron" * (package == "timm")}:  # which takes a minute to compile
        folder, build = tmp_path / name, partial(new_training, optimizer=f"{package}:{name}")
        try:
            training = build()
        except UsageError as error:
            assert "\n" not in str(error)
            continue
        if state.save(folder, training, trained(training, small_epochs, folder / "first", until=1)):
            assert same(*compare(build, small_epochs, folder)), name
            exact.append(name)
    assert len(exact) > 10


@pytest.mark.parametrize("name", ["adashift", "conda", "scalableshampoo"])
def test_what_cannot_be_set_exactly_is_not_saved_and_said(name, tmp_path, capsys):
    training = new_training(optimizer=f"pytorch_optimizer:{name}")
    trained(training, small_epochs, tmp_path / "unused", until=1)
    assert state.save(tmp_path / "state", training, {"epochs": [{}]}) is False
    assert not (tmp_path / "state").exists() and name in capsys.readouterr().out


SPLITS = {"train": images_of(20, 1), "validation": images_of(11, 2)}
RECIPES = [
    ("linear-probe",),
    ("linear-probe", "features=recompute", "precision=bf16", "optimizer=sgd"),
    ("finetune",),
    ("finetune", "model=test_vit.r160_in1k", "trainable=[head, norm]", "scheduler=cosine", "precision=bf16"),
    ("blog",),
]


@pytest.mark.parametrize("chosen", RECIPES, ids=" ".join)
def test_a_recipe_goes_on_to_the_bit(chosen, tmp_path):
    recipe = recipe_of(*chosen, f"epochs={EPOCHS}")

    def build():
        training = make_setup(recipe, SPLITS)
        setup.warm_up(training, SPLITS)
        training.restart(0)
        return training

    def epochs(training, first):
        places = dict(SPLITS)
        if training.on_features:
            places = {name: training.compute_features(split) for name, split in SPLITS.items()}
        return loop.train(
            training.loop,
            lambda epoch: training.train_batches(places["train"], 0, epoch),
            lambda: training.val_batches(places["validation"]),
            first_epoch=first,
        )

    assert same(*compare(build, epochs, tmp_path))


@pytest.mark.parametrize(
    "options",
    [
        {"scheduler": "cosine"},
        {"optimizer": "sgd", "options": {"momentum": 0.9}},
        {"optimizer": "adam", "precision": "bf16"},
        {"precision": "fp16"},  # its gradients alone are captured
    ],
    ids=str,
)
def test_a_captured_training_goes_on_in_the_memory_that_its_graphs_use(options, tmp_path):
    memory = []

    def build():
        training = new_training(backend=Capturing(), use_cuda_graph=True, **options)
        beginning = {name: tensor.clone() for name, tensor in training.net.state_dict().items()}
        for _ in range(2):
            loop.warm_up(training.loop, batching.batches(samples(12), 5, Cpu()), batching.batches(samples(6), 5, Cpu()))
        training.net.load_state_dict(beginning)
        training.loop.restart()
        memory.append((training, places(training)))
        return training

    def places(training):
        values = [value for state in training.loop.optimizer.state.values() for value in state.values()]
        return [tensor.data_ptr() for tensor in [*training.net.state_dict().values(), *values]]

    assert same(*compare(build, small_epochs, tmp_path))
    for training, before in memory:
        assert places(training)[: len(before)] == before and training.loop.backend.captured


# --- the rest of a training


def test_times_and_the_generator_of_the_device_go_on(tmp_path):
    class Drawing(Standin):
        drawn = torch.arange(4, dtype=torch.uint8)

        def random_state(self):
            return self.drawn

        def set_random_state(self, value):
            self.drawn = value

    first, second = (new_training(backend=Drawing(), optimizer="sgd") for _ in range(2))
    clock, backend = first.loop.clock, second.loop.backend
    with clock.span("train"):
        first.loop.backend.time += 7
    first.loop.backend.time += 2
    first.loop.times.seconds = [0.5, 0.25]
    state.save(tmp_path, first, {"epochs": [{}]})
    backend.time, backend.drawn = 5000.0, torch.zeros(4, dtype=torch.uint8)
    with second.loop.clock.span("setup"):
        backend.time += 100  # of the new process
    assert resumed(second, tmp_path) == {"epochs": [{}]}
    assert second.loop.clock.seconds == {"train": 7} and second.loop.clock.unaccounted() == 2
    assert second.loop.times.seconds == [0.5, 0.25] and backend.drawn.tolist() == [0, 1, 2, 3]


def test_a_state_of_another_model_or_optimizer_is_refused(tmp_path):
    trained(new_training(), small_epochs, tmp_path, until=1)
    saved = state.load_newest(tmp_path)
    other = new_training()
    other.net.register_buffer("extra", torch.zeros(2))
    state.restore(other, saved)  # what is not saved stays
    other.net[0] = nn.Linear(4, 9)
    for training in (other, new_training(optimizer="sgd", options={"momentum": 0.9})):
        training.loop.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
        with pytest.raises(StageError, match="resume=never"):
            state.restore(training, saved)


# --- files


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


class Harmful:
    def __reduce__(self):
        return Path.write_text, (Path("harmed"), "harmed")


def with_code(path):
    """Pickled code in a file whose name has the right digest."""
    path.write_bytes(pickle.dumps(Harmful(), 2))
    path.replace(path.with_name(f"{path.name[:6]}-{state._digest(path)}.pt"))


def with_code_of_torch(path):
    torch.save({"record": "{}", "net": Harmful()}, path)
    path.replace(path.with_name(f"{path.name[:6]}-{state._digest(path)}.pt"))


@pytest.mark.parametrize("damage", [cut, flip_a_bit, with_code, with_code_of_torch, lambda path: path.write_bytes(b"")])
def test_a_damaged_state_is_named_and_the_one_before_is_used(damage, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "state"
    trained(new_training(), small_epochs, folder, until=4)
    third, fourth = sorted(folder.iterdir())
    assert [path.name[:7] for path in (third, fourth)] == ["000003-", "000004-"]
    assert len(state.load_newest(folder)["record"]["epochs"]) == 4 and capsys.readouterr().out == ""
    damage(fourth)
    assert len(state.load_newest(folder)["record"]["epochs"]) == 3
    (line,) = capsys.readouterr().out.splitlines()
    assert "000004-" in line
    damage(third)
    assert state.load_newest(folder) is None
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert not Path("harmed").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_state_that_cannot_be_written_leaves_the_one_before(number, tmp_path, monkeypatch):
    training = new_training()
    record = trained(training, small_epochs, tmp_path, until=2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(path, content):
        path.write_text("part of it")
        raise OSError(number, "no")

    monkeypatch.setattr(Path, "write_bytes", fail)
    record["epochs"].append({})
    with pytest.raises(StageError):
        state.save(tmp_path, training, record)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_without_a_state_there_is_none(tmp_path):
    assert state.load_newest(tmp_path / "nowhere") is None
