"""A line per epoch, framed warnings, and progress bars in terminals only."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import terminal

METRICS = {
    "epoch": 3,
    "train/loss": 0.51234,
    "train/accuracy": 0.8125,
    "val/loss": 1.25,
    "val/accuracy": 0.7,
    "train/lr": 0.005,
    "time/train_seconds": 12.345,
    "time/val_seconds": 0.5,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def in_terminal(monkeypatch):
    """Replace stderr by a terminal when called, since pytest replaces stderr after the set-up of fixtures."""

    def put():
        stand_in = Terminal()
        monkeypatch.setattr(sys, "stderr", stand_in)
        return stand_in

    return put


def test_an_epochs_line_has_its_metrics():
    line = terminal.epoch_line(3, 20, METRICS | {"speed/train_images_per_second": 12345.6})
    for words in (
        "epoch  3/20 ", " 0.5123 ", " 81.25% ", " 1.2500 ", " 70.00% ", " 5.00e-03 ", " 12.35 s ", " 0.50 s ",
        " 12,346 images/s",
    ):  # fmt: skip
        assert words in line
    assert "images/s" not in terminal.epoch_line(1, 1, METRICS)
    assert "  lr 3.00e-05  " in terminal.epoch_line(1, 1, METRICS | {"train/lr_applied": 3e-5})
    added = terminal.epoch_line(1, 1, METRICS | {"val/confidence": 0.123456, "val/top_accuracy": 0.9876})
    assert "  val confidence 0.1235  val top_accuracy 98.76%  " in added


def show_epochs(count):
    with terminal.epochs_progress(count, 8) as (advance, finish):
        for epoch in range(1, count + 1):
            advance(4)
            advance(4)
            finish(METRICS | {"epoch": epoch})


def test_a_file_gets_a_line_per_epoch_and_no_bar(capsys):
    show_epochs(2)
    with terminal.progress("features", 10) as advance:
        advance(10)
    out, err = capsys.readouterr()
    assert out.splitlines() == [terminal.epoch_line(epoch, 2, METRICS) for epoch in (1, 2)]
    assert err == ""


def test_a_terminal_gets_the_same_lines_and_a_bar_per_epoch(capsys, in_terminal):
    stderr = in_terminal()
    show_epochs(3)
    assert capsys.readouterr().out.splitlines() == [terminal.epoch_line(epoch, 3, METRICS) for epoch in (1, 2, 3)]
    drawn = stderr.getvalue()
    assert set(re.findall(r"epoch \d/\d", drawn)) == {"epoch 1/3", "epoch 2/3", "epoch 3/3"}
    assert "images/s" in drawn and "\n" not in drawn
    assert drawn.rstrip(" ").endswith("\r")  # the bar is wiped away


def test_an_error_removes_the_bar(in_terminal):
    stderr = in_terminal()
    with pytest.raises(ZeroDivisionError), terminal.progress("features", 8) as advance:
        advance(4)
        advance(1 / 0)
    assert "features" in stderr.getvalue() and stderr.getvalue().rstrip(" ").endswith("\r")


def test_a_warning_is_framed_on_stderr(capsys):
    terminal.say("run      Stand-in · blog")
    terminal.warn("DEMO: not the real thing", "data: generated", "weights: random")
    out, err = capsys.readouterr()
    assert out == "run      Stand-in · blog\n"
    first, *lines, last = err.strip().splitlines()
    assert set(first) == set(last) == {"!"}
    assert lines == ["!!  DEMO: not the real thing", "!!  data: generated", "!!  weights: random"]


PRINTS = (
    "from pipeline import terminal; terminal.say('· ' * 9); terminal.say('×'); terminal.warn('é'); terminal.flush()"
)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("fault", ["unread", "full", "closed", "ascii"])
def test_nothing_printed_ends_a_process(stream, fault):
    if fault == "full" and not Path("/dev/full").exists():
        pytest.skip("no device that is always full")
    program = PRINTS if fault != "closed" else f"import sys, os; sys.{stream}.close(); {PRINTS}"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    reader, writer = os.pipe()
    os.close(reader)
    with Path("/dev/full" if fault == "full" else os.devnull).open("w") as full:
        if fault in ("unread", "full"):
            streams[stream] = writer if fault == "unread" else full
        environment = os.environ | ({"PYTHONIOENCODING": "ascii"} if fault == "ascii" else {})
        done = subprocess.run([sys.executable, "-c", program], env=environment, text=True, timeout=60, **streams)
    os.close(writer)
    assert done.returncode == 0
    assert not done.stderr or ("!!  " in done.stderr and "Error" not in done.stderr)
    if fault == "ascii":
        assert done.stdout.endswith("\\xd7\n")
