"""What MLflow's UI is told to show of an experiment."""

import json
import re
from pathlib import Path

import mlflow
import pytest

from pipeline import config
from pipeline.profiling import score_steps
from pipeline.tracking import views

NEWEST = {"workload": "0123456789ab", "precision": "bf16", "recipe": "blog"}
SCORE = [score_steps.metric(step.name, "images_per_second") for step in score_steps.STEPS]


def tags(report_id=None):
    return views.experiment_tags("7", report_id, NEWEST)


def state_of(key):
    view = json.loads(tags()[f"mlflow.sharedViewState.{key}"])
    assert [type(view[field]) for field in ("name", "createdAt", "state")] == [str, int, str]  # else the UI ignores it
    return json.loads(view["state"])


@pytest.fixture
def state():
    return state_of("trainmark")


def shown(state):
    return [column.split(".", 1)[1].strip("`") for column in state["selectedColumns"]]


def metrics_drawn(chart):
    return [chart[axis]["key"] for axis in ("xaxis", "yaxis") if axis in chart] or [chart["metricKey"]]


def test_the_installed_ui_knows_every_word_of_the_tags_and_links(state):
    words = {"mlflow.sharedViewState.", "custom_model_development", "mlflow.note.content", "searchFilter"}
    words |= {"workflowType", "machine_learning", "viewStateShareKey", "compareRunsMode", "FIRST_20_RUNS"}
    words |= {*state} | {key for part in state["compareRunSections"] for key in part}
    words |= {key for chart in state["compareRunCharts"] for key in chart}
    words |= {chart["type"] for chart in state["compareRunCharts"]}
    words |= {"runDateAndNestInfo", "Run Name", "System metrics"}
    for script in (Path(mlflow.__file__).parent / "server/js/build/static/js").glob("*.js"):
        text = script.read_text(encoding="utf-8")
        words = {word for word in words if word not in text}
    assert not words


def test_every_name_in_the_views_is_logged_somewhere(state):
    names = {*shown(state), *(metric for chart in state["compareRunCharts"] for metric in metrics_drawn(chart))}
    others = [path for path in (config.ROOT / "pipeline").rglob("*.py") if path.name != "views.py"]
    source = "\n".join(path.read_text(encoding="utf-8") for path in others)
    figures = {f"{split}/{name}" for split in ("train", "val") for name in ("loss", "accuracy")}  # named by the loop
    assert [name for name in sorted(names - {*SCORE} - figures) if f'"{name}"' not in source] == []


def test_repeats_taints_and_scores_fit_into_a_window_of_1600_pixels(state):
    """The UI has 850 pixels for columns beside its two panels."""
    order = state["columnOrder"]
    wanted = ["tags.`repeats`", "tags.`taints`", *(f"metrics.`{metric}`" for metric in SCORE)]
    assert order[2 : 2 + len(wanted)] == wanted
    assert sum(state["columnWidths"].get(column, 100) for column in order[: 2 + len(wanted)]) <= 850
    assert order[2:] == state["selectedColumns"] and set(state["columnWidths"]) < set(order)


def test_the_table_is_in_the_one_order_in_which_the_ui_folds_repeats(state):
    assert (state["orderByKey"], state["orderByAsc"]) == ("attributes.start_time", False)


def test_every_chart_has_its_place_and_other_metrics_are_folded(state):
    charts, sections = state["compareRunCharts"], state["compareRunSections"]
    assert len({chart["uuid"] for chart in charts}) == len(charts)
    assert {chart["metricSectionId"] for chart in charts} == {s["uuid"] for s in sections if s["display"]}
    folded = {section["name"] for section in sections if not section["display"]}
    text = (config.ROOT / "docs" / "figures.md").read_text(encoding="utf-8")
    kinds = {name.split("/")[0] for name in re.findall(r"`([a-z]+/[a-z_0-9]+)`", text)} - {"std", "system"}
    assert kinds | {"System metrics"} | {f"std/{kind}" for kind in kinds} <= folded
    lines = [chart for chart in charts if chart["type"] == "LINE"]
    assert {chart["metricKey"] for chart in lines} == {"train/loss", "val/loss", "train/accuracy", "val/accuracy"}
    assert all(chart["lineSmoothness"] == 0 for chart in lines)


def test_the_charts_are_of_the_newest_workload_and_precision(state):
    charts = state_of("trainmark-charts")
    assert charts == state | {"searchFilter": "tags.workload = '0123456789ab' and tags.precision = 'bf16'"}


@pytest.mark.parametrize("base", ["http://h:5000", "http://h:5000/"])
def test_links(base):
    page = "http://h:5000/#/experiments/7/runs?workflowType=machine_learning&viewStateShareKey=trainmark"
    assert views.run_table_link(base, "7") == page
    assert views.charts_link(base, "7") == f"{page}-charts&compareRunsMode=CHART"
    run = "http://h:5000/#/experiments/7/runs/abc?workflowType=machine_learning"
    assert views.run_link(base, "7", "abc") == run


def test_the_description_begins_with_links_and_explains_the_columns(state):
    """The UI shows only the first line until the description is unfolded."""
    lines = tags("abc")["mlflow.note.content"].splitlines()
    pages = re.findall(r"\]\((#[^)]*)\)", lines[0])
    assert pages == [
        "#/experiments/7/runs/abc/artifacts/compare.html?workflowType=machine_learning",
        *(link("", "7").removeprefix("/") for link in (views.run_table_link, views.charts_link)),
    ]
    assert re.findall(r"\]\((#[^)]*)\)", tags()["mlflow.note.content"].splitlines()[0]) == pages[1:]
    explained = [line.split("`")[1] for line in lines if line.startswith("| `")]
    assert explained == [name for name in shown(state) if name not in ("hardware", "recipe", "precision")]
