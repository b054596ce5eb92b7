"""The UI: a server where there is none, on a free port, and the page that is opened."""

import os
import socket
import subprocess
import sys
import webbrowser
from contextlib import ExitStack

import pytest
from stores import client, own_store, record_of  # noqa: F401 (own_store: each test has its own)

from pipeline import config, ui
from pipeline.errors import StageError
from pipeline.tracking import store


@pytest.fixture
def opened(monkeypatch):
    """The pages that the browser was sent to."""
    pages = []
    monkeypatch.setattr(webbrowser, "open", pages.append)
    return pages


class Server:
    """Stands for MLflow's: `started` holds its commands, and it listens on its port, or has ended at once."""

    status = None

    def __init__(self, command, **options):
        self.started.append((command, options))
        self.returncode = self.status
        self.socket = socket.create_server(("127.0.0.1", int(command[command.index("--port") + 1])))

    def poll(self):
        return self.returncode

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.socket.close()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(Server, "started", [], raising=False)
    monkeypatch.setattr(subprocess, "Popen", Server)
    return Server


@pytest.fixture
def ports(monkeypatch):
    """Three ports one after the other that were free a moment ago, to choose from."""
    for first in range(20000, 32000, 3):
        with ExitStack() as taken:
            try:
                for port in range(first, first + 3):
                    taken.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
        monkeypatch.setattr(ui, "PORTS", range(first, first + 3))
        return ui.PORTS
    raise AssertionError("no three ports are free")


@pytest.fixture
def settings():
    return config.load()


def option(command, name):
    return command[command.index(name) + 1]


def test_no_experiment_is_said(settings, server, opened, tmp_path):
    shown = os.environ["MLFLOW_TRACKING_URI"]
    with pytest.raises(StageError) as caught:
        ui.run(settings, tmp_path)
    assert str(caught.value) == f'no experiment "trainmark" in {shown} yet: make run'
    assert server.started == opened == []


def test_a_store_that_is_a_server_needs_no_other(settings, server, opened, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000/")
    monkeypatch.setattr(store, "experiment_to_show", lambda name: "7")
    ui.run(settings, tmp_path)
    (page,) = opened
    assert page.startswith("http://server:5000/#/experiments/7/runs?") and page in capsys.readouterr().out
    assert server.started == []


def test_the_store_is_served_on_the_first_port_and_the_page_opened(settings, server, opened, ports, tmp_path, capsys):
    experiment = store.start_run(record_of()).experiment_id
    ui.run(settings, tmp_path)
    ((command, options),) = server.started
    assert command[:4] == [sys.executable, "-m", "mlflow", "ui"]
    assert option(command, "--host") == "127.0.0.1" and option(command, "--port") == str(ports[0])
    assert option(command, "--backend-store-uri") == store.store_uri()
    assert options["cwd"] == config.ROOT
    assert options["env"]["MLFLOW_DISABLE_TELEMETRY"] == "true" and options["env"]["PATH"] == os.environ["PATH"]
    (page,) = opened
    assert page == store.run_table_link(experiment, f"http://127.0.0.1:{ports[0]}") and page in capsys.readouterr().out


def test_a_port_that_is_taken_is_passed_over(settings, server, opened, ports, tmp_path):
    store.start_run(record_of())
    with socket.create_server(("127.0.0.1", ports[0])), socket.create_server(("127.0.0.1", ports[1])):
        ui.run(settings, tmp_path)
    ((command, _),) = server.started
    assert option(command, "--port") == str(ports[2])
    assert opened[0].startswith(f"http://127.0.0.1:{ports[2]}/#/")


def test_no_free_port_is_said(settings, server, opened, ports, tmp_path):
    store.start_run(record_of())
    with ExitStack() as taken:
        for port in ports:
            taken.enter_context(socket.create_server(("127.0.0.1", port)))
        with pytest.raises(StageError, match=f"^no free port from {ports[0]} to {ports[2]}: "):
            ui.run(settings, tmp_path)
    assert server.started == opened == []


def test_a_proxy_is_not_asked_which_port_is_free(settings, server, opened, ports, tmp_path, monkeypatch):
    store.start_run(record_of())
    for key in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(key, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        for key in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(key, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        ui.run(settings, tmp_path)
    assert option(server.started[0][0], "--port") == str(ports[0]) and len(opened) == 1


def test_a_server_that_ends_is_said(settings, server, opened, ports, tmp_path, monkeypatch):
    store.start_run(record_of())
    monkeypatch.setattr(Server, "status", 1)
    with pytest.raises(StageError, match=r"^MLflow's UI ended with status 1: see above$"):
        ui.run(settings, tmp_path)
    assert opened == []


def test_it_waits_until_the_server_answers(settings, server, opened, ports, tmp_path, monkeypatch):
    store.start_run(record_of())
    answers = iter([False, False, False, True])  # the port is free; then not yet, not yet, now
    naps = []
    monkeypatch.setattr(ui, "_answers", lambda port: next(answers))
    monkeypatch.setattr(ui.time, "sleep", lambda seconds: naps.append(list(opened)))
    ui.run(settings, tmp_path)
    assert naps == [[], []] and len(opened) == 1


def test_a_demo_is_shown_where_nothing_else_is(settings, server, opened, ports, tmp_path):
    demo = store.start_run(record_of(experiment="trainmark-demo")).experiment_id
    client().delete_experiment(store.start_run(record_of()).experiment_id)
    ui.run(settings, tmp_path)
    assert f"/#/experiments/{demo}/runs?" in opened[0]
