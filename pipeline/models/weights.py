"""What a model starts from: random numbers, a file, or the weights that timm publishes. No torch until needed."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pipeline import config, files
from pipeline.data import fetch
from pipeline.data.datasets import CACHE
from pipeline.errors import StageError, UsageError

HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def resolve(recipe: config.Recipe) -> dict[str, Any]:
    """Finds (and for pretrained ones fetches) the weights; says what they are, without an absolute path.

    Keys: `model`, `requested`, `used` (pretrained | random | file), `digest` (of the file, null for random ones),
    `hub` ([repository, file] of pretrained ones, else null), `reason` (of a fallback, else null).
    Raises UsageError for weights that the user must name otherwise.
    """
    facts: dict[str, Any] = {"model": recipe.model, "requested": recipe.weights, "hub": None, "reason": None}
    if recipe.weights == "random":
        return facts | {"used": "random", "digest": None}
    if recipe.weights != "pretrained":
        path = config.absolute(recipe.weights)
        if not path.is_file():
            raise UsageError(f'weights: "{recipe.weights}" is not there: expected pretrained | random | a file')
        return facts | {"requested": config.shareable(recipe.weights), "used": "file", "digest": _digest(path)}
    hub = _hub_file(recipe.model)
    file, reason = _fetched(*hub)
    if file is None:
        return facts | {"used": "random", "digest": None, "reason": reason}
    return facts | {"used": "pretrained", "digest": _digest(file), "hub": list(hub)}


def located(facts: dict[str, Any], recipe: config.Recipe) -> Path | None:
    """The file that `resolve` found, None for random weights. Raises StageError where it is no longer the same."""
    if facts["used"] == "random":
        return None
    path = config.absolute(recipe.weights) if facts["used"] == "file" else _kept(*facts["hub"])
    if path is None or not path.is_file() or _digest(path) != facts["digest"]:
        raise StageError("the weights changed since `download` looked at them: run it again (`dvc repro`)")
    return path


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _hub_file(model: str) -> tuple[str, str]:
    """Asking timm takes seconds, so its answer is kept."""
    kept = CACHE / "hub.json"
    known: dict[str, list[str]] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    if model not in known:
        from pipeline.models.classifier import hub_file

        hub = hub_file(model)
        if hub is None:
            raise UsageError(f'weights: "pretrained" is not there for {model}: expected random | a .safetensors file')
        known[model] = list(hub)
        files.write_json(kept, known)
    repository, name = known[model]
    return repository, name


def _kept(repository: str, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, name)
    return Path(found) if isinstance(found, str) else None


def _fetched(repository: str, name: str) -> tuple[Path | None, str | None]:
    """The published file, from the hub's own cache or fetched now; or why it can't be had."""
    kept = _kept(repository, name)
    if kept is not None:
        return kept, None
    if not fetch.reachable(HUB):
        return None, f"{HUB} does not answer"
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name)), None
    except Exception as error:  # the hub's client raises whatever its transport does
        return None, f"{HUB}: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
