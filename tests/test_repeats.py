"""The driver: which processes it starts, in which order, what it writes down, and how it and they end. Its children are
stand-ins, but for those of one real set at the end."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from drivers import started  # noqa: F401 (none is left)
from stores import own_store, runs  # noqa: F401 (own_store: each test has its own)

from pipeline import children, config, files, repeats
from pipeline.errors import StageError, Stopped, UsageError
from pipeline.tracking import descriptions, records, store

STAND_IN = """
import json, os, sys
from pathlib import Path

plan = json.loads(Path(folder, "train", "set.json").read_text())
tags = {"repeats.id": plan["id"], "repeat": number, "repeats": str(plan["repeats"])}
for stage in STAGES:
    out = Path(folder, stage, *([] if number == "1" else ["repeats", number]))
    out.mkdir(parents=True, exist_ok=True)
    record = {"id": plan["id"] + number, "tags": tags if plan["repeats"] > 1 else {}}
    record |= {"params": {"settings.seed": number}, "metrics": {"a": int(number)}}
    record["epochs"] = [{"figures": {"epoch": 1, "b": 2 * int(number)}}]
    (out / "record.json").write_text(json.dumps(record))
with open(Path(folder, "calls"), "a") as calls:
    print(*STAGES, number, file=calls)
print("child", number, flush=True)
"""
"""What a child does: it leaves the records of STAGES."""

WORK = "import sys; line = sys.stdin.readline().strip() or sys.exit(); number, _, folder = line.partition(':')"
"""How a stand-in gets its work; without any it ends."""

ALL = ("train", "evaluate", "sustain")


def child(then="", stages=ALL, first=""):
    """The command of a stand-in; `first` is done before it leaves anything, `then` after."""
    return [sys.executable, "-c", f"STAGES = {stages!r}\n{WORK}\n{first}\n{STAND_IN}\n{then}"]


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
def spread(monkeypatch):
    monkeypatch.setattr(descriptions, "describe_spread", lambda trained, evaluated: "a spread")


def drive(settings, folder, command, stages=ALL):
    repeats.run_repeats(settings, folder, stages, settings.repeats, children.command_starter(command))


def calls(folder):
    """The stages that children ran, each with its repeat."""
    return (folder / "calls").read_text().splitlines()


def plan_of(folder, stage="train"):
    return files.read_json(folder / stage / "set.json")


# --- what is started, and what is written down


def test_the_plan_is_there_before_the_first_repeat_and_tells_what_happened(settings_for, folder):
    copy = "import shutil; shutil.copy(Path(folder, 'train', 'set.json'), Path(folder, f'plan {number}'))"
    begun = time.time_ns() // 1_000_000
    drive(settings_for("repeat_pause=0.05"), folder, child(then=copy))
    assert calls(folder) == [f"train evaluate sustain {number}" for number in (1, 2, 3)]
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


def test_a_stage_alone_is_driven_with_the_trainings_that_are_there(settings_for, folder):
    drive(settings_for(), folder, child(stages=("train",)), ["train"])
    drive(settings_for("label=desk"), folder, child(stages=("evaluate",)), ["evaluate"])
    assert calls(folder)[3:] == [f"evaluate {number}" for number in (1, 2, 3)]
    assert plan_of(folder, "evaluate")["seeds"] == [1, 2, 3] and plan_of(folder, "evaluate")["ended"]
    assert plan_of(folder, "evaluate")["id"] == plan_of(folder)["id"]


# --- pauses


@pytest.fixture
def slept(monkeypatch):
    """The seconds that are waited for, in no time. A wait for a process is short."""
    waits, sleep = [], time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: waits.append(seconds) if seconds > 1 else sleep(seconds))
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

FAILS_AT_2 = "import sys; number == '2' and sys.exit(7)"


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
        drive(settings, folder, child(first=FAILS_AT_2.replace("2", "3"), stages=("train",)), ("train",))
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


def test_a_set_of_which_all_is_there_but_its_end_is_brought_to_its_end(settings_for, folder):
    drive(settings_for(), folder, child())
    files.write_json(folder / "train" / "set.json", plan_of(folder) | {"ended": None})
    (folder / "train" / "repeats" / "figures.csv").unlink()
    drive(settings_for(), folder, child())
    assert len(calls(folder)) == 3 and plan_of(folder)["ended"]
    assert (folder / "train" / "repeats" / "figures.csv").exists()


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


@pytest.mark.parametrize(("status", "error"), [(7, SystemExit), (130, Stopped), (143, Stopped)])
@pytest.mark.parametrize("count", [1, 3])
def test_the_status_of_a_child_passes_through(settings_for, folder, status, error, count):
    first = f"import sys; sys.exit({status})"
    with pytest.raises((error, repeats.RepeatFailedError)) as caught:
        drive(settings_for(f"repeats={count}"), folder, child(first=first))
    assert getattr(caught.value, "status", getattr(caught.value, "code", None)) == status
    assert isinstance(caught.value, repeats.RepeatFailedError) == (status == 7 and count == 3)
    assert plan_of(folder)["order"][0]["status"] == status and plan_of(folder)["ended"] is None
    drive(settings_for(f"repeats={count}"), folder, child())
    assert len(calls(folder)) == count and plan_of(folder)["ended"]


# --- the command line


@pytest.fixture
def entered(monkeypatch, folder):
    """Calls `start_stage` as `python -m pipeline.<stage>` does; gives what is driven, and the exit status."""
    monkeypatch.setattr(repeats.cli, "OUTPUTS", folder)
    monkeypatch.setattr(children, "starter", lambda module, device: module)

    def enter(stage, *arguments):
        driven = []
        for name in ("run_repeats", "run_single"):
            monkeypatch.setattr(repeats, name, lambda *args, name=name: driven.append((name, *args)))
        monkeypatch.setattr(sys, "argv", [f"pipeline/{stage}.py", *arguments])
        monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
        with pytest.raises(SystemExit) as ended:
            repeats.start_stage("", stage)
        assert ended.value.code == 0
        return driven

    return enter


def test_a_stage_is_driven_as_often_as_it_is_repeated(entered, folder):
    ((name, settings, where, stages, planned, module),) = entered("train", "--repeats", "3", "-S", "seed=4")
    assert (name, where, stages, planned, module) == ("run_repeats", folder, ["train"], 3, "train")
    assert (settings.repeats, settings.seed) == (3, 4)
    ((name, _, where, stages, module),) = entered("train", "--repeats", "1")
    assert (name, where, stages, module) == ("run_single", folder, ["train"], "train")


@pytest.mark.parametrize("stage", ["evaluate", "sustain"])
def test_later_stages_are_repeated_as_often_as_was_trained(entered, folder, stage):
    ((name, *_),) = entered(stage, "--repeats", "3")
    assert name == "run_single"
    files.write_json(folder / "train" / "record.json", {"tags": {"repeats": "5"}})
    ((name, _, _, stages, planned, _),) = entered(stage, "--repeats", "1")
    assert (name, stages, planned) == ("run_repeats", [stage], 5)


def test_a_stage_alone_is_summed_up_unless_it_fails(settings_for, folder):
    settings = settings_for("repeats=1")
    repeats.Plan("a" * 32, 1, [0], 0.0, {}).write(folder / "train" / "set.json")  # which the stand-in reads
    with pytest.raises(SystemExit) as ended:
        repeats.run_single(
            settings, folder, ["train"], children.command_starter(child(first="import sys; sys.exit(7)"))
        )
    assert ended.value.code == 7 and not (folder / "train" / "repeats").exists()
    repeats.run_single(settings, folder, ["train"], children.command_starter(child(stages=("train",))))
    assert (folder / "train" / "repeats" / "figures.csv").read_text() == "repeat,seed,b,a\n1,1,2,1\n"
    assert not (folder / "train" / "metrics.json").exists()


@pytest.mark.parametrize("count", [1, 2])
def test_two_commands_do_not_write_into_one_folder(settings_for, folder, count):
    settings, start = settings_for(f"repeats={count}"), children.command_starter(child())
    with files.lock(folder / ".lock"), pytest.raises(StageError, match="another process works in this folder"):
        if count == 1:
            repeats.run_single(settings, folder, ["train"], start)
        else:
            repeats.run_repeats(settings, folder, ["train"], count, start)
    assert not (folder / "calls").exists()


# --- the run of MLFLOW_RUN_ID


@pytest.mark.parametrize("count", [1, 2])
def test_a_given_run_that_must_stay_is_refused_before_anything_is_deleted(settings_for, folder, monkeypatch, count):
    files.write_text(folder / "train" / "earlier.txt", "of an earlier training")
    files.write_json(folder / "train" / "record.json", {"id": "a", "tags": {}})
    settings, asked = settings_for(f"repeats={count}"), []

    def refuse(known):
        asked.append(known)
        raise UsageError("MLFLOW_RUN_ID: finished")

    monkeypatch.setattr(store, "check_given_run", refuse)
    start = children.command_starter(child())
    monkeypatch.setenv("MLFLOW_RUN_ID", "b" * 32)
    with pytest.raises(UsageError):
        if count == 1:
            repeats.run_single(settings, folder, ["train"], start)
        else:
            repeats.run_repeats(settings, folder, ["train"], count, start)
    assert not (folder / "calls").exists() and len(asked) == 1
    assert (folder / "train" / "earlier.txt").exists()


def test_a_driver_starts_without_what_takes_long_to_import():
    code = "import sys; from pipeline import repeats, run; print({'torch', 'mlflow', 'matplotlib'} & {*sys.modules})"
    ended = subprocess.run([sys.executable, "-c", code], cwd=config.ROOT, capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.stderr) == ("set()\n", "")


# --- what a stage clears before it writes


@pytest.mark.parametrize(
    ("number", "planned", "left"),
    [
        (1, 1, ["set.json"]),
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
