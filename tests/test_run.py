"""`python -m pipeline.run`: all stages in order, in a folder of its own, in one process or in one for each repeat."""

import threading
from functools import partial

import pytest
from stores import own_store, runs  # noqa: F401 (own_store: each test has its own)
from trainings import SMALL, light, once, threads  # noqa: F401 (threads: one is enough)

from pipeline import compare, download, evaluate, files, hardware, repeats, run, sustain, train
from pipeline.errors import StageError

STAGES = (hardware, download, train, evaluate, sustain, compare)
FIRST = "20260102-030405-linear-probe"


@pytest.fixture
def outputs(tmp_path):
    """The folder of DVC's stages. `runs` and `reports` are beside it."""
    return tmp_path / "outputs"


@pytest.fixture
def called(monkeypatch):
    """The stages as they are called, with their arguments; none of them does anything. It is always the same second."""
    calls = []
    for stage in STAGES:
        monkeypatch.setattr(stage, "run", lambda *args, stage=stage, **options: calls.append((stage, *args)))
    monkeypatch.setattr(repeats, "summarise", lambda folder, stage: calls.append((stage, folder)))
    monkeypatch.setattr(run.time, "strftime", lambda form: FIRST[:15])
    return calls


@pytest.fixture
def driven(monkeypatch):
    """The sets of repeats that are run, without a process; `interrupted` is the folder of one that can go on."""
    calls = []
    monkeypatch.setattr(repeats, "run_repeats", lambda *args: calls.append(args))
    monkeypatch.setattr(repeats, "find_unfinished", lambda *_: None)
    return calls


def test_the_stages_run_in_order_in_one_folder(settings_of, outputs, called):
    settings = settings_of()
    run.run(settings, outputs)
    own = outputs.parent / "runs" / FIRST
    assert called == [
        *((stage, settings, own) for stage in STAGES[:5]),
        *((stage, own) for stage in ("train", "evaluate", "sustain")),
        (compare, settings, own, outputs.parent / "reports"),
    ]
    assert own.is_dir() and not outputs.exists()


def test_the_training_learns_how_long_the_earlier_stages_took(settings_of, outputs, called, monkeypatch):
    clock, earlier_seconds = [100.0], []
    monkeypatch.setattr(run.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(download, "run", lambda *_: clock.insert(0, 107.5))
    monkeypatch.setattr(train, "run", lambda *_, earlier: earlier_seconds.append(earlier))
    run.run(settings_of(), outputs)
    assert earlier_seconds == [7.5]


def test_repeats_are_run_and_compared(settings_of, outputs, called, driven):
    settings, own = settings_of("repeats=3"), outputs.parent / "runs" / FIRST
    run.run(settings, outputs)
    assert [arguments[:4] for arguments in driven] == [(settings, own, run.REPEATED, 3)]
    assert [(stage, folder) for stage, _, folder, *_ in called] == [(s, own) for s in (hardware, download, compare)]


def test_an_interrupted_set_goes_on_in_its_folder(settings_of, outputs, called, driven, monkeypatch):
    monkeypatch.setattr(repeats, "find_unfinished", lambda *_: outputs.parent / "earlier")
    run.run(settings_of("repeats=3"), outputs)
    assert driven[0][1] == called[-1][2] == outputs.parent / "earlier"
    assert list((outputs.parent / "runs").iterdir()) == []


@pytest.mark.parametrize("missing", [("train", "evaluate", "sustain"), ("sustain",), ()])
def test_a_repeat_runs_the_stages_that_are_missing(settings_of, called, monkeypatch, tmp_path, missing):
    monkeypatch.setattr(repeats, "missing_stages", lambda *args: list(missing))
    settings = settings_of("repeats=3")
    run.run_repeat(settings, tmp_path, 2)
    modules = {"train": train, "evaluate": evaluate, "sustain": sustain}
    assert called == [(modules[stage], settings, tmp_path, 2) for stage in missing]


def test_runs_of_the_same_moment_do_not_share_a_folder(settings_of, outputs, called):
    run.run(settings_of(), outputs)
    threads = [threading.Thread(target=partial(run.run, settings_of(), outputs)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    names = {call[2].name for call in called if call[0] is hardware}
    assert names == {FIRST, *(f"{FIRST}-{number}" for number in range(2, 10))}


@pytest.mark.parametrize("repeats_count", [1, 3])
def test_a_stage_that_fails_ends_it(settings_of, outputs, called, driven, monkeypatch, repeats_count):
    def fails(*args, **options):
        raise StageError("no images")

    monkeypatch.setattr(train, "run", fails)
    monkeypatch.setattr(repeats, "run_repeats", fails)
    with pytest.raises(StageError, match="no images"):
        run.run(settings_of(f"repeats={repeats_count}"), outputs)
    assert [stage for stage, *_ in called] == [hardware, download]


@pytest.mark.usefixtures("light")
def test_it_leaves_what_the_stages_leave_and_one_run(settings_of, outputs):
    run.run(settings_of(*SMALL), outputs)
    (own,) = (outputs.parent / "runs").iterdir()
    assert {path.name for path in own.iterdir()} == {"hardware.json", "inputs.json", "train", "evaluate", "sustain"}
    (training,) = [training for training in runs() if "workload" in training.data.tags]
    assert training.info.status == "FINISHED" and "restored" not in training.data.tags
    assert "test/accuracy" in training.data.metrics
    assert 0 < training.data.metrics["time/startup_seconds"] < training.data.metrics["time/process_seconds"]
    assert training.data.tags["record"] == files.read_json(own / "train" / "record.json")["id"]
    assert all((own / stage / "repeats" / "figures.csv").exists() for stage in run.REPEATED)
    report = (outputs.parent / "reports" / "compare.md").read_text(encoding="utf-8")
    assert training.info.run_id[:8] in report
