"""What is not training: tracking, a `dvc repro` with nothing to do, start-up, and whole processes from a cold start.

python -m benchmarks.overheads [--parts tracking,repro,help,start,cold] [--baseline-epochs N] [--before FOLDER]
[-S key=value ...]; the settings are the pipeline's, laid over a small made job of each part's own.

tracking  the same job by `train.run` (MLflow on SQLite, its sampling of the machine, the best checkpoint kept) and by
          `bare.train` (none of it), in turns in one process: median seconds of an epoch's training; and from one
          epoch's end to the next, validation, checkpoint and logging included.
repro     `dvc repro` where nothing changed, in a copy of the project; it must train nothing.
help      `python -m pipeline.train --help` and `python -m pipeline.hardware` against `import torch`; neither may
          import it.
start     `python -m pipeline.train` as a process, from its start to the first batch, with the data decoded before:
          imports, state of the machine, data, setup, and the rest, which is mostly the measurement of the machine's
          ceilings. Then what is imported, in seconds by package, with Python's own timer, which slows imports down.
          With --before FOLDER, a checkout of another version takes turns with this one.
cold      the baseline's script against `python -m pipeline.run` (all stages, MLflow), each a process: imports, reading
          and decoding a folder of images, training, the end. What the project keeps (.cache) is deleted before both;
          files may be in the system's own cache. They must agree, as in `blog_baseline`. With --baseline-epochs N the
          baseline does N, and each of the others counts as long as these took in the mean (its cost does not change:
          `blog_baseline --flat`).

A part that fails is said, has no figures, and makes the exit status 1; the others go on.
"""

import contextlib
import io
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from benchmarks import bare, blog_baseline, results
from pipeline import config, download, files, hardware, train
from pipeline.data import datasets
from pipeline.errors import StageError
from pipeline.training import setup

Result = TypeVar("Result")

PARTS = ("tracking", "repro", "help", "start", "cold")
COPIED = (
    "pipeline", "benchmarks", "params.yaml", "dvc.yaml", ".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore",
)  # fmt: skip
"""What the stages and DVC need of the project."""

MADE = ("weights=random", "data.source=synthetic", "sustain_seconds=0", "largest_batch=false")
JOBS = {
    "tracking": ("recipe=finetune", "epochs=5", "data.limit=40", "batch_size=60", "image_size=32"),
    "repro": ("recipe=linear-probe", "epochs=2", "data.limit=10", "batch_size=30"),
    "start": ("recipe=finetune", "epochs=1", "data.limit=20", "batch_size=60", "image_size=32"),
    # So little is learnt, and so slowly, that losses can be compared.
    "cold": (
        "recipe=linear-probe", "epochs=10", "data.limit=40", "batch_size=100", "scheduler=constant", "lr=1.0e-5",
        "warmup_epochs=0",
    ),
}  # fmt: skip
READY = "trained from"
"""In the line that `train` says when everything is ready for the first batch."""

TRIES = 3
"""How often a training is begun that does not trust its own clock."""

STARTING = {"imports": "startup", "state of the machine": "inspect", "data": "data", "setup": "setup"}
"""The parts before the first batch, and their time/..._seconds."""

PACKAGES = 10
"""How many of the packages are listed that take the longest to import."""


class Project:
    """A copy of the project at `checkout`, as a git repository, in which stages run as processes."""

    def __init__(self, root: Path, checkout: Path = config.ROOT):
        self.root = root
        for name in COPIED:
            source, target = checkout / name, root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        who = {
            f"GIT_{role}_{what}": "bench@localhost" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
        }
        self.environment = os.environ | who | {"DVC_NO_ANALYTICS": "1"}
        self.environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        for key in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"):
            self.environment.pop(key, None)

    def run(self, *command: str) -> tuple[float, str]:
        """Seconds that a command took, and what it said. Raises StageError where it failed."""
        start = time.perf_counter()
        done = subprocess.run(command, cwd=self.root, env=self.environment, text=True, capture_output=True)
        seconds = time.perf_counter() - start
        if done.returncode:
            raise StageError(f"{_short(command)}: {_last(done.stderr or done.stdout)}")
        return seconds, done.stdout + done.stderr

    def python(self, *words: str) -> tuple[float, str]:
        """Likewise, of Python."""
        return self.run(sys.executable, *words)


def tracking(overrides: Sequence[str], rounds: int, folder: Path) -> dict[str, Any]:
    """Tracking on against off."""
    settings = results.settings_of(overrides)
    splits = bare.splits_of(settings)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder.as_posix()}/bench.db"
    epochs, walls = [], []
    for turn in range(rounds):
        ways = [
            partial(_trusted, partial(_tracked, settings, folder / str(turn))),
            partial(_untracked, settings, splits),
        ]
        order = (0, 1) if turn % 2 == 0 else (1, 0)  # neither always comes first
        taken = {way: ways[way]() for way in order}
        (on, on_at), (off, off_at) = taken[0], taken[1]
        epochs.append(statistics.median(on) / statistics.median(off))
        walls.append(_between(on_at) / _between(off_at))
    found = {"epoch": results.ratios(epochs), "epoch and all that follows it": results.ratios(walls)}
    results.row("tracking", f"on / off, training of an epoch ({settings.recipe})", found["epoch"])
    what = "on / off, from an epoch's end to the next one's, with checkpoint"
    results.row("tracking", what, found["epoch and all that follows it"])
    return found | {"recipe": settings.recipe, "epochs": settings.work.epochs, "images": len(splits["train"])}


def repro(overrides: Sequence[str], rounds: int, project: Project) -> dict[str, Any]:
    """A `dvc repro` with nothing to do."""
    settings = results.settings_of(overrides)
    project.run("git", "init", "-q")
    project.run("git", "add", ".")
    project.run("git", "commit", "-qm", "the project")
    words = [word for text in overrides for word in ("-S", _for_dvc(text, settings.recipe))]
    first, _ = _trusted(partial(project.run, "dvc", "exp", "run", *words))
    seconds = []
    for _ in range(rounds):
        took, said = project.run("dvc", "repro")
        for stage in ("train", "evaluate", "sustain"):
            if f"Stage '{stage}' didn't change, skipping" not in said:
                raise StageError(f"dvc repro ran {stage} again, though nothing changed")
        seconds.append(took)
    found = results.ratios(seconds)
    results.row("dvc repro", "with nothing to do (nothing was trained)", found, " s")
    return {"seconds": found, "first": first}


def helped(rounds: int, project: Project) -> dict[str, Any]:
    """Start-up without torch."""
    commands = {
        "pipeline.train --help": ("-m", "pipeline.train", "--help"),
        "pipeline.hardware": ("-m", "pipeline.hardware"),
        "import torch": ("-c", "import torch"),
    }
    found: dict[str, Any] = {}
    for name, words in commands.items():
        _, said = project.python("-X", "importtime", *words)  # a first call, which compiles and reads from the disk
        imported = any(line.split("|")[-1].strip() == "torch" for line in said.splitlines())
        if imported and name != "import torch":
            raise StageError(f"python {' '.join(words)} imports torch")
        found[name] = {"imports torch": imported}
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, words in commands.items():
            taken[name].append(project.python(*words)[0])
    for name, seconds in taken.items():
        found[name]["seconds"] = results.ratios(seconds)
        imports = "" if found[name]["imports torch"] else " (torch is not imported)"
        results.row("start-up", f"python: {name}{imports}", found[name]["seconds"], " s")
    return found


def start(overrides: Sequence[str], rounds: int, projects: Mapping[str, Project]) -> dict[str, Any]:
    """The time from a process's start to its first batch, in parts. The `projects`, by version, take turns."""
    settings = results.settings_of(overrides)
    words = _words(overrides, settings)
    for project in projects.values():
        for stage in ("hardware", "download", "train"):  # the first training decodes
            _trusted(partial(project.python, "-m", f"pipeline.{stage}", *words))
    rows: dict[str, list[dict[str, float]]] = {version: [] for version in projects}
    for _ in range(rounds):
        for version, project in projects.items():
            whole = _trusted(partial(_until_ready, project, words))
            metrics = files.read_json(project.root / "outputs" / "train" / "metrics.json")
            parts = {part: metrics[f"time/{key}_seconds"] for part, key in STARTING.items()}
            rows[version].append(parts | {"ceilings and the rest": whole - sum(parts.values()), "whole": whole})
    found: dict[str, Any] = {}
    for version in projects:
        seconds = {part: results.ratios([row[part] for row in rows[version]]) for part in rows[version][0]}
        for part, values in seconds.items():
            results.row("start", f"{version}: {part}", values, " s")
        packages = _import_seconds(projects[version])
        print(f"imports       {version}: " + ", ".join(f"{name} {took:.2f} s" for name, took in packages.items()))
        found[version] = {"seconds": seconds, "imports": packages}
    if "before" in rows:
        pairs = zip(rows["before"], rows["now"], strict=True)
        found["before / now"] = results.ratios([before["whole"] / now["whole"] for before, now in pairs])
        results.row("start", f"before / now, whole ({settings.recipe})", found["before / now"])
    return found


def cold(
    overrides: Sequence[str], rounds: int, project: Project, folder: Path, at_most: int | None, workers: int
) -> dict[str, Any]:
    """Whole processes; the baseline's for `at_most` epochs."""
    settings = results.settings_of(overrides)
    every = settings.work.epochs
    measured = min(every, at_most or every)
    how = ("--alone", "--baseline-epochs", str(measured), "--workers", str(workers))
    if settings.data.source != "folder":
        exported = _exported(settings, folder)
        overrides = [*overrides, "data.source=folder", f"data.path={exported.as_posix()}"]
        settings = results.settings_of(overrides)
    words = _words(overrides, settings)
    # Python's compiled files and MLflow's store are there from any earlier run.
    small = [word for text in (*MADE, "recipe=linear-probe", "epochs=1", "data.limit=2") for word in ("-S", text)]
    _trusted(partial(project.python, "-m", "pipeline.run", *small))
    seconds: dict[str, list[float]] = {"baseline": [], "ours": []}
    losses: dict[str, list[float]] = {"baseline": [], "ours": []}
    accuracies: dict[str, list[float]] = {"baseline": [], "ours": []}
    for _ in range(rounds):
        took, said = _from_cold(project, "benchmarks.blog_baseline", *how, *words)
        rows = json.loads(next(line for line in said.splitlines() if line.startswith("[{")))
        seconds["baseline"].append(took + (every - measured) * statistics.fmean(row["seconds"] for row in rows))
        losses["baseline"].append(rows[0]["loss"])
        accuracies["baseline"].append(rows[-1]["accuracy"])
        took, _ = _trusted(partial(_from_cold, project, "pipeline.run", *words))
        newest = max((project.root / "runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        record = files.read_json(newest / "train" / "record.json")
        epochs = [epoch["figures"] for epoch in record["epochs"]]
        seconds["ours"].append(took)
        losses["ours"].append(epochs[0]["train/loss"])
        accuracies["ours"].append(epochs[-1]["val/accuracy"])
        print(f"cold: baseline {seconds['baseline'][-1]:.1f} s, ours {took:.1f} s", flush=True)
    validated = next(count for split, count in record["facts"]["images"].items() if split != "train")
    judged = measured == every and results.judges(settings, validated)
    reason = results.disagreement(
        (losses["baseline"], losses["ours"]),
        (accuracies["baseline"], accuracies["ours"]) if judged else None,
    )
    if reason:
        raise StageError(reason)
    ratio = results.ratios([a / b for a, b in zip(seconds["baseline"], seconds["ours"], strict=True)])
    results.row("cold", f"baseline / ours, {settings.recipe}, {every} epochs, whole processes", ratio)
    return {
        "recipe": settings.recipe,
        "epochs": every,
        "baseline epochs measured": measured,
        "workers": workers,
        "images": record["facts"]["images"],
        "precision": {"baseline": "fp32", "ours": settings.work.precision},
        "baseline / ours": ratio,
        "seconds": seconds,
        "first epoch's loss": losses,
        "accuracy": accuracies,
        "accuracy judged": judged,
    }


def main(words: Sequence[str]) -> None:
    """Takes the parts one after the other."""
    parser = results.parser(__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help="which, comma between them (all)")
    parser.add_argument("--baseline-epochs", type=results.whole, metavar="N", help="cold: it does at most (all)")
    parser.add_argument(
        "--workers", type=int, default=blog_baseline.WORKERS, help=f"cold: its DataLoader's ({blog_baseline.WORKERS})"
    )
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="start: a checkout of another version")
    arguments = parser.parse_args(words)
    wanted = arguments.parts.split(",")
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))}: expected some of {','.join(PARTS)}")
    given, rounds = arguments.overrides, arguments.rounds
    conditions = results.conditions_of(results.settings_of(given), given)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        project = Project(folder / "project")
        versions = {"before": Project(folder / "before", arguments.before)} if arguments.before else {}
        versions["now"] = project
        of = {part: [*MADE, *job, *given] for part, job in JOBS.items()}
        ways = {
            "tracking": lambda: tracking(of["tracking"], rounds, folder),
            "repro": lambda: repro(of["repro"], rounds, project),
            "help": lambda: helped(rounds, project),
            "start": lambda: start(of["start"], rounds, versions),
            "cold": lambda: cold(of["cold"], rounds, project, folder, arguments.baseline_epochs, arguments.workers),
        }
        refused = []
        for part in (part for part in PARTS if part in wanted):
            try:
                found[part] = ways[part]()
            except StageError as error:  # on a machine busy with other work a training may not trust its own clock
                refused.append(f"{part}: {error}")
                print(refused[-1], file=sys.stderr, flush=True)
    results.write("overheads", conditions, {"rounds": rounds, "refused": refused} | found)
    if refused:
        sys.exit(1)


def _trusted(attempt: Callable[[], Result]) -> Result:
    """What `attempt` gives; on a busy machine a training may not trust its own clock, and is repeated."""
    for _ in range(TRIES - 1):
        try:
            return attempt()
        except StageError as error:
            if "clock not trusted" not in str(error):
                raise
            print(f"repeated: {error}", file=sys.stderr, flush=True)
    return attempt()


def _tracked(settings: config.Settings, own: Path) -> tuple[list[float], list[float]]:
    """Seconds that each epoch trained, and when each ended, by `train`."""
    with contextlib.chdir(own.parent), contextlib.redirect_stdout(io.StringIO()):  # where MLflow puts its artifacts
        for stage in (hardware, download, train):
            stage.run(settings, own)
    epochs = files.read_json(own / "train" / "record.json")["epochs"]
    return [epoch["figures"]["time/train_seconds"] for epoch in epochs], [epoch["at"] / 1000 for epoch in epochs]


def _untracked(settings: config.Settings, splits: setup.Splits) -> tuple[list[float], list[float]]:
    """Likewise, by `bare.train`."""
    trained = bare.train(settings, splits)
    return [epoch["time/train_seconds"] for epoch in trained["epochs"]], trained["at"][1:]


def _between(at: Sequence[float]) -> float:
    """Median seconds between neighbours."""
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(at))


def _words(overrides: Sequence[str], settings: config.Settings) -> list[str]:
    """As a stage in another folder takes them: paths made absolute."""
    absolute = [f"data.path={json.dumps(settings.data.folder.as_posix())}"]
    if settings.work.weights not in ("random", "pretrained"):
        absolute.append(f"weights={json.dumps(config.absolute(settings.work.weights).as_posix())}")
    return [word for text in (*overrides, *absolute) for word in ("-S", text)]


def _for_dvc(text: str, recipe: str) -> str:
    """DVC wants a recipe's key whole."""
    key = text.split("=")[0]
    alone = "." not in key and key in config.Recipe.__dataclass_fields__
    return f"recipes.{recipe}.{text}" if alone else text


def _until_ready(project: Project, words: Sequence[str]) -> float:
    """Seconds from the start of `python -m pipeline.train` to the line before its first batch; waits for its end."""
    begun, ready = time.perf_counter(), None
    command = [sys.executable, "-m", "pipeline.train", *words]
    with subprocess.Popen(
        command, cwd=project.root, env=project.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        said = []
        for line in process.stdout or ():
            said.append(line)
            if ready is None and READY in line:
                ready = time.perf_counter() - begun
    if process.returncode or ready is None:
        raise StageError(f"{_short(command)}: {_last(''.join(said))}")
    return ready


def _import_seconds(project: Project) -> dict[str, float]:
    """The seconds that the modules of each package take when `pipeline.train` is imported: of the slowest packages."""
    _, output = project.python("-X", "importtime", "-c", "import pipeline.train")
    seconds: Counter[str] = Counter()
    for line in output.splitlines():
        own, _, name = line.removeprefix("import time:").split("|") if line.count("|") == 2 else ("", "", "")
        if own.strip().isdigit():
            seconds[name.strip().split(".")[0]] += int(own) / 1e6
    return dict(seconds.most_common(PACKAGES))


def _short(command: Sequence[str]) -> str:
    """A command without its settings."""
    return " ".join([Path(command[0]).name, *command[1:]]).split(" -S ")[0]


def _last(said: str) -> str:
    """The line that says what went wrong."""
    return (said.strip().splitlines() or ["failed without a word"])[-1]


def _from_cold(project: Project, *words: str) -> tuple[float, str]:
    """A module as a process, without what the project keeps: decoded images, digests of folders."""
    shutil.rmtree(project.root / ".cache", ignore_errors=True)
    return project.python("-m", *words)


def _exported(settings: config.Settings, folder: Path) -> Path:
    """The images as a folder of PNG files, as `data.source=folder` takes them."""
    found, root = datasets.resolve(settings.data, settings.work.image_size), folder / "pictures"
    for split in datasets.SPLITS:
        images, labels = datasets.decode(settings.data, found, split, settings.work.image_size)
        for label in np.unique(labels):
            (root / split / found["classes"][label]).mkdir(parents=True)
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            Image.fromarray(image).save(root / split / found["classes"][label] / f"{index:05}.png")
    return root


if __name__ == "__main__":
    main(sys.argv[1:])
