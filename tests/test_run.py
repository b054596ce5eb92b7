"""All stages: in order, in a folder that no other run has, in one process or in one for each repeat."""

import subprocess
import sys
import threading

import pytest
from stores import own_store, runs  # noqa: F401 (own_store: each test has its own)
from trainings import REPEATED, SMALL, STEPS, light, once, threads  # noqa: F401 (threads: one is enough)

from pipeline import compare, config, download, evaluate, files, hardware, repeats, run, sustain, train
from pipeline.errors import StageError
from pipeline.profiling import score_steps

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

        def call(*args, stage=stage, **changes):
            calls.append((stage, *args))

        monkeypatch.setattr(stage, "run", call)
    monkeypatch.setattr(repeats, "summarise", lambda folder, stage: calls.append((f"{stage} summed up", folder)))
    return calls


def test_the_stages_run_in_order_in_one_folder(settings_of, base, called, tmp_path):
    settings = settings_of()
    run.run(settings, tmp_path / "outputs")
    own = base / "20260102-030405-linear-probe"
    assert [call for call in called if not isinstance(call[0], str)] == [(stage, settings, own) for stage in STAGES]
    summed_up = [call for call in called if isinstance(call[0], str)]
    assert summed_up == [(f"{stage} summed up", own) for stage in ("train", "evaluate", "sustain")]
    assert own.is_dir() and not (tmp_path / "outputs").exists()


@pytest.mark.usefixtures("base", "called")
def test_the_training_learns_how_long_the_stages_before_took(settings_of, monkeypatch, tmp_path):
    passed, told = [100.0], []
    monkeypatch.setattr(run.time, "monotonic", lambda: passed[0])
    monkeypatch.setattr(download, "run", lambda *_: passed.insert(0, 107.5))
    monkeypatch.setattr(train, "run", lambda *_, earlier: told.append(earlier))
    run.run(settings_of(), tmp_path)
    assert told == [7.5]


# --- repeats


@pytest.fixture
def driven(monkeypatch):
    """What is driven; no process is started."""
    calls = []
    monkeypatch.setattr(repeats, "run_repeats", lambda *args: calls.append(args))
    return calls


def test_repeats_are_driven_and_compared(settings_of, base, called, driven, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py", "--repeats", "3"])
    monkeypatch.setattr(repeats, "find_unfinished", lambda *_: None)
    settings, own = settings_of("repeats=3"), base / "20260102-030405-linear-probe"
    run.run(settings, base)
    assert driven == [(settings, own, run.REPEATED, 3, [sys.executable, "-m", "pipeline.run", "--repeats", "3"])]
    assert [(stage, place) for stage, _, place in called] == [(stage, own) for stage in (hardware, download, compare)]


def test_repeats_that_were_cut_off_go_on_in_their_folder(settings_of, base, called, driven, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(repeats, "find_unfinished", lambda *args: asked.append(args) or tmp_path / "earlier")
    settings, own = settings_of("repeats=3"), base / "20260102-030405-linear-probe"
    run.run(settings, base)
    assert asked == [(base, settings, own)] and not own.exists()
    ((_, place, *_),) = driven
    assert place == called[-1][2] == tmp_path / "earlier"


def test_a_failing_repeat_is_not_compared(settings_of, base, called, monkeypatch):
    def fails(*args):
        raise repeats.RepeatFailedError("repeat 2 of 3 ended", 7)

    monkeypatch.setattr(repeats, "find_unfinished", lambda *_: None)
    monkeypatch.setattr(repeats, "run_repeats", fails)
    with pytest.raises(repeats.RepeatFailedError):
        run.run(settings_of("repeats=3"), base)
    assert [stage for stage, *_ in called] == [hardware, download]


@pytest.mark.parametrize("missing", [("train", "evaluate", "sustain"), ("sustain",), ()])
def test_a_repeat_runs_the_stages_that_are_missing(settings_of, called, monkeypatch, tmp_path, missing):
    asked = []
    monkeypatch.setattr(repeats, "missing_stages", lambda *args: asked.append(args) or list(missing))
    settings = settings_of("repeats=3")
    run.repeat(settings, tmp_path, 2)
    assert asked == [(tmp_path, run.REPEATED, 2)]
    modules = {"train": train, "evaluate": evaluate, "sustain": sustain}
    assert called == [(modules[stage], settings, tmp_path, 2) for stage in missing]


# --- folders


def test_two_in_the_same_second_do_not_share_a_folder(settings_of, base, called):
    for _ in range(3):
        run.run(settings_of(), base)
    run.run(settings_of("recipe=blog"), base)
    names = [call[2].name for call in called if call[0] is train]
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
    folders = [call[2] for call in called if call[0] is hardware]
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
from pipeline import cli, evaluate, repeats, run, sustain, train

for stage in (run.hardware, run.download, train, evaluate, sustain):
    stage.run = lambda *_, stage=stage, **changes: print(stage.__name__)
repeats.summarise = lambda *_: None
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
def test_it_leaves_what_the_stages_leave_and_one_run(settings_of, base, tmp_path, monkeypatch):
    whole = sustain.run
    monkeypatch.setattr(sustain, "run", lambda *args: whole(*args, steps=STEPS))
    run.run(settings_of(*SMALL, *REPEATED), tmp_path / "outputs")
    (own,) = base.iterdir()
    assert {path.name for path in own.iterdir()} == {"hardware.json", "inputs.json", "train", "evaluate", "sustain"}
    (made,) = runs()
    assert made.info.status == "FINISHED" and "restored" not in made.data.tags
    assert {"test/accuracy", score_steps.metric("convnet_fp32", "images_per_second")} <= set(made.data.metrics)
    assert 0 < made.data.metrics["time/startup_seconds"] < made.data.metrics["time/process_seconds"]
    for stage in run.REPEATED:
        assert (own / stage / "repeats" / "figures.csv").exists()
    assert made.data.tags["record"] == files.read_json(own / "train" / "record.json")["id"]
    assert made.info.run_id[:8] in (tmp_path / "reports" / "compare.md").read_text(encoding="utf-8")
