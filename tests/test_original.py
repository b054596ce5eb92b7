"""The comparison that this project began with, asked again: two machines, each with a store of its own, a bundle from
each, both in a third store, and the verdict. The machines are simulated, as their names say: nobody's M1 or GTX 1060
ever took these times, which stand at 3 to 2."""

import json
import re
import shutil
import sys

import bundle_files
import pytest
from result_files import later_stages, result
from stores import own_store, runs  # noqa: F401 (each test has its own)

from pipeline import bundle, cli, compare
from pipeline.comparison import groups

use_store = bundle_files.use_store
M1, GTX = "Apple M1 (simulated)", "GeForce GTX 1060 (simulated)"
NOISE = (0.0, 0.01, -0.01)
"""By how much the seconds of each run differ from what is typical, as a share."""


def measure(folder, first, *, seconds, **tags):
    """Put a planned set of `blog` on one machine into the current store, and export it to a bundle."""
    tags |= {"repeats__id": f"{first:032x}", "repeats": str(len(NOISE)), "software__execution": groups.CURRENT_VERSION}
    for number, noise in enumerate(NOISE, first):
        seed = number - first
        record = result(number, settings=[f"seed={seed}"], **tags, repeat=str(seed + 1))
        record["metrics"]["time/total_seconds"] = seconds * (1 + noise)
        evaluation, sustained = later_stages(record)
        evaluation["metrics"]["test/accuracy"] = 0.75 + noise / 10
        bundle_files.put_in_store(folder / str(number), bundle_files.run_files(record, evaluation, sustained))
    bundle.main(["export", "--out", f"{folder}.zip"])
    shutil.rmtree(folder)


def claim(reference, tmp_path, monkeypatch, capsys):
    """What `compare` claims of the current store against a reference, and all texts that it writes."""
    monkeypatch.setattr(compare, "REPORTS", tmp_path / "reports")
    monkeypatch.setattr(cli, "OUTPUTS", tmp_path / "outputs")
    monkeypatch.setattr(sys, "argv", ["compare.py", "-S", f"compare.reference={reference}"])
    capsys.readouterr()
    cli.main(compare.run, compare.__doc__)
    texts = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "reports").glob("compare.*")}
    (part,) = json.loads(texts["compare.json"])["parts"]
    (section,) = part["sections"]
    (table,) = section["tables"]
    assert table["reference"] == reference and [len(row["head"]["runs"]) for row in table["rows"]] == [3, 3]
    (answer,) = [row["claim"] for row in table["rows"] if row["claim"]["sentence"]]
    return answer, [*texts.values(), capsys.readouterr().out]


def test_the_m1_is_found_to_take_one_and_a_half_times_as_long(tmp_path, use_store, monkeypatch, capsys):
    use_store("m1")
    measure(tmp_path / "m1", 1, seconds=12.0, hardware=M1, machine="a" * 12, backend="mps")
    use_store("gtx")
    measure(tmp_path / "gtx", 4, seconds=8.0, hardware=GTX, machine="b" * 12, backend="cuda")
    use_store("third")
    bundle.main(["import", str(tmp_path)])  # both bundles are in this folder
    assert len(runs()) == 2 * (len(NOISE) + 1)  # with the run above each set

    answer, texts = claim(M1, tmp_path, monkeypatch, capsys)
    speedup = answer["speedup"]
    assert answer["kind"] == "faster" and speedup["value"] == pytest.approx(1.5, rel=0.01)
    assert 1.4 < speedup["low"] < 1.5 < speedup["high"] < 1.6 and answer["accuracy"]["established"]
    verdict = f"{GTX} is {speedup['low']:.2f} to {speedup['high']:.2f} times as fast as {M1} on this work"
    assert len(texts) == 4 and all(verdict in text for text in texts)

    answer, texts = claim(GTX, tmp_path, monkeypatch, capsys)
    assert answer["kind"] == "slower" and answer["speedup"]["low"] < 2 / 3 < answer["speedup"]["high"] < 1
    verdict = rf"{re.escape(M1)} takes 1\.4\d to 1\.5\d times as long as {re.escape(GTX)} on this work"
    assert all(re.search(verdict, text) for text in texts)
