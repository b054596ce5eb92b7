"""The stage: what it puts into the store, writes, logs and says, and what it refuses. The rules of comparing are tested
in test_comparison, test_claims and test_report."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import fails
from made import EPOCHS, Store, two
from mlflow.entities import Metric, Param, RunTag
from stores import client, own_store, runs  # noqa: F401 (own_store: each test has its own)
from trainings import driven, generated, light, once, prepare, threads  # noqa: F401 (threads: one is enough)

from pipeline import compare, config, files
from pipeline.comparison import build
from pipeline.errors import UsageError
from pipeline.tracking import records, store


@pytest.fixture(autouse=True)
def reports(tmp_path, monkeypatch):
    """The folder of the reports, not there yet."""
    monkeypatch.setattr(compare, "REPORTS", tmp_path / "reports")
    return tmp_path / "reports"


def put(made, experiment="trainmark"):
    """Made runs into the store, with their courses."""
    known = client().get_experiment_by_name(experiment)
    where = known.experiment_id if known else client().create_experiment(experiment)
    for run in made.runs:
        run_id = client().create_run(where, start_time=run["started"]).info.run_id
        course = [
            Metric(k, v, 1, step) for k, vs in made.courses[run["run_id"]].items() for step, v in enumerate(vs, 1)
        ]
        last = [Metric(key, value, 2, EPOCHS) for key, value in run["metrics"].items() if key not in build.COURSES]
        client().log_batch(
            run_id,
            metrics=course + last,
            params=[Param(key, value) for key, value in run["params"].items()],
            tags=[RunTag(key, value) for key, value in run["tags"].items()],
        )
        client().set_terminated(run_id)


def trainings():
    return [run for run in runs() if "workload" in run.data.tags]


def compared(tmp_path, *settings):
    return compare.run(generated(*settings), tmp_path / "outputs")


def verdicts(found):
    return [
        row.claim.sentence
        for part in found.parts
        for section in part.sections
        for table in section.tables
        for row in table.rows
        if row.claim.sentence
    ]


# --- a cached run


@pytest.fixture
def outputs(once, tmp_path, light):
    """What a training and the stages after it left, for the test to change."""
    return shutil.copytree(once.outputs, tmp_path / "outputs")


def test_a_cached_run_is_put_into_a_store_that_lacks_it_once(outputs, reports, capsys):
    record = files.read_json(outputs / "train" / "record.json")
    found = compare.run(generated(), outputs)
    (run,) = runs()
    assert run.info.status == "FINISHED" and run.data.tags["record"] == record["id"] and "restored" in run.data.tags
    assert "test/accuracy" in run.data.metrics
    assert found.runs == 1 and "One machine so far" in found.advice
    text = (reports / "compare.md").read_text(encoding="utf-8")
    assert record["tags"]["hardware"] in text and run.info.run_id[:8] in text
    said = capsys.readouterr().out
    assert found.advice in said and "make ui" in said and "nothing was trained" in said
    assert store.run_table_link(run.info.experiment_id) in said

    assert compare.run(generated(), outputs) == found
    assert len(runs()) == 1 and "nothing was trained" not in capsys.readouterr().out


def test_every_repeat_is_put_back_below_the_run_above_them(tmp_path, light, driven, capsys):
    settings = generated("repeats=3", "epochs=1")
    prepare(settings, tmp_path / "outputs")
    driven(settings, tmp_path / "outputs", "train")
    live = {run.info.run_name: run.data.metrics for run in runs() if "repeats" in run.data.tags}
    found = compare.run(generated("tracking.experiment=another"), tmp_path / "outputs")
    put = [run for run in runs() if "restored" in run.data.tags]
    assert {run.info.run_name: run.data.metrics for run in put} == live and len(put) == 4
    assert {run.info.status for run in put} == {"FINISHED"}
    (parent,) = [run for run in put if "repeat" not in run.data.tags]
    assert [run.data.tags.get("mlflow.parentRunId") for run in put].count(parent.info.run_id) == 3
    assert capsys.readouterr().out.count("nothing was trained") == 3 and found.runs == 3
    compare.run(generated("tracking.experiment=another"), tmp_path / "outputs")
    assert len([run for run in runs() if "restored" in run.data.tags]) == 4


def test_of_repeats_that_were_cut_off_those_that_are_there_are_put_back(tmp_path, light, driven):
    settings = generated("repeats=3", "epochs=1")
    prepare(settings, tmp_path / "outputs")
    driven(settings, tmp_path / "outputs", "train")
    (records.stage_folders(tmp_path / "outputs", 3)["train"] / "record.json").unlink()
    compare.run(generated("tracking.experiment=another"), tmp_path / "outputs")
    put = {run.info.run_name.split(" · ")[-1]: run for run in runs() if "restored" in run.data.tags}
    assert set(put) == {"1/3", "2/3", "fp32 × 3"} and put["fp32 × 3"].info.status == "SCHEDULED"


def test_what_a_stage_left_but_could_not_log_is_logged(outputs):
    shutil.move(outputs / "evaluate", outputs / "later")
    compare.run(generated(), outputs)
    assert "test/accuracy" not in runs()[0].data.metrics
    shutil.move(outputs / "later", outputs / "evaluate")
    compare.run(generated(), outputs)
    (run,) = runs()
    assert files.read_json(outputs / "evaluate" / "record.json")["metrics"].items() <= run.data.metrics.items()


def test_the_same_run_goes_into_each_experiment_and_counts_once(outputs):
    compare.run(generated(), outputs)
    found = compare.run(generated("tracking.experiment=another"), outputs)
    assert len(runs()) == 2 and len({run.info.experiment_id for run in runs()}) == 2
    assert found.runs == 1


def test_a_run_that_was_deleted_does_not_come_back(outputs):
    compare.run(generated(), outputs)
    client().delete_run(runs()[0].info.run_id)
    assert "No finished runs yet" in compare.run(generated(), outputs).advice
    assert len(runs()) == 1


@pytest.mark.parametrize(
    ("stage", "metric"), [("evaluate", "test/accuracy"), ("sustain", "sustained/convnet_fp32_seconds")]
)
def test_what_a_stage_found_for_another_training_is_not_restored(outputs, stage, metric):
    result = files.read_json(outputs / stage / "record.json")
    files.write_json(outputs / stage / "record.json", result | {"id": "another"})
    compare.run(generated(), outputs)
    (run,) = runs()
    assert metric in result["metrics"]
    assert metric not in run.data.metrics and "train/loss" in run.data.metrics


def test_a_training_without_the_stages_after_it_is_restored(outputs):
    for stage in ("evaluate", "sustain"):
        shutil.rmtree(outputs / stage)
    compare.run(generated(), outputs)
    (run,) = runs()
    assert "test/accuracy" not in run.data.metrics and run.info.status == "FINISHED"


def test_a_demo_is_restored_among_demos(outputs):
    record = files.read_json(outputs / "train" / "record.json")
    demo = record | {"tags": record["tags"] | {"fallback": "data"}, "name": f"DEMO · {record['name']}"}
    files.write_json(outputs / "train" / "record.json", demo)
    assert "every run is a DEMO" in compare.run(generated(), outputs).advice
    assert client().get_experiment(runs()[0].info.experiment_id).name == "trainmark-demo"


# --- the reports


def test_nothing_trained_is_nothing_restored(tmp_path, reports, capsys):
    assert compared(tmp_path).runs == 0
    assert "No finished runs yet" in (reports / "compare.md").read_text(encoding="utf-8")
    said = capsys.readouterr().out
    assert runs() == [] and "/#/experiments/" not in said and "No finished runs yet: `dvc repro`" in said


def test_two_machines_of_a_store_are_compared(tmp_path, reports, capsys):
    put(two())
    found = compared(tmp_path)
    (sentence,) = verdicts(found)
    assert sentence.startswith("GPU B is 1.9") and "as fast as GPU A on this work (3 runs each in 3 ses" in sentence
    said = capsys.readouterr().out
    assert sentence in said and "reports/compare.html" in said
    assert sentence in (reports / "compare.md").read_text(encoding="utf-8")
    assert "<title>Machines compared" in (reports / "compare.html").read_text(encoding="utf-8")
    told = json.loads((reports / "compare.json").read_text(encoding="utf-8"))
    rows = told["parts"][0]["sections"][0]["tables"][0]["rows"]
    (b,) = [row for row in rows if row["head"]["name"] == "GPU B"]
    assert b["claim"]["sentence"] == sentence
    assert b["figures"]["epoch_seconds"]["value"] == pytest.approx(5 / 8)
    assert b["figures"]["seconds_to_target"]["value"] == pytest.approx(2.5)
    ids = {run.info.run_id: run.info.experiment_id for run in trainings() if run.data.tags["hardware"] == "GPU B"}
    assert {run["id"] for run in b["head"]["runs"]} == set(ids)
    assert b["shown"]["link"] == store.run_link(ids[b["shown"]["id"]], b["shown"]["id"])


def test_a_reference_that_does_not_exist_is_refused_and_nothing_changes(tmp_path, reports):
    put(two())
    before = len(runs())
    line = fails(UsageError, compared, tmp_path, "compare.reference=GPU C")
    assert line.startswith(
        'compare.reference: no run in this store is of "GPU C": expected null | a fingerprint | GPU A'
    )
    assert not reports.exists() and len(runs()) == before


def test_tainted_runs_are_claimed_of_only_where_asked_for(tmp_path):
    put(two(taints="load"))
    assert "no claim" in verdicts(compared(tmp_path))[0]
    assert "times as fast" in verdicts(compared(tmp_path, "compare.tainted=true"))[0]


def test_prices_are_read_from_their_file(tmp_path, reports):
    put(two())
    path = tmp_path / "prices.yaml"
    path.write_text("GPU A: {per_hour: 3.6, currency: EUR, date: 2000-01-01, source: https://example.org}\n")
    compared(tmp_path, f"compare.prices={path}")
    text = (reports / "compare.md").read_text(encoding="utf-8")
    assert "0.03 EUR [rented]" in text
    assert str(tmp_path) not in text
    path.write_text("GPU A: {per_hour: 0, currency: EUR, date: 2000-01-01, source: https://example.org}\n")
    line = fails(UsageError, compared, tmp_path, f"compare.prices={path}")
    assert line == "prices.yaml: GPU A.per_hour: 0 is not allowed: expected a number above 0"


def test_without_a_file_of_prices_there_are_none(tmp_path, reports):
    put(two())
    compared(tmp_path, f"compare.prices={tmp_path}/missing.yaml")
    assert "Prices" not in (reports / "compare.md").read_text(encoding="utf-8")


# --- the comparison's own run


def comparisons():
    return [run for run in runs() if store.COMPARISON_TAG in run.data.tags]


def artifacts(run, path=None):
    found = client().list_artifacts(run.info.run_id, path)
    return {name for each in found for name in (artifacts(run, each.path) if each.is_dir else [each.path])}


def test_the_charts_are_logged_as_one_run_that_is_no_training(tmp_path):
    put(two())
    compared(tmp_path)
    (run,) = comparisons()
    assert run.info.run_name == "comparison" and run.info.status == "FINISHED"
    assert client().get_experiment(run.info.experiment_id).name == "trainmark"
    assert artifacts(run) == {
        "compare.html", "compare.md", "compare.json", *(
            f"charts/work-w1/same-settings/{name}.svg" for name in ("speed-up", "accuracy", "memory-tensors")
        )
    }  # fmt: skip
    assert "GPU B is 1.9" in run.data.tags["mlflow.note.content"]
    assert len(store.finished_runs()) == 6

    put(Store().add(2, machine="c" * 12, hardware="C"))
    assert compared(tmp_path).runs == 8
    (again,) = comparisons()
    assert again.info.run_id == run.info.run_id and "C" in again.data.tags["mlflow.note.content"]


def test_a_machine_alone_makes_no_comparison(tmp_path):
    put(Store().sustained(3))
    compared(tmp_path)
    assert comparisons() == []


def test_a_comparison_that_was_deleted_does_not_come_back(tmp_path, reports):
    put(two())
    compared(tmp_path)
    client().delete_run(comparisons()[0].info.run_id)
    compared(tmp_path)
    assert len(comparisons()) == 1 and comparisons()[0].info.lifecycle_stage == "deleted"
    assert (reports / "compare.html").exists()


def test_under_mlflow_run_it_stands_in_the_experiment_given(tmp_path, monkeypatch):
    put(two(), "another")
    where = client().get_experiment_by_name("another").experiment_id
    monkeypatch.setenv("MLFLOW_RUN_ID", client().create_run(where).info.run_id)
    compared(tmp_path)
    assert comparisons()[0].info.experiment_id == where
    assert client().get_experiment_by_name("trainmark") is None


# --- without torch, and in time


def test_it_does_without_torch():
    code = "import sys; from pipeline import compare; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=config.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_thousand_runs_are_compared_before_the_tests_time_is_over():
    made = Store()
    for number in range(100):
        made.sustained(10, machine=f"{number:012}", hardware=f"GPU {number}", seconds=5.0 + number)
    assert made.compare().runs == 1000
