"""What a person sees: a line an epoch, warnings that can't be overlooked, bars in terminals only."""

import io
import re
import sys

import pytest

from pipeline import terminal

FIGURES = {
    "epoch": 3,
    "train/loss": 0.51234,
    "train/accuracy": 0.8125,
    "val/loss": 1.25,
    "val/accuracy": 0.7,
    "train/lr": 0.005,
    "time/train_seconds": 12.345,
    "time/val_seconds": 0.5,
}
SPEED = {"speed/train_images_per_second": 12345.6}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def in_terminal(monkeypatch):
    """Puts a terminal in the place of stderr, within the test (pytest takes stderr back before that)."""

    def put():
        found = Terminal()
        monkeypatch.setattr(sys, "stderr", found)
        return found

    return put


def test_an_epochs_line_has_its_figures():
    line = terminal.epoch_line(3, 20, FIGURES | SPEED)
    assert line == (
        "epoch  3/20  loss 0.5123  accuracy 81.25%  val loss 1.2500  val accuracy 70.00%  lr 5.00e-03"
        "  12.35 s + 0.50 s  12,346 images/s"
    )


def test_epochs_stand_below_each_other():
    lines = [terminal.epoch_line(epoch, 100, FIGURES) for epoch in (1, 10, 100)]
    assert [line[: line.index("  loss")] for line in lines] == ["epoch   1/100", "epoch  10/100", "epoch 100/100"]


def test_no_speed_is_shown_where_there_is_none():
    assert terminal.epoch_line(1, 1, FIGURES).endswith(" s + 0.50 s")


def test_the_rate_that_was_applied_goes_before_the_schedules():
    assert "  lr 3.00e-05  " in terminal.epoch_line(1, 1, FIGURES | {"train/lr_applied": 3e-5})


def epochs(count=2):
    with terminal.epochs_progress(count, 8) as (advance, finish):
        for epoch in range(1, count + 1):
            assert advance(4) is None
            assert advance(4) is None
            finish(FIGURES | {"epoch": epoch})


def test_a_file_gets_a_line_an_epoch_and_nothing_else(capsys):
    epochs()
    out, err = capsys.readouterr()
    assert out.splitlines() == [terminal.epoch_line(epoch, 2, FIGURES) for epoch in (1, 2)]
    assert err == ""


def test_a_terminal_gets_the_same_lines_and_a_bar_an_epoch(capsys, in_terminal):
    stderr = in_terminal()
    epochs(3)
    out, _ = capsys.readouterr()
    assert out.splitlines() == [terminal.epoch_line(epoch, 3, FIGURES) for epoch in (1, 2, 3)]
    drawn = stderr.getvalue()
    assert set(re.findall(r"epoch \d/\d", drawn)) == {"epoch 1/3", "epoch 2/3", "epoch 3/3"}
    assert "images/s" in drawn
    assert drawn.rstrip(" ").endswith("\r")  # the bar is wiped away
    assert "\n" not in drawn


def test_a_bar_is_for_terminals(capsys, in_terminal):
    stderr = in_terminal()
    with terminal.progress("features", 10) as advance:
        assert advance(10) is None
    assert "features" in stderr.getvalue()
    assert capsys.readouterr().out == ""


def test_no_bar_in_a_file(capsys):
    with terminal.progress("features", 10) as advance:
        assert advance(10) is None
    assert capsys.readouterr() == ("", "")


def test_a_bar_is_wiped_away_when_an_error_ends_it(in_terminal):
    stderr = in_terminal()
    with pytest.raises(ZeroDivisionError), terminal.epochs_progress(2, 8) as (advance, _):
        advance(4)
        advance(1 / 0)
    assert stderr.getvalue().rstrip(" ").endswith("\r")


def test_say_is_a_line_on_stdout(capsys):
    terminal.say("run      Stand-in · blog")
    assert capsys.readouterr() == ("run      Stand-in · blog\n", "")


def test_shout_is_framed_on_stderr(capsys):
    terminal.shout("DEMO: not the real thing", "data: generated", "weights: random")
    out, err = capsys.readouterr()
    assert out == ""
    rule = "!" * 78
    assert err.split("\n") == [
        "", rule, "!!  DEMO: not the real thing", "!!  data: generated", "!!  weights: random", rule, "", ""
    ]  # fmt: skip
