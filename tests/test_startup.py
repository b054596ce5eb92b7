"""A command that can't start says in one line what to run, whatever package is missing or broken."""

import os
import subprocess
import sys

import pytest

from pipeline import startup
from pipeline.config import ROOT

NOT_THERE = "ModuleNotFoundError(\"No module named 'NAME'\", name='NAME')"
LIBRARY = "libcudnn.so.9: cannot open shared object file"


@pytest.fixture
def python(tmp_path):
    """Runs Python with a package whose import raises an error; returns the exit status and stderr."""

    def run(package, error, *arguments):
        (tmp_path / f"{package}.py").write_text(f"raise {error.replace('NAME', package)}\n")
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
        done = subprocess.run(
            [sys.executable, *arguments], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stderr

    return run


@pytest.mark.parametrize("package", ["yaml", "tqdm"])
@pytest.mark.parametrize("command", ["pipeline", "pipeline.run", "pipeline.train", "pipeline.compare"])
def test_a_missing_package_is_named(python, package, command):
    status, err = python(package, NOT_THERE, "-m", command, "--help")
    assert (status, err) == (1, f"{command.rpartition('.')[2]}: {package} is missing: {startup.INSTALL}\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (NOT_THERE, f"torch is missing: {startup.INSTALL}"),
        (f"ImportError('{LIBRARY}')", f"{LIBRARY}: {startup.REINSTALL}"),
        (f"OSError('{LIBRARY}')", f"{LIBRARY}: {startup.REINSTALL}"),
        ("AttributeError('no attribute')", f"no attribute: {startup.REINSTALL}"),
        ("NotADirectoryError(20, 'Not a directory', '/a/cache')", "can't use /a/cache: Not a directory"),
    ],
)
def test_what_is_wrong_with_torch_is_one_line(python, error, line):
    code = "import sys; sys.argv[0] = '-m'; import pipeline; sys.argv[0] = 'train.py'; import pipeline.devices"
    assert python("torch", error, "-c", code) == (1, f"train: {line}\n")


def test_an_error_of_our_own_keeps_its_traceback(python):
    code = "import sys; sys.argv[0] = '-m'; import pipeline; from pipeline import cli; cli.Parser().error()"
    status, err = python("unused", "0", "-c", code)
    assert status == 1 and "Traceback" in err


def test_where_the_environment_is_not_active_its_activation_is_the_advice(tmp_path, monkeypatch):
    (tmp_path / ".venv").mkdir()
    monkeypatch.setattr(startup, "ROOT", tmp_path)
    expected = r".venv\Scripts\activate" if sys.platform == "win32" else ". .venv/bin/activate"
    assert startup.describe(ModuleNotFoundError("x", name="scipy.stats")) == f"scipy is missing: {expected}"
    assert startup.describe(ImportError("broken")) == f"broken: {expected}"
