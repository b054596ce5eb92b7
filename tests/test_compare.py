"""The stage: what it puts into the store, writes, logs and prints, and what it refuses. The rules of comparing are
tested in tests/comparison."""

import json
import shutil

import pytest
from bundle_files import repeat, write
from conftest import fails
from made import EPOCHS, Store, two
from mlflow.entities import Metric, Param, RunTag
from stores import client, own_store, runs  # noqa: F401 (own_store: each test has its own)
from trainings import generated, light, once, threads  # noqa: F401 (threads: one is enough)

from pipeline import compare, files
from pipeline.comparison import build
from pipeline.errors import UsageError
from pipeline.tracking import pending, records, store


@pytest.fixture
def run_stage(tmp_path):
    """Runs the stage with settings; its reports are in the test's own folder."""

    def run(*settings, outputs=tmp_path / "outputs"):
        return compare.run(generated(*settings), outputs, tmp_path / "reports")

    return run


def put(made, experiment="trainmark"):
    """Made runs into the store, with their courses."""
    known = client().get_experiment_by_name(experiment)
    experiment_id = known.experiment_id if known else client().create_experiment(experiment)
    for run in made.runs:
        run_id = client().create_run(experiment_id, start_time=run["started"]).info.run_id
        courses = made.courses[run["run_id"]].items()
        metrics = [Metric(key, value, 1, step) for key, course in courses for step, value in enumerate(course, 1)]
        metrics += [Metric(key, value, 2, EPOCHS) for key, value in run["metrics"].items() if key not in build.COURSES]
        params = [Param(key, value) for key, value in run["params"].items()]
        tags = [RunTag(key, value) for key, value in run["tags"].items()]
        client().log_batch(run_id, metrics=metrics, params=params, tags=tags)
        client().set_terminated(run_id)


def claim_of_b(comparison):
    ((section,),) = [part.sections for part in comparison.parts]
    return next(row.claim for row in section.tables[0].rows if row.head.name == "GPU B")


# --- a cached run


@pytest.fixture
def outputs(once, tmp_path, light):
    """What a training and the stages after it left, for the test to change."""
    return shutil.copytree(once.outputs, tmp_path / "outputs")


def test_a_cached_run_is_put_into_a_store_that_lacks_it_once(outputs, run_stage, tmp_path, capsys):
    record = files.read_json(outputs / "train" / "record.json")
    comparison = run_stage()
    (run,) = runs()
    assert run.info.status == "FINISHED" and run.data.tags["record"] == record["id"] and "restored" in run.data.tags
    assert "test/accuracy" in run.data.metrics and comparison.runs == 1
    text = (tmp_path / "reports" / "compare.md").read_text(encoding="utf-8")
    assert record["tags"]["hardware"] in text and run.info.run_id[:8] in text
    printed = capsys.readouterr().out
    assert comparison.advice in printed and "make ui" in printed and "restored" in printed
    assert store.run_table_link(run.info.experiment_id) in printed

    assert run_stage() == comparison
    assert len(runs()) == 1 and "restored" not in capsys.readouterr().out


def test_every_repeat_is_put_back_below_the_run_above_them(tmp_path, run_stage):
    for number in (1, 2, 3):
        folders = records.stage_folders(tmp_path / "outputs", number)
        for name, data in repeat(number).items():
            stage, _, rest = name.partition("/")
            write(folders[stage], {rest: data})
    for _ in range(2):  # the second time, nothing changes
        assert run_stage().runs == 3
        restored = [run for run in runs() if store.COMPARISON_TAG not in run.data.tags]
        assert [(run.info.status, "restored" in run.data.tags) for run in restored] == [("FINISHED", True)] * 4
        (parent,) = [run for run in restored if "repeat" not in run.data.tags]
        assert parent.data.metrics["test/accuracy"] == 0.25 and "std/test/accuracy" in parent.data.metrics
        assert [run.data.tags.get("mlflow.parentRunId") for run in restored].count(parent.info.run_id) == 3

    (records.stage_folders(tmp_path / "outputs", 3)["train"] / "record.json").unlink()
    run_stage("tracking.experiment=cut-off")
    experiment_id = client().get_experiment_by_name("cut-off").experiment_id
    statuses = [run.info.status for run in runs() if run.info.experiment_id == experiment_id]
    assert sorted(statuses) == ["FINISHED", "FINISHED", "SCHEDULED"]


def test_what_waits_for_the_store_is_delivered_first(outputs, run_stage, tmp_path):
    record = files.read_json(outputs / "train" / "record.json")
    pending.submit(record, records.stage_folders(outputs), "mine")
    outputs.rename(tmp_path / "elsewhere")
    assert run_stage().runs == 1 and pending.entries() == []
    (run,) = runs()
    assert client().get_experiment(run.info.experiment_id).name == "mine" and "restored" not in run.data.tags


def test_a_run_that_was_deleted_does_not_come_back(outputs, run_stage):
    run_stage()
    client().delete_run(runs()[0].info.run_id)
    assert run_stage().runs == 0 and len(runs()) == 1


@pytest.mark.parametrize("other", ["another", None])
def test_a_demo_is_restored_among_demos_without_what_stages_left_for_another(outputs, run_stage, monkeypatch, other):
    record = files.read_json(outputs / "train" / "record.json")
    demo = record | {"tags": record["tags"] | {"fallback": "data"}, "name": f"DEMO · {record['name']}"}
    files.write_json(outputs / "train" / "record.json", demo)
    foreign = set()
    for stage in ("evaluate", "sustain"):
        result = files.read_json(outputs / stage / "record.json")
        foreign |= result["metrics"].keys()
        if other:
            files.write_json(outputs / stage / "record.json", result | {"id": other})
        else:
            shutil.rmtree(outputs / stage)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    assert [part.demo for part in run_stage().parts] == [True]
    (run,) = [run for run in runs() if store.COMPARISON_TAG not in run.data.tags]
    assert foreign and not foreign & run.data.metrics.keys()
    assert "train/loss" in run.data.metrics and run.info.status == "FINISHED"
    assert {client().get_experiment(run.info.experiment_id).name for run in runs()} == {"mine-demo"}


# --- the reports


def test_nothing_trained_is_nothing_restored(run_stage, tmp_path, capsys):
    advice = run_stage().advice
    assert advice in (tmp_path / "reports" / "compare.md").read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    assert runs() == [] and "/#/experiments/" not in printed and advice in printed


def test_two_machines_of_a_store_are_compared(run_stage, tmp_path, capsys):
    put(two())
    claim = claim_of_b(run_stage())
    assert claim.kind == "faster" and claim.sentence in capsys.readouterr().out
    markdown, page, text = (
        (tmp_path / "reports" / f"compare.{kind}").read_text(encoding="utf-8") for kind in ("md", "html", "json")
    )
    assert claim.sentence in markdown and claim.sentence in page
    rows = json.loads(text)["parts"][0]["sections"][0]["tables"][0]["rows"]
    (b,) = [row for row in rows if row["head"]["name"] == "GPU B"]
    assert b["claim"]["sentence"] == claim.sentence
    assert b["figures"]["epoch_seconds"]["value"] == pytest.approx(5 / 8)
    assert b["figures"]["seconds_to_target"]["value"] == pytest.approx(2.5)
    ids = {run.info.run_id: run.info.experiment_id for run in runs() if run.data.tags.get("hardware") == "GPU B"}
    assert {run["id"] for run in b["head"]["runs"]} == set(ids)
    assert b["shown"]["link"] == store.run_link(ids[b["shown"]["id"]], b["shown"]["id"])


def test_a_reference_that_does_not_exist_is_refused_and_nothing_changes(run_stage, tmp_path):
    put(two())
    before = len(runs())
    assert fails(UsageError, run_stage, "compare.reference=GPU C").startswith('compare.reference: "GPU C"')
    assert not (tmp_path / "reports").exists() and len(runs()) == before


def test_tainted_runs_are_claimed_of_only_where_asked_for(run_stage):
    put(two(taints="load"))
    assert claim_of_b(run_stage()).kind == "problem"
    assert claim_of_b(run_stage("compare.tainted=true")).kind == "faster"


def test_prices_are_read_from_their_file(run_stage, tmp_path):
    put(two())
    path = tmp_path / "prices.yaml"
    path.write_text("GPU A: {per_hour: 3.6, currency: EUR, date: 2000-01-01, source: https://example.org}\n")
    run_stage(f"compare.prices={path}")
    text = (tmp_path / "reports" / "compare.md").read_text(encoding="utf-8")
    assert "0.03 EUR [rented]" in text and str(tmp_path) not in text
    path.write_text("GPU A: {per_hour: 0, currency: EUR, date: 2000-01-01, source: https://example.org}\n")
    assert "GPU A.per_hour: 0" in fails(UsageError, run_stage, f"compare.prices={path}")


# --- the comparison's own run


def comparisons():
    return [run for run in runs() if store.COMPARISON_TAG in run.data.tags]


def artifacts(run, path=None):
    listed = client().list_artifacts(run.info.run_id, path)
    return {name for item in listed for name in (artifacts(run, item.path) if item.is_dir else [item.path])}


def test_the_charts_are_logged_as_one_run_that_is_no_training(run_stage):
    put(two())
    run_stage()
    (run,) = comparisons()
    assert run.info.run_name == "comparison" and run.info.status == "FINISHED"
    assert client().get_experiment(run.info.experiment_id).name == "trainmark"
    charts = (f"charts/work-w1/same-settings/{name}.svg" for name in ("speed-up", "accuracy", "memory-tensors"))
    assert artifacts(run) == {"compare.html", "compare.md", "compare.json", *charts}
    assert "GPU B" in run.data.tags["mlflow.note.content"] and len(store.finished_runs()) == 6

    put(Store().add(2, machine="c" * 12, hardware="CARD C"))
    assert run_stage().runs == 8
    (again,) = comparisons()
    assert again.info.run_id == run.info.run_id and "CARD C" in again.data.tags["mlflow.note.content"]


def test_under_mlflow_run_it_stands_in_the_experiment_given(run_stage, monkeypatch):
    put(two(), "another")
    experiment_id = client().get_experiment_by_name("another").experiment_id
    monkeypatch.setenv("MLFLOW_RUN_ID", client().create_run(experiment_id).info.run_id)
    run_stage()
    assert comparisons()[0].info.experiment_id == experiment_id
    assert client().get_experiment_by_name("trainmark") is None
