"""Which charts a comparison has, and what is drawn in them."""

import pytest
from made import OLDER, Store, every_kind, sections, table, two

from pipeline.comparison import charts, plots


def drawn(monkeypatch, comparison):
    """The bars of each chart, by its title."""
    made = {}

    def spy(name):
        draw = getattr(plots, name)

        def drawing(rows, **options):
            made[options["title"]] = rows
            return draw(rows, **options)

        monkeypatch.setattr(plots, name, drawing)

    for name in ("bars", "ratios", "courses"):
        spy(name)
    charts.charts(comparison)
    return made


def test_a_machine_alone_has_no_chart():
    assert charts.charts(Store().sustained(3).compare()) == {}


def test_memory_and_energy_of_two_kinds_are_in_no_one_chart(monkeypatch):
    store = Store()
    for number, (device, source) in enumerate((("cuda", "nvml"), ("cuda", "nvml"), ("cpu", "rapl"), ("mps", "rapl"))):
        machine = {"machine": f"{number}", "hardware": f"M{number}", "device": device, "energy__source": source}
        store.sustained(3, watts=100.0, metrics={"energy/images_per_joule": 2.0}, **machine)
    comparison = store.compare()
    assert list(charts.charts(comparison)["work-w1/same-settings"]) == [
        "speed-up", "accuracy", "memory-tensors", "energy-nvml", "energy-rapl",
    ]  # fmt: skip
    made = drawn(monkeypatch, comparison)
    (memory,) = [rows for title, rows in made.items() if "memory" in title]
    assert {bar.label.split(" ")[0] for bar in memory} == {"M0", "M1"}


def test_a_ratio_that_is_not_claimed_has_no_bar(monkeypatch):
    store = (
        two().add(3, machine="c" * 12, hardware="C", taints="load").add(3, machine="d" * 12, hardware="Z", accuracy=0.6)
    )
    store.add(2, machine="e" * 12, hardware="E", seconds=4.0)
    (rows,) = [rows for title, rows in drawn(monkeypatch, store.compare()).items() if title.startswith("Speed-up")]
    bars = {bar.label: bar for bar in rows}
    assert bars["C"].value is None and bars["Z"].value is None and "no claim" in bars["C"].text
    assert bars["GPU B"].look == "faster" and bars["GPU B"].low < bars["GPU B"].value < bars["GPU B"].high
    assert bars["E"].look == "few" and bars["E"].low is None
    assert bars["GPU A (reference)"].value == 1


def test_a_score_names_precision_and_batch_where_they_are_the_devices(monkeypatch):
    store = Store().sustained(3).sustained(3, batch=128, precision="fp16", machine="b" * 12, hardware="GPU B")
    made = drawn(monkeypatch, store.compare())
    labels = {title: {bar.label for bar in rows} for title, rows in made.items()}
    assert labels["Score: convnet fp32"] == {"GPU A", "GPU B, batch 128"}
    assert labels["Score: convnet best"] == {"GPU A, bf16", "GPU B, fp16, batch 128"}


def test_every_table_has_a_folder_of_its_own():
    comparison = every_kind().compare()
    places = [
        charts.work_folder(part, section, each)
        for part in comparison.parts
        for section in part.sections
        for each in section.tables
    ]
    assert len(places) == len(set(places))
    assert f"work-w1-version-{OLDER}/same-settings" in places and "demo-work-w1/same-settings" in places
    assert charts.score_folder(comparison.parts[0]) == "score"


@pytest.mark.parametrize("odd", ["../../etc", "a/b", "..", "x y"])
def test_no_tag_of_a_run_names_a_file_elsewhere(odd):
    comparison = Store().add(3, workload=odd).compare()
    place = charts.work_folder(comparison.parts[0], sections(comparison)[0], table(comparison))
    assert place.count("/") == 1 and ".." not in place
    store = Store()
    for machine in "ab":
        store.sustained(3, machine=machine, watts=9.0, metrics={"energy/images_per_joule": 1.0}, energy__source=odd)
    for run in store.runs:
        run["tags"]["sustained.energy_source"] = odd
    names = [name for figures in charts.charts(store.compare()).values() for name in figures]
    assert sum(name.startswith("energy") for name in names) == 2
    assert not any("/" in name or "." in name for name in names)
