"""Trainmark: what is a machine worth for training? The same work on every machine, side by side."""

import ast
import sys
from pathlib import Path

from pipeline import cli, terminal
from pipeline.errors import UsageError

STAGES = ("hardware", "download", "train", "evaluate", "sustain", "compare")
"""The stages in the order in which `dvc repro` runs them."""


def commands() -> dict[str, str]:
    """Each module that is a command, with the first line of its docstring. None of them is imported."""
    sources = {path.stem: path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("[a-z]*.py"))}
    trees = {name: ast.parse(text) for name, text in sources.items() if '\nif __name__ == "__main__":' in text}
    return {name: (ast.get_docstring(tree) or "").partition("\n")[0] for name, tree in trees.items()}


def overview() -> str:
    """What `python -m pipeline` prints."""
    known = commands()
    stages = [f"  python -m pipeline.{name:9} {known[name]}" for name in STAGES]
    others = [f"  python -m pipeline.{name:9} {text}" for name, text in known.items() if name not in STAGES]
    lines = [__doc__, "\nThe stages, in order; `dvc repro` runs those whose inputs changed:", *stages]
    lines += ["\nOther commands:", *others, "\nEach has --help, which shows its settings and examples."]
    return "\n".join(lines)


def main() -> None:
    """Print the commands."""
    with cli.exit_on_error("python -m pipeline"):
        for word in sys.argv[1:]:
            if word not in ("-h", "--help"):
                hint = f"; did you mean python -m pipeline.{word}?" if word in commands() else ""
                raise UsageError(f"{word}: unknown argument: expected none{hint}")
        terminal.say(overview())


if __name__ == "__main__":
    main()
