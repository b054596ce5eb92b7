"""Errors that end a command with one line on stderr instead of a traceback, and hints for misspelt names."""

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
"""What people type for the names of settings and values that are spelt otherwise here."""


class StageError(Exception):
    """The work can't go on, and no setting is wrong: a full disk, a store that does not answer."""

    status = 1


class OutOfMemoryError(StageError):
    """The device has too little memory for the work as it is set."""


class UsageError(StageError):
    """The user's mistake. The message names the setting, its value and what is allowed."""

    status = 2


def nearest(name: Any, names: Iterable[str]) -> str:
    """The one of `names` that was probably meant by `name`, or ''."""
    known = {_plain(known): known for known in names}
    if (synonym := SYNONYMS.get(_plain(name))) in known:
        return synonym
    close = difflib.get_close_matches(_plain(name), known, n=1, cutoff=0.7)
    return known[close[0]] if close else ""


def hint(name: Any, names: Iterable[str]) -> str:
    """The end of a message that names the nearest of `names`, or ''."""
    close = nearest(name, names)
    return f"; did you mean {close}?" if close else ""


def _plain(name: Any) -> str:
    return str(name).lower().replace("-", "_")
