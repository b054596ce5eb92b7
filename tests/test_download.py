"""What `download` writes, and how it warns of stand-ins. Nothing here asks the network."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import fails, picture
from safetensors.torch import save_file

from pipeline import config, download, files
from pipeline.data import fetch
from pipeline.errors import StageError, UsageError
from pipeline.models import weights
from pipeline.tracking import records


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """No host answers, and the hub's cache is empty."""
    monkeypatch.setattr(fetch, "reachable", lambda urls: [])
    monkeypatch.setattr(weights, "cached_file", lambda repository, name: None)
    monkeypatch.setattr(weights, "_hub_file", lambda model: ("timm/some-model", "model.safetensors"))


def auto(tmp_path, *overrides):
    """Settings for CIFAR-10 and pretrained weights, both with a fallback, and an empty folder of data."""
    path = json.dumps(str(tmp_path / "raw"))
    return config.load([f"data.path={path}", "data.source=auto", "data.limit=3", "weights=pretrained", *overrides])


def test_a_folder_and_random_weights_are_described(settings_of, tmp_path, capsys):
    settings = settings_of("model=test_resnet.r160_in1k")
    inputs = download.run(settings, tmp_path / "outputs")
    assert files.read_json(tmp_path / "outputs" / "inputs.json") == inputs
    assert re.fullmatch("sha256:[0-9a-f]{64}", inputs["data"].pop("digest"))
    assert inputs == {
        "data": {
            "requested": "folder", "source": "folder", "reason": None, "limit": None,
            "classes": ["blue", "green", "red"], "counts": {"train": 60, "test": 30}, "size": [16, 16], "left_out": {},
        },
        "weights": {
            "model": "test_resnet.r160_in1k", "requested": "random", "used": "random", "digest": None, "hub": None,
            "reason": None,
        },
        "fallback": [],
    }  # fmt: skip
    printed = capsys.readouterr()
    assert printed.err == ""
    for text in ("60 train + 30 test, 16x16 pixels", "blue, green, red", "test_resnet.r160_in1k: random"):
        assert text in printed.out


def test_what_is_left_out_and_squashed_is_said_and_recorded(settings_of, tmp_path, pictures, capsys):
    for name in ("0.heic", "1.HEIC", "notes.txt"):
        (pictures / "train" / "red" / name).write_bytes(b"")
    picture((1, 2, 3), (300, 10)).save(pictures / "test" / "red" / "05.png")
    settings = settings_of("image_size=24")
    inputs = download.run(settings, tmp_path / "outputs")
    assert files.read_json(tmp_path / "outputs" / "inputs.json")["data"]["left_out"] == {".heic": 2, ".txt": 1}
    said = capsys.readouterr().out
    assert "2 .heic, 1 .txt" in said and "squashed to 24x24" in said
    warnings = records.run_warnings(settings, inputs, {"backend": "cpu"}, None, False)
    assert any("2 .heic, 1 .txt" in warning for warning in warnings)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_the_command_survives_names_that_cannot_be_printed(pictures, encoding):
    for split in ("train", "test"):
        (pictures / split / "red").rename(pictures / split / "пёс")
    ended = download_in_a_process(pictures, encoding)
    assert ended.returncode == 0 and ended.stderr == b""


def test_the_command_ends_with_one_line_for_unreadable_images(pictures):
    for name in ("red/00.jpg", "blue/01.png"):
        (pictures / "train" / name).write_bytes(b"no image")
    ended = download_in_a_process(pictures)
    assert ended.returncode == 2
    (line,) = ended.stderr.decode().splitlines()
    assert "train/red/00.jpg" in line and "train/blue/01.png" in line


def download_in_a_process(pictures, encoding="utf-8"):
    code = (
        "import sys; from pathlib import Path; from pipeline import cli, download; from pipeline.data import datasets;"
        "cli.OUTPUTS = datasets.CACHE = Path(sys.argv.pop(1)); cli.main(download.run, '')"
    )
    settings = ["data.source=folder", f"data.path={json.dumps(str(pictures))}", "weights=random", "device=cpu"]
    options = [word for setting in settings for word in ("-S", setting)]
    command = [sys.executable, "-c", code, str(pictures.parent / "outputs"), *options]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    return subprocess.run(command, cwd=config.ROOT, env=environment, capture_output=True, timeout=120)


def test_no_absolute_path_is_written(settings_of, tmp_path, pictures):
    file = tmp_path / "mine" / "net.safetensors"
    file.parent.mkdir()
    save_file({"weight": torch.zeros(2)}, file)
    download.run(settings_of(f"weights={json.dumps(str(file))}"), tmp_path / "outputs")
    text = (tmp_path / "outputs" / "inputs.json").read_text()
    assert "net.safetensors" in text and str(tmp_path) not in text and str(pictures) not in text


def test_the_same_inputs_give_the_same_file(settings_of, tmp_path):
    path = tmp_path / "outputs" / "inputs.json"
    download.run(settings_of(), path.parent)
    before = path.read_bytes()
    download.run(settings_of("seed=3", "epochs=7", "label=x"), path.parent)
    assert path.read_bytes() == before
    download.run(settings_of("data.limit=5"), path.parent)
    assert path.read_bytes() != before


# --- fallbacks


@pytest.mark.parametrize(
    ("overrides", "fallback"),
    [
        ([], ["data", "weights"]),
        (["weights=random"], ["data"]),
        (["data.source=synthetic"], ["weights"]),
        (["data.source=synthetic", "weights=random"], []),  # asked for by name
    ],
)
def test_each_run_warns_of_fallbacks_and_of_nothing_else(tmp_path, capsys, overrides, fallback):
    settings = auto(tmp_path, *overrides)
    path = tmp_path / "outputs" / "inputs.json"
    inputs = download.run(settings, path.parent)
    assert inputs["fallback"] == fallback
    assert [name for name in ("data", "weights") if inputs[name]["reason"]] == fallback
    warning, before = capsys.readouterr().err, path.read_bytes()
    assert ("DEMO" in warning) == bool(fallback)
    for name in ("data", "weights"):
        assert (f"{name}: " in warning) == (name in fallback)
        assert name not in fallback or inputs[name]["reason"] in warning
    download.run(settings, path.parent)
    assert capsys.readouterr().err == warning
    assert path.read_bytes() == before  # else DVC would train again


def test_the_next_run_tries_to_download_again(tmp_path, monkeypatch, capsys):
    settings = auto(tmp_path)
    download.run(settings, tmp_path / "outputs")
    capsys.readouterr()
    fetched = []
    file = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(2)}, file)
    monkeypatch.setattr(fetch, "reachable", list)
    monkeypatch.setattr(fetch, "fetch_cifar10", lambda *args: fetched.append(args))
    monkeypatch.setattr(weights, "_fetch", lambda repository, name: (file, None))
    inputs = download.run(settings, tmp_path / "outputs")
    assert fetched == [(tmp_path / "raw", settings.data.mirrors, settings.data.timeout_seconds)]
    assert inputs["fallback"] == [] and inputs["data"]["source"] == "cifar10"
    assert inputs["weights"]["hub"] == ["timm/some-model", "model.safetensors"]
    assert capsys.readouterr().err == ""


# --- what has no fallback


@pytest.mark.parametrize(
    ("override", "error", "named"),
    [
        ("data.source=cifar10", StageError, "cifar-10-python.tar.gz"),
        ("data.source=folder", UsageError, "data.path: "),
        ("weights=gone.safetensors", UsageError, "weights: "),
    ],
)
def test_data_and_weights_that_the_user_named_are_not_replaced(tmp_path, override, error, named):
    settings = auto(tmp_path, override)
    assert named in fails(error, download.run, settings, tmp_path / "outputs")
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("device=xpu:7", 'device: "xpu:7"'),
        ("precision=fp16", 'precision: "fp16"'),
        ("compile=max-autotune", 'compile: "max-autotune"'),
        ("graph=true", "graph: true"),
        ("model=resnet81", 'model: "resnet81"'),
        ("weights=mine.safetensors", 'weights: "mine.safetensors"'),
        ("optimizer=sgdd", 'optimizer: "sgdd"'),
        ("scheduler_options.onecycle.pct=1", "scheduler_options.onecycle.pct"),
    ],
)
@pytest.mark.parametrize("missing", ["data.source=cifar10", "data.source=synthetic"])  # the archive; only weights
def test_settings_that_training_refuses_are_refused_before_a_download(tmp_path, monkeypatch, override, named, missing):
    for owner, name in ((fetch, "fetch_cifar10"), (weights, "_fetch"), (fetch, "reachable")):
        monkeypatch.setattr(owner, name, lambda *_: pytest.fail("it was downloaded first"))
    settings = auto(tmp_path, "device=cpu", "recipe=finetune", "scheduler=onecycle", missing, override)
    assert fails(UsageError, download.run, settings, tmp_path / "outputs").startswith(named)


def test_without_a_download_no_torch_is_imported(pictures, tmp_path):
    code = (
        "import sys; from pathlib import Path; from pipeline import config, download;"
        "download.run(config.load(sys.argv[2:]), Path(sys.argv[1])); print('torch' in sys.modules)"
    )
    settings = ["data.source=folder", f"data.path={json.dumps(str(pictures))}", "weights=random", "device=cpu"]
    command = [sys.executable, "-c", code, str(tmp_path / "outputs"), *settings]
    ended = subprocess.run(command, cwd=config.ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout.splitlines()[-1] == "False"
