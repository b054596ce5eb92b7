"""The comparison for people: tables, Markdown, the terminal; and for programs."""

import dataclasses
import json
import re

import pytest
from made import EPOCHS, Store, every_kind, price, sections, two

from pipeline.comparison import answer, cells, report
from pipeline.comparison.cells import Cell
from pipeline.profiling import score_steps

MINUTE = 60_000
PRICES = {
    "GPU A": price(buy=2500.0, per_hour=2.5, machine="a desktop", source="https://example.org/a"),
    "GPU B": price(per_hour=0.5, currency="USD", source="a shop"),
}
NASTY = "<script>alert(1)</script>|`x` & \"y\" 'z' [a](javascript:b)"


def many(count):
    store = Store()
    for number in range(count):
        others = {"taints": "load"} if number % 9 == 5 else {}
        machine = {"machine": f"{number:012}", "hardware": f"GPU {number:02}", "seconds": 10.0 + number}
        store.sustained(1 + number % 4, **machine, **others)
    return store


def by_heading(made):
    return {column.heading: column.cells for column in made}


def work(comparison, place=0):
    section = sections(comparison)[0]
    return by_heading(cells.work_columns(section, section.tables[place]))


def scored(comparison):
    return by_heading(cells.score_columns(comparison.parts[0].score))


def cell(columns, machine, heading):
    place = next(place for place, each in enumerate(columns["machine"]) if each.text.startswith(machine))
    return columns[heading][place]


# --- tables of work


def test_a_cell_has_the_figure_and_its_interval():
    columns = work(two().compare())
    assert columns["machine"] == [Cell("GPU B", []), Cell("GPU A", ["reference"])]
    assert columns["n"] == [Cell("3", ["3 sessions"])] * 2
    assert columns["total s"][1] == Cell("10.0", ["9.8–10.3"])
    assert columns["speed-up"][0].text == "2.00" and re.fullmatch(r"1\.9\d–2\.0\d", columns["speed-up"][0].notes[0])
    assert columns["speed-up"][1] == Cell("1")
    assert columns["peak MiB"] == [Cell("1,000", ["tensors"])] * 2  # all alike: no interval
    assert columns["accuracy"][0].text == "75.00%" and columns["run"][1].text == "00000001"


@pytest.mark.parametrize(
    ("change", "note"),
    [({"count": 2}, "too few runs"), ({"accuracy": 0.6}, "no claim: accuracy"), ({"planned": 5}, "no claim"),
     ({"seconds": 10.0}, "no difference found"), ({"taints": "load"}, "no claim"),
     ({"seconds": 9.5, "step": MINUTE, "count": 5}, "difference not established")],
)  # fmt: skip
def test_a_ratio_that_is_not_claimed_says_why(change, note):
    store = Store().add(5, step=change.get("step", 60 * MINUTE))
    store.add(**{"count": 3, "seconds": 5.0, "machine": "b" * 12, "hardware": "GPU B"} | change)
    ratio = cell(work(store.compare()), "GPU B", "speed-up")
    assert note in ratio.notes and ratio.text


def test_a_ratio_under_1_is_a_fraction():
    ratio = cell(work(two().compare(reference="GPU B")), "GPU A", "speed-up")
    assert ratio.text == "1/2.00" and re.fullmatch(r"1/2\.0\d–1/1\.9\d", ratio.notes[0])


def test_an_interval_of_more_than_tenfold_says_too_few_runs():
    store = two()
    for run, seconds in zip(store.runs[3:], (1.0, 9.0, 3.0), strict=True):
        run["metrics"]["time/total_seconds"] = seconds
    columns = work(store.compare())
    assert cell(columns, "GPU B", "total s").notes == ["too few runs"]
    assert cell(columns, "GPU B", "speed-up").notes == ["too few runs"]


def test_the_settings_of_a_best_are_named():
    columns = work(two().add(2, params={"precision": "bf16", "threads": "4"}, seconds=1.0).compare(), place=1)
    assert [each.notes[0] for each in columns["machine"]] == ["bf16, threads 4", "fp32"]
    assert {each.text for each in columns["speed-up"]} == {"1", "not compared"}


def test_a_target_that_some_never_reached_has_no_time():
    store = Store().add(5)
    assert work(store.compare())["s to 50%"][0].text == "5.00"
    for run in store.runs[3:]:
        del run["metrics"]["time/to_target_seconds"]
    assert work(store.compare())["s to 50%"] == [Cell("reached by 3 of 5")]
    untargeted = Store().add(3, params={"target_accuracy": "null"})
    assert not [heading for heading in work(untargeted.compare()) if heading.startswith("s to")]


def test_speeds_and_memory_say_what_they_are_of():
    metrics = {"speed/train_images_per_second": None, "speed/feature_images_per_second": 3094.4}
    columns = work(Store().add(1, metrics=metrics, device="cpu").compare())
    assert columns["images/s"] == [Cell("3,094", ["features"])] and columns["peak MiB"] == [Cell("1,000", ["process"])]


@pytest.mark.parametrize(
    ("tag", "value", "heading", "text"),
    [("software__torch", "2.11.0", "torch", "2.11.0"), ("hardware__usable_cores", "2", "cores", "2"),
     ("hardware__power_limit_watts", "350", "power limit", "350 W")],
)  # fmt: skip
def test_conditions_that_differ_are_columns(tag, value, heading, text):
    columns = work(two(**{tag: value}).compare())
    assert cell(columns, "GPU B", heading).text == text and cell(columns, "GPU A", heading).text in (
        "2.14.1",
        "not known",
    )
    both = Store().add(3, **{tag: value}).add(3, **{tag: value}, machine="b" * 12)
    assert heading not in work(both.compare())


# --- how many runs


def count(store):
    (only,) = work(store.compare())["n"]
    return only


def test_n_reads_as_a_plan():
    assert count(Store().add(5)) == Cell("5", ["5 sessions"])
    assert count(Store().add(1)) == Cell("1", [])
    assert count(Store().add(5, step=3 * MINUTE)) == Cell("5", ["within 12 minutes"])
    assert count(Store().add(3, planned=5)) == Cell("3 of 5", ["2 missing", "3 sessions"])
    store = Store().add(1).add(5)
    for run in store.runs[1:3]:
        run["tags"]["taints"] = "load"
    assert count(store) == Cell("3 of 5", ["1 tried before the planned set", "2 disturbed (load)", "3 sessions"])
    assert count(Store().add(3).add(1)) == Cell("3", ["1 added after the planned set", "3 sessions"])


# --- the score


def test_a_step_has_its_ratio_precision_batch_and_a_first_third_that_differs():
    store = Store().sustained(3).sustained(3, speed=140_000.0, machine="b" * 12, hardware="GPU B", batch=128)
    for run in store.runs[:3]:
        run["metrics"][score_steps.metric("convnet_fp32", "first_third_images_per_second")] = 1050.0
    columns = scored(store.compare())
    a, b = cell(columns, "GPU A", "transformer best"), cell(columns, "GPU B", "transformer best")
    assert a == Cell("250", ["bf16"]) and b.text == "35,000"
    assert b.notes[0] == "140 times" and re.fullmatch(r"13\d–14\d", b.notes[1]) and b.notes[2:] == ["bf16"]
    assert cell(columns, "GPU A", "convnet fp32") == Cell("1,000", ["first third 1,050"])
    assert cell(columns, "GPU B", "convnet fp32").notes == ["not compared", "batch 128 against 256"]
    slower = scored(store.compare(reference="GPU B"))
    assert cell(slower, "GPU A", "transformer best").notes[0] == "1/140"
    alone = scored(Store().sustained(3, batch=128).compare())
    assert alone["convnet fp32"][0].notes == ["batch 128"]


def test_a_score_tells_memory_watts_with_their_source_and_images_for_money():
    store = (
        Store()
        .sustained(3, watts=500.0, hardware__memory_gib="80")
        .sustained(3, backend="cpu", device="cpu", hardware="GPU B", machine="b" * 12, hardware__memory_gib="16")
    )
    columns = scored(store.compare(PRICES))
    assert cell(columns, "GPU A", "memory") == Cell("80 GiB", ["card"])
    assert cell(columns, "GPU B", "memory") == Cell("16 GiB", ["RAM"])
    assert cell(columns, "GPU A", "watts") == Cell("500", ["nvml"])
    assert cell(columns, "GPU A", "images/J").notes[-2:] == ["convnet fp32", "nvml"]
    money = cell(columns, "GPU A", "images per money")
    assert money.text == "1.44 million per EUR" and money.notes[0] == "rented" and "electricity left out" in money.notes
    assert cell(columns, "GPU B", "images per money") == Cell("7.2 million per USD", ["rented"])


def test_no_ratio_of_memory_or_energy_is_given():
    metrics = {"energy/images_per_joule": 3.0, "memory/peak_mib": 500.0}
    store = Store().add(3, metrics=metrics | {"memory/peak_mib": 1500.0}, energy__source="nvml")
    store.add(3, metrics=metrics, energy__source="nvml", machine="b" * 12, hardware="GPU B", seconds=5.0)
    sentences = [text for _, text in report.work_claims(*(lambda s: (s, s.tables[0]))(sections(store.compare())[0]))]
    assert sentences and not any(word in text for text in sentences for word in ("memory", "joule"))


# --- prices


def test_prices_by_hardware_with_their_break_even():
    prices = PRICES | {"GPU A": price(buy=2500.0, per_hour=2.5, hours_per_day=8.0, machine="a desktop")}
    columns = by_heading(cells.price_columns(two().compare(prices)))
    assert columns["hardware"][0] == Cell("GPU A", ["in a desktop"])
    assert columns["to buy"] == [Cell("2,500 EUR"), Cell("")] and columns["an hour"][1] == Cell("0.5 USD")
    assert columns["break-even hours"] == [Cell("1,000", ["125 days of 8 hours", "electricity left out"]), Cell()]


@pytest.mark.parametrize(("per_kwh", "text"), [(1.0, "1,250"), (5.0, "never")])
def test_break_even_counts_the_most_watts_of_a_step(per_kwh, text):
    store = Store().sustained(3, watts=300.0)
    for run in store.runs:
        run["metrics"][score_steps.metric("transformer_best", "watts")] = 500.0
    prices = {"GPU A": price(buy=2500.0, per_hour=2.5, per_kwh=per_kwh, machine="a desktop")}
    columns = by_heading(cells.price_columns(store.compare(prices)))
    assert columns["watts"] == [Cell("500")] and columns["break-even hours"] == [Cell(text, [])]


def test_costs_stand_in_their_own_currency_and_say_what_they_leave_out():
    columns = work(two().compare(PRICES))
    rented = cell(columns, "GPU B", "cost")
    assert rented == Cell("0.00347 USD", ["rented"])
    bought = cell(columns, "GPU A", "cost")
    assert bought.text.endswith("EUR") and bought.notes[0] == "rented" and bought.notes[-1] == "electricity left out"


def test_a_price_that_no_run_has_is_named():
    assert "No run's hardware is called GPU B." in report.markdown(Store().add(1).compare(PRICES))


# --- nothing disappears


@pytest.mark.parametrize("tainted", [False, True])
def test_every_run_or_its_row_stands_in_the_report(tainted):
    comparison = every_kind().compare(tainted=tainted)
    text = report.markdown(comparison)
    listed = 0
    for part in comparison.parts:
        for section in part.sections:
            for each in (row for table in section.tables for row in table.rows):
                assert each.shown["id"][:8] in text
                assert all(run["id"][:8] in text for run in each.head.left_out)
                listed += len(each.head.left_out)
            for other in section.others:
                assert all(run["id"][:8] in text for run in other.runs) and other.reason in text
                listed += len(other.runs)
    assert listed


def test_what_is_in_no_table_is_listed_with_its_settings_figure_and_reason():
    store = two().add(3, params={"precision": "bf16"}, seconds=99.0)
    (section,) = sections(store.compare())
    columns = by_heading(cells.absent_columns(cells.absent_from_work(section), "total s"))
    assert columns.pop("why")[0].text == section.others[0].reason != ""
    assert {heading: [each.text for each in texts] for heading, texts in columns.items()} == {
        "machine": ["GPU A"], "n": ["3"], "total s": ["99.0"],
        "run with": ["bf16"], "runs": ["00000007 00000008 00000009"],
    }  # fmt: skip


# --- Markdown


def everything():
    """A store that has all kinds of rows."""
    store = two(4, 3, label="under the desk").add(2, hardware="GPU B", machine="b" * 12, taints="battery")
    store.add(1, hardware="C", machine="c" * 12).add(2, hardware="D", machine="d" * 12, seconds=7.0)
    store.add(3, hardware="E", machine="e" * 12, accuracy=0.6).add(3, hardware="F", machine="f" * 12)
    return store.add(2, params={"precision": "bf16"}, seconds=3.0).sustained(2, hardware="G", machine="9" * 12)


def test_markdown_opens_with_the_answer_and_the_score_and_ends_with_the_notes():
    comparison = everything().compare(PRICES)
    blocks = report.markdown(comparison).split("\n\n")
    assert blocks[0] == "# Machines compared" and blocks[1] == answer.answer(comparison)
    assert blocks[2].startswith("22 runs of 7 machines, 2025-06-1") and blocks[3] == "## Score"
    assert blocks[-2] == "## How to read this" and len(blocks[-1].strip().splitlines()) <= 10
    tables = [block for block in blocks if block.startswith("| ")]
    assert len(tables) > 3 and all(len({len(line) for line in table.splitlines()}) == 1 for table in tables)


def test_a_demo_is_announced():
    text = report.markdown(Store().add(1, fallback="data").compare())
    assert "# DEMO: not the real thing" in text and "every run is a DEMO" in text and "No real data" in text
    assert "DEMO" not in report.markdown(two().compare())


def test_no_runs_make_a_report_of_one_line():
    text = report.markdown(Store().compare())
    assert text == "# Machines compared\n\nNo finished runs yet: `make run` (or `dvc repro`) makes the first one.\n"


def test_a_table_without_the_reference_says_so():
    comparison = two().add(2, workload="w2", machine="c" * 12, hardware="C").compare(reference="C")
    assert "Nothing is compared here" in report.markdown(comparison)
    assert "Nothing is compared here" not in report.markdown(two().compare())


@pytest.mark.parametrize(("copies", "words"), [(1, "1 copy in another"), (2, "2 copies in another")])
def test_copies_and_disturbed_runs_in_the_figures_are_told(copies, words):
    store = Store().add(1, record="r1")
    for _ in range(copies):
        store.add(1, record="r1")
    assert words in report.span(store.compare()) and "Disturbed" in report.span(store.compare(tainted=True))
    assert "copy" not in report.span(two().compare()) and "Disturbed" not in report.span(two().compare())


def test_the_same_runs_make_the_same_report():
    first, second = (everything().compare(PRICES) for _ in range(2))
    assert report.markdown(first) == report.markdown(second)
    assert report.as_json(first) == report.as_json(second)


# --- the terminal


def test_the_terminal_has_the_answer_the_score_and_what_is_claimed():
    store = Store().sustained(3).sustained(3, speed=1500.0, machine="b" * 12, hardware="GPU B", seconds=5.0)
    comparison = store.compare()
    lines = report.on_terminal(comparison).splitlines()
    assert lines[0] == answer.answer(comparison)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert rows[0] == ["machine", *(step.title for step in score_steps.STEPS), "n"]
    assert rows[2:] == [
        ["GPU B", "1,500 (1.50)", "3,000 (1.50)", "375 (1.50)", "3"], ["GPU A", "1,000", "2,000", "250", "3"],
    ]  # fmt: skip
    assert lines[-1].startswith("  GPU B is 1.9") and "as fast as GPU A on this work" in lines[-1]
    assert "from process start to result" in lines[-1]


def test_the_terminal_stays_short_with_forty_machines():
    lines = report.on_terminal(many(40).compare()).splitlines()
    assert len(lines) < 60 and sum("more in the report" in line for line in lines) == 2


def test_a_description_fits_into_a_tag():
    assert len(report.description(many(200).compare())) <= 5000
    comparison = two().compare()
    assert report.description(comparison).startswith(answer.answer(comparison))


# --- for programs


def test_json_has_all_and_can_be_read():
    comparison = everything().compare(PRICES)
    written = json.loads(json.dumps(report.as_json(comparison), allow_nan=False))
    assert written["schema"] == 3 and written["runs"] == 22 and written["answer"] == answer.answer(comparison)
    section = written["parts"][0]["sections"][0]
    rows = {row["head"]["name"]: row for row in section["tables"][0]["rows"]}
    b = rows["GPU B (under the desk)"]
    assert b["claim"]["kind"] == "faster" and 1.8 < b["claim"]["speedup"]["low"] < b["claim"]["speedup"]["high"] < 2.2
    assert b["figures"]["total_seconds"]["n"] == 3 == len(b["values"]["total_seconds"]) == len(b["head"]["runs"])
    assert len(b["course"]) == EPOCHS and written["prices"]["GPU A"]["currency"] == "EUR"
    (g,) = written["parts"][0]["score"]["rows"]
    assert set(g["steps"]) == {step.name for step in score_steps.STEPS}


def test_json_names_no_folder_of_the_user():
    comparison = two().compare()
    comparison = dataclasses.replace(
        comparison, rules=dataclasses.replace(comparison.rules, prices="/home/ada/secret/prices.yaml")
    )
    assert report.as_json(comparison)["rules"]["prices"] == "prices.yaml"


def test_no_text_of_a_user_breaks_the_tables():
    text = report.markdown(two(label=NASTY).compare())
    assert "<script" not in text
    tables = [block for block in text.split("\n\n") if block.startswith("| ")]
    assert all(len({line.count("|") for line in table.splitlines()}) == 1 for table in tables)
