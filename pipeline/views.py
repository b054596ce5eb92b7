"""What MLflow's UI shows of the experiment: a run table and charts that compare machines, and their meaning.

MLflow 3 opens an experiment on a page about traces and agents, and its run table has no metric. A view saved
in an experiment tag mends that, with the links below. It has the form that the UI's own "Save view" writes
(3.17), so that it is in the "Views" menu above the table too.
"""

import json
from typing import Any

KEY = "trainmark"
"""Names the view in its tag and in links; constant, so that an old link shows the view as it is now."""

_NAME = "Machines compared"
_SAVED = 1_767_225_600_000  # the UI wants milliseconds since 1970; fixed, so that the tag never changes

_NAME_COLUMN, _DATE_COLUMN = "attributes.`Run Name`", "runDateAndNestInfo"  # always there, and first
_CREATED = "attributes.start_time"  # the one order in which the UI puts the runs of repeats below their parent, folded

# With its side panels open the UI leaves 460 pixels beside name and date on a screen of 1600, with the assistant closed
# 865: the figures that matter come first. What no run has gets no column.
_COLUMNS = (
    "metrics.`speed/sustained_images_per_second`",
    "metrics.`time/total_seconds`",
    "metrics.`test/accuracy`",
    "metrics.`memory/peak_mib`",
    "metrics.`speed/train_images_per_second`",
    "metrics.`speed/feature_images_per_second`",
    "metrics.`energy/images_per_joule`",
    "tags.`repeats`",
    "tags.`taints`",
    "tags.`limited_by`",
    "tags.`fallback`",
    "tags.`workload`",
    "tags.`hardware`",
    "tags.`label`",
    "tags.`recipe`",
    "tags.`precision`",
)
_WIDTHS = {_NAME_COLUMN: 330, _DATE_COLUMN: 135, "tags.`repeats`": 75, "tags.`hardware`": 165}  # of others: 100 pixels

_BARS = (
    "speed/sustained_images_per_second",
    "time/total_seconds",
    "test/accuracy",
    "memory/peak_mib",
    "speed/train_images_per_second",
    "speed/feature_images_per_second",
    "energy/images_per_joule",
)
_LINES = ("train/loss", "val/loss", "train/accuracy", "val/accuracy", "sustained/images_per_second")
_TRADE = ("time/total_seconds", "test/accuracy")  # across, up

# The UI adds a chart of every other metric to the section named as all of the metric but its last part: kept, but
# folded. Those of repeats have a standard deviation, too, but for the machine's ceilings.
_SPREAD = ("best", "efficiency", "energy", "memory", "speed", "sustained", "test", "time", "train", "val")
_FOLDED = ("ceiling", *_SPREAD, "System metrics", *(f"std/{kind}" for kind in _SPREAD))

_NOTE = """\
**What is a machine worth for training?** {links}
Each run is one training, timed; its name says hardware, recipe and precision. With **× 5** at its end it stands for \
five trainings, which the + beside it unfolds: their medians.

- **Compare two machines:** tick a run of each, then *Compare*: settings and figures side by side. A click on a metric \
shows its curves. Only runs of one `workload` did the same work.
- **All machines at once:** *Report* above, where runs were compared (it is in the run `comparison`): who is faster, \
and how sure that is. *Charts*: bars and curves.
- **Search:** `tags.hardware = 'NVIDIA H200'`, `tags.recipe = 'finetune'`, `tags.workload = '...'`
- **Best first:** click a column's name, which unfolds all; a click on *Created* folds them again.

These columns belong on show; *Columns* has more, and the menu *Views* has *{name}* to go back:

| Column | Meaning |
|---|---|
| `speed/sustained_images_per_second` | of `finetune`'s step, repeated for a minute: **machines are ranked by it** |
| `time/total_seconds` | copying to the device, training and validation; not decoding and setup |
| `test/accuracy` | share of the test images named right |
| `memory/peak_mib` | the most memory the training held on the device |
| `speed/train_images_per_second` | images trained on in a second, in the last epoch |
| `speed/feature_images_per_second` | instead, where a frozen network's features are computed once |
| `energy/images_per_joule` | images trained on and validated for a joule, where the machine tells |
| `repeats` | how many trainings stand behind the figures |
| `taints` | what disturbed the machine meanwhile: battery, load, throttling ... |
| `limited_by` | what kept the training from being faster: `compute`, `data` or `launches` |
| `fallback` | what a stand-in replaced: **a run named DEMO is no measurement** |
| `workload` | **only runs of one `workload` did the same work and can be compared** |
| `label` | the owner's name for the machine |
"""


def experiment_tags(experiment_id: str, comparison: str | None = None) -> dict[str, str]:
    """The tags that give the experiment its kind, its description and its view; the same text every time.

    The description begins with links: the UI shows that line alone until it is unfolded, and above the page about
    agents too. `comparison`: the id of the run that holds the report, where there is one.
    """
    links = [f"[Run table](#{_page(experiment_id)})", f"[Charts](#{_page(experiment_id)}&compareRunsMode=CHART)"]
    if comparison is not None:
        links = [f"[Report](#{_run_page(experiment_id, comparison, '/artifacts/compare.html')})", *links]
    view = {"name": _NAME, "createdAt": _SAVED, "updatedAt": _SAVED, "state": _json(_state())}
    return {
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.note.content": _NOTE.format(links=" · ".join(links), name=_NAME),
        f"mlflow.sharedViewState.{KEY}": _json(view),
    }


def link(base: str, experiment_id: str) -> str:
    """Where the UI at `base` shows the run table, newest first."""
    return f"{base.rstrip('/')}/#{_page(experiment_id)}"


def run_link(base: str, experiment_id: str, run_id: str) -> str:
    """Where the UI at `base` shows one run."""
    return f"{base.rstrip('/')}/#{_run_page(experiment_id, run_id)}"


# workflowType: without it the UI shows its menu for agents, whatever the experiment's kind.
def _page(experiment_id: str) -> str:
    return f"/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={KEY}"


def _run_page(experiment_id: str, run_id: str, tab: str = "") -> str:
    return f"/experiments/{experiment_id}/runs/{run_id}{tab}?workflowType=machine_learning"


def _state() -> dict[str, Any]:
    return {
        "orderByKey": _CREATED,
        "orderByAsc": False,
        "selectedColumns": _COLUMNS,
        "columnOrder": (_NAME_COLUMN, _DATE_COLUMN, *_COLUMNS),
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
    # The UI smooths a curve that doesn't say otherwise; "Global": by the settings behind the cog wheel.
    raw = {"xAxisKey": "step", "lineSmoothness": 0, "useGlobalXaxisKey": True, "useGlobalLineSmoothing": True}
    charts: list[dict[str, Any]] = [
        *({"type": "BAR", "metricSectionId": "results", "metricKey": metric} for metric in _BARS),
        {"type": "SCATTER", "metricSectionId": "results", "xaxis": across, "yaxis": up},
        *({"type": "LINE", "metricSectionId": "curves", "metricKey": metric} | raw for metric in _LINES),
    ]
    return [chart | {"uuid": str(number)} for number, chart in enumerate(charts)]


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
