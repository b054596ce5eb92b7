"""The table of all machines: what is compared with what, and what is not known."""

import shutil
import subprocess
import sys

import pytest
from test_tracking import client, runs, store  # noqa: F401 (store: each test has its own)
from test_train import generated, light, once, threads  # noqa: F401 (threads: one is enough)

from pipeline import compare, config, files, tracking

WORK = {"recipe": "blog", "dataset": "cifar10", "weights": "pretrained", "precision": "fp32"}
COLUMNS = [
    "hardware",
    "label",
    "precision",
    "test accuracy",
    "images/s",
    "sustained",
    "s/epoch",
    "total s",
    "peak MiB",
    "taints",
    "run",
]


def run_of(run_id, accuracy=None, *, workload="w1", metrics=(), **tags):
    figures = dict(metrics) | ({} if accuracy is None else {"test/accuracy": accuracy})
    own = WORK | {"workload": workload, "hardware": "AMD EPYC"} | {key.replace("__", "."): v for key, v in tags.items()}
    return {"run_id": run_id * 8, "name": "a name", "tags": own, "metrics": figures, "params": {}}


def tables(text):
    """For each heading of the report, the rows of its table as lists of cells, without the head."""
    found = {}
    for line in text.splitlines():
        if line.startswith("## "):
            heading = line[3:]
            found[heading] = []
        elif line.startswith("| "):
            found[heading].append([cell.strip() for cell in line[1:-1].split("|")])
    assert all(rows[0] == COLUMNS for rows in found.values())
    return {heading: rows[1:] for heading, rows in found.items()}


def ids(rows):
    return [row[-1][0] for row in rows]


# --- the report


def test_no_run_is_said():
    assert compare.report([]) == "No finished runs yet.\n"


def test_a_row_shows_what_the_run_measured():
    metrics = {
        "speed/train_images_per_second": 20816.6, "speed/sustained_images_per_second": 19876.5,
        "time/train_seconds": 2.402, "time/total_seconds": 5.744, "memory/peak_mib": 2462.4,
    }  # fmt: skip
    text = compare.report([run_of("a", 0.33875, metrics=metrics, label="desk", hardware="NVIDIA H100", taints="load")])
    assert text.startswith("# Runs by work and hardware\n\n## ")
    assert tables(text) == {
        "blog on cifar10 (workload `w1`, pretrained weights)": [
            ["NVIDIA H100", "desk", "fp32", "33.88%", "20,817", "19,876", "2.40", "5.74", "2,462", "load", "aaaaaaaa"]
        ]
    }
    assert "DEMO" not in text


def test_what_is_not_known_is_empty():
    ((row,),) = tables(compare.report([run_of("a")])).values()
    assert row == ["AMD EPYC", "", "fp32", *[""] * 7, "aaaaaaaa"]


def test_a_speed_of_features_is_not_passed_off_as_one_of_training():
    metrics = {"speed/feature_images_per_second": 3094.4, "time/train_seconds": 0.0}
    ((row,),) = tables(compare.report([run_of("a", 0.0, metrics=metrics)])).values()
    assert row[3:7] == ["0.00%", "3,094 (features)", "", "0.00"]


def test_each_work_has_a_table_with_the_most_accurate_first():
    several = [
        run_of("a", 0.5), run_of("b", 0.9, workload="w2", recipe="finetune"), run_of("c"), run_of("d", 0.75),
        run_of("e", 0.0), run_of("f", 0.95, workload="w2", recipe="finetune"),
    ]  # fmt: skip
    found = tables(compare.report(several))
    assert [(heading.split(" on ")[0], ids(rows)) for heading, rows in found.items()] == [
        ("blog", ["d", "a", "e", "c"]),
        ("finetune", ["f", "b"]),
    ]


def test_runs_alike_keep_their_order_and_the_report_its_text():
    several = [run_of(name, 0.5) for name in "cab"]
    text = compare.report(several)
    ((_, rows),) = tables(text).items()
    assert ids(rows) == ["c", "a", "b"]  # as they came: newest first
    assert compare.report(several) == text


def test_a_demo_stands_apart():
    several = [
        run_of("a", 0.99, workload="w0", fallback="data weights"), run_of("b", 0.5), run_of("c", 0.1, fallback="device")
    ]  # fmt: skip
    text = compare.report(several)
    real, demo = text.split("# DEMO: not the real thing\n")
    assert [ids(rows) for rows in tables(real).values()] == [["b"]]
    assert {heading: ids(rows) for heading, rows in tables(demo).items()} == {
        "blog on cifar10 (workload `w0`, pretrained weights, fallback: data weights)": ["a"],
        "blog on cifar10 (workload `w1`, pretrained weights, fallback: device)": ["c"],
    }
    alone = compare.report(several[:1])
    assert alone.startswith("# DEMO") and "# Runs by work" not in alone


def test_no_text_of_a_user_breaks_the_table():
    ((row,),) = tables(compare.report([run_of("a", label="left | right\n| below", hardware="CPU  |x|")])).values()
    assert row[:2] == ["CPU /x/", "left / right / below"] and len(row) == len(COLUMNS)


def test_the_table_is_aligned():
    text = compare.report([run_of("a", 1.0, label="a long label"), run_of("b", 0.5)])
    lengths = {len(line) for line in text.splitlines() if line.startswith("|")}
    assert len(lengths) == 1


def test_a_training_in_two_experiments_is_one_run():
    text = compare.report([run_of("a", 0.5, record="r1"), run_of("b", 0.5, record="r1"), run_of("c", 0.5, record="r2")])
    ((_, rows),) = tables(text).items()
    assert len(rows) == 2 and rows[-1][-1] == "cccccccc"


# --- the stage


@pytest.fixture(autouse=True)
def report_file(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "REPORT", tmp_path / "reports" / "compare.md")
    return tmp_path / "reports" / "compare.md"


@pytest.fixture
def outputs(once, tmp_path, light):  # noqa: F811
    """What a training and the stages after it left, for the test to change."""
    return shutil.copytree(once.outputs, tmp_path / "outputs")


def test_a_cached_run_is_put_into_a_store_that_lacks_it_once(outputs, report_file, capsys):
    record = files.read_json(outputs / "train" / "record.json")
    text = compare.run(generated(), outputs)
    (run,) = runs()
    assert run.info.status == "FINISHED" and run.data.tags["record"] == record["id"] and "restored" in run.data.tags
    assert {"test/accuracy", "sustained/images_per_second"} <= set(run.data.metrics)
    ((row,),) = tables(text).values()
    assert row[COLUMNS.index("sustained")] == f"{run.data.metrics['speed/sustained_images_per_second']:,.0f}"
    assert row[0] == record["tags"]["hardware"] and row[-1] == run.info.run_id[:8]
    assert report_file.read_text(encoding="utf-8") == text
    said = capsys.readouterr().out
    assert text in said and "make ui" in said and "nothing was trained" in said
    assert tracking.link(run.info.experiment_id) in said

    assert compare.run(generated(), outputs) == text
    assert len(runs()) == 1 and "nothing was trained" not in capsys.readouterr().out


def test_the_same_run_goes_into_each_experiment_and_counts_once(outputs):
    compare.run(generated(), outputs)
    text = compare.run(generated("tracking.experiment=another"), outputs)
    assert len(runs()) == 2 and len({run.info.experiment_id for run in runs()}) == 2
    ((row,),) = tables(text).values()
    assert row[-1] in {run.info.run_id[:8] for run in runs()}


def test_a_run_that_was_deleted_does_not_come_back(outputs):
    compare.run(generated(), outputs)
    client().delete_run(runs()[0].info.run_id)
    assert compare.run(generated(), outputs) == "No finished runs yet.\n"
    assert len(runs()) == 1


@pytest.mark.parametrize(("stage", "metric"), [("evaluate", "test/accuracy"), ("sustain", "time/sustain_seconds")])
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
    assert compare.run(generated(), outputs).startswith("# DEMO")
    assert client().get_experiment(runs()[0].info.experiment_id).name == "trainmark-demo"


def test_nothing_trained_is_nothing_restored(tmp_path, report_file, capsys):
    assert compare.run(generated(), tmp_path / "outputs") == "No finished runs yet.\n"
    assert report_file.read_text() == "No finished runs yet.\n"
    assert runs() == [] and "/#/experiments/" not in capsys.readouterr().out


def test_it_does_without_torch():
    code = "import sys; from pipeline import compare; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=config.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
