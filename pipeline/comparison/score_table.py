"""The score: every machine's sustained steps, the same for all."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from pipeline.comparison import claims, groups, stats
from pipeline.comparison.claims import Claim, Side
from pipeline.comparison.costs import costs_of_score
from pipeline.comparison.groups import CURRENT, Entity, Group, Run, clean
from pipeline.comparison.rows import (
    Context,
    energy_source,
    execution_of,
    head_of,
    link_to,
    may_be_claimed_of,
    metric_of,
    other_of,
    reference_index,
    rules_for,
    side_of,
    started,
    values_of,
)
from pipeline.comparison.schema import Score, ScoreRow, StepFigures
from pipeline.profiling import score_steps

STAGE = "sustained.taints"
"""The tag of what disturbed the score."""


def score_of(context: Context, runs: Sequence[Run]) -> Score | None:
    """The score of all machines that have one; None where none has."""
    measured = [as_measured(run) for run in runs if any(metric_of(run, _speed(step)) for step in score_steps.STEPS)]
    if not measured:
        return None
    everyone = groups.group(measured, _sustained, STAGE, allow_tainted=context.settings.tainted)
    everyone = [_not_repeated(group) for group in everyone]
    chosen: dict[Entity, Group] = {}
    for group in sorted(everyone, key=_precedence):
        chosen.setdefault(group.entity, group)
    ordered = sorted(chosen.values(), key=lambda group: (*_by_speed(group), context.names[group.entity]))
    rows = [_score_row(context, group) for group in ordered]
    first = reference_index(context, dict(enumerate(ordered)))
    compared = sum(
        len(row.steps) for index, row in enumerate(rows) if index != first and may_be_claimed_of(ordered[index])
    )
    rules = rules_for(context, compared, "")
    if first is not None:
        rows = [
            _claimed(context, row, group, rows[first], ordered[first], rules)
            for row, group in zip(rows, ordered, strict=True)
        ]
    others = [
        other_of(context, group, _speed(score_steps.STEPS[0]), group.problem or "not the machine's first planned set")
        for group in everyone
        if all(group is not other for other in ordered)
    ]
    return Score(rows[first].head.name if first is not None else None, rules.level, rows, others)


def as_measured(run: Run) -> Run:
    """The run with the CPU threads that its sustained steps used, in place of its training's."""
    tags = run["tags"]
    return {
        **run,
        "tags": {**tags, "software.threads": tags.get("sustained.threads", tags.get("software.threads", ""))},
    }


def _not_repeated(group: Group) -> Group:
    """The group, with a problem where a score replaced an earlier one: whoever measures until a figure pleases will
    find one."""
    attempts = [run["tags"].get("sustained.attempts", "1") for run in group.everything]
    again = sum(text != "1" for text in attempts)
    if not again or group.problem:
        return group
    return replace(group, problem=f"the score of {again} of {len(attempts)} runs was measured more than once")


def _precedence(group: Group) -> tuple[bool, bool, int, str]:
    """The first planned set of a machine comes first, whatever came of it: a later one may be no better choice."""
    first = group.runs[0]
    return group.settings["version"] != CURRENT, group.planned == 1, first["started"] or 0, first["run_id"]


def _sustained(run: Run) -> dict[str, str]:
    """What runs must share for their score to be pooled: the set's recipe, the steps as they were run, the version."""
    tags = run["tags"]
    facts = {
        score_steps.tag(step.name, fact): clean(tags.get(score_steps.tag(step.name, fact), ""))
        for step in score_steps.STEPS
        for fact in ("workload", "precision")
    }
    return (
        {"recipe": clean(tags.get("recipe", "")), "version": clean(tags.get("software.execution", "1"))}
        | facts
        | execution_of(run)
    )


def _speed(step: score_steps.Step) -> str:
    return score_steps.metric(step.name, "images_per_second")


def _by_speed(group: Group) -> tuple[float, ...]:
    """Sorts groups from the fastest first step to the slowest."""
    return tuple(-median(values_of(group.runs, _speed(step)) or [0.0]) for step in score_steps.STEPS)


def _score_row(context: Context, group: Group) -> ScoreRow:
    head = head_of(context, group, STAGE)
    source = energy_source(
        group.runs, "sustained.energy_source", score_steps.metric(score_steps.STEPS[0].name, "images_per_joule")
    )
    steps = {
        step.name: figures
        for step in score_steps.STEPS
        if (figures := _step_figures(group, step.name, energy=bool(source)))
    }
    watts = [figures.watts.value for figures in steps.values() if figures.watts]
    middle = min(
        group.runs, key=lambda run: abs((metric_of(run, _speed(score_steps.STEPS[0])) or 0) + _by_speed(group)[0])
    )
    most, first = max(watts, default=None), steps.get(score_steps.STEPS[0].name)
    return ScoreRow(
        head=head,
        recipe=group.settings["recipe"],
        shown=link_to(context, middle),
        steps=steps,
        energy_source=source,
        watts=most,
        costs=costs_of_score(context.prices.get(head.hardware), first.speed.value if first else None, most),
    )


def _step_figures(group: Group, step: str, *, energy: bool) -> StepFigures | None:
    def estimate(figure: str) -> stats.Estimate | None:
        metric = score_steps.metric(step, figure)
        runs = [run for run in group.runs if metric_of(run, metric) is not None]
        return stats.typical(values_of(runs, metric), [started(run, STAGE) for run in runs]) if runs else None

    speed, batch = estimate("images_per_second"), estimate("batch_size")
    if speed is None:
        return None
    return StepFigures(
        speed=speed,
        values=values_of(group.runs, score_steps.metric(step, "images_per_second")),
        first_third=estimate("first_third_images_per_second"),
        precision=group.settings[score_steps.tag(step, "precision")],
        batch_size=int(batch.value) if batch else None,
        workload=group.settings[score_steps.tag(step, "workload")],
        images_per_joule=estimate("images_per_joule") if energy else None,
        watts=estimate("watts") if energy else None,
    )


def _claimed(
    context: Context, row: ScoreRow, group: Group, reference: ScoreRow, other: Group, rules: claims.Rules
) -> ScoreRow:
    """The row with what is claimed of each step against the reference's."""
    steps = dict(row.steps)
    for step in score_steps.STEPS:
        figures, against = row.steps.get(step.name), reference.steps.get(step.name)
        if figures is None:
            continue
        if row is reference:
            claim = Claim("reference")
        elif against is None or against.workload != figures.workload:
            reason = _unlike(figures, against, reference.head.name)
            claim = Claim("other", f"{row.head.name}: not compared at {step.title}: {reason}.", reason=reason)
        else:
            sides = [_side(*side, step) for side in ((row, group), (reference, other))]
            claim = claims.compared(sides[0], sides[1], replace(rules, where=f"at {step.title}"))
        steps[step.name] = replace(figures, claim=claim)
    return replace(row, steps=steps)


def _unlike(figures: StepFigures, against: StepFigures | None, reference: str) -> str:
    """Why a step is not compared with the reference's."""
    if against is None:
        return f"{reference} did not run it"
    if figures.batch_size != against.batch_size:
        return f"batch {figures.batch_size} against {against.batch_size}"
    return "the step was another or took another time"


def _side(row: ScoreRow, group: Group, step: score_steps.Step) -> Side:
    """A group's runs of a step as a side of a claim; the name tells the precision where it is the device's best."""
    figures = row.steps[step.name]
    name = f"{row.head.name} at {figures.precision}" if step.best_precision else row.head.name
    runs = [run for run in group.runs if metric_of(run, _speed(step)) is not None]
    return side_of(name, group, runs, [1 / value for value in figures.values], stage=STAGE)
