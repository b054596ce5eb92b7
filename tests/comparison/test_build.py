"""Groups into tables: what is compared with what, the figures of a row, the score, and that no run is lost."""

import json
import math
from collections import Counter

import pytest
from conftest import fails
from made import EPOCHS, OLDER, SESSION, Store, every_kind, link, price, row, score_row, sections, table, two

from pipeline import config
from pipeline.comparison import build, report, stats
from pipeline.errors import UsageError
from pipeline.profiling import score_steps

MINUTE = 60_000


def names(found, place=0):
    return [each.head.name for each in table(found, place).rows]


def kinds(found, place=0):
    return {each.head.name: each.claim.kind for each in table(found, place).rows}


def step_kinds(found, step=0):
    (part,) = [part for part in found.parts if not part.demo]
    return {each.head.name: each.steps[score_steps.STEPS[step].name].claim.kind for each in part.score.rows}


# --- nothing disappears


@pytest.mark.parametrize("tainted", [False, True])
def test_every_run_that_was_read_is_accounted_for(tainted):
    store = every_kind()
    found = store.compare(tainted=tainted)
    once = {run["tags"].get("record", run["run_id"]): run["run_id"] for run in store.runs}
    assert build.listed(found) == set(once.values())
    assert (found.runs, found.copies) == (len(once), 1) and len(once) == len(store.runs) - 1
    for part in found.parts:
        for section in part.sections:  # and no run in a row and in a list
            rows = {run["id"] for table in section.tables for each in table.rows for run in each.head.runs}
            others = {run["id"] for other in section.others for run in other.runs}
            assert not rows & others


def test_every_run_with_a_score_is_in_its_table_or_listed_below():
    store = every_kind()
    found = store.compare().parts[0].score
    told = Counter(run["id"] for each in found.rows for run in (*each.head.runs, *each.head.left_out))
    told += Counter(run["id"] for other in found.others for run in other.runs)
    key = score_steps.metric("convnet_fp32", "images_per_second")
    assert told == Counter(run["run_id"] for run in store.runs if key in run["metrics"])


def test_what_is_in_no_table_says_why():
    (work, *_) = sections(every_kind().compare())
    reasons = {(other.settings["precision"], other.settings["compile"]): other.reason for other in work.others}
    assert reasons["fp16", "auto"] == "its settings are in no table"
    assert reasons["fp32", "default"] == "disturbed (battery)"
    assert all(other.reason for other in work.others)


# --- groups into sections


def test_runs_of_one_machine_work_and_settings_are_a_row():
    found = Store().add(3).compare()
    only = row(found, "GPU A")
    assert len(only.head.runs) == 3 and only.figures["total_seconds"].n == 3
    assert (found.runs, found.machines, found.copies) == (3, 1, 0)


@pytest.mark.parametrize("key", ["precision", "channels_last", "compile", "graph", "features", "threads"])
def test_another_execution_setting_is_another_row(key):
    found = Store().add(3).add(2, params={key: "other"}, seconds=1.0).compare()
    same, best = sections(found)[0].tables
    assert [len(each.head.runs) for each in same.rows] == [3]
    assert [len(each.head.runs) for each in best.rows] == [2]
    assert same.settings["precision"] == "fp32" and best.settings is None


@pytest.mark.parametrize(
    ("tag", "value"),
    [("device", "cuda:1"), ("label", "mine"), ("hardware__usable_cores", "2"), ("software__torch", "2.11.0"),
     ("hardware__power_limit_watts", "350")],
)  # fmt: skip
def test_other_conditions_are_another_row_of_the_table(tag, value):
    found = Store().add(3).add(3, **{tag: value}).compare()
    assert len(set(names(found))) == 2 and found.machines == 1


def test_a_training_in_two_experiments_is_one_run():
    found = Store().add(1, record="r1").add(1, record="r1").add(1, record="r2").compare()
    assert (found.runs, found.copies) == (2, 1) and len(row(found, "GPU A").head.runs) == 2


def test_unlike_workloads_are_never_in_one_table():
    found = two().add(2, workload="w2", recipe="blog", machine="c" * 12).compare()
    assert [(each.workload, each.title) for each in sections(found)] == [
        ("w1", "finetune on cifar10 with pretrained weights"), ("w2", "blog on cifar10 with pretrained weights"),
    ]  # fmt: skip
    assert [len(each.tables[0].rows) for each in sections(found)] == [2, 1]


def test_what_another_version_of_the_code_measured_stands_apart_without_claims():
    store = two().add(3, software__execution=OLDER).add(3, software__execution=OLDER, machine="b" * 12, seconds=5.0)
    current, older = sections(store.add(1, software__execution=None).compare())[:2]
    assert (current.version, older.version) == (str(config.EXECUTION_VERSION), OLDER)
    assert [len(each.head.runs) for each in older.tables[0].rows] == [3, 3]
    assert {each.claim.kind for each in older.tables[0].rows} == {"reference", "problem"}
    assert {each.claim.kind for each in current.tables[0].rows} == {"reference", "faster"}
    assert sections(store.compare())[2].version == "1"


def test_demos_stand_apart_and_nothing_is_claimed_of_them():
    store = two().add(3, fallback="device", seconds=1.0).add(3, fallback="device", machine="b" * 12, hardware="GPU B")
    found = store.compare()
    assert kinds(found) == {"GPU B": "faster", "GPU A": "reference"}
    assert [part.demo for part in found.parts] == [False, True]
    assert {(each.claim.kind, each.head.problem) for each in table(found, demo=True).rows} == {
        ("reference", "no real device"), ("problem", "no real device"),
    }  # fmt: skip
    demo = table(store.compare(tainted=True), demo=True)
    assert {each.claim.kind for each in demo.rows} == {"reference", "slower"}


# --- the two kinds of tables


def test_the_same_settings_are_those_that_most_machines_ran_at_fp32():
    store = two().add(5, machine="c" * 12, params={"threads": "4"}, hardware="C")
    found = store.add(9, machine="a" * 12, params={"precision": "bf16"}, seconds=3.0).compare()
    same, best = sections(found)[0].tables
    assert {each.head.hardware for each in same.rows} == {"GPU A", "GPU B"} and same.settings["threads"] == "null"
    assert [(each.head.hardware, each.settings["precision"], each.settings["threads"]) for each in best.rows] == [
        ("GPU A", "bf16", "null"), ("GPU B", "fp32", "null"), ("C", "fp32", "4"),
    ]  # fmt: skip


def test_a_second_table_that_would_say_the_same_is_left_out():
    slower = {"precision": "bf16"}
    assert len(sections(two().add(2, params=slower, seconds=99.0).compare())[0].tables) == 1
    assert len(sections(two().add(2, params=slower, seconds=9.0).compare())[0].tables) == 2


def test_without_fp32_each_is_at_its_best_alone():
    store = Store().add(2, params={"precision": "bf16"}).add(2, machine="b" * 12, params={"precision": "tf32"})
    (only,) = sections(store.compare())[0].tables
    assert only.settings is None and len(only.rows) == 2


def test_a_best_that_the_other_machine_did_not_run_is_not_compared():
    store = two(3, 4).add(3, params={"precision": "bf16"}, seconds=2.0)
    claim = row(store.compare(), "GPU A", 1).claim
    assert claim.kind == "other" and claim.reason == "GPU B was not run in bf16"
    store.add(3, machine="b" * 12, hardware="GPU B", params={"precision": "bf16"}, seconds=50.0)
    claim = row(store.compare(), "GPU A", 1).claim
    assert claim.kind == "faster" and claim.sentence.startswith("GPU A at bf16 is 2.")
    assert "times as fast as GPU B at fp32" in claim.sentence


def test_a_best_is_no_disturbed_one_where_there_is_another():
    store = two().add(3, params={"precision": "bf16"}, seconds=3.0)
    found = store.add(3, params={"precision": "fp16"}, seconds=1.0, taints="load").compare()
    assert {each.head.name: each.settings["precision"] for each in table(found, 1).rows} == {
        "GPU A": "bf16", "GPU B": "fp32",
    }  # fmt: skip


def test_rows_stand_best_first_and_those_without_a_time_last():
    found = two().add(2, machine="c" * 12, hardware="C", metrics={"time/total_seconds": None}).compare()
    assert names(found) == ["GPU B", "GPU A", "C"] and kinds(found)["C"] == "alone"


# --- the reference


def test_the_reference_is_the_machine_with_the_most_runs_then_the_first_by_name():
    assert table(two(3, 4).compare()).reference == "GPU B"
    assert table(two(3, 3).compare()).reference == "GPU A"


def test_a_machine_that_nothing_is_claimed_of_is_no_reference_where_there_is_another():
    store = Store().add(9, taints="load").add(1, machine="b" * 12, hardware="GPU B")
    assert table(store.compare()).reference == "GPU B"


@pytest.mark.parametrize("asked", ["b" * 12, "under the desk", "GPU B"])
def test_a_reference_is_asked_for_by_fingerprint_label_or_hardware(asked):
    found = two(5, 3, label="under the desk").compare(reference=asked)
    assert table(found).reference == "GPU B (under the desk)"
    assert kinds(found) == {"GPU B (under the desk)": "reference", "GPU A": "slower"}


def test_a_reference_that_no_run_is_of_is_refused():
    line = fails(UsageError, lambda: two(label="mine").compare(reference="GPU X"))
    assert line == (
        'compare.reference: no run in this store is of "GPU X": expected null | a fingerprint | GPU A | GPU B | mine; '
        "did you mean GPU B?"
    )


def test_of_many_machines_ten_are_named():
    store = Store()
    for number in range(30):
        store.add(1, hardware=f"GPU {number:02}", machine=f"{number:012}")
    assert fails(UsageError, lambda: store.compare(reference="other")).endswith("| GPU 08 | GPU 09 | ...")


def test_an_empty_store_says_what_to_do_whatever_the_reference():
    assert "No finished runs yet" in Store().compare(reference="GPU X").advice


def test_where_the_reference_did_not_do_the_work_nothing_is_compared():
    found = two().add(2, workload="w2", machine="c" * 12, hardware="C").compare(reference="C")
    assert [each.tables[0].reference for each in sections(found)] == [None, "C"]
    assert {each.claim.kind for each in sections(found)[0].tables[0].rows} == {"alone"}


# --- claims


def test_a_row_is_compared_by_its_total_time_and_by_its_process():
    found = two().compare()
    assert kinds(found) == {"GPU B": "faster", "GPU A": "reference"}
    a, b = row(found, "GPU A"), row(found, "GPU B")
    for claim, key, value in ((b.claim, "total_seconds", 2), (b.whole, "process_seconds", 30 / 25)):
        assert claim.speedup[:3] == pytest.approx(stats.ratio(a.values[key], b.values[key])[:3])
        assert claim.speedup.value == pytest.approx(value, rel=1e-3)
    assert "GPU B is 1.9" in b.claim.sentence and "from process start to result" in b.whole.sentence
    assert a.whole.kind == "reference"


def test_the_faster_work_may_be_the_slower_process():
    """What compiling wins in the work it may lose before it."""
    store = (
        Store().add(3).add(3, machine="b" * 12, hardware="GPU B", seconds=5.0, metrics={"time/process_seconds": 99.0})
    )
    b = row(store.compare(), "GPU B")
    assert (b.claim.kind, b.whole.kind) == ("faster", "slower")


def test_a_process_whose_time_is_not_known_is_not_compared():
    b = row(two(metrics={"time/process_seconds": None}).compare(), "GPU B")
    assert (b.claim.kind, b.whole.kind) == ("faster", "alone")


def test_intervals_are_shared_among_the_machines_that_may_be_claimed_of():
    store = two(3, 3).add(3, machine="c" * 12, hardware="c").add(2, machine="d" * 12, hardware="d")
    store.add(3, machine="f" * 12, hardware="f", taints="load")
    found = table(store.compare())
    assert found.comparisons == 2  # with B and c; d has too few runs, f is disturbed
    assert found.level == pytest.approx(1 - 0.05 / 2)


def test_a_best_picked_among_several_counts_every_pair_it_might_have_been():
    store = two()
    for precision in ("bf16", "fp16"):
        store.add(3, params={"precision": precision}, seconds=3.0)
        store.add(3, machine="b" * 12, hardware="GPU B", params={"precision": precision}, seconds=4.0)
    same, best = sections(store.compare())[0].tables
    assert (same.comparisons, best.comparisons) == (1, 9)


@pytest.mark.parametrize(("first", "second", "kind"), [(3, 1, "few"), (3, 2, "few"), (3, 3, "faster")])
def test_a_claim_needs_three_runs_of_either(first, second, kind):
    assert kinds(two(first, second).compare())["GPU B"] == kind


@pytest.mark.parametrize(
    ("change", "kind"),
    [({}, "faster"), ({"planned": 5}, "problem"), ({"taints": "load"}, "problem"), ({"accuracy": 0.70}, "parity"),
     ({"behavior": "throttled"}, "faster")],
)  # fmt: skip
def test_what_makes_and_what_ends_a_claim(change, kind):
    assert kinds(two(**change).compare())["GPU B"] == kind


def test_runs_added_afterwards_end_a_claim():
    store = two().add(1, machine="b" * 12, hardware="GPU B", seconds=5.0)
    b = row(store.compare(), "GPU B")
    assert b.claim.kind == "problem" and len(b.head.runs) == 3 and len(b.head.left_out) == 1


def test_disturbed_runs_are_let_into_claims_where_asked_for():
    store = two(taints="load")
    assert kinds(store.compare())["GPU B"] == "problem"
    assert kinds(store.compare(tainted=True))["GPU B"] == "faster"


def test_sessions_are_the_unit_and_few_of_them_claim_nothing_small():
    def claim(step):
        store = Store().add(5, step=step).add(5, machine="b" * 12, hardware="GPU B", seconds=9.5, step=step)
        return row(store.compare(), "GPU B").claim

    assert claim(SESSION).kind == "faster" and "in 5 sessions" in claim(SESSION).sentence
    assert claim(MINUTE).kind == "small" and "all within 4 minutes" in claim(MINUTE).sentence


def test_the_final_accuracy_is_that_on_test_images_else_on_validation_images():
    untested = {"test/accuracy": None}
    assert kinds(two(metrics=untested).compare())["GPU B"] == "faster"
    assert kinds(two(metrics=untested | {"best/val_accuracy": 0.7}).compare())["GPU B"] == "parity"
    nothing = untested | {"best/val_accuracy": None}
    assert "not known" in row(two(metrics=nothing).compare(), "GPU B").claim.reason


def test_an_accuracy_of_0_is_one():
    found = two(metrics={"test/accuracy": 0.0}).compare()
    assert row(found, "GPU B").figures["test_accuracy"].value == 0 and kinds(found)["GPU B"] == "parity"


def test_a_seed_that_ran_twice_is_one_accuracy():
    store = (
        Store().add(4, seeds=[0, 0, 1, 1]).add(4, machine="b" * 12, hardware="GPU B", seconds=5.0, seeds=[0, 0, 1, 1])
    )
    claim = row(store.compare(), "GPU B").claim
    assert claim.kind == "parity" and "too few seeds" in claim.reason


# --- the head of a row


def test_a_head_tells_what_counts_what_does_not_and_over_what_time():
    store = Store().add(1).add(5, step=3 * MINUTE)
    store.runs[2]["tags"]["taints"] = "load"
    head = row(store.compare(), "GPU A").head
    assert (len(head.runs), head.planned, head.sessions, head.problem) == (4, 5, 1, "")
    assert Counter(run["reason"] for run in head.left_out) == {
        "tried before the planned set": 1, "disturbed (load)": 1,
    }  # fmt: skip
    assert head.hours == pytest.approx(0.2)


# --- the score


def test_machines_are_ranked_by_their_score_whatever_the_recipe():
    store = Store().sustained(3).sustained(3, speed=1500.0, machine="b" * 12, hardware="GPU B", workload="w2")
    found = store.compare()
    (part,) = found.parts
    assert [each.head.name for each in part.score.rows] == ["GPU B", "GPU A"] and part.score.reference == "GPU A"
    b = score_row(found, "GPU B")
    assert list(b.steps) == [step.name for step in score_steps.STEPS]
    for step in score_steps.STEPS:
        claim = b.steps[step.name].claim
        assert claim.kind == "faster" and claim.speedup.value == pytest.approx(1.5)
        assert f"at {step.title} (3 runs each in 3 sessions)" in claim.sentence
    assert part.score.level == pytest.approx(1 - 0.05 / 3)
    assert b.steps["convnet_fp32"].precision == "fp32" and b.steps["convnet_best"].precision == "bf16"


def test_only_the_same_step_is_compared():
    store = Store().sustained(3).sustained(3, machine="b" * 12, hardware="GPU B", batch=128)
    found = store.compare()
    assert step_kinds(found)["GPU B"] == "other" and step_kinds(found, 2)["GPU B"] == "none"
    claim = score_row(found, "GPU B").steps["convnet_fp32"].claim
    assert claim.reason == "batch 128 against 256" and claim.speedup is None


def test_a_step_that_the_reference_did_not_run_is_not_compared():
    store = Store().sustained(3).sustained(3, machine="b" * 12, hardware="GPU B")
    for run in store.runs[:3]:
        del run["metrics"][score_steps.metric("transformer_best", "images_per_second")]
    claim = score_row(store.compare(), "GPU B").steps["transformer_best"].claim
    assert claim.kind == "other" and claim.reason == "GPU A did not run it"


def test_a_run_without_one_of_the_steps_figures_counts_at_the_others():
    store = Store().sustained(4).sustained(4, machine="b" * 12, hardware="GPU B", speed=1500.0)
    store.runs[0]["metrics"][score_steps.metric("convnet_best", "images_per_second")] = math.nan
    found = score_row(store.compare(), "GPU B").steps
    assert "4 and 3 runs" in found["convnet_best"].claim.sentence
    assert "4 runs each" in found["convnet_fp32"].claim.sentence


def test_the_score_has_taints_and_behavior_of_its_own():
    store = Store().sustained(3).sustained(3, machine="b" * 12, hardware="GPU B", speed=1500.0, taints="load")
    found = store.compare()
    assert step_kinds(found) == {"GPU A": "reference", "GPU B": "problem"} and "problem" not in kinds(found).values()
    store = Store().sustained(3).sustained(3, machine="b" * 12, hardware="GPU B", speed=1500.0,
                                           sustained__behavior="throttled")  # fmt: skip
    assert step_kinds(store.compare())["GPU B"] == "faster"
    assert score_row(store.compare(), "GPU B").head.behavior == ["throttled"]


def test_a_machine_has_one_score_that_of_its_first_set():
    store = Store().sustained(3).sustained(5, recipe="blog", workload="w2")
    found = store.compare().parts[0].score
    assert [(each.recipe, len(each.head.runs)) for each in found.rows] == [("finetune", 3)]
    assert [len(other.runs) for other in found.others] == [5]


def test_a_score_tells_the_energy_only_with_its_source():
    only = score_row(Store().sustained(3, watts=500.0).compare(), "GPU A")
    assert (only.watts, only.energy_source) == (500.0, "nvml")
    assert only.steps["convnet_fp32"].images_per_joule.value == pytest.approx(2.0)
    store = Store().sustained(3, watts=500.0)
    for run in store.runs:
        del run["tags"]["sustained.energy_source"]
    only = score_row(store.compare(), "GPU A")
    assert only.watts is None and only.steps["convnet_fp32"].images_per_joule is None


def test_without_a_score_there_is_none():
    assert two().compare().parts[0].score is None


# --- the figures of a row


def test_a_time_by_epoch_is_the_median_of_each_runs_epochs():
    store = Store().add(1)
    (run,) = store.runs
    store.courses[run["run_id"]]["time/train_seconds"] = [9.0, 1.0, 1.2, 1.1]
    run["metrics"] |= {"speed/train_images_per_second": 1000.0, "time/train_seconds": 1.1}
    only = row(store.compare(), "GPU A")
    assert only.values["epoch_seconds"] == [pytest.approx(1.15)]
    assert only.values["images_per_second"] == [pytest.approx(1100 / 1.15)]


def test_features_computed_once_stand_in_place_of_images_trained():
    metrics = {"speed/train_images_per_second": None, "speed/feature_images_per_second": 3094.4}
    figures = row(Store().add(2, metrics=metrics).compare(), "GPU A").figures
    assert figures["feature_images_per_second"].value == 3094.4 and "images_per_second" not in figures


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0, 0.0, 1.7976931348623157e308])
def test_what_is_no_measurement_is_left_out(wrong):
    store = Store().add(4)
    store.runs[0]["metrics"] |= {"time/total_seconds": wrong, "memory/peak_mib": wrong}
    a = row(store.compare(), "GPU A")
    assert len(a.head.runs) == 4 and a.figures["total_seconds"].n == a.figures["peak_mib"].n == 3
    json.dumps(report.as_json(store.compare()), allow_nan=False)


@pytest.mark.parametrize("wrong", [math.nan, -0.1, 1.1, 1e200])
def test_what_is_no_accuracy_is_left_out(wrong):
    store = Store().add(4)
    store.runs[0]["metrics"]["test/accuracy"] = wrong
    assert row(store.compare(), "GPU A").figures["test_accuracy"].n == 3


def test_numbers_of_any_size_make_a_report():
    store = two()
    for size in (1e-300, 1e299):
        store.add(3, seconds=size, machine=f"{size}", metrics={"memory/peak_mib": size, "test/accuracy": 0.75})
        store.sustained(3, speed=size, seconds=1 / size, machine=f"step {size}")
    json.dumps(report.as_json(store.compare()), allow_nan=False)
    report.markdown(store.compare())


def test_the_run_that_is_shown_is_the_most_typical_one():
    only = row(Store().add(5, seconds=10.0).compare(), "GPU A")
    assert only.shown["id"].startswith("00000001")  # of 10.0 s, the median
    assert only.shown["link"] == link("7", only.shown["id"])
    assert len(only.course) == EPOCHS and only.course[-1] == (pytest.approx(10.0), 0.75)


def test_energies_of_two_sources_are_no_figure():
    store = Store().add(2, metrics={"energy/images_per_joule": 5.0}, energy__source="nvml")
    assert row(store.compare(), "GPU A").figures["images_per_joule"].value == 5
    store.runs[0]["tags"]["energy.source"] = "powermetrics"
    only = row(store.compare(), "GPU A")
    assert "images_per_joule" not in only.figures and only.energy_source == ""


@pytest.mark.parametrize(("device", "kind"), [("cuda:1", "tensors"), ("cpu", "process"), ("mps", "driver")])
def test_memory_is_told_with_what_it_is_of(device, kind):
    assert row(Store().add(1, device=device).compare(), "GPU A").memory_of == kind


# --- the time to an accuracy


def test_the_target_is_the_recipes():
    found = two().compare()
    assert sections(found)[0].target == 0.5
    b = row(found, "GPU B")
    assert b.reached == (3, 3) and b.figures["seconds_to_target"].value == pytest.approx(2.5)


def test_where_some_never_reached_it_there_is_no_median():
    store = Store().add(5)
    for run in store.runs[3:]:
        del run["metrics"]["time/to_target_seconds"]
    only = row(store.compare(), "GPU A")
    assert only.reached == (3, 5) and "seconds_to_target" not in only.figures
    assert len(only.values["seconds_to_target"]) == 3


def test_without_a_target_there_is_no_time_to_it():
    found = Store().add(3, params={"target_accuracy": "null"}).compare()
    assert sections(found)[0].target is None and row(found, "GPU A").reached is None


def test_a_course_that_is_not_whole_is_not_guessed():
    store = Store().add(1)
    store.courses[store.runs[0]["run_id"]]["time/val_seconds"].pop()
    assert row(store.compare(), "GPU A").course == []
    store = Store().add(1)
    store.runs[0]["metrics"]["time/total_seconds"] = 1.0  # shorter than its epochs
    assert row(store.compare(), "GPU A").course == []


def test_courses_are_read_once_and_only_of_runs_that_are_shown():
    store = two().add(10, params={"precision": "bf16"}, seconds=99.0)
    store.compare()
    assert len(store.asked) == len(set(store.asked)) == 6


# --- prices


def test_a_job_costs_its_process_in_the_currency_of_its_price():
    prices = {"GPU A": price(per_hour=3.6), "GPU B": price(buy=26_298.0, machine="a desktop", currency="USD")}
    found = two().compare(prices)
    a, b = row(found, "GPU A").costs, row(found, "GPU B").costs
    assert (a.rented, a.bought, a.currency) == (pytest.approx(0.03), None, "EUR")
    assert (b.rented, b.bought, b.currency) == (None, pytest.approx(25 / 3600), "USD")


def test_images_for_money_are_those_of_the_first_step():
    found = Store().sustained(3, speed=1000.0).compare({"GPU A": price(per_hour=3.6)})
    assert score_row(found, "GPU A").costs.rented == pytest.approx(1_000_000)


def test_without_a_price_nothing_is_invented():
    assert row(two().compare(), "GPU A").costs is None
    found = two().compare({"GPU a": price(per_hour=1.0)})
    assert row(found, "GPU A").costs is None and found.unused_prices == ["GPU a"]


def test_the_price_of_a_card_names_its_machine():
    line = fails(UsageError, lambda: two().compare({"GPU A": price(buy=900.0)}))
    assert line.startswith("prices: GPU A.machine: missing")
    two().compare({"GPU A": price(buy=900.0, machine="a desktop"), "GPU B": price(per_hour=1.0)})
    Store().add(1, backend="cpu", device="cpu").compare({"GPU A": price(buy=900.0)})


# --- what to do next


@pytest.mark.parametrize(
    ("store", "words"),
    [
        (Store(), "No finished runs yet"),
        (Store().add(2), "One machine so far"),
        (Store().add(2).add(1, machine="b" * 12, workload="w2"), "2 machines, but no two did the same work"),
        (Store().add(2).add(1, machine="b" * 12, params={"precision": "bf16"}), ""),
        (Store().add(2, fallback="data").add(2, fallback="data", machine="b" * 12), "every run is a DEMO"),
        (Store().add(1, fallback="data", machine="b" * 12).add(1), "One machine so far"),
        (Store().sustained(1).sustained(1, machine="b" * 12, workload="w2"), ""),
        (two(), ""),
    ],
)
def test_a_store_with_nothing_to_compare_says_what_to_do(store, words):
    advice = store.compare().advice
    assert words in advice and bool(words) == bool(advice)


# --- the score's own clock and choice


def test_the_scores_sessions_are_of_its_own_measurement():
    store = Store().sustained(5).sustained(5, hardware="GPU B", machine="b" * 12, speed=500.0)
    for number, run in enumerate(store.runs):
        run["tags"]["sustained.started"] = str(1_760_000_000_000 + 180_000 * number)
    found = store.compare()
    assert score_row(found, "GPU A").head.sessions == 1
    assert row(found, "GPU A").head.sessions == 5
    claim = score_row(found, "GPU B").steps["convnet_fp32"].claim
    assert claim.speedup.high / claim.speedup.low > 1.03**2  # widened: all within an hour


def test_a_machines_first_planned_set_is_its_score_whatever_came_of_it():
    store = Store().sustained(4, planned=5, speed=1000.0, recipe="blog", workload="w2")
    store.sustained(5, speed=1200.0)
    found = store.compare()
    shown = score_row(found, "GPU A")
    assert shown.recipe == "blog" and shown.head.problem
    (part,) = found.parts
    assert [len(other.runs) for other in part.score.others] == [5]


def test_a_score_that_was_measured_again_is_not_claimed_of():
    store = Store().sustained(5).sustained(5, hardware="GPU B", machine="b" * 12, speed=500.0)
    store.runs[2]["tags"]["sustained.attempts"] = "2"
    found = store.compare()
    assert score_row(found, "GPU A").head.problem == "the score of 1 of 5 runs was measured more than once"
    assert score_row(found, "GPU A").steps["convnet_fp32"].claim.kind == "problem"


def test_a_scores_threads_are_those_of_its_steps():
    store = Store().sustained(3, software__threads="1", sustained__threads="4")
    found = store.compare()
    assert score_row(found, "GPU A [CPU threads 4]").head.conditions["threads"] == "4"
    assert row(found, "GPU A [CPU threads 1]").head.conditions["threads"] == "1"


def test_decoding_is_taken_off_the_whole_process():
    store = Store().add(3, metrics={"time/data_seconds": 5.0, "time/process_seconds": 25.0})
    assert row(store.compare(), "GPU A").values["process_seconds"] == [20.0] * 3
