"""Faults, produced for real: with processes, servers and disks of their own, in a copy of the project.

`python -m pytest -m faults` tries all of them, which takes an hour or so. Those that take some seconds are `slow`, too,
so that they run before a change lands. docs/reliability.md says what each one shows.
"""

import base64
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from statistics import median

import psutil
import pytest
from processes import SETTINGS, Project
from servers import in_front_of, serving
from stores import fresh_store

from pipeline.data import fetch

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(sys.platform == "win32", reason="no process groups there"),
]
TRIES = int(os.environ.get("FAULT_TRIES", "50"))
"""How often a run is killed at a random moment."""

AWAY_SECONDS = float(os.environ.get("FAULT_SECONDS", "10"))
"""How long a store does not answer."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A project with an empty store, after the stages before the training."""
    project = Project(tmp_path_factory.mktemp("prepared") / "project")
    fresh_store(project.store, tmp_path_factory)
    project.run("hardware")
    project.run("download")
    return project


@pytest.fixture(scope="module")
def unbroken(prepared, tmp_path_factory):
    """What a training learns that nothing interrupts."""
    project = Project(tmp_path_factory.mktemp("unbroken") / "project", prepared)
    project.run("train")
    learnt = project.learnt(project.only_training())
    assert len(learnt) == 41
    return learnt


@pytest.fixture
def project(prepared, tmp_path):
    return Project(tmp_path / "project", prepared)


@pytest.fixture
def assert_complete(unbroken):
    """Assert that the store has one training, FINISHED, with each metric once and equal to the bit to those of an
    unbroken one, and that nothing waits."""

    def check(project, store=None):
        assert project.learnt(project.only_training(store=store), store) == unbroken
        assert project.waiting() == []

    return check


# --- killed


@pytest.mark.slow
@pytest.mark.parametrize("who", ["all", "driver", "child"])
def test_a_kill_loses_no_whole_epoch(project, assert_complete, who):
    command = project.start("train").wait_for("epoch 3/8")
    child = command.child()
    if who == "child":
        child.kill()
        command.end(137)
        run_id = project.only_training("KILLED")
    else:
        command.kill(whole=who == "all")
        psutil.wait_procs([child], timeout=10)
        assert not child.is_running()
        ((run_id, _),) = project.trainings() or [(None, None)]
    assert "resumed  after epoch" in project.run("train")
    assert_complete(project)
    assert run_id in (None, project.only_training())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_as_killed_and_the_same_command_goes_on(project, assert_complete, number):
    # SIGINT is ignored from birth where these tests run in the background of a shell.
    program = (
        "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"sys.argv[1:] = {[word for setting in SETTINGS for word in ('-S', setting)]!r}; "
        "runpy.run_module('pipeline.train', run_name='__main__', alter_sys=True)"
    )
    command = project.start_python("-c", program).wait_for("epoch 3/8")
    command.process.send_signal(number)
    command.end(128 + number)
    project.only_training("KILLED")
    assert "resumed  after epoch" in project.run("train")
    assert_complete(project)


def test_kills_at_random_moments_lose_nothing(prepared, tmp_path):
    """Five kills in a row, then the run is completed; TRIES kills in all, from a store that does not exist yet."""
    generator = random.Random(TRIES)
    began = time.monotonic()
    first = Project(tmp_path / "unbroken")
    first.run("run")
    seconds = time.monotonic() - began
    learnt = first.learnt(first.only_training())
    kills = chains = 0
    while kills < TRIES:
        chains += 1
        project = Project(tmp_path / str(chains))
        for _ in range(5):
            command = project.start("run")
            time.sleep(generator.uniform(0.05, seconds))
            kills += command.process.poll() is None
            command.kill(whole=generator.random() < 0.5)
            assert "Traceback" not in command.output, command.output
            if is_complete(project):
                break
        project.run("publish" if is_complete(project) else "run")
        assert project.learnt(project.only_training()) == learnt, f"chain {chains}"
        assert project.waiting() == []
        shutil.rmtree(project.root)


def is_complete(project):
    """Whether a run of `pipeline.run` is complete. The same command then starts another one."""
    plans = [json.loads(path.read_text()) for path in (project.root / "runs").glob("*/train/set.json")]
    return any(plan["ended"] for plan in plans)


# --- the store


def deliver_rest(project, output):
    """Deliver what a command left, as the `output` says, because the store was away when it ended."""
    if project.waiting():
        assert "waiting  " in output, output
        project.run("publish")
    assert project.waiting() == []


def test_a_server_that_is_killed_and_started_again_gets_the_run(project, assert_complete, tmp_path):
    with serving(tmp_path / "server") as server:
        project.environment["MLFLOW_TRACKING_URI"] = server.uri
        command = project.start("train", "epochs=40").wait_for("epoch  4/40")
        server.kill()
        command.wait_for("the training goes on", 60)
        server.start()
        deliver_rest(project, command.end())
        assert len(project.learnt(project.only_training(store=server.store), server.store)) == 5 * 40 + 1


def test_a_server_that_stays_away_gets_the_run_later(project, assert_complete, tmp_path):
    with serving(tmp_path / "server") as server:
        project.environment["MLFLOW_TRACKING_URI"] = server.uri
        command = project.start("train").wait_for("epoch 2/8")
        server.kill()
        assert "waiting  " in command.end() and project.waiting()
        project.run("publish", status=1)
        server.start()
        project.run("publish")
        assert_complete(project, server.store)


def test_a_server_that_answers_500_for_a_while_gets_the_run(project, tmp_path):
    wrong_until = [0.0]
    with serving(tmp_path / "server") as server:
        with in_front_of(server, lambda: 500 if time.monotonic() < wrong_until[0] else None) as uri:
            project.environment["MLFLOW_TRACKING_URI"] = uri
            command = project.start("train", "epochs=40").wait_for("epoch  3/40")
            wrong_until[0] = time.monotonic() + AWAY_SECONDS
            output = command.end()
            time.sleep(max(0.0, wrong_until[0] - time.monotonic()))
            deliver_rest(project, output)
        assert len(project.learnt(project.only_training(store=server.store), server.store)) == 5 * 40 + 1


def test_a_slow_server_slows_no_epoch(project, tmp_path):
    """Prints the epochs' seconds with a server that takes two seconds for each answer, and without one."""
    project.run("train", "epochs=30")
    seconds = {"without": epoch_seconds(project)}
    with serving(tmp_path / "server") as server, in_front_of(server, lambda: time.sleep(2.0)) as uri:
        output = project.run("train", "epochs=30", "label=slow", MLFLOW_TRACKING_URI=uri)
        seconds["slow"] = epoch_seconds(project)
        project.environment["MLFLOW_TRACKING_URI"] = uri
        deliver_rest(project, output)
        project.only_training(store=server.store)
    print({name: f"median {median(each):.4f} s of {len(each)} epochs" for name, each in seconds.items()})


def epoch_seconds(project):
    """The seconds of each epoch, without the first, of the last training."""
    record = json.loads((project.root / "outputs" / "train" / "record.json").read_text())
    return [epoch["figures"]["time/train_seconds"] for epoch in record["epochs"]][1:]


def test_a_locked_database_gets_the_run_when_it_is_free(project, assert_complete):
    command = project.start("train", "epochs=40").wait_for("epoch  3/40")
    lock = "import sqlite3, sys, time; rows = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)"
    lock += "; rows.execute('begin exclusive'); print('locked', flush=True); time.sleep(float(sys.argv[2]))"
    with subprocess.Popen(
        [sys.executable, "-c", lock, project.store, str(AWAY_SECONDS)], stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"locked\n"
        output = command.end()
    deliver_rest(project, output)
    assert len(project.learnt(project.only_training())) == 5 * 40 + 1


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("kind", ["file", "server"])
def test_first_runs_at_once_on_a_new_store_are_all_there_once(prepared, tmp_path, kind, count):
    projects = [Project(tmp_path / str(number), prepared) for number in range(count)]

    def run_all(uri, store):
        commands = [
            project.start("train", f"seed={number}", MLFLOW_TRACKING_URI=uri) for number, project in enumerate(projects)
        ]
        outputs = [command.end(seconds=600) for command in commands]
        for project, output in zip(projects, outputs, strict=True):
            if project.waiting():
                assert "waiting  " in output
                project.run("publish", MLFLOW_TRACKING_URI=uri)
        trainings = projects[0].trainings(store)
        assert [status for _, status in trainings] == ["FINISHED"] * count
        seeds = projects[0].query("select value from params where key = 'settings.seed'", store=store)
        assert sorted(seeds) == [(str(number),) for number in range(count)]
        assert all(projects[0].repeated(run_id, store) == [] for run_id, _ in trainings)

    if kind == "file":
        run_all(f"sqlite:///{tmp_path}/new.db", tmp_path / "new.db")
    else:
        with serving(tmp_path / "server") as server:
            run_all(server.uri, server.store)


def test_a_store_deleted_while_it_trains_gets_the_whole_run(project, assert_complete):
    command = project.start("train").wait_for("epoch 3/8")
    time.sleep(1.0)  # it has the run by now, as a rule
    project.store.unlink()
    command.end()
    project.run("publish")
    assert_complete(project)


# --- the disk


@contextmanager
def small_disk(path, size):
    """A file system of `size` at `path`."""
    path.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(folder):
    """Write the file `filler` until the disk is full."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError:
            pass


@pytest.mark.parametrize("moment", ["", "epoch 3/8", "epoch 7/8", "energy ", "result "])
def test_a_full_disk_loses_no_whole_epoch(prepared, tmp_path, assert_complete, moment):
    """At the beginning, when a state is written, at the record, at the delivery."""
    with small_disk(tmp_path / "disk", "60m"):
        project = Project(tmp_path / "disk" / "project", prepared)
        filler = tmp_path / "disk" / "filler"
        if not moment:
            fill(tmp_path / "disk")
        command = project.start("run")
        if moment:
            command.wait_for(moment)
            fill(tmp_path / "disk")
        output = command.end(0, 1)
        assert "no disk space left" in output or "full" in output, output
        filler.unlink()
        if is_complete(project):
            project.run("publish")
        else:
            project.run("run")
        assert_complete(project)


def test_a_full_disk_ends_a_download_which_goes_on_later(tmp_path):
    program = (
        "import sys; from pathlib import Path; from pipeline import cli; from pipeline.data import fetch\n"
        "with cli.exit_on_error('x'): fetch.fetch_cifar10(Path(sys.argv[1]), [sys.argv[2]], 10.0)"
    )
    project, ranges = Project(tmp_path / "project"), []
    with small_disk(tmp_path / "disk", "8m"), archive_server(ranges) as address:
        output = project.start_python("-c", program, str(tmp_path / "disk"), address).end(1)
        assert "no disk space left" in output
        (part,) = (tmp_path / "disk").iterdir()
        size = part.stat().st_size
        assert size > 7_000_000
        project.start_python("-c", program, str(tmp_path / "disk"), address).end(1)
    assert ranges == [None, f"bytes={size}-"]


@contextmanager
def archive_server(ranges):
    """A mirror of zeros, as many as the archive has bytes. `ranges`: those that it was asked for."""

    class Zeros(BaseHTTPRequestHandler):
        def do_GET(self):
            ranges.append(self.headers["Range"])
            start = int(ranges[-1].removeprefix("bytes=").rstrip("-")) if ranges[-1] else 0
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(fetch.ARCHIVE_BYTES - start))
            self.send_header("Content-Range", f"bytes {start}-{fetch.ARCHIVE_BYTES - 1}/{fetch.ARCHIVE_BYTES}")
            self.end_headers()
            with suppress(OSError):
                while True:
                    self.wfile.write(b"\0" * 65536)

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Zeros) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz"
        server.shutdown()


def test_a_read_only_project_is_refused_in_a_line(prepared, tmp_path):
    with small_disk(tmp_path / "disk", "60m"):
        project = Project(tmp_path / "disk" / "project", prepared)
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        for stage in ("hardware", "download", "train", "compare", "run"):
            output = project.run(stage, status=1)
            assert len(output.splitlines()) < 12 and "ead-only" in output.splitlines()[-1], output
        project.run("publish")


# --- clock, numbers, terminal


def test_a_clock_that_is_set_back_loses_nothing(project, assert_complete, tmp_path):
    """The wall clock falls back by a day after the third epoch, in the training and in the command."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\nfrom pathlib import Path\n"
        "def back(): return 86400 if Path(os.environ['SET_BACK']).exists() else 0\n"
        "now, now_ns = time.time, time.time_ns\n"
        "time.time = lambda: now() - back()\ntime.time_ns = lambda: now_ns() - back() * 10**9\n"
    )
    changes = {"PYTHONPATH": str(tmp_path), "SET_BACK": str(tmp_path / "back")}
    command = project.start("train", **changes).wait_for("epoch 3/8")
    (tmp_path / "back").touch()
    command.wait_for("epoch 5/8").kill()
    project.run("train", **changes)
    project.run("evaluate", **changes)
    assert_complete(project)
    query = "select latest_metrics.value, metrics.value from latest_metrics join metrics using (run_uuid, key) "
    query += "where key in ('val/loss', 'train/loss') and metrics.step = 8"
    assert all(latest == last for latest, last in project.query(query))
    assert all(value >= 0 for (value,) in project.query("select value from metrics where key like 'time/%'"))


@pytest.mark.slow
def test_a_loss_that_is_no_number_ends_the_run_as_failed_for_good(project):
    assert "resumed" not in project.run("train", "lr=1e30", status=1)
    project.only_training("FAILED")
    assert "resumed" not in project.run("train", "lr=1e30", status=1)
    assert [status for _, status in project.trainings()] == ["FAILED", "FAILED"]
    assert project.waiting() == []


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_no_run(project, assert_complete):
    words = shlex.join([sys.executable, "-m", "pipeline.train", *(w for s in SETTINGS for w in ("-S", s))])
    ends = f"{words} 2>&1 | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", ends], cwd=project.root, env=project.environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1 and done.stderr == ""
    assert_complete(project)


# --- secrets

USER, SECRET = "jane-Zq7Vx", "p@ss:Zq7Kw@rd"
TOKEN = "Zq7Tm" * 8


def test_no_secret_is_written_or_printed(project, tmp_path):
    """Name and password in the address, then in the environment; right ones, wrong ones, and a server that is away."""
    printed = []

    def run_all(*, trained, **environment):
        project.environment |= environment
        for stage, status in (("train", 0), ("evaluate", 0), ("compare", trained), ("publish", trained)):
            printed.append(project.start(stage).end(status))
        for words in ("doctor", "bundle export", *(["ui"] if trained else [])):
            printed.append(project.start_python("-m", *f"pipeline.{words}".split()).end(0, 1))

    with serving(tmp_path / "server") as server, in_front_of(server, password=f"{USER}:{SECRET}") as uri:
        address = uri.replace("//", f"//{USER}:{SECRET}@")
        login = {"MLFLOW_TRACKING_USERNAME": USER, "MLFLOW_TRACKING_PASSWORD": SECRET}
        run_all(trained=0, MLFLOW_TRACKING_URI=address)
        project.only_training(store=server.store)
        run_all(trained=0, MLFLOW_TRACKING_URI=uri, **login)
        run_all(trained=1, MLFLOW_TRACKING_URI=address.replace("Vx:", "Vy:"), MLFLOW_TRACKING_TOKEN=TOKEN)
    project.environment["MLFLOW_TRACKING_URI"] = address
    run_all(trained=1, MLFLOW_TRACKING_URI=address)
    encoded = base64.b64encode(f"{USER}:{SECRET}".encode()).decode()
    for secret in ("Zq7", encoded):
        assert not any(secret in output for output in printed)
        assert files_with(secret.encode(), project.root) == files_with(secret.encode(), tmp_path / "server") == []


def files_with(secret, folder):
    """The files that hold a secret, also inside archives."""
    contents = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for path in [path for path in contents if zipfile.is_zipfile(path)]:
        with zipfile.ZipFile(path) as archive:
            contents |= {path / name: archive.read(name) for name in archive.namelist()}
    return [path for path, data in contents.items() if secret in data]
