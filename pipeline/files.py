"""Write files atomically, so that they are complete or absent, and read small files."""

import errno
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pipeline.errors import StageError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder. If the block succeeds, sync it to the disk and rename it to `path`.

    Raises StageError if the disk is full or the folder can't be written.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp lets only the owner read it
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_error(path: Path, error: OSError) -> StageError:
    """The error to raise if `path` can't be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StageError(f"no disk space left to write {path.name}: free some and run it again")
    return StageError(f"can't write {path}: {error.strerror or error}")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def json_text(value: Any) -> str:
    """Format indented JSON. Raises ValueError for NaN and infinities."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically. Raises ValueError for NaN and infinities."""
    write_text(path, json_text(value))


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises StageError, with the command to run, if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StageError(f"{path} is missing: run the stage that makes it (`dvc repro`)") from None
    except (OSError, ValueError, RecursionError) as error:
        raise StageError(f"{path} can't be read ({error}): delete it and run `dvc repro` again") from error


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk. Windows has no such call."""
    if sys.platform != "win32":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def link(source: str | Path, target: str | Path) -> None:
    """Hard-link a file, which takes no space; copy it if the file system can't. An existing target stays."""
    if not Path(target).exists():
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)


def lock(path: Path, patience_seconds: float = 0.0) -> IO[str]:
    """Lock a file until it is closed or the process ends. Raises StageError if another process has locked it, and still
    has after `patience_seconds`."""
    deadline = time.monotonic() + patience_seconds
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise write_error(path, error) from error
    while not _try_lock(file, shared=False):
        if time.monotonic() >= deadline:
            file.close()
            raise StageError(f"{path}: another process has locked it")
        time.sleep(0.05)
    return file


def is_locked(path: Path) -> bool:
    """Whether a process has locked a file. Two processes may ask at once."""
    try:
        with path.open() as file:
            return not _try_lock(file, shared=True)
    except FileNotFoundError:
        return False


def _try_lock(file: IO[str], *, shared: bool) -> bool:
    try:
        if sys.platform == "win32":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def contents(path: Path) -> str:
    """The stripped text of a file; '' if it can't be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
