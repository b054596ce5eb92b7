"""Compare machines: runs become groups, groups the rows of tables, and tables what may be claimed.

The score ranks machines by sustained steps that are the same for all. The work of a recipe is compared in two kinds of
tables: every machine at the same settings, and each at its best. In each table all rows are compared with one
reference, by intervals that hold together (`stats.bonferroni`). A run that is in no table is listed with its reason.

All of it is plain values, of which `report.as_json` makes compare.json.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from pipeline import config
from pipeline.comparison.context import Context
from pipeline.comparison.groups import display_names
from pipeline.comparison.runs import Run, clean
from pipeline.comparison.schema import Comparison, Part
from pipeline.comparison.score_table import make_score
from pipeline.comparison.work_rows import COURSES
from pipeline.comparison.work_tables import group_by_work, make_section
from pipeline.errors import UsageError, nearest

__all__ = ["COURSES", "Comparison", "compare"]


def compare(
    runs: Iterable[Mapping[str, Any]],
    courses: Callable[[str], Mapping[str, Sequence[float]]],
    link: Callable[[str, str], str],
    settings: config.Compare,
    prices: Mapping[str, config.Price] | None,
) -> Comparison:
    """Compare `runs`, each with the fields of Run, newest first. `courses` gives the COURSES of a run by its id, and is
    asked only for runs in tables; `link` gives the address of a run's page from the ids of experiment and run.

    Raises UsageError if `settings.reference` is no machine of these runs, and for the price of a card without its
    machine.
    """
    all_runs = [Run(**fields) for fields in runs]
    by_record: dict[str, Run] = {}  # a training that stands in several experiments is one run
    for run in all_runs:
        by_record.setdefault(run.tags.get("record", run.run_id), run)
    unique = list(by_record.values())
    settings = replace(settings, reference=_find_reference(unique, settings.reference))
    _check_prices(unique, prices or {})
    context = Context(cache(courses), link, settings, prices or {}, display_names(unique))
    parts = []
    for demo in (False, True):
        chosen = [run for run in unique if ("fallback" in run.tags) == demo]
        if chosen:
            sections = [make_section(context, *same_work) for same_work in group_by_work(chosen)]
            parts.append(Part(demo, make_score(context, chosen), sections))
    starts = [run.started for run in unique if run.started]
    hardware = {run.tags.get("hardware") for run in unique}
    return Comparison(
        runs=len(unique),
        copies=len(all_runs) - len(unique),
        machines=len({run.entity().machine for run in unique}),
        first=min(starts, default=None),
        last=max(starts, default=None),
        rules=settings,
        parts=parts,
        prices=prices,
        unused_prices=[name for name in prices or () if name not in hardware],
        advice=_advice(unique, parts),
    )


def _find_reference(runs: Sequence[Run], reference: str | None) -> str | None:
    """The fingerprint, label or hardware that `reference` names, in full or by a part that only one machine has."""
    if reference is None or not runs or any(run.ran_on(reference) for run in runs):
        return reference
    fingerprints = {run.tags.get("machine", "") for run in runs}
    known = sorted({run.tags[tag] for run in runs for tag in ("hardware", "label") if run.tags.get(tag)})
    part = reference.casefold()
    matches = [name for name in known if part in name.casefold()]
    matches += [fingerprint for fingerprint in sorted(fingerprints) if fingerprint.startswith(part)]
    if len(matches) == 1:
        return str(matches[0])
    close = nearest(reference, known)
    fault = f"is part of {len(matches)} names" if matches else "is no machine of these runs"
    allowed = [clean(name) for name in matches] or ["null", "a fingerprint", *map(clean, known)]
    raise UsageError(
        f'compare.reference: "{clean(reference)}" {fault}: expected '
        + " | ".join(allowed[:12])
        + (" | ..." if len(allowed) > 12 else "")
        + (f"; did you mean {clean(close)}?" if close and not matches else "")
    )


def _check_prices(runs: Sequence[Run], prices: Mapping[str, config.Price]) -> None:
    """Refuse the price of a card alone: a card needs a machine around it."""
    for run in runs:
        tags = run.tags
        price = prices.get(tags.get("hardware", ""))
        if price and price.buy and not price.machine and tags.get("backend") not in ("cpu", "mps"):
            raise UsageError(
                f"prices: {clean(tags['hardware'])}.machine: missing: expected the machine that the card sits in, "
                "which buy includes"
            )


def _advice(runs: Sequence[Run], parts: Sequence[Part]) -> str:
    """What to do next where no two machines can be compared; '' where they can."""
    if not runs:
        return "No finished runs yet: `dvc repro` (or `make run`) makes the first one."
    real = [part for part in parts if not part.demo]
    heads = [
        [row.head.name for row in table.rows] for part in real for section in part.sections for table in section.tables
    ]
    heads += [[row.head.name for row in part.score.rows] for part in real if part.score]
    if any(len(set(names)) > 1 for names in heads):
        return ""
    machines = {run.entity()[:2] for run in runs if "fallback" not in run.tags}
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
