"""`python -m pipeline.run`: all stages in order, in a folder of its own, each repeat in a process."""

import subprocess
import sys
import threading
from functools import partial

import pytest
from stores import own_store  # noqa: F401 (each test has its own)
from trainings import SMALL, delivered, light, once, threads  # noqa: F401 (threads: one is enough)

from pipeline import children, compare, config, download, evaluate, files, hardware, repeats, run, sustain, train
from pipeline.errors import StageError, Stopped
from pipeline.tracking import pending, publisher
from pipeline.training import state

FIRST = "20260102-030405-linear-probe"


@pytest.fixture
def outputs(tmp_path):
    """The folder of DVC's stages. `runs` and `reports` are beside it."""
    return tmp_path / "outputs"


@pytest.fixture
def called(monkeypatch):
    """The stages as they are called, with their arguments; none of them does anything. It is always the same second."""
    calls = []
    for stage in (hardware, download, train, evaluate, sustain, compare):
        monkeypatch.setattr(stage, "run", lambda *args, stage=stage: calls.append((stage, *args)))
    monkeypatch.setattr(train, "train", lambda *args: calls.append((train, *args)) or (None, "the model"))
    monkeypatch.setattr(repeats, "run_repeats", lambda *args: calls.append((repeats, *args)))
    monkeypatch.setattr(repeats, "find_unfinished", lambda *_: None)
    monkeypatch.setattr(children, "starter", lambda module, device: module)
    monkeypatch.setattr(run.time, "strftime", lambda form: FIRST[:15])
    return calls


@pytest.fixture
def in_process(monkeypatch, settings_of, outputs, light):
    """Runs the command with its repeats in this process; gives the status of each."""

    def start(*overrides):
        settings, statuses = settings_of(*SMALL, *overrides), []

        def start_child(number, folder):
            try:
                run.run_repeat(settings, folder, number)
                statuses.append(0)
            except Stopped as error:
                statuses.append(error.status)
            publisher.deliver_all()
            return statuses[-1]

        monkeypatch.setattr(children, "starter", lambda module, device: start_child)
        run.run(settings, outputs)
        return statuses

    return start


@pytest.mark.parametrize("count", [1, 3])
def test_the_stages_run_in_order_in_one_folder(settings_of, outputs, called, count):
    settings, folder = settings_of(f"repeats={count}"), outputs.parent / "runs" / FIRST
    run.run(settings, outputs)
    assert called == [
        (hardware, settings, folder),
        (download, settings, folder),
        (repeats, settings, folder, run.REPEATED, count, "run"),
        (compare, settings, folder, outputs.parent / "reports"),
    ]
    assert folder.is_dir() and not outputs.exists()


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_an_interrupted_run_goes_on_in_its_folder_unless_it_must_not(settings_of, outputs, called, monkeypatch, resume):
    monkeypatch.setattr(repeats, "find_unfinished", lambda *_: outputs.parent / "earlier")
    run.run(settings_of(f"resume={resume}"), outputs)
    folder = outputs.parent / ("earlier" if resume == "auto" else f"runs/{FIRST}")
    assert called[2][2] == called[3][2] == folder
    assert [path.name for path in (outputs.parent / "runs").iterdir()] == ([] if resume == "auto" else [FIRST])


@pytest.mark.parametrize("missing", [("train", "evaluate", "sustain"), ("evaluate", "sustain"), ()])
def test_a_repeat_runs_the_stages_that_are_missing(settings_of, called, monkeypatch, tmp_path, missing):
    monkeypatch.setattr(repeats, "missing_stages", lambda *args: list(missing))
    settings = settings_of("repeats=3")
    run.run_repeat(settings, tmp_path, 2)
    modules = {"train": train, "evaluate": evaluate, "sustain": sustain}
    nets = {"evaluate": ["the model" if "train" in missing else None]}
    assert called == [(modules[stage], settings, tmp_path, 2, *nets.get(stage, [])) for stage in missing]


def test_runs_of_the_same_moment_do_not_share_a_folder(settings_of, outputs, called):
    run.run(settings_of(), outputs)
    threads = [threading.Thread(target=partial(run.run, settings_of(), outputs)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    names = {call[2].name for call in called if call[0] is hardware}
    assert names == {FIRST, *(f"{FIRST}-{number}" for number in range(2, 10))}


def test_a_stage_that_fails_ends_it_but_a_report_that_fails_does_not(settings_of, outputs, called, monkeypatch, capsys):
    def fail(*args):
        raise StageError("the store is away")

    monkeypatch.setattr(compare, "run", fail)
    run.run(settings_of(), outputs)
    assert "the store is away" in capsys.readouterr().out
    monkeypatch.setattr(repeats, "run_repeats", fail)
    with pytest.raises(StageError):
        run.run(settings_of(), outputs)


def test_it_leaves_what_the_stages_leave_and_one_run(in_process, outputs):
    assert in_process() == [0]
    (folder,) = (outputs.parent / "runs").iterdir()
    names = {"hardware.json", "inputs.json", "train", "evaluate", "sustain"}
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == names
    (training,) = [training for training in delivered() if "workload" in training.data.tags]
    assert training.info.status == "FINISHED" and not {"restored", "resumed"} & training.data.tags.keys()
    assert "test/accuracy" in training.data.metrics
    assert 0 < training.data.metrics["time/startup_seconds"] < training.data.metrics["time/process_seconds"]
    assert training.data.tags["record"] == files.read_json(folder / "train" / "record.json")["id"]
    assert all((folder / stage / "repeats" / "figures.csv").exists() for stage in run.REPEATED)
    report = (outputs.parent / "reports" / "compare.md").read_text(encoding="utf-8")
    assert training.info.run_id[:8] in report
    assert pending.entries() == []


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_the_same_command_finishes_what_was_stopped_in_any_stage(in_process, outputs, monkeypatch, stage):
    def stop(*args):
        raise Stopped(143)

    def save_and_stop(*args, save=state.save):
        save(*args)
        stop()

    with monkeypatch.context() as patch:
        patch.setattr(*((state, "save", save_and_stop) if stage == "train" else (evaluate, "_write_predictions", stop)))
        with pytest.raises(Stopped) as caught:
            in_process()
    assert caught.value.status == 143
    (stopped,) = delivered()
    assert stopped.info.status == ("KILLED" if stage == "train" else "FINISHED")
    assert in_process() == [0]
    (training,) = [training for training in delivered() if "workload" in training.data.tags]
    assert training.info.run_id == stopped.info.run_id and training.info.status == "FINISHED"
    assert training.data.tags.get("resumed") == ("1" if stage == "train" else None)
    assert "test/accuracy" in training.data.metrics and len(list((outputs.parent / "runs").iterdir())) == 1


PROCESS = """
import sys
from pathlib import Path
from pipeline import config, download, hardware, run
from pipeline.data import datasets
from pipeline.tracking import pending

root = Path(sys.argv[1])
pending.FOLDER, datasets.CACHE = root / "pending", root / "cache"
settings = config.load(sys.argv[2:])
for stage in (hardware, download):
    stage.run(settings, root)
run.repeats.Plan("a" * 32, 1, [0], 0.0, {}).write(root / "train" / "set.json")
run.run_repeat(settings, root, 1)
print("imported", *sorted({"mlflow", "matplotlib", "scipy", "pandas"} & {*sys.modules}))
"""


def test_a_process_that_trains_imports_neither_mlflow_nor_matplotlib(tmp_path):
    overrides = ["data.source=synthetic", "data.limit=6", "weights=random", "device=cpu", "sustain_seconds=0", *SMALL]
    command = [sys.executable, "-c", PROCESS, str(tmp_path), *overrides]
    ended = subprocess.run(command, cwd=config.ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1].split()[:1] == ["imported"], ended.stdout
    assert not {"mlflow", "matplotlib"} & set(ended.stdout.splitlines()[-1].split())
    assert (tmp_path / "evaluate" / "record.json").exists() and len(list((tmp_path / "pending").iterdir())) == 2
