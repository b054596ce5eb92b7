"""The driver: which processes it starts, in which order, what it writes down, and how it and they end. Its children are
stand-ins, but for those of one real set at the end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from stores import client, own_store, record_of, runs  # noqa: F401 (own_store: each test has its own)

from pipeline import config, files, repeats
from pipeline.errors import StageError, UsageError
from pipeline.tracking import descriptions, publisher, records, store

STAND_IN = """
import json, os, sys
from pathlib import Path

number, _, folder = os.environ["TRAINMARK_REPEAT"].partition(":")
plan = json.loads(Path(folder, "train", "set.json").read_text())
tags = {"repeats.id": plan["id"], "repeat": number, "repeats": str(plan["repeats"])}
for stage in STAGES:
    out = Path(folder, stage, *([] if number == "1" else ["repeats", number]))
    out.mkdir(parents=True, exist_ok=True)
    record = {"id": plan["id"] + number, "tags": tags, "params": {"settings.seed": number}}
    record["metrics"] = {"a": int(number)}
    record["epochs"] = [{"figures": {"epoch": 1, "b": 2 * int(number)}}]
    (out / "record.json").write_text(json.dumps(record))
with open(Path(folder, "calls"), "a") as calls:
    print(*STAGES, number, file=calls)
print("child", number, flush=True)
"""
"""What a child does: it leaves the records of STAGES."""

ALL = ("train", "evaluate", "sustain")


def child(then="", stages=ALL, first=""):
    """The command of a stand-in; `first` is done before it leaves anything, `then` after."""
    return [sys.executable, "-c", f"STAGES = {stages!r}\n{first}\n{STAND_IN}\n{then}"]


@pytest.fixture
def settings_for():
    """Settings of three repeats on generated images; `key=value` overrides are laid over."""

    def make(*overrides):
        mine = ("data.source=synthetic", "data.limit=6", "weights=random", "device=cpu", "repeats=3", "seed=4")
        return config.load([*mine, *overrides])

    return make


@pytest.fixture
def folder(tmp_path):
    return prepared(tmp_path / "outputs")


def prepared(place, **changes):
    """A folder as `hardware` and `download` leave it."""
    model = config.load().work.model
    inputs = {
        "data": {"requested": "synthetic", "limit": 6, "digest": "synthetic-1"},
        "weights": {"model": model, "requested": "random", "digest": None},
        "fallback": [],
    }
    files.write_json(place / "inputs.json", inputs)
    files.write_json(place / "hardware.json", {"machine": "0123456789ab", "torch": "2.14.1"} | changes)
    return place


@pytest.fixture(autouse=True)
def updated(monkeypatch):
    """The store is left alone: the repeats after which the parent run is updated."""
    calls = []
    monkeypatch.setattr(publisher, "update_parent", lambda record, experiment: calls.append(record["tags"]["repeat"]))
    monkeypatch.setattr(descriptions, "describe_spread", lambda trained, evaluated: "a spread")
    return calls


@pytest.fixture(autouse=True)
def completed(monkeypatch):
    """The repeats whose runs get the stages that they lack; nothing is logged."""
    calls = []
    monkeypatch.setattr(
        publisher, "add_missing_stages", lambda record, experiment, folders: calls.append(folders["train"].name)
    )
    return calls


def drive(settings, folder, command, stages=ALL):
    repeats.run_repeats(settings, folder, stages, settings.repeats, repeats.command_starter(command))


def calls(folder):
    """The stages that children ran, each with its repeat."""
    return (folder / "calls").read_text().splitlines()


def plan_of(folder, stage="train"):
    return files.read_json(folder / stage / "set.json")


# --- what is started, and what is written down


def test_a_process_is_started_for_each_repeat_in_order(settings_for, folder, updated):
    drive(settings_for(), folder, child())
    assert calls(folder) == [f"train evaluate sustain {number}" for number in (1, 2, 3)]
    assert updated == ["1", "2", "3", "1"]


def test_the_plan_is_there_before_the_first_repeat_and_tells_what_happened(settings_for, folder):
    copy = "import shutil; shutil.copy(Path(folder, 'train', 'set.json'), Path(folder, f'plan {number}'))"
    begun = time.time_ns() // 1_000_000
    drive(settings_for("repeat_pause=0.05"), folder, child(then=copy))
    first, last = json.loads((folder / "plan 1").read_text()), plan_of(folder)
    assert (first["repeats"], first["seeds"], first["pause_seconds"]) == (3, [4, 5, 6], 0.05)
    assert first["ended"] is None and len(first["id"]) == 32
    assert [(entry["repeat"], "end" in entry) for entry in first["order"]] == [(1, False)]
    for key in ("id", "fixed", "seeds"):
        assert last[key] == first[key]
    assert [(entry["repeat"], entry["status"]) for entry in last["order"]] == [(1, 0), (2, 0), (3, 0)]
    times = [moment for entry in last["order"] for moment in (entry["start"], entry["end"])]
    assert [begun, *times, last["ended"]] == sorted([begun, *times, last["ended"]])
    assert "pause_seconds" not in last["order"][0]
    for before, entry in zip(last["order"], last["order"][1:], strict=False):
        assert entry["pause_seconds"] == (entry["start"] - before["end"]) / 1000 >= 0.05


def test_a_training_knows_which_repeat_it_is(settings_for, folder):
    assert repeats.repeat_tags(settings_for("repeats=1"), folder, 1) == {}
    plan = repeats.Plan("a" * 32, 3, [4, 5, 6], 0.0, {}, [{"repeat": 1, "start": 1}])
    plan.write(folder / "train" / "set.json")
    own = {"repeats.id": "a" * 32, "repeat": "1", "repeats": "3"}
    assert repeats.repeat_tags(settings_for(), folder, 1) == own
    plan.order.append({"repeat": 2, "start": 2, "pause_seconds": 3600.04})
    plan.write(folder / "train" / "set.json")
    assert repeats.repeat_tags(settings_for(), folder, 2) == own | {"repeat": "2", "repeat.pause_seconds": "3600.0"}


def test_each_stage_is_summed_up(settings_for, folder):
    drive(settings_for(), folder, child())
    assert files.read_json(folder / "train" / "metrics.json") == {"a": 2, "std/a": 1, "b": 4, "std/b": 2}
    for stage in ("evaluate", "sustain"):
        assert files.read_json(folder / stage / "metrics.json") == {"a": 2, "std/a": 1}
        assert (folder / stage / "repeats" / "figures.csv").read_text() == "repeat,seed,a\n1,1,1\n2,2,2\n3,3,3\n"


def test_a_stage_alone_is_driven_with_the_trainings_that_are_there(settings_for, folder, updated):
    drive(settings_for(), folder, child(stages=("train",)), ["train"])
    del updated[:]
    drive(settings_for("label=desk"), folder, child(stages=("evaluate",)), ["evaluate"])
    assert calls(folder)[3:] == [f"evaluate {number}" for number in (1, 2, 3)] and updated == ["1"]
    assert plan_of(folder, "evaluate")["seeds"] == [1, 2, 3] and plan_of(folder, "evaluate")["ended"]
    assert plan_of(folder, "evaluate")["id"] == plan_of(folder)["id"]


# --- pauses


@pytest.fixture
def slept(monkeypatch):
    """The seconds that are waited for, in no time."""
    waits = []
    monkeypatch.setattr(repeats.time, "sleep", lambda seconds: waits.append(seconds))
    return waits


def test_two_processes_are_a_pause_apart(settings_for, folder, slept, capsys):
    drive(settings_for("repeat_pause=3600"), folder, child())
    assert len(slept) == 2 and all(3590 < seconds <= 3600 for seconds in slept)
    assert capsys.readouterr().out.count("repeat_pause") == 2


def test_an_evaluation_is_not_waited_for(settings_for, folder, slept):
    settings = settings_for("repeat_pause=3600")
    drive(settings, folder, child(stages=("train",)), ["train"])
    drive(settings, folder, child(stages=("evaluate",)), ["evaluate"])
    assert len(slept) == 2
    drive(settings, folder, child(stages=("sustain",)), ["sustain"])
    assert len(slept) == 4


@pytest.mark.parametrize(("ago", "expected"), [(10, 50), (70, None)])
def test_a_set_that_goes_on_waits_for_what_is_left_of_the_pause(settings_for, folder, slept, ago, expected):
    with pytest.raises(repeats.RepeatFailedError):
        drive(settings_for(), folder, child(first=FAILS_AT_2))
    plan = plan_of(folder)
    plan["order"][0]["end"] -= ago * 1000
    plan["order"][1]["end"] -= ago * 1000
    files.write_json(folder / "train" / "set.json", plan)
    drive(settings_for("repeat_pause=60"), folder, child())
    assert len(slept) == (2 if expected else 1) and slept[-1] == pytest.approx(60, abs=5)
    assert expected is None or slept[0] == pytest.approx(expected, abs=5)
    assert plan_of(folder)["pause_seconds"] == 60


# --- a set that was cut off

FAILS_AT_2 = "import os, sys; os.environ['TRAINMARK_REPEAT'].startswith('2:') and sys.exit(7)"


def cut_off(settings, folder, stages=ALL):
    """Leaves a set whose first repeat is done."""
    with pytest.raises(repeats.RepeatFailedError):
        drive(settings, folder, child(first=FAILS_AT_2, stages=stages), stages)
    assert len(calls(folder)) == 1


def test_a_set_that_was_cut_off_goes_on_with_what_is_missing(settings_for, folder, capsys):
    cut_off(settings_for(), folder)
    before = plan_of(folder)
    drive(settings_for("tracking.experiment=another", "compare.tainted=true", "repeat_pause=0.01"), folder, child())
    assert calls(folder) == [f"train evaluate sustain {number}" for number in (1, 2, 3)]
    after = plan_of(folder)
    assert (after["id"], after["order"][:2]) == (before["id"], before["order"])
    assert [entry["repeat"] for entry in after["order"]] == [1, 2, 2, 3] and after["ended"]
    assert "resumed  1 of 3 repeats" in capsys.readouterr().out


def test_a_set_goes_on_though_dvc_deleted_what_its_first_repeats_left(settings_for, folder):
    settings = settings_for()
    with pytest.raises(repeats.RepeatFailedError):
        drive(settings, folder, child(first=FAILS_AT_2.replace("'2:'", "'3:'"), stages=("train",)), ("train",))
    left = {path: path.read_bytes() for path in (folder / "train").rglob("record.json")}
    assert len(left) == 2
    shutil.rmtree(folder / "train" / "repeats")
    (folder / "train" / "record.json").unlink()
    drive(settings, folder, child(stages=("train",)), ("train",))
    assert calls(folder) == ["train 1", "train 2", "train 3"]
    assert all(path.read_bytes() == text for path, text in left.items())
    assert not (folder / repeats.UNFINISHED / "train").exists()


def test_of_a_repeat_the_stages_that_are_missing_are_done(settings_for, folder):
    cut_off(settings_for(), folder)
    (folder / "sustain" / "record.json").unlink()
    assert repeats.missing_stages(folder, ALL, 1) == ["sustain"]
    files.write_json(folder / "evaluate" / "record.json", {"id": "another"})
    assert repeats.missing_stages(folder, ALL, 1) == ["evaluate", "sustain"]
    files.write_json(folder / "train" / "record.json", {"id": "another", "tags": {"repeats.id": "b" * 32}})
    assert repeats.missing_stages(folder, ALL, 1) == list(ALL) == repeats.missing_stages(folder, ALL, 2)


def test_a_set_of_which_all_is_there_but_its_end_is_brought_to_its_end(
    settings_for, folder, updated, completed, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(publisher, "update_parent", lambda *args: len(calls(folder)) == 3 and fail())
        with pytest.raises(StageError, match="away"):
            drive(settings_for(), folder, child())
    drive(settings_for(), folder, child())
    assert len(calls(folder)) == 3 and plan_of(folder)["ended"]
    assert updated == ["1"] and completed == ["train", "2", "3"]


def fail():
    raise StageError("the store is away")


def test_a_complete_set_is_trained_anew_and_nothing_of_it_stays(settings_for, folder):
    drive(settings_for(), folder, child())
    before = plan_of(folder)["id"]
    (folder / "train" / "repeats" / "4").mkdir()
    drive(settings_for(), folder, child())
    assert len(calls(folder)) == 6 and plan_of(folder)["id"] != before
    assert not (folder / "train" / "repeats" / "4").exists()


@pytest.mark.parametrize(
    ("overrides", "changes", "said"),
    [
        (["lr=0.5", "recipe=finetune"], {}, "recipe, recipes."),
        (["repeats=4"], {}, "repeats"),
        ([], {"machine": "ba9876543210"}, "machine"),
    ],
)
def test_a_set_of_other_settings_starts_anew_and_says_so(settings_for, folder, capsys, overrides, changes, said):
    cut_off(settings_for(), folder)
    before = plan_of(folder)["id"]
    prepared(folder, **changes)
    settings = settings_for(*overrides)
    drive(settings, folder, child())
    assert calls(folder)[1:] == [f"train evaluate sustain {number + 1}" for number in range(settings.repeats)]
    assert plan_of(folder)["id"] != before
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert f"with another {said}" in line


@pytest.mark.parametrize("text", ["{", '{"id": "a"}'])
def test_a_plan_that_cannot_be_read_is_none(settings_for, folder, text):
    files.write_text(folder / "train" / "set.json", text)
    files.write_text(folder / "train" / "stale.txt", "stale")
    drive(settings_for(), folder, child())
    assert len(calls(folder)) == 3 and not (folder / "train" / "stale.txt").exists()


def test_what_download_did_not_look_at_is_refused_before_anything_is_deleted(settings_for, folder):
    drive(settings_for(), folder, child())
    with pytest.raises(UsageError, match=r"^data\.limit: "):
        drive(settings_for("data.limit=5"), folder, child())
    assert (folder / "train" / "record.json").exists()


def test_an_evaluation_goes_on_for_the_same_trainings_alone(settings_for, folder):
    drive(settings_for(), folder, child(stages=("train",)), ["train"])
    with pytest.raises(repeats.RepeatFailedError):
        drive(settings_for(), folder, child(first=FAILS_AT_2, stages=("evaluate",)), ["evaluate"])
    assert calls(folder)[3:] == ["evaluate 1"]
    drive(settings_for(), folder, child(stages=("train",)), ["train"])
    drive(settings_for(), folder, child(stages=("evaluate",)), ["evaluate"])
    assert calls(folder)[7:] == [f"evaluate {number}" for number in (1, 2, 3)]


def test_another_process_at_the_same_set_is_refused(settings_for, folder):
    holds = (
        "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); print(flush=True); input()"
    )
    command = [sys.executable, "-c", holds, str(folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        with pytest.raises(StageError, match="another process"):
            drive(settings_for(), folder, child())
        other.communicate("\n", timeout=30)
    drive(settings_for(), folder, child())
    assert len(calls(folder)) == 3


def test_a_child_that_outlives_its_driver_holds_the_set(folder):
    with repeats._lock(folder) as lock:
        command = [sys.executable, "-c", "input()"]
        left = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, pass_fds=(lock.fileno(),))
    assert not repeats._is_free(folder)
    left.communicate("\n", timeout=30)
    assert repeats._is_free(folder)


# --- below runs/


@pytest.fixture
def base(tmp_path, settings_for):
    """Folders of runs, each with a set whose first repeat is done; the newest is `c`."""
    for name in "abc":
        cut_off(settings_for(f"seed={4 + 2 * (name == 'c')}"), prepared(tmp_path / "runs" / name))
        moment = 1000 + ord(name)
        os.utime(tmp_path / "runs" / name / "train" / "set.json", (moment, moment))
    return tmp_path / "runs"


def test_the_newest_set_of_the_same_settings_goes_on(settings_for, base, folder, capsys):
    assert repeats.find_unfinished(base, settings_for(), folder) == base / "b"
    assert repeats.find_unfinished(base, settings_for("seed=6"), folder) == base / "c"
    assert capsys.readouterr().out.count("note") == 0
    drive(settings_for(), base / "b", child())
    assert repeats.find_unfinished(base, settings_for(), folder) == base / "a"
    with repeats._lock(base / "a"):
        assert repeats.find_unfinished(base, settings_for(), folder) is None


def test_why_the_newest_set_does_not_go_on_is_said(settings_for, base, folder, capsys):
    assert repeats.find_unfinished(base, settings_for("seed=9", "label=desk"), folder) is None
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert "with another seed, label" in line
    assert repeats.find_unfinished(base / "nowhere", settings_for(), folder) is None


# --- how it ends


def test_a_child_that_fails_ends_it_with_its_status(settings_for, folder, capfd):
    with pytest.raises(repeats.RepeatFailedError) as caught:
        drive(settings_for(), folder, child(first=FAILS_AT_2))
    assert caught.value.status == 7 and len(str(caught.value).splitlines()) == 1
    assert "repeat 2 of 3" in str(caught.value)
    assert calls(folder) == ["train evaluate sustain 1"] and plan_of(folder)["ended"] is None
    assert plan_of(folder)["order"][1]["status"] == 7
    assert "child 1" in capfd.readouterr().out  # both write to the same streams


STARTS_ABOVE = f"""
import json, os, sys
from pathlib import Path
sys.path.insert(0, {str(config.ROOT)!r})
from pipeline.tracking import store
folder = os.environ["TRAINMARK_REPEAT"].partition(":")[2]
own = dict([("repeats.id", json.loads(Path(folder, "train", "set.json").read_text())["id"]), ("repeats", "3")])
record = dict(name="x", experiment="mine", started=1, params=dict(), datasets=[], tags=own)
above = store.start_run(record)
store.start_run(record | dict(tags=own | dict(repeat="1")), above)
"""
"""Makes the run above and the first one below it, which then run."""


@pytest.mark.parametrize(
    ("ends", "error", "status"),
    [
        ("os.kill(os.getpid(), 9)", repeats.RepeatFailedError, "FAILED"),
        pytest.param("os.kill(os.getpid(), 2)", KeyboardInterrupt, "KILLED", marks=pytest.mark.slow),
    ],
)
def test_what_a_child_leaves_running_is_ended(settings_for, folder, ends, error, status):
    command = child(first=f"{STARTS_ABOVE}\nimport os, signal, sys; signal.signal(2, signal.SIG_DFL); {ends}")
    with pytest.raises(error) as caught:
        drive(settings_for(), folder, command)
    assert [run.info.status for run in runs()] == [status] * 2
    assert getattr(caught.value, "status", 137) == 137


def test_a_set_that_goes_on_ends_what_was_left_running_by_a_kill(settings_for, folder):
    with pytest.raises(repeats.RepeatFailedError):
        drive(settings_for(), folder, child(first=FAILS_AT_2))
    own = {"repeats.id": plan_of(folder)["id"], "repeats": "3"}
    parent = store.start_run(record_of(tags=own, datasets=[]))
    logged, killed = (store.start_run(record_of(tags=own | {"repeat": number}), parent) for number in "12")
    store.mark_run(logged, record_of(id=files.read_json(folder / "train" / "record.json")["id"]))
    drive(settings_for(), folder, child())
    status = [client().get_run(each.run_id).info.status for each in (parent, logged, killed)]
    assert status == ["KILLED", "FINISHED", "KILLED"]  # a child that trains sets the one above RUNNING again


DRIVER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background
from pathlib import Path
from pipeline import cli, config, repeats
from pipeline.tracking import publisher, records
publisher.update_parent = lambda *args: None
settings = config.load({overrides!r})
with cli.exit_on_error("python -m pipeline.run"):
    repeats.run_repeats(settings, Path({folder!r}), {stages!r}, 3, repeats.command_starter({command!r}))
"""

WAITS = """
import os, signal, sys, time
from pathlib import Path
from pipeline import config, repeats

def wait(settings, folder, number):
    try:
        print("waiting", os.getpid(), flush=True)
        time.sleep(60)
    finally:
        time.sleep(0.3)  # another signal would disturb it here
        Path(folder, "ended").write_text("whole")

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = ["run.py"]
repeats.run_as_child(wait, "")
"""
"""A child that waits to be stopped, and takes some time for its end."""


@pytest.fixture
def driver(folder):
    """Starts a driver of such children in a process group of its own; gives it, and the id of its child."""
    mine = ["data.source=synthetic", "data.limit=6", "weights=random", "device=cpu", "repeats=3"]
    code = DRIVER.format(overrides=mine, folder=str(folder), stages=ALL, command=[sys.executable, "-c", WAITS])
    started = []

    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=config.ROOT, env=dict(os.environ), start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        for line in process.stdout:
            if line.startswith("waiting "):
                return process, int(line.split()[1])
        raise AssertionError(process.communicate()[1])

    yield start
    for process in started:
        process.kill()
        process.communicate()


needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="no signal for one process there")


@needs_signals
@pytest.mark.parametrize(
    ("stop", "to_all"), [(signal.SIGINT, True), pytest.param(signal.SIGTERM, False, marks=pytest.mark.slow)]
)
def test_a_driver_that_is_stopped_waits_for_its_child_to_end(driver, folder, stop, to_all):
    process, _ = driver()
    (os.killpg if to_all else os.kill)(process.pid, stop)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == "run: stopped by Ctrl-C"
    assert (folder / "ended").read_text() == "whole"
    assert "status" not in plan_of(folder)["order"][0] and plan_of(folder)["ended"] is None


@needs_signals
@pytest.mark.slow
def test_stopped_twice_a_driver_waits_no_longer(driver, folder):
    process, child_id = driver()
    os.kill(child_id, signal.SIGSTOP)  # it will not end by itself
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130 and not (folder / "ended").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(child_id, 0)


@needs_signals
@pytest.mark.slow
def test_a_child_that_is_stopped_alone_stops_its_driver(driver, folder):
    process, child_id = driver()
    os.kill(child_id, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.strip() == "run: stopped by Ctrl-C"
    assert (folder / "ended").read_text() == "whole"


# --- the command line


@pytest.fixture
def entered(monkeypatch, settings_for, folder):
    """Calls `enter` as `python -m pipeline.<stage>` does; gives what is driven, and the exit status."""
    monkeypatch.setattr(repeats.cli, "OUTPUTS", folder)

    def enter(stage, *arguments):
        driven = []
        monkeypatch.setattr(repeats, "run_repeats", lambda *args: driven.append(args))
        monkeypatch.setattr(sys, "argv", [f"pipeline/{stage}.py", *arguments])
        monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
        try:
            repeats.start_stage("", stage)
        except SystemExit as ended:
            return driven, ended.code
        return driven, None

    return enter


def test_a_stage_is_driven_where_it_is_repeated(entered, folder):
    arguments = ("--repeats", "3", "-S", "seed=4")
    ((settings, where, stages, planned, _),), status = entered("train", *arguments)
    assert (settings.repeats, settings.seed, where, stages, planned, status) == (3, 4, folder, ["train"], 3, 0)
    assert entered("train", "--repeats", "1") == ([], None)


@pytest.mark.parametrize("stage", ["evaluate", "sustain"])
def test_later_stages_are_repeated_as_often_as_was_trained(entered, folder, stage):
    assert entered(stage, "--repeats", "3") == ([], None)
    files.write_json(folder / "train" / "record.json", {"tags": {"repeats": "5"}})
    ((_, _, stages, planned, _),), status = entered(stage, "--repeats", "1")
    assert (stages, planned, status) == ([stage], 5, 0)


def test_a_child_runs_its_repeat_in_its_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["run.py", "--repeats", "3"])
    ran = []
    assert not repeats.run_as_child(lambda *args: ran.append(args), "")
    place = tmp_path / "with:colon"
    monkeypatch.setenv(repeats.CHILD, f"2:{place}")
    assert repeats.run_as_child(lambda *args: ran.append(args), "")
    assert ran == [(config.load(["repeats=3"]), place, 2)]


def test_a_stage_alone_is_summed_up(monkeypatch, folder):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(repeats.cli, "OUTPUTS", folder)

    def once(settings, where, number):
        record = {"tags": {}, "params": {"settings.seed": "0"}, "metrics": {"a": 1}}
        record |= {"epochs": [{"figures": {"epoch": 1, "b": 2}}]}
        files.write_json(where / "train" / "record.json", record)
        assert number == 1

    repeats.run_stage("train", once, "")
    assert (folder / "train" / "repeats" / "figures.csv").read_text() == "repeat,seed,b,a\n1,0,2,1\n"
    assert not (folder / "train" / "metrics.json").exists() and not (folder / "train" / "set.json").exists()


def test_a_drivers_modules_import_no_torch():
    code = "import sys; from pipeline import repeats, run; print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], cwd=config.ROOT, capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.stderr) == ("False\n", "")


# --- what a stage clears before it writes


@pytest.mark.parametrize(
    ("number", "planned", "left"),
    [
        (1, 1, []),
        (1, 3, ["repeats/2/a.txt", "repeats/3/a.txt", "set.json"]),
        (2, 3, ["a.txt", "b/c.txt", "repeats/3/a.txt", "set.json"]),
    ],
)
def test_of_an_earlier_repeat_nothing_stays_and_of_others_all(tmp_path, number, planned, left):
    out = tmp_path / "train"
    for name in ("a.txt", "b/c.txt", "set.json", "repeats/2/a.txt", "repeats/3/a.txt"):
        files.write_text(out / name, "stale")
    assert repeats.clear_outputs(tmp_path, "train", number, planned) == records.stage_folders(tmp_path, number)["train"]
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()) == left
    assert (
        repeats.clear_outputs(tmp_path, "sustain", number, planned)
        == records.stage_folders(tmp_path, number)["sustain"]
    )


# --- all of it


SMALL = (
    "data.source=synthetic", "data.limit=6", "weights=random", "model=test_resnet.r160_in1k", "image_size=32",
    "epochs=1", "warmup_epochs=0", "threads=1", "device=cpu", "sustain_seconds=0", "repeats=2",
)  # fmt: skip
REAL = """
import sys
from pathlib import Path
from pipeline import cli, run

cli.OUTPUTS = Path({base!r}) / "outputs"
sys.argv[0] = "run.py"
cli.main(run.run, "")
"""


@pytest.mark.slow
def test_a_real_set_is_one_process_a_repeat_below_one_run(tmp_path):
    arguments = [word for setting in SMALL for word in ("-S", setting)]
    command = [sys.executable, "-c", REAL.format(base=str(tmp_path)), *arguments]
    ended = subprocess.run(command, cwd=config.ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    (own,) = (tmp_path / "runs").iterdir()
    two = records.training_records(own)
    assert [each["params"]["settings.seed"] for each in two] == ["0", "1"]
    found = {run.info.run_name.split(" · ")[-1]: run for run in runs() if "workload" in run.data.tags}
    assert set(found) == {"1/2", "2/2", "fp32 × 2"} and {run.info.status for run in found.values()} == {"FINISHED"}
    for number in (1, 2):
        metrics = found[f"{number}/2"].data.metrics
        assert metrics["time/process_seconds"] > metrics["time/startup_seconds"] > 0
        assert "test/accuracy" in metrics
        assert found[f"{number}/2"].data.tags["mlflow.parentRunId"] == found["fp32 × 2"].info.run_id
    assert "std/test/accuracy" in found["fp32 × 2"].data.metrics
    starts = [each["metrics"]["time/startup_seconds"] for each in two]
    assert all("time/data_seconds" in each["metrics"] for each in two) and len(set(starts)) == 2
    assert plan_of(own)["ended"] and [entry["repeat"] for entry in plan_of(own)["order"]] == [1, 2]
