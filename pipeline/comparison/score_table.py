"""The table of the score: the speed of every machine at the sustained steps."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from pipeline.comparison import claims, stats
from pipeline.comparison.claims import Claim, Side
from pipeline.comparison.context import Context, energy_source, make_side
from pipeline.comparison.costs import costs_of_score
from pipeline.comparison.groups import VERSIONS, Group, group_runs
from pipeline.comparison.runs import SCORE, Entity, Run, measurements, most_typical
from pipeline.comparison.schema import Score, ScoreRow, StepFigures
from pipeline.profiling.score_steps import STEPS, Step, metric, tag


def make_score(context: Context, runs: Sequence[Run]) -> Score | None:
    """Make the table of all machines that have a score; None if there are none."""
    scored = [run for run in runs if any(run.measurement(_speed(step)) for step in STEPS)]
    if not scored:
        return None
    groups = group_runs(scored, _shared_facts, SCORE, allow_tainted=context.settings.tainted)
    groups = [_check_attempts(group) for group in groups]
    by_entity: dict[Entity, Group] = {}
    for group in sorted(groups, key=_precedence):
        by_entity.setdefault(group.entity, group)
    selected = sorted(by_entity.values(), key=lambda group: (*_by_speed(group), context.name(group)))
    rows = [_row(context, group) for group in selected]
    baseline = context.baseline(selected)
    comparisons = sum(
        len(row.steps) for row, group in zip(rows, selected, strict=True) if group is not baseline and group.claimable
    )
    level = stats.bonferroni(stats.LEVEL, comparisons)
    if baseline is not None:
        pairs = list(zip(rows, selected, strict=True))
        rows = [_with_claims(context, pair, pairs[selected.index(baseline)], level) for pair in pairs]
    others = [
        context.other(group, _speed(STEPS[0]), group.problem or "not the machine's first planned set")
        for group in groups
        if group not in selected
    ]
    return Score(context.name(baseline) if baseline is not None else None, level, rows, others)


def _shared_facts(run: Run) -> dict[str, str]:
    """What runs must share for their scores to be pooled: recipe, version, execution settings, and each step's hash."""
    facts = {"recipe": run.tag("recipe"), "version": run.version(SCORE)}
    facts |= {
        tag(step.name, fact): run.tag(tag(step.name, fact)) for step in STEPS for fact in ("workload", "precision")
    }
    return facts | run.execution


def _check_attempts(group: Group) -> Group:
    """Add a problem if a score was measured again: whoever repeats until a figure pleases gets that figure."""
    attempts = [run.tags.get("sustained.attempts", "1") for run in group.all_runs]
    repeated = sum(attempt != "1" for attempt in attempts)
    if not repeated or group.problem:
        return group
    return replace(group, problem=f"the score of {repeated} of {len(attempts)} runs was measured more than once")


def _precedence(group: Group) -> tuple[bool, bool, int, str]:
    """Sort key: the first planned set of a machine comes first, whatever its figures."""
    first = group.runs[0]
    return group.settings["version"] != VERSIONS[SCORE], group.planned == 1, first.started or 0, first.run_id


def _speed(step: Step) -> str:
    return metric(step.name, "images_per_second")


def _by_speed(group: Group) -> tuple[float, ...]:
    """Sort key: the group that is fastest at the first step comes first, then by the next steps."""
    return tuple(-median(measurements(group.runs, _speed(step)) or [0.0]) for step in STEPS)


def _row(context: Context, group: Group) -> ScoreRow:
    first = STEPS[0]
    head = context.head(group, SCORE)
    source = energy_source(group.runs, "sustained.energy_source", metric(first.name, "images_per_joule"))
    figures = {step.name: _step_figures(group, step, energy=bool(source)) for step in STEPS}
    steps = {name: step for name, step in figures.items() if step is not None}
    watts = max((step.watts.value for step in steps.values() if step.watts), default=None)
    speed = steps[first.name].speed.value if first.name in steps else None
    return ScoreRow(
        head=head,
        recipe=group.settings["recipe"],
        shown=context.run_link(most_typical(group.runs, _speed(first))),
        steps=steps,
        energy_source=source,
        watts=watts,
        costs=costs_of_score(context.prices.get(head.hardware), speed, watts),
    )


def _step_figures(group: Group, step: Step, *, energy: bool) -> StepFigures | None:
    def estimate(figure: str) -> stats.Estimate | None:
        name = metric(step.name, figure)
        runs = [run for run in group.runs if run.measurement(name) is not None]
        return stats.median_estimate(measurements(runs, name), [run.start(SCORE) for run in runs]) if runs else None

    speed, batch = estimate("images_per_second"), estimate("batch_size")
    if speed is None:
        return None
    return StepFigures(
        speed=speed,
        values=measurements(group.runs, _speed(step)),
        first_third=estimate("first_third_images_per_second"),
        precision=group.settings[tag(step.name, "precision")],
        batch_size=int(batch.value) if batch else None,
        workload=group.settings[tag(step.name, "workload")],
        images_per_joule=estimate("images_per_joule") if energy else None,
        watts=estimate("watts") if energy else None,
    )


def _with_claims(
    context: Context, candidate: tuple[ScoreRow, Group], baseline: tuple[ScoreRow, Group], level: float
) -> ScoreRow:
    """The candidate's row, with a claim about each of its steps."""
    row, baseline_row = candidate[0], baseline[0]
    steps = dict(row.steps)
    for step in (step for step in STEPS if step.name in steps):
        where = f"at {step.title}"
        if row is baseline_row:
            claim = Claim("reference")
        elif reason := _step_difference(steps[step.name], baseline_row.steps.get(step.name), baseline_row.head.name):
            claim = Claim("other", f"{row.head.name}: not compared {where}: {reason}.", reason=reason)
        else:
            claim = claims.compare(_side(*candidate, step), _side(*baseline, step), context.settings, level, where)
        steps[step.name] = replace(steps[step.name], claim=claim)
    return replace(row, steps=steps)


def _step_difference(candidate: StepFigures, baseline: StepFigures | None, reference: str) -> str:
    """Why a step is not compared with the reference's; '' if it is the same step."""
    if baseline is None:
        return f"{reference} did not run it"
    if candidate.workload == baseline.workload:
        return ""
    if candidate.batch_size != baseline.batch_size:
        return f"batch {candidate.batch_size} against {baseline.batch_size}"
    return "the step or its duration is different"


def _side(row: ScoreRow, group: Group, step: Step) -> Side:
    """One side of a claim about a step. Its name includes the precision if that is the device's best."""
    name = f"{row.head.name} at {row.steps[step.name].precision}" if step.best_precision else row.head.name
    seconds = [(run, 1 / speed) for run in group.runs if (speed := run.measurement(_speed(step)))]
    return make_side(name, group, seconds, stage=SCORE)
