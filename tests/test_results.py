"""What may stand among the results, and the comparison that is made of them; those that do stand there, too."""

import json
import subprocess
import sys

import pytest
from stores import own_store  # noqa: F401 (each test has its own)
from test_bundle import (
    dump,
    evaluation_of,
    listed,
    manifest_of,
    pack,
    parts_of,
    put_in,
    record_of,
    sustained_of,
)

from pipeline import config
from pipeline.errors import StageError, UsageError
from pipeline.profiling import score_steps
from pipeline.tracking import records
from results import check, compare

PUBLISHED, JPEG = check.DATA


def result_of(number=1, *, recipe="blog", data=PUBLISHED, weights=None, settings=(), **tags):
    """The record of a run that did what params.yaml says, but for `settings`; a tag's dot is written as two
    underscores. `data`, `weights`: their digests."""
    chosen = config.load([f"recipe={recipe}", *settings])
    inputs = {"weights": {"digest": weights}, "data": {"digest": data, "limit": chosen.data.limit}}
    own = record_of()["tags"] | {"recipe": recipe, "workload": config.workload(chosen.work, inputs)}
    del own["taints"]
    own |= {key.replace("__", "."): value for key, value in tags.items()}
    facts = record_of()["facts"] | {"weights_digest": weights}
    changes = {"params": records.run_params(chosen), "tags": own, "facts": facts, "name": records.run_name(own)}
    if "fallback" in own:
        changes["experiment"] = "trainmark-demo"
    return record_of(number, **changes)


def later_of(record, seconds=60.0, batch=256):
    """What `evaluate` and `sustain` left for it, the convnet repeated for `seconds`."""
    step = score_steps.STEPS[0]
    tags = {
        score_steps.tag(step.name, "workload"): score_steps.workload(step, batch, seconds),
        "sustained.taints": None,
    }
    tags[score_steps.tag(step.name, "precision")] = "fp32"
    return evaluation_of(record), sustained_of(record, tags=tags, warnings=[])


def whole(record):
    return parts_of(record, *later_of(record))


def saying(file, path, text):
    """A run in which one text is another."""
    parts = whole(result_of())
    parts[file] = json.dumps(put_in(json.loads(parts[file]), path, text)).encode()
    return parts


def said(capsys, *paths, status=StageError):
    """The lines of a check that ends with this error, or with none."""
    capsys.readouterr()
    if status is None:
        check.check(paths)
    else:
        with pytest.raises(status):
            check.check(paths)
    return capsys.readouterr().out.splitlines()


# --- what may stand there


def test_a_whole_run_of_params_yaml_may(tmp_path, capsys):
    runs = [
        result_of(1),
        result_of(2, recipe="finetune", data=JPEG),
        result_of(3, recipe="linear-probe", weights="sha256:1f", settings=["seed=3", "precision=bf16"]),
    ]
    runs[2]["tags"]["weights"] = "pretrained"
    path = pack(tmp_path / "amd-epyc.zip", *map(whole, runs))
    assert said(capsys, path, status=None) == ["ok       amd-epyc.zip: 3 runs of AMD EPYC"]


def test_a_run_that_was_to_repeat_no_step_needs_none(tmp_path, capsys):
    record = result_of(settings=["sustain_seconds=0"])
    path = pack(tmp_path / "a.zip", parts_of(record, evaluation_of(record)))
    assert said(capsys, path, status=None) == ["ok       a.zip: 1 run of AMD EPYC"]


def test_what_disturbed_a_run_is_said_and_no_fault(tmp_path, capsys):
    hot = result_of(2)
    evaluation, sustained = later_of(hot)
    sustained["tags"]["sustained.taints"] = "drift"
    parts = [whole(result_of(1, taints="load battery")), parts_of(hot, evaluation, sustained), whole(result_of(3))]
    (line,) = said(capsys, pack(tmp_path / "a.zip", *parts), status=None)
    assert line == "ok       a.zip: 3 runs of AMD EPYC; 2 marked as tainted (battery, drift, load)"


@pytest.mark.parametrize(
    "text",
    [
        "Intel Core i7-8750H CPU@2.20GHz, 2 @ 3.1 GHz",
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        "/usr/local/cuda-12.6, ~/.local, a locally.localised home.",
        "x" * 100_000,
        "a@" * 50_000,
        "a." * 50_000,
    ],
)
def test_what_tells_of_nobody_is_no_fault(tmp_path, capsys, text):
    record = result_of()
    record["hardware"]["machine"]["said"] = text
    assert said(capsys, pack(tmp_path / "a.zip", whole(record)), status=None)


def test_repeats_that_are_all_there_are_no_fault(tmp_path, capsys):
    repeats = [result_of(n, repeats__id="5" * 32, repeats="3", repeat=str(n)) for n in (1, 2, 3)]
    assert said(capsys, pack(tmp_path / "a.zip", *map(whole, repeats)), status=None)
    without = parts_of(repeats[2], evaluation_of(repeats[2]))
    (line,) = said(capsys, pack(tmp_path / "a.zip", *map(whole, repeats[:2]), without))
    assert line.endswith("its score is missing")


@pytest.mark.parametrize("batch", [128, 1])
def test_a_batch_that_was_halved_is_no_fault(tmp_path, capsys, batch):
    assert said(
        capsys, pack(tmp_path / "a.zip", parts_of(result_of(), *later_of(result_of(), batch=batch))), status=None
    )


def test_pictures_may_be_left_out(tmp_path, capsys):
    parts = {name: content for name, content in whole(result_of()).items() if not name.endswith(".png")}
    assert said(capsys, pack(tmp_path / "a.zip", parts), status=None)


# --- what may not


def only_trained():
    return parts_of(result_of(), None, later_of(result_of())[1])


def without_step():
    return parts_of(result_of(), evaluation_of(result_of()))


def demo():
    return whole(result_of(fallback="data weights"))


def other_seconds():
    return parts_of(result_of(), *later_of(result_of(), seconds=5.0))


BLOG = {key: records.run_params(config.load(["recipe=blog"]))[f"train.{key}"] for key in ("lr", "epochs")}


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (only_trained, "it was not evaluated"),
        (without_step, "its score is missing"),
        (demo, "it is a DEMO: stand-ins for data weights"),
        (lambda: whole(result_of(hardware="Apple M1 (simulated)")), "its hardware says that it is simulated"),
        (lambda: whole(result_of(label="SIMULATED desk")), "its label says that it is simulated"),
        (lambda: whole(result_of() | {"tags": result_of()["tags"] | {"recipe": "mine"}}), "recipe mine is not one of"),
        (
            lambda: whole(result_of(weights="sha256:2") | {"facts": record_of()["facts"]}),
            "or CIFAR-10 as JPEG of quality",
        ),
        (
            lambda: whole(result_of(settings=["lr=0.05", "epochs=9", "precision=bf16", "features=cache"])),
            f"blog in params.yaml: train.epochs 9 for {BLOG['epochs']}, train.lr 0.05 for {BLOG['lr']}",
        ),
        (lambda: whole(result_of(settings=["data.limit=500"])), "in params.yaml: settings.data.limit 500 for null"),
        (
            lambda: whole(result_of(data="sha256:" + "0" * 64)),
            "in params.yaml: other data than CIFAR-10 as it was published or CIFAR-10 as JPEG",
        ),
        (other_seconds, "convnet fp32 is not that of params.yaml: 60 s"),
        (
            lambda: saying("train/record.json", "warnings|0", "read from /home/ada/pictures"),
            "train/record.json holds a home folder ('read from /home/ada/pictures')",
        ),
        (lambda: saying("sustain/record.json", "warnings", ["/Users/ada"]), "sustain/record.json holds a home folder"),
        (lambda: saying("evaluate/record.json", "tags|label", r"C:\Users\ada"), "evaluate/record.json holds a home"),
        (
            lambda: saying("train/record.json", "tags|label", "ada@example.org's"),
            'train/record.json holds an e-mail address ("ada@example.org\'s")',
        ),
        (
            lambda: whole(result_of()) | {"train/params.yaml": b"recipe: blog\nlabel: ada-mbp.local\n"},
            "train/params.yaml holds the name of a host ('label: ada-mbp.local')",
        ),
    ],
)
def test_a_run_that_may_not_is_named_with_the_reason(tmp_path, capsys, make, line):
    path = pack(tmp_path / "a.zip", make())
    (found,) = said(capsys, path)
    assert found.startswith("wrong    a.zip: ") and "(00000000): " in found and line in found
    assert "precision" not in found  # how it was executed is free


def other_weights():
    parts = whole(result_of())
    return parts | {
        "train/record.json": json.dumps(put_in(json.loads(parts["train/record.json"]), "tags|weights", "file")).encode()
    }


def test_weights_that_nobody_else_has_are_said(tmp_path, capsys):
    assert "its weights are file" in said(capsys, pack(tmp_path / "a.zip", other_weights()))[0]


def test_all_that_is_wrong_is_said(tmp_path, capsys):
    record = result_of(fallback="device", label="ada@example.org")
    lines = said(capsys, pack(tmp_path / "My Machine.zip", parts_of(record)))
    for fault in (
        "expected a name of small letters",
        "not evaluated",
        "its score is missing",
        "a DEMO",
        "an e-mail address",
    ):
        assert sum(fault in line for line in lines) == 1, fault
    assert len(lines) == 5


def test_a_machine_has_one_bundle_and_a_bundle_one_machine(tmp_path, capsys):
    other = whole(result_of(2, machine="c" * 12))
    paths = [pack(tmp_path / f"{name}.zip", whole(result_of(n))) for n, name in ((1, "a"), (3, "b"))]
    paths.append(pack(tmp_path / "c.zip", other))
    lines = said(capsys, *paths)
    assert [line[:14] for line in lines] == ["ok       a.zip", "wrong    b.zip", "ok       c.zip"]
    assert "machine b72054f1a41b has a bundle already (a.zip)" in lines[1]
    (line,) = said(capsys, pack(tmp_path / "d.zip", whole(result_of()), other))
    assert "it holds runs of 2 machines (b72054f1a41b, cccccccccccc)" in line


def test_a_repeat_that_is_missing_is_said(tmp_path, capsys):
    runs = [result_of(n, repeats__id="5" * 32, repeats="3", repeat=str(n)) for n in (1, 3)]
    (line,) = said(capsys, pack(tmp_path / "a.zip", *map(whole, runs)))
    assert line == "wrong    a.zip: repeats 55555555: 2 of 3 are there: expected all of them"


def test_a_large_bundle_is_said(tmp_path, capsys, monkeypatch):
    path = pack(tmp_path / "a.zip", whole(result_of()))
    monkeypatch.setattr(check, "MOST_BYTES", path.stat().st_size)
    assert said(capsys, path, status=None)
    monkeypatch.setattr(check, "MOST_BYTES", path.stat().st_size - 1)
    assert "--without-pictures" in said(capsys, path)[0]


def test_what_is_no_bundle_is_said_and_the_next_one_is_looked_at(tmp_path, capsys):
    (tmp_path / "a.zip").write_text("no zip")
    altered = pack(tmp_path / "b.zip", whole(result_of()), manifest=manifest_of(listed(whole(result_of()), start=1)))
    lines = said(capsys, tmp_path / "a.zip", altered, pack(tmp_path / "c.zip", whole(result_of())))
    assert lines[0] == "wrong    a.zip: it is truncated, or no bundle"
    assert lines[1].startswith("wrong    b.zip: bundle.json: runs[0]: start") and lines[2].startswith("ok")


# --- the command


def command(*paths):
    return subprocess.run(
        [sys.executable, "-m", "results.check", *map(str, paths)],
        cwd=config.ROOT, capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip


def test_the_command_ends_with_a_status_that_tells(tmp_path, capsys, own_store):
    before = dump(own_store)
    good, bad = pack(tmp_path / "a.zip", whole(result_of())), pack(tmp_path / "b.zip", demo())
    check.main([str(good)])
    assert capsys.readouterr().out.startswith("ok       a.zip")
    done = command(good, bad)
    assert done.returncode == 1 and done.stderr == "check: 1 of 2 bundles can't stand among the results\n"
    done = command(tmp_path / "none.zip")
    assert done.returncode == 2 and done.stderr.endswith("none.zip: there is no such file\n")
    with pytest.raises(UsageError, match=r"^unrecognized arguments: --quick"):
        check.main(["--quick"])
    assert dump(own_store) == before


def test_without_files_it_checks_those_that_are_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check, "RESULTS", tmp_path / "results")
    check.main([])
    assert capsys.readouterr().out == "none     there is no bundle in results/\n"
    (tmp_path / "results").mkdir()
    pack(tmp_path / "results" / "a.zip", demo())
    with pytest.raises(StageError, match="1 of 1 bundle can't"):
        check.main([])


# --- those that do stand there


def test_every_bundle_that_is_there_may_be():
    check.main([])


def test_the_report_that_is_there_has_every_bundle_that_is():
    for path in check.RESULTS.glob("*.zip"):
        report = (check.RESULTS / "compare.html").read_text(encoding="utf-8")
        assert f'href="{path.name}"' in report, "make results"


# --- the comparison of them


@pytest.fixture
def two(tmp_path):
    """A folder with the bundles of two machines, three runs each."""
    (tmp_path / "results").mkdir()
    for first, name, machine, seconds in ((1, "a", "a" * 12, 6.0), (4, "b", "b" * 12, 3.0)):
        runs = []
        for number in range(first, first + 3):
            tags = {"repeats__id": name * 32, "repeats": "3", "repeat": str(number - first + 1)}
            tags |= {"software__execution": str(config.EXECUTION_VERSION), "hardware": f"GPU {name.upper()}"}
            record = result_of(number, machine=machine, settings=[f"seed={number - first}"], **tags)
            record["metrics"]["time/total_seconds"] = seconds + number / 100
            runs.append(whole(record))
        ids = [listed(parts, run_id=f"{first + place:032x}") for place, parts in enumerate(runs)]
        pack(tmp_path / "results" / f"{name}.zip", *runs, manifest=manifest_of(*ids))
    return tmp_path / "results"


@pytest.mark.usefixtures("capsys")
def test_the_same_bundles_give_the_same_reports_and_no_store_is_touched(two, own_store, monkeypatch):
    before, beside = dump(own_store), sorted(own_store.parent.rglob("*"))
    reports = []
    for _ in range(2):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{own_store.as_posix()}")
        found = compare.run(two)
        assert found.runs == 6 and found.machines == 2
        reports.append({path.name: path.read_bytes() for path in two.iterdir() if path.suffix != ".zip"})
    assert reports[0] == reports[1] and set(reports[0]) == {"compare.md", "compare.json", "compare.html"}
    assert dump(own_store) == before
    assert sorted(path for path in own_store.parent.rglob("*") if path.parent != two) == [
        path for path in beside if path.parent != two
    ]
    text = reports[0]["compare.html"].decode()
    assert 'href="a.zip">00000' in text and 'href="b.zip">00000' in text
    assert "times as fast as GPU A on this work" in reports[0]["compare.md"].decode()
    for report in reports[0].values():
        assert b"127.0.0.1" not in report and str(two.parent).encode() not in report


def test_without_bundles_there_is_no_report(tmp_path):
    (tmp_path / "results").mkdir()
    with pytest.raises(StageError, match="there is no bundle in results/"):
        compare.run(tmp_path / "results")
    assert list((tmp_path / "results").iterdir()) == []
