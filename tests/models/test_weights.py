"""What a model starts from: random numbers, a file, or what is published, from the hub's cache or fetched."""

import hashlib
import json

import huggingface_hub
import pytest
from conftest import fails
from huggingface_hub import constants

from pipeline import config
from pipeline.data import fetch
from pipeline.errors import StageError, UsageError
from pipeline.models import classifier, weights

MODEL = "resnet18.a1_in1k"
HUB_FILE = ("timm/resnet18.a1_in1k", "model.safetensors")
CONTENT = b"weights"
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
    """An empty cache of the hub's client; gives the function that puts the published file in it."""
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
    """Gives the function that says what a download does."""
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
        "model": MODEL,
        "requested": "random",
        "used": "random",
        "digest": None,
        "hub": None,
        "reason": None,
    }
    assert weights.locate(facts, recipe("random")) is None


def test_a_file_by_its_digest_and_without_its_folder(tmp_path):
    path = tmp_path / "mine.safetensors"
    path.write_bytes(CONTENT)
    facts = weights.resolve(recipe(str(path)))
    assert (facts["used"], facts["requested"], facts["digest"]) == ("file", "mine.safetensors", DIGEST)
    assert (facts["hub"], facts["reason"]) == (None, None)
    assert str(tmp_path) not in json.dumps(facts)
    assert weights.locate(facts, recipe(str(path))) == path


def test_a_relative_path_starts_at_the_projects_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "ROOT", tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.safetensors").write_bytes(CONTENT)
    chosen = recipe("data/mine.safetensors")
    assert weights.locate(weights.resolve(chosen), chosen) == tmp_path / "data" / "mine.safetensors"


@pytest.mark.parametrize("folder", [False, True])
def test_a_file_that_is_not_there(tmp_path, folder):
    path = tmp_path / "mine.safetensors"
    if folder:
        path.mkdir()
    assert fails(UsageError, weights.resolve, recipe(str(path))) == (
        f'weights: "{path}" is not there: expected pretrained | random | a file'
    )


@pytest.mark.parametrize("then", ["other", "gone"])
def test_a_file_that_changed_since_it_was_looked_at(tmp_path, then):
    path = tmp_path / "mine.safetensors"
    path.write_bytes(CONTENT)
    facts = weights.resolve(recipe(str(path)))
    if then == "gone":
        path.unlink()
    else:
        path.write_bytes(b"others.")
    assert fails(StageError, weights.locate, facts, recipe(str(path))) == (
        "the weights changed since `download` looked at them: run it again (`dvc repro`)"
    )


# --- pretrained


def test_published_weights_that_were_fetched_before(asked, hub, offline):
    path = hub()
    facts = weights.resolve(recipe("pretrained"))
    assert facts == {
        "model": MODEL,
        "requested": "pretrained",
        "used": "pretrained",
        "digest": DIGEST,
        "hub": list(HUB_FILE),
        "reason": None,
    }
    # The way from `download` to `train` leads through inputs.json.
    assert weights.locate(json.loads(json.dumps(facts)), recipe("pretrained")) == path


@pytest.mark.parametrize("then", ["other", "gone"])
def test_published_weights_that_changed_since(asked, hub, offline, then):
    path = hub()
    facts = weights.resolve(recipe("pretrained"))
    if then == "gone":
        path.unlink()
    else:
        hub(b"others.")
    assert "run it again" in fails(StageError, weights.locate, facts, recipe("pretrained"))


def test_timm_is_asked_once_a_model(asked, hub, offline, cache):
    hub()
    first = weights.resolve(recipe("pretrained"))
    assert weights.resolve(recipe("pretrained")) == first
    assert asked == [MODEL]
    assert json.loads((cache / "hub.json").read_text()) == {MODEL: list(HUB_FILE)}


def test_random_and_files_ask_nobody(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "reachable", None)
    path = tmp_path / "mine.safetensors"
    path.write_bytes(CONTENT)
    weights.resolve(recipe("random"))
    weights.resolve(recipe(str(path)))
    assert asked == []


def test_a_model_that_nobody_published(monkeypatch):
    monkeypatch.setattr(classifier, "hub_file", lambda name: None)
    assert fails(UsageError, weights.resolve, recipe("pretrained")) == (
        f'weights: "pretrained" is not there for {MODEL}: expected random | a .safetensors file'
    )


def test_without_a_network_they_are_random_and_it_says_why(asked, hub, offline):
    facts = weights.resolve(recipe("pretrained"))
    assert (facts["requested"], facts["used"], facts["digest"]) == ("pretrained", "random", None)
    assert facts["hub"] is None
    assert facts["reason"] == f"{weights.HUB} does not answer"
    assert weights.locate(facts, recipe("pretrained")) is None


def test_the_next_run_tries_again(asked, hub, online):
    online(raises(OSError("no route")))
    assert weights.resolve(recipe("pretrained"))["used"] == "random"
    online(lambda *wanted: str(hub()) if wanted == HUB_FILE else None)
    assert weights.resolve(recipe("pretrained"))["digest"] == DIGEST


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (OSError("404 Client Error.\n\nRepository Not Found for url: https://x."), "404 Client Error."),
        (TimeoutError(), "TimeoutError"),
        (RuntimeError("\n"), "RuntimeError"),
    ],
)
def test_a_download_that_fails_says_why_in_one_line(asked, hub, online, error, why):
    online(raises(error))
    facts = weights.resolve(recipe("pretrained"))
    assert (facts["used"], facts["reason"]) == ("random", f"{weights.HUB}: {why}")


def test_ctrl_c_in_a_download_is_no_fallback(asked, hub, online):
    online(raises(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        weights.resolve(recipe("pretrained"))
