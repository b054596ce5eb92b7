"""The command line of all stages: settings, --help, errors in one line, and exit status."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from pipeline import config, startup, terminal
from pipeline.errors import StageError, Stopped, UsageError

OUTPUTS = config.ROOT / "outputs"
"""Where stages write their files if they are run one by one, by DVC or by hand."""

OWN_SETTINGS = {
    "hardware": (),
    "download": ("recipe", "data", "recipes.NAME.model", "recipes.NAME.weights", "recipes.NAME.image_size"),
    "train": (
        "recipe",
        "device",
        "seed",
        "repeats",
        "repeat_pause",
        "resume",
        "data.device_gib",
        "energy",
        "recipes.NAME",
    ),
    "evaluate": ("recipe", "device", "label"),
    "sustain": ("device", "sustain_seconds", "largest_batch"),
    "compare": ("compare", "tracking"),
    "publish": (),
    "ui": ("tracking",),
    "doctor": ("recipe", "device", "data", "tracking", "recipes.NAME"),
}
"""Command -> settings and sections that its --help shows. --all shows the rest. Other commands show all."""

EXAMPLES = {
    "download": ["-S data.source=synthetic -S data.limit=50", "-S data.source=folder -S data.path=~/pictures"],
    "train": ["-S recipe=finetune -S epochs=2", "--optimizer sgd --scheduler cosine --lr 0.05", "-S device=cpu"],
    "evaluate": ["-S device=cpu", "-S label='under the desk'"],
    "sustain": ["-S sustain_seconds=20 -S largest_batch=false"],
    "compare": ["-S compare.reference='GTX 1060'", "-S tracking.experiment=results"],
    "ui": ["-S tracking.experiment=results"],
    "doctor": ["-S recipe=finetune", "-S device=cuda"],
    "run": [
        "-S recipe=finetune -S epochs=2",
        "-S device=cpu -S data.source=synthetic -S data.limit=50",
        "--recipe blog --optimizer sgd --scheduler cosine --lr 0.05",
        "-S data.source=folder -S data.path=~/pictures -S model=mobilenetv3_small_100.lamb_in1k",
    ],
}
"""Command -> arguments of the examples in its --help."""

SCALAR = str | int | float | None
"""The types of the settings whose values --help shows."""

SETTINGS_TITLE = "settings (params.yaml) with their allowed values and [the value now]; NAME is the chosen recipe:"

NOTES = """\
A recipe's key alone (epochs, lr, ...) means the chosen recipe. dvc exp run needs the whole key: recipes.finetune.lr.
Values are YAML: true, null, 1e-3, [layer4, fc].
Exit status: 0 done, 1 something failed, 2 a setting is wrong, 130 stopped by Ctrl-C, 143 by SIGTERM."""


class Parser(argparse.ArgumentParser):
    """A parser for commands without settings. It reports a wrong argument as the stages do: in one line."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        raise UsageError(f"{message} (see --help)")


def parse_settings(arguments: Sequence[str], doc: str, program: str) -> config.Settings:
    """The settings of params.yaml, changed by the command line. Raises UsageError. After --help, exits with 0."""
    overrides: list[str] = []
    rest = list(arguments)
    if {"-h", "--help"} & {*rest}:
        terminal.say(_help(doc, program, everything="--all" in rest))
        raise SystemExit(0)
    while rest:
        word = rest.pop(0)
        if word in ("-S", "--set-param"):
            if not rest:
                raise UsageError(f"{word}: expected key=value after it, such as -S epochs=2")
            overrides.append(rest.pop(0))
        elif word.startswith("-S") or (word.startswith("--") and "=" in word):
            overrides.append(word[2:].removeprefix("set-param="))
        elif word.startswith("--") and len(word) > 2:
            if not rest or rest[0].startswith("--"):
                raise UsageError(f"{word}: expected a value after it")
            overrides.append(f"{word[2:]}={rest.pop(0)}")
        else:
            raise UsageError(f"{word}: unknown argument: expected -S key=value or --key value (see --help)")
    return config.load(overrides)


def parse_early(doc: str | None) -> config.Settings:
    """Read the settings before the stage imports torch, so that --help and error messages appear without a delay."""
    with exit_on_error(program()):
        return parse_settings(sys.argv[1:], doc or "", program())


def main(stage: Callable[[config.Settings, Path], Any], doc: str | None) -> None:
    """Run a stage with the settings of the command line, and exit with its status if it fails."""
    with exit_on_error(program()):
        stage(parse_settings(sys.argv[1:], doc or "", program()), OUTPUTS)


def leave() -> NoReturn:
    """End the process with status 0 at once. Taking down torch and MLflow would take seconds."""
    terminal.flush()
    os._exit(0)


def program() -> str:
    """The command that the user typed, such as `python -m pipeline.train`."""
    return f"python -m pipeline.{Path(sys.argv[0]).stem}"


@contextmanager
def exit_on_error(program: str) -> Iterator[None]:
    """If the block fails, print one line on stderr and exit with the error's status."""
    name = program.replace(" ", ".").split(".")[-1]
    try:
        yield
    except StageError as error:
        terminal.say_error(f"{name}: {error}")
        sys.exit(error.status)
    except (ImportError, OSError) as error:
        terminal.say_error(f"{name}: {startup.describe(error)}")
        sys.exit(1)
    except KeyboardInterrupt as error:
        status = error.status if isinstance(error, Stopped) else 130
        terminal.say_error(f"\n{name}: stopped by {'SIGTERM' if status == 143 else 'Ctrl-C'}")
        sys.exit(status)


def _help(doc: str, program: str, everything: bool) -> str:
    name = program.split(".")[-1]
    described = rows = config.describe()
    if name in OWN_SETTINGS and not everything:
        sections = tuple(f"{key}." for key in OWN_SETTINGS[name])
        rows = [row for row in described if f"{row[0]}.".startswith(sections)]
    width = max((len(key) for key, *_ in rows), default=0)
    values = _values()
    parts = [f"usage: {program} [-S key=value ...] [--key value ...]", doc.strip()]
    if rows:
        lines = [f"  {key:{width}}  {meaning} ({allowed}){values.get(key, '')}" for key, allowed, meaning in rows]
        parts.append("\n".join([SETTINGS_TITLE, *lines]))
    if len(rows) < len(described):
        parts.append(f"{program} --help --all shows every setting of params.yaml.")
    examples = [f"  {program} {arguments}".rstrip() for arguments in EXAMPLES.get(name, [""])]
    parts += ["\n".join(["examples:", *examples]), NOTES]
    return "\n\n".join(parts)


def _values() -> dict[str, str]:
    """The values in params.yaml, for the keys of `config.describe`; empty if the file can't be read."""
    try:
        settings = config.load()
    except UsageError:
        return {}
    tree = config.flatten(dataclasses.asdict(settings) | {"recipes": {"NAME": settings.work.resolved()}})
    return {
        key: f" [{json.dumps(value, ensure_ascii=False)}]" for key, value in tree.items() if isinstance(value, SCALAR)
    }
