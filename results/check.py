"""Check whether bundles can be results: those named, or all in this folder.

Prints a line for each good bundle, and for each fault of another. Writes to no store.
"""

import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline import cli, config, terminal
from pipeline.data import fetch
from pipeline.errors import StageError, UsageError
from pipeline.profiling import score_steps
from pipeline.tracking import bundles, records

RESULTS = Path(__file__).resolve().parent

NAME = r"[a-z0-9]+(-[a-z0-9]+)*\.zip"
MAX_BYTES = 2**20
"""Of a bundle: git keeps each one forever."""

DATA = {
    f"md5:{fetch.ARCHIVE_MD5}": "CIFAR-10 as it was published",
    "sha256:9419ce0480866c3ae20df07945813dff2b619c2ade0af4d77c7ab957ad6e5904": "CIFAR-10 as JPEG of quality 75",
}
"""What a result may be trained on, by the digest that `download` gives it: data that everybody can get."""

PRIVATE = {
    "a home folder": re.compile(r"(?:/home/|/Users/|\b[a-z]:[\\/]+Users[\\/]+)\w", re.IGNORECASE),
    "an e-mail address": re.compile(r"(?<![\w.+-])[\w.+-]+@[\w.-]+\.[a-z]{2,}", re.IGNORECASE),
    "the name of a host": re.compile(
        r"(?<![\w.-])\w[\w.-]*\.(?:local|localdomain|lan|home|internal|intranet|corp)(?![\w.-])", re.IGNORECASE
    ),
}
"""What identifies a person or a machine, whichever it is; `export` looks for the names of its own machine."""


def check_bundles(paths: Sequence[Path]) -> None:
    """Print what is wrong with the bundles, or that nothing is.

    Raises StageError if anything is wrong, and UsageError if a file is missing.
    """
    settings = config.load()
    owners: dict[str, str] = {}
    bad = 0
    for path in paths:
        if not path.is_file():
            raise UsageError(f"{path}: there is no such file")
        with tempfile.TemporaryDirectory() as scratch:
            try:
                runs = bundles.read_bundle(path, Path(scratch))
                faults = [
                    *_file_faults(path, runs, owners),
                    *(fault for run in runs for fault in _faults(run, settings)),
                ]
            except UsageError as error:
                runs, faults = [], [str(error).removeprefix(f"{path.name}: ")]
        bad += bool(faults)
        for fault in faults:
            terminal.say(f"wrong    {path.name}: {fault}")
        if not faults:
            terminal.say(f"ok       {path.name}: {_summary(runs)}")
    if bad:
        raise StageError(f"{bad} of {len(paths)} bundle{'s' * (len(paths) != 1)} can't stand among the results")
    if not paths:
        terminal.say(f"none     there is no bundle in {RESULTS.name}/")


def _file_faults(path: Path, runs: Sequence[bundles.Run], owners: dict[str, str]) -> Iterator[str]:
    """What is wrong with a bundle as a whole. `owners`: each machine's bundle so far."""
    if not re.fullmatch(NAME, path.name):
        yield "expected a name of small letters, digits and hyphens, such as apple-m1.zip"
    if (size := path.stat().st_size) > MAX_BYTES:
        yield f"it has {size:,} bytes, of at most {MAX_BYTES:,}: export it --without-pictures and without models"
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
    for (repeats_id, count), numbers in planned.items():
        if str(len(numbers)) != count:
            yield f"repeats {repeats_id[:8]}: {len(numbers)} of {count} are there: expected all of them"


def _faults(run: bundles.Run, settings: config.Settings) -> Iterator[str]:
    """What is wrong with a run, after the run's name. `settings`: those of params.yaml."""
    private = (f"{file} holds {what} ({text})" for file, what, text in bundles.find_texts(run, PRIVATE))
    for fault in (*_missing(run), *_unreal(run), *_other_work(run, settings), *private):
        yield f"{run.title}: {fault}"


def _missing(run: bundles.Run) -> Iterator[str]:
    if "evaluate" not in run.results:
        yield "it was not evaluated"
    is_planned = run.record["params"].get("settings.sustain_seconds") != "0.0"
    score_tags = {score_steps.tag(step.name, "workload") for step in score_steps.STEPS}
    if is_planned and score_tags.isdisjoint(_sustain_tags(run)):
        yield "its score is missing"


def _unreal(run: bundles.Run) -> Iterator[str]:
    tags = run.record["tags"]
    if "fallback" in tags:
        yield f"it is a DEMO: stand-ins for {tags['fallback']}"
    for tag in ("hardware", "label"):
        if "simulated" in tags.get(tag, "").lower():
            yield f"its {tag} says that it is simulated"


def _other_work(run: bundles.Run, settings: config.Settings) -> Iterator[str]:
    """Where the run differs from params.yaml, or used data or weights that not everybody can get."""
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
        differences = _other_settings(run.record["params"], records.run_params(expected))
        reason = ", ".join(differences[:3]) or f"other data than {' or '.join(DATA.values())}, weights or code"
        yield f"workload {tags['workload']} is not that of {recipe} in params.yaml: {reason}"
    for step in score_steps.STEPS:
        batches = [step.batch_size >> halvings for halvings in range(step.batch_size.bit_length())]
        allowed = {score_steps.workload(step, batch, settings.sustain_seconds) for batch in batches}
        workload = _sustain_tags(run).get(score_steps.tag(step.name, "workload"))
        if workload is not None and workload not in allowed:
            seconds = f"{settings.sustain_seconds:g} s"
            yield f"{step.title} is not that of params.yaml: {seconds} with a batch of {step.batch_size}, or halved"


def _other_settings(params: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    """The settings that define the work and differ from params.yaml."""
    execution = {f"train.{key}" for key in (*config.EXECUTION_KEYS, "weights")}
    keys = [key for key in expected if key.startswith("train.") and key not in execution] + ["settings.data.limit"]
    return [
        f"{key} {params.get(key, 'missing')} for {expected[key]}" for key in keys if params.get(key) != expected[key]
    ]


def _sustain_tags(run: bundles.Run) -> Mapping[str, str | None]:
    tags: Mapping[str, str | None] = run.results.get("sustain", {}).get("tags", {})
    return tags


def _summary(runs: Sequence[bundles.Run]) -> str:
    """What a bundle holds, and how its runs are tainted."""
    texts = [
        f"{run.record['tags'].get('taints', '')} {_sustain_tags(run).get('sustained.taints') or ''}" for run in runs
    ]
    taints = [set(text.split()) for text in texts]
    tainted = sum(map(bool, taints))
    words = f"; {tainted} marked as tainted ({', '.join(sorted(set().union(*taints)))})" if tainted else ""
    return f"{len(runs)} run{'s' * (len(runs) != 1)} of {runs[0].record['tags']['hardware']}{words}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Check the files named, or all bundles in this folder."""
    parser = cli.Parser(prog="python -m results.check", description=__doc__, allow_abbrev=False)
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE")
    check_bundles(parser.parse_args(arguments).files or sorted(RESULTS.glob("*.zip")))


if __name__ == "__main__":
    with cli.exit_on_error("python -m results.check"):
        main(sys.argv[1:])
