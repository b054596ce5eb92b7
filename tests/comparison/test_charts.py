"""Which charts a comparison has, and what they show."""

import pytest
from made import OLDER, B, C, Store, every_kind, two

from pipeline.comparison import charts


def draw(comparison, folder, name):
    """A chart's texts and the number of its bars."""
    figure = charts.charts(comparison)[folder][name]
    return [text.get_text() for text in figure.axes[0].texts], len(figure.axes[0].patches)


def test_a_machine_alone_has_no_chart():
    assert charts.charts(Store().sustained(3).compare()) == {}


def test_memory_and_energy_of_two_kinds_are_in_no_one_chart():
    store = Store()
    for number, (device, source) in enumerate((("cuda", "nvml"), ("cuda", "nvml"), ("cpu", "rapl"), ("mps", "rapl"))):
        machine = {"machine": f"{number}", "hardware": f"M{number}", "device": device, "energy__source": source}
        store.sustained(3, watts=100.0, metrics={"energy/images_per_joule": 2.0}, **machine)
    comparison = store.compare()
    assert list(charts.charts(comparison)["work-w1/same-settings"]) == [
        "speed-up", "accuracy", "memory-tensors", "energy-nvml", "energy-rapl",
    ]  # fmt: skip
    texts, bars = draw(comparison, "work-w1/same-settings", "memory-tensors")
    assert {text.split(" ")[0] for text in texts} == {"M0", "M1", "1,000"} and bars == 2


def test_a_ratio_that_is_not_claimed_has_no_bar():
    store = two().add(3, **C, taints="load").add(3, machine="d" * 12, hardware="Z", accuracy=0.6)
    texts, bars = draw(store.compare(), "work-w1/same-settings", "speed-up")
    by_machine = dict(zip(texts[::2], texts[1::2], strict=True))
    assert "no claim" in by_machine["C"] and "no claim" in by_machine["Z"]
    assert bars == 2 and by_machine["GPU A (reference)"] == "1"


def test_a_score_names_precision_and_batch_where_the_device_chose_them():
    comparison = Store().sustained(3).sustained(3, batch=128, precision="fp16", **B).compare()
    assert draw(comparison, "score", "convnet_fp32")[0][::2] == ["GPU A", "GPU B, batch 128"]
    assert draw(comparison, "score", "convnet_best")[0][::2] == ["GPU A, bf16", "GPU B, fp16, batch 128"]


def test_every_table_has_its_own_folder():
    parts = every_kind().compare().parts
    tables = [(part, section, table) for part in parts for section in part.sections for table in section.tables]
    folders = [charts.work_folder(*table) for table in tables]
    assert len(folders) == len(set(folders))
    assert {f"work-w1-version-{OLDER}/same-settings", "demo-work-w1/same-settings"} <= set(folders)
    assert charts.score_folder(parts[0]) == "score"


@pytest.mark.parametrize("odd", ["../../etc", "a/b", "..", "x {y}"])
def test_no_tag_of_a_run_names_a_file_elsewhere(odd):
    store = Store()
    for machine in "ab":
        tags = {"machine": machine, "workload": odd, "energy__source": odd, "params": {"threads": odd}}
        store.sustained(3, watts=9.0, metrics={"energy/images_per_joule": 1.0}, **tags)
    for run in store.runs:
        run["tags"]["sustained.energy_source"] = odd
    figures = charts.charts(store.compare())
    folder = next(folder for folder in figures if folder.startswith("work"))
    assert folder.count("/") == 1 and ".." not in folder
    names = [name for by_name in figures.values() for name in by_name]
    assert sum(name.startswith("energy") for name in names) == 2
    assert not any("/" in name or "." in name for name in names)
