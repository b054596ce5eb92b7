"""Processes that a driver starts in tests."""

from contextlib import suppress

import pytest

from pipeline import children


@pytest.fixture(autouse=True)
def started(monkeypatch):
    """The processes that were started. None is left after the test, and this process keeps its priority."""
    monkeypatch.setattr(children, "_lower_priority", lambda: None)
    processes, spawn = [], children._spawn
    monkeypatch.setattr(children, "_spawn", lambda command: processes.append(spawn(command)) or processes[-1])
    yield processes
    for process in processes:
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.wait(30)
