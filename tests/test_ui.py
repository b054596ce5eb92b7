"""`make ui`: the links that it prints and opens, its port, and the end of its server."""

import os
import signal
import socket
import subprocess
import sys
import webbrowser
from contextlib import ExitStack

import psutil
import pytest
from stores import client, own_store, record_of  # noqa: F401 (own_store: each test has its own)

from pipeline import config, ui
from pipeline.errors import StageError
from pipeline.tracking import store

LISTENS = """
import socket, sys
with socket.create_server(("127.0.0.1", int(sys.argv[1]))) as server:
    print("many words", flush=True)
    for _ in range(int(sys.argv[2])):
        server.accept()
"""
"""A stand-in for MLflow's server on port argv[1]. It ends after argv[2] connections."""


@pytest.fixture
def opened(monkeypatch):
    """The pages that were opened in the browser."""
    pages = []
    monkeypatch.setattr(webbrowser, "open", pages.append)
    return pages


@pytest.fixture
def ports(monkeypatch):
    """Set PORTS to three consecutive ports that are free."""
    for first in range(20000, 32000, 3):
        with ExitStack() as sockets:
            try:
                for port in range(first, first + 3):
                    sockets.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
        monkeypatch.setattr(ui, "PORTS", range(first, first + 3))
        return ui.PORTS
    raise AssertionError("no three ports are free")


@pytest.fixture
def serve(opened, ports, tmp_path, capfd):
    """Run the UI with a stand-in for MLflow's server that ends by itself. Returns the port and the printed text."""

    def run(code=LISTENS):
        used = []
        ui.run(
            config.load(),
            tmp_path / "outputs",
            lambda port: used.append(port) or [sys.executable, "-c", code, str(port), "1"],
        )
        return used[0], capfd.readouterr().out

    return run


def test_the_report_is_opened_first_and_run_table_and_charts_are_named(serve, opened, tmp_path):
    experiment = store.start_run(record_of()).experiment_id
    port, out = serve()
    base = f"http://127.0.0.1:{port}"
    pages = [store.run_table_link(experiment, base), store.charts_link(experiment, base)]
    assert [word for word in out.split() if "://" in word] == pages
    report = tmp_path / "reports" / "compare.html"
    report.parent.mkdir()
    report.touch()
    port, out = serve()
    assert next(word for word in out.split() if "://" in word) == report.as_uri()
    assert "many words" not in out
    assert opened == [pages[0], report.as_uri()]


def test_an_unknown_experiment_is_refused(opened, tmp_path):
    with pytest.raises(StageError, match="trainmark"):
        ui.run(config.load(), tmp_path)
    assert opened == []


def test_other_machines_cannot_reach_the_server_and_others_on_this_one_do_not_see_its_password(serve, monkeypatch):
    command = ui.server_command(5000)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    monkeypatch.setattr(store, "experiment_to_show", lambda name: "7")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mysql://jane:hunter2@server/db")
    assert "hunter2" not in " ".join(ui.server_command(5000))
    with pytest.raises(StageError, match=r"status 3: mysql://jane"):
        serve("import os; print(os.environ['MLFLOW_BACKEND_STORE_URI'].replace('@', ' ')); raise SystemExit(3)")


def test_a_store_that_is_a_server_is_not_served_again(opened, ports, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000/")
    monkeypatch.setattr(store, "experiment_to_show", lambda name: "7")
    ui.run(config.load(), tmp_path, command=None)
    assert opened[0].startswith("http://server:5000/#/experiments/7/runs?")


def test_the_first_free_port_is_used_even_with_a_proxy(serve, ports, monkeypatch):
    store.start_run(record_of())
    for key in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(key, raising=False)
    with ExitStack() as sockets:
        for port in ports[:2]:
            sockets.enter_context(socket.create_server(("127.0.0.1", port)))
        for key in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(key, f"http://127.0.0.1:{ports[0]}")
        assert serve()[0] == ports[2]
        sockets.enter_context(socket.create_server(("127.0.0.1", ports[2])))
        with pytest.raises(StageError, match=f"{ports[0]} to {ports[2]}"):
            serve()


def test_a_server_that_does_not_start_is_refused_with_its_last_line(serve, opened):
    store.start_run(record_of())
    with pytest.raises(StageError, match=r"status 3: no such store$"):
        serve("import sys; print('starting'); print('no such store', file=sys.stderr); sys.exit(3)")
    assert opened == []


COMMAND = f"""
import sys, webbrowser
from pathlib import Path
sys.path.insert(0, {str(config.ROOT)!r})
webbrowser.open = print
from pipeline import config, ui
parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[2], sys.argv[1], '99'])"
ui.run(config.load(), Path("outputs"), lambda port: [sys.executable, "-c", parent, str(port), sys.argv[1]])
"""
"""As with MLflow, the server is a child of the process that the command starts."""


@pytest.mark.skipif(sys.platform == "win32", reason="no signal for one process there")
@pytest.mark.parametrize("stop", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_the_server_ends_with_the_command(stop):
    store.start_run(record_of())
    command = [sys.executable, "-u", "-c", COMMAND, LISTENS]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as process:
        lines = [process.stdout.readline() for _ in range(4)]  # two links, the opened page, how to end it
        servers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(stop)
        _, errors = process.communicate(timeout=60)
    assert "http://127.0.0.1:" in lines[0] and errors == ""
    assert process.returncode == 0
    assert len(servers) == 2 and not any(server.is_running() for server in servers)
