"""Bundles: runs go from store to store whole and once; nothing that is wrong gets into one."""

import hashlib
import json
import os
import shutil
import socket
import sqlite3
import stat
import struct
import subprocess
import sys
import time
import warnings
import zipfile
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import mlflow.utils.validation as mlflow_validation
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import AT, DATASET, client, fresh_store, own_store, runs  # noqa: F401 (own_store: each has its own)

from pipeline import bundle, config, files
from pipeline.errors import StageError, UsageError
from pipeline.profiling import score_steps
from pipeline.tracking import bundle_schema, publisher, records, store

PICTURE = bundle.PNG + b"a picture"
SPEED, COURSE = (score_steps.metric("convnet_fp32", figure) for figure in ("images_per_second", "course"))
OTHER = {"restored", "imported", "imported.run_id"}
"""Tags in which an imported run may differ from the live one."""


def record_of(number=1, **changes):
    """The record of a training, whole but for what nobody reads."""
    tags = {
        "hardware": "AMD EPYC", "hardware.memory_gib": "23.5", "machine": "b72054f1a41b", "device": "cpu",
        "backend": "cpu", "software.os": "Debian GNU/Linux 12", "software.torch": "2.14.1", "recipe": "blog",
        "precision": "fp32", "dataset": "cifar10", "weights": "random", "workload": "151c7d9c58", "taints": "load",
    }  # fmt: skip
    epochs = [
        {
            "at": AT + 1000 * epoch,
            "figures": {
                "epoch": epoch, "train/loss": 2.5 / epoch, "train/accuracy": 0.25 * epoch, "val/loss": 2.5,
                "val/accuracy": 0.125 * epoch, "train/lr": 0.1, "time/train_seconds": 0.75, "time/val_seconds": 0.1,
                "speed/train_images_per_second": 240.0, "memory/peak_mib": 1148.5,
            },
            "system": [
                {"at": AT + 1000 * epoch - 500, "step": epoch, "figures": {"system/cpu_utilization_percentage": 99.5}}
            ],
        }
        for epoch in (1, 2)
    ]  # fmt: skip
    record = {
        "id": f"{number:032x}",
        "name": records.run_name(tags),
        "experiment": "trainmark",
        "started": AT,
        "ended": AT + 3000,
        "params": {"train.lr": "0.1", "train.epochs": "2", "settings.label": "null"},
        "tags": tags,
        "datasets": [DATASET],
        "epochs": epochs,
        "metrics": {"best/epoch": 2, "best/val_accuracy": 0.25, "time/total_seconds": 1.75, "time/setup_seconds": 0.0},
        "warnings": ["other processes used 90% of the CPU when it started"],
        "facts": {
            "model": "test_resnet.r160_in1k", "classes": ["cat", "dog"], "images": {"train": 180, "validation": 20},
            "trainable": 5130, "parameters": 11181642, "features_cached": False, "channels_last": True,
            "compile": "off", "recorded": False, "image_size": 96, "verdict": "limited by data",
        },
        "hardware": {"machine": {"machine": "b72054f1a41b", "cores": 2}, "accelerator": {"name": "AMD EPYC"}},
    }  # fmt: skip
    return record | changes


def evaluation_of(record, at=5000, **changes):
    dataset = DATASET | {"name": "folder-test", "digest": "1" * 32, "context": "testing"}
    metrics = {"test/accuracy": 0.5, "test/loss": 1.5, "speed/test_images_per_second": 89.5}
    found = {"id": record["id"], "metrics": metrics, "tags": {"label": None}, "datasets": [dataset]}
    return found | {"ended": record["started"] + at} | changes


def sustained_of(record, at=7000, **changes):
    figures = {
        "images_per_second": 750.0, "first_third_images_per_second": 800.0, "seconds": 2.0, "batch_size": 256.0,
    }  # fmt: skip
    metrics = {score_steps.metric("convnet_fp32", figure): value for figure, value in figures.items()}
    tags = {"sustained.convnet_fp32.workload": "001a9f8a3f", "sustained.convnet_fp32.precision": "fp32"}
    found = {
        "id": record["id"], "metrics": metrics, "tags": tags | {"sustained.taints": None},
        "series": {COURSE: [800.0, 700.0]}, "warnings": ["hot"],
    }  # fmt: skip
    return found | {"ended": record["started"] + at} | changes


def sustained_before_schema_3(record):
    metrics = {"speed/sustained_images_per_second": 750.0, "time/sustain_seconds": 2.0}
    tags = {"sustained.workload": "001a9f8a3f", "sustained.taints": None}
    return sustained_of(record, metrics=metrics, tags=tags, series=[800.0, 700.0])


def parts_of(record, evaluation=None, sustained=None):
    """The files of a run, as the stages leave them."""
    parts = {
        "train/record.json": files.json_text(record).encode(),
        "train/hardware.json": files.json_text(record["hardware"]).encode(),
        "train/params.yaml": b"recipe: blog\nlabel: null\n",
        **{f"train/plots/{name}.png": PICTURE + name.encode() for name in ("accuracy", "loss", "samples")},
    }
    if evaluation:
        parts["evaluate/record.json"] = files.json_text(evaluation).encode()
        parts["evaluate/plots/confusion_matrix.png"] = PICTURE
    if sustained:
        parts["sustain/record.json"] = files.json_text(sustained).encode()
    return parts


def whole_parts(number=1):
    record = record_of(number)
    return parts_of(record, evaluation_of(record), sustained_of(record))


def listed(parts, **changes):
    """What the manifest says of a run with the files `parts`."""
    stages = {
        stage: json.loads(parts[f"{stage}/record.json"])
        for stage in bundle_schema.STAGES
        if f"{stage}/record.json" in parts
    }
    record = stages["train"]
    facts = {name: {"sha256": sha256(data), "bytes": len(data)} for name, data in parts.items()}
    end = max(each["ended"] for each in stages.values())
    return {
        "record": record["id"],
        "run_id": "f" * 32,
        "start": record["started"],
        "end": end,
        "files": facts,
    } | changes


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def manifest_of(*entries, **changes):
    return {
        "format": "trainmark-bundle",
        "schema": bundle.SCHEMA,
        "created": AT + 9000,
        "runs": list(entries),
    } | changes


def pack(path, *runs, manifest=None, extra=()):
    """Writes the bundle of `runs`, each the files of one; `extra`: more entries, as (name or ZipInfo, data)."""
    manifest = manifest or manifest_of(*map(listed, runs))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bundle.json", json.dumps(manifest))
        for entry, parts in zip(manifest["runs"], runs, strict=True):
            for name, data in parts.items():
                archive.writestr(f"runs/{entry['record']}/{name}", data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a name that is there twice
            for name, data in extra:
                archive.writestr(name, data)
    return path


def write(folder, parts):
    for name, data in parts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def live(folder, number=1, later=True, parent=None, **changes):
    """A training and its later stages as the stages log them; its record and its run."""
    record = record_of(number, **changes)
    evaluation, sustained = evaluation_of(record), sustained_of(record)
    write(folder, parts_of(record))
    handle = store.start_run(record, parent)
    store.mark_run(handle, record)
    for epoch in record["epochs"]:
        store.log_epoch(handle, epoch)
    publisher.publish_training(handle, record, folder / "train")
    store.end_run(handle, "FINISHED", record["ended"])
    if later:
        write(folder, parts_of(record, evaluation))
        publisher.publish_stage("evaluate", record, evaluation, record["experiment"], records.stage_folders(folder))
        write(folder, parts_of(record, evaluation, sustained))
        publisher.publish_stage("sustain", record, sustained, record["experiment"], records.stage_folders(folder))
    return record, handle


@pytest.fixture
def elsewhere(tmp_path, tmp_path_factory, monkeypatch):
    """Goes to an empty store of this name, made where it is missing; gives its file."""

    def go(name):
        path = tmp_path / f"{name}.db"
        if not path.exists():
            fresh_store(path, tmp_path_factory)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path.as_posix()}")
        return path

    return go


def dump(path):
    with closing(sqlite3.connect(path)) as rows:
        return "\n".join(rows.iterdump())


def whole(run_id, folder):
    """All of a run in the current store, but for its ids."""
    run = client().get_run(run_id)
    folder = folder / run_id
    folder.mkdir()
    client().download_artifacts(run_id, "", str(folder))
    return {
        "info": (run.info.run_name, run.info.status, run.info.start_time, run.info.end_time),
        "params": run.data.params,
        "tags": {key: value for key, value in run.data.tags.items() if key not in OTHER},
        "metrics": {
            key: [(each.value, each.step, each.timestamp) for each in client().get_metric_history(run_id, key)]
            for key in run.data.metrics
        },
        "datasets": sorted(
            (d.dataset.name, d.dataset.digest, d.dataset.source, d.dataset.profile, [(t.key, t.value) for t in d.tags])
            for d in run.inputs.dataset_inputs
        ),
        "artifacts": {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        },
    }


def there(tmp_path):
    """All runs of the current store by the id of their record, with the experiment they are in."""
    found = {}
    for run in runs():
        place = tmp_path / str(time.time_ns())
        place.mkdir()
        name = client().get_experiment(run.info.experiment_id).name
        found[run.data.tags["record"]] = name, whole(run.info.run_id, place)
    return found


def refused(path, tmp_path):
    """The one line that reading the bundle at `path` ends with."""
    with pytest.raises(UsageError) as caught:
        bundle.read(path, tmp_path / "unpacked")
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 400
    return str(caught.value)


# --- repeats

REPEATS_ID = "a" * 32


def repeat_of(number, count=3, **tags):
    """A repeat with figures of its own, but for what differs between any two records."""
    own = record_of()["tags"] | {"repeats.id": REPEATS_ID, "repeat": str(number), "repeats": str(count)} | tags
    record = record_of(number, tags=own, name=records.run_name(own), started=AT + 10 * number)
    record["params"]["settings.seed"] = str(number - 1)
    record["metrics"] |= {"time/total_seconds": float(number * number)}
    for epoch in record["epochs"]:
        epoch["figures"]["train/loss"] /= number
    return record


def repeat_parts(number, count=3, **tags):
    """A repeat and its later stages."""
    record = repeat_of(number, count, **tags)
    found = {"test/accuracy": number / 8, "test/loss": 1.5}
    sustained = sustained_of(record, 7000 + number)
    sustained["metrics"][SPEED] += number
    return parts_of(record, evaluation_of(record, 5000 + number, metrics=found), sustained)


def live_repeats(folder, count=3):
    """Trainings and later stages as the stages log them; the run above."""
    first = repeat_of(1, count)
    parent = store.start_run(records.parent_fields(first))
    for number in range(1, count + 1):
        record = repeat_of(number, count)
        changes = {key: record[key] for key in ("tags", "name", "started", "params", "metrics", "epochs")}
        live(folder / str(number), number, later=False, parent=parent, **changes)
        publisher.update_parent(record, "trainmark")
    for stage in ("evaluate", "sustain"):
        for number in range(1, count + 1):
            parts = repeat_parts(number, count)
            if f"{stage}/record.json" in parts:
                result = json.loads(parts[f"{stage}/record.json"])
                there = records.stage_folders(write(folder / str(number), parts))
                publisher.publish_stage(stage, repeat_of(number, count), result, "trainmark", there)
        publisher.update_parent(first, "trainmark")
    return parent


def above(tmp_path):
    """All of the run above the repeats, but for its start: that of the repeat which came first."""
    (parent,) = [run for run in runs() if "repeats.id" in run.data.tags and "repeat" not in run.data.tags]
    place = tmp_path / str(time.time_ns())
    place.mkdir()
    found = whole(parent.info.run_id, place)
    return found | {"info": [*found["info"][:2], found["info"][3]]}


def test_above_repeats_stand_their_medians_spread_and_course(tmp_path):
    run = client().get_run(live_repeats(tmp_path).run_id)
    assert (run.info.run_name, run.info.status) == ("AMD EPYC · blog · fp32 × 3", "FINISHED")
    assert (run.info.start_time, run.info.end_time) == (AT + 10, AT + 30 + 7003)
    metrics = run.data.metrics
    assert (metrics["time/total_seconds"], metrics["std/time/total_seconds"]) == (4.0, pytest.approx(4.0414518843))
    assert (metrics["test/accuracy"], metrics["std/test/accuracy"]) == (0.25, 0.125)
    assert (metrics[SPEED], metrics[f"std/{SPEED}"]) == (752, 1)
    course = client().get_metric_history(run.info.run_id, "train/loss")
    assert [(each.step, each.value) for each in course] == [(1, 1.25), (2, 0.625)]
    tags = run.data.tags
    assert {"repeats.id", "repeats", "workload", "sustained.convnet_fp32.workload"} <= set(tags)
    assert not {"repeat", "record", "mlflow.parentRunId"} & set(tags)
    assert "| 2 | 1 | 25.00% | 25.00% | 4.00 |" in tags["mlflow.note.content"]
    assert "settings.seed" not in run.data.params and run.data.params["train.lr"] == "0.1"
    assert sorted(each["tags"]["repeat"] for each in store.finished_runs()) == ["1", "2", "3"]


def test_bringing_the_run_above_up_to_date_again_adds_nothing(tmp_path, own_store):
    live_repeats(tmp_path)
    before = dump(own_store)
    publisher.update_parent(repeat_of(2), "trainmark")
    assert dump(own_store) == before


def test_repeats_come_whole_into_another_store_and_from_there_into_a_third(tmp_path, elsewhere, capsys):
    live_repeats(tmp_path)
    found = [above(tmp_path)]
    for name in ("second", "third"):
        bundle.export(tmp_path / f"{name}.zip")
        elsewhere(name)
        bundle.import_runs([tmp_path / f"{name}.zip"])
        found.append(above(tmp_path))
        assert len(runs()) == 4 and len(store.finished_runs()) == 3
        parents = {run["tags"]["mlflow.parentRunId"] for run in store.finished_runs()}
        assert [client().get_run(run_id).info.run_name for run_id in parents] == ["AMD EPYC · blog · fp32 × 3"]
        (run,) = [run for run in runs() if run.info.run_id in parents]
        assert run.data.tags["imported"] == "from a bundle of schema 3" and "imported.run_id" not in run.data.tags
        assert run.info.start_time == AT + 10
    assert found[0] == found[1] == found[2]
    second, third = (bundle.read(tmp_path / f"{name}.zip", tmp_path / name) for name in ("second", "third"))
    assert [(run.run_id, run.stages) for run in second] == [(run.run_id, run.stages) for run in third]


@pytest.mark.parametrize("order", ["abc", "cba", "bac", "bca"])
def test_whatever_the_order_the_run_above_waits_for_all_and_comes_to_the_same(tmp_path, elsewhere, order):
    paths = {
        name: pack(tmp_path / f"{name}.zip", *(repeat_parts(number) for number in numbers))
        for name, numbers in {"a": (1,), "b": (3,), "c": (2, 1)}.items()
    }
    elsewhere("other")
    seen = set()
    for name in order:
        bundle.import_runs([paths[name]])
        seen |= {"a": {1}, "b": {3}, "c": {1, 2}}[name]
        found = above(tmp_path)
        if len(seen) < 3:
            assert found["tags"]["mlflow.note.content"] == f"{len(seen)} of 3 repeats are here"
            assert found["metrics"] == {} and found["info"][1] == "SCHEDULED"
        assert len(store.finished_runs()) == len(seen)
    elsewhere("all")
    bundle.import_runs([pack(tmp_path / "all.zip", *(repeat_parts(number) for number in (3, 2, 1)))])
    assert above(tmp_path) == found
    before = dump(elsewhere("all"))
    bundle.import_runs(list(paths.values()))
    assert dump(elsewhere("all")) == before


def test_what_differs_between_repeats_does_not_stand_above_them_but_taints_do(tmp_path, elsewhere):
    elsewhere("other")
    paths = [
        pack(tmp_path / f"{number}.zip", repeat_parts(number, 2, **{"data.placement": place, "taints": taints}))
        for number, place, taints in ((2, "device", "swap"), (1, "host", "load"))
    ]
    for path in paths:
        bundle.import_runs([path])
    tags = above(tmp_path)["tags"]
    assert "data.placement" not in tags and tags["taints"] == "load swap"


@pytest.mark.parametrize("gone", ["above", "below"])
def test_of_repeats_what_was_deleted_stays_deleted(tmp_path, elsewhere, gone):
    path = pack(tmp_path / "x.zip", *(repeat_parts(number) for number in (1, 2, 3)))
    elsewhere("other")
    bundle.import_runs([path])
    (parent,) = [run for run in runs() if "repeat" not in run.data.tags]
    deleted = parent if gone == "above" else next(run for run in runs() if run.data.tags.get("repeat") == "2")
    client().delete_run(deleted.info.run_id)
    before = {run.info.run_id: run.data.metrics for run in runs()}
    bundle.import_runs([path])
    assert {run.info.run_id: run.data.metrics for run in runs()} == before
    assert client().get_run(deleted.info.run_id).info.lifecycle_stage == "deleted"
    note = client().get_run(parent.info.run_id).data.tags["mlflow.note.content"]
    assert "median and range of 3" in note  # its figures are still of all three
    assert len(store.finished_runs()) == (3 if gone == "above" else 2)


@pytest.mark.parametrize("in_store", [True, False])
@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"repeat": "2"}, "repeat: 2 is another run that is there (00000000)"),
        ({"repeat": "3", "repeats": "4"}, "repeats: 4, where one that is there says 3"),
    ],
)
def test_repeats_that_do_not_fit_each_other_are_refused(tmp_path, own_store, other, said, in_store):
    first = pack(tmp_path / "first.zip", repeat_parts(2))
    pack(tmp_path / "x.zip", repeat_parts(7, 9, **{"repeats": "3"} | other))
    if in_store:
        bundle.import_runs([first])
    before = dump(own_store)
    with pytest.raises(UsageError, match=r"^x\.zip: AMD EPYC") as caught:
        bundle.import_runs([tmp_path / "x.zip"] if in_store else [first, tmp_path / "x.zip"])
    assert str(caught.value).endswith(said)
    assert dump(own_store) == before


@pytest.mark.parametrize("broken", ["start_run", "mark_run", "log_series"])
def test_repeats_that_come_by_half_leave_no_run_above(tmp_path, own_store, monkeypatch, broken):
    """The second of the calls fails: a repeat's start, another one's mark or course."""
    path = pack(tmp_path / "x.zip", *(repeat_parts(number, 2) for number in (1, 2)))
    calls, real = [], getattr(store, broken)

    def fails(*args):
        calls.append(args)
        if len(calls) == 2:
            raise StageError("the store is away")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(store, broken, fails)
        with pytest.raises(StageError, match=r"^the store is away$"):
            bundle.import_runs([path])
    assert all(run.info.lifecycle_stage == "deleted" for run in runs())
    assert store.find_repeats(REPEATS_ID, "trainmark") == (None, {})
    bundle.import_runs([path])
    assert len(store.finished_runs()) == 2


def test_a_bundle_of_schema_1_is_still_read(tmp_path, elsewhere):
    elsewhere("other")
    bundle.import_runs([Path(__file__).parent / "bundle_schema1.zip"])
    (run,) = store.finished_runs()
    assert run["name"] == "A made-up CPU · linear-probe · fp32" and run["metrics"]["test/accuracy"] == 0.13
    assert run["tags"]["imported"] == "from a bundle of schema 1" and "repeats.id" not in run["tags"]
    bundle.export(tmp_path / "x.zip")
    elsewhere("another")
    bundle.import_runs([tmp_path / "x.zip"])
    (again,) = store.finished_runs()
    assert again["metrics"] == run["metrics"] and again["tags"]["imported.run_id"] == run["tags"]["imported.run_id"]


def test_a_bundle_of_schema_2_is_still_read(tmp_path, elsewhere):
    record = record_of()
    parts = parts_of(record, evaluation_of(record), sustained_before_schema_3(record))
    path = pack(tmp_path / "x.zip", parts, manifest=manifest_of(listed(parts), schema=2))
    elsewhere("other")
    bundle.import_runs([path])
    (run,) = runs()
    assert run.data.tags["imported"] == "from a bundle of schema 2"
    assert run.data.metrics["speed/sustained_images_per_second"] == 750
    course = client().get_metric_history(run.info.run_id, "sustained/images_per_second")
    assert [each.value for each in course] == [800, 700]
    assert (
        "**Sustained** 750 images/s of the recipe finetune's step (workload `001a9f8a3f`)"
        in (run.data.tags["mlflow.note.content"])
    )
    bundle.export(tmp_path / "again.zip")
    (again,) = bundle.read(tmp_path / "again.zip", tmp_path / "unpacked")
    assert again.schema == 3 and again.results["sustain"] == sustained_before_schema_3(record)


# --- without pictures


def test_pictures_are_left_out_where_asked_and_nothing_else_is(tmp_path, elsewhere):
    live(tmp_path / "a")
    for name, options in (("with", []), ("without", ["--without-pictures"])):
        bundle.main(["export", "--out", str(tmp_path / f"{name}.zip"), *options])
    found = {}
    for name in ("with", "without"):
        (run,) = bundle.read(tmp_path / f"{name}.zip", tmp_path / name)
        found[name] = {path.relative_to(run.folder).as_posix(): path.read_bytes() for path in run.folder.rglob("*.*")}
    pictures = {path for path in found["with"] if path.endswith(".png")}
    assert len(pictures) == 4
    assert found["without"] == {path: data for path, data in found["with"].items() if path not in pictures}

    elsewhere("other")
    bundle.import_runs([tmp_path / "without.zip"])
    (run,) = runs()
    assert run.info.status == "FINISHED" and run.data.metrics["test/accuracy"] == 0.5
    assert client().list_artifacts(run.info.run_id, "plots") == []
    bundle.export(tmp_path / "again.zip")
    (again,) = bundle.read(tmp_path / "again.zip", tmp_path / "again")
    assert set(again.stages) == {"train", "evaluate", "sustain"}


# --- from store to store


def test_runs_come_whole_into_another_store(tmp_path, elsewhere, capsys):
    demo = record_of()["tags"] | {"fallback": "data weights"}
    record, handle = live(tmp_path / "a", 1)
    other = {"tags": demo, "name": records.run_name(demo), "experiment": "trainmark-demo", "started": AT - 9000}
    live(tmp_path / "b", 2, later=False, **other)
    before = there(tmp_path)
    bundle.export(tmp_path / "x.zip")
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"exported AMD EPYC · blog · fp32 ({record['id'][:8]})",
        f"exported DEMO · AMD EPYC · blog · fp32 ({2:032x})".replace(f"{2:032x}", f"{2:032x}"[:8]),
    ]

    elsewhere("other")
    bundle.import_runs([tmp_path / "x.zip"])
    assert capsys.readouterr().out.splitlines() == [
        f"imported AMD EPYC · blog · fp32 ({record['id'][:8]}) into trainmark",
        f"imported DEMO · AMD EPYC · blog · fp32 ({record['id'][:8]}) into trainmark-demo",
    ]
    after = there(tmp_path)
    assert after.keys() == before.keys()
    for name in before:
        for part in before[name][1]:
            assert after[name][1][part] == before[name][1][part], part
        assert after[name][0] == before[name][0]
    assert len(after[record["id"]][1]["metrics"]["val/loss"]) == 2
    assert len(after[record["id"]][1]["metrics"][COURSE]) == 2
    assert "plots/confusion_matrix.png" in after[record["id"]][1]["artifacts"]
    tags = client().get_run(store.find_run(record["id"], "trainmark").run_id).data.tags
    assert tags["imported"] == "from a bundle of schema 3" and "restored" not in tags
    assert (tags["imported.run_id"], tags["machine"]) == (handle.run_id, "b72054f1a41b")


def test_what_was_imported_is_exported_with_its_first_run_id(tmp_path, elsewhere):
    record, handle = live(tmp_path / "a")
    bundle.export(tmp_path / "x.zip")
    elsewhere("other")
    bundle.import_runs([tmp_path / "x.zip"])
    bundle.export(tmp_path / "y.zip")
    (first,), (second,) = (bundle.read(tmp_path / f"{name}.zip", tmp_path / name) for name in "xy")
    assert first.run_id == second.run_id == handle.run_id
    assert first.stages == second.stages and first.record == record


def test_importing_twice_adds_nothing(tmp_path, elsewhere, capsys):
    live(tmp_path / "a")
    bundle.export(tmp_path / "x.zip")
    path = elsewhere("other")
    bundle.import_runs([tmp_path / "x.zip", tmp_path / "x.zip"])
    assert len(runs()) == 1
    before = dump(path)
    bundle.import_runs([tmp_path / "x.zip"])
    assert dump(path) == before
    assert capsys.readouterr().out.splitlines()[-1].endswith("is in this store already")


def test_the_own_bundle_adds_nothing(tmp_path, own_store):
    live(tmp_path / "a")
    bundle.export(tmp_path / "x.zip")
    before = dump(own_store)
    bundle.import_runs([tmp_path / "x.zip"])
    assert dump(own_store) == before


@pytest.mark.parametrize(("order", "together"), [("ab", False), ("ba", False), ("ba", True)])
def test_overlapping_bundles_come_to_the_same_in_any_order(tmp_path, elsewhere, order, together):
    one, two, three = (whole_parts(number) for number in (1, 2, 3))
    paths = {"a": pack(tmp_path / "a.zip", one, two), "b": pack(tmp_path / "b.zip", three, two)}
    elsewhere("other")
    for part in [order] if together else order:
        bundle.import_runs([paths[name] for name in part])
    assert len(runs()) == 3
    found = there(tmp_path)
    elsewhere("all")
    bundle.import_runs([pack(tmp_path / "all.zip", one, two, three)])
    assert found == there(tmp_path)


@pytest.mark.parametrize("order", ["ab", "ba", "abab"])
def test_a_stage_that_came_later_is_added(tmp_path, elsewhere, order, capsys):
    record = record_of()
    pack(tmp_path / "a.zip", parts_of(record))
    pack(tmp_path / "b.zip", whole_parts())
    elsewhere("other")
    for name in order:
        bundle.import_runs([tmp_path / f"{name}.zip"])
    assert ("added    evaluate, sustain to AMD EPYC" in capsys.readouterr().out) == (order[0] == "a")
    ((_, found),) = there(tmp_path).values()
    elsewhere("all")
    bundle.import_runs([tmp_path / "b.zip"])
    assert found == next(iter(there(tmp_path).values()))[1]


def test_stages_from_two_bundles_are_described_together(tmp_path, elsewhere):
    record = record_of()
    pack(tmp_path / "a.zip", parts_of(record, evaluation_of(record)))
    pack(tmp_path / "b.zip", parts_of(record, None, sustained_of(record)))
    found = []
    for order in ("ab", "ba"):
        elsewhere(order)
        bundle.import_runs([tmp_path / f"{name}.zip" for name in order])
        found.append(there(tmp_path))
    assert found[0] == found[1]
    note = next(iter(found[0].values()))[1]["tags"]["mlflow.note.content"]
    assert "**Sustained**" in note and "test accuracy" in note


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_the_newer_evaluation_stands(tmp_path, elsewhere, order):
    record = record_of()
    newer = evaluation_of(record, 6000, metrics={"test/accuracy": 0.75}, tags={"label": "desk"})
    pack(tmp_path / "a.zip", parts_of(record, evaluation_of(record)))
    pack(tmp_path / "b.zip", parts_of(record, newer))
    elsewhere("other")
    for name in order:
        bundle.import_runs([tmp_path / f"{name}.zip"])
    (run,) = runs()
    assert (run.data.metrics["test/accuracy"], run.data.tags["label"]) == (0.75, "desk")
    assert run.data.tags[publisher.digest_tag("evaluate")] == publisher.digest(newer)
    assert run.info.end_time == record["started"] + 6000


def test_a_run_that_was_deleted_stays_deleted(tmp_path, elsewhere, capsys):
    pack(tmp_path / "a.zip", whole_parts())
    path = elsewhere("other")
    bundle.import_runs([tmp_path / "a.zip"])
    client().delete_run(runs()[0].info.run_id)
    before = dump(path)
    bundle.import_runs([tmp_path / "a.zip"])
    assert dump(path) == before and "deleted in this store" in capsys.readouterr().out


def test_a_run_under_way_is_left_alone(tmp_path, own_store):
    record = record_of()
    store.mark_run(store.start_run(record), record)
    before = dump(own_store)
    bundle.import_runs([pack(tmp_path / "a.zip", whole_parts())])
    assert dump(own_store) == before


# --- with models


def checkpoint(trained, path, **changes):
    facts = {
        **{key: trained["facts"][key] for key in ("model", "classes", "image_size")},
        "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "epoch": 2, "val_accuracy": 0.25, "record": trained["id"],
    }  # fmt: skip
    state = {"fc.bias": np.zeros(2, np.float32)}
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(state, path, metadata={"trainmark": json.dumps(facts | changes)})
    return path.read_bytes()


@pytest.fixture
def models(monkeypatch):
    """The files whose models were logged; no model is made of them."""
    logged = []
    loaded = SimpleNamespace(image_size=96, classes=["cat", "dog"])
    monkeypatch.setattr("pipeline.models.checkpoints.load", lambda path: (path.read_bytes(), loaded))
    monkeypatch.setattr(store, "log_model", lambda handle, model, *rest: logged.append((model, *rest[:2])))
    return logged


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_checkpoints_come_along_when_they_are_asked_for(tmp_path, elsewhere, models, order):
    best = checkpoint(record_of(), tmp_path / "a" / "train" / "best.safetensors")
    live(tmp_path / "a")
    for name, with_models in (("a", False), ("b", True)):
        bundle.export(tmp_path / f"{name}.zip", with_models)
        with zipfile.ZipFile(tmp_path / f"{name}.zip") as archive:
            assert any(each.endswith(".safetensors") for each in archive.namelist()) == with_models
    models.clear()
    elsewhere("other")
    for name in order:
        bundle.import_runs([tmp_path / f"{name}.zip"])
    ((_, found),) = there(tmp_path).values()
    assert found["artifacts"]["checkpoints/best.safetensors"] == best
    assert found["info"][1] == "FINISHED" and models == [(best, 96, 2)]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"record": "a" * 32}, "record: it is a checkpoint of another training"),
        ({"classes": 5}, "classes: it is a checkpoint of another"),
        ({"mean": [1, 2]}, "mean: there are 2"),
        ({"std": [0.1, 0.1, 0]}, "std[2]: 0 is not allowed"),
        ({"more": 1}, "'more' is not known here"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, changes, said):
    parts = whole_parts()
    parts["train/best.safetensors"] = checkpoint(record_of(), tmp_path / "best.safetensors", **changes)
    assert said in refused(pack(tmp_path / "a.zip", parts), tmp_path)


def test_a_checkpoint_that_is_none_is_refused(tmp_path):
    parts = whole_parts() | {"train/best.safetensors": b"\x80\x04."}
    assert "no .safetensors file" in refused(pack(tmp_path / "a.zip", parts), tmp_path)


def test_a_checkpoint_that_cannot_be_loaded_is_refused_before_anything_is_written(tmp_path, own_store):
    parts = whole_parts()
    parts["train/best.safetensors"] = checkpoint(record_of(), tmp_path / "best.safetensors")
    before = dump(own_store)
    with pytest.raises(UsageError, match=r"^a\.zip: AMD EPYC .*best\.safetensors: it says it is .* the file lacks"):
        bundle.import_runs([pack(tmp_path / "a.zip", parts)])
    assert dump(own_store) == before


# --- export


def test_a_store_without_runs_is_said(tmp_path):
    with pytest.raises(StageError, match="no finished run to export in sqlite"):
        bundle.export(tmp_path / "x.zip")
    assert not (tmp_path / "x.zip").exists()


def test_the_runs_of_one_experiment_are_exported_alone(tmp_path):
    for number, experiment in ((1, "trainmark"), (2, "results")):
        live(tmp_path / experiment, number, later=False, experiment=experiment)
    publisher.restore_run(record_of(1), "results", records.stage_folders(tmp_path / "trainmark"))
    for chosen, numbers in (("trainmark", {1}), ("results", {1, 2})):
        bundle.main(["export", "--experiment", chosen, "--out", str(tmp_path / f"{chosen}.zip")])
        found = bundle.read(tmp_path / f"{chosen}.zip", tmp_path / f"of {chosen}")
        assert {run.record["id"] for run in found} == {f"{number:032x}" for number in numbers}
    with pytest.raises(StageError, match=r'^no finished run to export in sqlite.*, experiment "other": '):
        bundle.export(tmp_path / "x.zip", experiment="other")


def test_only_finished_runs_are_exported_and_a_training_once(tmp_path, capsys):
    record, handle = live(tmp_path / "a", 1, later=False)
    publisher.restore_run(record, "another", records.stage_folders(tmp_path / "a"))
    failed, unfinished = live(tmp_path / "b", 2)[1], live(tmp_path / "c", 3)[1]
    store.end_run(failed, "FAILED")
    store.resume_run(unfinished)
    plain = store.start_run(record_of(4))
    store.end_run(plain, "FINISHED")
    capsys.readouterr()
    bundle.export(tmp_path / "x.zip")
    (run,) = bundle.read(tmp_path / "x.zip", tmp_path / "unpacked")
    assert run.run_id == handle.run_id  # the live one
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"left out AMD EPYC · blog · fp32 ({plain.run_id[:8]}): it does not hold what it was made from"
    assert said[1:] == [f"exported {run.shown}", said[-1]] and said[-1].startswith(
        f"bundle   {tmp_path / 'x.zip'}: 1 run, "
    )


def test_the_run_that_holds_most_is_exported(tmp_path):
    record, _ = live(tmp_path / "a", 1, later=False)
    folder = write(tmp_path / "b", whole_parts())
    (restored,) = publisher.restore_run(record, "another", records.stage_folders(folder))
    bundle.export(tmp_path / "x.zip")
    (run,) = bundle.read(tmp_path / "x.zip", tmp_path / "unpacked")
    assert run.run_id == restored.run_id and set(run.stages) == {"train", "evaluate", "sustain"}


def test_a_run_that_would_not_be_taken_is_left_out(tmp_path, capsys):
    live(tmp_path / "a", 1)
    live(tmp_path / "b", 2, warnings=["x" * 2000])
    capsys.readouterr()
    bundle.export(tmp_path / "x.zip")
    assert [run.record["id"] for run in bundle.read(tmp_path / "x.zip", tmp_path / "unpacked")] == [f"{1:032x}"]
    left = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out")]
    assert len(left) == 1 and "train/record.json: warnings[0]" in left[0]


def test_a_strangers_picture_stays_where_it_is(tmp_path):
    _, handle = live(tmp_path / "a")
    client().log_text(handle.run_id, "mine", "plots/My Holiday.jpg")
    client().log_text(handle.run_id, "mine", "notes.txt")
    bundle.export(tmp_path / "x.zip")
    (run,) = bundle.read(tmp_path / "x.zip", tmp_path / "unpacked")
    assert sorted(path.name for path in run.folder.rglob("*.*") if path.suffix != ".png") == [
        "hardware.json", "params.yaml", "record.json", "record.json", "record.json"
    ]  # fmt: skip


@pytest.fixture
def someone(monkeypatch, tmp_path):
    """A machine and a user whose names tell something."""
    monkeypatch.setattr(bundle.socket, "gethostname", lambda: "marvin.example.org")
    monkeypatch.setattr(bundle.platform, "node", lambda: "marvin.example.org")
    monkeypatch.setattr(bundle.getpass, "getuser", lambda: "trillian")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    return tmp_path / "home"


NAMING = [
    ("train/record.json", "it ran on MARVIN", "the host name"),
    ("train/hardware.json", "marvin.example.org answered", "the host name"),
    ("train/params.yaml", "by trillian_2", "the user name"),
    ("evaluate/record.json", "trillian", "the user name"),
    ("sustain/record.json", "in {home}/pictures", "the home folder"),
]


@pytest.mark.parametrize(("file", "said", "what"), NAMING)
def test_what_names_machine_or_user_is_not_written(tmp_path, someone, file, said, what):
    said = said.format(home=someone)
    parts = whole_parts()
    if file == "train/params.yaml":
        parts[file] += f"label: {said}\n".encode()
    elif file == "train/hardware.json":
        tree = record_of(hardware={said: 1})
        parts |= {file: json.dumps({said: 1}).encode(), "train/record.json": json.dumps(tree).encode()}
    else:
        place = {"train": "warnings|0", "evaluate": "tags|label", "sustain": "warnings|0"}[file.split("/")[0]]
        parts[file] = json.dumps(put_in(json.loads(parts[file]), place, said)).encode()
    publisher.restore_run(
        json.loads(parts["train/record.json"]), "trainmark", records.stage_folders(write(tmp_path / "a", parts))
    )
    with pytest.raises(StageError) as caught:
        bundle.export(tmp_path / "x.zip")
    line = str(caught.value)
    assert f": {file} holds {what} of this machine (" in line and "nothing was exported" in line
    assert not (tmp_path / "x.zip").exists() and len(line.splitlines()) == 1


def test_words_that_tell_nothing_are_no_names(tmp_path, someone, monkeypatch):
    live(tmp_path / "a", warnings=["max-autotune, at cpu 7, of al by pc (root/usr) on Ubuntu"])
    monkeypatch.setattr(Path, "home", lambda: Path("/"))
    for host, user in (("epyc7", "cifar"), ("Ubuntu", "root"), ("pc", "al"), ("cpu", "max"), ("", "")):
        monkeypatch.setattr(bundle.socket, "gethostname", lambda host=host: host)
        monkeypatch.setattr(bundle.platform, "node", lambda host=host: host)
        monkeypatch.setattr(bundle.getpass, "getuser", lambda user=user: user)
        bundle.export(tmp_path / f"{user}.zip")
        assert (tmp_path / f"{user}.zip").exists()


def test_a_nameless_account_exports(tmp_path, someone, monkeypatch):
    def nameless():
        raise KeyError("getpwuid(): uid not found: 12345")

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(bundle.getpass, "getuser", nameless)
    monkeypatch.setattr(Path, "home", homeless)
    live(tmp_path / "a")
    bundle.export(tmp_path / "x.zip")
    assert (tmp_path / "x.zip").exists()


# --- bad input: a clear line, the store unchanged


def repeat_with(**tags):
    """Writes a bundle of a repeat whose tags are others; without those that are None."""

    def make(path):
        record = repeat_of(2)
        found = {key: value for key, value in (record["tags"] | tags).items() if value is not None}
        pack(path, parts_of(record | {"tags": found, "name": record["name"]}))

    return make


def put_in(tree, path, value):
    """`tree` with the value at the dotted `path` replaced."""
    tree = json.loads(json.dumps(tree))
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("|"))
    node = tree
    for part in parents:
        node = node[part]
    node[last] = value
    return tree


def parts_with(file, path, value):
    """A whole run in which one value is another; its digest is right."""
    parts = whole_parts()
    parts[file] = json.dumps(put_in(json.loads(parts[file]), path, value)).encode()
    if file == "train/record.json" and path.startswith("hardware"):
        parts["train/hardware.json"] = json.dumps(json.loads(parts[file])["hardware"]).encode()
    return parts


def truncated(path):
    pack(path, whole_parts())
    path.write_bytes(path.read_bytes()[:-200])


def cut_short(path):
    pack(path, whole_parts())
    path.write_bytes(path.read_bytes()[:40])


def altered(path):
    parts = whole_parts()
    entry = listed(parts)
    parts["train/record.json"] = parts["train/record.json"].replace(b"0.25", b"0.75")
    pack(path, parts, manifest=manifest_of(entry))


def flipped(path):
    pack(path, whole_parts())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def text_file(path):
    path.write_text("# Results\n" * 100)


def empty(path):
    path.write_bytes(b"")


def another_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<xml/>")


def empty_zip(path):
    with zipfile.ZipFile(path, "w"):
        pass


def other_format(path):
    pack(path, whole_parts(), manifest=manifest_of(listed(whole_parts()), format="another"))


def newer_schema(path):
    pack(path, whole_parts(), manifest=manifest_of(listed(whole_parts()), schema=4, more=1), extra=[("new.html", b"x")])


def no_runs(path):
    pack(path, manifest=manifest_of())


def many_metrics(path):
    metrics = record_of()["metrics"] | {f"figure{index}": 0.5 for index in range(100_000)}
    pack(path, parts_of(record_of(metrics=metrics)))


def many_values(path):
    pack(path, parts_of(record_of(), None, sustained_of(record_of(), series={COURSE: [1.0] * 100_000})))


def many_epochs(path):
    one = record_of()["epochs"][0]
    epochs = [put_in(one, "figures|epoch", epoch) for epoch in range(1, 11_001)]
    pack(path, parts_of(record_of(epochs=epochs)))


def many_samples(path):
    epochs = record_of()["epochs"]
    sample = {"at": AT, "step": 0, "figures": {f"system/{index}": 1.0 for index in range(100)}}
    epochs[0]["system"] = [sample] * 1000
    pack(path, parts_of(record_of(epochs=epochs)))


def many_runs(path):
    entry = listed(whole_parts())
    entries = [entry | {"record": f"{number:032x}"} for number in range(1001)]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bundle.json", json.dumps(manifest_of(*entries), separators=(",", ":")))


def many_entries(path):
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(60_000):
            archive.writestr(f"runs/{number:032x}/train/plots/{'a' * 50}.png", b"")


def zip64(path):
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(66_000):
            archive.writestr(f"{number:x}", b"")


def a_bomb_that_hides(path):
    """The manifest tells of little, the zip unpacks to much."""
    parts = whole_parts()
    entry = listed(parts)
    parts["train/plots/loss.png"] = bytes(50_000_000)
    pack(path, parts, manifest=manifest_of(entry))


def a_bomb_with_a_false_header(path):
    """The zip's own header tells of little, too."""
    parts = whole_parts()
    entry = listed(parts)
    real = len(parts["train/plots/loss.png"])
    parts["train/plots/loss.png"] = bytes(50_000_000)
    pack(path, parts, manifest=manifest_of(entry))
    path.write_bytes(path.read_bytes().replace(struct.pack("<L", 50_000_000), struct.pack("<L", real)))


def a_bomb_that_tells(path):
    parts = whole_parts()
    entry = listed(parts)
    entry["files"]["train/plots/loss.png"]["bytes"] = 50_000_000
    parts["train/plots/loss.png"] = bytes(50_000_000)
    pack(path, parts, manifest=manifest_of(entry))


def a_bomb_of_many(path):
    entry = listed(whole_parts())
    for number in range(600):
        entry["files"][f"train/plots/a{number}.png"] = {"sha256": "0" * 64, "bytes": 4 * 2**20}
    pack(path, whole_parts(), manifest=manifest_of(entry))


def a_manifest_that_bombs(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bundle.json", b" " * 50_000_000)


def overlapping(path):
    """Two entries of the same bytes."""
    parts = whole_parts()
    for name in ("loss", "accuracy"):
        parts[f"train/plots/{name}.png"] = PICTURE
    pack(path, parts)
    with zipfile.ZipFile(path) as archive:
        infos = {info.filename.rpartition("/")[2]: info for info in archive.infolist()}
    data = bytearray(path.read_bytes())
    at = data.rindex(f"{RUN}/train/plots/loss.png".encode())  # in the zip's own list, 46 bytes into an entry
    data[at - 4 : at] = struct.pack("<L", infos["accuracy.png"].header_offset)
    path.write_bytes(data)


def with_extra(name, data=b"x"):
    return lambda path: pack(path, whole_parts(), extra=[(name, data)])


def link(name):
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


def linked(path):
    """A picture that is a symbolic link to the record."""
    parts = whole_parts()
    entry = listed(parts)
    data = b"../record.json"
    entry["files"]["train/plots/a.png"] = {"sha256": sha256(data), "bytes": len(data)}
    pack(path, parts, manifest=manifest_of(entry), extra=[(link(f"{RUN}/train/plots/a.png"), data)])


def packed_as(method):
    def make(path):
        parts = whole_parts()
        manifest = manifest_of(listed(parts))
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("bundle.json", json.dumps(manifest))
            for name, data in parts.items():
                archive.writestr(f"{RUN}/{name}", data)

    return make


def packed_list(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("bundle.json", bytes(50_000_000))


def encrypted(path):
    pack(path, whole_parts())
    data = path.read_bytes()
    at = data.index(b"PK\x01\x02")
    path.write_bytes(data[: at + 8] + b"\x01\x00" + data[at + 10 :])


def as_json(file, data):
    """A file of the run that is not the JSON that it should be."""
    return as_parts(whole_parts() | {file: data})


def raw_entry(parts):
    return listed(whole_parts()) | {
        "files": {name: {"sha256": sha256(data), "bytes": len(data)} for name, data in parts.items()}
    }


def without(*names):
    """The run without these files."""

    return as_parts({name: data for name, data in whole_parts().items() if name not in names})


def value(path, value, file="train/record.json"):
    return as_parts(parts_with(file, path, value))


def as_parts(parts):
    return lambda path: pack(path, parts, manifest=manifest_of(raw_entry(parts)))


def listing(path, value):
    return lambda target: pack(target, whole_parts(), manifest=put_in(manifest_of(listed(whole_parts())), path, value))


def duplicate_key(path):
    parts = whole_parts()
    text = parts["train/record.json"].replace(b'"warnings": [', b'"warnings": [], "warnings": [')
    as_parts(parts | {"train/record.json": text})(path)


def half_described(path):
    warned = [f"{number} " + "x" * 900 for number in range(20)]
    pack(path, parts_of(record_of(warnings=warned)))


RUN = f"runs/{1:032x}"
FACTS = {"sha256": "0" * 64, "bytes": 1}
E, S = "evaluate/record.json", "sustain/record.json"
NOT_ALLOWED, LATER_THAN_NOW = "is not allowed: expected", 32_000_000_000_000
BAD = {
    "truncated": (truncated, "it is truncated, or no bundle"),
    "cut short": (cut_short, "it is truncated, or no bundle"),
    "altered": (altered, "train/record.json: it was altered: its digest is not the one in bundle.json"),
    "flipped": (flipped, "x.zip: "),
    "a text": (text_file, "it is truncated, or no bundle"),
    "empty": (empty, "it is truncated, or no bundle"),
    "another zip": (another_zip, "it is no bundle of Trainmark: bundle.json is missing"),
    "an empty zip": (empty_zip, "it is no bundle of Trainmark: bundle.json is missing"),
    "another format": (other_format, "it is no bundle of Trainmark: its format is not"),
    "a newer schema": (newer_schema, "made by a newer Trainmark (schema 4; this one reads up to 3): update this one"),
    "schema 0": (listing("schema", 0), f"schema: 0 {NOT_ALLOWED}"),
    "a schema of words": (listing("schema", "1"), f"schema: '1' {NOT_ALLOWED}"),
    "no runs": (no_runs, "runs: there are 0"),
    # figures
    "NaN": (value("metrics|test", float("nan")), "NaN is no number"),
    "infinity": (value("epochs|0|figures|train/loss", float("inf")), "Infinity is no number"),
    "a huge number": (as_json(S, b'{"id": 1e999}'), "'1e999' is too large"),
    "a long integer": (as_json(S, b'{"id": ' + b"9" * 5000 + b"}"), "is too large"),
    "larger than float32": (value("metrics|test", 1e39), f"metrics: test: 1e+39 {NOT_ALLOWED}"),
    "a word for a figure": (value("metrics|test", "1"), f"metrics: test: '1' {NOT_ALLOWED}"),
    "true for a figure": (value("metrics|test", True), f"metrics: test: True {NOT_ALLOWED}"),
    "a negative duration": (value("metrics|time/total_seconds", -0.5), f"time/total_seconds: -0.5 {NOT_ALLOWED}"),
    "a negative epoch": (value("epochs|1|figures|time/train_seconds", -1), f"time/train_seconds: -1 {NOT_ALLOWED}"),
    "a negative speed": (value(f"series|{COURSE}|0", -1, S), f"series: {COURSE}[0]: -1 {NOT_ALLOWED}"),
    "a negative old speed": (value("series", [-1], S), f"series[0]: -1 {NOT_ALLOWED}"),
    "a negative score": (value(f"metrics|{SPEED}", -1, S), f"metrics: {SPEED}: -1 {NOT_ALLOWED}"),
    "another metric's course": (value("series", {"test/accuracy": [1.0]}, S), "'test/accuracy' is not known here"),
    "more than right": (value("metrics|test/accuracy", 1.5, E), f"test/accuracy: 1.5 {NOT_ALLOWED}"),
    "ended before it began": (value("ended", AT - 1), "ended: "),
    "evaluated before it began": (value("ended", AT - 1, E), "it is of another training, or of before it"),
    "started in 1970": (value("started", 5), "started: 5 is not allowed: expected milliseconds since 1970"),
    "ended in the future": (value("ended", LATER_THAN_NOW), f"ended: {LATER_THAN_NOW} {NOT_ALLOWED}"),
    "an epoch out of order": (value("epochs|1|figures|epoch", 1), "epochs[1]: figures: epoch: 1"),
    "an epoch of 1.0": (value("epochs|0|figures|epoch", 1.0), "epochs[0]: figures: epoch: 1.0"),
    "a half step": (value("epochs|0|system|0|step", 0.5), f"step: 0.5 {NOT_ALLOWED}"),
    "no epoch": (value("epochs", []), "epochs: there are 0"),
    "an epoch without loss": (value("epochs|0|figures", {"epoch": 1}), '" is missing'),
    "no such best epoch": (value("metrics|best/epoch", 3), f"best/epoch: 3 {NOT_ALLOWED}"),
    "100,000 metrics": (many_metrics, "metrics: there are 100,004: expected at most 1,000"),
    "100,000 values": (many_values, "values of metrics: a run has fewer than 100,000"),
    "11,000 epochs": (many_epochs, "epochs: there are 11,000"),
    "100,000 samples": (many_samples, "values of metrics: a run has fewer than 100,000"),
    # names and texts
    "a path for an id": (value("id", "../../../etc"), "id: '../../../etc' is not allowed"),
    "a long id": (value("id", "0" * 33), "id: "),
    "a metric that climbs": (value("metrics|a/../../b", 1.0), "'a/../../b' is not allowed"),
    "a metric without a name": (value("metrics|", 1.0), "key: '' is not allowed"),
    "a metric with a long name": (value("metrics|" + "x" * 251, 1.0), "has more than 246 characters"),
    "metrics told by case": (value("metrics|Best/Epoch", 1.0), "two keys differ in case alone"),
    "a long param": (value("params|x", "y" * 6001), "params: x: 'yyy"),
    "a param that is a number": (value("params|x", 1), f"params: x: 1 {NOT_ALLOWED}"),
    "too much of params": (value("params", {f"p{n}": "ü" * 6000 for n in range(20)}), "params: together they have"),
    "a long tag": (value("tags|x", "y" * 5001), "tags: x: 'yyy"),
    "too many tags": (value("tags", record_of()["tags"] | {f"t{n}": "1" for n in range(80)}), "tags: there are 93"),
    "an empty tag": (value("tags|x", ""), f"tags: x: '' {NOT_ALLOWED}"),
    "MLflow's tag": (value("tags|mlflow.parentRunId", "1"), '"mlflow.parentRunId" is no tag of a training'),
    "our own mark": (value("tags|record.sha256", "1"), '"record.sha256" is no tag of a training'),
    "already imported": (value("tags|imported", "1"), '"imported" is no tag of a training'),
    "a version that climbs": (value("tags|software.execution", "../1"), "software.execution: '../1' is not allowed"),
    "version 0": (value("tags|software.execution", "0"), "software.execution: '0' is not allowed"),
    "a workload of words": (value("tags|workload", "mine"), "workload: 'mine' is not allowed"),
    "a fallback taken away": (value("tags|fallback", None, E), '"fallback" is no tag of this stage'),
    "a demo among real runs": (value("tags|fallback", "data"), "named as demos"),
    "a real run as a demo": (value("name", "DEMO · x"), "named as demos"),
    "a repeat without a number": (repeat_with(repeat=None), '"repeat" is missing'),
    "a repeat of what": (repeat_with(**{"repeats.id": None}), '"repeats.id" is missing'),
    "a repeat of a word": (repeat_with(**{"repeats.id": "mine"}), "tags: repeats.id: 'mine' is not allowed"),
    "a repeat of its own": (repeat_with(repeat="1", repeats="1"), f"tags: repeats: 1 {NOT_ALLOWED}"),
    "a fourth of three": (repeat_with(repeat="4"), f"tags: repeat: 4 {NOT_ALLOWED} a whole number from 1 to 3"),
    "a repeat 0": (repeat_with(repeat="0"), "tags: repeat: '0' is not allowed"),
    "repeats without end": (repeat_with(repeats="1001"), f"tags: repeats: 1001 {NOT_ALLOWED}"),
    "a repeat under another's name": (value("tags", repeat_of(2)["tags"]), "a repeat's name ends with its number"),
    "a tag over two lines": (value("tags|label", "a\nb"), "holds the control character '\\n'"),
    "a name that turns around": (value("name", "a\u202eb"), "holds the control character '\\u202e'"),
    "half a character": (value("name", "a\ud800b"), "holds the control character '\\ud800'"),
    "a long warning": (value("warnings", ["x" * 1001]), "warnings[0]: 'xxx"),
    "a description too long": (half_described, "its description has more than 8,000 characters"),
    "no name of an experiment": (value("experiment", ""), f"experiment: '' {NOT_ALLOWED}"),
    "a dataset for nothing": (value("datasets|0|context", "fun"), "context: 'fun' is not allowed"),
    "a dataset with a word more": (value("datasets|0|more", "fun"), "'more' is not known here"),
    "classes of numbers": (value("facts|classes", [1]), f"classes[0]: 1 {NOT_ALLOWED}"),
    "a key not known": (value("more", 1), "'more' is not known here"),
    "a list for a record": (as_json(S, b"[]"), f"[] {NOT_ALLOWED} an object"),
    "no JSON": (as_json(S, b"{"), "sustain/record.json: it is no JSON of ours"),
    "no UTF-8": (as_json(S, b"\xff\xfe"), "sustain/record.json: it is no JSON of ours"),
    "a pickle": (as_json(S, b"\x80\x04\x95."), "sustain/record.json: it is no JSON of ours"),
    "a key twice": (duplicate_key, "a key stands twice"),
    "nested deeply": (as_json(S, b'{"id":' + b"[" * 50 + b"]" * 50 + b"}"), "nested too deeply"),
    "nested endlessly": (as_json(S, b"[" * 200_000), "nested too deeply"),
    "hardware that differs": (as_json("train/hardware.json", b"{}"), "it is not what the record says"),
    "a page for a picture": (as_json("train/plots/loss.png", b"<svg/>"), "loss.png: it is no PNG picture"),
    "settings that blink": (as_json("train/params.yaml", b"a: \x1b[5m"), "params.yaml: it holds control characters"),
    "settings in Latin-1": (as_json("train/params.yaml", b"a: \xfc"), "params.yaml: it is no text in UTF-8"),
    "another training's evaluation": (value("id", "a" * 32, E), "it is of another training"),
    "speed without seconds": (
        value("metrics", {"speed/sustained_images_per_second": 1}, S), '"time/sustain_seconds" is missing'
    ),
    "a score without its batch": (
        value("metrics|sustained/convnet_fp32_batch_size", None, S), f"convnet_fp32_batch_size: None {NOT_ALLOWED}"
    ),
    "a score of another step": (
        value("metrics", {score_steps.metric("transformer_best", "images_per_second"): 1}, S),
        '"sustained/transformer_best_first_third_images_per_second" is missing',
    ),
    "a score without its work": (
        value("tags", {"sustained.convnet_fp32.precision": "fp32"}, S), '"sustained.convnet_fp32.workload" is missing'
    ),
    "a score at an odd precision": (
        value("tags|sustained.convnet_fp32.precision", "fp8", S), "convnet_fp32.precision: 'fp8' is not allowed"
    ),
    # files
    "no record": (without("train/record.json"), '"train/record.json" is missing'),
    "no hardware.json": (without("train/hardware.json"), '"train/hardware.json" is missing'),
    "a picture of nothing": (without(E), "evaluate/plots: a stage without a record has no pictures"),
    "an empty file": (as_json("train/plots/loss.png", b""), f"bytes: 0 {NOT_ALLOWED}"),
    "a run that is not listed": (with_extra(f"runs/{2:032x}/train/record.json"), "it is missing from bundle.json"),
    "a run that is not there": (listing("runs|0|files|train/plots/x.png", FACTS), "x.png: it is missing from the zip"),
    "an odd file listed": (listing("runs|0|files|train/x.pkl", FACTS), "is no file of a run"),
    "a run listed as another": (listing("runs|0|start", AT + 1), f"start: bundle.json says {AT + 1}, the record {AT}"),
    "a false end": (listing("runs|0|end", AT + 1), "end: bundle.json says"),
    "an odd run id": (listing("runs|0|run_id", "a run"), "run_id: 'a run' is not allowed"),
    "made in the future": (listing("created", LATER_THAN_NOW), "created: "),
    "a path upwards": (with_extra(f"{RUN}/train/../../../x.png"), "is no name of a file in a bundle"),
    "an absolute path": (with_extra("/etc/cron.d/x"), "'/etc/cron.d/x' is no name of a file in a bundle"),
    "a backslash": (with_extra(f"{RUN}/train/plots\\..\\x.png"), "is no name of a file in a bundle"),
    "a drive": (with_extra("C:/x.png"), "'C:/x.png' is no name of a file in a bundle"),
    "a device": (with_extra(f"{RUN}/train/plots/con.png"), "is no name of a file in a bundle"),
    "a file twice": (with_extra(f"{RUN}/train/record.json"), "train/record.json: it is there twice"),
    "a file in capitals": (with_extra(f"{RUN}/train/plots/LOSS.png"), "is no name of a file in a bundle"),
    "a folder": (with_extra(f"{RUN}/train/"), "is no name of a file in a bundle"),
    "a name that ends early": (with_extra(zipfile.ZipInfo(f"{RUN}/x")), "is no name of a file in a bundle"),
    "a link": (linked, "a.png: it is no plain file"),
    "packed with bzip2": (packed_as(zipfile.ZIP_BZIP2), "packed in a way that bundles are not"),
    "packed with LZMA": (packed_as(zipfile.ZIP_LZMA), "packed in a way that bundles are not"),
    "encrypted": (encrypted, "it is encrypted"),
    "a bomb that hides": (a_bomb_that_hides, "loss.png: it has more than the"),
    "a bomb with a false header": (a_bomb_with_a_false_header, "x.zip: "),
    "a bomb that tells": (a_bomb_that_tells, f"bytes: 50000000 {NOT_ALLOWED}"),
    "a bomb of many": (a_bomb_of_many, "its files have 2,51"),
    "a manifest that bombs": (a_manifest_that_bombs, "bundle.json: it has more than the 4,194,304 bytes"),
    "two files in one place": (overlapping, "x.zip: "),
    "1,001 runs": (many_runs, "runs: there are 1,001"),
    "60,000 files": (many_entries, "it holds more files than a bundle may"),
    "a list packed with bzip2": (packed_list, "bundle.json: it is encrypted, or packed in a way that bundles are not"),
    "a zip of the long kind": (zip64, "it holds more files than a bundle may"),
}  # fmt: skip


@pytest.mark.parametrize("make, said", BAD.values(), ids=BAD)
def test_a_bad_bundle_is_a_line_and_leaves_the_store_alone(tmp_path, own_store, make, said):
    make(tmp_path / "x.zip")
    good = pack(tmp_path / "good.zip", whole_parts(7))
    before = dump(own_store)
    with pytest.raises(UsageError) as caught:
        bundle.import_runs([good, tmp_path / "x.zip"])
    line = str(caught.value)
    assert line.startswith("x.zip: ") and said in line
    assert len(line.splitlines()) == 1 and len(line) < 400
    assert dump(own_store) == before
    assert not list(tmp_path.glob("mlruns/*/*"))


def test_what_is_no_file_is_refused(tmp_path, own_store):
    for name in ("missing.zip", "."):
        with pytest.raises(UsageError, match="there is no such file"):
            bundle.import_runs([tmp_path / name])


CONFLICTS = {
    "another result": ("train/record.json", "metrics|best/val_accuracy", 0.125),
    "another machine": ("train/record.json", "tags|machine", "000000000000"),
    "another evaluation": (E, "metrics|test/accuracy", 0.75),
}


@pytest.mark.parametrize("in_store", [True, False])
@pytest.mark.parametrize(("file", "path", "other"), CONFLICTS.values(), ids=CONFLICTS)
def test_a_run_with_another_content_is_refused_by_name(tmp_path, own_store, file, path, other, in_store):
    first = pack(tmp_path / "first.zip", whole_parts())
    pack(tmp_path / "x.zip", whole_parts(2), parts_with(file, path, other))
    if in_store:
        bundle.import_runs([first])
    before = dump(own_store)
    with pytest.raises(UsageError) as caught:
        bundle.import_runs([tmp_path / "x.zip"] if in_store else [first, tmp_path / "x.zip"])
    stage = file.split("/")[0]
    said = f"x.zip: AMD EPYC · blog · fp32 ({1:032x}"[:-24] + f"): its {stage} record is another than"
    assert str(caught.value).startswith(said)
    assert dump(own_store) == before


@pytest.mark.parametrize(
    ("broken", "away"),
    [("start_run", False), ("log_epoch", True), ("log_text", False), ("mark_run", False), ("mark_run", True)],
)
def test_an_import_that_fails_half_way_can_be_repeated(tmp_path, own_store, monkeypatch, capsys, broken, away):
    """`away`: the store stays away, so that nothing can be deleted again."""
    pack(tmp_path / "a.zip", whole_parts(1), whole_parts(2), whole_parts(3))
    calls = []
    real = getattr(store, broken)

    def fails(*args):
        calls.append(args)
        run_ids = {each[0].run_id if broken != "start_run" else each[0]["id"] for each in calls}
        if len(run_ids) < 2:
            return real(*args)
        raise StageError("the store is away")

    def gone(*args):
        raise StageError("the store is away")

    with monkeypatch.context() as patch:
        patch.setattr(store, broken, fails)
        if away:
            patch.setattr(store, "discard_run", gone)
        with pytest.raises(StageError, match=r"^the store is away$"):
            bundle.import_runs([tmp_path / "a.zip"])
    whole_ones = [run["tags"]["record"] for run in store.finished_runs()]
    assert whole_ones == ([f"{1:032x}"] if away else [])
    if not away:
        assert all(run.info.lifecycle_stage == "deleted" for run in runs())
        assert all(store.find_run(f"{number:032x}", "trainmark") is None for number in (1, 2, 3))
    assert "what was imported above is deleted again" in capsys.readouterr().out

    bundle.import_runs([tmp_path / "a.zip"])
    assert sorted(run["tags"]["record"] for run in store.finished_runs()) == [f"{n:032x}" for n in (1, 2, 3)]
    before = dump(own_store)
    bundle.import_runs([tmp_path / "a.zip"])
    assert dump(own_store) == before


@pytest.mark.parametrize("broken", ["log_series", "log_text", "end_run"])
def test_a_stage_that_is_added_by_half_is_added_again(tmp_path, elsewhere, monkeypatch, broken):
    pack(tmp_path / "a.zip", parts_of(record_of()))
    pack(tmp_path / "b.zip", whole_parts())
    elsewhere("other")
    bundle.import_runs([tmp_path / "a.zip"])

    def fails(*args):
        raise StageError("the store is away")

    with monkeypatch.context() as patch:
        patch.setattr(store, broken, fails)
        with pytest.raises(StageError):
            bundle.import_runs([tmp_path / "b.zip"])
    bundle.import_runs([tmp_path / "b.zip"])
    ((_, found),) = there(tmp_path).values()
    elsewhere("all")
    bundle.import_runs([tmp_path / "b.zip"])
    assert found == next(iter(there(tmp_path).values()))[1]


def test_a_full_disk_is_said(tmp_path, own_store, monkeypatch):
    pack(tmp_path / "a.zip", whole_parts())

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", full)
        with pytest.raises(StageError, match=r"^no disk space left to write"):
            bundle.read(tmp_path / "a.zip", tmp_path / "unpacked")


def test_nothing_is_imported_into_a_run_under_way(tmp_path, own_store, monkeypatch):
    pack(tmp_path / "a.zip", whole_parts())
    monkeypatch.setenv("MLFLOW_RUN_ID", "a" * 32)
    before = dump(own_store)
    with pytest.raises(UsageError, match=r"^MLFLOW_RUN_ID is set"):
        bundle.import_runs([tmp_path / "a.zip"])
    assert dump(own_store) == before


# --- fuzz: the fixtures are not for each example


WORDS = st.text(max_size=20) | st.sampled_from(["", "..", "a\nb", "\ud800", "x" * 10_000, "mlflow.user", "DEMO · x"])
NUMBERS = (
    st.integers(-3, 3)
    | st.integers()
    | st.floats()
    | st.sampled_from([10**400, -(10**18), 2**63, 1e308, -0.0, float("nan"), float("inf"), AT, AT * 1000])
)
JUNK = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=5,
)


@st.composite
def mutated_tree(draw, tree):
    """`tree` with some of its values replaced, taken out, doubled or under another key."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 3))):
        node, parent, key = tree, None, None
        while isinstance(node, dict | list) and node and (parent is None or draw(st.integers(0, 3))):
            parent = node
            key = draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
            node = node[key]
        if parent is None:
            continue
        deed = draw(st.sampled_from(["replace", "replace", "replace", "delete", "add", "rename", "double"]))
        if deed == "replace":
            parent[key] = draw(JUNK)
        elif deed == "delete":
            del parent[key]
        elif deed == "add" or isinstance(parent, list):
            added = draw(JUNK)
            parent.append(added) if isinstance(parent, list) else parent.update({draw(WORDS): added})
        elif deed == "rename":
            parent[draw(WORDS)] = parent.pop(key)
        else:
            parent[draw(st.sampled_from([f"{key}x", str(key).upper(), f"time/{key}"]))] = node
    return tree


@st.composite
def mutated_values(draw):
    """A bundle with other values in one of its JSON files; its digests are right."""
    parts = whole_parts()
    file = draw(st.sampled_from(["train/record.json", "train/record.json", E, S, "bundle.json"]))
    if file == "bundle.json":
        return parts, draw(mutated_tree(manifest_of(listed(parts)))), ()
    tree = draw(mutated_tree(json.loads(parts[file])))
    parts[file] = json.dumps(tree).encode()
    if file == "train/record.json" and isinstance(tree, dict):
        parts["train/hardware.json"] = json.dumps(tree.get("hardware")).encode()
    entry = raw_entry(parts)
    for key, other in (("record", "id"), ("start", "started")):
        if isinstance(tree, dict) and file == "train/record.json" and other in tree:
            entry[key] = tree[other]
    ends = [json.loads(parts[name]) for name in ("train/record.json", E, S)]
    with_ends = [each["ended"] for each in ends if isinstance(each, dict) and type(each.get("ended")) is int]
    return parts, manifest_of(entry | {"end": max(with_ends, default=AT)}), ()


NAMES = st.sampled_from([
    "bundle.json", f"{RUN}/train/record.json", f"{RUN}/train/x.png", f"{RUN}/train/plots/x.png", "../x", "/x", "a\\b",
    f"{RUN}/train/plots/../x.png", f"{RUN}/train/plots/nul.png", "C:x", "", "x\0y", f"{RUN}/", "\u202e.png", "x" * 300,
]) | st.text(max_size=30)  # fmt: skip


@st.composite
def mutated_structure(draw):
    """A bundle whose files are not those that it should have."""
    parts, extra = whole_parts(), []
    entry = listed(parts)
    for _ in range(draw(st.integers(1, 3))):
        deed = draw(st.sampled_from(["drop", "add", "swap", "content", "twice"]))
        name = draw(st.sampled_from(sorted(parts)))
        if deed == "drop" and len(parts) > 2:
            del parts[name]
        elif deed == "add":
            info = zipfile.ZipInfo("x")
            info.filename = info.orig_filename = draw(NAMES)
            info.external_attr = draw(st.sampled_from([0, 0o600, stat.S_IFLNK, stat.S_IFDIR, stat.S_IFREG])) << 16
            extra.append((info, draw(st.binary(max_size=50))))
        elif deed == "swap":
            other = draw(st.sampled_from(sorted(parts)))
            parts[name], parts[other] = parts[other], parts[name]
        elif deed == "content":
            parts[name] = draw(st.binary(max_size=50))
        else:
            extra.append((f"{RUN}/{name}", parts[name]))
    if draw(st.booleans()):
        entry = raw_entry(parts)
    return parts, manifest_of(entry), extra


@st.composite
def mutated_bytes(draw, whole):
    """The bytes `whole` of a bundle, some of them others, lost, doubled or moved."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        count = draw(st.integers(1, 30))
        deed = draw(st.sampled_from(["flip", "set", "cut", "double", "end", "insert"]))
        if deed == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif deed == "set":
            data[at : at + count] = draw(st.binary(min_size=1, max_size=8))
        elif deed == "cut":
            del data[at : at + count]
        elif deed == "double":
            data[at:at] = data[at : at + count]
        elif deed == "end":
            del data[at:]
        else:
            data[at:at] = draw(st.sampled_from([b"PK\x05\x06", b"PK\x01\x02", b"PK\x03\x04", b"\0\0\0\0", b"\xff" * 4]))
    return bytes(data)


class Checked:
    """Takes the place of a store: it refuses what MLflow's own refuses, and keeps nothing."""

    def __init__(self):
        self.ended = []

    def get_experiment_by_name(self, name):
        mlflow_validation._validate_experiment_name(name)
        return SimpleNamespace(experiment_id="1", lifecycle_stage="active")

    def get_experiment(self, experiment_id):
        return SimpleNamespace(tags={})

    def set_experiment_tag(self, *args):
        pass

    def search_runs(self, *args, **options):
        return []

    def create_run(self, experiment_id, start_time, run_name):
        assert type(start_time) is int and run_name.encode() and len(run_name) <= 250
        return SimpleNamespace(info=SimpleNamespace(run_id="a" * 32, experiment_id="1"), data=SimpleNamespace(tags={}))

    def get_run(self, run_id):
        return self.create_run("1", AT, "x")

    def log_batch(self, run_id, metrics=(), params=(), tags=()):
        mlflow_validation._validate_batch_log_limits(metrics, params, tags)
        mlflow_validation._validate_batch_log_data(metrics, params, tags)
        for metric in metrics:
            assert type(metric.step) is type(metric.timestamp) is int and abs(metric.value) < 1e39
            assert 0 <= metric.step < 2**63 and metric.timestamp < 2**63
        for each in (*params, *tags):
            assert f"{each.key}{each.value}".encode()
        body = [vars(each) for each in (*metrics, *params, *tags)]
        mlflow_validation._validate_batch_log_api_req(json.dumps(body))

    def log_inputs(self, run_id, datasets):
        for each in datasets:
            mlflow_validation._validate_dataset(each.dataset)

    def log_artifact(self, run_id, path, folder=None):
        assert Path(path).stat().st_size

    def log_text(self, run_id, text, name):
        assert text.encode()

    def set_terminated(self, run_id, status, at):
        self.ended.append((status, at))


def survives(path, folder, monkeypatch):
    """Whether the bundle at `path` is taken; what is taken can be put into a store, what is not ends in one line."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        found = bundle.read(path, folder)
    except StageError as error:
        assert len(str(error).splitlines()) == 1 and 0 < len(str(error)) < 500, error
        assert str(error).isprintable()
        return False
    for run in found:
        at = Checked()
        monkeypatch.setattr(store, "_client", lambda at=at: at)
        publisher.restore_run(run.record, run.record["experiment"], run.folders, {"imported.run_id": run.run_id})
        assert at.ended == [("FINISHED", publisher.end_time(run.record, run.results))]
    return True


KINDS = ["values", "structure", "bytes"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [250, pytest.param(4000, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_no_bundle_ends_in_a_traceback(tmp_path, own_store, monkeypatch, kind, count):
    taken = []
    path = tmp_path / "x.zip"
    if kind == "bytes":
        strategy = mutated_bytes(pack(path, whole_parts()).read_bytes())
    else:
        strategy = mutated_values() if kind == "values" else mutated_structure()

    def one(mutated):
        if kind == "bytes":
            path.write_bytes(mutated)
        else:
            parts, manifest, extra = mutated
            with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                archive.writestr("bundle.json", json.dumps(manifest))
                for name, data in parts.items():
                    archive.writestr(f"{RUN}/{name}", data)
                for name, data in extra:
                    archive.writestr(name, data)
        taken.append(survives(path, tmp_path / "unpacked", monkeypatch))

    before = dump(own_store)
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    quiet = settings(max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=checks)
    quiet(given(strategy)(one))()
    assert len(taken) >= count and not all(taken)
    assert any(taken) or kind != "values"  # else all of them were refused for one reason
    assert dump(own_store) == before


# --- the command


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "pipeline.bundle", *map(str, arguments)],
        cwd=config.ROOT, capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip


def test_the_command_exports_and_refuses(tmp_path, capsys):
    live(tmp_path / "a")
    done = command("export", "--out", tmp_path / "deep" / "x.zip")
    assert (done.returncode, done.stderr) == (0, "") and "exported AMD EPYC" in done.stdout
    bundle.main(["import", str(tmp_path / "deep" / "x.zip")])
    assert capsys.readouterr().out.startswith("there    AMD EPYC")
    (tmp_path / "bad.zip").write_text("no zip")
    done = command("import", tmp_path / "bad.zip")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "bundle: bad.zip: it is truncated, or no bundle\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "the following arguments are required: command"),
        (("import",), "the following arguments are required: FILE"),
        (("mend", "x.zip"), "invalid choice: 'mend'"),
        (("export", "--to", "x.zip"), "unrecognized arguments: --to x.zip"),
    ],
)
def test_a_wrong_command_is_one_line(arguments, said):
    with pytest.raises(UsageError) as caught:
        bundle.main(arguments)
    assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_it_does_without_torch():
    code = "import sys; from pipeline import bundle; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=config.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# --- between stores of different kinds


@pytest.fixture
def server(tmp_path, tmp_path_factory):
    """The address of an MLflow server with an empty store."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    (tmp_path / "server").mkdir()
    uri = fresh_store(tmp_path / "server" / "store.db", tmp_path_factory)
    called = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    called += ["--backend-store-uri", uri, "--artifacts-destination", str(tmp_path / "server" / "artifacts")]
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    with subprocess.Popen(called, cwd=tmp_path / "server", env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(600):
                with socket.socket() as asking:
                    if asking.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


@pytest.mark.slow
def test_runs_go_to_a_server_and_back(tmp_path, elsewhere, server, monkeypatch):
    for key in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(key, raising=False)
    record, handle = live(tmp_path / "a", 1)
    live(tmp_path / "b", 2, later=False)
    before = there(tmp_path)
    bundle.export(tmp_path / "x.zip")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    for _ in range(2):
        bundle.import_runs([tmp_path / "x.zip"])
        assert there(tmp_path) == before
    bundle.export(tmp_path / "y.zip")
    elsewhere("other")
    bundle.import_runs([tmp_path / "y.zip", tmp_path / "x.zip"])
    assert there(tmp_path) == before
    assert store.run_tags(store.find_run(record["id"], "trainmark"))["imported.run_id"] == handle.run_id
