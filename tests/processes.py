"""A copy of the project in a folder of its own, the commands that run in it as processes, and the store they leave."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = (
    "data.source=synthetic", "data.limit=20", "device=cpu", "sustain_seconds=0", "weights=random", "recipe=finetune",
    "model=test_resnet.r160_in1k", "image_size=32", "epochs=8", "threads=1",
)  # fmt: skip
"""A training of a second or two."""

LEARNT = ("train/loss", "train/accuracy", "train/lr", "val/loss", "val/accuracy")
"""Metrics that must be the same to the bit, however often a training was interrupted."""


class Command:
    """A process that runs a command of the project, with what it has printed so far."""

    def __init__(self, arguments, folder, environment):
        self.output = ""
        self.process = subprocess.Popen(
            arguments, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        with self.process.stdout:
            for line in self.process.stdout:
                self.output += line

    def wait_for(self, words, seconds=120):
        """Wait until the words are printed, or the process ends."""
        deadline = time.monotonic() + seconds
        while words not in self.output and self.process.poll() is None:
            assert time.monotonic() < deadline, self.output
            time.sleep(0.01)
        return self

    def child(self):
        """The process that trains."""
        (child,) = psutil.Process(self.process.pid).children()
        return child

    def kill(self, whole=True):
        """Send SIGKILL to the command and the processes that it started, or to the command alone."""
        if whole:
            os.killpg(self.process.pid, signal.SIGKILL)
        else:
            self.process.kill()
        self.process.wait()
        self.reader.join(10)

    def end(self, *statuses, seconds=240):
        """Wait for the end. Returns all that was printed."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"it hangs: {self.output}") from None
        self.reader.join(10)
        assert status in (statuses or (0,)), f"exit status {status}: {self.output}"
        assert "Traceback" not in self.output, self.output
        return self.output


class Project:
    """A copy of `pipeline/` and `params.yaml` in `root`, or of all of another project. Its store is its own mlflow.db,
    unless MLFLOW_TRACKING_URI is given."""

    def __init__(self, root, source=None, **environment):
        self.root, self.store = root, root / "mlflow.db"
        if source is not None:
            shutil.copytree(source.root, root, dirs_exist_ok=True)
        else:
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / "pipeline", root / "pipeline", ignore=ignore, dirs_exist_ok=True)
            for name in ("params.yaml", "requirements.txt"):
                shutil.copy(ROOT / name, root)
        cleared = {"PYTHONPATH", "PYTHONDONTWRITEBYTECODE"}
        kept = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_") and key not in cleared}
        self.environment = kept | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"} | environment

    def start(self, stage, *settings, **environment):
        """Start a command with SETTINGS, and with more settings laid over."""
        words = [word for setting in (*SETTINGS, *settings) for word in ("-S", setting)]
        return self.start_python("-m", f"pipeline.{stage}", *words, **environment)

    def start_python(self, *arguments, **environment):
        return Command([sys.executable, *arguments], self.root, self.environment | environment)

    def run(self, stage, *settings, status=0, **environment):
        """Run a command with SETTINGS. Returns what it prints."""
        return self.start(stage, *settings, **environment).end(status)

    def prepare(self):
        """Run the stages before the training."""
        self.run("hardware")
        self.run("download")
        return self

    def query(self, query, *values, store=None):
        rows = sqlite3.connect(f"{(store or self.store).as_uri()}?mode=ro", uri=True)
        try:
            return rows.execute(query, values).fetchall()
        finally:
            rows.close()

    def trainings(self, store=None):
        """Id and status of every training that is not deleted, oldest first."""
        active = "lifecycle_stage = 'active' and name != 'comparison'"
        return self.query(f"select run_uuid, status from runs where {active} order by start_time", store=store)

    def only_training(self, status="FINISHED", store=None):
        """The id of the one training in the store, which has this status and no metric twice."""
        ((run_id, found),) = self.trainings(store)
        assert found == status
        assert self.repeated(run_id, store) == []
        return run_id

    def repeated(self, run_id, store=None):
        """The metrics that a run has more than once for one step."""
        query = "select key, step from metrics where run_uuid = ? group by key, step having count(*) > 1"
        return self.query(query, run_id, store=store)

    def learnt(self, run_id, store=None):
        """The metrics of LEARNT, and the best epoch, by key and step."""
        rows = self.query("select key, step, value from metrics where run_uuid = ?", run_id, store=store)
        return {(key, step): value for key, step, value in rows if key in LEARNT or key == "best/epoch"}

    def waiting(self):
        """The entries that have not been delivered whole."""
        return sorted(path.name for path in (self.root / "pending").glob("*"))
