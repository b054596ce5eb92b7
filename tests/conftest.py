"""What several test modules share. No test may touch the project's own cache, store or outputs."""

import json
import math
import sys

import numpy as np
import pytest
from PIL import Image

from pipeline import config
from pipeline.data import datasets
from pipeline.errors import StageError
from pipeline.profiling import system_state
from pipeline.tracking import pending

COLOURS = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (210, 50, 40)}
"""The classes of `pictures`, in order of name, each with the mean of its pixels."""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, not there yet."""
    folder = tmp_path / ".cache"
    monkeypatch.setattr(datasets, "CACHE", folder)
    return folder


@pytest.fixture(autouse=True)
def pending_folder(tmp_path, monkeypatch):
    """A folder of the test's own for runs that wait for the store, not there yet."""
    folder = tmp_path / "pending"
    monkeypatch.setattr(pending, "FOLDER", folder)
    return folder


@pytest.fixture(autouse=True)
def calm_machine(request, monkeypatch):
    """A machine that reports no state and keeps its pace, where that is not what is tested."""
    if request.module.__name__ != "test_system_state":
        monkeypatch.setattr(system_state, "sample", lambda *_: {})
        monkeypatch.setattr(system_state, "MIN_DRIFT", math.inf)


@pytest.fixture(autouse=True)
def instant_roofline(request, monkeypatch):
    """Peaks that are measured in no time and doubt no clock, where they are not what is tested."""
    roofline = sys.modules.get("pipeline.profiling.roofline")
    if roofline is None or request.module.__name__ == "test_roofline":
        return
    time_calls = roofline.time_calls
    monkeypatch.setattr(roofline, "time_calls", lambda work, wait, **_: time_calls(work, wait, seconds=0.0))
    for name in ("WINDOW_SECONDS", "STEP_SECONDS"):
        monkeypatch.setattr(roofline, name, 0.0)
    for name in ("MIN_SIDE", "MAX_SIDE", "COPY_SIDE", "CPU_COPY_SIDE"):
        monkeypatch.setattr(roofline, name, 64)
    for name in ("MAX_VS_SYNTHETIC", "MAX_UTILISATION"):
        monkeypatch.setattr(roofline, name, math.inf)


@pytest.fixture(scope="module")
def one_thread():
    """One thread does little work fastest."""
    import torch  # takes seconds, and some modules do without it

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fails(kind, call, *args):
    """The one line that `call` fails with."""
    with pytest.raises(StageError) as caught:
        call(*args)
    assert caught.type is kind
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def picture(colour, size=(16, 16), seed=0):
    """An image of `size` (width, height): `colour` in noise."""
    width, height = size
    noise = np.random.default_rng(seed).integers(-30, 31, (height, width, 3))
    return Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture
def pictures(tmp_path):
    """A data set for `data.source=folder`: 3 classes told by colour, 20 + 10 images each, png and jpg."""
    root = tmp_path / "pictures"
    for split, count in (("train", 20), ("test", 10)):
        for label, (name, colour) in enumerate(COLOURS.items()):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                image = picture(colour, seed=[len(split), label, index])
                image.save(folder / f"{index:02}.{'png' if index % 2 else 'jpg'}")
    return root


@pytest.fixture
def settings_of(pictures):
    """Makes settings for `pictures` on the CPU, from random weights, with no step repeated after the training;
    `key=value` overrides are laid over."""

    def make(*overrides):
        path = f"data.path={json.dumps(str(pictures))}"
        mine = ["data.source=folder", path, "data.limit=null", "recipe=linear-probe", "weights=random"]
        return config.load([*mine, "device=cpu", "seed=0", "sustain_seconds=0", *overrides])

    return make
