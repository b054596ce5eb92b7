"""What MLflow's UI shows of the experiment: a run table and charts that compare machines, and their meaning.

MLflow 3 opens an experiment on a page about traces and agents, and its run table has no metric. A view saved
in an experiment tag mends that, with the links below. It has the form that the UI's own "Save view" writes
(3.17), so that it is in the "Views" menu above the table too.
"""

import json
from typing import Any

KEY = "trainmark"
"""Names the view in its tag and in links; constant, so that an old link shows the view as it is now."""

_CHARTS = "&compareRunsMode=CHART"
_NAME = "Machines compared"
_SAVED = 1_767_225_600_000  # the UI wants milliseconds since 1970; fixed, so that the tag never changes

_NAME_COLUMN, _DATE_COLUMN = "attributes.`Run Name`", "runDateAndNestInfo"  # always there, and first

# In pixels. With its side panels open the UI leaves 865 of them on a screen of 1600: room for the run's name,
# which says hardware, recipe and precision, and for the four figures that matter.
_WIDTHS = {
    _NAME_COLUMN: 300,
    _DATE_COLUMN: 135,
    "metrics.`speed/train_images_per_second`": 110,
    "metrics.`speed/feature_images_per_second`": 110,
    "metrics.`speed/sustained_images_per_second`": 110,
    "metrics.`time/total_seconds`": 110,
    "metrics.`test/accuracy`": 100,
    "metrics.`best/val_accuracy`": 120,
    "metrics.`memory/peak_mib`": 120,
    "tags.`fallback`": 120,
    "tags.`taints`": 120,
    "tags.`limited_by`": 90,
    "tags.`workload`": 115,
    "tags.`label`": 90,
    "tags.`hardware`": 165,
    "tags.`recipe`": 95,
    "tags.`precision`": 75,
}

_BARS = (
    "speed/sustained_images_per_second",
    "test/accuracy",
    "time/total_seconds",
    "speed/train_images_per_second",
    "speed/feature_images_per_second",
    "memory/peak_mib",
)
_LINES = ("train/loss", "val/loss", "train/accuracy", "val/accuracy", "sustained/images_per_second")
_TRADE = ("time/total_seconds", "test/accuracy")  # across, up

# The UI adds a chart of every other metric to the section named as the metric's first part: kept, but folded.
_FOLDED = (
    "best",
    "ceiling",
    "efficiency",
    "energy",
    "memory",
    "speed",
    "sustained",
    "test",
    "time",
    "train",
    "val",
    "System metrics",
)

_NOTE = """\
**What is a machine worth for training?** {where}
Each run is one training, timed; its name says hardware, recipe and precision.

| Column | Meaning |
|---|---|
| `speed/train_images_per_second` | images trained on in a second, in the last epoch |
| `speed/feature_images_per_second` | instead, where a frozen network's features are computed once |
| `speed/sustained_images_per_second` | of `finetune`'s step, repeated for a minute: **machines are ranked by it** |
| `time/total_seconds` | copying to the device, training and validation; not decoding and setup |
| `test/accuracy` | share of the test images named right; the table is sorted by it |
| `best/val_accuracy` | the same on validation images, after the best epoch |
| `memory/peak_mib` | the most memory the training held on the device |
| `fallback` | what a stand-in replaced: **a run named DEMO is no measurement** |
| `taints` | what disturbed the machine meanwhile: battery, load, throttling ... |
| `limited_by` | what kept the training from being faster: `compute`, `data` or `launches` |
| `workload` | **only runs of one `workload` did the same work and can be compared** |
| `label` | the owner's name for the machine |

- Two machines side by side: tick their runs, then *Compare*.
- Bars and curves: the chart button left of the search field.
- Search: `tags.hardware = 'NVIDIA H100 80GB HBM3'`, `tags.recipe = 'finetune'`, `tags.workload = '...'`
"""


def experiment_tags(experiment_id: str | None = None) -> dict[str, str]:
    """The tags that give the experiment its kind, its description and its view; the same text every time.

    With its id, the description begins with links: the UI shows that line above the page about agents too.
    """
    where = f"In *Model training*, *Runs*, choose *Views* > *{_NAME}*."
    if experiment_id is not None:
        where = f"[Run table](#{_page(experiment_id)}) · [Charts](#{_page(experiment_id)}{_CHARTS})"
    view = {"name": _NAME, "createdAt": _SAVED, "updatedAt": _SAVED, "state": _json(_state())}
    return {
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.note.content": _NOTE.format(where=where),
        f"mlflow.sharedViewState.{KEY}": _json(view),
    }


def link(base: str, experiment_id: str) -> str:
    """Where the UI at `base` shows the run table, best test accuracy first."""
    return f"{base.rstrip('/')}/#{_page(experiment_id)}"


def run_link(base: str, experiment_id: str, run_id: str) -> str:
    """Where the UI at `base` shows one run."""
    return f"{base.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"


def charts_link(base: str, experiment_id: str) -> str:
    """Where the UI at `base` shows the charts of the same runs."""
    return f"{link(base, experiment_id)}{_CHARTS}"


def _page(experiment_id: str) -> str:
    # workflowType: without it the UI shows its menu for agents, whatever the experiment's kind.
    return f"/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={KEY}"


def _state() -> dict[str, Any]:
    return {
        "orderByKey": "metrics.`test/accuracy`",
        "orderByAsc": False,
        "selectedColumns": [column for column in _WIDTHS if column not in (_NAME_COLUMN, _DATE_COLUMN)],
        "columnOrder": list(_WIDTHS),
        "columnWidths": _WIDTHS,
        "runsHiddenMode": "FIRST_20_RUNS",  # what charts show; the UI's own choice is 10
        "compareRunCharts": _charts(),
        "compareRunSections": [
            {"uuid": "results", "name": "Results", "display": True, "columns": 2, "cardHeight": 300},
            {"uuid": "curves", "name": "Curves by epoch", "display": True, "columns": 2, "cardHeight": 300},
            *({"uuid": name, "name": name, "display": False} for name in _FOLDED),
        ],
        "isAccordionReordered": True,  # else the UI sorts the sections by name
    }


def _charts() -> list[dict[str, Any]]:
    across, up = ({"key": key, "type": "METRIC"} for key in _TRADE)
    trade = {"type": "SCATTER", "uuid": "trade", "metricSectionId": "results", "xaxis": across, "yaxis": up}
    bars = [_chart("BAR", "results", metric) for metric in _BARS]
    # The UI smooths a curve that doesn't say otherwise; "Global": by the settings behind the cog wheel.
    raw = {"xAxisKey": "step", "lineSmoothness": 0, "useGlobalXaxisKey": True, "useGlobalLineSmoothing": True}
    lines = [_chart("LINE", "curves", metric) | raw for metric in _LINES]
    return [*bars, trade, *lines]


def _chart(kind: str, section: str, metric: str) -> dict[str, Any]:
    return {"type": kind, "uuid": metric, "metricSectionId": section, "metricKey": metric}


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
