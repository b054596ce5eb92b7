"""Which runs may be pooled, which of them count, and why the others do not."""

import pytest
from made import B, Store

from pipeline.comparison import groups
from pipeline.comparison.runs import SCORE, WORK, Run


def group_runs(store, *, tainted=False, stage=WORK):
    runs = [Run(**fields) for fields in store.runs[::-1]]
    return groups.group_runs(runs, lambda run: {}, stage, allow_tainted=tainted)


def only(store, **options):
    (group,) = group_runs(store, **options)
    return group


def names(store):
    return list(groups.display_names(Run(**fields) for fields in store.runs).values())


def counts(group):
    """How many runs count, were planned, and are excluded, by reason."""
    reasons = [reason for _, reason in group.excluded]
    return len(group.runs), group.planned, {reason: reasons.count(reason) for reason in reasons}


# --- what may be pooled


@pytest.mark.parametrize(
    ("tag", "values", "count"),
    [("machine", "ab", 2), ("device", ("cuda", "cuda:1"), 2), ("label", ("mine", None), 2),
     ("hardware.usable_cores", "24", 2), ("hardware.memory_limit_gib", ("8", None), 2),
     ("software.threads", ("1", "16"), 2), ("software.torch", ("2.11.0", "2.14.1"), 2),
     ("software.torch", ("2.14.0+cu130", "2.14.1"), 1), ("hardware.power_limit_watts", ("350", "700"), 2)],
)  # fmt: skip
def test_runs_under_unlike_conditions_are_not_pooled(tag, values, count):
    first, second = ({tag.replace(".", "__"): value} for value in values)
    assert len(group_runs(Store().add(3, **first).add(3, **second))) == count


# --- which runs count


@pytest.mark.parametrize(
    ("sets", "expected", "problem"),
    [([(1, 1)], (1, 1, {}), ""), ([(1, 1)] * 3, (3, 1, {}), "3 single runs"),
     ([(1, 1), (3, 3)], (3, 3, {"tried before the planned set": 1}), ""),
     ([(3, 3), (1, 1)], (3, 3, {"added after the planned set": 1}), "1 run was added after the 3 planned"),
     ([(3, 3), (3, 3)], (3, 3, {"added after the planned set": 3}), "3 runs were added after the 3 planned"),
     ([(3, 5)], (3, 5, {}), "3 of 5 planned runs")],
)  # fmt: skip
def test_the_first_planned_set_counts(sets, expected, problem):
    store = Store()
    for count, planned in sets:
        store.add(count, planned=planned)
    group = only(store)
    assert counts(group) == expected
    assert problem in group.problem and bool(problem) == bool(group.problem)


def test_a_set_whose_runs_fell_into_two_groups_says_so():
    store = Store().add(5)
    store.runs[4]["tags"]["hardware.power_limit_watts"] = "350"
    assert {len(group.runs): group.problem[:6] for group in group_runs(store)} == {1: "4 of 5", 4: "1 of 5"}


# --- taints and behavior


def test_disturbed_runs_are_excluded_with_what_disturbed_them():
    store = Store().add(5)
    store.runs[1]["tags"]["taints"] = "load battery"
    assert counts(only(store)) == (4, 5, {"disturbed (battery, load)": 1}) and only(store).problem == ""
    assert counts(only(store, tainted=True)) == (5, 5, {})


@pytest.mark.parametrize(
    ("tags", "stage", "problem"),
    [({"taints": "load"}, WORK, "disturbed (load)"),
     ({"fallback": "data device"}, WORK, "no real data, no real device"),
     ({"taints": "load", "sustained__taints": "battery"}, SCORE, "disturbed (battery)")],
)  # fmt: skip
def test_where_all_are_disturbed_they_are_shown_and_carry_no_claim(tags, stage, problem):
    group = only(Store().add(3, **tags), stage=stage)
    assert counts(group) == (3, 3, {}) and group.problem == problem
    assert only(Store().add(3, **tags), stage=stage, tainted=True).problem == ""


@pytest.mark.parametrize(
    ("tag", "stage"),
    [("taints", WORK), ("behavior", WORK), ("sustained__taints", SCORE), ("sustained__behavior", SCORE)],
)
def test_what_a_machine_does_itself_is_no_taint(tag, stage):
    group = only(Store().add(3, **{tag: "throttled drift"}), stage=stage)
    assert counts(group) == (3, 3, {}) and group.problem == ""
    assert group.runs[0].behavior(stage) == {"drift", "throttled"}
    assert group.runs[0].behavior(SCORE if stage == WORK else WORK) == set()


# --- names


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [({}, B | {"label": "desk"}, {"GPU A", "GPU B (desk)"}),
     ({}, {"machine": "b" * 12, "device": "cuda:1"}, {"GPU A [aaaaaa, cuda]", "GPU A [bbbbbb, cuda:1]"}),
     ({"hardware__power_limit_watts": "700"}, {}, {"GPU A [power limit 700 W]", "GPU A [power limit unknown]"})],
)  # fmt: skip
def test_entities_of_one_name_are_told_apart_by_what_differs(first, second, expected):
    assert set(names(Store().add(1, **first).add(1, **second))) == expected


def test_no_text_of_a_user_breaks_a_line():
    store = Store().add(1, hardware="GPU\nA\x00\x1b[1m", label="left | right\t<b>")
    assert names(store) == ["GPU A [1m (left | right <b>)"]
