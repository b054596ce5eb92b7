"""Bundles: runs go from store to store whole and once; nothing that is wrong gets into one."""

import json
import socket
import sqlite3
import stat
import struct
import subprocess
import sys
import zipfile
from contextlib import closing
from pathlib import Path

import bundle_files as made
import pytest
from bundle_files import EVALUATE, PNG, SPEED, SUSTAIN, TITLE, TRAIN, changed, pack, repeat, stored_runs, whole_run
from damage import mutated
from hypothesis import HealthCheck, given, settings
from servers import serving
from stores import AT, client, own_store, runs  # noqa: F401 (own_store: each test has its own)

from pipeline import bundle, config
from pipeline.errors import StageError, UsageError
from pipeline.tracking import bundles, store

RUN = f"runs/{1:032x}"

use_store = made.use_store


def dump(path):
    with closing(sqlite3.connect(path)) as rows:
        return "\n".join(rows.iterdump())


def refusal(call, *arguments):
    """The one line that a call is refused with."""
    with pytest.raises(UsageError) as caught:
        call(*arguments)
    line = str(caught.value)
    assert line.isprintable() and len(line) < 400
    return line


# --- from store to store


def test_runs_come_whole_into_another_store_and_a_third(tmp_path, use_store):
    demo = made.training()["tags"] | {"fallback": "data weights"}
    _, handle = made.put_in_store(tmp_path / "a", whole_run(1))
    made.put_in_store(tmp_path / "b", whole_run(2, tags=demo, experiment="trainmark-demo"))
    before = stored_runs(tmp_path)
    assert len(before) == 2 and ("trainmark-demo", f"{2:032x}", "DEMO · AMD EPYC · blog · fp32") in before
    for number in (1, 2):
        bundle.main(["export", "--out", str(tmp_path / f"{number}.zip")])
        use_store(f"store {number}")
        bundle.main(["import", str(tmp_path / f"{number}.zip")])
        assert stored_runs(tmp_path) == before
    tags = store.run_tags(store.find_run(f"{1:032x}", "trainmark"))
    assert tags["imported"] == "from a bundle of schema 3"
    assert (tags["imported.run_id"], tags["machine"]) == (handle.run_id, "b72054f1a41b")


def test_importing_again_adds_nothing_and_a_folder_means_its_bundles(tmp_path, use_store, monkeypatch, capsys):
    folder = tmp_path / "bundles"
    folder.mkdir()
    assert "no .zip file" in refusal(bundle.main, ["import", str(folder)])
    for number in (1, 2):
        path = pack(folder / f"{number}.zip", whole_run(number))
    (folder / "notes.txt").write_text("no bundle")
    monkeypatch.setenv("HOME", str(tmp_path))
    database = use_store("other")
    bundle.main(["import", "~/bundles", str(path)])
    before = dump(database)
    bundle.main(["import", "~/bundles"])
    assert dump(database) == before and len(runs()) == 2
    assert f"there    {TITLE} is in this store already" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_stages_from_two_bundles_come_to_the_same_in_any_order(tmp_path, use_store, order):
    record = made.training()
    newer = made.evaluation(record, after=6000, metrics={"test/accuracy": 0.75}, tags={"label": "desk"})
    pack(tmp_path / "a.zip", made.run_files(record, made.evaluation(record)))
    pack(tmp_path / "b.zip", made.run_files(record, newer, made.sustained(record)))
    use_store("one by one")
    for name in order:
        bundles.import_runs([tmp_path / f"{name}.zip"])
    found = stored_runs(tmp_path)
    use_store("b alone")
    bundles.import_runs([tmp_path / "b.zip"])
    (expected,) = stored_runs(tmp_path).values()
    (run,) = found.values()
    if order == "ab":  # the figures of the older evaluation stay in the history
        assert len(run["metrics"].pop("test/accuracy")) == 2 and run["metrics"].pop("test/loss")
        del expected["metrics"]["test/accuracy"]
    assert run == expected and run["tags"]["label"] == "desk"


def test_a_run_that_was_deleted_is_left_alone(tmp_path, own_store, capsys):
    _, handle = made.put_in_store(tmp_path / "a", whole_run())
    client().delete_run(handle.run_id)
    before = dump(own_store)
    bundles.import_runs([pack(tmp_path / "a.zip", whole_run())])
    assert dump(own_store) == before and "left out" in capsys.readouterr().out


def test_pictures_are_left_out_where_asked_and_curves_drawn_anew(tmp_path, use_store):
    made.put_in_store(tmp_path / "a", whole_run())
    bundle.main(["export", "--without-pictures", "--out", str(tmp_path / "x.zip")])
    (run,) = bundles.read_bundle(tmp_path / "x.zip", tmp_path / "x")
    names = {path.relative_to(run.folder).as_posix() for path in run.folder.rglob("*.*")}
    assert names == {name for name in whole_run() if not name.endswith(".png")}
    use_store("other")
    bundles.import_runs([tmp_path / "x.zip"])
    (imported,) = stored_runs(tmp_path).values()
    assert imported["info"][0] == "FINISHED"
    assert {name for name in imported["artifacts"] if "plots" in name} == {"plots/accuracy.png", "plots/loss.png"}


def test_checkpoints_come_along_when_they_are_asked_for(tmp_path, use_store, monkeypatch):
    logged = []
    monkeypatch.setattr(store, "log_model", lambda *arguments: logged.append(arguments[2:4]))
    contents = whole_run() | {"train/best.safetensors": made.checkpoint(tmp_path)}
    made.put_in_store(tmp_path / "run", contents)
    for name, options in (("a", []), ("b", ["--with-models"])):
        bundle.main(["export", "--out", str(tmp_path / f"{name}.zip"), *options])
    logged.clear()
    use_store("other")
    for name in "ab":
        bundles.import_runs([tmp_path / f"{name}.zip"])
    (run,) = stored_runs(tmp_path).values()
    assert run["artifacts"]["checkpoints/best.safetensors"] == contents["train/best.safetensors"]
    assert logged == [(96, 2)] and run["info"][0] == "FINISHED"


@pytest.mark.parametrize("facts", [{"record": "a" * 32}, {"classes": ["cat", "cow"]}, {"mean": ["x", 1, 2]}, None])
def test_a_checkpoint_of_something_else_is_refused(tmp_path, facts):
    data = b"\x80\x04." if facts is None else made.checkpoint(tmp_path, **facts)  # a pickle, else
    path = pack(tmp_path / "x.zip", whole_run() | {"train/best.safetensors": data})
    assert "x.zip: " in refusal(bundles.read_bundle, path, tmp_path / "x")


@pytest.mark.parametrize("schema", [1, 2])
def test_a_bundle_of_an_older_schema_is_still_imported(tmp_path, use_store, schema):
    path = Path(__file__).parent / "bundle_schema1.zip"
    if schema == 2:
        record = made.training()
        contents = made.run_files(record, made.evaluation(record), made.sustained_before_schema_3(record))
        path = pack(tmp_path / "x.zip", contents, listing=made.manifest(made.entry(contents), schema=2))
    use_store("other")
    bundles.import_runs([path])
    (run,) = runs()
    assert run.data.tags["imported"] == f"from a bundle of schema {schema}"
    assert run.data.metrics["test/accuracy"] == {1: 0.13, 2: 0.5}[schema]
    course = client().get_metric_history(run.info.run_id, "sustained/images_per_second")
    assert [point.step for point in course] == list(range(1, len(course) + 1)) and course
    assert "recipe finetune's step" in run.data.tags["mlflow.note.content"]
    before = stored_runs(tmp_path)
    bundles.export_runs(tmp_path / "again.zip")
    use_store("third")
    bundles.import_runs([tmp_path / "again.zip"])
    assert stored_runs(tmp_path) == before


# --- repeats


def parent_run(tmp_path):
    """All of the run above the repeats."""
    (run,) = [run for (_, record, _), run in stored_runs(tmp_path).items() if record is None]
    return run


def test_the_run_above_repeats_waits_for_all_of_them(tmp_path, use_store):
    use_store("other")
    seen = set()
    for numbers in ((3,), (1,), (2, 1)):
        bundles.import_runs([pack(tmp_path / "x.zip", *map(repeat, numbers))])
        seen |= set(numbers)
        run = parent_run(tmp_path)
        if len(seen) < 3:
            assert run["tags"]["mlflow.note.content"] == f"{len(seen)} of 3 repeats are here"
            assert run["metrics"] == {} and run["info"][0] == "SCHEDULED"
        assert len(store.finished_runs()) == len(seen)
    assert run["info"] == ("FINISHED", AT + 30 + 7003) and run["params"] == {
        key: value for key, value in made.training()["params"].items() if key != "settings.seed"
    }
    assert [value for value, *_ in run["metrics"]["time/total_seconds"]] == [4.0]
    assert run["metrics"][f"std/{SPEED}"] and "imported.run_id" not in run["tags"]
    plots = {f"plots/{name}.png" for name in ("accuracy", "confusion_matrix", "loss", "samples")}
    assert set(run["artifacts"]) == {"params.yaml"} | plots  # the first repeat's
    bundles.export_runs(tmp_path / "all.zip")
    before = stored_runs(tmp_path)
    use_store("all")
    for _ in range(2):
        bundles.import_runs([tmp_path / "all.zip"])
        assert stored_runs(tmp_path) == before


@pytest.mark.parametrize(("tags", "in_store"), [({"repeat": "2"}, True), ({"repeat": "3", "repeats": "4"}, False)])
def test_repeats_that_do_not_fit_each_other_are_refused(tmp_path, own_store, tags, in_store):
    first = pack(tmp_path / "first.zip", repeat(2))
    other = pack(tmp_path / "x.zip", repeat(7, **{"repeat": "3", "repeats": "3"} | tags))
    if in_store:
        bundles.import_runs([first])
    before = dump(own_store)
    assert refusal(bundles.import_runs, [other] if in_store else [first, other]).startswith("x.zip: AMD EPYC")
    assert dump(own_store) == before


def test_of_repeats_what_was_deleted_stays_deleted(tmp_path, use_store):
    path = pack(tmp_path / "x.zip", *map(repeat, (1, 2, 3)))
    use_store("other")
    bundles.import_runs([path])
    client().delete_run(next(run for run in runs() if run.data.tags.get("repeat") == "2").info.run_id)
    before = stored_runs(tmp_path)
    bundles.import_runs([path])
    assert stored_runs(tmp_path) == before and len(store.finished_runs()) == 2


# --- export


def test_a_store_without_runs_is_said(tmp_path):
    with pytest.raises(StageError, match="no finished run"):
        bundles.export_runs(tmp_path / "x.zip")
    assert not (tmp_path / "x.zip").exists()


def test_a_training_is_exported_once_and_by_experiment(tmp_path, capsys):
    made.put_in_store(tmp_path / "a", whole_run(1))
    made.put_in_store(tmp_path / "b", made.run_files(made.training(1, experiment="results")))  # with fewer stages
    made.put_in_store(tmp_path / "c", whole_run(2, experiment="results"))
    made.put_in_store(tmp_path / "d", whole_run(3, warnings=["x" * 2000]))  # would be refused
    store.end_run(made.put_in_store(tmp_path / "e", whole_run(4))[1], "FAILED")
    for options, stages in ((["--experiment", "results"], {1: 1, 2: 3}), ([], {1: 3, 2: 3})):
        path = tmp_path / f"{len(options)}.zip"
        bundle.main(["export", "--out", str(path), *options])
        exported = bundles.read_bundle(path, tmp_path / path.stem)
        assert {int(run.record["id"]): len(run.stages) for run in exported} == stages
    assert "left out AMD EPYC" in capsys.readouterr().out


def test_what_a_stranger_added_to_a_run_stays_where_it_is(tmp_path):
    _, handle = made.put_in_store(tmp_path / "a", whole_run())
    for name in ("plots/My Holiday.jpg", "notes.txt"):
        client().log_text(handle.run_id, "mine", name)
    bundles.export_runs(tmp_path / "x.zip")
    with zipfile.ZipFile(tmp_path / "x.zip") as archive:
        assert sorted(archive.namelist()) == sorted(["bundle.json", *(f"{RUN}/{name}" for name in whole_run())])


@pytest.fixture
def someone(tmp_path, monkeypatch):
    """A machine and a user with telling names; changes them."""

    def name(host, user, home):
        monkeypatch.setattr(socket, "gethostname", lambda: host)
        for key in ("LOGNAME", "USER", "LNAME", "USERNAME"):
            monkeypatch.setenv(key, user)
        for key in ("HOME", "USERPROFILE"):
            monkeypatch.setenv(key, str(home))

    name("marvin.example.org", "trillian", tmp_path / "home")
    return name


@pytest.mark.parametrize(
    ("file", "path", "text"),
    [
        (TRAIN, "warnings|0", "it ran on MARVIN"),
        (TRAIN, "hardware", {"marvin.example.org answered": 1}),
        ("train/params.yaml", "", "by trillian_2"),
        (EVALUATE, "tags|label", "trillian"),
        (SUSTAIN, "warnings|0", "in {home}/pictures"),
    ],
)
def test_what_names_machine_user_or_home_is_not_exported(tmp_path, someone, file, path, text):
    contents = whole_run()
    if path:
        text = text.format(home=tmp_path / "home") if isinstance(text, str) else text
        contents = changed(contents, file, path, text)
        contents["train/hardware.json"] = json.dumps(json.loads(contents[TRAIN])["hardware"]).encode()
    else:
        contents[file] += f"label: {text}\n".encode()
    made.put_in_store(tmp_path / "a", contents)
    with pytest.raises(StageError, match=rf"{file} holds the .* name|{file} holds the home folder"):
        bundles.export_runs(tmp_path / "x.zip")
    assert not (tmp_path / "x.zip").exists()


def test_names_that_tell_nothing_are_exported(tmp_path, someone):
    text = "max-autotune, at cpu 7, of al by pc (root/usr) on Ubuntu"
    made.put_in_store(tmp_path / "a", whole_run(warnings=[text]))
    for host, user in (("epyc7", "cifar"), ("Ubuntu", "root"), ("pc", "al"), ("cpu", "max")):
        someone(host, user, "/")
        bundles.export_runs(tmp_path / f"{user}.zip")
        assert (tmp_path / f"{user}.zip").exists()


# --- what is wrong is one line, and nothing is written


def rewrite(change):
    """Changes the bytes of a good bundle."""

    def make(path):
        path.write_bytes(change(pack(path, whole_run()).read_bytes()))

    return make


def encrypt(data):
    at = data.index(b"PK\1\2") + 8
    return data[:at] + b"\1" + data[at + 1 :]


def resized(path):
    """A picture that unpacks to 50 MB, though manifest and zip say that it is small."""
    contents = whole_run()
    listing = made.manifest(made.entry(contents))
    size = len(contents["train/plots/loss.png"])
    pack(path, contents | {"train/plots/loss.png": bytes(50_000_000)}, listing=listing)
    path.write_bytes(path.read_bytes().replace(struct.pack("<L", 50_000_000), struct.pack("<L", size)))


def packed(method):
    def make(path):
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("bundle.json", json.dumps(made.manifest(made.entry(whole_run()))))

    return make


def many_files(count):
    def make(path):
        with zipfile.ZipFile(path, "w") as archive:
            for number in range(count):
                archive.writestr(f"{number:0100x}", b"")

    return make


def linked(path):
    """A picture that is a symbolic link."""
    info = zipfile.ZipInfo(f"{RUN}/train/plots/link.png")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    target = b"../record.json"
    listing = made.manifest(made.entry(whole_run() | {"train/plots/link.png": target}))
    pack(path, whole_run(), listing=listing, extra=[(info, target)])


def with_file(name, data):
    return lambda path: pack(path, whole_run() | {name: data})


def with_entry(name):
    return lambda path: pack(path, whole_run(), extra=[(name, b"x")])


def listing(place, value):
    def make(path):
        tree = made.manifest(made.entry(whole_run()))
        made.put(tree, place, value)
        pack(path, whole_run(), listing=tree)

    return make


def without(name):
    return lambda path: pack(path, {key: data for key, data in whole_run().items() if key != name})


def no_record(path):
    contents = whole_run()
    del contents[TRAIN]
    listed = made.entry(whole_run())
    del listed["files"][TRAIN]
    pack(path, contents, listing=made.manifest(listed))


def altered(path):
    contents = whole_run()
    other = changed(contents, TRAIN, "metrics|best/val_accuracy", 0.75)
    pack(path, other, listing=made.manifest(made.entry(contents)))


FACTS = {"sha256": "0" * 64, "bytes": 1}
BAD_FILES = {
    "truncated": (rewrite(lambda data: data[:-200]), "truncated"),
    "empty": (rewrite(lambda data: b""), "truncated"),
    "flipped": (rewrite(lambda data: data[:600] + bytes([data[600] ^ 1]) + data[601:]), ""),
    "encrypted": (rewrite(encrypt), "encrypted"),
    "another zip": (many_files(1), "bundle.json"),
    "too many files": (many_files(40_000), "more files"),
    "packed with bzip2": (packed(zipfile.ZIP_BZIP2), "packed"),
    "altered": (altered, TRAIN),
    "a bomb with a false header": (resized, "loss.png"),
    "a link": (linked, "link.png"),
    "a path upwards": (with_entry(f"{RUN}/train/../../../x.png"), "x.png"),
    "an absolute path": (with_entry("/etc/cron.d/x"), "/etc/cron.d/x"),
    "a backslash": (with_entry(f"{RUN}\\..\\x.png"), "x.png"),
    "a file twice": (with_entry(f"{RUN}/{TRAIN}"), "twice"),
    "a file that is not listed": (with_entry(f"{RUN}/train/plots/more.png"), "more.png"),
    "a path upwards listed": (with_file("train/plots/../../x.png", PNG), "runs.0.files"),
    "a device listed": (with_file("train/plots/con.png", PNG), "runs.0.files"),
    "a pickle": (with_file("train/best.pkl", b"\x80\x04."), "runs.0.files"),
    "a page for a picture": (with_file("train/plots/loss.png", b"<svg/>"), "loss.png"),
    "no JSON": (with_file("train/hardware.json", b"{"), "JSON"),
    "other hardware": (with_file("train/hardware.json", b"{}"), "hardware.json"),
    "no record": (no_record, TRAIN),
    "no hardware": (without("train/hardware.json"), "hardware.json"),
    "another format": (listing("format", "another"), "format"),
    "a newer schema": (listing("schema", 4), "update"),
    "no runs": (lambda path: pack(path, listing=made.manifest()), "runs"),
    "an odd run id": (listing("runs|0|run_id", "a run"), "runs.0.run_id"),
    "a false end": (listing("runs|0|end", AT + 1), "end"),
    "a file that is not there": (listing("runs|0|files|train/plots/more.png", FACTS), "more.png"),
    "a large file": (listing(f"runs|0|files|{TRAIN}|bytes", 2**40), TRAIN),
}  # fmt: skip


@pytest.mark.parametrize("make, problem", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_one_line(tmp_path, make, problem):
    make(tmp_path / "x.zip")
    line = refusal(bundles.read_bundle, tmp_path / "x.zip", tmp_path / "unpacked")
    assert line.startswith("x.zip: ") and problem in line
    written = sum(path.stat().st_size for path in tmp_path.glob("unpacked/**/*") if path.is_file())
    assert written < 4 * 2**20 and {path.name for path in tmp_path.iterdir()} <= {"x.zip", "unpacked", "store.db"}


@pytest.mark.parametrize(
    ("file", "path", "value"),
    [
        (TRAIN, "metrics|best/val_accuracy", 0.125),
        (EVALUATE, "metrics|test/accuracy", 0.75),
        (TRAIN, "warnings", [1]),  # no conflict, but no record
    ],
)
def test_nothing_is_written_before_everything_is_checked(tmp_path, own_store, file, path, value):
    bundles.import_runs([pack(tmp_path / "first.zip", whole_run(1))])
    before = dump(own_store)
    new = pack(tmp_path / "new.zip", whole_run(2))
    wrong = pack(tmp_path / "x.zip", changed(whole_run(1), file, path, value))
    assert refusal(bundles.import_runs, [new, wrong]).startswith("x.zip: ")
    assert dump(own_store) == before


@pytest.mark.parametrize("broken", ["start_run", "log_text"])
def test_an_import_that_fails_half_way_is_completed_by_the_same_command(tmp_path, use_store, monkeypatch, broken):
    path = pack(tmp_path / "a.zip", *(repeat(number, 2) for number in (1, 2)), whole_run(3))
    bundles.import_runs([path])
    expected = stored_runs(tmp_path)
    use_store("other")
    calls, works = [], getattr(store, broken)

    def fail_once(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise StageError("the store is away")
        return works(*arguments)

    monkeypatch.setattr(store, broken, fail_once)
    with pytest.raises(StageError, match=r"^the store is away$"):
        bundles.import_runs([path])
    assert len(store.finished_runs()) < 3
    bundles.import_runs([path])
    assert stored_runs(tmp_path) == expected


# --- fuzz


@pytest.mark.parametrize("count", [200, pytest.param(4000, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_no_file_ends_in_a_traceback(tmp_path, count):
    whole = pack(tmp_path / "x.zip", whole_run()).read_bytes()

    def check(data):
        (tmp_path / "x.zip").write_bytes(data)
        try:
            bundles.read_bundle(tmp_path / "x.zip", tmp_path / "unpacked")
        except UsageError as error:
            assert str(error).isprintable() and len(str(error)) < 500

    limits = settings(
        max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    limits(given(mutated(whole))(check))()


# --- the command


def test_the_command_ends_with_a_status(tmp_path):
    (tmp_path / "bad.zip").write_text("no zip")
    command = [sys.executable, "-m", "pipeline.bundle", "import", str(tmp_path / "bad.zip")]
    done = subprocess.run(command, cwd=config.ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("bundle: bad.zip: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [(), ("import",), ("mend", "x.zip"), ("export", "--to", "x.zip")])
def test_a_wrong_command_is_one_line(tmp_path, monkeypatch, arguments):
    refusal(bundle.main, arguments)
    assert "no such file" in refusal(bundle.main, ["import", "missing.zip"])
    monkeypatch.setenv("MLFLOW_RUN_ID", "a" * 32)  # no run may be put into another
    path = pack(tmp_path / "a.zip", whole_run())
    assert "MLFLOW_RUN_ID" in refusal(bundle.main, ["import", str(path)])


# --- between stores of different kinds


@pytest.mark.slow
def test_runs_go_to_a_server_and_back(tmp_path, use_store, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made.put_in_store(tmp_path / "a", whole_run(1))
    before = stored_runs(tmp_path)
    bundles.export_runs(tmp_path / "x.zip")
    with serving(tmp_path / "server") as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        for _ in range(2):
            bundles.import_runs([tmp_path / "x.zip"])
            assert stored_runs(tmp_path) == before
        bundles.export_runs(tmp_path / "y.zip")
    use_store("other")
    bundles.import_runs([tmp_path / "y.zip", tmp_path / "x.zip"])
    assert stored_runs(tmp_path) == before
