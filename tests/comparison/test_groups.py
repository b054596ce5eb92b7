"""Which runs may be pooled, which of them count, and why the others do not."""

import pytest
from made import SESSION, Store

from pipeline import config
from pipeline.comparison import groups

CURRENT = str(config.EXECUTION_VERSION)
OLDER = str(config.EXECUTION_VERSION - 1)


def grouped(store, *, tainted=False, tag="taints"):
    return groups.group(
        store.runs[::-1], lambda run: {"precision": run["params"]["train.precision"]}, tag, allow_tainted=tainted
    )


def only(store, **others):
    (found,) = grouped(store, **others)
    return found


def counts(found):
    return len(found.runs), [(left.run["run_id"][:8], left.reason) for left in found.left_out], found.planned


# --- what may be pooled


def test_runs_of_one_plan_are_a_group_oldest_first():
    store = Store().add(5)
    found = only(store)
    assert [run["run_id"] for run in found.runs] == [run["run_id"] for run in store.runs]
    assert counts(found) == (5, [], 5) and found.problem == ""


@pytest.mark.parametrize(
    ("tag", "values"),
    [("machine", "ab"), ("device", ("cuda", "cuda:1")), ("label", ("mine", None)), ("hardware.usable_cores", "24"),
     ("hardware.memory_limit_gib", ("8", None)), ("software.threads", ("1", "16")),
     ("software.torch", ("2.11.0", "2.14.1")), ("hardware.power_limit_watts", ("350", "700"))],
)  # fmt: skip
def test_runs_under_unlike_conditions_are_not_pooled(tag, values):
    store = Store()
    for value in values:
        store.add(3, **{tag.replace(".", "__"): value, "machine": value if tag == "machine" else "m"})
    assert len(grouped(store)) == 2


def test_a_patch_of_torch_is_no_other_condition():
    store = Store().add(2, software__torch="2.14.0+cu130")
    store.runs[1]["tags"]["software.torch"] = "2.14.1"
    assert len(grouped(store)) == 1


def test_unlike_settings_are_not_pooled():
    assert len(grouped(Store().add(3).add(3, params={"precision": "bf16"}))) == 2


# --- which runs count


def test_a_single_run_counts_and_was_planned():
    found = only(Store().add(1))
    assert counts(found) == (1, [], 1) and found.problem == ""


def test_single_runs_are_no_planned_set():
    found = only(Store().add(1).add(1).add(1))
    assert counts(found) == (3, [], 1) and found.problem == "3 single runs were not planned as a set"


def test_trials_before_a_planned_set_do_not_count():
    found = only(Store().add(1).add(3))
    assert counts(found) == (3, [("00000001", "tried before the planned set")], 3) and found.problem == ""


@pytest.mark.parametrize("more", [1, 3])
def test_runs_after_a_planned_set_do_not_count_and_end_every_claim(more):
    found = only(Store().add(3).add(more))
    reasons = {reason for _, reason in counts(found)[1]}
    assert len(found.runs) == 3 and reasons == {"added after the planned set"} and len(found.left_out) == more
    assert str(more) in found.problem and "after the 3 planned" in found.problem


def test_a_plan_that_was_not_reached_is_a_problem():
    found = only(Store().add(3, planned=5))
    assert counts(found) == (3, [], 5) and found.problem == "3 of 5 planned runs are there"


def test_a_plan_whose_runs_fell_into_two_groups_says_so():
    store = Store().add(5)
    store.runs[4]["tags"]["hardware.power_limit_watts"] = "350"
    for found, there in zip(grouped(store), (1, 4), strict=True):
        assert len(found.runs) == there
        assert found.problem == f"{5 - there} of 5 planned runs ran under other conditions or settings"


def test_a_number_of_repeats_that_is_none_is_no_plan():
    assert only(Store().add(1, repeats="many")).planned == 1


# --- taints and behavior


def test_disturbed_runs_are_left_out_with_what_disturbed_them():
    store = Store().add(5)
    store.runs[1]["tags"]["taints"] = "load battery"
    found = only(store)
    assert counts(found) == (4, [("00000002", "disturbed (battery, load)")], 5) and found.problem == ""
    assert counts(only(store, tainted=True)) == (5, [], 5)


def test_where_all_are_disturbed_they_are_shown_and_carry_no_claim():
    found = only(Store().add(3, taints="load"))
    assert counts(found) == (3, [], 3) and found.problem == "disturbed (load)"
    assert only(Store().add(3, taints="load"), tainted=True).problem == ""


def test_stand_ins_disturb_and_say_what_was_not_real():
    assert only(Store().add(3, fallback="data device")).problem == "no real data, no real device"


def test_the_stage_that_is_compared_has_taints_of_its_own():
    store = Store().add(3, taints="load", sustained__taints="battery")
    assert only(store, tag="sustained.taints").problem == "disturbed (battery)"


@pytest.mark.parametrize("tag", ["taints", "behavior"])
def test_what_a_machine_does_itself_is_no_taint(tag):
    found = only(Store().add(3, **{tag: "drift throttled"}))
    assert counts(found) == (3, [], 3) and found.problem == ""
    assert groups.behavior(found.runs, "taints") == ["drift", "throttled"]


def test_the_behavior_of_a_stage_is_its_own():
    runs = Store().add(1, behavior="drift", sustained__behavior="thermal").runs
    assert groups.behavior(runs, "taints") == ["drift"] and groups.behavior(runs, "sustained.taints") == ["thermal"]


# --- versions


@pytest.mark.parametrize(("version", "problem"), [(CURRENT, ""), (OLDER, f"version {OLDER}"), (None, "version 1")])
def test_another_version_of_the_code_carries_no_claim(version, problem):
    found = only(Store().add(3, software__execution=version))
    assert problem in found.problem and bool(found.problem) == bool(problem)


# --- nothing is lost


def test_every_run_is_in_one_group_and_there_once():
    store = Store().add(1).add(5, planned=7).add(2).add(3, taints="load").add(2, params={"precision": "bf16"})
    store.add(4, machine="b").add(1, machine="b", start=store.runs[0]["started"] - SESSION)
    ids = [run["run_id"] for group in grouped(store) for run in group.everything]
    assert sorted(ids) == [run["run_id"] for run in store.runs]


# --- names


def test_an_entity_is_called_by_its_hardware_and_label():
    names = groups.names(Store().add(1).add(1, machine="b", hardware="GPU B", label="under the desk").runs)
    assert set(names.values()) == {"GPU A", "GPU B (under the desk)"}


def test_entities_of_one_name_are_told_apart_by_what_differs():
    store = Store().add(1).add(1, device="cuda:1", machine="b" * 12)
    assert set(groups.names(store.runs).values()) == {"GPU A [aaaaaa, cuda]", "GPU A [bbbbbb, cuda:1]"}
    store = Store().add(1, hardware__power_limit_watts="700").add(1)
    assert set(groups.names(store.runs).values()) == {"GPU A [power limit 700 W]", "GPU A [power limit unknown]"}


def test_no_text_of_a_user_breaks_a_line():
    (name,) = groups.names(Store().add(1, hardware="GPU\nA\x00\x1b[1m", label="left | right\t<b>").runs).values()
    assert name == "GPU A [1m (left | right <b>)"
