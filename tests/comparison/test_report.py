"""The report as Markdown, terminal text and JSON."""

import dataclasses
import json

from made import EPOCHS, HOSTILE, PRICES, B, C, Store, everything, many, sections, two

from pipeline.comparison import answer, content, report
from pipeline.profiling import score_steps

# --- Markdown


def test_markdown_opens_with_the_answer_and_the_score_and_ends_with_the_notes():
    comparison = everything().compare(PRICES)
    blocks = report.markdown(comparison).split("\n\n")
    assert blocks[0] == "# Machines compared" and blocks[1] == answer.answer(comparison)
    assert blocks[2].startswith("22 runs of 7 machines, 2025-06-1") and blocks[3] == "## Score"
    assert blocks[-2] == "## How to read this" and len(blocks[-1].strip().splitlines()) <= 10
    tables = [block for block in blocks if block.startswith("| ")]
    assert len(tables) > 3 and all(len({len(line) for line in table.splitlines()}) == 1 for table in tables)
    assert report.markdown(everything().compare(PRICES)) == report.markdown(comparison)


def test_a_demo_is_announced():
    text = report.markdown(Store().add(1, fallback="data").compare())
    assert "# DEMO" in text and "every run is a DEMO" in text and "No real data" in text
    assert "DEMO" not in report.markdown(two().compare())


def test_no_runs_make_a_report_of_the_advice_alone():
    comparison = Store().compare()
    assert report.markdown(comparison) == f"# Machines compared\n\n{comparison.advice}\n"


def test_what_is_missing_is_named():
    """A reference without a row, a price without a run, copies that do not count, disturbed runs that do."""
    comparison = two().add(2, workload="w2", **C).compare(reference="C")
    notes = [table.note for section in content.section_texts(comparison.parts[0]) for table in section.tables]
    assert notes[0] and notes[0] in report.markdown(comparison) and not notes[1]
    assert content.unused_prices(Store().add(1).compare(PRICES))[0] in report.markdown(Store().add(1).compare(PRICES))
    store = Store().add(1, record="r1").add(1, record="r1")
    assert "1 copy" in content.span(store.compare()) and "compare.tainted" in content.span(store.compare(tainted=True))
    assert "2 copies" in content.span(store.add(1, record="r1").compare())
    span = content.span(two().compare())
    assert "cop" not in span and "compare.tainted" not in span


def test_no_ratio_of_memory_or_energy_is_given():
    metrics = {"energy/images_per_joule": 3.0}
    store = Store().add(3, metrics=metrics | {"memory/peak_mib": 1500.0}, energy__source="nvml")
    comparison = store.add(3, metrics=metrics, energy__source="nvml", **B, seconds=5.0).compare()
    (table,) = content.section_texts(comparison.parts[0])[0].tables
    ((_, sentences),) = table.claims
    assert "times as fast" in sentences and "memory" not in sentences and "joule" not in sentences
    cells = [cell for column in table.columns if column.heading in ("peak MiB", "images/J") for cell in column.cells]
    assert {note for cell in cells for note in cell.notes} == {"tensors", "nvml"}


def test_no_text_of_a_user_breaks_the_tables():
    text = report.markdown(two(label=HOSTILE).compare())
    assert "<script" not in text
    tables = [block for block in text.split("\n\n") if block.startswith("| ")]
    assert tables and all(len({line.count("|") for line in table.splitlines()}) == 1 for table in tables)


# --- the terminal


def test_the_terminal_has_the_answer_the_score_and_the_claims():
    store = Store().sustained(3).sustained(3, speed=1500.0, **B, seconds=5.0)
    comparison = store.compare()
    lines = report.on_terminal(comparison).splitlines()
    assert lines[0] == answer.answer(comparison)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert rows[0] == ["machine", *(step.title for step in score_steps.STEPS), "n"]
    assert rows[2:] == [
        ["GPU B", "1,500 (1.50)", "3,000 (1.50)", "375 (1.50)", "3"], ["GPU A", "1,000", "2,000", "250", "3"],
    ]  # fmt: skip
    b = sections(comparison)[0].tables[0].rows[0]
    assert lines[-1] == f"  {b.claim.sentence} {b.whole.sentence}"


def test_the_terminal_stays_short_with_many_machines_and_a_description_fits_into_a_tag():
    lines = report.on_terminal(many(40).compare()).splitlines()
    assert len(lines) < 60 and sum("more in the report" in line for line in lines) == 2
    assert len(report.description(many(100).compare())) <= 5000
    comparison = two().compare()
    assert report.description(comparison).startswith(answer.answer(comparison))


# --- for programs


def test_json_has_every_field():
    comparison = everything().compare(PRICES)
    parsed = json.loads(json.dumps(report.as_json(comparison), allow_nan=False))
    assert parsed["schema"] == 3 and parsed["runs"] == 22 and parsed["answer"] == answer.answer(comparison)
    rows = {row["head"]["name"]: row for row in parsed["parts"][0]["sections"][0]["tables"][0]["rows"]}
    b = rows["GPU B (under the desk)"]
    assert b["claim"]["kind"] == "faster" and 1.8 < b["claim"]["speedup"]["low"] < b["claim"]["speedup"]["high"] < 2.2
    assert b["figures"]["total_seconds"]["n"] == 3 == len(b["values"]["total_seconds"]) == len(b["head"]["runs"])
    assert len(b["course"]) == EPOCHS and parsed["prices"]["GPU A"]["currency"] == "EUR"
    (g,) = parsed["parts"][0]["score"]["rows"]
    assert set(g["steps"]) == {step.name for step in score_steps.STEPS}


def test_json_names_no_folder_of_the_user():
    comparison = two().compare()
    rules = dataclasses.replace(comparison.rules, prices="/home/ada/secret/prices.yaml")
    assert report.as_json(dataclasses.replace(comparison, rules=rules))["rules"]["prices"] == "prices.yaml"
