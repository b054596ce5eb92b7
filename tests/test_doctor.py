"""What `doctor` finds, by the checks' names and statuses, and its exit status. Nothing here asks the network."""

import importlib.metadata
import json
import sqlite3
import subprocess
import sys
import threading
import warnings
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import fails
from packaging.requirements import Requirement
from standin import Standin

from pipeline import config, doctor
from pipeline.data import fetch
from pipeline.devices.cpu import Cpu
from pipeline.errors import UsageError
from pipeline.models import weights

CHECKS = [
    "environment",
    "packages",
    "machine",
    "torch",
    "device",
    "work",
    "weights",
    "data",
    "disk",
    "store",
    "waiting",
]


class Unused(Standin):
    """A backend whose GPU this torch can't use."""

    @classmethod
    def count(cls):
        return 0

    @classmethod
    def why_unused(cls, gpu):
        return "its driver is too old: make run TORCH=cu126"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Calls the command with arguments, a store that does not exist, and no need of the network; gives (exit status,
    stdout, stderr)."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/store.db")

    def main(*arguments):
        synthetic = ["-S", "data.source=synthetic", "-S", "weights=random", "-S", "device=cpu"]
        monkeypatch.setattr(sys, "argv", ["doctor.py", *synthetic, *arguments])
        with pytest.raises(SystemExit) as ended:
            doctor.main()
        return ended.value.code, *capsys.readouterr()

    return main


def test_a_clean_run_is_status_0_and_nothing_is_created(run, tmp_path):
    status, out, err = run("--json")
    results = json.loads(out)
    assert [result["check"] for result in results] == CHECKS
    assert all(list(result) == ["check", "status", "message", "command"] for result in results)
    assert (status, err) == (0, "")
    assert {result["check"]: result["status"] for result in results}["store"] == "ok"
    assert list(tmp_path.iterdir()) == []


def test_what_is_wrong_is_status_1_and_stands_on_a_page_with_its_command(run, tmp_path):
    (tmp_path / "store.db").write_text("no database")
    status, out, err = run("-S", "optimizer=adamww")
    rows = [line.split()[:2] for line in out.splitlines() if line and not line.startswith(" ")]
    assert [check for _, check in rows[:-1]] == CHECKS
    assert [check for mark, check in rows if mark == "wrong"] == ["work", "store"]
    assert "> mv store.db store.db.broken" in out and "did you mean adamw?" in out
    assert (status, err) == (1, "")


def test_a_wrong_setting_is_one_line_and_status_2(run):
    status, out, err = run("-S", "epochs=x", "--json")
    assert (status, out, len(err.splitlines())) == (2, "", 1) and "epochs" in err


def test_a_python_without_the_packages_is_told(tmp_path):
    command = [sys.executable, "-S", "-m", "pipeline.doctor", "--json"]  # -S: without site-packages
    ended = subprocess.run(command, cwd=config.ROOT, capture_output=True, text=True, timeout=60)
    results = {result["check"]: result for result in json.loads(ended.stdout)}
    assert (ended.returncode, ended.stderr) == (1, "")
    assert results["packages"]["status"] == "wrong" and results["packages"]["command"]


@pytest.mark.parametrize(
    ("version", "status"), [((3, 9, 6), "wrong"), ((3, 11, 0), "ok"), ((3, 13, 9), "ok"), ((3, 14, 0), "wrong")]
)
def test_pythons(version, status, monkeypatch):
    monkeypatch.setattr(doctor, "activation", lambda: None)
    result = doctor.check_environment(version)
    assert (result.status, result.command) == (status, "make run" if status == "wrong" else None)
    monkeypatch.setattr(doctor, "activation", lambda: ". .venv/bin/activate")
    result = doctor.check_environment(version)
    assert (result.status, result.command) == ("warn" if status == "ok" else "wrong", ". .venv/bin/activate")


def test_all_requirements_of_this_system_are_checked():
    lines = (config.ROOT / "requirements.txt").read_text().splitlines()
    expected = [Requirement(line.partition("#")[0]) for line in lines if not line.startswith("#")]
    names = [requirement.name for requirement in expected if not requirement.marker or requirement.marker.evaluate()]
    assert list(doctor.requirements()) == names


@pytest.mark.parametrize(
    ("installed", "status"),
    [
        ({"torch": "2.14.1+cu126", "timm": "1.0"}, "ok"),
        ({"torch": "2.14.0", "timm": "1.0"}, "warn"),
        ({"torch": "2.14.0"}, "wrong"),
    ],
)
def test_packages(installed, status):
    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    result = doctor.check_packages({"torch": "2.14.1", "timm": "1.0"}, version)
    assert result.status == status
    assert bool(result.command) == (status != "ok")
    assert ("timm" in result.message) == (status == "wrong")


@pytest.mark.parametrize(
    ("error", "message", "command"),
    [
        (ImportError("libcudart.so.13: cannot open\nmore"), "libcudart.so.13: cannot open", doctor.REINSTALL),
        (RuntimeError(), "RuntimeError", None),
    ],
)
def test_a_check_that_fails_is_one_line(error, message, command):
    def check(_):
        warnings.warn("a torch that sees an old driver", stacklevel=1)
        raise error

    assert doctor.attempt("torch", check, 1) == doctor.Result("torch", "wrong", message, command)


@pytest.mark.parametrize("broken", ["torch", "torchvision"])
def test_a_torch_that_cannot_be_imported_is_wrong(broken):
    def load(name):
        if name == broken:
            raise OSError("libcudart.so.13: cannot open shared object file")
        return torch

    result = doctor.check_torch(load)
    assert (result.status, result.command) == ("wrong", doctor.REINSTALL)


# --- device


def settings_with(*overrides):
    return config.load(["precision=fp32", "compile=auto", "graph=auto", *overrides])


GPU = {"vendor": "NVIDIA", "name": "NVIDIA GTX 1060", "for_training": True}


def test_a_gpu_that_torch_cannot_use_is_wrong_unless_the_cpu_is_asked_for():
    result = doctor.check_device(settings_with("device=auto"), [GPU], [Unused, Cpu])
    assert (result.status, result.command) == ("wrong", "make run TORCH=cu126")
    assert "NVIDIA GTX 1060" in result.message and "DEMO" in result.message
    assert doctor.check_device(settings_with("device=cpu"), [GPU], [Unused, Cpu]).status == "ok"
    assert doctor.check_device(settings_with("device=auto"), [], [Unused, Cpu]).message.startswith("cpu: ")


def test_a_device_or_precision_that_cannot_be_had_is_refused():
    assert "mps" in fails(UsageError, doctor.check_device, settings_with("device=mps"), [], [Unused, Cpu])
    assert "fp16" in fails(UsageError, doctor.check_device, settings_with("device=cpu", "precision=fp16"), [], [Cpu])


def test_mps_that_is_built_and_not_available_is_told(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    result = doctor.check_device(settings_with("device=auto"), [], [Unused, Cpu])
    assert result.status == "warn" and result.command and "MPS" in result.message


# --- data and weights


@pytest.mark.parametrize(
    ("source", "answers", "status", "word"),
    [
        ("auto", True, "warn", "170 MB"),
        ("cifar10", True, "warn", "170 MB"),
        ("auto", False, "wrong", "DEMO"),
        ("cifar10", False, "wrong", "fails"),
        ("synthetic", False, "ok", "generated"),
    ],
)
def test_missing_data(tmp_path, source, answers, status, word):
    data = config.load([f"data.source={source}", f"data.path={tmp_path / 'raw'}"]).data
    result = doctor.check_data(data, lambda urls: urls if answers else [])
    assert result.status == status and word in result.message
    assert bool(result.command) == (status == "wrong")


@pytest.mark.parametrize(("size", "status"), [(fetch.ARCHIVE_BYTES, "ok"), (5, "wrong")])
def test_the_archive_is_known_by_its_size(tmp_path, size, status):
    with (tmp_path / fetch.ARCHIVE).open("wb") as file:
        file.truncate(size)
    data = config.load(["data.source=auto", f"data.path={tmp_path}"]).data
    assert doctor.check_data(data, fetch.reachable).status == status


def test_a_folder_of_images(settings_of, tmp_path):
    assert "3 classes" in doctor.check_data(settings_of().data).message
    fails(UsageError, doctor.check_data, config.load(["data.source=folder", f"data.path={tmp_path}"]).data)


@pytest.mark.parametrize(
    ("setting", "cached", "answers", "status"),
    [
        ("random", False, False, "ok"),
        ("pretrained", True, False, "ok"),
        ("pretrained", False, True, "warn"),
        ("pretrained", False, False, "wrong"),
        ("missing.safetensors", False, False, "wrong"),
    ],
)
def test_weights(monkeypatch, setting, cached, answers, status):
    monkeypatch.setattr(weights, "cached_file", lambda *hub: "a file" if cached else None)
    recipe = config.load([f"weights={setting}", "model=resnet18.a1_in1k"]).work
    result = doctor.check_weights(recipe, lambda urls: urls if answers else [])
    assert (result.status, bool(result.command)) == (status, status == "wrong")


# --- disk and store


@pytest.mark.parametrize(("source", "free"), [("synthetic", doctor.RUN_BYTES), ("auto", fetch.ARCHIVE_BYTES)])
def test_disk_space(tmp_path, source, free):
    data = config.load([f"data.source={source}", f"data.path={tmp_path / 'data' / 'raw'}"]).data
    root = tmp_path / "project"
    root.mkdir()

    def space(folder):
        return free if (folder == tmp_path) == (source == "auto") else 2 * doctor.RUN_BYTES

    assert doctor.check_disk(data, root, space).status == "ok"
    free -= 1
    assert doctor.check_disk(data, root, space).status == "wrong"


@pytest.fixture
def check_store(monkeypatch):
    """Checks the store at an address, with no patience, and no name or password in the environment."""
    for key in ("USERNAME", "PASSWORD", "TOKEN", "INSECURE_TLS", "SERVER_CERT_PATH"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{key}", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(doctor, "TIMEOUT_SECONDS", 0.5)

    def check(uri):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        return doctor.check_store("trainmark")

    return check


def test_an_sqlite_store_is_read_and_not_changed(tmp_path, check_store):
    path = tmp_path / "a store.db"
    uri = f"sqlite:///{path}"
    with closing(sqlite3.connect(path)) as database:
        assert check_store(uri).status == "ok"  # an empty file
        database.execute("create table runs (run_uuid)")
        database.execute("insert into runs values (1)")
        database.commit()
        before = path.read_bytes()
        result = check_store(uri)
        assert result.status == "ok" and "1 runs" in result.message
        database.execute("begin exclusive")
        assert check_store(uri).status == "warn"
    assert path.read_bytes() == before
    path.write_text("no database")
    assert check_store(uri).command == "mv 'a store.db' 'a store.db.broken'"
    assert check_store(f"sqlite:///{tmp_path}/absent/mlflow.db").status == "wrong"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@contextmanager
def server(status, body=b"{}"):
    """A stand-in of MLflow's server; yields its address and the headers that it got."""
    headers = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            headers.append(self.headers)
            done.wait(5 if status is None else 0)
            self.send_response(status or 200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    done = threading.Event()
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"127.0.0.1:{httpd.server_port}", headers
    finally:
        done.set()
        httpd.shutdown()
        thread.join()
        httpd.server_close()


@pytest.mark.parametrize(
    ("code", "body", "status", "command"),
    [
        (200, b"{}", "ok", None),
        (404, b'{"error_code": "RESOURCE_DOES_NOT_EXIST"}', "ok", None),
        (404, b"some other server", "wrong", "unset MLFLOW_TRACKING_URI"),
        (401, b"", "wrong", "MLFLOW_TRACKING_USERNAME"),
        (500, b"", "wrong", "unset MLFLOW_TRACKING_URI"),
        (None, b"", "wrong", "unset MLFLOW_TRACKING_URI"),  # silent
    ],
)
def test_a_server_is_asked_and_no_secret_is_shown(check_store, code, body, status, command):
    with server(code, body) as (address, headers):
        result = check_store(f"http://me:pass-word@{address}/")
    assert result.status == status
    assert (command in result.command) if command else result.command is None
    assert address in result.message and "pass-word" not in repr(result)
    assert headers[0]["Authorization"].startswith("Basic ")


def test_the_environments_name_and_password_are_sent(check_store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "pass-word")
    with server(200) as (address, headers):
        assert check_store(f"http://{address}").status == "ok"
    assert headers[0]["Authorization"] == "Basic bWU6cGFzcy13b3Jk"


def test_a_server_or_database_that_is_away_is_wrong(check_store):
    with server(200) as (address, _):
        assert check_store(f"postgresql+psycopg2://me:pass-word@{address}/runs").status == "ok"
    for scheme in ("http", "postgresql"):
        result = check_store(f"{scheme}://me:pass-word@{address}/runs")
        assert result.status == "wrong" and "pass-word" not in repr(result)
    assert check_store("databricks").status == "warn"


def test_runs_that_wait_are_told(tmp_path):
    assert doctor.check_waiting(list).status == "ok"
    result = doctor.check_waiting(lambda: [tmp_path])
    assert (result.status, result.command) == ("warn", "python -m pipeline.publish")
