"""Compare machines: put runs into groups, make a table row of each group, and compare the rows of a table.

The score ranks machines by sustained steps that are the same for all. The work of a recipe is compared in two kinds of
tables: every machine at the same settings, and each machine at its best. In each table, every row is compared with one
reference, at a level corrected for the number of comparisons (`stats.bonferroni`). A run that is in no table is listed
with the reason.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from pipeline import config
from pipeline.comparison.context import Context
from pipeline.comparison.groups import display_names
from pipeline.comparison.runs import Run, clean
from pipeline.comparison.schema import Comparison, Part, Score, Table
from pipeline.comparison.score_table import make_score
from pipeline.comparison.work_rows import COURSES
from pipeline.comparison.work_tables import group_by_work, make_section
from pipeline.errors import UsageError, hint

__all__ = ["COURSES", "Comparison", "compare"]


def compare(
    runs: Iterable[Mapping[str, Any]],
    courses: Callable[[str], Mapping[str, Sequence[float]]],
    link: Callable[[str, str], str],
    settings: config.Compare,
    prices: Mapping[str, config.Price] | None,
) -> Comparison:
    """Compare `runs` (mappings with the fields of Run), newest first.

    `courses` returns the COURSES of a run by its id; it is called only for runs in tables. `link` returns the address
    of a run's page from the ids of its experiment and run.

    Raises UsageError if `settings.reference` matches none of these runs' machines, or if a card has a price to buy but
    no `machine`.
    """
    all_runs = [Run(**fields) for fields in runs]
    by_record: dict[str, Run] = {}  # a training that is in several experiments counts once
    for run in all_runs:
        by_record.setdefault(run.tags.get("record", run.run_id), run)
    unique = list(by_record.values())
    settings = replace(settings, reference=_find_reference(unique, settings.reference))
    _check_prices(unique, prices or {})
    context = Context(cache(courses), link, settings, prices or {}, display_names(unique))
    parts = []
    for demo in (False, True):
        selected = [run for run in unique if ("fallback" in run.tags) == demo]
        if selected:
            sections = [make_section(context, *same_work) for same_work in group_by_work(selected)]
            parts.append(Part(demo, make_score(context, selected), sections))
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
    """The fingerprint, label or hardware that `reference` matches, in full or by a part that only one of them has."""
    if reference is None or not runs or any(run.ran_on(reference) for run in runs):
        return reference
    fingerprints = {run.tags.get("machine", "") for run in runs}
    known = sorted({run.tags[tag] for run in runs for tag in ("hardware", "label") if run.tags.get(tag)})
    part = reference.casefold()
    matches = [name for name in known if part in name.casefold()]
    matches += [fingerprint for fingerprint in sorted(fingerprints) if fingerprint.startswith(part)]
    if len(matches) == 1:
        return str(matches[0])
    fault = f"is part of {len(matches)} names" if matches else "matches no machine of these runs"
    allowed = [clean(name) for name in matches] or ["null", "a fingerprint", *map(clean, known)]
    expected = " | ".join(allowed[:12] + ["..."] * (len(allowed) > 12))
    suggestion = "" if matches else hint(reference, map(clean, known))
    raise UsageError(f'compare.reference: "{clean(reference)}" {fault}: expected {expected}{suggestion}')


def _check_prices(runs: Sequence[Run], prices: Mapping[str, config.Price]) -> None:
    """Raise UsageError if a card has a price to buy but no `machine`: a card alone trains nothing."""
    for run in runs:
        tags = run.tags
        price = prices.get(tags.get("hardware", ""))
        if price and price.buy and not price.machine and tags.get("backend") not in ("cpu", "mps"):
            raise UsageError(
                f"prices: {clean(tags['hardware'])}.machine: missing: expected the machine that the card is in; "
                "its price is part of buy"
            )


def _advice(runs: Sequence[Run], parts: Sequence[Part]) -> str:
    """What to do next if no two machines can be compared; '' if some can."""
    if not runs:
        return "No finished runs yet: `make run` (or `dvc repro`) makes the first one."
    real = [part for part in parts if not part.demo]
    tables: list[Table | Score] = [part.score for part in real if part.score]
    tables += [table for part in real for section in part.sections for table in section.tables]
    if any(len({row.head.name for row in table.rows}) > 1 for table in tables):
        return ""
    machines = {run.entity()[:2] for run in runs if "fallback" not in run.tags}
    if not machines:
        return (
            "Nothing to compare: every run is a DEMO, with a stand-in for data, weights or GPU. Fix what its warning "
            "says, and run again."
        )
    if len(machines) == 1:
        return (
            "One machine so far. To compare two, run the same on another with MLFLOW_TRACKING_URI set to this store. "
            "Or copy its runs: `python -m pipeline.bundle export` there, `python -m pipeline.bundle import` here."
        )
    return (
        f"{len(machines)} machines, but no two did the same work with the same version of this code. On both, run one "
        "recipe with the same data and settings, such as `python -m pipeline.run -S recipe=linear-probe`."
    )
