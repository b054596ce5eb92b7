"""The score: every machine's sustained steps, the same for all."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from pipeline import claims, groups, score, stats
from pipeline.claims import Claim
from pipeline.costs import costs_of_score
from pipeline.groups import Entity, Group, Run, clean
from pipeline.rows import (
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
    values_of,
)
from pipeline.tables import Score, ScoreRow, StepFigures


def score_of(context: Context, runs: Sequence[Run]) -> Score | None:
    """The score of all machines that have one; None where none has."""
    measured = [run for run in runs if any(metric_of(run, _speed(step)) for step in score.STEPS)]
    if not measured:
        return None
    everyone = groups.group(measured, _sustained, "sustained.taints", allow_tainted=context.settings.tainted)
    chosen: dict[Entity, Group] = {}
    for group in sorted(everyone, key=lambda group: (bool(group.problem), -len(group.runs), group.runs[0]["run_id"])):
        chosen.setdefault(group.entity, group)
    ordered = sorted(chosen.values(), key=lambda group: (*_by_speed(group), context.names[group.entity]))
    rows = [_score_row(context, group) for group in ordered]
    first = reference_index(context, dict(enumerate(ordered)))
    compared = sum(
        len(row.steps) for index, row in enumerate(rows) if index != first and may_be_claimed_of(ordered[index])
    )
    rules = rules_for(context, compared, "at this step")
    if first is not None:
        rows = [
            _claimed(context, row, group, rows[first], ordered[first], rules)
            for row, group in zip(rows, ordered, strict=True)
        ]
    others = [
        other_of(context, group, _speed(score.STEPS[0]), group.problem or "measured with another recipe or other steps")
        for group in everyone
        if all(group is not other for other in ordered)
    ]
    return Score(rows[first].head.name if first is not None else None, rules.level, rows, others)


def _sustained(run: Run) -> dict[str, str]:
    """What runs must share for their score to be pooled: the set's recipe, the steps as they were run, the version."""
    tags = run["tags"]
    facts = {
        score.tag(step.name, fact): clean(tags.get(score.tag(step.name, fact), ""))
        for step in score.STEPS
        for fact in ("workload", "precision")
    }
    return (
        {"recipe": clean(tags.get("recipe", "")), "version": clean(tags.get("software.execution", "1"))}
        | facts
        | execution_of(run)
    )


def _speed(step: score.Step) -> str:
    return score.metric(step.name, "images_per_second")


def _by_speed(group: Group) -> tuple[float, ...]:
    """Sorts groups from the fastest first step to the slowest."""
    return tuple(-median(values_of(group.runs, _speed(step)) or [0.0]) for step in score.STEPS)


def _score_row(context: Context, group: Group) -> ScoreRow:
    head = head_of(context, group, "sustained.taints")
    source = energy_source(group.runs, "sustained.energy_source", score.metric(score.STEPS[0].name, "images_per_joule"))
    steps = {
        step.name: figures for step in score.STEPS if (figures := _step_figures(group, step.name, energy=bool(source)))
    }
    watts = [figures.watts.value for figures in steps.values() if figures.watts]
    middle = min(group.runs, key=lambda run: abs((metric_of(run, _speed(score.STEPS[0])) or 0) + _by_speed(group)[0]))
    most = max(watts, default=None)
    return ScoreRow(
        head=head,
        recipe=group.settings["recipe"],
        shown=link_to(context, middle),
        steps=steps,
        energy_source=source,
        watts=most,
        costs=costs_of_score(
            context.prices.get(head.hardware), {name: figures.speed.value for name, figures in steps.items()}, most
        ),
    )


def _step_figures(group: Group, step: str, *, energy: bool) -> StepFigures | None:
    def estimate(figure: str) -> stats.Estimate | None:
        metric = score.metric(step, figure)
        runs = [run for run in group.runs if metric_of(run, metric) is not None]
        return stats.typical(values_of(runs, metric), [run["started"] for run in runs]) if runs else None

    speed = estimate("images_per_second")
    if speed is None:
        return None
    return StepFigures(
        speed=speed,
        values=values_of(group.runs, score.metric(step, "images_per_second")),
        first_third=estimate("first_third_images_per_second"),
        precision=group.settings[score.tag(step, "precision")],
        batch_size=int((estimate("batch_size") or speed).value),
        workload=group.settings[score.tag(step, "workload")],
        images_per_joule=estimate("images_per_joule") if energy else None,
        watts=estimate("watts") if energy else None,
    )


def _claimed(
    context: Context, row: ScoreRow, group: Group, reference: ScoreRow, other: Group, rules: claims.Rules
) -> ScoreRow:
    """The row with what is claimed of each step against the reference's."""
    steps = {}
    for name, figures in row.steps.items():
        against = reference.steps.get(name)
        if row is reference:
            claim = Claim("reference")
        elif against is None:
            claim = Claim("other", f"{row.head.name}: not compared at {name}, which {reference.head.name} did not run.")
        elif against.workload != figures.workload:
            claim = Claim("other", f"{row.head.name}: not compared at {name}, whose batch or time is another.")
        else:
            sides = [
                side_of(f"{head.name} at {each.precision}", own, own.runs, [1 / value for value in each.values])
                for head, own, each in ((row.head, group, figures), (reference.head, other, against))
            ]
            claim = claims.compared(sides[0], sides[1], rules)
        steps[name] = replace(figures, claim=claim)
    return replace(row, steps=steps)
