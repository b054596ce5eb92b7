"""Open the comparison report, and serve MLflow's UI on this machine until Ctrl-C."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from pipeline import config, terminal
from pipeline.errors import StageError
from pipeline.tracking import location, store

PORTS = range(5000, 5020)
"""The ports to try. macOS has its own server on 5000."""


def server_command(port: int) -> list[str]:
    """The command that serves the store of MLFLOW_BACKEND_STORE_URI on `port`."""
    return [sys.executable, "-m", "mlflow", "ui", *f"--host 127.0.0.1 --port {port} --workers 1".split()]


def run(settings: config.Settings, folder: Path, command: Callable[[int], Sequence[str]] = server_command) -> None:
    """Open the comparison report, or MLflow's run table if there is no report yet. Serve the store until Ctrl-C, unless
    it is a server itself.

    The report is in `reports`, next to `folder`. `command` makes the server's command for a port.
    """
    name = location.experiment_name(settings.tracking.experiment)
    experiment = store.experiment_to_show(name)
    if experiment is None:
        raise StageError(f'no experiment "{name}" in {location.shown_uri()} yet: make run')
    report = folder.parent / "reports" / "compare.html"
    if location.store_uri().startswith("http"):
        _open(report, experiment, None)
        return
    port = next((port for port in PORTS if not _answers(port)), None)
    if port is None:
        raise StageError(f"no free port from {PORTS.start} to {PORTS.stop - 1}: stop another server first")
    with _serve(command(port), port) as server:
        _open(report, experiment, f"http://127.0.0.1:{port}")
        terminal.say("Ctrl-C ends the server.")
        server.wait()


def _open(report: Path, experiment: str, base: str | None) -> None:
    """Print the links, and open the first in the browser. `base`: address of the server; None for the store's own."""
    links = {"run table": store.run_table_link(experiment, base), "charts": store.charts_link(experiment, base)}
    if report.exists():
        links = {"report": report.absolute().as_uri()} | links
    for name, link in links.items():
        terminal.say(f"{name:9}  {link}")
    webbrowser.open(next(iter(links.values())))


@contextmanager
def _serve(command: Sequence[str], port: int) -> Iterator["subprocess.Popen[str]"]:
    """Run a server until the block ends, or Ctrl-C or SIGTERM. If it fails, show its last line."""
    if threading.current_thread() is threading.main_thread():  # other threads may not set handlers
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # acts like Ctrl-C
    # Everybody on this machine can see a command line, and the address may hold a password.
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_BACKEND_STORE_URI": location.store_uri()}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        server = subprocess.Popen(command, cwd=config.ROOT, env=environment, stdout=log, stderr=log, text=True)
        try:
            while not _answers(port):
                if server.poll() is not None:
                    log.seek(0)
                    cause = next(reversed(log.read().strip().splitlines()), "it says nothing")
                    message = f"MLflow's UI ended with status {server.returncode}: {cause}"
                    raise StageError(location.hide_secrets(message))
                time.sleep(0.2)
            yield server
        except KeyboardInterrupt:
            pass
        finally:
            _terminate(server.pid)


def _terminate(pid: int) -> None:
    """End a process and its children."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        processes = [process, *process.children(recursive=True)]
        for member in processes:
            with suppress(psutil.NoSuchProcess):
                member.terminate()
        for member in psutil.wait_procs(processes, timeout=5)[1]:
            member.kill()


def _answers(port: int) -> bool:
    """Whether something listens on `port` of this machine. Connects directly: a proxy would accept any port."""
    try:
        socket.create_connection(("127.0.0.1", port), 0.5).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    from pipeline import cli

    cli.main(run, __doc__)
