"""Say what this machine has, what a run would use, and how to mend what is wrong.

Each line is a check: ok, warn or wrong. Below it stands the command that helps. --json prints a list of {check, status,
message, command}. Nothing is trained, downloaded or created. Exit status: 0 if a run would be clean, else 1.
"""

# At the top, only the standard library is imported: a Python that is old or lacks our packages must be able to say so.
from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import socket
import sqlite3
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipeline.startup import INSTALL, REINSTALL, ROOT, activation, first_line

if TYPE_CHECKING:
    from pipeline import config
    from pipeline.devices import Backend

PROGRAM = "python -m pipeline.doctor"
PYTHONS = ((3, 11), (3, 13))
"""The first and the last version that requirements.txt is for."""

RUN_BYTES = 2**30
"""Free space that a run should find: decoded images, checkpoints, the model in MLflow and in DVC's cache."""

TIMEOUT_SECONDS = 5
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}

MARKS = ("ok", "warn", "wrong")
"""`warn`: the run is real and may be claimed of, but read this. `wrong`: it fails, or is a DEMO."""


@dataclass(frozen=True)
class Result:
    """What a check found. `status` is one of MARKS; `command` is what mends it, None if nothing has to be."""

    check: str
    status: str
    message: str
    command: str | None = None


def attempt(name: str, check: Callable[..., Result], *args: Any) -> Result:
    """The result of `check`; if it raises, a result that says why in one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's words about a driver, which `device` says
            return check(*args)
    except Exception as error:  # a broken package may raise anything when it is imported
        return Result(name, "wrong", first_line(error), REINSTALL if isinstance(error, ImportError) else None)


# --- Python and its packages


def check_environment(version: Sequence[int] = sys.version_info[:3]) -> Result:
    """Whether this Python is one that we support, and in `.venv` if that exists."""
    first, last = (".".join(map(str, python)) for python in PYTHONS)
    name = f"Python {'.'.join(map(str, version))}"
    command = activation()
    if not PYTHONS[0] <= tuple(version[:2]) <= PYTHONS[1]:
        return Result("environment", "wrong", f"{name}: expected {first} to {last}", command or "make run")
    if command:
        return Result("environment", "warn", f"{name}, but .venv is not active", command)
    return Result("environment", "ok", name)


def requirements() -> dict[str, str]:
    """The version of each package that requirements.txt has for this system."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    pins = re.findall(r'^([\w.-]+)==([\w.]+)(?:; sys_platform != "(\w+)")?', lines, re.MULTILINE)
    return {name: version for name, version, excluded in pins if sys.platform != excluded}


def check_packages(pins: Mapping[str, str], version: Callable[[str], str] = importlib.metadata.version) -> Result:
    """Whether the packages are installed, in the versions of `pins`. Does not import them."""
    missing, other = [], []
    for name, pin in pins.items():
        try:
            installed = str(version(name)).partition("+")[0]  # torch 2.14.1+cu126 is another build of 2.14.1
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if installed != pin:
            other.append(f"{name} {installed} ({pin})")
    command = activation() or INSTALL
    if missing:
        names = ", ".join(missing) if len(missing) < len(pins) else "all of requirements.txt"
        return Result("packages", "wrong", f"missing: {names}", command)
    if other:
        return Result("packages", "warn", f"other versions than in requirements.txt: {', '.join(other)}", command)
    return Result("packages", "ok", f"the {len(pins)} of requirements.txt")


def check_torch(load: Callable[[str], Any] = importlib.import_module) -> Result:
    """Whether torch and torchvision, which must fit each other, can be imported."""
    try:
        version = load("torch").__version__
        load("torchvision")
    except Exception as error:  # a library that is missing, or of another build
        return Result("torch", "wrong", first_line(error), REINSTALL)
    return Result("torch", "ok", f"torch {version}")


# --- the machine and its device


def check_machine() -> Result:
    """What this machine is, and whether it runs on battery."""
    from pipeline.profiling import system_info

    text = system_info.summary(system_info.facts())
    if system_info.power_source() == "battery":
        return Result("machine", "warn", f"{text}; on battery, which taints a run", "connect it to mains power")
    return Result("machine", "ok", text)


def check_device(
    settings: config.Settings,
    gpus: Sequence[Mapping[str, Any]] | None = None,
    backends: Sequence[type[Backend]] | None = None,
) -> Result:
    """The device that a run would use. Wrong if it is the CPU beside a GPU. Default: all `gpus` and `backends`."""
    import torch

    from pipeline import devices

    recipe = settings.work
    backends = backends or devices.BACKENDS
    reason = devices.unused_gpu(gpus, backends) if settings.device == "auto" else None
    if reason:
        message, _, command = reason.partition(": ")
        return Result("device", "wrong", f"{message}; the next run is a DEMO on the CPU", command or None)
    backend = devices.select(settings.device, backends)
    backend.check(precision=recipe.precision, compile_mode=recipe.compile, graph=recipe.graph)
    torch.zeros(1, device=backend.device).add(1).item()  # a card can be listed and not work
    facts = backend.facts()
    parts = [f"{backend.kind}: {facts['name']}"]
    parts += [f"{facts['memory_gib']} GiB"] if "memory_gib" in facts else []
    parts += [f"driver {facts['driver']}"] if "driver" in facts else []
    text = ", ".join([*parts, f"best precision {backend.best_precision()}"])
    if settings.device == "auto" and torch.backends.mps.is_built() and not torch.backends.mps.is_available():
        advice = "update to macOS 14 or newer; a virtual machine has no MPS"
        return Result("device", "warn", f"{text}; torch is built with MPS, which macOS does not offer here", advice)
    return Result("device", "ok", text)


# --- the work, its data and its weights


def check_work(settings: config.Settings) -> Result:
    """Whether model, optimizer and schedule of the chosen recipe exist."""
    from pipeline.models import classifier
    from pipeline.training import optimizers

    recipe = settings.work
    classifier.check_name(recipe.model)
    optimizers.check(recipe)
    text = f"{recipe.model}, {recipe.precision}, {recipe.optimizer}, {recipe.epochs} epochs"
    return Result("work", "ok", f"{settings.recipe}: {text}, batch {recipe.batch_size:,}")


def reachable(urls: Sequence[str]) -> list[str]:
    """Those of `urls` whose host answers."""
    from pipeline.data import fetch

    return fetch.reachable(urls)


def check_data(data: config.Data, reachable: Callable[[Sequence[str]], Sequence[str]] = reachable) -> Result:
    """Whether the images are there; if not, what the next run does."""
    from pipeline.data import fetch, folder

    if data.source == "synthetic":
        return Result("data", "ok", "synthetic: generated pictures, as data.source asks")
    if data.source == "folder":
        classes = folder.list_folder(data).paths["train"]
        return Result("data", "ok", f"folder: {len(classes)} classes in {data.path}")
    archive = data.folder / fetch.ARCHIVE
    by_hand = f"put {fetch.ARCHIVE} into {data.path}"
    if archive.exists():
        size = archive.stat().st_size
        if size == fetch.ARCHIVE_BYTES:
            return Result("data", "ok", f"cifar10: the archive is in {data.path}")
        message = f"{archive} is not the published file: {size:,} bytes, not {fetch.ARCHIVE_BYTES:,}"
        return Result("data", "wrong", message, f"delete it, or {by_hand}")
    if reachable(data.mirrors):
        megabytes = fetch.ARCHIVE_BYTES // 10**6
        return Result("data", "warn", f"cifar10: not there yet; the next run downloads {megabytes} MB to {data.path}")
    then = "is a DEMO on generated pictures" if data.source == "auto" else "fails"
    return Result("data", "wrong", f"cifar10: not there, and no mirror answers; the next run {then}", by_hand)


def check_weights(recipe: config.Recipe, reachable: Callable[[Sequence[str]], Sequence[str]] = reachable) -> Result:
    """Whether the weights to start from are there; if not, what the next run does."""
    from pipeline import config
    from pipeline.models import classifier, weights

    if recipe.weights == "random":
        return Result("weights", "ok", "random, as the recipe asks")
    if recipe.weights != "pretrained":
        if config.absolute(recipe.weights).is_file():
            return Result("weights", "ok", recipe.weights)
        return Result("weights", "wrong", f"{recipe.weights} is not there", "-S weights=FILE.safetensors")
    hub = classifier.hub_file(recipe.model)
    if hub is None:
        return Result("weights", "wrong", f"timm has no weights of {recipe.model}", "-S weights=random")
    if weights.cached_file(*hub):
        return Result("weights", "ok", f"pretrained: {hub[0]} is in the hub's cache")
    if reachable([weights.HUB]):
        return Result("weights", "warn", f"pretrained: not there yet; the next run downloads {hub[0]}")
    message = f"pretrained: not there, and {weights.HUB} does not answer; the next run is a DEMO from random weights"
    return Result("weights", "wrong", message, f"download {hub[1]} of {hub[0]}, and -S weights=FILE.safetensors")


# --- where the results go


def free_bytes(folder: Path) -> int:
    """Free space where `folder` is."""
    return shutil.disk_usage(folder).free


def check_disk(data: config.Data, root: Path = ROOT, free: Callable[[Path], int] = free_bytes) -> Result:
    """Whether a run can write its files in `root` and, if it has to download them, the images in `data.path`."""
    from pipeline.data import fetch

    needed = {root: RUN_BYTES}
    if data.source in ("auto", "cifar10") and not (data.folder / fetch.ARCHIVE).exists():
        needed[data.folder] = fetch.ARCHIVE_BYTES
    for folder, size in needed.items():
        present = next(path for path in (folder, *folder.parents) if path.exists())
        if not os.access(present, os.W_OK):
            return Result("disk", "wrong", f"{present} can't be written", f"chmod u+w {present}")
        if free(present) < size:
            message = f"{free(present) / 2**20:,.0f} MiB are free in {present}: a run needs {size / 2**20:,.0f}"
            return Result("disk", "wrong", message, "free some: rm -r .cache; dvc gc --workspace")
    return Result("disk", "ok", f"{free(root) / 2**30:,.0f} GiB are free")


def check_store(experiment: str) -> Result:
    """Whether the MLflow store answers within TIMEOUT_SECONDS. No name or password is shown."""
    from pipeline.tracking import location

    uri, shown, path = location.store_uri(), location.shown_uri(), location.database_file()
    if path:
        return _check_sqlite(path, shown)
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if scheme in ("http", "https"):
        return _check_server(experiment, uri, shown)
    if scheme not in DATABASE_PORTS:
        return Result("store", "warn", f"{shown}: not checked; expected sqlite:///, http:// or a database")
    parts = urlsplit(uri)
    try:
        address = (parts.hostname or "localhost", parts.port or DATABASE_PORTS[scheme])
        socket.create_connection(address, TIMEOUT_SECONDS).close()
    except (OSError, ValueError):
        return _store_away(shown, "does not answer")
    return Result("store", "ok", f"{shown}: answers")


def _store_away(shown: str, problem: str) -> Result:
    return Result(
        "store", "wrong", f"{shown}: {problem}", "start it; or, for the store here: unset MLFLOW_TRACKING_URI"
    )


def _check_server(experiment: str, uri: str, shown: str) -> Result:
    """Ask for the experiment, with MLflow's own variables for names and certificates."""
    import requests

    environment = os.environ.get
    headers = {"Authorization": f"Bearer {token}"} if (token := environment("MLFLOW_TRACKING_TOKEN")) else {}
    name = environment("MLFLOW_TRACKING_USERNAME")
    insecure = environment("MLFLOW_TRACKING_INSECURE_TLS") == "true"
    try:
        answer = requests.get(
            f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/get-by-name",
            params={"experiment_name": experiment},
            headers=headers,
            auth=(name, environment("MLFLOW_TRACKING_PASSWORD", "")) if name else None,
            verify=not insecure and environment("MLFLOW_TRACKING_SERVER_CERT_PATH", True),
            timeout=TIMEOUT_SECONDS,
        )
    except requests.Timeout:
        return _store_away(shown, f"no answer in {TIMEOUT_SECONDS} s")
    except requests.RequestException as error:
        return _store_away(shown, f"can't be reached ({type(error).__name__})")
    if answer.status_code == 401:
        mend = "export MLFLOW_TRACKING_USERNAME=NAME MLFLOW_TRACKING_PASSWORD=PASSWORD"
        return Result("store", "wrong", f"{shown}: refuses this name and password", mend)
    if answer.ok or "RESOURCE_DOES_NOT_EXIST" in answer.text:
        there = "has" if answer.ok else "does not have yet"
        return Result("store", "ok", f'{shown}: answers, and {there} the experiment "{experiment}"')
    return _store_away(shown, f"answers {answer.status_code} {answer.reason}")


def _check_sqlite(path: Path, shown: str) -> Result:
    """Read the file if it exists, and create none."""
    if not path.exists():
        if path.parent.is_dir():
            return Result("store", "ok", f"{shown}: the first run creates it")
        return Result("store", "wrong", f"{shown}: its folder does not exist", f"mkdir -p {path.parent}")
    if not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)):
        return Result("store", "wrong", f"{shown}: can't be written", f"chmod u+w {path.parent} {path}")
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", TIMEOUT_SECONDS, uri=True)) as database:
            tables = database.execute("select count(*) from sqlite_master").fetchone()[0]
            runs = database.execute("select count(*) from runs").fetchone()[0] if tables else 0
    except sqlite3.Error as error:
        if "locked" in str(error):
            return Result("store", "warn", f"{shown}: another process is writing to it", "wait until it is done")
        return Result(
            "store", "wrong", f"{shown}: {error}", f"mv {shlex.quote(path.name)} {shlex.quote(path.name + '.broken')}"
        )
    return Result("store", "ok", f"{shown}: {runs} runs")


def check_waiting(waiting: Callable[[], Sequence[Path]] | None = None) -> Result:
    """Whether runs wait to be delivered to the store. By default, those that `pending.waiting` finds."""
    from pipeline.tracking import pending

    count = len((waiting or pending.waiting)())
    if count:
        message = f"{count} parts of runs wait to be delivered; the next command that uses the store delivers them"
        return Result("waiting", "warn", message, "python -m pipeline.publish")
    return Result("waiting", "ok", "no run waits to be delivered")


# --- all of it


def diagnose(settings: config.Settings) -> list[Result]:
    """The results of all checks that need the settings."""
    results = [attempt("machine", check_machine), attempt("torch", check_torch)]
    if results[-1].status == "ok":
        results += [
            attempt("device", check_device, settings),
            attempt("work", check_work, settings),
            attempt("weights", check_weights, settings.work),
        ]
    return [
        *results,
        attempt("data", check_data, settings.data),
        attempt("disk", check_disk, settings.data),
        attempt("store", check_store, settings.tracking.experiment),
        attempt("waiting", check_waiting),
    ]


def page(results: Sequence[Result]) -> str:
    """The results for a person: a line each, and below it what mends it."""
    lines = []
    for result in results:
        lines.append(f"{result.status:5}  {result.check:11}  {result.message}")
        lines += [f"{'':20}> {result.command}"] if result.command else []
    wrong = sum(result.status == "wrong" for result in results)
    return "\n".join([*lines, "", f"a run would not be clean: {wrong} wrong" if wrong else "a run would be clean"])


def main() -> None:
    """Print the results, and end the process with the exit status."""
    arguments = [word for word in sys.argv[1:] if word != "--json"]
    results = [attempt("environment", check_environment), attempt("packages", check_packages, requirements())]
    try:
        from pipeline import cli
    except Exception as error:  # a package is missing or broken, or this Python is too old
        if all(result.status != "wrong" for result in results):
            results.append(Result("settings", "wrong", first_line(error), REINSTALL))
    else:
        with cli.exit_on_error(PROGRAM):
            results += diagnose(cli.parse_settings(arguments, __doc__, PROGRAM))
    as_json = json.dumps([asdict(result) for result in results], indent=2, ensure_ascii=False)
    print(as_json if "--json" in sys.argv[1:] else page(results))
    sys.exit(int(any(result.status == "wrong" for result in results)))


if __name__ == "__main__":
    main()
