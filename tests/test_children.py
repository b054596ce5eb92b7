"""A driver and its child: the work, the end of either, signals, and a store that is away."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from drivers import started  # noqa: F401 (none is left)
from stores import record_of

from pipeline import children, config
from pipeline.errors import StageError, Stopped
from pipeline.tracking import pending, publisher

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no signal for one process there")


def python(code):
    return [sys.executable, "-c", code]


# --- the work


def test_a_child_starts_at_once_and_gets_its_work_when_there_is_some(started, tmp_path, monkeypatch):
    monkeypatch.chdir(config.ROOT)
    code = (
        "import sys; from pathlib import Path; from pipeline import children; assert children.is_child()\n"
        "children.watch_driver(); number, folder = children.wait_for_work()\n"
        "assert folder.is_absolute(); (folder / f'repeat {number}').touch()"
    )
    folder = tmp_path / "with:colon"
    folder.mkdir()
    start_child = children.command_starter(python(code))
    assert len(started) == 1 and started[0].poll() is None
    assert [start_child(number, folder) for number in (1, 2)] == [0, 0]
    assert len(started) == 2 and {path.name for path in folder.iterdir()} == {"repeat 1", "repeat 2"}
    assert not children.is_child()


def test_a_child_knows_how_long_it_waited_for_its_work(started, tmp_path, monkeypatch):
    monkeypatch.chdir(config.ROOT)
    code = (
        "import sys; from pipeline import children; children.watch_driver()\n"
        "folder = children.wait_for_work()[1]; (folder / 'waited').write_text(str(children.waited_seconds()))"
    )
    start_child = children.command_starter(python(code))
    time.sleep(1)
    assert start_child(1, tmp_path) == 0
    assert 0 < float((tmp_path / "waited").read_text()) < 10 and children.waited_seconds() == 0


@pytest.mark.parametrize(("error", "printed"), [("KeyboardInterrupt", 0), ("ValueError", 1)])
def test_a_child_that_is_interrupted_while_it_imports_prints_nothing(tmp_path, monkeypatch, capfd, error, printed):
    monkeypatch.chdir(config.ROOT)
    code = f"from pipeline import children; children.watch_driver(); children.wait_for_work(); raise {error}"
    assert children.command_starter(python(code))(1, tmp_path) in (1, 130)
    assert capfd.readouterr().err.count("Traceback") == printed


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("raise SystemExit(7)", 7),
        ("input(); import os; os.kill(os.getpid(), 9)", 137),
        ("input(); import os, signal; signal.signal(15, signal.SIG_DFL); os.kill(os.getpid(), 15)", 143),
    ],
)
def test_the_status_is_that_of_a_shell(code, status, tmp_path, capsys):
    start_child = children.command_starter(python(code))
    if status == 7:
        time.sleep(0.3)  # it ends before it gets its work
    assert start_child(1, tmp_path) == status
    assert ("killed from outside" in capsys.readouterr().out) == (status == 137)


# --- signals


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_stops_and_only_the_same_one_again(first):
    other = signal.SIGINT + signal.SIGTERM - first
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with children.stoppable():
        with pytest.raises(Stopped) as caught:
            signal.raise_signal(first)
        signal.raise_signal(other)  # Ctrl-C reaches the child, too, before the driver sends SIGTERM
        with pytest.raises(Stopped):
            signal.raise_signal(first)
    assert caught.value.status == 128 + first
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as `nohup` and a shell's background do
    with children.stoppable():
        signal.raise_signal(signal.SIGINT)
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)


DRIVER = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background
from pipeline import children, cli
from pipeline.tracking import pending

folder = Path(sys.argv[1])
pending.FOLDER = folder / "pending"
with cli.exit_on_error("python -m pipeline.train"), children.stoppable():
    status = children.command_starter([sys.executable, "-c", sys.argv[2]])(1, folder)
sys.exit(status)
"""
CHILD = """
import os, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
from pipeline import children, repeats

def wait(settings, folder, number):
    try:
        print("waiting", os.getpid(), flush=True)
        time.sleep(60)
    finally:
        time.sleep(0.3)  # another signal would disturb it here
        Path(folder, "ended").write_text("whole")

sys.argv = ["train.py"]
children.watch_driver()
repeats.run_stage(wait, "")
"""
"""A child that waits to be stopped, and takes some time for its end."""


@pytest.fixture
def driver(tmp_path):
    """A driver of such a child in a process group of its own, and the id of the child."""
    process = subprocess.Popen(
        [*python(DRIVER), str(tmp_path), CHILD], cwd=config.ROOT, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        line = process.stdout.readline()
        assert line.startswith("waiting "), process.communicate()
        yield process, int(line.split()[1])
        process.kill()


def has_ended(process_id):
    """Whether a process ends soon."""
    for _ in range(100):
        try:
            os.kill(process_id, 0)
        except ProcessLookupError:
            return True
        if "Z" in Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]:
            return True  # nobody waits for it
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(
    ("stop", "to_all", "status", "said"),
    [
        (signal.SIGINT, True, 130, "train: stopped by Ctrl-C"),
        (signal.SIGINT, False, 130, "train: stopped by Ctrl-C"),
        (signal.SIGTERM, False, 143, "train: stopped by SIGTERM"),
    ],
)
def test_a_driver_that_is_stopped_waits_for_its_child_to_end(driver, tmp_path, stop, to_all, status, said):
    process, child_id = driver
    (os.killpg if to_all else os.kill)(process.pid, stop)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.strip()) == (status, said)
    assert (tmp_path / "ended").read_text() == "whole" and has_ended(child_id)


def test_stopped_twice_a_driver_waits_no_longer(driver, tmp_path):
    process, child_id = driver
    os.kill(child_id, signal.SIGSTOP)  # it will not end by itself
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130 and not (tmp_path / "ended").exists() and has_ended(child_id)


@pytest.mark.parametrize(("stop", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, 137)])
def test_a_child_that_is_stopped_alone_ends_its_driver(driver, tmp_path, stop, status):
    process, child_id = driver
    os.kill(child_id, stop)
    process.communicate(timeout=60)
    assert process.returncode == status
    assert (tmp_path / "ended").exists() == (stop != signal.SIGKILL)


def test_a_driver_that_is_killed_takes_its_child_along(driver, tmp_path):
    process, child_id = driver
    process.kill()
    assert has_ended(child_id) and not (tmp_path / "ended").exists()


# --- the store


@pytest.fixture
def waiting(monkeypatch):
    """An entry that waits for the store, and short waits."""
    monkeypatch.setattr(children, "INTERVAL_SECONDS", 0.01)
    monkeypatch.setattr(children, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(children, "MAX_WAIT_SECONDS", 0.05)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    entry, owner = pending.open_training(record_of(), {})
    owner.close()
    return entry


class Store:
    """A store that answers as scripted, then always as last; `calls` counts."""

    def __init__(self, monkeypatch, *answers):
        self.answers, self.calls = list(answers), 0
        monkeypatch.setattr(publisher, "deliver_all", self.deliver_all)

    def deliver_all(self, epochs=None, *, complete=True):
        self.calls += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer:
            raise answer


def test_no_trouble_with_the_store_reaches_the_child_and_it_is_told_once(waiting, tmp_path, monkeypatch, capsys):
    away = [StageError("the store is away"), ValueError("postgresql://me:secret@host is broken\nand more")]
    store = Store(monkeypatch, *away, *away, None)
    assert children.command_starter(python("input(); import time; time.sleep(1.5)"))(1, tmp_path) == 0
    output = capsys.readouterr().out
    assert (
        "secret" not in output
        and output.count("the store is away") == 1
        and output.count("answers again") == 1
        and store.calls >= 5
    )


@pytest.mark.parametrize("error", [StageError("the store is away"), OSError("postgresql://me:secret@host is away")])
def test_what_still_waits_at_the_end_is_told_in_one_line(waiting, tmp_path, monkeypatch, capsys, error):
    Store(monkeypatch, error)
    assert children.command_starter(python("input()"))(1, tmp_path) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("waiting")]
    assert len(lines) == 1 and pending.read_target(waiting)["store"] in lines[0] and "pipeline.publish" in lines[0]
    assert waiting.exists() and "secret" not in "".join(lines)


def test_an_interrupted_driver_delivers_what_its_child_left(waiting, tmp_path, monkeypatch):
    store = Store(monkeypatch, None)
    monkeypatch.setattr(children, "_wait_for", lambda child: signal.raise_signal(signal.SIGTERM))
    with children.stoppable(), pytest.raises(Stopped):
        children.command_starter(python("input(); import time; time.sleep(60)"))(1, tmp_path)
    assert store.calls >= 1
