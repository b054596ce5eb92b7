"""Files that are whole or absent: written aside, synced, renamed. And small files of the system."""

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import StageError


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to; on a clean exit it is synced and takes the name `path`.

    Raises StageError where the disk is full or the folder can't be written.
    """
    aside: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
        aside = Path(name)
        yield aside
        with aside.open("r+b") as file:
            os.fsync(file.fileno())
        aside.chmod(0o644)  # mkstemp makes a file that only its owner can read
        aside.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        if aside is not None:
            aside.unlink(missing_ok=True)


def cannot_write(path: Path, error: OSError) -> StageError:
    """The error that tells a person why `path` can't be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StageError(f"no disk space left to write {path.name}: free some and run it again")
    return StageError(f"can't write {path}: {error.strerror or error}")


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text, whole or not at all."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8", newline="\n")


def json_text(value: Any) -> str:
    """JSON that a person can read; NaN and infinities are refused (ValueError)."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Writes JSON that a person can read, whole or not at all; NaN and infinities are refused (ValueError)."""
    write_text(path, json_text(value))


def read_json(path: Path) -> Any:
    """Reads JSON. Raises StageError naming the stage to run when the file is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StageError(f"{path} is missing: run the stage that makes it (`dvc repro`)") from None
    except (OSError, ValueError) as error:
        raise StageError(f"{path} can't be read ({error}): delete it and run `dvc repro` again") from error


def contents(path: Path) -> str:
    """The text of a file, without blanks at its ends; empty where it can't be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
