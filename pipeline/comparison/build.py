"""One machine against another: groups of runs become rows of tables, and tables what may be claimed of them.

The score ranks machines by sustained steps that are the same for all. The work of a recipe is compared in two kinds of
tables that are never mixed: every machine at the same settings, and each at its best. In each table all rows are
compared with one reference, by intervals that hold together (`stats.shared`); `claims` says what follows. A run that is
in no table is listed below, with its reason.

Everything here is plain values, of which `dataclasses.asdict` makes compare.json; nothing knows of MLflow or files.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache

from pipeline import config
from pipeline.comparison import groups
from pipeline.comparison.groups import Run, clean
from pipeline.comparison.rows import Context, is_machine
from pipeline.comparison.schema import Comparison, Part
from pipeline.comparison.score_table import as_measured, score_of
from pipeline.comparison.work_tables import COURSES, by_work, section_of
from pipeline.errors import UsageError, nearest

__all__ = ["COURSES", "Comparison", "compare", "listed"]


def compare(
    runs: Iterable[Run],
    courses: Callable[[str], Mapping[str, Sequence[float]]],
    link: Callable[[str, str], str],
    settings: config.Compare,
    prices: Mapping[str, config.Price] | None,
) -> Comparison:
    """`runs` come newest first. `courses` gives the COURSES of a run by its id, and is asked for those of table rows
    alone; `link`, from the ids of experiment and run, where its page is. Raises UsageError where no run is of the
    machine `settings.reference`, and for a card's price that does not say what machine the card sits in."""
    # One training may stand in several experiments of a store; it is one run all the same.
    read = list(runs)
    by_record: dict[str, Run] = {}
    for run in read:
        by_record.setdefault(run["tags"].get("record", run["run_id"]), run)
    once = list(by_record.values())
    _check_reference(once, settings.reference)
    _check_prices(once, prices or {})
    context = Context(cache(courses), link, settings, prices or {}, groups.names([*once, *map(as_measured, once)]))
    parts = []
    for demo in (False, True):
        chosen = [run for run in once if ("fallback" in run["tags"]) == demo]
        if chosen:
            sections = [section_of(context, *same) for same in by_work(chosen)]
            parts.append(Part(demo, score_of(context, chosen), sections))
    began = [run["started"] for run in once if run["started"]]
    hardware = {run["tags"].get("hardware") for run in once}
    return Comparison(
        runs=len(once),
        copies=len(read) - len(once),
        machines=len({groups.entity_of(run).machine for run in once}),
        first=min(began, default=None),
        last=max(began, default=None),
        rules=settings,
        parts=parts,
        prices=prices,
        unused_prices=[name for name in prices or () if name not in hardware],
        advice=_advice(once, parts),
    )


def listed(comparison: Comparison) -> set[str]:
    """The ids of all runs that the report shows in a table of work or lists below one."""
    sections = [section for part in comparison.parts for section in part.sections]
    heads = [row.head for section in sections for table in section.tables for row in table.rows]
    others = [other for section in sections for other in section.others]
    runs = [run for head in heads for run in (*head.runs, *head.left_out)]
    return {run["id"] for run in [*runs, *(run for other in others for run in other.runs)]}


def _check_reference(runs: Sequence[Run], reference: str | None) -> None:
    if reference is None or not runs or any(is_machine(run, reference) for run in runs):
        return
    known = sorted({clean(run["tags"][tag]) for run in runs for tag in ("hardware", "label") if run["tags"].get(tag)})
    close = nearest(reference, known)
    raise UsageError(
        f'compare.reference: no run in this store is of "{clean(reference)}": expected null | a fingerprint | '
        + " | ".join(known[:10])
        + (" | ..." if len(known) > 10 else "")
        + (f"; did you mean {close}?" if close else "")
    )


def _check_prices(runs: Sequence[Run], prices: Mapping[str, config.Price]) -> None:
    """Refuses the price of a card alone: a card needs a machine around it."""
    for run in runs:
        tags = run["tags"]
        price = prices.get(tags.get("hardware", ""))
        if price and price.buy and not price.machine and tags.get("backend") in ("cuda", "rocm", "xpu"):
            raise UsageError(
                f"prices: {clean(tags['hardware'])}.machine: missing: expected the machine that the card sits in, "
                "which buy includes"
            )


def _advice(runs: Sequence[Run], parts: Sequence[Part]) -> str:
    """What to do next where no two machines can be compared; '' where they can."""
    if not runs:
        return "No finished runs yet: `dvc repro` (or `make run`) makes the first one."
    real = [part for part in parts if not part.demo]
    tables = [table.rows for part in real for section in part.sections for table in section.tables]
    heads = [[row.head.name for row in rows] for rows in tables]
    heads += [[row.head.name for row in part.score.rows] for part in real if part.score]
    if any(len(set(names)) > 1 for names in heads):
        return ""
    machines = {groups.entity_of(run)[:2] for run in runs if "fallback" not in run["tags"]}
    if not machines:
        return (
            "Nothing to compare: every run is a DEMO, with a stand-in for data, weights or GPU. Put right what its "
            "warning says, and run it again."
        )
    if len(machines) == 1:
        return (
            "One machine so far. Run the same on another, with MLFLOW_TRACKING_URI naming this store, or bring its "
            "runs here: `python -m pipeline.bundle export` there, `import` here. The two will then be compared."
        )
    return (
        f"{len(machines)} machines, but no two did the same work with the same version of this code: run one recipe on "
        "the same data with the same settings on both, such as `python -m pipeline.run -S recipe=linear-probe`."
    )
