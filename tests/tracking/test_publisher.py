"""Runs come into the store whole and once: while they train, from the cache, and after any failure."""

import json
import shutil
import time
from contextlib import suppress
from types import SimpleNamespace

import bundle_files as made
import pytest
from bundle_files import finish_entry, open_entry, put_in_store, repeat, stored_runs, whole_run
from mlflow.exceptions import MlflowException
from stores import AT, QUIET, client, own_store, record_of, runs  # noqa: F401 (own_store: each test has its own)
from trainings import once, threads  # noqa: F401 (threads: one is enough)

from pipeline import files
from pipeline.errors import StageError
from pipeline.profiling import score_steps
from pipeline.tracking import bundles, pending, publisher, records, store

use_store = made.use_store


class Unsteady:
    """The client of a store that fails after `calls` calls; `lost`: the call that fails is carried out all the same."""

    def __init__(self, calls, lost=False):
        self.calls, self.lost = calls, lost

    def __getattr__(self, name):
        method = getattr(client(), name)

        def call(*arguments, **options):
            self.calls -= 1
            if self.calls < 0:
                if self.lost:
                    method(*arguments, **options)
                raise MlflowException("the store is away")
            return method(*arguments, **options)

        return call


def train(folder, *trainings, killed_after=None):
    """Leave the entries of trainings with all their stages, each given as its files."""
    for number, contents in enumerate(trainings):
        entry, owner = open_entry(json.loads(contents[made.TRAIN]), killed_after)
        finish_entry(entry, owner, folder / str(number), contents)


def the_run():
    (run,) = runs()
    return run


# --- from beginning to end


@QUIET
def test_a_delivered_run_equals_the_one_restored_from_the_cache(once, tmp_path, monkeypatch):
    shutil.copytree(once.completed.parent / "kept", once.completed.parent / "mlartifacts", dirs_exist_ok=True)
    record = files.read_json(once.outputs / "train" / "record.json")
    target = pending.target("trainmark", publisher.RESTORED)
    handle = publisher.put_run(record, records.stage_folders(once.outputs), target)
    assert store.run_tags(handle)["restored"] and len(the_run().outputs.model_outputs) == 1
    restored = stored_runs(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{once.completed.as_posix()}")
    assert restored == stored_runs(tmp_path)
    assert "restored" not in the_run().data.tags and len(the_run().outputs.model_outputs) == 1
    (run,) = restored.values()
    assert len(run["metrics"]["val/loss"]) == 2 and len(run["datasets"]) == 3
    assert {"test/accuracy", "time/process_seconds", "best/epoch"} <= set(run["metrics"])
    assert len(run["metrics"][score_steps.metric("convnet_fp32", "course")]) >= 3
    plots = {f"plots/{name}.png" for name in ("accuracy", "loss", "samples", "confusion_matrix")}
    assert plots | {"checkpoints/best.safetensors", "params.yaml", "hardware.json"} < set(run["artifacts"])
    assert (run["info"], run["tags"]["record"]) == (("FINISHED", run["info"][1]), record["id"])
    assert set(bundles.load_run(once.outputs, "outputs", "a" * 32).stages) == {"train", "evaluate", "sustain"}


def test_epochs_come_while_the_process_trains_and_the_rest_when_it_ends(tmp_path):
    contents, epochs = whole_run(), {}
    entry, owner = open_entry(made.training(), 1)
    for count in (1, 1, 2):
        if count == 2:
            pending.append(entry, {"event": "epoch", "epoch": made.training()["epochs"][1]})
        publisher.deliver_all(epochs, complete=False)
        assert (the_run().info.status, "taints" in the_run().data.tags) == ("RUNNING", False)
        assert len(client().get_metric_history(the_run().info.run_id, "train/loss")) == count
    finish_entry(entry, owner, tmp_path / "a", contents)
    publisher.deliver_all(epochs, complete=False)
    assert the_run().info.status == "RUNNING" and len(pending.waiting()) == 3  # pictures take the CPU's time
    publisher.deliver_all(epochs)
    assert pending.entries() == []
    assert the_run().info.status == "FINISHED" and the_run().data.tags["taints"] == "load"


def test_pictures_are_drawn_beside_a_measurement_on_another_device(tmp_path):
    train(tmp_path, whole_run(tags=made.training()["tags"] | {"backend": "cuda"}))
    publisher.deliver_all(complete=False)
    assert the_run().info.status == "FINISHED" and pending.entries() == []


@pytest.mark.parametrize(
    ("trainings", "lost"),
    [
        ([whole_run()], True),
        pytest.param([repeat(1, 2), repeat(2, 2)], False, marks=pytest.mark.slow),
        pytest.param([repeat(1, 2), repeat(2, 2)], True, marks=pytest.mark.slow),
    ],
)
def test_a_delivery_that_fails_at_any_call_is_completed_by_the_next(tmp_path, use_store, monkeypatch, trainings, lost):
    train(tmp_path / "a", *trainings)
    publisher.deliver_all()
    expected = stored_runs(tmp_path)
    assert [run["info"][0] for run in expected.values()] == ["FINISHED"] * len(runs())
    use_store("other")
    train(tmp_path / "b", *trainings)
    calls = 0
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", lambda seconds: None)
        while pending.waiting():
            unsteady = Unsteady(calls, lost)
            patch.setattr(store, "_client", lambda unsteady=unsteady: unsteady)
            with suppress(store.StoreError):
                publisher.deliver_all()
            calls += 1
    assert calls > 25
    assert stored_runs(tmp_path) == expected
    assert len(runs()) == len(expected) and len(store.finished_runs()) == len(trainings)


# --- what waits


def test_what_a_store_refuses_waits_for_it_and_comes_with_its_next_delivery(tmp_path, use_store, monkeypatch):
    train(tmp_path, whole_run(1), whole_run(2))
    with monkeypatch.context() as patch:
        patch.setattr(store, "_client", lambda: Unsteady(0))
        with pytest.raises(store.StoreError, match="away"):
            publisher.deliver_all()
    use_store("other")
    publisher.deliver_all()
    assert runs() == [] and len(pending.waiting()) == 6
    use_store("store")
    for _ in range(2):
        publisher.deliver_all()
        assert len(store.finished_runs()) == len(runs()) == 2 and pending.entries() == []


@pytest.mark.parametrize(("file", "text"), [("target.json", "{"), ("journal.jsonl", "no event")])
def test_a_damaged_entry_is_named_and_delays_no_other(tmp_path, file, text):
    damaged, owner = open_entry(made.training(1))
    owner.close()
    (damaged / file).write_text(text)
    train(tmp_path, whole_run(2))
    with pytest.raises(StageError, match=damaged.name):
        publisher.deliver_all()
    assert [run["tags"]["record"] for run in store.finished_runs()] == [f"{2:032x}"]
    assert [*pending.entries(), *pending.damaged()] == [damaged]


def test_a_run_that_can_not_be_delivered_delays_no_other(tmp_path, monkeypatch):
    train(tmp_path, whole_run(1), whole_run(2))
    publish_training = publisher.publish_training

    def refuse_first(handle, record, folder):
        if record["id"] == f"{1:032x}":
            raise RuntimeError("this model can't be exported\nfor reasons")
        publish_training(handle, record, folder)

    monkeypatch.setattr(publisher, "publish_training", refuse_first)
    with pytest.raises(StageError, match=r"-stages can't be delivered: this model can't be exported$"):
        publisher.deliver_all()
    assert [run["tags"]["record"] for run in store.finished_runs()] == [f"{2:032x}"] and len(pending.waiting()) == 3


def test_two_processes_deliver_an_entry_once(tmp_path):
    train(tmp_path, whole_run())
    entry = pending.entries()[0]
    with files.lock(entry / ".publisher"):
        assert publisher.deliver(entry, {}) is False and runs() == []
    assert publisher.deliver(entry, {}) is True
    assert publisher.deliver(entry, {}) is True and not entry.exists()  # another had listed it before


def test_a_crash_while_a_delivered_entry_is_deleted_changes_no_run(tmp_path, monkeypatch):
    train(tmp_path, whole_run())

    def crash(folder, **options):
        (folder / "train" / "record.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pending, "shutil", SimpleNamespace(rmtree=crash))
        with pytest.raises(KeyboardInterrupt):
            publisher.deliver_all()
    publisher.deliver_all()
    assert the_run().info.status == "FINISHED" and pending.entries() == []


def test_a_training_that_is_resumed_while_its_end_is_delivered_keeps_its_entry(monkeypatch):
    entry, owner = open_entry(made.training(), 1)
    (entry / "state").mkdir()
    (entry / "state" / "000001-0.pt").touch()
    end(entry, owner, "KILLED")
    owners, log_epochs = [], store.log_epochs

    def resume(handle, epochs):
        owners.append(pending.own(entry))
        log_epochs(handle, epochs)

    monkeypatch.setattr(store, "log_epochs", resume)
    publisher.deliver_all()
    assert pending.entries() == pending.waiting() == [entry] and the_run().info.status == "RUNNING"
    owners[0].close()


def test_two_hosts_with_one_cached_training_leave_one_run(monkeypatch):
    record, created = record_of(), []
    create = client().create_run
    monkeypatch.setattr(time, "sleep", lambda seconds: None)

    def create_twice(self, *arguments):
        if not created:
            created.append(create(*arguments))
        created.append(create(*arguments))
        return created[-1]

    with monkeypatch.context() as patch:
        patch.setattr(store.MlflowClient, "create_run", create_twice)
        handle = store.start_run(record)
    active = [run for run in runs() if run.info.lifecycle_stage == "active"]
    assert [run.info.run_id for run in active] == [handle.run_id] == [created[0].info.run_id]
    assert store.find_run(record["id"], "trainmark") == handle and len(runs()) == 2


@pytest.mark.parametrize("what", ["epochs", "stages", "restored"])
def test_a_deleted_run_does_not_come_back(tmp_path, capsys, what):
    record, handle = put_in_store(tmp_path / "a", whole_run())
    client().delete_run(handle.run_id)
    if what == "epochs":
        open_entry(record)[1].close()
    elif what == "stages":
        train(tmp_path / "b", whole_run())
    else:
        assert put_in_store(tmp_path / "c", whole_run())[1] is None
    publisher.deliver_all()
    assert the_run().info.lifecycle_stage == "deleted" and pending.entries() == []


# --- how a training ends


def end(entry, owner, status, final=False):
    pending.append(entry, {"event": "end", "status": status, "at": AT + 9999, "final": final})
    owner.close()


@pytest.mark.parametrize("repeats", [False, True])
def test_an_interrupted_training_is_resumed_in_its_run(tmp_path, repeats):
    contents = repeat(1, 2, resumed="2") if repeats else whole_run(tags=made.training()["tags"] | {"resumed": "2"})
    record = json.loads(contents[made.TRAIN])
    entry, owner = open_entry(record, 1)
    (entry / "state").mkdir()
    (entry / "state" / "000001-0.pt").touch()

    def states():
        publisher.deliver_all()
        (run,) = [run for run in runs() if "record" in run.data.tags]
        assert {run.info.status for run in runs()} == {run.info.status}  # the parent's, too
        return run.info.status, run.info.run_id, run.data.tags.get("resumed")

    status, run_id, _ = states()
    assert status == "RUNNING"
    end(entry, owner, "FAILED")
    assert states() == ("FAILED", run_id, None) and pending.entries() == [entry]
    owner = pending.own(entry)
    pending.append(entry, {"event": "resume", "at": AT + 10_000, "tags": {"resumed": "1"}})
    assert states() == ("RUNNING", run_id, "1")
    owner.close()  # kill -9
    assert states() == ("KILLED", run_id, "1") and client().get_run(run_id).info.end_time == AT + 10_000
    owner = pending.own(entry)
    pending.append(entry, {"event": "resume", "at": AT + 10_001, "tags": {"resumed": "2"}})
    finish_entry(entry, owner, tmp_path / "a", contents)
    publisher.deliver_all()
    run = client().get_run(run_id)
    assert (run.info.status, run.data.tags["resumed"]) == ("FINISHED", "2") and pending.entries() == []
    assert len(client().get_metric_history(run_id, "train/loss")) == 2


@pytest.mark.parametrize(("status", "final"), [("FAILED", True), ("KILLED", False), (None, False)])
def test_a_training_without_a_state_ends_with_its_process(status, final):
    entry, owner = open_entry(made.training(), 1)
    if final:  # NaN would come again
        (entry / "state").mkdir()
        (entry / "state" / "000001-0.pt").touch()
    if status:
        end(entry, owner, status, final)
    owner.close()
    publisher.deliver_all()
    assert the_run().info.status == (status or "KILLED") and pending.entries() == []
    assert the_run().info.end_time == (AT + 9999 if status else AT + 1000)  # else its last epoch's


def test_a_store_that_lost_the_run_meanwhile_gets_all_epochs():
    _, owner = open_entry(made.training(), 2)
    epochs = {}
    publisher.deliver_all(epochs)
    store.discard_run(store.find_run(f"{1:032x}", "trainmark"))
    owner.close()
    publisher.deliver_all(epochs)
    (run,) = [run for run in runs() if run.info.lifecycle_stage == "active"]
    assert len(client().get_metric_history(run.info.run_id, "train/loss")) == 2 and epochs == {}


# --- later stages


@pytest.mark.parametrize("stage", ["evaluate", "sustain"])
def test_a_stage_that_a_run_lacks_is_added_to_it(tmp_path, stage):
    contents = whole_run()
    result = json.loads(contents[f"{stage}/record.json"])
    train(tmp_path / "a", {name: data for name, data in contents.items() if not name.startswith(stage)})
    publisher.deliver_all()
    run_id, before = the_run().info.run_id, stored_runs(tmp_path)
    assert not result["metrics"].keys() & the_run().data.metrics.keys()
    _, handle = put_in_store(tmp_path / "b", contents)
    assert handle.run_id == run_id and result["metrics"].items() <= the_run().data.metrics.items()
    assert the_run().data.tags[publisher.digest_tag(stage)] == publisher.digest(result)
    (earlier,), (later,) = before.values(), stored_runs(tmp_path).values()
    assert all(later["metrics"][key] == course for key, course in earlier["metrics"].items())
    word = {"evaluate": "test accuracy", "sustain": "**Sustained**"}[stage]
    assert [word in run["tags"]["mlflow.note.content"] for run in (earlier, later)] == [False, True]
    assert later["info"] == ("FINISHED", AT + 7000)


def test_attempts_at_the_sustained_steps_are_counted_without_a_disturbed_last_one(tmp_path):
    record, counted = made.training(), []
    for number, taints in enumerate((None, "load", None, None)):
        score = made.sustained(record, after=7000 + number)
        score["tags"] |= {"sustained.started": str(AT + number), "sustained.taints": taints}
        contents = made.run_files(record, score=score)
        for again in range(2):
            put_in_store(tmp_path / f"{number} {again}", contents)
            counted.append(the_run().data.tags["sustained.attempts"])
    assert counted == ["1", "1", "2", "2", "2", "2", "3", "3"]
    assert publisher._count_attempts({"sustained.attempts": "a stranger's", "sustained.started": "1"}, "2") == 2


# --- the model


def test_the_model_asks_for_released_packages(tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(store, "log_model", lambda handle, net, *rest: logged.append((net.training, *rest)))
    contents = whole_run() | {"train/best.safetensors": made.checkpoint(tmp_path)}
    for folder in ("a", "b"):
        put_in_store(tmp_path / folder, contents)
    ((training, image_size, classes, requirements),) = logged
    assert (training, image_size, classes) == (False, 96, 2)
    assert [requirement.split("==")[0] for requirement in requirements] == ["mlflow", "torch", "numpy"]
    assert not any("+" in requirement for requirement in requirements)  # a build such as 2.14.1+cu130 is in no index


def test_a_run_with_a_damaged_checkpoint_is_not_finished(tmp_path):
    contents = whole_run() | {"train/best.safetensors": made.checkpoint(tmp_path)[:1000]}
    with pytest.raises(StageError, match=r"best\.safetensors"):
        put_in_store(tmp_path / "a", contents)
    assert store.finished_runs() == []


# --- under `mlflow run`


@pytest.fixture
def given(monkeypatch):
    """The run that `mlflow run` created, in an experiment of its own."""
    run = client().create_run(client().create_experiment("by hand"))
    monkeypatch.setenv("MLFLOW_RUN_ID", run.info.run_id)
    return run.info.run_id


@pytest.mark.parametrize("repeats", [False, True])
def test_the_given_run_becomes_the_trainings_or_the_parent_of_repeats(given, tmp_path, repeats):
    trainings = [repeat(1, 2), repeat(2, 2)] if repeats else [whole_run()]
    train(tmp_path, *trainings)
    publisher.deliver_all()
    assert len(runs()) == (3 if repeats else 1) and {run.info.status for run in runs()} == {"FINISHED"}
    assert len({run.info.experiment_id for run in runs()}) == 1
    run = client().get_run(given)
    assert ("repeats.id" in run.data.tags, "record" in run.data.tags) == (repeats, not repeats)
    assert [child.data.tags.get("mlflow.parentRunId") for child in runs()].count(given) == (2 if repeats else 0)


@pytest.mark.parametrize("repeats", [False, True])
def test_a_given_run_that_has_ended_is_left_as_it_was(given, tmp_path, repeats):
    client().set_terminated(given)
    before = client().get_run(given).to_dictionary()
    train(tmp_path, *([repeat(1, 2), repeat(2, 2)] if repeats else [whole_run()]))
    publisher.deliver_all()
    assert client().get_run(given).to_dictionary() == before and len(runs()) == (4 if repeats else 2)


def test_a_given_run_says_where_the_repeats_are_that_are_resumed(given, tmp_path, monkeypatch):
    train(tmp_path / "a", repeat(1, 2))
    publisher.deliver_all()
    new = client().create_run(client().get_run(given).info.experiment_id).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", new)
    train(tmp_path / "b", repeat(2, 2))
    publisher.deliver_all()
    assert given in client().get_run(new).data.tags["mlflow.note.content"]
    assert client().get_run(given).info.status == "FINISHED" and len(runs()) == 4
