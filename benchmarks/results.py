"""What the benchmarks share: their command line, the conditions they ran under, ratios with their spread, JSON."""

import argparse
import datetime
import math
import platform
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pipeline import config, devices, files
from pipeline.errors import StageError
from pipeline.profiling import system_info, system_state

FOLDER = config.ROOT / "reports" / "bench"

LOSSES_WITHIN = 0.02
"""How far the first epoch's mean losses of two ways to do the same work may be apart, as a share: they take the images
in different orders, and perhaps in different formats."""

ACCURACIES_WITHIN = 0.005
"""How far their accuracies after the last epoch may be apart."""

TOLD_FROM = 2000
"""Images that accuracies are judged by at least: so many that ACCURACIES_WITHIN is ten of them."""

TELLING = ("power_source", "low_power_mode", "cpu_load", "swapping", "gpu_load", "gpu_processes", "gpu_throttle")
"""What of the machine's state is kept beside the figures."""


def parser(doc: str | None, rounds: str = "--rounds", times: int = 3) -> argparse.ArgumentParser:
    """A command line with -S, and how often all take their turns."""
    words = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("-S", dest="overrides", metavar="key=value", action="append", default=[], help="as the pipeline")
    words.add_argument(rounds, type=whole, default=times, metavar="N", help=f"how often all is done ({times})")
    return words


def whole(text: str) -> int:
    """A number of a command line, from 1 on."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


@contextmanager
def in_one_line() -> Iterator[None]:
    """Ends the process with a line and status 2 where a setting is wrong, or can't be had here."""
    try:
        yield
    except StageError as error:
        print(error, file=sys.stderr)
        sys.exit(error.status)


def settings_of(overrides: Sequence[str]) -> config.Settings:
    """The settings with `key=value` laid over, later ones over earlier; a wrong one ends the process with status 2."""
    with in_one_line():
        return config.load(overrides)


def conditions_of(settings: config.Settings, overrides: Sequence[str]) -> dict[str, Any]:
    """What the figures hold for; to be asked before anything of ours runs, since other load is part of it. `overrides`:
    the command's own; no absolute path of them is kept."""
    backend = devices.select(settings.device)
    here = system_info.facts()
    state = system_state.sample(backend.gpu_uuid())
    told = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": backend.facts()["name"],
        "device": backend.kind,
        "cpu": here.get("cpu"),
        "cores": here.get("usable_cores") or here.get("logical_cores"),
        "os": here.get("os"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": settings.work.threads or torch.get_num_threads(),
        "state before": {key: state[key] for key in TELLING if key in state},
        "settings": [_shareable(text) for text in overrides],
    }
    return {key: value for key, value in told.items() if value is not None}


def ratios(values: Sequence[float]) -> dict[str, Any]:
    """Median and spread of what the rounds gave."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "n": len(values),
        "values": list(values),
    }


def row(name: str, what: str, found: dict[str, Any], unit: str = "") -> None:
    """One line of what `ratios` gave."""
    median, low, high = (f"{found[key]:.4g}" for key in ("median", "min", "max"))
    print(f"{name:13} {what:66} {median:>6}{unit} ({low} to {high}, n = {found['n']})", flush=True)


def judges(settings: config.Settings, validated: int) -> bool:
    """Whether accuracies of `validated` images tell if two ways did the same work: not after a learning rate or
    schedule other than the recipe's own, made small so that little is learnt, and not of a few images."""
    recipe, own = settings.work, config.load([f"recipe={settings.recipe}"]).work
    learns = (recipe.lr, recipe.scheduler, recipe.warmup_epochs) == (own.lr, own.scheduler, own.warmup_epochs)
    return learns and validated >= TOLD_FROM


def disagreement(
    losses: tuple[Sequence[float], Sequence[float]],
    accuracies: tuple[Sequence[float], Sequence[float]] | None = None,
) -> str | None:
    """Why two ways of a benchmark, baseline and ours, did not do the same work, by the means of their rounds; None
    where they did."""
    theirs, mine = map(statistics.fmean, losses)
    if not math.isfinite(theirs) or not math.isfinite(mine) or abs(theirs - mine) > LOSSES_WITHIN * theirs:
        return f"the first epoch's losses disagree, {theirs:.4f} and {mine:.4f}: not the same work"
    if accuracies is not None:
        theirs, mine = map(statistics.fmean, accuracies)
        if abs(theirs - mine) > ACCURACIES_WITHIN + 1e-9:
            return f"the accuracies disagree, {theirs:.2%} and {mine:.2%}: no speed without parity"
    return None


def write(name: str, under: dict[str, Any], result: dict[str, Any]) -> Path:
    """Leaves `result`, and the conditions it was found under, as JSON; says where."""
    path = FOLDER / f"{name}.json"
    files.write_json(path, {"benchmark": name, "conditions": under, "result": result})
    print(f"written: {path.relative_to(config.ROOT) if path.is_relative_to(config.ROOT) else path.name}")
    return path


def _shareable(text: str) -> str:
    key, equals, value = text.partition("=")
    return key + equals + config.public_path(value.strip("\"'"))
