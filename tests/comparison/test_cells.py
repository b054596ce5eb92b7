"""The text of the cells of every table."""

import re

import pytest
from made import MINUTE, PRICES, B, C, Store, price, row, sections, two

from pipeline.comparison import cells
from pipeline.comparison.cells import Cell
from pipeline.profiling import score_steps


def by_heading(columns):
    return {column.heading: column.cells for column in columns}


def work(comparison, place=0):
    section = sections(comparison)[0]
    return by_heading(cells.work_columns(section, section.tables[place]))


def scored(comparison):
    return by_heading(cells.score_columns(comparison.parts[0].score))


def cell(columns, machine, heading):
    (index,) = [index for index, name in enumerate(columns["machine"]) if name.text.startswith(machine)]
    return columns[heading][index]


# --- a recipe's work


def test_a_cell_has_the_figure_and_its_interval():
    columns = work(two().compare())
    assert columns["machine"] == [Cell("GPU B", []), Cell("GPU A", ["reference"])]
    assert columns["total s"][1] == Cell("10.0", ["9.8–10.3"])
    assert columns["speed-up"][0].text == "2.00" and re.fullmatch(r"1\.9\d–2\.0\d", columns["speed-up"][0].notes[0])
    assert columns["speed-up"][1] == Cell("1")
    assert columns["peak MiB"] == [Cell("1,000", ["tensors"])] * 2  # all alike: no interval
    assert columns["accuracy"][0].text == "75.00%" and columns["run"][1].text == "00000001"
    slower = cell(work(two().compare(reference="GPU B")), "GPU A", "speed-up")
    assert slower.text == "1/2.00" and re.fullmatch(r"1/2\.0\d–1/1\.9\d", slower.notes[0])


@pytest.mark.parametrize(
    ("change", "note"),
    [({"count": 2}, "too few runs"), ({"accuracy": 0.6}, "no claim: accuracy"), ({"planned": 5}, "no claim"),
     ({"seconds": 10.0}, "no difference found"), ({"taints": "load"}, "no claim"),
     ({"seconds": 9.5, "step": MINUTE, "count": 5}, "difference not established")],
)  # fmt: skip
def test_a_ratio_that_is_not_claimed_says_why(change, note):
    store = Store().add(5, step=change.get("step", 60 * MINUTE)).add(**{"count": 3, "seconds": 5.0} | B | change)
    ratio = cell(work(store.compare()), "GPU B", "speed-up")
    assert note in ratio.notes and ratio.text


def test_the_settings_of_a_best_are_named():
    columns = work(two().add(2, params={"precision": "bf16", "threads": "4"}, seconds=1.0).compare(), place=1)
    assert [machine.notes[0] for machine in columns["machine"]] == ["bf16, threads 4", "fp32"]
    assert {ratio.text for ratio in columns["speed-up"]} == {"1", "not compared"}


def test_a_target_that_some_never_reached_has_no_time():
    store = Store().add(5)
    assert work(store.compare())["s to 50%"][0].text == "5.00"
    for run in store.runs[3:]:
        del run["metrics"]["time/to_target_seconds"]
    comparison = store.compare()
    assert work(comparison)["s to 50%"] == [Cell("reached by 3 of 5")]
    assert "seconds_to_target" not in row(comparison, "GPU A").figures
    untargeted = work(Store().add(3, params={"target_accuracy": "null"}).compare())
    assert not [heading for heading in untargeted if heading.startswith("s to")]


def test_speeds_memory_and_energy_say_what_they_are_of():
    metrics = {"speed/train_images_per_second": None, "speed/feature_images_per_second": 3094.4}
    metrics |= {"energy/images_per_joule": 3.0}
    columns = work(Store().add(1, metrics=metrics, device="cpu", energy__source="rapl").compare())
    assert columns["images/s"] == [Cell("3,094", ["features"])] and columns["peak MiB"] == [Cell("1,000", ["process"])]
    assert columns["images/J"] == [Cell("3.00", ["rapl"])]


@pytest.mark.parametrize(
    ("tag", "value", "heading", "text"),
    [("software__torch", "2.11.0", "torch", "2.11.0"), ("hardware__usable_cores", "2", "cores", "2"),
     ("hardware__power_limit_watts", "350", "power limit", "350 W")],
)  # fmt: skip
def test_conditions_that_differ_are_columns(tag, value, heading, text):
    columns = work(two(**{tag: value}).compare())
    assert cell(columns, "GPU B", heading).text == text
    assert cell(columns, "GPU A", heading).text == ("2.14.1" if heading == "torch" else "not known")
    assert heading not in work(Store().add(3, **{tag: value}).add(3, **B | {tag: value}).compare())


def test_n_reads_as_a_plan():
    def count(store):
        return work(store.compare())["n"]

    assert count(Store().add(1)) == [Cell("1", [])]
    assert count(Store().add(5, step=3 * MINUTE)) == [Cell("5", ["within 12 minutes"])]
    assert count(Store().add(3, planned=5)) == [Cell("3 of 5", ["2 missing", "3 sessions"])]
    store = Store().add(1).add(5).add(1)
    for run in store.runs[1:3]:
        run["tags"]["taints"] = "load"
    reasons = ["1 tried before the planned set", "1 added after the planned set", "2 disturbed (load)", "3 sessions"]
    assert count(store) == [Cell("3 of 5", reasons)]


# --- the score


def test_a_step_has_its_ratio_precision_batch_and_a_first_third_that_differs():
    store = Store().sustained(3).sustained(3, speed=140_000.0, **B, batch=128)
    for run in store.runs[:3]:
        run["metrics"][score_steps.metric("convnet_fp32", "first_third_images_per_second")] = 1050.0
    columns = scored(store.compare())
    b = cell(columns, "GPU B", "transformer best")
    assert cell(columns, "GPU A", "transformer best") == Cell("250", ["bf16"]) and b.text == "35,000"
    assert b.notes[0] == "140 times" and re.fullmatch(r"13\d–14\d", b.notes[1]) and b.notes[2:] == ["bf16"]
    assert cell(columns, "GPU A", "convnet fp32") == Cell("1,000", ["first third 1,050"])
    assert cell(columns, "GPU B", "convnet fp32").notes == ["not compared", "batch 128 against 256"]
    assert cell(scored(store.compare(reference="GPU B")), "GPU A", "transformer best").notes[0] == "1/140"
    assert scored(Store().sustained(3, batch=128).compare())["convnet fp32"][0].notes == ["batch 128"]


def test_a_score_has_memory_watts_with_their_source_and_images_for_money():
    store = Store().sustained(3, watts=500.0, hardware__memory_gib="80")
    store.sustained(3, backend="cpu", device="cpu", **B, hardware__memory_gib="16")
    columns = scored(store.compare(PRICES))
    assert columns["memory"] == [Cell("80 GiB", ["card"]), Cell("16 GiB", ["RAM"])]
    assert columns["watts"] == [Cell("500", ["nvml"]), Cell()]
    assert columns["images/J"][0].notes[-2:] == ["convnet fp32", "nvml"]
    a, b = columns["images per money"]
    assert a.text == "1.44 million per EUR" and a.notes[0] == "rented" and a.notes[-1] == "electricity left out"
    assert b == Cell("7.2 million per USD", ["rented"])


# --- runs outside the tables


def test_runs_in_no_table_are_listed_with_their_settings_and_the_reason():
    store = two().add(1, **C).add(5, **C).add(3, params={"precision": "bf16"}, seconds=99.0, taints="load")
    absent = by_heading(cells.absent_from_work(sections(store.compare())[0]))
    assert [name.text for name in absent["machine"]] == ["C", "GPU A"]
    assert [reason.text for reason in absent["why"]] == ["tried before the planned set", "disturbed (load)"]
    assert [[column[1].text] for heading, column in absent.items() if heading not in ("machine", "why")] == [
        ["3"], ["99.0"], ["bf16"], ["0000000d 0000000e 0000000f"],
    ]  # fmt: skip


# --- prices


def test_prices_by_hardware_with_their_break_even():
    price_a = price(buy=2500.0, per_hour=2.5, hours_per_day=8.0, machine="a desktop")
    columns = by_heading(cells.price_columns(two().compare(PRICES | {"GPU A": price_a})))
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


def test_costs_are_in_their_own_currency_and_say_what_they_leave_out():
    columns = work(two().compare(PRICES))
    assert cell(columns, "GPU B", "cost") == Cell("0.00347 USD", ["rented"])
    bought = cell(columns, "GPU A", "cost")
    assert bought.text.endswith("EUR") and bought.notes[0] == "rented" and bought.notes[-1] == "electricity left out"
