"""What a model starts from: random numbers, a file, or what is published, from the hub's cache or fetched."""

import hashlib
import json
import os

import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy
from conftest import fails
from huggingface_hub import constants

from pipeline import config
from pipeline.data import datasets, fetch
from pipeline.errors import StageError, UsageError
from pipeline.models import classifier, weights

MODEL = "resnet18.a1_in1k"
HUB_FILE = ("timm/resnet18.a1_in1k", "model.safetensors")
CONTENT = safetensors.numpy.save({"weight": np.zeros(2, np.float32)})
DIGEST = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


def recipe(choice):
    return config.load([f"weights={json.dumps(choice)}", f"model={MODEL}"]).work


@pytest.fixture
def asked(monkeypatch):
    """The names that timm was asked about; it knows where one is published."""
    names = []

    def hub_file(name):
        names.append(name)
        return HUB_FILE

    monkeypatch.setattr(classifier, "hub_file", hub_file)
    return names


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty cache of the hub's client; returns the function that puts the published file in it."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))

    def put(content=CONTENT):
        repository = cache / f"models--{HUB_FILE[0].replace('/', '--')}"
        snapshot = repository / "snapshots" / "abc"
        snapshot.mkdir(parents=True, exist_ok=True)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text("abc")
        (snapshot / HUB_FILE[1]).write_bytes(content)
        return snapshot / HUB_FILE[1]

    return put


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(fetch, "reachable", lambda urls: [])


@pytest.fixture
def online(monkeypatch):
    """Returns the function that says what a download does."""
    monkeypatch.setattr(fetch, "reachable", list)
    return lambda download: monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)


def raises(error):
    def download(*_):
        raise error

    return download


# --- random, a file


def test_random():
    facts = weights.resolve(recipe("random"))
    assert facts == {
        "model": MODEL, "requested": "random", "used": "random", "digest": None, "hub": None, "reason": None,
    }  # fmt: skip
    assert weights.locate(facts, recipe("random")) is None


@pytest.mark.parametrize("relative", [False, True])
def test_a_file_by_its_digest_and_without_its_folder(tmp_path, monkeypatch, relative):
    monkeypatch.setattr(config, "PROJECT", tmp_path)
    path = tmp_path / "mine.safetensors"
    path.write_bytes(CONTENT)
    chosen = recipe(path.name if relative else str(path))
    facts = weights.resolve(chosen)
    assert facts == {
        "model": MODEL, "requested": "mine.safetensors", "used": "file", "digest": DIGEST, "hub": None, "reason": None,
    }  # fmt: skip
    assert weights.locate(facts, chosen) == path


@pytest.mark.parametrize("folder", [False, True])
def test_a_file_that_is_not_there(tmp_path, folder):
    path = tmp_path / "mine.safetensors"
    if folder:
        path.mkdir()
    assert fails(UsageError, weights.resolve, recipe(str(path))).startswith(f'weights: "{path}"')


@pytest.mark.parametrize("content", [b"others.", None])
def test_a_file_that_changed_since_it_was_looked_at(tmp_path, content):
    path = tmp_path / "mine.safetensors"
    path.write_bytes(CONTENT)
    facts = weights.resolve(recipe(str(path)))
    path.unlink()
    if content:
        path.write_bytes(content)
    assert "dvc repro" in fails(StageError, weights.locate, facts, recipe(str(path)))


# --- pretrained


def test_published_weights_that_were_fetched_before(asked, hub, offline):
    path = hub()
    facts = weights.resolve(recipe("pretrained"))
    assert facts == {
        "model": MODEL, "requested": "pretrained", "used": "pretrained", "digest": DIGEST, "hub": list(HUB_FILE),
        "reason": None,
    }  # fmt: skip
    # The way from `download` to `train` leads through inputs.json.
    facts = json.loads(json.dumps(facts))
    assert weights.locate(facts, recipe("pretrained")) == path
    hub(b"others.")
    assert "dvc repro" in fails(StageError, weights.locate, facts, recipe("pretrained"))
    path.unlink()
    assert "dvc repro" in fails(StageError, weights.locate, facts, recipe("pretrained"))


def test_a_model_that_nobody_published(monkeypatch):
    monkeypatch.setattr(classifier, "hub_file", lambda name: None)
    assert MODEL in fails(UsageError, weights.resolve, recipe("pretrained"))


def test_without_a_network_they_are_random_and_it_says_why(asked, hub, offline):
    facts = weights.resolve(recipe("pretrained"))
    assert facts == {
        "model": MODEL, "requested": "pretrained", "used": "random", "digest": None, "hub": None,
        "reason": f"{weights.HUB} does not answer",
    }  # fmt: skip
    assert weights.locate(facts, recipe("pretrained")) is None


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (OSError("404 Client Error.\n\nRepository Not Found for url: https://x."), "404 Client Error."),
        (TimeoutError(), "TimeoutError"),
        (RuntimeError("\n"), "RuntimeError"),
    ],
)
def test_a_download_that_fails_says_why_in_one_line_and_the_next_run_tries_again(asked, hub, online, error, why):
    online(raises(error))
    facts = weights.resolve(recipe("pretrained"))
    assert (facts["used"], facts["reason"]) == ("random", f"{weights.HUB}: {why}")
    online(lambda *wanted: str(hub()) if wanted == HUB_FILE else None)
    assert weights.resolve(recipe("pretrained"))["digest"] == DIGEST


@pytest.mark.parametrize("content", [b"", b"<html>please log in</html>", CONTENT[:-1]])
def test_a_damaged_file_of_the_hub_is_no_weights_and_the_next_run_tries_again(asked, hub, online, content):
    path = hub(content)
    online(lambda *_: str(hub(content)))
    facts = weights.resolve(recipe("pretrained"))
    assert (facts["used"], facts["reason"]) == ("random", f"{weights.HUB} sent a damaged file")
    assert not path.exists()
    online(lambda *_: str(hub()))
    assert weights.resolve(recipe("pretrained"))["digest"] == DIGEST


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", f'{{"{MODEL}": null}}', f'{{"{MODEL}": ["one"]}}', "\udcff"]
)
def test_a_damaged_memory_of_timms_answers_is_forgotten(asked, hub, offline, content):
    hub()
    memory = datasets.CACHE / "hub.json"
    memory.parent.mkdir(parents=True, exist_ok=True)
    memory.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert not weights.is_cached(MODEL)
    assert weights.resolve(recipe("pretrained"))["digest"] == DIGEST
    assert asked == [MODEL] and weights.is_cached(MODEL)
    assert json.loads(memory.read_text()) == {MODEL: list(HUB_FILE)}


def test_ctrl_c_in_a_download_is_no_fallback(asked, hub, online):
    online(raises(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        weights.resolve(recipe("pretrained"))


def test_a_file_that_may_not_be_read_is_named(tmp_path):
    path = tmp_path / "mine.safetensors"
    path.write_bytes(b"")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("permissions do not bind this user")
    assert "mine.safetensors" in fails(UsageError, weights.resolve, recipe(str(path)))
