"""Whether bundles may stand among the results: of FILE, or of all that are here.

A line for each bundle that may, and for each thing that is wrong with one. Nothing is written to any store.
"""

import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline import bundle, cli, config, terminal
from pipeline.data import fetch
from pipeline.errors import StageError, UsageError
from pipeline.profiling import score_steps
from pipeline.tracking import records

RESULTS = Path(__file__).resolve().parent

NAME = r"[a-z0-9]+(-[a-z0-9]+)*\.zip"
MOST_BYTES = bundle.MIB
"""Of a bundle: git keeps every one for ever."""

DATA = {
    f"md5:{fetch.ARCHIVE_MD5}": "CIFAR-10 as it was published",
    "sha256:9419ce0480866c3ae20df07945813dff2b619c2ade0af4d77c7ab957ad6e5904": "CIFAR-10 as JPEG of quality 75",
}
"""What a result may be trained on, by the digest that `download` gives it. Nobody else has another's own images."""

PRIVATE = {
    "a home folder": re.compile(r"(?:/home/|/Users/|\b[a-z]:[\\/]+Users[\\/]+)\w", re.IGNORECASE),
    "an e-mail address": re.compile(r"(?<![\w.+-])[\w.+-]+@[\w.-]+\.[a-z]{2,}", re.IGNORECASE),
    "the name of a host": re.compile(
        r"(?<![\w.-])\w[\w.-]*\.(?:local|localdomain|lan|home|internal|intranet|corp)(?![\w.-])", re.IGNORECASE
    ),
}
"""What tells of somebody, whoever it is; `export` looks for the names of its own machine."""


def check(paths: Sequence[Path]) -> None:
    """Says what is wrong with the bundles, or that nothing is.

    Raises StageError where anything is wrong, and UsageError for a file that is not there.
    """
    settings = config.load()
    owners: dict[str, str] = {}
    bad = 0
    for path in paths:
        if not path.is_file():
            raise UsageError(f"{path}: there is no such file")
        with tempfile.TemporaryDirectory() as scratch:
            try:
                runs = bundle.read(path, Path(scratch))
                wrong = [*_of_file(path, runs, owners), *(fault for run in runs for fault in faults(run, settings))]
            except UsageError as error:
                runs, wrong = [], [str(error).removeprefix(f"{path.name}: ")]
        bad += bool(wrong)
        for fault in wrong:
            terminal.say(f"wrong    {path.name}: {fault}")
        if not wrong:
            terminal.say(f"ok       {path.name}: {_told(runs)}")
    if bad:
        raise StageError(f"{bad} of {len(paths)} bundle{'s' * (len(paths) != 1)} can't stand among the results")
    if not paths:
        terminal.say(f"none     there is no bundle in {RESULTS.name}/")


def _of_file(path: Path, runs: Sequence[bundle.Run], owners: dict[str, str]) -> Iterator[str]:
    """What is wrong with a bundle as a whole; `owners`: the bundle of each machine, so far."""
    if not re.fullmatch(NAME, path.name):
        yield "expected a name of small letters, digits and hyphens, such as apple-m1.zip"
    if (size := path.stat().st_size) > MOST_BYTES:
        yield f"it has {size:,} bytes, of at most {MOST_BYTES:,}: export it --without-pictures and without models"
    machines = sorted({run.record["tags"]["machine"] for run in runs})
    if len(machines) > 1:
        yield f"it holds runs of {len(machines)} machines ({', '.join(machines)}): expected a bundle for each"
    for machine in machines:
        if (other := owners.setdefault(machine, path.name)) != path.name:
            yield f"machine {machine} has a bundle already ({other}): expected one with all its runs"
    planned: dict[tuple[str, str], set[str]] = {}
    for tags in (run.record["tags"] for run in runs):
        if "repeats.id" in tags:
            planned.setdefault((tags["repeats.id"], tags["repeats"]), set()).add(tags["repeat"])
    for (repeats_id, count), there in planned.items():
        if str(len(there)) != count:
            yield f"repeats {repeats_id[:8]}: {len(there)} of {count} are there: expected all of them"


def faults(run: bundle.Run, settings: config.Settings) -> list[str]:
    """What is wrong with a run, each with the run's name; `settings`: those of params.yaml."""
    found = [*_missing(run), *_unreal(run), *_other_work(run, settings)]
    found += [f"{file} holds {what} ({around})" for file, what, around in bundle.matches(run, PRIVATE)]
    return [f"{run.shown}: {fault}" for fault in found]


def _missing(run: bundle.Run) -> Iterator[str]:
    if "evaluate" not in run.results:
        yield "it was not evaluated"
    asked = run.record["params"].get("settings.sustain_seconds") != "0.0"
    if asked and not any(score_steps.tag(step.name, "workload") in _of_sustain(run) for step in score_steps.STEPS):
        yield "its score is missing"


def _unreal(run: bundle.Run) -> Iterator[str]:
    tags = run.record["tags"]
    if "fallback" in tags:
        yield f"it is a DEMO: stand-ins for {tags['fallback']}"
    for tag in ("hardware", "label"):
        if "simulated" in tags.get(tag, "").lower():
            yield f"its {tag} says that it is simulated"


def _other_work(run: bundle.Run, settings: config.Settings) -> Iterator[str]:
    """Where the run did not do what params.yaml says as it stands, on data and weights that everybody can have."""
    tags, recipe = run.record["tags"], run.record["tags"]["recipe"]
    if recipe not in settings.recipes:
        yield f"recipe {recipe} is not one of params.yaml: expected {' | '.join(settings.recipes)}"
        return
    if tags["weights"] not in ("pretrained", "random"):
        yield f"its weights are {tags['weights']}: expected pretrained | random"
    expected = replace(settings, recipe=recipe)
    weights = {"digest": run.record["facts"].get("weights_digest")}
    known = {
        config.workload(expected.work, {"weights": weights, "data": {"digest": digest, "limit": settings.data.limit}})
        for digest in DATA
    }
    if tags["workload"] not in known:
        others = _other_settings(run.record["params"], records.run_params(expected))
        reason = ", ".join(others[:3]) or f"other data than {' or '.join(DATA.values())}, weights or code"
        yield f"workload {tags['workload']} is not that of {recipe} in params.yaml: {reason}"
    for step in score_steps.STEPS:
        halves = [step.batch_size >> halved for halved in range(step.batch_size.bit_length())]
        fitting = {score_steps.workload(step, batch, settings.sustain_seconds) for batch in halves}
        done = _of_sustain(run).get(score_steps.tag(step.name, "workload"))
        if done is not None and done not in fitting:
            seconds = f"{settings.sustain_seconds:g} s"
            yield f"{step.title} is not that of params.yaml: {seconds} with a batch of {step.batch_size}, or halved"


def _other_settings(have: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """What decides about the work and is set otherwise than in params.yaml."""
    how = {f"train.{key}" for key in (*config.EXECUTION_KEYS, "weights")}
    deciding = [key for key in wanted if key.startswith("train.") and key not in how] + ["settings.data.limit"]
    return [f"{key} {have.get(key, 'missing')} for {wanted[key]}" for key in deciding if have.get(key) != wanted[key]]


def _of_sustain(run: bundle.Run) -> Mapping[str, str | None]:
    """The tags that `sustain` left, where it did."""
    tags: Mapping[str, str | None] = run.results.get("sustain", {}).get("tags", {})
    return tags


def _told(runs: Sequence[bundle.Run]) -> str:
    """What a bundle holds, and what its runs are marked by."""
    count = len(runs)
    taints = [
        {*(run.record["tags"].get("taints") or "").split(), *(_of_sustain(run).get("sustained.taints") or "").split()}
        for run in runs
    ]
    marked = sum(map(bool, taints))
    words = f"; {marked} marked as tainted ({', '.join(sorted(set().union(*taints)))})" if marked else ""
    return f"{count} run{'s' * (count != 1)} of {runs[0].record['tags']['hardware']}{words}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Checks the files named, or all bundles here."""
    parser = cli.Parser(prog="python -m results.check", description=__doc__, allow_abbrev=False)
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE")
    check(parser.parse_args(arguments).files or sorted(RESULTS.glob("*.zip")))


if __name__ == "__main__":
    with cli.ending("python -m results.check"):
        main(sys.argv[1:])
