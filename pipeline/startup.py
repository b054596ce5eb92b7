"""Say in one line why a command can't start: a package is missing or broken, or a folder can't be used."""

# Only the standard library is imported: a Python that is old or lacks our packages must be able to say so.
from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parent.parent
INSTALL = "pip install -r requirements.txt"
REINSTALL = "pip install --force-reinstall -r requirements.txt"


def activation() -> str | None:
    """The command that activates `.venv`; None if it is active, or there is none."""
    venv = ROOT / ".venv"
    if not venv.is_dir() or Path(sys.prefix).resolve() == venv.resolve():
        return None
    return r".venv\Scripts\activate" if sys.platform == "win32" else ". .venv/bin/activate"


def first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def describe(error: BaseException) -> str:
    """An error of an import, or of the system, in one line that says what to run."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"can't use {error.filename}: {error.strerror}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{error.name.partition('.')[0]} is missing: {activation() or INSTALL}"
    return f"{first_line(error)}: {activation() or REINSTALL}"


def excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print one line for Ctrl-C and for an error while our modules are imported, and a traceback for any other."""
    name = Path(sys.argv[0]).stem.replace("__main__", "pipeline")
    if isinstance(error, KeyboardInterrupt):
        print(f"\n{name}: stopped by Ctrl-C", file=sys.stderr)
    elif _is_import(error, traceback):
        print(f"{name}: {describe(error)}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def _is_import(error: BaseException, traceback: TracebackType | None) -> bool:
    """Whether a module of ours, not a function, imported what raised the error."""
    frames = []
    while traceback:
        code = traceback.tb_frame.f_code
        frames.append((ROOT / "pipeline" in Path(code.co_filename).parents, code.co_name))
        traceback = traceback.tb_next
    names = [name for is_ours, name in frames if is_ours]
    return names[-1:] == ["<module>"] and (isinstance(error, ImportError) or not frames[-1][0])
