"""The weights that a model starts from: random ones, a file, or those that timm publishes. Imports torch only when
needed."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pipeline import config, files
from pipeline.data import datasets
from pipeline.errors import StageError, UsageError
from pipeline.startup import first_line

HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def check(recipe: config.Recipe) -> None:
    """Raise UsageError for weights that don't exist. Downloads nothing."""
    if recipe.weights == "pretrained":
        _hub_file(recipe.model)
    elif recipe.weights != "random" and not config.absolute(recipe.weights).is_file():
        raise UsageError(f'weights: "{recipe.weights}" is not there: expected pretrained | random | a file')


def resolve(recipe: config.Recipe) -> dict[str, Any]:
    """Find the weights, download pretrained ones if they are missing, and describe them without an absolute path.

    Keys: `model`, `requested`, `used` (pretrained | random | file), `digest` (of the file, null for random ones), `hub`
    ([repository, file] of pretrained ones, else null), `reason` (of a fallback, else null). Raises UsageError for
    weights that don't exist.
    """
    facts: dict[str, Any] = {"model": recipe.model, "requested": recipe.weights, "hub": None, "reason": None}
    if recipe.weights == "random":
        return facts | {"used": "random", "digest": None}
    if recipe.weights != "pretrained":
        check(recipe)
        path = config.absolute(recipe.weights)
        try:
            digest = _digest(path)
        except OSError as error:
            raise UsageError(f'weights: "{recipe.weights}" can\'t be read ({error.strerror})') from None
        return facts | {"requested": config.public_path(recipe.weights), "used": "file", "digest": digest}
    hub = _hub_file(recipe.model)
    file, reason = _fetch(*hub)
    if file is None:
        return facts | {"used": "random", "digest": None, "reason": reason}
    return facts | {"used": "pretrained", "digest": _digest(file), "hub": list(hub)}


def locate(facts: dict[str, Any], recipe: config.Recipe) -> Path | None:
    """The file that `resolve` found, None for random weights. Raises StageError where it has changed."""
    if facts["used"] == "random":
        return None
    path = config.absolute(recipe.weights) if facts["used"] == "file" else cached_file(*facts["hub"])
    if path is None or not path.is_file() or _digest(path) != facts["digest"]:
        raise StageError("the weights changed since `download` looked at them: run it again (`dvc repro`)")
    return path


def is_cached(model: str) -> bool:
    """Whether the pretrained weights of `model` were downloaded before. Does not import timm."""
    hub = _known_hub_files().get(model)
    return hub is not None and cached_file(*hub) is not None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _hub_file(model: str) -> tuple[str, str]:
    """Repository and file on the hub. Importing timm to ask it takes seconds, so its answers are cached."""
    hub_files = _known_hub_files()
    if model not in hub_files:
        from pipeline.models.classifier import hub_file

        answer = hub_file(model)
        if answer is None:
            raise UsageError(f'weights: "pretrained" is not there for {model}: expected random | a .safetensors file')
        hub_files[model] = list(answer)
        files.write_json(datasets.CACHE / "hub.json", hub_files)
    repository, name = hub_files[model]
    return repository, name


def _known_hub_files() -> dict[str, list[str]]:
    """Repository and file by model, as timm answered before. What is damaged is left out."""
    try:
        known = json.loads((datasets.CACHE / "hub.json").read_bytes())
        return {model: names for model, names in known.items() if [type(name) for name in names] == [str, str]}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def cached_file(repository: str, name: str) -> Path | None:
    """The path of a file that was downloaded from the hub before, else None."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repository, name)
    return Path(path) if isinstance(path, str) else None


def _fetch(repository: str, name: str) -> tuple[Path | None, str | None]:
    """The published file, from the hub's own cache or downloaded now; or the reason why it can't be had."""
    path = cached_file(repository, name)
    if path and _is_whole(path):
        return path, None
    from huggingface_hub import hf_hub_download

    from pipeline.data import fetch

    if not fetch.reachable([HUB]):
        return None, f"{HUB} does not answer"

    try:
        if path:
            _remove(path)
        path = Path(hf_hub_download(repository, name))
        if _is_whole(path):
            return path, None
        _remove(path)  # else the next run would find it
        return None, f"{HUB} sent a damaged file"
    except Exception as error:  # the hub's client raises whatever its transport raises
        return None, f"{HUB}: {first_line(error)}"


def _is_whole(path: Path) -> bool:
    """Whether a .safetensors file can be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            return True
    except (OSError, SafetensorError):
        return False


def _remove(path: Path) -> None:
    """Remove a file of the hub's cache, which may be a link."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)
