"""Small trainings that several test modules share."""

import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from stores import fresh_store, runs

from pipeline import config, download, evaluate, files, hardware, plots, repeats, sustain, train
from pipeline.profiling.score_steps import Step
from pipeline.tracking import pending, publisher, store
from pipeline.training import setup

SMALL = ("model=test_resnet.r160_in1k", "image_size=32", "epochs=2", "warmup_epochs=0", "threads=1")
REPEATED = ("sustain_seconds=0.1",)
STEPS = (
    Step("convnet_fp32", "convnet fp32", "test_resnet.r160_in1k", 32, 8, best_precision=False),
    Step("convnet_best", "convnet best", "test_resnet.r160_in1k", 32, 8, best_precision=True),
    Step("transformer_best", "transformer best", "test_vit.r160_in1k", 160, 2, best_precision=True),
)
"""Small steps to repeat, for a while."""


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """One thread does so little work fastest; what a test sets does not last."""
    before = torch.get_num_threads()
    monkeypatch.setattr(setup, "DEFAULT_THREADS", 1)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def generated(*overrides):
    """Settings for generated pictures, 6 of each of 10 classes to train and to test on, that need no files."""
    mine = ("data.source=synthetic", "data.limit=6", "recipe=linear-probe", "weights=random", "device=cpu", "seed=0")
    return config.load([*mine, "sustain_seconds=0", *SMALL, *overrides])


def prepare(settings, folder):
    for stage in (hardware, download):
        stage.run(settings, folder)


def delivered():
    """The runs in the store, after all that waits was delivered."""
    publisher.deliver_all()
    return runs()


def trained_once(factory):
    """What a training and the stages after it left, made once: `settings`, `outputs` and, as it was after training
    and at the end, the store (`trained`, `completed`). Copies of the stores share one folder of artifacts."""
    root = factory.getbasetemp() / "once"
    made = SimpleNamespace(
        settings=generated(*REPEATED),
        outputs=root / "outputs",
        trained=root / "trained.db",
        completed=root / "completed.db",
    )
    if not made.completed.exists():
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what MLflow imports to log a model warns of its own code
            patch.chdir(root)
            patch.setattr(pending, "FOLDER", root / "pending")
            patch.setenv("MLFLOW_TRACKING_URI", fresh_store(root / "store.db", factory))
            prepare(made.settings, made.outputs)
            train.run(made.settings, made.outputs)
            publisher.deliver_all()
            shutil.copy(root / "store.db", made.trained)
            evaluate.run(made.settings, made.outputs)
            sustain.run(made.settings, made.outputs, steps=STEPS)
            publisher.deliver_all()
            shutil.copytree(root / "mlartifacts", root / "kept")  # copied stores write into mlartifacts, too
            (root / "store.db").rename(made.completed)
    return made


@pytest.fixture
def once(tmp_path_factory):
    return trained_once(tmp_path_factory)


@pytest.fixture
def light(monkeypatch, once):
    """Leaves out what takes long and is tested elsewhere: the model in MLflow, and drawing. Not of `once`."""
    monkeypatch.setattr(store, "log_model", lambda *args: None)
    monkeypatch.setattr(plots, "save", lambda figure, path: files.write_text(path, "a picture"))


@pytest.fixture
def driven():
    """Run the stages of repeats, each in this process, and deliver what they leave, as the driver does."""
    modules = {"train": train, "evaluate": evaluate, "sustain": sustain}

    def drive(settings, folder, *stages):
        def start_child(number, outputs):
            for stage in stages:
                modules[stage].run(settings, outputs, number)
            publisher.deliver_all()
            return 0

        repeats.run_repeats(settings, folder, stages, settings.repeats, start_child)

    return drive
