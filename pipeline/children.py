"""Processes that train, for a driver that waits for them and meanwhile brings their records into the MLflow store.

A child starts early, since it imports torch for seconds. It gets its work as a line on stdin, `<number of the
repeat>:<folder>`. When stdin ends, the driver is gone, and the child ends too.
"""

import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType

from pipeline import startup, terminal
from pipeline.errors import StageError, Stopped
from pipeline.profiling import system_info, system_state
from pipeline.tracking import location, pending

CHILD = "TRAINMARK_CHILD"
"""Environment variable that the driver sets for a child. Not for users."""

INTERVAL_SECONDS = 0.25
"""Between two looks at what a child wrote."""

PATIENCE_SECONDS = 20.0
"""How long a command waits at its end for a store that does not answer."""

MAX_WAIT_SECONDS = 30.0
"""The longest time between two attempts to reach a store, while a child works."""

MIN_CORES = 4
"""With fewer, nothing but light work is done beside a child."""

STOPPED = (130, 143)
"""Exit statuses of a process that SIGINT or SIGTERM stopped, as in a shell: 128 plus the signal's number."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise Stopped at SIGINT and SIGTERM. Ctrl-C reaches driver and child alike, and the driver then sends SIGTERM, so
    only the first signal and a repeated one count."""
    seen: set[int] = set()

    def stop(number: int, frame: FrameType | None) -> None:
        raises = not seen or number in seen
        seen.add(number)
        if raises:
            raise Stopped(128 + number)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    replaced = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    for number in replaced:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)


# --- in the child


def is_child() -> bool:
    """Whether a driver started this process."""
    return CHILD in os.environ


_watches: list[system_state.LoadWatch] = []
_work: list[str] = []
_has_work = threading.Event()
_waits: list[float] = []


def load_watch() -> system_state.LoadWatch | None:
    """A watch that began before this process imported torch; None in a process that is no child."""
    return _watches[0] if _watches else None


def watch_driver() -> None:
    """Read the driver's line in a thread, and end this process when the driver is gone. Watch the machine's load from
    now on. Ctrl-C during the imports that follow prints nothing here: the driver says it."""
    sys.excepthook = _print_unless_interrupt
    _watches.append(system_state.LoadWatch())

    def watch() -> None:
        text = b""
        while chunk := os.read(0, 4096):  # not sys.stdin, whose lock would be held when the process ends
            text += chunk
            if b"\n" in text and not _work:
                _work.append(text.decode().splitlines()[0])
                _has_work.set()
        os._exit(137)  # all files are written whole or not at all, so nothing is lost

    threading.Thread(target=watch, daemon=True).start()


def _print_unless_interrupt(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        startup.excepthook(kind, error, traceback)


def wait_for_work() -> tuple[int, Path]:
    """The number of the repeat and the folder of all stages."""
    began = time.monotonic()
    _has_work.wait()
    _waits.append(time.monotonic() - began)
    number, _, folder = _work[0].partition(":")
    return int(number), Path(folder)


def waited_seconds() -> float:
    """How long this process did nothing but wait for its work: for the driver's download, for example."""
    return sum(_waits)


# --- in the driver


def starter(module: str, device: str) -> Callable[[int, Path], int]:
    """Start this process's command line again, as `python -m pipeline.<module>`. Returns the function that gives such a
    process its work and returns its exit status. `device`: the setting."""
    return command_starter([sys.executable, "-m", f"pipeline.{module}", *sys.argv[1:]], preload=device != "cpu")


def command_starter(command: Sequence[str], *, preload: bool = False) -> Callable[[int, Path], int]:
    """Start `command` at once, to be ready, and again for each further repeat. A child that a signal killed has the
    exit status 128 plus the signal's number, as in a shell.

    `preload`: import beside the child what logs its model after it, if this machine has room for it.
    """
    spare = [_spawn(command)]

    def start_child(number: int, folder: Path) -> int:
        child = spare.pop() if spare else _spawn(command)
        assert child.stdin is not None
        try:
            child.stdin.write(f"{number}:{folder.absolute()}\n".encode())
            child.stdin.flush()
            with _deliver_meanwhile(preload=preload):
                status = _wait_for(child)
        except BrokenPipeError:  # it ended before it got its work
            status = child.wait()
        except KeyboardInterrupt:
            _stop(child)  # the signal may have come before or after the wait
            _deliver_rest()
            raise
        _deliver_rest()
        if sys.platform != "win32" and status == -signal.SIGKILL:
            terminal.say("note     the training process was killed from outside; the same command goes on")
        return status if status >= 0 else 128 - status

    return start_child


def _spawn(command: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, env=os.environ | {CHILD: "1"}, stdin=subprocess.PIPE)


def _wait_for(child: subprocess.Popen[bytes]) -> int:
    """Wait for a child, and stop it at a signal, before anything else is waited for."""
    try:
        return child.wait()
    except KeyboardInterrupt:
        _stop(child)
        raise


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End a child and wait for it; kill it after a second signal."""
    if sys.platform != "win32":  # on Windows it gets Ctrl-C itself, and `terminate` kills at once
        child.terminate()
    try:
        child.wait()
    except KeyboardInterrupt:
        child.kill()
        child.wait()


@contextmanager
def _deliver_meanwhile(*, preload: bool) -> Iterator[None]:
    """Bring what a child writes into the store, in a thread, while the block waits for the child. No trouble with the
    store reaches the child or the block."""
    done = threading.Event()

    def work() -> None:
        _lower_priority()  # the child measures
        _import("pipeline.tracking.publisher")
        if preload and _has_room():
            threading.Thread(target=_import, args=["pipeline.tracking.model_logging"], daemon=True).start()
        _deliver_until(done)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _deliver_until(done: threading.Event) -> None:
    epochs: dict[Path, int] = {}
    trouble, pause = "", INTERVAL_SECONDS
    while not done.wait(pause):
        error = _deliver(epochs, complete=False) if _is_waiting() else trouble
        if error and not trouble:
            terminal.say(f"note     {error}; the training goes on")
        elif trouble and not error:
            terminal.say("note     the store answers again")
        pause = min(max(1.0, 2 * pause), MAX_WAIT_SECONDS) if error else INTERVAL_SECONDS
        trouble = error


def _has_room() -> bool:
    """Whether importing takes nothing from a child: there are cores to spare, and memory that no GPU shares."""
    return (os.cpu_count() or 1) >= MIN_CORES and any(gpu["vendor"] != "Apple" for gpu in system_info.facts()["gpus"])


def _is_waiting() -> bool:
    try:
        return bool(pending.waiting())
    except (OSError, StageError):  # an entry is just being deleted
        return False


def _lower_priority() -> None:
    """Let other threads and processes go first. On Linux alone this is the matter of a single thread, so that a later
    child does not inherit it."""
    if sys.platform == "linux":
        os.nice(max(0, 19 - os.nice(0)))


def _deliver_rest() -> None:
    """Deliver what the child left. If the store does not answer for a while, say what waits."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while pending.waiting():
        error = _deliver({}, complete=True)
        if not error:
            break
        if time.monotonic() > deadline:
            terminal.say(f"note     {error}")
            break
        time.sleep(1.0)
    tell_waiting()


def tell_waiting() -> None:
    """Say which runs are not in the store yet, if any."""
    if waiting := [entry for entry in pending.waiting() if not pending.is_busy(entry)]:
        stores = ", ".join(sorted({pending.read_target(entry)["store"] for entry in waiting}))
        terminal.say(
            f"waiting  {len(waiting)} part{'s' * (len(waiting) != 1)} of runs in {pending.FOLDER.name}/ for {stores}: "
            "the next command delivers them, or python -m pipeline.publish"
        )


def _deliver(epochs: dict[Path, int], *, complete: bool) -> str:
    """Deliver what waits. Returns what is wrong with the store, or ''."""
    try:
        from pipeline.tracking import publisher

        publisher.deliver_all(epochs, complete=complete)
    except StageError as error:
        return str(error)
    except Exception as error:  # whatever MLflow, a driver or a server comes up with must not stop a training
        return location.hide_secrets(f"the MLflow store can't be used: {startup.first_line(error)}")
    return ""


def _import(module: str) -> None:
    """Import what takes seconds. Call it in a thread, which no signal interrupts: half an import can't be repeated."""
    with suppress(Exception):  # it fails again where it is used
        importlib.import_module(module)
