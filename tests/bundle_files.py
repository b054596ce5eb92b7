"""Made-up runs, their files, bundles of them and stores for them. No machine ever took these times."""

import hashlib
import json
import warnings
import zipfile

import pytest
from stores import AT, DATASET, client, fresh_store, runs

from pipeline import files
from pipeline.profiling import score_steps
from pipeline.tracking import bundle_schema, pending, publisher, records, store

PNG = b"\x89PNG\r\n\x1a\na picture"
SPEED, COURSE = (score_steps.metric("convnet_fp32", figure) for figure in ("images_per_second", "course"))
TRAIN, EVALUATE, SUSTAIN = "train/record.json", "evaluate/record.json", "sustain/record.json"
REPEATS_ID = "a" * 32
MARKS = {"imported", "imported.run_id", "restored", "mlflow.log-model.history", store.PARENT_TAG}
TITLE = "AMD EPYC · blog · fp32 (00000000)"


def training(number=1, **changes):
    """A training's record. A change of the tags gives the run its name."""
    tags = {
        "hardware": "AMD EPYC", "hardware.memory_gib": "23.5", "machine": "b72054f1a41b", "device": "cpu",
        "backend": "cpu", "software.os": "Debian GNU/Linux 12", "software.torch": "2.14.1", "recipe": "blog",
        "precision": "fp32", "dataset": "cifar10", "weights": "random", "workload": "151c7d9c58", "taints": "load",
    }  # fmt: skip
    figures = {
        "train/accuracy": 0.25, "val/loss": 2.5, "val/accuracy": 0.125, "train/lr": 0.1, "time/train_seconds": 0.75,
        "time/val_seconds": 0.1, "speed/train_images_per_second": 240.0, "memory/peak_mib": 1148.5,
    }  # fmt: skip
    state = {"step": 1, "figures": {"system/cpu_utilization_percentage": 99.5}}
    record = {
        "id": f"{number:032x}",
        "experiment": "trainmark",
        "started": AT,
        "ended": AT + 3000,
        "params": {"train.lr": "0.1", "train.epochs": "2", "settings.label": "null"},
        "tags": tags,
        "datasets": [DATASET],
        "epochs": [
            {
                "at": AT + 1000 * epoch,
                "figures": {"epoch": epoch, "train/loss": 2.5 / epoch, **figures},
                "system": [{"at": AT + 1000 * epoch - 500, **state}],
            }
            for epoch in (1, 2)
        ],
        "metrics": {"best/epoch": 2, "best/val_accuracy": 0.25, "time/total_seconds": 1.75},
        "warnings": ["other processes used 90% of the CPU when it started"],
        "facts": {
            "model": "test_resnet.r160_in1k", "classes": ["cat", "dog"], "images": {"train": 180, "validation": 20},
            "trainable": 5130, "parameters": 11181642, "compile": "off", "image_size": 96,
            "verdict": "limited by data",
        },
        "hardware": {"machine": {"machine": "b72054f1a41b", "cores": 2}},
    } | changes  # fmt: skip
    return {"name": records.run_name(record["tags"]), **record}


def evaluation(record, *, after=5000, **changes):
    dataset = DATASET | {"name": "folder-test", "digest": "1" * 32, "context": "testing"}
    result = {"id": record["id"], "metrics": {"test/accuracy": 0.5, "test/loss": 1.5}, "tags": {"label": None}}
    return result | {"datasets": [dataset], "ended": record["started"] + after} | changes


def sustained(record, *, after=7000, **changes):
    figures = {"images_per_second": 750.0, "first_third_images_per_second": 800.0, "seconds": 2.0, "batch_size": 256.0}
    tags = {"sustained.convnet_fp32.workload": "001a9f8a3f", "sustained.convnet_fp32.precision": "fp32"}
    return {
        "id": record["id"],
        "metrics": {score_steps.metric("convnet_fp32", figure): value for figure, value in figures.items()},
        "tags": tags | {"sustained.taints": None},
        "series": {COURSE: [800.0, 700.0]},
        "warnings": ["hot"],
        "ended": record["started"] + after,
    } | changes


def sustained_before_schema_3(record):
    metrics = {"speed/sustained_images_per_second": 750.0, "time/sustain_seconds": 2.0}
    return sustained(record, metrics=metrics, tags={"sustained.workload": "001a9f8a3f"}, series=[800.0, 700.0])


def repeat(number, count=3, **tags):
    """A repeat with figures of its own, and its later stages: its files."""
    own = {"repeats.id": REPEATS_ID, "repeat": str(number), "repeats": str(count)}
    record = training(number, tags=training()["tags"] | own | tags, started=AT + 10 * number)
    record["params"]["settings.seed"] = str(number - 1)
    record["metrics"]["time/total_seconds"] = float(number * number)
    for epoch in record["epochs"]:
        epoch["figures"]["train/loss"] /= number
    test = evaluation(record, metrics={"test/accuracy": number / 8})
    return run_files(record, test, sustained(record, after=7000 + number))


def run_files(record, test=None, score=None):
    """A run's files by name, as its stages leave them."""
    contents = {
        TRAIN: as_bytes(record),
        "train/hardware.json": as_bytes(record["hardware"]),
        "train/params.yaml": b"recipe: blog\nlabel: null\n",
        **{f"train/plots/{name}.png": PNG + name.encode() for name in ("accuracy", "loss", "samples")},
    }
    if test:
        contents |= {EVALUATE: as_bytes(test), "evaluate/plots/confusion_matrix.png": PNG}
    return contents | ({SUSTAIN: as_bytes(score)} if score else {})


def whole_run(number=1, **changes):
    record = training(number, **changes)
    return run_files(record, evaluation(record), sustained(record))


def checkpoint(folder, **facts):
    """The bytes of a checkpoint of `training()`, but for `facts`."""
    import timm

    from pipeline.models import checkpoints, classifier

    record = training()
    stated = {key: record["facts"][key] for key in ("model", "classes", "image_size")} | {"record": record["id"]}
    stated |= {"mean": (0.5,) * 3, "std": (0.25,) * 3, "epoch": 2, "val_accuracy": 0.25} | facts
    net = timm.create_model(stated["model"], num_classes=len(stated["classes"]))
    model = classifier.Classifier(net, (0.5,) * 3, (0.25,) * 3)
    checkpoints.save(folder / "made.safetensors", model, checkpoints.Checkpoint(**stated))
    return (folder / "made.safetensors").read_bytes()


def as_bytes(tree):
    return files.json_text(tree).encode()


def changed(contents, file, path, value):
    """A run's files, one value of a JSON file replaced. `path`: keys and indices, separated by `|`."""
    tree = json.loads(contents[file])
    put(tree, path, value)
    return contents | {file: json.dumps(tree).encode()}


def put(tree, path, value):
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("|"))
    for part in parents:
        tree = tree[part]
    tree[last] = value


def entry(contents, **changes):
    """A run's entry in the manifest."""
    stages = [json.loads(contents[file]) for file in (TRAIN, EVALUATE, SUSTAIN) if file in contents]
    return {
        "record": stages[0]["id"],
        "run_id": "f" * 32,
        "start": stages[0]["started"],
        "end": max(stage["ended"] for stage in stages),
        "files": {
            name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in contents.items()
        },
    } | changes


def manifest(*entries, **changes):
    head = {"format": "trainmark-bundle", "schema": bundle_schema.SCHEMA, "created": AT + 9000}
    return head | {"runs": list(entries)} | changes


def pack(path, *run_contents, listing=None, extra=()):
    """Write the bundle of runs, each given as its files; `extra`: more entries, (name or ZipInfo, data) each."""
    listing = listing or manifest(*map(entry, run_contents))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a name that is there twice
        archive.writestr("bundle.json", json.dumps(listing))
        for run, contents in zip(listing["runs"], run_contents, strict=True):
            for name, data in contents.items():
                archive.writestr(f"runs/{run['record']}/{name}", data)
        for name, data in extra:
            archive.writestr(name, data)
    return path


def write(folder, contents):
    """Write a run's files into a folder, as its stages do."""
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def put_in_store(folder, contents):
    """Add a run to the current store, as a cached one is."""
    record = json.loads(contents[TRAIN])
    folders = records.stage_folders(write(folder, contents))
    return record, publisher.put_run(record, folders, pending.target(record["experiment"]))


def open_entry(record, epochs=None, identity=None):
    """The entry of a training that began, with its first epochs, and the file that its process locks."""
    late = records.LATE_TAGS | {"resumed"}
    start = {"tags": {key: tag for key, tag in record["tags"].items() if key not in late}}
    start |= {"epochs": [], "metrics": {}, "ended": None}
    entry, owner = pending.open_training(record | start, identity or {})
    for epoch in record["epochs"][:epochs]:
        pending.append(entry, {"event": "epoch", "epoch": epoch})
    return entry, owner


def finish_entry(entry, owner, folder, contents):
    """Complete the training of an entry, which leaves its files in `folder`, then the stages after it."""
    folders = records.stage_folders(write(folder, contents))
    pending.link_stages({"train": folders["train"]}, entry)
    owner.close()
    for stage in ("evaluate", "sustain"):
        if (folders[stage] / "record.json").exists():
            record = json.loads(contents[TRAIN])
            pending.submit(record, {key: folders[key] for key in ("train", stage)}, record["experiment"])


def stored_runs(tmp_path):
    """All of every run in the current store but for MARKS, by its experiment, record and name."""
    everything = {}
    for run in runs():
        run_id = run.info.run_id
        experiment = client().get_experiment(run.info.experiment_id).name
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))} {run_id}"
        folder.mkdir()
        client().download_artifacts(run_id, "", str(folder))
        metrics = {key: client().get_metric_history(run_id, key) for key in run.data.metrics}
        everything[experiment, run.data.tags.get("record"), run.info.run_name] = {
            "info": (run.info.status, run.info.end_time),
            "params": run.data.params,
            "tags": {key: run.data.tags[key] for key in run.data.tags.keys() - MARKS},
            "metrics": {key: [(at.value, at.step, at.timestamp) for at in course] for key, course in metrics.items()},
            "datasets": sorted((each.dataset.name, each.dataset.digest) for each in run.inputs.dataset_inputs),
            "artifacts": {
                path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
            },
        }
    return everything


@pytest.fixture
def use_store(tmp_path, tmp_path_factory, monkeypatch):
    """Switches to the store of this name, which is empty at first; gives its file."""

    def use(name):
        path = tmp_path / f"{name}.db"
        if not path.exists():
            fresh_store(path, tmp_path_factory)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path.as_posix()}")
        return path

    return use
