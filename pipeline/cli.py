"""The command line that every stage shares: settings, --help, errors as one line, exit status."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from pipeline import config
from pipeline.errors import StageError, UsageError

OUTPUTS = config.ROOT / "outputs"
"""Where the stages leave their files when DVC or a person calls them one by one."""

EXAMPLES = """\
examples:
  python -m pipeline.run -S recipe=finetune -S epochs=2
  python -m pipeline.run -S device=cpu -S data.source=synthetic -S data.limit=50
  python -m pipeline.run --recipe blog --optimizer sgd --scheduler cosine --lr 0.05
  python -m pipeline.run -S data.source=folder -S data.path=pictures -S model=mobilenetv3_small_100.lamb_in1k
  dvc repro                                   # the same stages, those whose inputs changed
  dvc exp run -S recipe=finetune -S recipes.finetune.lr=0.01

A key of a recipe alone (epochs, lr, ...) means that of the chosen recipe.
Values are YAML: true, null, 1e-3, [layer4, fc].
Exit status: 0 done, 1 something failed, 2 a setting is wrong, 130 stopped by Ctrl-C."""


class Parser(argparse.ArgumentParser):
    """Of the commands that take no settings: refuses in one line, as the stages do."""

    def error(self, message: str) -> NoReturn:
        """Raises UsageError."""
        raise UsageError(f"{message} (see --help)")


def settings_from(arguments: Sequence[str], doc: str, program: str) -> config.Settings:
    """The settings of params.yaml with the command line's laid over. Raises UsageError; --help exits 0."""
    overrides: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            print(_help(doc, program))
            raise SystemExit(0)
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


def answer_early(doc: str | None) -> config.Settings:
    """The settings, before a stage imports torch, which takes seconds: answers --help, and refuses a wrong one."""
    sys.excepthook = _stopped_early
    with ending(program()):
        return settings_from(sys.argv[1:], doc or "", program())


def main(stage: Callable[[config.Settings, Path], Any], doc: str | None) -> None:
    """Runs one stage from the command line and ends the process with its exit status."""
    with ending(program()):
        stage(settings_from(sys.argv[1:], doc or "", program()), OUTPUTS)


def program() -> str:
    """The command as a person types it."""
    return f"python -m pipeline.{Path(sys.argv[0]).stem}"


def _stopped_early(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """What is printed of an exception that nothing catches: of Ctrl-C while modules are imported, no traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print(f"\n{program().split('.')[-1]}: stopped by Ctrl-C", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


@contextmanager
def ending(program: str) -> Iterator[None]:
    """Ends the process in one line, and with the exit status of the error, where the block can't go on."""
    try:
        yield
    except StageError as error:
        print(f"{program.split('.')[-1]}: {error}", file=sys.stderr)
        sys.exit(error.status)
    except ModuleNotFoundError as error:
        print(f"{program.split('.')[-1]}: {error.name} is missing: pip install -r requirements.txt", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"\n{program.split('.')[-1]}: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)


def _help(doc: str, program: str) -> str:
    width = max(len(key) for key, _, _ in config.describe())
    now = _now()
    rows = [f"  {key:{width}}  {meaning}: {allowed}{now.get(key, '')}" for key, allowed, meaning in config.describe()]
    usage = argparse.ArgumentParser(prog=program, usage=f"{program} [-S key=value ...] [--key value ...]")
    return "\n".join(
        [
            usage.format_usage().strip(),
            "",
            doc.strip(),
            "",
            "settings (params.yaml); in brackets what it holds now, NAME being the chosen recipe:",
            *rows,
            "",
            EXAMPLES,
        ]
    )


def _now() -> dict[str, str]:
    """What params.yaml holds, by the keys of `config.describe`, as --help shows it; nothing where it can't be read."""
    try:
        settings = config.load()
    except UsageError:
        return {}
    own = {
        "": vars(settings),
        "data.": vars(settings.data),
        "energy.": vars(settings.energy),
        "compare.": vars(settings.compare),
        "tracking.": vars(settings.tracking),
        "recipes.NAME.": settings.work.resolved(),
    }
    return {
        f"{prefix}{key}": f" [{json.dumps(value, ensure_ascii=False)}]"
        for prefix, values in own.items()
        for key, value in values.items()
        if not isinstance(value, dict | list | tuple) and not dataclasses.is_dataclass(value)
    }
