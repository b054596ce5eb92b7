"""The whole pipeline as people use it: `dvc repro`, `mlflow run`, MLflow's REST answers; on small made images.

The tests share one clone of the project, in order. The quick ones look at its first `dvc repro`.
"""

import csv
import io
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from conftest import COLOURS, picture

from pipeline.profiling import score_steps

ROOT = Path(__file__).resolve().parent.parent
FILES = [
    "pipeline", "params.yaml", "dvc.yaml", "MLproject", "python_env.yaml", "requirements.txt", ".dvc/config",
    ".dvc/.gitignore", ".dvcignore", ".gitignore",
]  # fmt: skip
EPOCHS = 2
SMALLER = {
    "params.yaml": {
        "data:\n  source: auto": "data:\n  source: folder",
        "path: data/raw": "path: PICTURES",
        "weights: pretrained": "weights: random",
        "model: resnet18.a1_in1k": "model: test_resnet.r160_in1k",
        "image_size: 96": "image_size: 32",
        "epochs: 20": f"epochs: {EPOCHS}",
        "batch_size: 256": "batch_size: 64",
        "sustain_seconds: 60": "sustain_seconds: 0.1",
    },
    "pipeline/profiling/score_steps.py": {
        '"resnet18", 96, 256': '"test_resnet.r160_in1k", 32, 8',
        '"vit_small_patch16_224", 224, 64': '"test_vit.r160_in1k", 160, 2',
    },
}
PER_EPOCH = {
    "train/loss", "train/accuracy", "val/loss", "val/accuracy", "train/lr", "time/train_seconds", "time/val_seconds",
    "memory/peak_mib", "memory/peak_share",
}  # fmt: skip
ONCE = {
    "time/startup_seconds", "time/setup_seconds", "time/data_seconds", "time/total_seconds", "time/ceilings_seconds",
    "best/epoch", "best/val_accuracy", "ceiling/matmul_tflops", "ceiling/memory_gb_per_second",
    "ceiling/synthetic_images_per_second", "test/accuracy", "test/loss", "speed/test_images_per_second",
    "time/process_seconds", *(score_steps.metric(step.name, "images_per_second") for step in score_steps.STEPS),
}  # fmt: skip
TAGS = {
    "hardware", "hardware.memory_gib", "hardware.cpu", "hardware.cores", "machine", "device", "backend", "software.os",
    "software.torch", "recipe", "precision", "dataset", "weights", "workload", "data.placement",
    *(score_steps.tag(step.name, "workload") for step in score_steps.STEPS),
}  # fmt: skip
ARTIFACTS = {
    "plots/samples.png", "plots/loss.png", "plots/accuracy.png", "plots/confusion_matrix.png",
    "checkpoints/best.safetensors", "hardware.json", "params.yaml", "records/train.json", "records/evaluate.json",
    "records/sustain.json",
}  # fmt: skip
MLFLOW_RUN = ("-m", "mlflow", "run", ".", "--env-manager", "local", "--experiment-name", "trainmark")


class Project:
    """A clone of the project, with a small `folder` data set and its settings made small, in a git repository."""

    def __init__(self, root):
        self.root = root / "clone"
        self.pictures = root / "pictures"
        for name in FILES:
            source, target = ROOT / name, self.root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        for split, count in (("train", 20), ("test", 10)):
            for label, (name, colour) in enumerate(COLOURS.items()):
                folder = self.pictures / split / name
                folder.mkdir(parents=True)
                for index in range(count):
                    picture(colour, (32, 32), [len(split), label, index]).save(folder / f"{index}.png")
        for name, changes in SMALLER.items():
            for old, new in changes.items():
                self.replace(name, old, new.replace("PICTURES", json.dumps(str(self.pictures))))
        self.environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b",
            "DVC_NO_ANALYTICS": "1",
        }  # fmt: skip
        for key in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"):
            self.environment.pop(key, None)
        for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "clone"]):
            self.run("git", *arguments)

    def replace(self, name, old, new):
        path = self.root / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    def run(self, *command, status=0, **environment):
        """What the command writes to stdout and stderr."""
        done = subprocess.run(
            command, cwd=self.root, env=self.environment | environment, capture_output=True, text=True, timeout=250
        )
        output = done.stdout + done.stderr
        assert done.returncode == status, output
        return output

    def start(self, *command, **options):
        """Start the command, with its output to read."""
        return subprocess.Popen(
            [sys.executable, *command], cwd=self.root, env=self.environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, **options,
        )  # fmt: skip

    def stage(self, name, *settings, status=0, **environment):
        arguments = [word for setting in settings for word in ("-S", setting)]
        return self.run(sys.executable, "-m", f"pipeline.{name}", *arguments, status=status, **environment)

    def dvc(self, *arguments, **environment):
        return self.run(sys.executable, "-m", "dvc", *arguments, **environment)

    def query(self, query, *values, store="mlflow.db"):
        with sqlite3.connect(self.root / store) as rows:
            return rows.execute(query, values).fetchall()

    def runs(self, store="mlflow.db"):
        """Id, name and status of every training that is not deleted, oldest first. (A comparison is there, too, once a
        disturbed run has a row of its own.)"""
        kept = "lifecycle_stage = 'active' and name != 'comparison'"
        return self.query(f"select run_uuid, name, status from runs where {kept} order by start_time", store=store)

    def table(self, name, run_id):
        """Key and value of a run's `tags` or `params`."""
        return dict(self.query(f"select key, value from {name} where run_uuid = ?", run_id))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The clone after its first `dvc repro`; tests below leave it so that the next ones find it cached."""
    clone = Project(tmp_path_factory.mktemp("project"))
    clone.first = clone.dvc("repro")
    return clone


def unchanged(output, *stages):
    return all(f"Stage '{stage}' didn't change" in output for stage in stages)


def test_first_repro_leaves_one_finished_run_with_all_that_the_contract_names(project):
    ((run_id, name, status),) = project.runs()
    assert status == "FINISHED"
    assert name.endswith(" · linear-probe · fp32") and "DEMO" not in name
    steps = dict(project.query("select key, count(*) from metrics where run_uuid = ? group by key", run_id))
    assert {key: steps.get(key) for key in PER_EPOCH} == dict.fromkeys(PER_EPOCH, EPOCHS)
    assert steps.keys() >= ONCE
    assert "speed/feature_images_per_second" in steps and "speed/train_images_per_second" not in steps
    assert any(key.startswith("system/") for key in steps)
    tags = project.table("tags", run_id)
    assert tags.keys() >= TAGS and "fallback" not in tags
    assert tags["device"] == tags["backend"] == "cpu"
    assert tags["mlflow.note.content"]
    params = project.table("params", run_id)
    assert params["train.lr"] == "0.005" and params["train.epochs"] == str(EPOCHS)
    assert params["settings.data.source"] == "folder" and params["settings.data.path"] == "pictures"
    ((uri,),) = project.query("select artifact_uri from runs where run_uuid = ?", run_id)
    artifacts = Path(uri.removeprefix("file://"))
    assert {path.relative_to(artifacts).as_posix() for path in artifacts.rglob("*") if path.is_file()} == ARTIFACTS
    contexts = project.query(
        "select input_tags.value, datasets.name from inputs join input_tags using (input_uuid) "
        "join datasets on datasets.dataset_uuid = inputs.source_id where destination_id = ?", run_id
    )  # fmt: skip
    assert dict(contexts) == {
        "training": "folder-train", "validation": "folder-validation", "testing": "folder-test"
    }  # fmt: skip


def test_no_host_user_or_absolute_path_in_what_a_run_says(project):
    ((run_id, *_),) = project.runs()
    texts = [*project.table("params", run_id).values()]
    texts += [value for key, value in project.table("tags", run_id).items() if not key.startswith("mlflow.")]
    texts += [(project.root / "outputs" / "train" / name).read_text() for name in ("hardware.json", "params.yaml")]
    for private in (str(project.root), str(project.pictures.parent), os.uname().nodename):
        assert not any(private in text for text in texts)


def test_terminal_says_what_matters(project):
    for words in (
        "54 train, 6 validation", "blue, green, red", "epoch 1/2", "test accuracy", "machine  ", "transformer best",
        "make ui", "#/experiments/",
    ):  # fmt: skip
        assert words in project.first, words


def test_second_repro_trains_nothing(project):
    before = project.runs()
    assert unchanged(project.dvc("repro"), "train", "evaluate", "sustain")
    assert project.runs() == before


@pytest.mark.slow
def test_a_deleted_store_and_another_one_get_the_run_untrained(project):
    ((old_id, name, _),) = project.runs()
    key = "select key, value, step, timestamp from metrics where run_uuid = ? order by 1, 3, 4"
    metrics = project.query(key, old_id)
    (project.root / "mlflow.db").unlink()
    assert unchanged(project.dvc("repro"), "train", "sustain")
    ((new_id, new_name, status),) = project.runs()
    assert (new_name, status) == (name, "FINISHED") and new_id != old_id
    assert project.query(key, new_id) == metrics
    assert score_steps.metric("transformer_best", "course") in {name for name, *_ in metrics}
    assert "restored" in project.table("tags", new_id)
    store = project.root.parent / "other.db"
    project.dvc("repro", MLFLOW_TRACKING_URI=f"sqlite:///{store.as_posix()}")
    assert [status for *_, status in project.runs(store)] == ["FINISHED"]


@pytest.mark.slow
def test_dvc_shows_metrics_plots_and_params(project):
    stages = json.loads(project.dvc("metrics", "show", "--json"))[""]["data"]
    metrics = {name: stages[f"outputs/{name}/metrics.json"]["data"] for name in ("train", "evaluate", "sustain")}
    assert metrics["evaluate"].keys() >= {"test/accuracy"} and metrics["train"]["best/epoch"] in (1, 2)
    assert metrics["sustain"][score_steps.metric("convnet_fp32", "images_per_second")] > 0
    project.dvc("plots", "show", "--out", "plots_page")
    page = (project.root / "plots_page" / "index.html").read_text()
    assert all(words in page for words in ("train/loss", "val/accuracy", "Confusion matrix"))


@pytest.mark.slow
def test_a_label_is_put_on_the_run_without_training(project):
    project.replace("params.yaml", "label: null", "label: under the desk")
    output = project.dvc("repro")
    assert unchanged(output, "train", "sustain") and "Running stage 'evaluate'" in output
    ((run_id, *_),) = project.runs()
    assert project.table("tags", run_id)["label"] == "under the desk"
    assert "label" in project.dvc("params", "diff")
    assert "under the desk" in (project.root / "reports" / "compare.md").read_text()


@pytest.mark.slow
def test_an_experiment_with_another_setting_trains_and_shows_beside_the_first(project):
    settings = ["recipe=finetune", "recipes.finetune.lr=0.01", "recipes.finetune.epochs=1"]
    output = project.dvc("exp", "run", *(word for setting in settings for word in ("-S", setting)))
    assert "Running stage 'train'" in output
    assert len(project.runs()) == 2
    table = project.dvc("exp", "show", "--csv")
    assert "test/accuracy" in table and "finetune" in table and "0.01" in table
    rows = [row for row in csv.reader(io.StringIO(table)) if row[1] != "master"]  # its outputs are not in git
    assert not any("!" in row for row in rows)
    assert "test/accuracy" in project.dvc("metrics", "diff")
    assert unchanged(project.dvc("repro"), "train")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no process groups there")
def test_repeats_that_were_cut_off_go_on_are_cached_and_put_back_below_the_run_above_them(project):
    project.replace("params.yaml", "repeats: 1 ", "repeats: 2 ")
    with project.start("-m", "dvc", "repro", start_new_session=True) as process:
        for line in process.stdout:
            if line.startswith("repeat   2"):
                break
        os.killpg(process.pid, signal.SIGKILL)
    first = json.loads((project.root / "outputs" / "train" / "record.json").read_text())

    # What a killed DVC leaves behind keeps the next one waiting.
    shutil.rmtree(project.root / ".dvc" / "tmp", ignore_errors=True)
    output = project.dvc("repro")
    assert "1 of 2 repeats" in output and output.count("repeat   1 of 2") == 2  # evaluate, sustain
    assert json.loads((project.root / "outputs" / "train" / "record.json").read_text()) == first
    names = {name.split(" · ")[-1] for _, name, status in project.runs() if status == "FINISHED"}
    assert {"1/2", "2/2", "fp32 × 2"} <= names
    key = "select runs.name, key, value, step, timestamp from metrics join runs using (run_uuid) order by 1, 2, 4, 5"
    metrics = [row for row in project.query(key) if row[0].endswith(("/2", "× 2"))]
    parents = {key for name, key, *_ in metrics if name.endswith("× 2")}
    assert {"std/test/accuracy", "std/" + score_steps.metric("transformer_best", "images_per_second")} <= parents
    (project.root / "mlflow.db").unlink()
    assert unchanged(project.dvc("repro"), "train")
    assert {name.split(" · ")[-1] for _, name, _ in project.runs()} == {"1/2", "2/2", "fp32 × 2"}
    assert project.query(key) == metrics
    project.replace("params.yaml", "repeats: 2 ", "repeats: 1 ")


@pytest.mark.slow
def test_another_machine_trains_again(project):
    """Another fingerprint in hardware.json, as a clone that shares the cache would write it."""
    path = project.root / "outputs" / "hardware.json"
    facts = path.read_text()
    path.write_text(json.dumps(json.loads(facts) | {"machine": "0123456789ab"}))
    assert "hardware.json" in project.dvc("status", "train")
    path.write_text(facts)


@pytest.fixture(scope="module")
def blog_run(project):
    """The id of the one run that `mlflow run` made, in a store of its own."""
    (project.root / "mlflow.db").unlink()
    settings = {"device": "cpu", "recipe": "blog", "epochs": 1, "data.source": "folder", "data.path": project.pictures}
    parameters = [word for key, value in settings.items() for word in ("-P", f"{key}={value}")]
    output = project.run(sys.executable, *MLFLOW_RUN, *parameters, MLFLOW_TRACKING_URI="sqlite:///mlflow.db")
    ((run_id, name, status),) = project.runs()
    assert status == "FINISHED" and name.endswith(" · blog · fp32"), output
    return run_id


@pytest.mark.slow
def test_mlflow_run_fills_the_one_run_that_it_made(project, blog_run):
    params = project.table("params", blog_run)
    assert params["epochs"] == params["train.epochs"] == "1"  # MLflow's own, and ours
    assert params["recipe"] == params["settings.recipe"] == "blog"
    tags = project.table("tags", blog_run)
    assert tags.keys() >= TAGS and tags["recipe"] == "blog"
    experiments = "select name from experiments where lifecycle_stage = 'active' and experiment_id > 0"
    assert project.query(experiments) == [("trainmark",)]
    keys = {key for (key,) in project.query("select distinct key from metrics where run_uuid = ?", blog_run)}
    assert keys >= PER_EPOCH | ONCE | {"speed/train_images_per_second", "train/lr_applied"}


@pytest.mark.slow
def test_mlflow_loads_the_model(project, blog_run):
    script = (
        "import numpy as np, mlflow, torch\n"
        f"mlflow.set_tracking_uri('sqlite:///mlflow.db'); uri = 'runs:/{blog_run}/model'\n"
        "images = np.random.default_rng(0).random((5, 3, 32, 32), dtype=np.float32)\n"
        "served = np.asarray(mlflow.pyfunc.load_model(uri).predict(images))\n"
        "plain = mlflow.pytorch.load_model(uri)(torch.from_numpy(images)).detach().numpy()\n"
        "from pipeline.models import checkpoints; from pathlib import Path\n"
        "file = sorted(Path('runs').glob('*/train/best.safetensors'))[-1]\n"
        "net, facts = checkpoints.load(file)\n"
        "ours = net(torch.from_numpy(images)).detach().numpy()\n"
        "assert served.shape == (5, 3), served.shape\n"
        "assert np.allclose(served, ours, atol=1e-4) and np.allclose(plain, ours, atol=1e-4)\n"
        "print('same logits', facts.classes)\n"
    )
    assert "same logits ('blue', 'green', 'red')" in project.run(sys.executable, "-c", script)


@pytest.fixture
def server(project, blog_run):
    """The address of MLflow's server on the clone's store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "mlflow", "server", "--backend-store-uri", "sqlite:///mlflow.db", "--port", str(port)]
    with project.start(*command, "--workers", "1") as process:
        for _ in range(240):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
        process.terminate()


@pytest.mark.slow
def test_mlflows_server_answers_with_view_run_and_pictures(server, blog_run):
    def ask(path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{server}/api/2.0/mlflow/{path}", data, {"Content-Type": "application/json"})
        with urlopen(request, timeout=60) as answer:
            return json.load(answer)

    experiment = ask("experiments/get-by-name?experiment_name=trainmark")["experiment"]
    tags = {tag["key"]: tag["value"] for tag in experiment["tags"]}
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    assert any(key.startswith("mlflow.sharedViewState.") for key in tags)
    query = {"experiment_ids": [experiment["experiment_id"]], "filter": "tags.`recipe` = 'blog'"}
    assert [run["info"]["run_id"] for run in ask("runs/search", query)["runs"]] == [blog_run]
    history = ask(f"metrics/get-history?run_id={blog_run}&metric_key=train/loss")["metrics"]
    assert [point["step"] for point in history] == [1]
    with urlopen(f"{server}/get-artifact?path=plots/loss.png&run_uuid={blog_run}", timeout=60) as answer:
        assert answer.read(4) == b"\x89PNG"


@pytest.mark.slow
def test_under_mlflow_run_the_run_that_it_made_is_above_the_repeats(project):
    before = {run_id for run_id, *_ in project.runs()}
    parameters = ["-P", "repeats=2", "-P", "epochs=1", "-P", "seed=3", "-P", "sustain_seconds=0"]
    project.run(sys.executable, *MLFLOW_RUN, *parameters, MLFLOW_TRACKING_URI="sqlite:///mlflow.db")
    parent, *children = [run for run in project.runs() if run[0] not in before]
    assert parent[1].endswith("fp32 × 2") and [name.split(" · ")[-1] for _, name, _ in children] == ["1/2", "2/2"]
    assert {status for *_, status in (parent, *children)} == {"FINISHED"}
    assert {project.table("tags", run_id)["mlflow.parentRunId"] for run_id, *_ in children} == {parent[0]}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for one process there")
def test_the_same_command_goes_on_after_any_end_in_the_same_run(project):
    before, epochs = {run_id for run_id, *_ in project.runs()}, 200
    # Where these tests themselves run in the background of a shell, SIGINT is ignored from birth.
    program = (
        "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"sys.argv = ['run', '-S', 'epochs={epochs}', '-S', 'features=recompute', '-S', 'sustain_seconds=0']; "
        "runpy.run_module('pipeline.run', run_name='__main__', alter_sys=True)"
    )
    for stop, status, said in (
        (signal.SIGINT, 130, "stopped by Ctrl-C"), (signal.SIGTERM, 143, "stopped by SIGTERM"), (signal.SIGKILL, -9, "")
    ):  # fmt: skip
        with project.start("-c", program) as process:
            try:
                lines = (line for line in process.stdout if line.startswith("epoch "))
                next(lines), next(lines)
                process.send_signal(stop)
                output = process.communicate(timeout=120)[0]  # until its child has ended, too
            finally:
                process.kill()
        assert process.returncode == status and "Traceback" not in output and said in output
        if stop != signal.SIGKILL:
            ((run_id, _, run_status),) = [run for run in project.runs() if run[0] not in before]
            assert run_status == "KILLED"
            assert project.query("select 1 from metrics where run_uuid = ? and key = 'train/loss'", run_id)
    output = project.run(sys.executable, "-c", program)
    assert "resumed  after epoch" in output
    ((finished_id, _, run_status),) = [run for run in project.runs() if run[0] not in before]
    assert (finished_id, run_status) == (run_id, "FINISHED")
    assert project.table("tags", run_id)["resumed"] == "3"
    steps = "select step from metrics where run_uuid = ? and key = 'train/loss' order by step"
    assert project.query(steps, run_id) == [(number,) for number in range(1, epochs + 1)]
    assert not project.query("select 1 from metrics where run_uuid = ? and key = 'time/process_seconds'", run_id)
    assert list((project.root / "pending").iterdir()) == []
