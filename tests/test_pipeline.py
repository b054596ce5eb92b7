"""The whole pipeline as people use it: `dvc repro`, `mlflow run`, MLflow's REST answers; on small made images."""

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

import numpy as np
import pytest
from conftest import COLOURS, picture

from pipeline.profiling import score_steps

ROOT = Path(__file__).resolve().parent.parent
FILES = [
    "pipeline",
    "params.yaml",
    "dvc.yaml",
    "MLproject",
    "python_env.yaml",
    "requirements.txt",
    ".dvc/config",
    ".dvc/.gitignore",
    ".dvcignore",
]
EPOCHS = 2
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


class Project:
    """A clone of the project, with a small `folder` data set and its settings made small, in a git repository."""

    def __init__(self, root):
        self.root = root / "clone"
        for name in FILES:
            source, target = ROOT / name, self.root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        shutil.copy(ROOT / ".gitignore", self.root / ".gitignore")
        self.pictures = root / "pictures"
        for split, count in (("train", 20), ("test", 10)):
            for label, (name, colour) in enumerate(COLOURS.items()):
                folder = self.pictures / split / name
                folder.mkdir(parents=True)
                for index in range(count):
                    picture(colour, (32, 32), [len(split), label, index]).save(folder / f"{index}.png")
        self.environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b",
            "DVC_NO_ANALYTICS": "1",
        }  # fmt: skip
        for key in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"):
            self.environment.pop(key, None)
        text = (self.root / "params.yaml").read_text()
        for old, new in (
            ("data:\n  source: auto", "data:\n  source: folder"),
            ("path: data/raw", f"path: {json.dumps(str(self.pictures))}"),
            ("weights: pretrained", "weights: random"),
            ("model: resnet18.a1_in1k", "model: test_resnet.r160_in1k"),
            ("image_size: 96", "image_size: 32"),
            ("epochs: 20", f"epochs: {EPOCHS}"),
            ("batch_size: 256", "batch_size: 64"),
            ("sustain_seconds: 60", "sustain_seconds: 0.1"),
        ):
            assert old in text
            text = text.replace(old, new)
        (self.root / "params.yaml").write_text(text)
        steps = (self.root / "pipeline" / "profiling" / "score_steps.py").read_text()
        for old, new in (
            ('"resnet18", 96, 256', '"test_resnet.r160_in1k", 32, 8'),
            ('"vit_small_patch16_224", 224, 64', '"test_vit.r160_in1k", 160, 2'),
        ):
            assert old in steps
            steps = steps.replace(old, new)
        (self.root / "pipeline" / "profiling" / "score_steps.py").write_text(steps)
        self.run("git", "init", "-q")
        self.run("git", "add", ".")
        self.run("git", "commit", "-qm", "clone")

    def run(self, *command, status=0, **environment):
        """What the command writes to stdout and stderr."""
        done = subprocess.run(
            command, cwd=self.root, env=self.environment | environment, capture_output=True, text=True, timeout=200
        )
        output = done.stdout + done.stderr
        assert done.returncode == status, output
        return output

    def started(self, *command):
        """The command in a process group of its own, in which Ctrl-C works as in a terminal."""
        return subprocess.Popen(
            command, cwd=self.root, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def stage(self, name, *settings, status=0, **environment):
        arguments = [word for setting in settings for word in ("-S", setting)]
        return self.run(sys.executable, "-m", f"pipeline.{name}", *arguments, status=status, **environment)

    def dvc(self, *arguments, **environment):
        return self.run(sys.executable, "-m", "dvc", *arguments, **environment)

    def runs(self, store="mlflow.db"):
        """Id, name and status of every training that is not deleted, oldest first. (A comparison is there, too, once a
        disturbed run has a row of its own.)"""
        with sqlite3.connect(self.root / store) as rows:
            there = "lifecycle_stage = 'active' and name != 'comparison'"
            query = f"select run_uuid, name, status from runs where {there} order by start_time"
            return rows.execute(query).fetchall()

    def column(self, query, *values, store="mlflow.db"):
        with sqlite3.connect(self.root / store) as rows:
            return rows.execute(query, values).fetchall()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The clone after its first `dvc repro`; tests below leave it so that the next ones find it cached."""
    made = Project(tmp_path_factory.mktemp("project"))
    made.first = made.dvc("repro")
    return made


def test_first_repro_leaves_one_finished_run_with_all_that_the_contract_names(project):
    ((run_id, name, status),) = project.runs()
    assert status == "FINISHED"
    assert name.endswith(" · linear-probe · fp32") and "DEMO" not in name
    steps = dict(project.column("select key, count(*) from metrics where run_uuid = ? group by key", run_id))
    for key in PER_EPOCH:
        assert steps.get(key) == EPOCHS, key
    assert ONCE <= set(steps)
    assert "speed/feature_images_per_second" in steps and "speed/train_images_per_second" not in steps
    assert any(key.startswith("system/") for key in steps)
    tags = dict(project.column("select key, value from tags where run_uuid = ?", run_id))
    assert TAGS <= set(tags)
    assert "fallback" not in tags
    assert tags["device"] == tags["backend"] == "cpu"
    for words in ("**Machine**", "test accuracy", "**Machine's part**", "**Sustained**"):
        assert words in tags["mlflow.note.content"], words
    params = dict(project.column("select key, value from params where run_uuid = ?", run_id))
    assert params["train.lr"] == "0.005" and params["train.epochs"] == str(EPOCHS)
    assert params["settings.data.source"] == "folder" and params["settings.data.path"] == "pictures"
    ((uri,),) = project.column("select artifact_uri from runs where run_uuid = ?", run_id)
    artifacts = Path(uri.removeprefix("file://"))
    found = {path.relative_to(artifacts).as_posix() for path in artifacts.rglob("*") if path.is_file()}
    assert found == ARTIFACTS
    contexts = project.column(
        "select input_tags.value, datasets.name from inputs join input_tags using (input_uuid) "
        "join datasets on datasets.dataset_uuid = inputs.source_id where destination_id = ?", run_id
    )  # fmt: skip
    assert sorted(contexts) == [
        ("testing", "folder-test"), ("training", "folder-train"), ("validation", "folder-validation")
    ]  # fmt: skip


def test_no_host_user_or_absolute_path_in_what_a_run_says(project):
    ((run_id, *_),) = project.runs()
    said = project.column("select value from params where run_uuid = ?", run_id)
    said += project.column("select value from tags where run_uuid = ? and key not like 'mlflow.%'", run_id)
    said += [((project.root / "outputs" / "train" / name).read_text(),) for name in ("hardware.json", "params.yaml")]
    for (text,) in said:
        assert str(project.root) not in text and str(project.pictures.parent) not in text
        assert os.uname().nodename not in text


def test_terminal_says_what_matters(project):
    assert "train  20" not in project.first
    for words in (
        "54 train, 6 validation",
        "blue, green, red",
        "epoch 1/2",
        "test accuracy",
        "machine  ",  # what limits it, or that it was too short to tell
        "sustain  transformer best (",
        "make ui",
        "#/experiments/",
    ):
        assert words in project.first, words


def test_second_repro_trains_nothing(project):
    before = project.runs()
    output = project.dvc("repro")
    for stage in ("train", "evaluate", "sustain"):
        assert f"Stage '{stage}' didn't change" in output, stage
    assert project.runs() == before


def test_deleted_store_gets_the_run_back_untrained(project):
    ((old_id, name, _),) = project.runs()
    key = "select key, value, step, timestamp from metrics where run_uuid = ? order by 1, 3, 4"
    figures = project.column(key, old_id)
    (project.root / "mlflow.db").unlink()
    output = project.dvc("repro")
    for stage in ("train", "sustain"):
        assert f"Stage '{stage}' didn't change" in output, stage
    ((new_id, new_name, status),) = project.runs()
    assert (new_name, status) == (name, "FINISHED") and new_id != old_id
    assert project.column(key, new_id) == figures
    assert score_steps.metric("transformer_best", "course") in {name for name, *_ in figures}
    tags = dict(project.column("select key, value from tags where run_uuid = ?", new_id))
    assert "nothing was trained" in tags["restored"]
    assert "restored" in output


def test_another_store_gets_the_run_too(project):
    store = project.root.parent / "other" / "other.db"
    store.parent.mkdir()
    project.dvc("repro", MLFLOW_TRACKING_URI=f"sqlite:///{store.as_posix()}")
    ((_, _, status),) = project.runs(store)
    assert status == "FINISHED"


def test_dvc_shows_metrics_plots_and_params(project):
    shown = json.loads(project.dvc("metrics", "show", "--json"))
    metrics = shown[""]["data"]
    assert metrics["outputs/evaluate/metrics.json"]["data"]["test/accuracy"] == pytest.approx(1, abs=0.7)
    assert metrics["outputs/train/metrics.json"]["data"]["best/epoch"] in (1, 2)
    assert metrics["outputs/sustain/metrics.json"]["data"][score_steps.metric("convnet_fp32", "images_per_second")] > 0
    project.dvc("plots", "show", "--out", "plots_page")
    page = (project.root / "plots_page" / "index.html").read_text()
    for words in ("train/loss", "val/accuracy", "Confusion matrix"):
        assert words in page, words


def test_a_label_is_put_on_the_run_without_training(project):
    params = project.root / "params.yaml"
    params.write_text(params.read_text().replace("label: null", "label: under the desk"))
    output = project.dvc("repro")
    assert "Stage 'train' didn't change" in output and "Running stage 'evaluate'" in output
    assert "Stage 'sustain' didn't change" in output
    ((run_id, *_),) = project.runs()
    assert ("under the desk",) in project.column("select value from tags where run_uuid = ? and key = 'label'", run_id)
    assert "label" in project.dvc("params", "diff")
    assert "under the desk" in (project.root / "reports" / "compare.md").read_text()


def test_an_experiment_with_another_setting_trains_and_shows_beside_the_first(project):
    output = project.dvc(
        "exp", "run", "-S", "recipe=finetune", "-S", "recipes.finetune.lr=0.01", "-S", "recipes.finetune.epochs=1"
    )
    assert "Running stage 'train'" in output and "finetune" in output
    assert len(project.runs()) == 2
    table = project.dvc("exp", "show", "--csv")
    assert "test/accuracy" in table and "finetune" in table and "0.01" in table
    rows = [row for row in csv.reader(io.StringIO(table)) if row[1] != "master"]  # its outputs are not in git
    assert not any("!" in row for row in rows)
    assert "test/accuracy" in project.dvc("metrics", "diff")
    again = project.dvc("repro")
    assert "Stage 'train' didn't change" in again


@pytest.mark.skipif(sys.platform == "win32", reason="no process groups there")
def test_repeats_that_were_cut_off_go_on_are_cached_and_put_back_below_the_run_above_them(project):
    params = project.root / "params.yaml"
    before = params.read_text()
    params.write_text(before.replace("repeats: 1 ", "repeats: 2 "))
    with project.started(sys.executable, "-m", "dvc", "repro") as process:
        for line in process.stdout:
            if line.startswith("repeat   2"):
                break
        os.killpg(process.pid, signal.SIGKILL)
    first = json.loads((project.root / "outputs" / "train" / "record.json").read_text())
    ((status,),) = project.column("select status from runs where name like '%fp32 × 2'")
    assert status == "RUNNING"

    # What a killed DVC leaves behind keeps the next one waiting.
    shutil.rmtree(project.root / ".dvc" / "tmp", ignore_errors=True)
    output = project.dvc("repro")
    assert "resumed  1 of 2 repeats are there" in output and output.count("repeat   1 of 2") == 2  # evaluate, sustain
    assert output.count("\nresult   ") == 2 and "repeats  median and range of 2: " in output
    assert "is empty" not in output
    assert json.loads((project.root / "outputs" / "train" / "record.json").read_text()) == first
    names = {name.split(" · ")[-1] for _, name, status in project.runs() if status == "FINISHED"}
    assert {"1/2", "2/2", "fp32 × 2"} <= names
    key = "select runs.name, key, value, step, timestamp from metrics join runs using (run_uuid) order by 1, 2, 4, 5"
    figures = [row for row in project.column(key) if row[0].endswith(("/2", "× 2"))]
    above = {key for name, key, *_ in figures if name.endswith("× 2")}
    assert {"std/test/accuracy", "std/" + score_steps.metric("transformer_best", "images_per_second")} <= above
    (project.root / "mlflow.db").unlink()
    again = project.dvc("repro")
    assert "Stage 'train' didn't change" in again and again.count("nothing was trained") == 2
    assert {name.split(" · ")[-1] for _, name, _ in project.runs()} == {"1/2", "2/2", "fp32 × 2"}
    assert project.column(key) == figures
    params.write_text(before)


def test_another_machine_trains_again(project):
    """Another fingerprint in hardware.json, as a clone that shares the cache would write it."""
    changed = (project.root / "pipeline" / "hardware.py").read_text()
    spoofed = changed.replace(
        "facts = system_info.facts()", 'facts = system_info.facts() | {"machine": "0123456789ab"}'
    )
    assert spoofed != changed
    (project.root / "pipeline" / "hardware.py").write_text(spoofed)
    output = project.dvc("status")
    project.stage("hardware")
    output = project.dvc("status", "train")
    assert "hardware.json" in output
    (project.root / "pipeline" / "hardware.py").write_text(changed)
    project.stage("hardware")


def test_temporary_experiments_want_a_store_that_lasts(project):
    output = project.run(
        sys.executable, "-m", "dvc", "exp", "run", "--temp", "-S", "recipes.linear-probe.epochs=1", status=255
    )
    assert "MLFLOW_TRACKING_URI" in output


def test_mlflow_run_fills_the_one_run_that_it_made(project):
    for name in ("mlflow.db",):
        (project.root / name).unlink()
    output = project.run(
        sys.executable, "-m", "mlflow", "run", ".", "--env-manager", "local", "--experiment-name", "trainmark",
        "-P", "device=cpu", "-P", "recipe=blog", "-P", "epochs=1", "-P", "data.source=folder",
        "-P", f"data.path={project.pictures}", MLFLOW_TRACKING_URI="sqlite:///mlflow.db",
    )  # fmt: skip
    ((run_id, name, status),) = project.runs()
    assert status == "FINISHED" and name.endswith(" · blog · fp32"), output
    params = dict(project.column("select key, value from params where run_uuid = ?", run_id))
    assert params["epochs"] == params["train.epochs"] == "1"  # MLflow's own, and ours
    assert params["recipe"] == params["settings.recipe"] == "blog"
    tags = dict(project.column("select key, value from tags where run_uuid = ?", run_id))
    assert TAGS <= set(tags) and tags["recipe"] == "blog"
    assert project.column("select name from experiments where lifecycle_stage = 'active' and experiment_id > 0") == [
        ("trainmark",)
    ]
    keys = {key for (key,) in project.column("select distinct key from metrics where run_uuid = ?", run_id)}
    assert PER_EPOCH | ONCE | {"speed/train_images_per_second", "train/lr_applied"} <= keys


def test_mlflow_loads_the_model_and_the_ui_answers(project):
    """After the test above: the blog run's model gives what its checkpoint gives; REST has the view and the run."""
    ((run_id, *_),) = project.runs()
    script = (
        "import os, sys, numpy as np, mlflow, torch\n"
        f"mlflow.set_tracking_uri('sqlite:///mlflow.db'); uri = 'runs:/{run_id}/model'\n"
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
    output = project.run(sys.executable, "-c", script)
    assert "same logits ('blue', 'green', 'red')" in output

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", "sqlite:///mlflow.db", "--port", str(port),
         "--workers", "1"],
        cwd=project.root, env=project.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        api = f"http://127.0.0.1:{port}/api/2.0/mlflow"

        def ask(path, body=None):
            data = None if body is None else json.dumps(body).encode()
            request = Request(f"{api}/{path}", data, {"Content-Type": "application/json"})
            with urlopen(request, timeout=30) as answer:
                return json.load(answer)

        for _ in range(120):
            try:
                experiment = ask("experiments/get-by-name?experiment_name=trainmark")["experiment"]
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.5)
        tags = {tag["key"]: tag["value"] for tag in experiment["tags"]}
        assert tags["mlflow.experimentKind"] == "custom_model_development"
        assert any(key.startswith("mlflow.sharedViewState.") for key in tags)
        found = ask(
            "runs/search", {"experiment_ids": [experiment["experiment_id"]], "filter": "tags.`recipe` = 'blog'"}
        )
        assert [run["info"]["run_id"] for run in found["runs"]] == [run_id]
        history = ask(f"metrics/get-history?run_id={run_id}&metric_key=train/loss")["metrics"]
        assert [point["step"] for point in history] == [1]
        with urlopen(
            f"http://127.0.0.1:{port}/get-artifact?path=plots/loss.png&run_uuid={run_id}", timeout=30
        ) as answer:
            assert answer.read(4) == b"\x89PNG"
    finally:
        server.terminate()
        server.wait(30)


def test_under_mlflow_run_the_run_that_it_made_is_above_the_repeats(project):
    before = {run_id for run_id, *_ in project.runs()}
    project.run(
        sys.executable, "-m", "mlflow", "run", ".", "--env-manager", "local", "--experiment-name", "trainmark",
        "-P", "repeats=2", "-P", "epochs=1", "-P", "seed=3", "-P", "sustain_seconds=0",
        MLFLOW_TRACKING_URI="sqlite:///mlflow.db",
    )  # fmt: skip
    above, *below = [run for run in project.runs() if run[0] not in before]
    assert above[1].endswith("fp32 × 2") and [name.split(" · ")[-1] for _, name, _ in below] == ["1/2", "2/2"]
    assert {status for *_, status in (above, *below)} == {"FINISHED"}
    parents = project.column(
        "select value from tags where key = 'mlflow.parentRunId' and run_uuid in (?, ?)", *(run[0] for run in below)
    )
    assert parents == [(above[0],)] * 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["device=cuda"], ["device", '"cuda"', "cpu"]),
        (["precision=tf32"], ["precision", '"tf32"', "fp32 | bf16"]),
        (["optimizer=lbfgs"], ["optimizer", '"lbfgs"']),
        (["optimizer=muon"], ["optimizer", '"muon"']),
        (["epochs=7", "model=test_vit.r160_in1k"], ["model", "test_vit.r160_in1k", "download"]),
    ],
)
def test_train_refuses_in_one_line(project, settings, words):
    if settings == ["device=cuda"]:
        pytest.importorskip("torch")
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is one")
    before = project.runs()
    output = project.stage("train", *settings, status=2)
    (line,) = [line for line in output.splitlines() if line.startswith("train: ")]
    assert "Traceback" not in output
    for word in words:
        assert word in line, line
    assert project.runs() == before


def test_a_store_that_cannot_be_written_is_named(project):
    output = project.stage("compare", status=1, MLFLOW_TRACKING_URI="sqlite:////proc/nowhere/mlflow.db")
    assert "Traceback" not in output
    assert "sqlite:////proc/nowhere/mlflow.db" in output.splitlines()[-1]


def test_evaluate_refuses_a_checkpoint_of_another_training(project):
    from pipeline.models import checkpoints

    best = project.root / "outputs" / "train" / "best.safetensors"
    kept = best.read_bytes()
    net, facts = checkpoints.load(best)
    best.unlink()
    try:
        checkpoints.save(best, net, checkpoints.Checkpoint(**(vars(facts) | {"record": "another"})))
        assert "checkpoint of another training" in project.stage("evaluate", status=2)
        best.write_bytes(kept[: len(kept) // 2])
        output = project.stage("evaluate", status=1)
        assert "best.safetensors" in output and "Traceback" not in output
    finally:
        best.unlink()
        best.write_bytes(kept)


def test_non_finite_loss_fails_the_run(project):
    before = len(project.runs())
    output = project.stage(
        "run", "lr=1e30", "optimizer=sgd", "precision=bf16", "features=recompute", "trainable=all", status=1
    )
    assert "loss is" in output.splitlines()[-1] and "Traceback" not in output
    *_, (_, _, status) = project.runs()
    assert status == "FAILED" and len(project.runs()) == before + 1


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for one process there")
def test_ctrl_c_ends_the_run_as_killed_with_what_it_has(project):
    before = {run_id for run_id, *_ in project.runs()}
    # Where these tests themselves run in the background of a shell, SIGINT is ignored from birth.
    program = (
        "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "sys.argv = ['run', '-S', 'epochs=100000', '-S', 'features=recompute']; "
        "runpy.run_module('pipeline.run', run_name='__main__', alter_sys=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=project.root, env=project.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        try:
            for line in process.stdout:
                if line.startswith("epoch ") and int(line.split()[1].split("/")[0]) > 1:
                    break
            process.send_signal(signal.SIGINT)
            output = process.communicate(timeout=60)[0]
        finally:
            process.kill()
    assert process.returncode == 130, output
    assert "Traceback" not in output and "stopped by Ctrl-C" in output
    ((run_id, _, status),) = [run for run in project.runs() if run[0] not in before]
    assert status == "KILLED"
    assert project.column("select count(*) from metrics where run_uuid = ? and key = 'train/loss'", run_id)[0][0] >= 1


def test_same_seed_same_metrics_to_the_bit(project):
    figures = []
    for _ in range(2):
        project.stage("run", "recipe=blog", "epochs=2", "threads=1", "sustain_seconds=0")
        newest = max((project.root / "runs").iterdir(), key=lambda path: path.stat().st_mtime)
        record = json.loads((newest / "train" / "record.json").read_text())
        figures.append([
            {k: v for k, v in epoch["figures"].items() if not k.startswith(("time/", "speed/", "memory/"))}
            for epoch in record["epochs"]
        ])  # fmt: skip
    assert figures[0] == figures[1]
    assert np.isfinite(figures[0][0]["train/loss"])
