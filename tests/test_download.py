"""What download writes down, and how loudly it says that something is a stand-in. Nothing here asks the network."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipeline import config, download, files
from pipeline.data import fetch
from pipeline.errors import StageError, UsageError
from pipeline.models import weights

REASON = "no mirror of CIFAR-10 answers"


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """No host answers, and the hub's cache is empty."""
    monkeypatch.setattr(fetch, "reachable", lambda urls: [])
    monkeypatch.setattr(weights, "_cached_file", lambda repository, name: None)
    monkeypatch.setattr(weights, "_hub_file", lambda model: ("timm/some-model", "model.safetensors"))


@pytest.fixture
def auto(tmp_path):
    """Settings for CIFAR-10 and pretrained weights where they can be had, from an empty folder."""
    path = json.dumps(str(tmp_path / "raw"))
    return config.load([f"data.path={path}", "data.source=auto", "data.limit=3", "weights=pretrained"])


def test_a_folder_and_random_weights_are_written_down(settings_of, tmp_path, capsys):
    settings = settings_of("model=test_resnet.r160_in1k")
    inputs = download.run(settings, tmp_path / "outputs")
    assert files.read_json(tmp_path / "outputs" / "inputs.json") == inputs
    digest = inputs["data"].pop("digest")
    assert digest.startswith("sha256:") and len(digest) == 7 + 64
    assert inputs == {
        "data": {
            "requested": "folder", "source": "folder", "reason": None, "limit": None,
            "classes": ["blue", "green", "red"], "counts": {"train": 60, "test": 30}, "size": [16, 16],
        },
        "weights": {
            "model": "test_resnet.r160_in1k", "requested": "random", "used": "random", "digest": None, "hub": None,
            "reason": None,
        },
        "fallback": [],
    }  # fmt: skip
    said = capsys.readouterr()
    assert said.err == ""
    for words in ("folder: 60 train + 30 test, 16x16 pixels", "3: blue, green, red", "test_resnet.r160_in1k: random"):
        assert words in said.out


def test_no_absolute_path_is_written_down(settings_of, tmp_path, pictures):
    file = tmp_path / "mine" / "net.safetensors"
    file.parent.mkdir()
    save_file({"weight": torch.zeros(2)}, file)
    inputs = download.run(settings_of(f"weights={json.dumps(str(file))}"), tmp_path / "outputs")
    assert inputs["weights"]["requested"] == "net.safetensors" and inputs["weights"]["used"] == "file"
    text = (tmp_path / "outputs" / "inputs.json").read_text()
    assert str(tmp_path) not in text and str(pictures) not in text


def test_the_same_inputs_give_the_same_file(settings_of, tmp_path):
    path = tmp_path / "outputs" / "inputs.json"
    download.run(settings_of(), path.parent)
    before = path.read_bytes()
    download.run(settings_of("seed=3", "epochs=7", "label=x"), path.parent)
    assert path.read_bytes() == before
    download.run(settings_of("data.limit=5"), path.parent)
    assert path.read_bytes() != before


def test_many_classes_are_not_all_listed(pictures, settings_of, tmp_path, capsys):
    for split in ("train", "test"):
        for index in range(8):
            shutil.copytree(pictures / split / "blue", pictures / split / f"class{index}")
    download.run(settings_of(), tmp_path / "outputs")
    assert "classes  11: blue, class0, class1, " in (said := capsys.readouterr().out)
    assert "class7, green, ... (11 in all)" in said and "red" not in said


def test_images_of_several_sizes_are_said(pictures, settings_of, tmp_path, capsys):
    from PIL import Image

    Image.fromarray(np.zeros((9, 30, 3), np.uint8)).save(pictures / "train" / "red" / "wide.png")
    assert download.run(settings_of(), tmp_path / "outputs")["data"]["size"] is None
    assert "61 train + 30 test, of many sizes" in capsys.readouterr().out


# --- stand-ins


def test_stand_ins_are_shouted(auto, tmp_path, capsys):
    inputs = download.run(auto, tmp_path / "outputs")
    assert inputs["fallback"] == ["data", "weights"]
    assert inputs["data"]["source"] == "synthetic" and inputs["data"]["reason"] == REASON
    assert inputs["weights"]["used"] == "random"
    assert inputs["weights"]["reason"] == f"{weights.HUB} does not answer"
    said = capsys.readouterr().err
    assert "!!  DEMO: this is not the real thing" in said
    assert f"!!  data: generated pictures in place of CIFAR-10 ({REASON})" in said
    assert f"!!  weights: random in place of pretrained ({weights.HUB} does not answer)" in said


@pytest.mark.parametrize(
    ("override", "fallback", "silent"),
    [("weights=random", ["data"], "weights:"), ("data.source=synthetic", ["weights"], "data:")],
)
def test_only_what_stands_in_is_shouted(tmp_path, capsys, override, fallback, silent):
    path = json.dumps(str(tmp_path / "raw"))
    settings = config.load([f"data.path={path}", "data.source=auto", "data.limit=3", "weights=pretrained", override])
    assert download.run(settings, tmp_path / "outputs")["fallback"] == fallback
    said = capsys.readouterr().err
    assert "DEMO" in said and silent not in said


def test_what_was_asked_for_by_name_is_no_stand_in(tmp_path, capsys):
    settings = config.load(["data.source=synthetic", "data.limit=3", "weights=random"])
    inputs = download.run(settings, tmp_path / "outputs")
    assert inputs["fallback"] == [] and inputs["data"]["reason"] is None
    assert capsys.readouterr().err == ""


def test_the_next_run_tries_again(auto, tmp_path, monkeypatch, capsys):
    download.run(auto, tmp_path / "outputs")
    capsys.readouterr()
    fetched = []
    file = tmp_path / "hub" / "model.safetensors"
    file.parent.mkdir()
    save_file({"weight": torch.zeros(2)}, file)
    monkeypatch.setattr(fetch, "reachable", list)
    monkeypatch.setattr(fetch, "fetch_cifar10", lambda *args: fetched.append(args))
    monkeypatch.setattr(weights, "_fetch", lambda repository, name: (file, None))
    inputs = download.run(auto, tmp_path / "outputs")
    assert fetched == [(tmp_path / "raw", auto.data.mirrors, auto.data.timeout_seconds)]
    assert inputs["fallback"] == [] and inputs["data"]["source"] == "cifar10"
    assert inputs["data"]["counts"] == {"train": 30, "test": 30}
    assert inputs["weights"]["used"] == "pretrained"
    assert inputs["weights"]["hub"] == ["timm/some-model", "model.safetensors"]
    assert files.read_json(tmp_path / "outputs" / "inputs.json") == inputs
    assert capsys.readouterr().err == ""


def test_a_stand_in_that_stays_is_shouted_each_time(auto, tmp_path, capsys):
    path = tmp_path / "outputs" / "inputs.json"
    download.run(auto, path.parent)
    first, before = capsys.readouterr().err, path.read_bytes()
    download.run(auto, path.parent)
    assert capsys.readouterr().err == first != ""
    assert path.read_bytes() == before  # else DVC would train again


# --- what has no stand-in


def test_cifar10_that_was_asked_for_by_name_is_not_replaced(tmp_path):
    path = json.dumps(str(tmp_path / "raw"))
    mirrors = 'data.mirrors=["http://127.0.0.1:9/cifar-10-python.tar.gz"]'
    settings = config.load([f"data.path={path}", "data.source=cifar10", mirrors, "weights=random"])
    with pytest.raises(StageError):
        download.run(settings, tmp_path / "outputs")
    assert not (tmp_path / "outputs").exists()


def test_a_folder_that_is_not_there_is_named_and_nothing_written(settings_of, tmp_path):
    with pytest.raises(UsageError, match=r"^data\.path: .* has no folder train"):
        download.run(settings_of(f"data.path={json.dumps(str(tmp_path / 'gone'))}"), tmp_path / "outputs")
    with pytest.raises(UsageError, match=r"^weights: .* is not there"):
        download.run(settings_of("weights=gone.safetensors"), tmp_path / "outputs")
    assert not (tmp_path / "outputs").exists()
