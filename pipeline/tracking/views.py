"""What MLflow's UI shows of the experiment: its description, a run table and charts that compare machines.

MLflow 3 opens an experiment on a page about traces and agents, and its run table has no metric. Views saved in
experiment tags, and links to them, fix that. The tags have the form that the UI's own "Save view" writes (3.17), so
that the views are also in the menu "Views" above the table.
"""

import json
from collections.abc import Mapping
from typing import Any

from pipeline.profiling import score_steps

TABLE, CHARTS = "trainmark", "trainmark-charts"
"""The views' names in tags and links. They are constant, so that an old link shows the view as it is now."""

_NAMES = {TABLE: "Machines compared", CHARTS: "Charts of one workload"}
_SAVED = 1_767_225_600_000  # the UI wants milliseconds since 1970; constant, so that the tag never changes

_NAME_COLUMN, _DATE_COLUMN = "attributes.`Run Name`", "runDateAndNestInfo"  # the UI always puts them first
_CREATED = "attributes.start_time"  # only in this order does the UI fold repeats below their parent run

# On a screen of 1600 pixels, with its side panels open, the UI has 850 pixels for columns: repeats, taints and the
# scores fit. A column that no run has a value for is not shown.
_SCORE = {step.name: score_steps.metric(step.name, "images_per_second") for step in score_steps.STEPS}
_BARS = (*_SCORE.values(), "time/total_seconds", "time/process_seconds", "test/accuracy", "memory/peak_mib")
_METRICS = (
    *_BARS,
    "speed/train_images_per_second",
    "speed/feature_images_per_second",
    "energy/images_per_joule",
)
_FIRST_TAGS = ("repeats", "taints")
_TAGS = ("behavior", "fallback", "workload", "hardware", "label", "recipe", "precision")
_COLUMNS = (
    *(f"tags.`{tag}`" for tag in _FIRST_TAGS),
    *(f"metrics.`{metric}`" for metric in _METRICS),
    *(f"tags.`{tag}`" for tag in _TAGS),
)
_WIDTHS = {_NAME_COLUMN: 270, _DATE_COLUMN: 120, "tags.`repeats`": 70, "tags.`taints`": 90, "tags.`hardware`": 165}
"""In pixels. Other columns have 100."""

_LINES = ("train/loss", "val/loss", "train/accuracy", "val/accuracy")
_SCATTER = ("time/total_seconds", "test/accuracy")  # x, y

# The UI adds a chart of every other metric to the section named by all of the metric but its last part. These sections
# are folded. Parent runs of repeats also have standard deviations.
_KINDS = ("best", "ceiling", "efficiency", "energy", "memory", "speed", "sustained", "test", "time", "train", "val")
_FOLDED = (*_KINDS, "System metrics", *(f"std/{kind}" for kind in _KINDS))

_NOTE = """\
**What is a machine worth for training?** {links}
Each run is one training on one machine. Its name says the hardware, the recipe and the precision. A run whose name \
ends with **× 5** stands for five trainings: it shows their medians, and the + beside it shows them one by one.

- **Compare two machines:** tick a run of each, then *Compare* shows settings and figures side by side. A click on a \
metric shows its curves. Only runs of one `workload` did the same work.
- **All machines at once:** *Report* above says who is faster and how sure that is, once runs were compared (it is in \
the run `comparison`). *Charts* shows bars and curves of the newest workload and \
precision.
- **Search:** `tags.hardware = 'NVIDIA H200'`, `tags.recipe = 'finetune'`, `tags.workload = '...'`
- **Sort:** a click on a column's name sorts by it and unfolds all runs; a click on *Created* folds them again.

The view *{name}* in the menu *Views* brings these columns back. *Columns* offers more.

| Column | Meaning |
|---|---|
| `repeats` | how many trainings are planned in this set |
| `taints` | what disturbed the machine from outside: battery, load, swapping ... |
| `{convnet_fp32}` | **the score**: images/s of a convolutional network at fp32, in the last third of a minute |
| `{convnet_best}` | the same at the best precision of the hardware: bf16, fp16 or fp32 |
| `{transformer_best}` | images/s of a vision transformer at that precision |
| `time/total_seconds` | copying to the device, training and validation; not decoding and setup |
| `time/process_seconds` | the whole process from its start to the training's result: imports, setup and compiling too |
| `test/accuracy` | share of the test images that were classified correctly |
| `memory/peak_mib` | the most memory that the training held on the device |
| `speed/train_images_per_second` | images trained on per second, in the last epoch |
| `speed/feature_images_per_second` | the same where the features of a frozen network are computed once |
| `energy/images_per_joule` | images trained on and validated per joule, where the machine measures energy |
| `behavior` | what the machine itself did under the load: it throttled, got hot or drifted |
| `fallback` | what a stand-in replaced: **a run named DEMO is no measurement** |
| `workload` | **only runs of one `workload` did the same work and can be compared** |
| `label` | the owner's name for the machine |
"""


def experiment_tags(experiment_id: str, report_id: str | None, newest_tags: Mapping[str, str]) -> dict[str, str]:
    """The tags that give the experiment its kind, its description and its views.

    The description begins with links, because the UI shows only the first line until it is unfolded. `report_id`: the
    run that holds the report, if any. `newest_tags`: the tags of the newest training, which choose the charts'
    workload and precision.
    """
    links = [f"[Run table](#{_page(experiment_id)})", f"[Charts](#{_charts_page(experiment_id)})"]
    if report_id is not None:
        links = [f"[Report](#{_run_page(experiment_id, report_id, '/artifacts/compare.html')})", *links]
    chosen = {key: newest_tags[key] for key in ("workload", "precision") if key in newest_tags}
    only = {"searchFilter": " and ".join(f"tags.{key} = '{value}'" for key, value in chosen.items())}
    return {
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.note.content": _NOTE.format(links=" · ".join(links), name=_NAMES[TABLE], **_SCORE),
        f"mlflow.sharedViewState.{TABLE}": _view(TABLE, _state()),
        f"mlflow.sharedViewState.{CHARTS}": _view(CHARTS, _state() | only),
    }


def run_table_link(base: str, experiment_id: str) -> str:
    """The run table in the UI at `base`, newest run first."""
    return f"{base.rstrip('/')}/#{_page(experiment_id)}"


def charts_link(base: str, experiment_id: str) -> str:
    """The charts in the UI at `base`, of one workload and precision."""
    return f"{base.rstrip('/')}/#{_charts_page(experiment_id)}"


def run_link(base: str, experiment_id: str, run_id: str) -> str:
    """One run in the UI at `base`."""
    return f"{base.rstrip('/')}/#{_run_page(experiment_id, run_id)}"


# workflowType: without it the UI shows its menu for agents, whatever the experiment's kind.
def _page(experiment_id: str, view: str = TABLE) -> str:
    return f"/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={view}"


def _charts_page(experiment_id: str) -> str:
    return f"{_page(experiment_id, CHARTS)}&compareRunsMode=CHART"


def _run_page(experiment_id: str, run_id: str, tab: str = "") -> str:
    return f"/experiments/{experiment_id}/runs/{run_id}{tab}?workflowType=machine_learning"


def _view(key: str, state: Mapping[str, Any]) -> str:
    return _json({"name": _NAMES[key], "createdAt": _SAVED, "updatedAt": _SAVED, "state": _json(state)})


def _state() -> dict[str, Any]:
    return {
        "orderByKey": _CREATED,
        "orderByAsc": False,
        "selectedColumns": _COLUMNS,
        "columnOrder": (_NAME_COLUMN, _DATE_COLUMN, *_COLUMNS),
        "columnWidths": _WIDTHS,
        "runsHiddenMode": "FIRST_20_RUNS",  # in charts; the UI's default is 10
        "compareRunCharts": _charts(),
        "compareRunSections": [
            {"uuid": "r", "name": "Results", "display": True, "columns": 2, "cardHeight": 300},
            {"uuid": "c", "name": "Curves by epoch", "display": True, "columns": 2, "cardHeight": 300},
            *({"uuid": str(number), "name": name, "display": False} for number, name in enumerate(_FOLDED)),
        ],
        "isAccordionReordered": True,  # else the UI sorts the sections by name
    }


def _charts() -> list[dict[str, Any]]:
    x_axis, y_axis = ({"key": key, "type": "METRIC"} for key in _SCATTER)
    # The UI smooths curves by default. "Global" means the settings behind the cog wheel.
    raw = {"xAxisKey": "step", "lineSmoothness": 0, "useGlobalXaxisKey": True, "useGlobalLineSmoothing": True}
    charts: list[dict[str, Any]] = [
        *({"type": "BAR", "metricSectionId": "r", "metricKey": metric} for metric in _BARS),
        {"type": "SCATTER", "metricSectionId": "r", "xaxis": x_axis, "yaxis": y_axis},
        *({"type": "LINE", "metricSectionId": "c", "metricKey": metric} | raw for metric in _LINES),
    ]
    return [chart | {"uuid": str(number)} for number, chart in enumerate(charts)]


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
