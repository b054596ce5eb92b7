"""Opens MLflow's UI on the runs side by side, served on this machine alone; Ctrl-C ends it."""

import os
import socket
import subprocess
import sys
import time
import webbrowser
from pathlib import Path

from pipeline import config, terminal
from pipeline.errors import StageError
from pipeline.tracking import store

PORTS = range(5000, 5020)
"""The first free one is taken: macOS has its own server on 5000."""


def run(settings: config.Settings, folder: Path) -> None:
    """Serves the store of `tracking.store_uri()`, or only opens the page where that is a server already."""
    experiment = store.experiment_to_show(settings.tracking.experiment)
    if experiment is None:
        raise StageError(f'no experiment "{settings.tracking.experiment}" in {store.shown_uri()} yet: make run')
    if store.store_uri().startswith("http"):
        terminal.say(store.run_table_link(experiment))
        webbrowser.open(store.run_table_link(experiment))
        return
    port = next((port for port in PORTS if not _answers(port)), None)
    if port is None:
        raise StageError(f"no free port from {PORTS.start} to {PORTS.stop - 1}: stop another server first")
    base = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", store.store_uri(), "--workers", "1"]
    with subprocess.Popen(command, cwd=config.ROOT, env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}) as server:
        while server.poll() is None and not _answers(port):
            time.sleep(0.2)
        if server.poll() is not None:
            raise StageError(f"MLflow's UI ended with status {server.returncode}: see above")
        terminal.say(f"\nThe runs side by side: {store.run_table_link(experiment, base)}\nCtrl-C ends the server.\n")
        webbrowser.open(store.run_table_link(experiment, base))


def _answers(port: int) -> bool:
    """Whether something listens on `port` of this machine; no proxy is asked, which would always say yes."""
    try:
        socket.create_connection(("127.0.0.1", port), 0.5).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    from pipeline import cli

    cli.main(run, __doc__)
