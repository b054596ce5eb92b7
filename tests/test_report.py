"""The comparison for people: tables, Markdown, the terminal, charts, one HTML page; and for programs."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
from made import Store, two

from pipeline import config, page, plots, report
from pipeline.report import Cell

PRICES = {
    "GPU A": config.Price(buy=2500.0, per_hour=2.5, currency="EUR", date="2000-01-01", source="https://example.org/a"),
    "GPU B": config.Price(buy=None, per_hour=0.5, currency="USD", date="2000-01-02", source="a shop"),
}
NASTY = "<script>alert(1)</script>|`x` & \"y\" 'z' [a](javascript:b)"


def many(count):
    store = Store()
    for number in range(count):
        others = {"taints": "load"} if number % 9 == 5 else {}
        store.sustained(
            1 + number % 4, machine=f"{number:012}", hardware=f"GPU {number:02}", seconds=10.0 + number, **others
        )
    return store


def everything():
    """A store that has all kinds of rows."""
    store = two(4, 3, label="under the desk").add(2, hardware="GPU B", machine="b" * 12, taints="battery")
    store.add(1, hardware="C", machine="c" * 12).add(2, hardware="D", machine="d" * 12, seconds=7.0)
    store.add(3, hardware="E", machine="e" * 12, accuracy=0.6).add(3, hardware="F", machine="f" * 12)
    return store.add(2, params={"precision": "bf16"}, seconds=3.0).sustained(2, hardware="G", machine="9" * 12)


def columns(found, kind="work", place=0):
    ((section, table),) = [
        (section, section.tables[place]) for _, section, _ in list(report.tables(found)) if section.kind == kind
    ][:1]
    return dict(report.columns(section, table))


def drawn(found):
    return [
        {name: plots.svg(figure) for name, figure in report.charts(section, table).items()}
        for _, section, table in report.tables(found)
    ]


def html(found):
    return page.html(found, drawn(found))


# --- tables


def test_a_cell_has_the_figure_and_its_interval():
    found = columns(two().compare())
    assert found["machine"] == [Cell("GPU B"), Cell("GPU A", "reference")]
    assert found["n"] == [Cell("3", "between 3 processes, over 2.0 hours")] * 2
    assert found["total s"][1] == Cell("10.0", "9.8–10.3")
    assert found["speed-up"][0].text == "2.00" and re.fullmatch(r"1\.9\d–2\.0\d", found["speed-up"][0].small)
    assert found["speed-up"][1] == Cell("1")
    assert found["finds"][0].text.endswith("%") and found["finds"][1] == Cell()
    assert found["peak MiB"] == [Cell("1,000")] * 2  # all alike: no interval
    assert found["s to 75%"][0].text == "5.00"
    assert found["accuracy"][0].text == "75.00%" and found["run"][1] == Cell("00000001")


def test_what_no_row_has_is_no_column():
    assert not {"images/J", "cost", "tainted", "torch", "settings"} & set(columns(two().compare()))
    energy = two(metrics={"energy/images_per_joule": 3.0}, energy__source="nvml")
    assert columns(energy.compare())["images/J"] == [Cell("3.00", "nvml"), Cell()]


@pytest.mark.parametrize(
    ("name", "cell"),
    [("C", "single run"), ("D", "too few runs"), ("E", "accuracies differ"), ("F", "no difference found"),
     ("GPU B", "tainted")],
)  # fmt: skip
def test_a_speed_up_that_is_not_claimed_says_why(name, cell):
    found = columns(everything().compare())
    rows = [place for place, machine in enumerate(found["machine"]) if machine.text.startswith(name)]
    assert any(cell in found["speed-up"][place].small for place in rows)


def test_the_settings_of_a_best_are_named():
    found = columns(two().add(2, params={"precision": "bf16", "threads": "4"}, seconds=1.0).compare(), place=1)
    assert found["settings"] == [Cell("bf16, threads 4"), Cell("fp32")]


def test_a_target_that_some_never_reached():
    store = Store().add(3).add(3, machine="b" * 12, hardware="GPU B", accuracy=0.7, taints="load")
    store.courses[store.runs[2]["run_id"]]["val/accuracy"][-1] = 0.8
    found = columns(store.compare())
    assert found["s to 75%"][1] == Cell("not reached", "by 3 of 3 runs")


def test_speeds_and_memory_say_what_they_are_of():
    metrics = {"speed/train_images_per_second": None, "speed/feature_images_per_second": 3094.4}
    found = columns(Store().add(1, metrics=metrics, device="cpu").compare())
    assert (found["images/s"], found["peak MiB"]) == ([Cell("3,094", "features")], [Cell("1,000", "process")])


def test_versions_of_torch_that_differ_are_a_column():
    store = two(software__torch="2.11.0")
    assert columns(store.compare())["torch"] == [Cell("2.11.0"), Cell("2.14.1")]
    assert "torch 2.14.1" in report.markdown(two().compare())


def test_prices_by_hardware():
    found = dict(report.price_columns(two().compare(PRICES)))
    assert found["to buy"] == [Cell("2,500 EUR"), Cell()] and found["an hour"] == [Cell("2.5 EUR"), Cell("0.5 USD")]
    assert found["break-even hours"] == [Cell("1,000"), Cell()]
    assert columns(two().compare(PRICES))["cost"] == [
        Cell("0.000694 USD", "rented"), Cell("0.00694 EUR", "rented; 0.000264 bought")
    ]  # fmt: skip


# --- Markdown


def test_markdown_has_every_section_aligned():
    text = report.markdown(everything().compare(PRICES))
    assert text.startswith("# Machines compared\n\n22 runs of 7 machines, 2025-06-15 to 2025-06-16.\n\n## Sustained")
    for words in (
        "## finetune on cifar10 with pretrained weights (`w1`)",
        "### Every machine at the same settings: fp32, torch 2.14.1",
        "### Each machine at its best",
        "- GPU B (under the desk) is 1.8",
        "## Prices",
        "## How to read this",
    ):
        assert words in text, words
    blocks = [block for block in text.split("\n\n") if block.startswith("| ")]
    assert len(blocks) == 4
    assert all(len({len(line) for line in block.splitlines()}) == 1 for block in blocks)


def test_a_demo_is_announced():
    text = report.markdown(Store().add(1, fallback="data").compare())
    assert "# DEMO: not the real thing" in text and "every run is a DEMO" in text and "no real data" in text
    assert "DEMO" not in report.markdown(two().compare())


def test_no_runs_make_a_report_of_one_line():
    text = report.markdown(Store().compare())
    assert text == "# Machines compared\n\nNo finished runs yet: `dvc repro` (or `make run`) makes the first one.\n"


def test_machines_that_are_not_in_a_table_are_named():
    found = two().add(1, machine="c" * 12, hardware="C", params={"precision": "bf16"}).compare()
    assert "Not in this table, for no run of theirs is at its settings: C." in report.markdown(found)


def test_a_table_without_the_reference_says_so():
    found = two().add(2, workload="w2", machine="c" * 12, hardware="C").compare(reference="C")
    assert "Nothing is compared here: no row is of the reference" in report.markdown(found)
    assert html(found).count("Nothing is compared here") == 1
    assert "Nothing is compared here" not in report.markdown(two().compare())


def test_a_price_that_no_run_has_is_named():
    assert "No run's hardware is called GPU B." in report.markdown(Store().add(1).compare(PRICES))


def test_no_text_of_a_user_breaks_the_tables():
    text = report.markdown(two(label=NASTY).compare())
    assert "<script" not in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_the_same_runs_make_the_same_report():
    first, second = (everything().compare(PRICES) for _ in range(2))
    assert report.markdown(first) == report.markdown(second)
    assert html(first) == html(second)
    assert report.as_json(first) == report.as_json(second)


# --- the terminal


def test_the_terminal_has_the_ranking_and_what_is_claimed():
    store = Store().sustained(3).sustained(3, speed=1500.0, machine="b" * 12, hardware="GPU B", seconds=5.0)
    text = report.on_terminal(store.compare())
    lines = text.splitlines()
    assert lines[0] == "Sustained speed: finetune's step, repeated for 60 s (step s1)"
    assert lines[2].split("|")[1:-1] == [cell.rjust(len(cell)) for cell in lines[2].split("|")[1:-1]]
    assert "GPU B" in lines[4] and "GPU A [reference]" in lines[5]
    assert lines[-1].startswith("  GPU B is 1.9") and "as fast as GPU A on this work" in lines[-1]


def test_the_terminal_stays_short_with_forty_machines():
    lines = report.on_terminal(many(40).compare()).splitlines()
    assert len(lines) < 60 and sum("more in the report" in line for line in lines) == 2
    assert not any("tainted (" in line for line in lines)


def test_one_machine_is_told_what_to_do_next():
    assert report.on_terminal(Store().add(1).compare()).startswith("One machine so far.")


def test_a_description_fits_into_a_tag():
    assert len(report.description(many(200).compare())) <= 5000
    assert report.description(two().compare()).startswith("The report and its charts are this run's artifacts.")


# --- charts


def test_the_charts_of_a_table():
    store = two(metrics={"energy/images_per_joule": 3.0}, energy__source="nvml")
    ((work, table),) = [(section, table) for _, section, table in report.tables(store.compare())]
    assert list(report.charts(work, table)) == ["speed-up", "accuracy", "memory"]  # energy: of one machine alone
    store = Store().sustained(1).sustained(1, machine="b" * 12)
    (_, step, ranking), _ = report.tables(store.compare())
    assert list(report.charts(step, ranking)) == ["sustained"]


def test_a_machine_alone_has_no_chart():
    assert drawn(Store().sustained(3).compare()) == [{}, {}]


# --- the page


class Page(HTMLParser):
    """What a page has: elements, ids, addresses; and that they are closed in order."""

    VOID = ("meta", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.ids, self.outside = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.open += [tag] if tag not in self.VOID else []
        for key, value in attributes:
            self.ids += [value] if key == "id" else []
            if key in ("href", "xlink:href", "src"):
                (self.links if tag == "a" else self.outside).append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop() if tag not in self.VOID else None

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("found", [Store().compare(), everything().compare(PRICES), many(40).compare()])
def test_a_page_needs_nothing_from_elsewhere(found):
    text = html(found)
    parsed = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(parsed.tags)
    assert all(address.startswith("#") for address in parsed.outside)
    assert "url(http" not in text and "@import" not in text and "@font-face" not in text
    assert text.startswith("<!doctype html>") and 'name="viewport"' in text


def test_every_row_and_every_mark_of_a_chart_leads_to_its_run():
    store = two()
    found = store.compare()
    expected = {f"http://127.0.0.1:5000/#/experiments/7/runs/{run['run_id']}" for run in store.runs}
    assert set(Page(html(found)).links) == expected
    ((charts,),) = (drawn(found),)
    for name, svg in charts.items():
        assert set(Page(svg).links) == {
            row.shown["link"] for _, _, table in report.tables(found) for row in table.rows
        }, name


def test_a_source_is_a_link_only_where_it_is_an_address_of_the_web():
    prices = {"GPU A": PRICES["GPU A"], "GPU B": config.Price(**vars(PRICES["GPU B"]) | {"source": "javascript:x"})}
    links = Page(html(two().compare(prices))).links
    assert "https://example.org/a" in links and not any(link.startswith("javascript") for link in links)


def test_a_users_text_is_no_markup():
    store = two(label=NASTY, recipe=NASTY, dataset=NASTY, workload=NASTY, software__torch=NASTY, taints=NASTY)
    store.add(2, workload=NASTY, machine="d" * 12, label=NASTY, params={"threads": NASTY})
    text = html(store.compare({NASTY: PRICES["GPU A"]}, tainted=True))
    parsed = Page(text)
    assert "script" not in parsed.tags and "<script" not in text
    assert not any("javascript" in link for link in parsed.links)


def test_what_is_claimed_has_a_mark_as_well_as_a_colour():
    text = html(everything().compare())
    for kind, mark in page.MARKS.items():
        if kind != "slower":
            assert f'<li class="{kind}"><b>{mark}</b>' in text, kind
    slower = html(two().compare(reference="GPU B"))
    assert '<li class="slower"><b>▼</b>GPU A takes' in slower


def test_a_tainted_row_and_the_reference_are_marked():
    text = html(everything().compare())
    assert '<tr class="tainted">' in text and '<tr class="reference">' in text


# --- for programs


def test_json_has_all_and_can_be_read():
    found = everything().compare(PRICES)
    told = json.loads(json.dumps(report.as_json(found), allow_nan=False))
    assert told["schema"] == 2 and told["runs"] == 22
    (work,) = [section for section in told["parts"][0]["sections"] if section["kind"] == "work"]
    rows = {row["name"]: row for row in work["tables"][0]["rows"] if not row["taints"]}
    b = rows["GPU B (under the desk)"]
    assert b["claim"]["kind"] == "faster" and 1.8 < b["claim"]["speedup"]["low"] < b["claim"]["speedup"]["high"] < 2.2
    assert b["figures"]["total_seconds"]["n"] == 3 == len(b["values"]["total_seconds"]) == len(b["runs"])
    assert told["prices"]["GPU A"]["currency"] == "EUR"


def test_what_is_infinite_is_null_in_json():
    assert report._json({"a": (math.inf, 1.0)}) == {"a": [None, 1.0]}
