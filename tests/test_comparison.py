"""Runs into groups, groups into tables: what is compared with what, and the figures of a row."""

import json
import math
from dataclasses import replace

import pytest
from conftest import fails
from made import BETWEEN, EPOCHS, Store, link, row, sections, table, two

from pipeline import config, noise, report, stats
from pipeline.errors import UsageError

PRICE = config.Price(buy=None, per_hour=None, currency="EUR", date="2000-01-01", source="https://example.org")


def names(found, place=0, kind="work"):
    return [each.name for each in table(found, place, kind).rows]


def kinds(found, place=0, kind="work"):
    return {each.name: each.claim.kind for each in table(found, place, kind).rows}


# --- groups


def test_runs_of_one_machine_work_and_settings_are_a_group():
    found = Store().add(3).compare()
    only = row(found, "GPU A")
    assert len(only.runs) == 3 and only.figures["total_seconds"].n == 3
    assert (found.runs, found.machines) == (3, 1)


@pytest.mark.parametrize("key", ["precision", "channels_last", "compile", "graph", "features", "threads"])
def test_another_execution_setting_is_another_group(key):
    found = Store().add(3).add(2, params={key: "other"}, seconds=1.0).compare()
    same, best = sections(found)[0].tables
    assert [len(each.runs) for each in same.rows] == [3] and [len(each.runs) for each in best.rows] == [2]
    assert same.settings["precision"] == "fp32" and best.settings is None


def test_each_device_of_a_machine_is_a_row():
    found = Store().add(2).add(2, device="cuda:1").add(2, device="cpu", hardware="CPU", seconds=90.0).compare()
    assert names(found) == ["GPU A [aaaaaa cuda:1]", "GPU A [aaaaaa cuda]", "CPU"]


def test_another_version_of_torch_is_shown_and_no_other_group():
    found = Store().add(2).add(1, software__torch="2.11.0").compare()
    assert row(found, "GPU A").torch == "2.11.0, 2.14.1"


def test_a_training_in_two_experiments_is_one_run():
    store = Store().add(1, record="r1").add(1, record="r1").add(1, record="r2")
    assert len(row(store.compare(), "GPU A").runs) == 2


def test_unlike_workloads_are_never_in_one_table():
    found = two().add(2, workload="w2", recipe="blog", machine="c" * 12).compare()
    assert [(each.workload, each.title) for each in sections(found)] == [
        ("w1", "finetune on cifar10 with pretrained weights"), ("w2", "blog on cifar10 with pretrained weights"),
    ]  # fmt: skip
    assert [len(each.tables[0].rows) for each in sections(found)] == [2, 1]


def test_what_another_version_of_the_code_executed_is_in_no_table_with_the_rest():
    older, own, newer = (str(config.EXECUTION_VERSION + step) for step in (-1, 0, 1))
    store = Store().add(3, seconds=20.0, software__execution=older).add(3, software__execution=own)
    store = store.add(2, machine="b" * 12, hardware="GPU B", software__execution=own).add(1, software__execution=newer)
    found = store.compare()
    title = "finetune on cifar10 with pretrained weights"
    assert [(each.version, report.heading(each)) for each in sections(found)] == [
        (own, title),
        (older, f"{title}, executed by version {older} of the code"),
        (newer, f"{title}, executed by version {newer} of the code"),
    ]
    assert [[len(each.runs) for each in section.tables[0].rows] for section in sections(found)] == [[3, 2], [3], [1]]
    places = [report.place(*each) for each in report.tables(found)]
    assert places == [
        "work-w1/same-settings",
        f"work-w1-version-{older}/same-settings",
        f"work-w1-version-{newer}/same-settings",
    ]


def test_runs_from_before_it_was_told_are_the_first_versions():
    found = Store().add(1, software__execution=None).add(1, machine="b" * 12, software__execution="1").compare()
    assert [(each.version, len(each.tables[0].rows)) for each in sections(found)] == [("1", 2)]


def test_machines_are_named_by_hardware_and_the_newest_label():
    found = Store().add(1, label="old").add(1, label="under the desk").add(1).add(1, machine="b" * 12).compare()
    assert set(names(found)) == {"GPU A (under the desk)", "GPU A"}


def test_what_is_named_alike_is_told_apart():
    found = Store().add(1).add(1, machine="b" * 12).compare()
    assert set(names(found)) == {"GPU A [aaaaaa cuda]", "GPU A [bbbbbb cuda]"}


def test_no_text_of_a_user_breaks_a_line():
    only = row(Store().add(1, hardware="GPU\nA\x00\x1b[1m", label="left | right\t<b>").compare(), "GPU A")
    assert only.name == "GPU A [1m (left | right <b>)"


# --- the two kinds of tables


def test_the_same_settings_are_those_that_most_machines_ran_at_fp32():
    store = two().add(5, machine="c" * 12, params={"threads": "4"}, hardware="C")
    found = store.add(9, machine="a" * 12, params={"precision": "bf16"}, seconds=3.0).compare()
    same, best = sections(found)[0].tables
    assert {each.hardware for each in same.rows} == {"GPU A", "GPU B"} and same.settings["threads"] == "null"
    assert same.absent == ["C"] and best.absent == []
    assert [(each.hardware, each.settings["precision"], each.settings["threads"]) for each in best.rows] == [
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


def test_a_sentence_of_bests_names_their_precisions():
    found = two(3, 4).add(3, params={"precision": "bf16"}, seconds=2.0).compare()
    assert "GPU A at bf16 is 2.4" in row(found, "GPU A", 1).claim.sentence
    assert "times as fast as GPU B at fp32" in row(found, "GPU A", 1).claim.sentence
    assert table(found, 1).reference == "GPU B at fp32"


def test_rows_stand_best_first_and_those_without_a_time_last():
    store = two().add(2, machine="c" * 12, hardware="C", metrics={"time/total_seconds": None})
    assert names(store.compare()) == ["GPU B", "GPU A", "C"]
    assert kinds(store.compare())["C"] == "alone"


# --- the reference


def test_the_reference_is_the_machine_with_the_most_runs_then_the_first_by_name():
    assert table(two(3, 4).compare()).reference == "GPU B"
    assert table(two(3, 3).compare()).reference == "GPU A"


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


def test_a_row_is_compared_by_its_total_time():
    found = two().compare()
    assert kinds(found) == {"GPU B": "faster", "GPU A": "reference"}
    a, b = row(found, "GPU A"), row(found, "GPU B")
    assert b.claim.speedup == stats.ratio(a.values["total_seconds"], b.values["total_seconds"])
    assert b.claim.speedup.value == pytest.approx(2)
    assert "GPU B is 1.9" in b.claim.sentence and "(n = 3 and 3, same accuracy" in b.claim.sentence


def test_intervals_are_shared_among_the_machines_that_have_one():
    store = two(3, 3)
    for machine in "cd":
        store.add(2, machine=machine * 12, hardware=machine)
    store.add(1, machine="e" * 12, hardware="e").add(3, machine="f" * 12, hardware="f", taints="load")
    found = table(store.compare())
    assert found.comparisons == 3  # B, c and d; e has one run, f is tainted
    assert found.level == pytest.approx(1 - 0.05 / 3)


def test_a_best_picked_among_several_counts_every_pair_it_might_have_been():
    store = two()
    for precision in ("bf16", "fp16"):
        store.add(3, params={"precision": precision}, seconds=3.0)
        store.add(3, machine="b" * 12, hardware="GPU B", params={"precision": precision}, seconds=4.0)
    same, best = sections(store.compare())[0].tables
    assert (same.comparisons, best.comparisons) == (1, 9)


@pytest.mark.parametrize(("first", "second", "kind"), [(3, 1, "single"), (3, 2, "few"), (3, 3, "faster")])
def test_a_claim_needs_three_runs_of_either(first, second, kind):
    assert kinds(two(first, second).compare())["GPU B"] == kind


def test_where_accuracies_differ_no_speed_up_is_claimed():
    found = two(accuracy=0.70).compare()
    assert kinds(found)["GPU B"] == "parity" and row(found, "GPU B").claim.speedup is None


def test_the_final_accuracy_is_that_on_test_images_else_on_validation_images():
    untested = {"test/accuracy": None}
    assert kinds(two(metrics=untested).compare())["GPU B"] == "faster"
    assert kinds(two(metrics=untested | {"best/val_accuracy": 0.7}).compare())["GPU B"] == "parity"
    nothing = untested | {"best/val_accuracy": None}
    assert "not known" in row(two(metrics=nothing).compare(), "GPU B").claim.sentence


def test_an_accuracy_of_0_is_one():
    found = two(metrics={"test/accuracy": 0.0}).compare()
    assert row(found, "GPU B").figures["test_accuracy"].value == 0 and kinds(found)["GPU B"] == "parity"


# --- runs that share a process


def unseen(sizes, deviation=BETWEEN["cuda"].deviation, degrees=BETWEEN["cuda"].degrees):
    return stats.between_processes(sizes, deviation**2, degrees)


def test_repeats_of_one_process_are_runs_whose_intervals_hold_what_they_can_not_show():
    only = row(Store().repeats(5, 1).compare(), "GPU A")
    assert only.processes == [5] and only.spread == "within one process"
    for key in ("total_seconds", "epoch_seconds", "images_per_second"):
        expected = stats.typical(only.values[key], unseen=unseen([5]))
        assert only.figures[key] == pytest.approx(expected)
        assert only.figures[key].high > stats.typical(only.values[key]).high
    assert only.figures["seconds_to_target"][:3] == pytest.approx(only.figures["total_seconds"][:3])  # the last epoch's
    for key in ("peak_mib", "test_accuracy"):  # of which nothing was measured
        calculate = stats.mean if key == "test_accuracy" else stats.typical
        assert only.figures[key] == calculate(only.values[key])


def test_a_speed_up_holds_what_processes_of_both_sides_can_not_show():
    store = Store().repeats(5, 1).add(3, machine="b" * 12, hardware="GPU B", seconds=5.0)
    b, a = table(store.compare()).rows
    times = a.values["total_seconds"], b.values["total_seconds"]
    expected = stats.ratio(*times, unseen=[unseen([5]), stats.NONE])
    assert b.claim.speedup == pytest.approx(expected) and expected.high > stats.ratio(*times).high
    assert "(n = 3 in 3 processes and 5 in one process, same accuracy" in b.claim.sentence


def test_what_is_within_the_spread_of_processes_is_no_difference():
    """Between processes of this kind 2% were measured; within one these differ by less."""
    store = Store().repeats(5, 1).repeats(5, 2, machine="b" * 12, hardware="GPU B", seconds=9.6)
    assert kinds(store.compare()) == {"GPU B": "none", "GPU A": "reference"}
    store = Store().add(5).add(5, machine="b" * 12, hardware="GPU B", seconds=9.6)
    assert kinds(store.compare()) == {"GPU B": "faster", "GPU A": "reference"}


def test_several_processes_of_several_repeats():
    store = Store().repeats(5, 1).repeats(5, 2).repeats(3, 3, machine="b" * 12).add(2, machine="b" * 12)
    a, b = (each for each in sorted(table(store.compare()).rows, key=lambda each: each.machine))
    assert (a.processes, a.spread) == ([5, 5], "between 2 processes of 5, over 9.0 hours")
    assert (sorted(b.processes), b.spread) == ([1, 1, 3], "between 3 processes of 1 to 3, over 4.0 hours")
    assert a.figures["total_seconds"] == pytest.approx(stats.typical(a.values["total_seconds"], unseen=unseen([5, 5])))


def test_processes_that_differ_by_more_than_was_measured_stand_for_themselves():
    store = Store().repeats(5, 1).repeats(5, 2, seconds=20.0)
    only = row(store.compare(), "GPU A")
    own = noise.components([[math.log(run["metrics"]["time/total_seconds"]) for run in part] for part in
                            (store.runs[:5], store.runs[5:])])  # fmt: skip
    expected = stats.typical(only.values["total_seconds"], unseen=unseen([5, 5], own[1] ** 0.5))
    assert own[1] > BETWEEN["cuda"].deviation ** 2
    assert only.figures["total_seconds"] == pytest.approx(expected)


@pytest.mark.parametrize(("backend", "like"), [("cpu", "cpu"), ("cuda", "cuda"), ("mps", "cpu")])
def test_what_was_measured_on_a_backend_stands_for_it_else_the_largest(backend, like):
    only = row(Store().repeats(3, 1, backend=backend).compare(), "GPU A")
    expected = stats.typical(only.values["total_seconds"], unseen=unseen([3], *BETWEEN[like]))
    assert only.figures["total_seconds"] == pytest.approx(expected)


def test_trainings_on_features_have_a_spread_of_their_own():
    only = row(Store().repeats(3, 1, metrics={"speed/feature_images_per_second": 500.0}).compare(), "GPU A")
    expected = stats.typical(only.values["total_seconds"], unseen=unseen([3], BETWEEN["cuda"].deviation / 2))
    assert only.figures["total_seconds"] == pytest.approx(expected)


def test_runs_of_their_own_say_over_how_many_hours():
    assert row(Store().add(1).compare(), "GPU A").spread == ""
    assert row(Store().add(3).compare(), "GPU A").spread == "between 3 processes, over 2.0 hours"
    store = Store().add(2)
    store.runs[1]["started"] += 25 * 3_600_000
    assert row(store.compare(), "GPU A").spread == "between 2 processes, over 26 hours"


def test_the_repeated_step_is_of_one_run_of_a_process():
    store = Store().repeats(3, 1).repeats(3, 2)
    for run in store.runs[::3]:
        run["metrics"]["speed/sustained_images_per_second"] = 1000.0
        run["tags"]["sustained.workload"] = "s1"
    assert row(store.compare(), "GPU A", kind="step").processes == [1, 1]


def test_what_is_left_of_repeats_is_tainted():
    store = Store().repeats(3, 1, planned=5).repeats(3, 2, machine="b" * 12, hardware="GPU B").add(1)
    found = store.compare()
    assert {(each.name, len(each.runs), each.taints, each.claim.kind) for each in table(found).rows} == {
        ("GPU A", 3, "incomplete", "tainted"), ("GPU A", 1, "", "single"), ("GPU B", 3, "", "reference"),
    }  # fmt: skip
    assert "(incomplete)" in next(each.claim.sentence for each in table(found).rows if each.taints)
    store = Store().repeats(5, 1)
    store.runs.pop(2)
    assert row(store.compare(), "GPU A").taints == "incomplete"


def test_a_number_of_repeats_that_is_none_is_no_plan():
    assert row(Store().add(1, repeats="many").compare(), "GPU A").taints == ""


# --- taints


def test_tainted_runs_have_a_row_of_their_own_and_no_claim():
    found = two().add(2, machine="b" * 12, hardware="GPU B", seconds=7.0, taints="battery load").compare()
    rows = table(found).rows
    assert [(each.name, len(each.runs), each.taints, each.claim.kind) for each in rows] == [
        ("GPU B", 3, "", "faster"), ("GPU B", 2, "battery, load", "tainted"), ("GPU A", 3, "", "reference"),
    ]  # fmt: skip
    assert "(battery, load)" in rows[1].claim.sentence


def test_tainted_runs_are_let_into_claims_where_asked_for_and_stay_marked():
    store = two().add(2, machine="b" * 12, hardware="GPU B", seconds=5.0, taints="load")
    found = store.compare(tainted=True)
    assert [(each.name, len(each.runs), each.taints, each.claim.kind) for each in table(found).rows] == [
        ("GPU B", 5, "load", "reference"), ("GPU A", 3, "", "slower"),
    ]  # fmt: skip
    assert found.tainted


def test_a_tainted_machine_is_no_reference():
    found = Store().add(9, taints="load").add(1, machine="b" * 12, hardware="GPU B").compare()
    assert table(found).reference == "GPU B"
    found = Store().add(9, taints="load").compare()
    assert table(found).reference is None and kinds(found) == {"GPU A": "tainted"}


def test_a_best_is_no_tainted_one_where_there_is_another():
    store = two().add(3, params={"precision": "bf16"}, seconds=3.0)
    found = store.add(3, params={"precision": "fp16"}, seconds=1.0, taints="load").compare()
    assert {each.name: each.settings["precision"] for each in table(found, 1).rows} == {
        "GPU A": "bf16",
        "GPU B": "fp32",
    }


def test_demos_stand_apart_and_nothing_is_claimed_of_them():
    store = two().add(3, fallback="device", seconds=1.0).add(3, fallback="device", machine="b" * 12, hardware="GPU B")
    found = store.compare()
    assert kinds(found) == {"GPU B": "faster", "GPU A": "reference"}
    assert [part.demo for part in found.parts] == [False, True]
    assert {(each.claim.kind, each.taints) for each in table(found, demo=True).rows} == {("tainted", "no real device")}
    found = store.compare(tainted=True)
    assert {each.claim.kind for each in table(found, demo=True).rows} == {"reference", "slower"}


# --- the sustained speed


def test_machines_are_ranked_by_their_sustained_speed_whatever_the_recipe():
    store = Store().sustained(3).sustained(3, speed=1500.0, machine="b" * 12, hardware="GPU B", workload="w2")
    found = store.compare()
    assert names(found, kind="step") == ["GPU B", "GPU A"]
    b = row(found, "GPU B", kind="step")
    assert b.claim.kind == "faster" and b.claim.speedup.value == pytest.approx(1.5)
    assert "at this step (n = 3 and 3)" in b.claim.sentence
    assert sections(found, "step")[0].title == "finetune's step, repeated for 60 s"
    assert [section.kind for section in found.parts[0].sections] == ["step", "work", "work"]


def test_only_the_same_step_is_compared():
    found = Store().sustained(2).sustained(2, machine="b" * 12).add(1, machine="c" * 12).compare()
    assert len(names(found, kind="step")) == 2
    store = Store().sustained(2).sustained(2, machine="b" * 12)
    store.runs[-1]["tags"]["sustained.workload"] = store.runs[-2]["tags"]["sustained.workload"] = "s2"
    assert [each.workload for each in sections(store.compare(), "step")] == ["s1", "s2"]


def test_the_step_has_taints_of_its_own():
    store = Store().sustained(3).sustained(3, machine="b" * 12, hardware="GPU B", taints="thermal")
    found = store.compare()
    assert kinds(found, kind="step") == {"GPU A": "reference", "GPU B": "tainted"}
    assert "tainted" not in kinds(found).values()


def test_features_are_no_setting_of_the_step():
    store = Store().sustained(2).sustained(2, params={"features": "recompute"})
    assert len(row(store.compare(), "GPU A", kind="step").runs) == 4


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
    store = two().add(1, metrics={"time/total_seconds": wrong, "memory/peak_mib": wrong})
    a = row(store.compare(), "GPU A")
    assert len(a.runs) == 4 and a.figures["total_seconds"].n == a.figures["peak_mib"].n == 3
    json.dumps(report.as_json(store.compare()), allow_nan=False)


@pytest.mark.parametrize("wrong", [math.nan, -0.1, 1.1, 1e200])
def test_what_is_no_accuracy_is_left_out(wrong):
    store = two().add(1, metrics={"test/accuracy": wrong})
    assert row(store.compare(), "GPU A").figures["test_accuracy"].n == 3


def test_numbers_of_any_size_make_a_report():
    store = two()
    for size in (1e-300, 1e299):
        store.add(2, seconds=size, machine=f"{size}", metrics={"memory/peak_mib": size, "test/accuracy": 0.75})
        store.sustained(3, speed=size, seconds=1 / size, machine=f"step {size}")
    json.dumps(report.as_json(store.compare()), allow_nan=False)
    report.markdown(store.compare())


def test_the_run_that_is_shown_is_the_most_typical_one():
    found = Store().add(5, seconds=10.0).compare()
    only = row(found, "GPU A")
    assert only.shown["id"].startswith("00000001")  # of 10.0 s, the median
    assert only.shown["link"] == link("7", only.shown["id"])
    assert len(only.course) == EPOCHS and only.course[-1] == (pytest.approx(10.0), 0.75)


def test_energies_of_two_sources_are_no_figure():
    metrics = {"energy/images_per_joule": 5.0}
    store = Store().add(2, metrics=metrics, energy__source="nvml")
    assert row(store.compare(), "GPU A").figures["images_per_joule"].value == 5
    store.add(1, metrics=metrics, energy__source="meter")
    only = row(store.compare(), "GPU A")
    assert "images_per_joule" not in only.figures and only.energy_source == "meter and nvml"


def test_an_energy_of_nobody_knows_what_is_no_figure():
    store = Store().sustained(2)
    for run in store.runs:
        run["metrics"]["energy/sustained_images_per_joule"] = 5.0
    assert "images_per_joule" not in row(store.compare(), "GPU A", kind="step").figures
    for run in store.runs:
        run["tags"]["sustained.energy_source"] = "nvml"
    only = row(store.compare(), "GPU A", kind="step")
    assert (only.figures["images_per_joule"].value, only.energy_source) == (5, "nvml")


def test_energy_is_told_where_both_have_the_same_source():
    store = Store().add(3, metrics={"energy/images_per_joule": 5.0}, energy__source="nvml")
    other = {"machine": "b" * 12, "hardware": "GPU B", "seconds": 5.0}
    store.add(3, metrics={"energy/images_per_joule": 12.0}, energy__source="nvml", **other)
    assert row(store.compare(), "GPU B").claim.sentence.endswith(", with 2.4 times its images per joule (nvml).")
    for run in store.runs[:3]:
        run["tags"]["energy.source"] = "meter"
    assert "joule" not in row(store.compare(), "GPU B").claim.sentence


def test_memory_of_a_process_is_not_compared_with_that_of_a_device():
    metrics = {"memory/peak_mib": 500.0}
    assert ", at 0.5 of its memory." in row(two(metrics=metrics).compare(), "GPU B").claim.sentence
    assert "memory" not in row(two(metrics=metrics, device="cpu").compare(), "GPU B").claim.sentence


# --- the time to an accuracy


def test_the_target_is_the_lowest_groups_final_accuracy_rounded_down():
    found = two(accuracy=0.7392).compare()
    assert sections(found)[0].target == 0.73
    b = row(found, "GPU B")
    assert b.reached == (3, 3)
    assert b.figures["seconds_to_target"].value == pytest.approx(5.0)  # in the last epoch


def test_the_time_runs_from_the_beginning_to_the_end_of_the_epoch_that_reached_it():
    store = Store().add(1).add(1, machine="b" * 12, accuracy=0.3, hardware="GPU B")
    store.runs[0]["metrics"]["time/total_seconds"] = 14.0  # 4 of them before the first epoch
    only = row(store.compare(), "GPU A")
    assert [seconds for seconds, _ in only.course] == pytest.approx([6.5, 9.0, 11.5, 14.0])
    assert only.figures["seconds_to_target"].value == pytest.approx(9.0)  # 0.375 in the second


def test_never_reached_is_said_and_not_imputed():
    store = Store().add(3)
    finals = (0.751, 0.749, 0.745)
    for run, accuracy in zip(store.runs, finals, strict=True):
        store.courses[run["run_id"]]["val/accuracy"] = [0.1, 0.2, 0.3, accuracy]
    found = store.compare()
    assert sections(found)[0].target == 0.74 and row(found, "GPU A").reached == (3, 3)
    store.courses[store.runs[2]["run_id"]]["val/accuracy"][-1] = 0.739
    found = store.compare()
    only = row(found, "GPU A")
    assert only.reached == (2, 3)
    assert only.figures["seconds_to_target"] == (pytest.approx(10.1), None, None, 3)  # the third took longer than any


def test_a_group_of_which_most_never_reached_it_has_no_time():
    store = Store().add(3, accuracy=0.75).add(3, machine="b" * 12, hardware="GPU B", accuracy=0.7, taints="load")
    b = row(store.compare(), "GPU B")  # tainted runs set no target
    assert b.reached == (0, 3) and "seconds_to_target" not in b.figures


def test_a_course_that_is_not_whole_is_not_guessed():
    store = Store().add(1)
    store.courses[store.runs[0]["run_id"]]["time/val_seconds"].pop()
    found = store.compare()
    assert row(found, "GPU A").course == [] and row(found, "GPU A").reached is None
    store = Store().add(1, metrics={"time/total_seconds": 1.0})  # shorter than its epochs
    found = store.compare()
    assert row(found, "GPU A").course == [] and row(found, "GPU A").reached is None
    assert sections(found)[0].target is None


def test_courses_are_read_once_and_only_of_runs_that_are_shown():
    store = two().add(20, params={"precision": "bf16"}, seconds=99.0)
    store.compare()
    assert len(store.asked) == len(set(store.asked)) == 6


# --- prices


def test_a_job_costs_its_hours():
    prices = {"GPU A": replace(PRICE, per_hour=3.6, buy=26_298.0), "GPU B": replace(PRICE, buy=26_298.0)}
    found = two().compare(prices)
    assert row(found, "GPU A").costs == {"rented": pytest.approx(0.01), "bought": pytest.approx(10 / 3600)}
    assert row(found, "GPU B").costs == {"bought": pytest.approx(5 / 3600)}
    assert row(found, "GPU B").currency == "EUR"


def test_images_for_money_are_of_the_sustained_speed():
    found = Store().sustained(2, speed=1000.0).compare({"GPU A": replace(PRICE, per_hour=3.6)})
    assert row(found, "GPU A", kind="step").costs == {"rented": pytest.approx(1_005_000)}


def test_without_a_price_nothing_is_invented():
    assert row(two().compare(), "GPU A").costs == {}
    found = two().compare({"GPU a": replace(PRICE, per_hour=1.0)})
    assert row(found, "GPU A").costs == {} and found.unused_prices == ["GPU a"]


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
