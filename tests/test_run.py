"""All stages in one process: in order, and in a folder that no other run has."""

import subprocess
import sys
import threading

import pytest
from test_tracking import runs, store  # noqa: F401 (store: each test has its own)
from test_train import REPEATED, SMALL, light, once, threads  # noqa: F401 (threads: one is enough)

from pipeline import compare, config, download, evaluate, files, hardware, run, sustain, train
from pipeline.errors import StageError

STAGES = (hardware, download, train, evaluate, sustain, compare)


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    """The folder of all runs, not there yet; every run starts in the same second."""
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(run.time, "strftime", lambda form: "20260102-030405")
    monkeypatch.setattr(compare, "REPORTS", tmp_path / "reports")
    return tmp_path / "runs"


@pytest.fixture
def called(monkeypatch):
    """The stages as they are called, with what; none of them does anything."""
    calls = []
    for stage in STAGES:
        monkeypatch.setattr(stage, "run", lambda settings, folder, stage=stage: calls.append((stage, settings, folder)))
    return calls


def test_the_stages_run_in_order_in_one_folder(settings_of, base, called, tmp_path):
    settings = settings_of()
    run.run(settings, tmp_path / "outputs")
    own = base / "20260102-030405-linear-probe"
    assert called == [(stage, settings, own) for stage in STAGES]
    assert own.is_dir() and not (tmp_path / "outputs").exists()


def test_two_in_the_same_second_do_not_share_a_folder(settings_of, base, called):
    for _ in range(3):
        run.run(settings_of(), base)
    run.run(settings_of("recipe=blog"), base)
    names = [folder.name for stage, _, folder in called if stage is train]
    first = "20260102-030405-linear-probe"
    assert names == [first, f"{first}-2", f"{first}-3", "20260102-030405-blog"]


def test_two_at_the_same_moment_do_not_share_a_folder(settings_of, base, called):
    settings, together = settings_of(), threading.Barrier(8)

    def start():
        together.wait(30)
        run.run(settings, base)

    starters = [threading.Thread(target=start) for _ in range(8)]
    for each in starters:
        each.start()
    for each in starters:
        each.join(30)
    folders = [folder for stage, _, folder in called if stage is hardware]
    assert len(folders) == len(set(folders)) == 8


def test_a_stage_that_fails_ends_it(settings_of, base, called, monkeypatch):
    def fails(settings, folder):
        raise StageError("no images")

    monkeypatch.setattr(download, "run", fails)
    with pytest.raises(StageError, match="no images"):
        run.run(settings_of(), base)
    assert [stage for stage, *_ in called] == [hardware]


def test_a_folder_that_cannot_be_made_is_named(settings_of, base, called):
    base.write_text("a file")
    with pytest.raises(StageError, match=r"^can't write .*linear-probe: "):
        run.run(settings_of(), base)
    assert called == []


WITHOUT_SCIPY = """
import sys
from pathlib import Path

sys.modules["scipy"] = None
from pipeline import cli, run

for stage in (run.hardware, run.download, run.train, run.evaluate, run.sustain):
    stage.run = lambda settings, folder, stage=stage: print(stage.__name__)
run._own_folder = Path
sys.argv = ["run.py"]
cli.main(run.run, "")
"""


def test_without_what_compare_alone_needs_all_that_is_before_it_is_done():
    command = [sys.executable, "-c", WITHOUT_SCIPY]
    ended = subprocess.run(command, cwd=config.ROOT, capture_output=True, text=True)
    assert ended.stdout.split() == [stage.__name__ for stage in STAGES[:-1]]
    assert ended.stderr == "run: scipy is missing: pip install -r requirements.txt\n"
    assert ended.returncode == 1


@pytest.mark.usefixtures("light")
def test_it_leaves_what_the_stages_leave_and_one_run(settings_of, base, tmp_path):
    run.run(settings_of(*SMALL, *REPEATED), tmp_path / "outputs")
    (own,) = base.iterdir()
    assert {path.name for path in own.iterdir()} == {"hardware.json", "inputs.json", "train", "evaluate", "sustain"}
    (made,) = runs()
    assert made.info.status == "FINISHED" and "restored" not in made.data.tags
    assert {"test/accuracy", "speed/sustained_images_per_second"} <= set(made.data.metrics)
    assert made.data.tags["record"] == files.read_json(own / "train" / "record.json")["id"]
    assert made.info.run_id[:8] in (tmp_path / "reports" / "compare.md").read_text(encoding="utf-8")
