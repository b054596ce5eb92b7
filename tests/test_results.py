"""What may be a result, and the comparison of all results; those that are there, too."""

import json
import random

import pytest
from bundle_files import EVALUATE, SUSTAIN, TRAIN, changed, entry, evaluation, manifest, pack, run_files
from result_files import JPEG, later_stages, result, whole_result
from stores import own_store  # noqa: F401 (each test has its own)

from pipeline import config
from pipeline.errors import StageError
from results import check, compare

REPEATS = [result(n, repeats__id="5" * 32, repeats="3", repeat=str(n)) for n in (1, 2, 3)]


def lines(capsys, *paths, status=None):
    """What a check prints that ends with this error, or with none."""
    capsys.readouterr()
    if status is None:
        check.main(list(map(str, paths)))
    else:
        with pytest.raises(status):
            check.main(list(map(str, paths)))
    return capsys.readouterr().out.splitlines()


def other_kinds():
    """Runs that may be results, each by another recipe, data or way to execute it."""
    pretrained = result(3, recipe="linear-probe", weights="sha256:1f", settings=["seed=3", "precision=bf16"])
    pretrained["tags"]["weights"] = "pretrained"
    hot = result(4, taints="load battery")
    test, score = later_stages(hot)
    score["tags"]["sustained.taints"] = "drift"
    unscored = result(5, settings=["sustain_seconds=0"])
    halved = result(6)
    return [
        whole_result(result(1)),
        whole_result(result(2, recipe="finetune", data=JPEG)),
        whole_result(pretrained),
        run_files(hot, test, score),
        run_files(unscored, evaluation(unscored)),
        {name: data for name, data in run_files(halved, *later_stages(halved, batch=1)).items() if "plots" not in name},
        *map(whole_result, (result(n, repeats__id="5" * 32, repeats="2", repeat=str(n - 6)) for n in (7, 8))),
    ]


def test_whole_runs_of_params_yaml_may_be_results(tmp_path, capsys):
    (line,) = lines(capsys, pack(tmp_path / "amd-epyc.zip", *other_kinds()))
    assert line.startswith("ok       amd-epyc.zip: 8 runs of AMD EPYC; 1 marked as tainted (battery, drift, load)")


@pytest.mark.parametrize(
    "text",
    [
        "Intel Core i7-8750H CPU@2.20GHz, 2 @ 3.1 GHz",
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        "/usr/local/cuda-12.6, ~/.local, a locally.localised home.",
        "a@" * 50_000,
        "a." * 50_000,
    ],
)
def test_what_names_nobody_is_no_fault(tmp_path, capsys, text):
    record = result()
    record["hardware"]["machine"]["text"] = text
    assert lines(capsys, pack(tmp_path / "a.zip", whole_result(record)))


def with_value(file, path, value):
    return changed(whole_result(result()), file, path, value)


FAULTS = {
    "not evaluated": (lambda: run_files(result(), None, later_stages(result())[1]), "not evaluated"),
    "no score": (lambda: run_files(result(), evaluation(result())), "score is missing"),
    "a demo": (lambda: whole_result(result(fallback="data weights")), "DEMO"),
    "simulated hardware": (lambda: whole_result(result(hardware="Apple M1 (simulated)")), "hardware"),
    "simulated label": (lambda: whole_result(result(label="SIMULATED desk")), "label"),
    "another's recipe": (lambda: whole_result(result(recipe__tag="mine")), "recipe mine"),
    "other settings": (lambda: whole_result(result(settings=["lr=0.05", "precision=bf16"])), "train.lr 0.05"),
    "limited data": (lambda: whole_result(result(settings=["data.limit=500"])), "settings.data.limit 500"),
    "other data": (lambda: whole_result(result(data="sha256:" + "0" * 64)), "other data"),
    "other weights": (lambda: with_value(TRAIN, "tags|weights", "file"), "weights are file"),
    "other seconds": (lambda: run_files(result(), *later_stages(result(), seconds=5.0)), "convnet fp32"),
    "a home on Linux": (lambda: with_value(TRAIN, "warnings|0", "in /home/ada/pictures"), "a home folder"),
    "a home on macOS": (lambda: with_value(SUSTAIN, "warnings", ["/Users/ada"]), "a home folder"),
    "a home on Windows": (lambda: with_value(EVALUATE, "tags|label", r"C:\Users\ada"), "a home folder"),
    "an address": (lambda: with_value(TRAIN, "tags|label", "ada@example.org's"), "an e-mail address"),
    "a host": (lambda: whole_result(result()) | {"train/params.yaml": b"label: ada-mbp.local\n"}, "the name of a host"),
}


@pytest.mark.parametrize(("make", "fault"), FAULTS.values(), ids=FAULTS)
def test_what_is_wrong_with_a_run_is_named(tmp_path, capsys, make, fault):
    (line,) = lines(capsys, pack(tmp_path / "a.zip", make()), status=StageError)
    assert line.startswith("wrong    a.zip: ") and "(00000000): " in line and fault in line
    assert "precision" not in line  # how a run is executed is free


def test_a_machine_has_one_bundle_and_a_bundle_one_machine(tmp_path, capsys):
    other = whole_result(result(2, machine="c" * 12))
    paths = [pack(tmp_path / f"{name}.zip", whole_result(result(n))) for n, name in ((1, "a"), (3, "b"))]
    paths.append(pack(tmp_path / "c.zip", other))
    words = [line.split()[0] for line in lines(capsys, *paths, status=StageError)]
    assert words == ["ok", "wrong", "ok"]
    (line,) = lines(capsys, pack(tmp_path / "d.zip", whole_result(result()), other), status=StageError)
    assert "2 machines" in line


def test_a_missing_repeat_and_a_large_bundle_are_named(tmp_path, capsys):
    (line,) = lines(capsys, pack(tmp_path / "a.zip", *map(whole_result, REPEATS[::2])), status=StageError)
    assert "2 of 3" in line
    path = tmp_path / "b.zip"
    pack(
        path,
        whole_result(result()) | {"train/plots/large.png": b"\x89PNG\r\n\x1a\n" + random.Random(0).randbytes(2**20)},
    )
    (line,) = lines(capsys, path, status=StageError)
    assert "--without-pictures" in line


def test_a_damaged_bundle_is_named_and_the_next_one_is_checked(tmp_path, capsys):
    (tmp_path / "a.zip").write_text("no zip")
    contents = whole_result(result())
    pack(tmp_path / "b.zip", contents, listing=manifest(entry(contents, start=1)))
    pack(tmp_path / "c.zip", contents)
    found = lines(capsys, *sorted(tmp_path.glob("*.zip")), status=StageError)
    assert [line.split()[0] for line in found] == ["wrong", "wrong", "ok"] and "runs.0.start" in found[1]


def test_every_result_that_is_there_may_be_and_is_in_the_report(capsys):
    assert {line.split()[0] for line in lines(capsys)} == {"ok"}
    report = (check.RESULTS / "compare.html").read_text(encoding="utf-8")
    assert all(f'href="{path.name}"' in report for path in check.RESULTS.glob("*.zip")), "make results"


@pytest.mark.usefixtures("capsys")
def test_bundles_are_compared_and_no_store_is_touched(tmp_path, own_store):
    folder = tmp_path / "results"
    folder.mkdir()
    with pytest.raises(StageError):
        compare.compare_bundles(folder)
    for first, name, machine, seconds in ((1, "a", "a" * 12, 6.0), (4, "b", "b" * 12, 3.0)):
        contents = []
        for number in range(first, first + 3):
            seed = number - first
            tags = {"repeats__id": name * 32, "repeats": "3", "repeat": str(seed + 1), "machine": machine}
            tags |= {"software__execution": str(config.EXECUTION_VERSION), "hardware": f"GPU {name.upper()}"}
            record = result(number, settings=[f"seed={seed}"], **tags)
            record["metrics"]["time/total_seconds"] = seconds + number / 100
            contents.append(whole_result(record))
        entries = [entry(files, run_id=f"{first + place:032x}") for place, files in enumerate(contents)]
        pack(folder / f"{name}.zip", *contents, listing=manifest(*entries))
    before = own_store.read_bytes()
    comparison = compare.compare_bundles(folder)
    assert (comparison.runs, comparison.machines) == (6, 2) and own_store.read_bytes() == before
    text = (folder / "compare.html").read_text(encoding="utf-8")
    assert 'href="a.zip">00000' in text and 'href="b.zip">00000' in text
    assert "times as fast as GPU A on this work" in (folder / "compare.md").read_text(encoding="utf-8")
    for path in folder.glob("compare.*"):
        assert b"127.0.0.1" not in path.read_bytes() and str(tmp_path).encode() not in path.read_bytes()
    assert json.loads((folder / "compare.json").read_text(encoding="utf-8"))
