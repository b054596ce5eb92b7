"""What MLflow's UI shows of the experiment: a run table and charts that compare machines, and their meaning.

MLflow 3 opens an experiment on a page about traces and agents, and its run table has no metric. A view saved
in an experiment tag mends that, with the links below. It has the form that the UI's own "Save view" writes
(3.17), so that it is in the "Views" menu above the table too.
"""

import json
from typing import Any

from pipeline.profiling import score_steps

KEY = "trainmark"
"""Names the view in its tag and in links; constant, so that an old link shows the view as it is now."""

_NAME = "Machines compared"
_SAVED = 1_767_225_600_000  # the UI wants milliseconds since 1970; fixed, so that the tag never changes

_NAME_COLUMN, _DATE_COLUMN = "attributes.`Run Name`", "runDateAndNestInfo"  # always there, and first
_CREATED = "attributes.start_time"  # the one order in which the UI puts the runs of repeats below their parent, folded

# With its side panels open the UI leaves 460 pixels beside name and date on a screen of 1600, with the assistant closed
# 865: the figures that matter come first. What no run has gets no column.
_SCORE = {step.name: score_steps.metric(step.name, "images_per_second") for step in score_steps.STEPS}
_BARS = (*_SCORE.values(), "time/total_seconds", "time/process_seconds", "test/accuracy", "memory/peak_mib")
_METRICS = (
    *_BARS,
    "speed/train_images_per_second",
    "speed/feature_images_per_second",
    "energy/images_per_joule",
)
_TAGS = ("repeats", "taints", "behavior", "fallback", "workload", "hardware", "label", "recipe", "precision")
_COLUMNS = (*(f"metrics.`{metric}`" for metric in _METRICS), *(f"tags.`{tag}`" for tag in _TAGS))
_WIDTHS = {_NAME_COLUMN: 330, _DATE_COLUMN: 135, "tags.`repeats`": 75, "tags.`hardware`": 165}  # of others: 100 pixels

_LINES = ("train/loss", "val/loss", "train/accuracy", "val/accuracy")
_TRADE = ("time/total_seconds", "test/accuracy")  # across, up

# The UI adds a chart of every other metric to the section named as all of the metric but its last part: kept, but
# folded. Those above repeats have a standard deviation, too.
_KINDS = ("best", "ceiling", "efficiency", "energy", "memory", "speed", "sustained", "test", "time", "train", "val")
_FOLDED = (*_KINDS, "System metrics", *(f"std/{kind}" for kind in _KINDS))

_NOTE = """\
**What is a machine worth for training?** {links}
Each run is one training on one machine. Its name says the hardware, the recipe and the precision. A run whose name \
ends with **× 5** stands for five trainings: it shows their medians, and the + beside it shows them one by one.

- **Compare two machines:** tick a run of each, then *Compare* shows settings and figures side by side. A click on a \
metric shows its curves. Only runs of one `workload` did the same work.
- **All machines at once:** *Report* above says who is faster and how sure that is, once runs were compared (it is in \
the run `comparison`). *Charts* shows bars and curves.
- **Search:** `tags.hardware = 'NVIDIA H200'`, `tags.recipe = 'finetune'`, `tags.workload = '...'`
- **Sort:** a click on a column's name sorts by it and unfolds all runs; a click on *Created* folds them again.

The view *{name}* in the menu *Views* brings these columns back. *Columns* offers more.

| Column | Meaning |
|---|---|
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
| `repeats` | how many trainings are planned in this set |
| `taints` | what disturbed the machine from outside: battery, load, swapping ... |
| `behavior` | what the machine itself did under the load: it throttled, got hot or drifted |
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
        "mlflow.note.content": _NOTE.format(links=" · ".join(links), name=_NAME, **_SCORE),
        f"mlflow.sharedViewState.{KEY}": _json(view),
    }


def run_table_link(base: str, experiment_id: str) -> str:
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
            {"uuid": "r", "name": "Results", "display": True, "columns": 2, "cardHeight": 300},
            {"uuid": "c", "name": "Curves by epoch", "display": True, "columns": 2, "cardHeight": 300},
            *({"uuid": str(number), "name": name, "display": False} for number, name in enumerate(_FOLDED)),
        ],
        "isAccordionReordered": True,  # else the UI sorts the sections by name
    }


def _charts() -> list[dict[str, Any]]:
    across, up = ({"key": key, "type": "METRIC"} for key in _TRADE)
    # The UI smooths a curve that doesn't say otherwise; "Global": by the settings behind the cog wheel.
    raw = {"xAxisKey": "step", "lineSmoothness": 0, "useGlobalXaxisKey": True, "useGlobalLineSmoothing": True}
    charts: list[dict[str, Any]] = [
        *({"type": "BAR", "metricSectionId": "r", "metricKey": metric} for metric in _BARS),
        {"type": "SCATTER", "metricSectionId": "r", "xaxis": across, "yaxis": up},
        *({"type": "LINE", "metricSectionId": "c", "metricKey": metric} | raw for metric in _LINES),
    ]
    return [chart | {"uuid": str(number)} for number, chart in enumerate(charts)]


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
