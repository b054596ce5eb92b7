"""Groups become tables: what is compared with what, the figures of a row, the score, and that no run is lost."""

import json
import math
from collections import Counter

import pytest
from conftest import fails
from made import EPOCHS, OLDER, B, C, Store, every_kind, kinds, link, price, row, score_row, sections, table, two

from pipeline import config
from pipeline.comparison import charts, content, report, stats
from pipeline.errors import UsageError
from pipeline.profiling.score_steps import STEPS, metric

CONVNET, BEST, TRANSFORMER = (step.name for step in STEPS)


# --- nothing disappears


def shown_runs(heads, others):
    """How often each run is shown: among those of a row, left out of it, or below the table."""
    runs = [run for head in heads for run in (*head.runs, *head.left_out)]
    return Counter(run["id"] for run in [*runs, *(run for other in others for run in other.runs)])


@pytest.mark.parametrize("tainted", [False, True])
def test_every_run_is_in_a_table_or_listed_with_its_reason(tainted):
    store = every_kind()
    comparison = store.compare(tainted=tainted)
    by_record = {run["tags"].get("record", run["run_id"]): run["run_id"] for run in store.runs}
    assert (comparison.runs, comparison.copies) == (len(by_record), 1) and len(by_record) == len(store.runs) - 1
    shown = set()
    for section in (section for part in comparison.parts for section in part.sections):
        heads = [row.head for table in section.tables for row in table.rows]
        in_tables, below = shown_runs(heads, []), shown_runs([], section.others)
        assert not set(in_tables) & set(below) and all(other.reason for other in section.others)
        shown |= set(in_tables) | set(below)
    assert shown == set(by_record.values())
    score = comparison.parts[0].score
    scored = [run["run_id"] for run in store.runs if metric(CONVNET, "images_per_second") in run["metrics"]]
    assert shown_runs([row.head for row in score.rows], score.others) == Counter(scored)


# --- sections and tables


@pytest.mark.parametrize("key", ["precision", "channels_last", "compile", "graph", "features", "threads"])
def test_another_execution_setting_is_another_row(key):
    comparison = Store().add(3).add(2, params={key: "other"}, seconds=1.0).compare()
    same, best = sections(comparison)[0].tables
    assert [[len(row.head.runs) for row in table.rows] for table in (same, best)] == [[3], [2]]
    assert same.settings["precision"] == "fp32" and best.settings is None


def test_another_version_of_the_code_has_its_own_section_without_claims():
    store = two().add(3, software__execution=OLDER).add(3, software__execution=OLDER, **B, seconds=5.0)
    comparison = store.add(1, software__execution=None).compare()
    current, older, oldest = sections(comparison)
    assert [section.version for section in (current, older, oldest)] == [str(config.EXECUTION_VERSION), OLDER, "1"]
    assert {row.claim.kind for row in older.tables[0].rows} == {"reference", "problem"}
    assert {row.claim.kind for row in current.tables[0].rows} == {"reference", "faster"}
    texts = content.section_texts(comparison.parts[0])
    assert f"version {OLDER}" in texts[1].heading and texts[1].tables[0].claims == []
    assert texts[0].heading == current.title and len(texts[0].tables[0].claims) == 1


def test_demos_have_their_own_part_without_claims():
    store = two().add(3, fallback="device", seconds=1.0).add(3, fallback="device", **B)
    comparison = store.compare()
    assert kinds(comparison) == {"GPU B": "faster", "GPU A": "reference"}
    assert [part.demo for part in comparison.parts] == [False, True]
    assert {row.head.problem for row in table(comparison, demo=True).rows} == {"no real device"}
    assert set(kinds(comparison, demo=True).values()) == {"reference", "problem"}
    assert set(kinds(store.compare(tainted=True), demo=True).values()) == {"reference", "slower"}


def test_the_same_settings_are_those_that_most_machines_ran_at_fp32():
    store = two().add(5, **C, params={"threads": "4"}).add(9, params={"precision": "bf16"}, seconds=3.0)
    same, best = sections(store.compare())[0].tables
    assert {row.head.hardware for row in same.rows} == {"GPU A", "GPU B"} and same.settings["threads"] == "null"
    assert [(row.head.hardware, row.settings["precision"], row.settings["threads"]) for row in best.rows] == [
        ("GPU A", "bf16", "null"), ("GPU B", "fp32", "null"), ("C", "fp32", "4"),
    ]  # fmt: skip


def test_a_second_table_with_the_same_rows_is_omitted():
    (only,) = sections(two().add(2, params={"precision": "bf16"}, seconds=99.0).compare())[0].tables
    assert only.settings["precision"] == "fp32"


def test_a_best_is_undisturbed_and_compared_only_if_both_ran_both_precisions():
    store = two(3, 4).add(3, params={"precision": "bf16"}, seconds=2.0)
    store.add(3, params={"precision": "fp16"}, seconds=1.0, taints="load")
    a = row(store.compare(), "GPU A", 1)
    assert (a.claim.kind, a.claim.reason, a.settings["precision"]) == ("other", "GPU B was not run in bf16", "bf16")
    store.add(3, **B, params={"precision": "bf16"}, seconds=50.0)
    claim = row(store.compare(), "GPU A", 1).claim
    assert claim.kind == "faster" and "GPU A at bf16" in claim.sentence and "GPU B at fp32" in claim.sentence


def test_the_fastest_is_first_and_those_without_a_time_last():
    comparison = two().add(2, **C, metrics={"time/total_seconds": None}).compare()
    assert list(kinds(comparison).items()) == [("GPU B", "faster"), ("GPU A", "reference"), ("C", "alone")]


# --- the reference


def test_the_reference_has_the_most_claimable_runs_then_the_first_name():
    stores = [two(3, 4), two(3, 3), Store().add(9, taints="load").add(1, **B)]
    assert [table(store.compare()).reference for store in stores] == ["GPU B", "GPU A", "GPU B"]


@pytest.mark.parametrize("reference", ["b" * 12, "bbb", "under the desk", "DESK", "GPU B", "gpu b"])
def test_a_reference_is_named_by_fingerprint_label_or_hardware_or_a_part_of_it(reference):
    comparison = two(5, 3, label="under the desk").compare(reference=reference)
    assert table(comparison).reference == "GPU B (under the desk)"
    assert kinds(comparison) == {"GPU B (under the desk)": "reference", "GPU A": "slower"}


@pytest.mark.parametrize(
    ("reference", "allowed"),
    [("GPU X", "null | a fingerprint | GPU A | GPU B | mine; did you mean GPU"), ("gpu", "GPU A | GPU B")],
)
def test_a_reference_that_names_no_machine_or_several_is_refused(reference, allowed):
    message = fails(UsageError, lambda: two(label="mine").compare(reference=reference))
    assert message.startswith(f'compare.reference: "{reference}"') and f"expected {allowed}" in message


def test_unlike_workloads_are_in_sections_of_their_own_and_not_compared_without_the_reference():
    first, second = sections(two().add(2, workload="w2", recipe="blog", **C).compare(reference="C"))
    assert (first.workload, second.workload) == ("w1", "w2") and second.title.startswith("blog on cifar10")
    assert [section.tables[0].reference for section in (first, second)] == [None, "C"]
    assert [[row.claim.kind for row in section.tables[0].rows] for section in (first, second)] == [
        ["alone", "alone"], ["reference"],
    ]  # fmt: skip


# --- claims


@pytest.mark.parametrize(("process", "kind"), [(25.0, "faster"), (99.0, "slower"), (None, "alone")])
def test_a_row_is_compared_by_its_total_time_and_by_its_process(process, kind):
    comparison = two(metrics={"time/process_seconds": process}).compare()
    a, b = row(comparison, "GPU A"), row(comparison, "GPU B")
    assert a.claim.kind == a.whole.kind == "reference" and (b.claim.kind, b.whole.kind) == ("faster", kind)
    for claim, key in ((b.claim, "total_seconds"), (b.whole, "process_seconds")):
        if key in b.values:
            assert claim.speedup[:3] == pytest.approx(stats.ratio(a.values[key], b.values[key])[:3])


def test_intervals_are_widened_for_every_pair_that_could_be_claimed():
    store = two(3, 3).add(3, **C).add(2, machine="d" * 12, hardware="few").add(3, machine="e" * 12, taints="load")
    work = table(store.compare())
    assert work.comparisons == 2 and work.level == pytest.approx(1 - 0.05 / 2)
    store = two()
    for precision in ("bf16", "fp16"):
        store.add(3, params={"precision": precision}, seconds=3.0)
        store.add(3, **B, params={"precision": precision}, seconds=4.0)
    assert [table.comparisons for table in sections(store.compare())[0].tables] == [1, 9]


@pytest.mark.parametrize(
    ("change", "kind"),
    [({}, "faster"), ({"second": 2}, "few"), ({"planned": 5}, "problem"), ({"taints": "load"}, "problem"),
     ({"accuracy": 0.70}, "parity"), ({"behavior": "throttled"}, "faster"),
     ({"metrics": {"test/accuracy": None}}, "faster"), ({"metrics": {"test/accuracy": 0.0}}, "parity"),
     ({"metrics": {"test/accuracy": None, "best/val_accuracy": 0.7}}, "parity"),
     ({"metrics": {"test/accuracy": None, "best/val_accuracy": None}}, "parity"),
     ({"seeds": [0, 0, 1]}, "parity")],  # a seed that ran twice is one accuracy
)  # fmt: skip
def test_what_makes_and_what_ends_a_claim(change, kind):
    assert kinds(two(**change).compare())["GPU B"] == kind


# --- the figures of a row


def test_epoch_figures_are_of_the_median_epoch():
    store = Store().add(1)
    (run,) = store.runs
    store.courses[run["run_id"]]["time/train_seconds"] = [9.0, 1.0, 1.2, 1.1]
    run["metrics"] |= {"speed/train_images_per_second": 1000.0, "time/train_seconds": 1.1}
    values = row(store.compare(), "GPU A").values
    assert values["epoch_seconds"] == [pytest.approx(1.15)]
    assert values["images_per_second"] == [pytest.approx(1100 / 1.15)]


@pytest.mark.parametrize(
    ("key", "figure", "wrong"),
    [("time/total_seconds", "total_seconds", [math.nan, math.inf, -1.0, 0.0, 1e-300, 1.7976931348623157e308]),
     ("test/accuracy", "test_accuracy", [math.nan, -0.1, 1.1, 1e200])],
)  # fmt: skip
def test_a_value_that_cannot_be_measured_is_left_out(key, figure, wrong):
    store = Store().add(4 + len(wrong))
    for run, value in zip(store.runs, wrong, strict=False):
        run["metrics"][key] = value
    a = row(store.compare(), "GPU A")
    assert (len(a.head.runs), a.figures[figure].n) == (4 + len(wrong), 4)


def test_values_of_any_size_make_a_report():
    store = two()
    for size in (1e-90, 1e90):
        store.add(3, seconds=size, machine=f"{size}", metrics={"memory/peak_mib": size, "test/accuracy": 0.75})
        store.sustained(3, speed=size, seconds=1 / size, machine=f"step {size}")
    comparison = store.compare()
    json.dumps(report.as_json(comparison), allow_nan=False)
    assert all(run["run_id"][:8] in report.markdown(comparison) for run in store.runs[::3])
    assert set(charts.charts(comparison)) == {"score", "work-w1/same-settings"}


def test_the_run_that_is_shown_is_the_most_typical_one():
    a = row(Store().add(5, seconds=10.0).compare(), "GPU A")
    assert a.shown == {"id": f"{1:08x}" + "0" * 24, "link": link("7", f"{1:08x}" + "0" * 24)}  # the median, 10.0 s
    assert len(a.course) == EPOCHS and a.course[-1] == (pytest.approx(10.0), 0.75)


def test_a_course_that_is_not_whole_is_not_guessed():
    short, impossible = Store().add(1), Store().add(1)
    short.courses[short.runs[0]["run_id"]]["time/val_seconds"].pop()
    impossible.runs[0]["metrics"]["time/total_seconds"] = 1.0  # shorter than its epochs
    assert [row(store.compare(), "GPU A").course for store in (short, impossible)] == [[], []]


def test_energies_of_two_sources_are_not_pooled():
    store = Store().add(2, metrics={"energy/images_per_joule": 5.0}, energy__source="nvml")
    assert row(store.compare(), "GPU A").figures["images_per_joule"].value == 5
    store.runs[0]["tags"]["energy.source"] = "rapl"
    a = row(store.compare(), "GPU A")
    assert "images_per_joule" not in a.figures and a.energy_source == ""


@pytest.mark.parametrize(("device", "kind"), [("cuda:1", "tensors"), ("cpu", "process"), ("mps", "driver")])
def test_memory_has_its_kind(device, kind):
    assert row(Store().add(1, device=device).compare(), "GPU A").memory_of == kind


@pytest.mark.parametrize(("data", "expected"), [(5.0, [20.0] * 3), (30.0, None)])
def test_decoding_is_subtracted_from_the_whole_process(data, expected):
    store = Store().add(3, metrics={"time/data_seconds": data, "time/process_seconds": 25.0})
    assert row(store.compare(), "GPU A").values.get("process_seconds") == expected


# --- the score


def test_machines_are_ranked_by_their_score_whatever_the_recipe():
    comparison = Store().sustained(3).sustained(3, speed=1500.0, **B, workload="w2").compare()
    score, b = comparison.parts[0].score, score_row(comparison, "GPU B")
    assert [row.head.name for row in score.rows] == ["GPU B", "GPU A"] and score.reference == "GPU A"
    for step in STEPS:
        claim = b.steps[step.name].claim
        assert claim.kind == "faster" and claim.speedup.value == pytest.approx(1.5) and step.title in claim.sentence
    assert score.level == pytest.approx(1 - 0.05 / 3)
    assert [b.steps[step].precision for step in (CONVNET, BEST)] == ["fp32", "bf16"]


def test_only_the_same_step_is_compared_by_the_runs_that_have_it():
    store = Store().sustained(4).sustained(4, **B, batch=128)
    for run in store.runs[:4]:
        del run["metrics"][metric(BEST, "images_per_second")]
    store.runs[0]["metrics"][metric(CONVNET, "images_per_second")] = math.nan
    comparison = store.compare()
    steps = score_row(comparison, "GPU B").steps
    assert {name: (step.claim.kind, step.claim.reason) for name, step in steps.items()} == {
        CONVNET: ("other", "batch 128 against 256"), BEST: ("other", "GPU A did not run it"),
        TRANSFORMER: ("none", "no difference found"),
    }  # fmt: skip
    assert {name: step.speed.n for name, step in score_row(comparison, "GPU A").steps.items()} == {
        CONVNET: 3, TRANSFORMER: 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("tags", "kind", "behavior"),
    [({"taints": "load"}, "problem", []), ({"sustained__behavior": "throttled"}, "faster", ["throttled"])],
)
def test_the_score_has_its_own_taints_and_behavior(tags, kind, behavior):
    comparison = Store().sustained(3).sustained(3, **B, speed=1500.0, **tags).compare()
    b = score_row(comparison, "GPU B")
    assert (b.steps[CONVNET].claim.kind, b.head.behavior) == (kind, behavior)
    assert "problem" not in kinds(comparison).values()


@pytest.mark.parametrize(("planned", "problem"), [(4, False), (5, True)])
def test_a_machines_first_planned_set_is_its_score_whatever_its_figures(planned, problem):
    store = Store().sustained(1, recipe="a trial").sustained(4, planned=planned, recipe="blog", workload="w2")
    score = store.sustained(5, speed=1200.0).compare().parts[0].score
    assert [(row.recipe, bool(row.head.problem)) for row in score.rows] == [("blog", problem)]
    assert sorted(len(other.runs) for other in score.others) == [1, 5]


def test_a_score_that_was_measured_again_is_not_claimed():
    store = Store().sustained(5).sustained(5, **B, speed=500.0)
    store.runs[2]["tags"]["sustained.attempts"] = "2"
    a = score_row(store.compare(), "GPU A")
    assert "1 of 5 runs" in a.head.problem and a.steps[CONVNET].claim.kind == "problem"


def test_a_score_has_the_sessions_and_threads_of_its_own_measurement():
    store = Store().sustained(5, software__threads="1", sustained__threads="4").sustained(5, **B, speed=500.0)
    for number, run in enumerate(store.runs):
        run["tags"]["sustained.started"] = str(1_760_000_000_000 + 180_000 * number)
    comparison = store.compare()
    score, work = score_row(comparison, "GPU A [CPU threads 4]").head, row(comparison, "GPU A [CPU threads 1]").head
    assert (score.sessions, work.sessions) == (1, 5)
    assert (score.conditions["threads"], work.conditions["threads"]) == ("4", "1")
    speedup = score_row(comparison, "GPU B").steps[CONVNET].claim.speedup
    assert speedup.high / speedup.low > 1.03**2  # widened: all within an hour


@pytest.mark.parametrize(("source", "watts", "efficiency"), [("nvml", 500.0, 2.0), (None, None, None)])
def test_a_score_has_energy_only_with_its_source(source, watts, efficiency):
    store = Store().sustained(3, watts=500.0)
    for run in store.runs:
        run["tags"]["sustained.energy_source"] = source or ""
    a = score_row(store.compare(), "GPU A")
    images_per_joule = a.steps[CONVNET].images_per_joule
    assert (a.watts, a.energy_source) == (watts, source or "")
    assert (images_per_joule and images_per_joule.value) == efficiency


# --- prices


def test_the_price_of_a_card_names_its_machine():
    message = fails(UsageError, lambda: two().compare({"GPU A": price(buy=900.0)}))
    assert message.startswith("prices: GPU A.machine: missing")
    Store().add(1, backend="cpu", device="cpu").compare({"GPU A": price(buy=900.0)})


# --- advice


@pytest.mark.parametrize(
    ("store", "words"),
    [(Store(), "No finished runs yet"), (Store().add(2), "One machine so far"),
     (Store().add(2).add(1, **B, workload="w2"), "2 machines, but no two did the same work"),
     (Store().add(2).add(1, **B, params={"precision": "bf16"}), ""),
     (Store().add(2, fallback="data").add(2, fallback="data", **B), "every run is a DEMO"),
     (Store().add(1, fallback="data", **B).add(1), "One machine so far"),
     (Store().sustained(1).sustained(1, **B, workload="w2"), "")],
)  # fmt: skip
def test_a_store_with_nothing_to_compare_says_what_to_do(store, words):
    advice = store.compare().advice
    assert words in advice and bool(words) == bool(advice)


def test_a_resumed_run_has_accuracies_but_no_time():
    store = two(3, 4)
    store.runs[-1]["tags"]["resumed"] = "2"
    resumed, comparison = store.runs[-1]["run_id"], store.compare(reference="GPU A")
    match = row(comparison, "GPU B")
    assert len(match.values["total_seconds"]) == len(match.values["images_per_second"]) == 3
    assert len(match.values["test_accuracy"]) == 4
    assert [run["id"] for run in match.head.left_out] == [resumed]
    assert kinds(comparison)["GPU B"] == "faster"
    store.runs[-2]["tags"]["resumed"] = "1"
    assert kinds(store.compare(reference="GPU A"))["GPU B"] == "few"


def test_a_machine_with_resumed_runs_alone_is_in_the_table():
    comparison = two(3, 1, resumed="1").compare(reference="GPU A")
    assert "total_seconds" not in row(comparison, "GPU B").figures
    assert "test_accuracy" in row(comparison, "GPU B").figures
