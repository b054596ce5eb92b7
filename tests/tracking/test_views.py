import json
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from pipeline.profiling import score_steps
from pipeline.tracking import views

SCORE = [score_steps.metric(step.name, "images_per_second") for step in score_steps.STEPS]

VIEW = "mlflow.sharedViewState.trainmark"
LOGGED = {  # the metrics of a run, besides system/*
    "best/epoch",
    "best/val_accuracy",
    "ceiling/matmul_tflops",
    "ceiling/memory_gb_per_second",
    "ceiling/synthetic_images_per_second",
    "efficiency/model_flops_utilisation",
    "efficiency/vs_synthetic",
    "energy/idle_watts",
    "energy/images_per_joule",
    "energy/joules",
    "memory/current_mib",
    "memory/driver_mib",
    "memory/largest_batch_size",
    "memory/peak_mib",
    "memory/peak_reserved_mib",
    "memory/peak_share",
    "speed/feature_images_per_second",
    "speed/test_images_per_second",
    "speed/train_images_per_second",
    *(
        score_steps.metric(step.name, figure)
        for step in score_steps.STEPS
        for figure in (
            "batch_size",
            "course",
            "first_third_images_per_second",
            "images_per_joule",
            "images_per_second",
            "seconds",
            "watts",
        )
    ),
    "test/accuracy",
    "test/loss",
    "time/ceilings_seconds",
    "time/checkpoint_seconds",
    "time/data_seconds",
    "time/inspect_seconds",
    "time/logging_seconds",
    "time/process_seconds",
    "time/setup_seconds",
    "time/startup_seconds",
    "time/step_p50_seconds",
    "time/step_p90_seconds",
    "time/step_p99_seconds",
    "time/to_target_seconds",
    "time/total_seconds",
    "time/train_seconds",
    "time/unaccounted_seconds",
    "time/val_seconds",
    "train/accuracy",
    "train/loss",
    "train/lr",
    "train/lr_applied",
    "val/accuracy",
    "val/loss",
}


@pytest.fixture
def state():
    return json.loads(json.loads(views.experiment_tags("7")[VIEW])["state"])


def metrics_drawn(chart):
    axes = [chart[axis]["key"] for axis in ("xaxis", "yaxis") if axis in chart]
    return axes or [chart["metricKey"]]


def test_the_ui_accepts_the_view_as_one_of_its_own_saved_views():
    view = json.loads(views.experiment_tags("7")[VIEW])
    # The three conditions of the UI; a view that fails one isn't in its menu.
    assert isinstance(view["name"], str)
    assert isinstance(view["createdAt"], int)
    assert isinstance(view["state"], str)


def test_the_installed_ui_knows_every_word_of_the_tags_and_links(state):
    words = {VIEW.removesuffix("trainmark"), "custom_model_development", "mlflow.note.content"}
    words |= {"workflowType", "machine_learning", "viewStateShareKey", "compareRunsMode", "FIRST_20_RUNS"}
    words |= {*state} | {key for part in state["compareRunSections"] for key in part}
    words |= {key for chart in state["compareRunCharts"] for key in chart}
    words |= {chart["type"] for chart in state["compareRunCharts"]}
    words |= {"runDateAndNestInfo", "Run Name", "System metrics"}
    for script in (Path(mlflow.__file__).parent / "server/js/build/static/js").glob("*.js"):
        text = script.read_text(encoding="utf-8")
        words = {word for word in words if word not in text}
    assert not words


def test_every_name_in_the_view_is_one_that_other_code_logs(state):
    kinds = [column.split(".", 1) for column in state["selectedColumns"]]
    tags = {name.strip("`") for kind, name in kinds if kind == "tags"}
    metrics = {name.strip("`") for kind, name in kinds if kind == "metrics"}
    metrics |= {metric for chart in state["compareRunCharts"] for metric in metrics_drawn(chart)}
    assert {kind for kind, _ in kinds} == {"tags", "metrics"}
    assert metrics <= LOGGED
    others = [path for path in Path(views.__file__).parents[1].rglob("*.py") if path.name != "views.py"]
    source = "\n".join(path.read_text(encoding="utf-8") for path in others)
    assert [name for name in sorted((tags | metrics) - {*SCORE}) if f'"{name}"' not in source] == []


def test_the_table_opens_on_what_makes_machines_comparable(state):
    shown = [column.split(".", 1)[1].strip("`") for column in state["selectedColumns"]]
    assert shown[:7] == [
        *SCORE, "time/total_seconds", "time/process_seconds", "test/accuracy", "memory/peak_mib"
    ]  # fmt: skip
    assert {"speed/train_images_per_second", "speed/feature_images_per_second"} < {*shown}
    assert {"energy/images_per_joule", "repeats", "taints", "behavior", "fallback"} < {*shown}
    assert {"hardware", "recipe", "precision", "workload", "label"} < {*shown}
    assert state["columnOrder"][-len(shown) :] == state["selectedColumns"]
    assert set(state["columnWidths"]) < set(state["columnOrder"])


def test_the_table_is_in_the_one_order_in_which_the_ui_folds_repeats(state):
    assert (state["orderByKey"], state["orderByAsc"]) == ("attributes.start_time", False)
    assert "runsExpanded" not in state


def test_every_chart_has_its_place_and_other_metrics_are_folded(state):
    charts, sections = state["compareRunCharts"], state["compareRunSections"]
    assert len({chart["uuid"] for chart in charts}) == len(charts)
    assert {chart["metricSectionId"] for chart in charts} == {s["uuid"] for s in sections if s["display"]}
    folded = {section["name"] for section in sections if not section["display"]}
    kinds = {metric.split("/")[0] for metric in LOGGED}
    assert folded == kinds | {"System metrics"} | {f"std/{kind}" for kind in kinds}  # std: of repeats
    lines = {chart["metricKey"] for chart in charts if chart["type"] == "LINE"}
    assert lines == {"train/loss", "val/loss", "train/accuracy", "val/accuracy"}
    assert all(chart["lineSmoothness"] == 0 for chart in charts if chart["type"] == "LINE")


def test_links():
    table = "http://h:5000/#/experiments/7/runs?workflowType=machine_learning&viewStateShareKey=trainmark"
    assert views.run_table_link("http://h:5000", "7") == views.run_table_link("http://h:5000/", "7") == table
    run = "http://h:5000/#/experiments/7/runs/abc?workflowType=machine_learning"
    assert views.run_link("http://h:5000", "7", "abc") == views.run_link("http://h:5000/", "7", "abc") == run


def test_the_description_begins_with_links_that_work_under_any_address():
    table = views.run_table_link("", "7").removeprefix("/")
    links = f"[Run table]({table}) · [Charts]({table}&compareRunsMode=CHART)"
    first = "**What is a machine worth for training?** "  # a line that is all the UI shows at first
    assert note().splitlines()[0] == first + links
    report = "#/experiments/7/runs/abc/artifacts/compare.html?workflowType=machine_learning"
    assert note("abc").splitlines()[0] == f"{first}[Report]({report}) · {links}"


def test_the_description_explains_every_column_but_those_in_the_name(state):
    shown = [column.split(".", 1)[1].strip("`") for column in state["selectedColumns"]]
    explained = [line.split("`")[1] for line in note().splitlines() if line.startswith("| `")]
    assert explained == [name for name in shown if name not in ("hardware", "recipe", "precision")]


def note(*comparison):
    return views.experiment_tags("7", *comparison)["mlflow.note.content"]


@pytest.mark.filterwarnings("ignore")  # SQLAlchemy's, about MLflow's own code
def test_a_store_keeps_the_tags_and_has_nothing_to_change_the_next_time(tmp_path):
    client = MlflowClient(f"sqlite:///{(tmp_path / 'mlflow.db').as_posix()}")
    experiment = client.create_experiment("trainmark", tmp_path.as_uri())
    for key, value in views.experiment_tags(experiment).items():
        client.set_experiment_tag(experiment, key, value)
    kept = client.get_experiment(experiment).tags
    assert {key: kept[key] for key in views.experiment_tags(experiment)} == views.experiment_tags(experiment)


def test_tags_fit_older_servers_too():
    assert max(map(len, views.experiment_tags("9" * 19, "f" * 32).values())) <= 5000  # 20000 since MLflow 3
