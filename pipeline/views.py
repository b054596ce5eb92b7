"""What MLflow's UI shows of the experiment: a run table and charts that compare machines, and a text that says how.

MLflow 3 opens an experiment on a page about traces and agents, and its run table has no metric. A view saved in an
experiment tag mends that, with the links below. It has the form that the UI's own "Save view" writes (3.17), so
that it is in the "Views" menu above the table too.
"""

import json
from typing import Any

KEY = "trainmark"
"""Names the view in its tag and in links; constant, so that an old link shows the view as it is now."""

_NAME = "Machines compared"
_SAVED = 1_767_225_600_000  # the UI wants a date (milliseconds since 1970); fixed, for tags are compared as text

_NAME_COLUMN, _DATE_COLUMN = "attributes.`Run Name`", "runDateAndNestInfo"  # always there, and first

# In pixels. The UI's side panels leave some 850 for the columns at first, on a wide screen: the run's name, which
# says hardware, recipe and precision, and the four figures that matter fit in there.
_WIDTHS = {
    _NAME_COLUMN: 310,
    _DATE_COLUMN: 125,
    "metrics.`speed/train_images_per_second`": 110,
    "metrics.`speed/feature_images_per_second`": 110,
    "metrics.`time/total_seconds`": 110,
    "metrics.`test/accuracy`": 100,
    "tags.`fallback`": 120,
    "metrics.`best/val_accuracy`": 120,
    "metrics.`memory/peak_mib`": 120,
    "tags.`hardware`": 165,
    "tags.`recipe`": 95,
    "tags.`precision`": 75,
    "tags.`label`": 90,
    "tags.`workload`": 115,
}

_BARS = {
    "test/accuracy": "Test accuracy",
    "time/total_seconds": "Seconds in all",
    "speed/train_images_per_second": "Training images/s, last epoch",
    "speed/feature_images_per_second": "Feature images/s",
    "memory/peak_mib": "Peak memory, MiB",
}
_LINES = {
    "train/loss": "Training loss",
    "val/loss": "Validation loss",
    "train/accuracy": "Training accuracy",
    "val/accuracy": "Validation accuracy",
}
_TRADE = ("time/total_seconds", "test/accuracy")  # across, up

# The UI adds a chart of every other metric to the section named as the metric's first part: kept, but folded.
_FOLDED = ("best", "memory", "speed", "test", "time", "train", "val", "System metrics")

_NOTE = f"""\
**What is a machine worth for training?** Each run is one training, timed; its name says hardware, recipe, precision.
In *Model training* (top left) open *Runs*, and there *Views* > *{_NAME}*.

| Column | Meaning |
|---|---|
| `speed/train_images_per_second` | images trained on in a second, last epoch |
| `speed/feature_images_per_second` | images a second through a frozen network whose features are computed once |
| `time/total_seconds` | the whole training: data, setup, epochs |
| `test/accuracy` | share of the test images named right; the table is sorted by it |
| `best/val_accuracy` | the best epoch's, on validation images |
| `memory/peak_mib` | the most memory the training held on the device |
| `fallback` | what was replaced by a stand-in; **a run named DEMO is no measurement** |
| `label` | your own name for the machine |
| `workload` | **only runs of the same `workload` did the same work and can be compared** |

- Side by side: tick the runs, then *Compare*. Curves and bars: the chart button left of the search field.
- Search: ``tags.hardware = 'NVIDIA H100 80GB HBM3'``, ``tags.workload = '...'``, ``tags.recipe = 'finetune'``
"""


def experiment_tags() -> dict[str, str]:
    """The tags that give the experiment its kind, its description and its view; the same text every time."""
    view = {"name": _NAME, "createdAt": _SAVED, "updatedAt": _SAVED, "state": _json(_state())}
    return {
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.note.content": _NOTE,
        f"mlflow.sharedViewState.{KEY}": _json(view),
    }


def link(base: str, experiment_id: str) -> str:
    """Where the UI at `base` shows the run table, best test accuracy first."""
    # workflowType: else the UI shows its menu for agents, whatever the experiment's kind.
    query = f"workflowType=machine_learning&viewStateShareKey={KEY}"
    return f"{base.rstrip('/')}/#/experiments/{experiment_id}/runs?{query}"


def charts_link(base: str, experiment_id: str) -> str:
    """Where the UI at `base` shows the charts of the same runs."""
    return f"{link(base, experiment_id)}&compareRunsMode=CHART"


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
    bars = [_chart("BAR", "results", *bar) for bar in _BARS.items()]
    lines = [_chart("LINE", "curves", *line) | {"xAxisKey": "step"} for line in _LINES.items()]
    return [*bars, trade, *lines]


def _chart(kind: str, section: str, metric: str, title: str) -> dict[str, Any]:
    return {"type": kind, "uuid": metric, "metricSectionId": section, "metricKey": metric, "displayName": title}


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
