"""Errors that end a command with one line on stderr, not a traceback, and suggestions for misspelt names."""

import difflib
from collections.abc import Iterable
from typing import Any

SYNONYMS = {
    "batch": "batch_size",
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "half": "fp16",
    "learning_rate": "lr",
    "num_epochs": "epochs",
    "n_epochs": "epochs",
    "max_epochs": "epochs",
    "resolution": "image_size",
    "dataset": "data.source",
    "amp": "precision",
    "dtype": "precision",
    "num_threads": "threads",
    "warmup": "warmup_epochs",
    "gpu": "cuda",
    "nvidia": "cuda",
    "amd": "cuda",
    "rocm": "cuda",
    "metal": "mps",
    "apple": "mps",
    "intel": "xpu",
}
"""Other names for settings and values -> their names in this project."""


class StageError(Exception):
    """The command fails although all settings are right: a full disk, a store that does not answer."""

    status = 1


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end. `status` is its exit status."""

    def __init__(self, status: int):
        super().__init__()
        self.status = status


class OutOfMemoryError(StageError):
    """The device has too little memory for these settings."""


class UsageError(StageError):
    """A user's mistake. The message names the setting, its value and the allowed values."""

    status = 2


def nearest(name: Any, names: Iterable[str]) -> str:
    """The most similar of `names`, or '' if none is similar."""
    by_plain = {_plain(known): known for known in names}
    if (synonym := SYNONYMS.get(_plain(name))) in by_plain:
        return synonym
    close = difflib.get_close_matches(_plain(name), by_plain, n=1, cutoff=0.7)
    return by_plain[close[0]] if close else ""


def hint(name: Any, names: Iterable[str]) -> str:
    """The end of an error message that suggests the most similar of `names`, or ''."""
    close = nearest(name, names)
    return f"; did you mean {close}?" if close else ""


def _plain(name: Any) -> str:
    return str(name).lower().replace("-", "_")
