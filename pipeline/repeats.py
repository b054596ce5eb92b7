"""Run the same work several times, each repeat in a process of its own, with the seeds `seed`, `seed` + 1, ...

The driver, which starts these processes one after another, imports no torch. It writes a plan before the first one and
starts only those that are missing, so that an interrupted set can be resumed. An environment variable tells a child
which repeat it is.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

from pipeline import cli, config, files, terminal
from pipeline.errors import StageError
from pipeline.tracking import descriptions, records

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

CHILD = "TRAINMARK_REPEAT"
"""Environment variable that the driver sets for a child: `<number of the repeat>:<folder>`. Not for users."""

PLAN, LOCK = "set.json", ".lock"
"""File of the plan, in the folder of the driver's first stage. File that the driver and its children lock."""

UNFINISHED = ".unfinished"
"""Folder that holds copies of the complete repeats of an unfinished set. DVC deletes a stage's outputs before it runs
the stage again."""

MAY_CHANGE = ("compare", "tracking", "repeat_pause")
"""Settings that may differ when a set is resumed."""

RunStage = Callable[[config.Settings, Path, int], Any]
"""Runs a stage for one repeat. Arguments: settings, folder of all stages, number of the repeat from 1."""

StartChild = Callable[[int, Path, IO[str]], int]
"""Runs a repeat in a process and returns its exit status. Arguments: number, folder of all stages, locked file."""


class RepeatFailedError(StageError):
    """A child failed. The driver ends with the child's exit status."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


@dataclass
class Plan:
    """The planned set, and the processes started so far. Times are in milliseconds since 1970."""

    id: str
    repeats: int
    seeds: list[int]
    pause_seconds: float
    fixed: dict[str, Any]
    """What must be the same for all repeats, by dotted key."""
    order: list[dict[str, Any]] = field(default_factory=list)
    """For each process: `repeat`, `start`, `end`, `status`, and `pause_seconds` since the last complete repeat. If the
    driver was killed too, `end` and `status` are missing."""
    ended: int | None = None
    """When the set was completed; None until then."""

    @classmethod
    def read(cls, path: Path) -> "Plan | None":
        """Read a plan. None if the file is missing or damaged."""
        with suppress(StageError, TypeError):
            return cls(**files.read_json(path))
        return None

    def write(self, path: Path) -> None:
        """Write the plan atomically."""
        files.write_json(path, dataclasses.asdict(self))

    def last_end(self) -> int | None:
        """When the last complete repeat ended; None before the first."""
        return max((entry["end"] for entry in self.order if entry.get("status") == 0), default=None)


# --- the command line of the stages


def start_stage(doc: str | None, stage: str) -> None:
    """Answer --help and refuse wrong settings before torch is imported, which takes seconds. If several repeats are
    planned, run them in child processes and exit."""
    settings = cli.parse_early(doc)
    if _child_environment() is None:
        with cli.exit_on_error(cli.program()):
            planned = settings.repeats if stage == "train" else records.planned_repeats(cli.OUTPUTS)
            if planned > 1:
                run_repeats(settings, cli.OUTPUTS, [stage], planned, child_starter(stage))
                sys.exit(0)


def run_stage(stage: str, run: RunStage, doc: str | None) -> None:
    """Run a stage from the command line: one repeat if this process is a driver's child, else a single run."""

    def run_single(settings: config.Settings, folder: Path) -> None:
        run(settings, folder, 1)
        summarise(folder, stage)

    if not run_as_child(run, doc):
        cli.main(run_single, doc)


def run_as_child(run: RunStage, doc: str | None) -> bool:
    """Run one repeat if this process is a driver's child. Returns whether it is."""
    child = _child_environment()
    if child is None:
        return False
    number, folder = child

    def run_repeat(settings: config.Settings, _: Path) -> None:
        try:
            run(settings, folder, number)
        except KeyboardInterrupt:
            sys.exit(130)  # without a message: the driver prints one

    with _stoppable(twice=False):
        cli.main(run_repeat, doc)
    return True


def _child_environment() -> tuple[int, Path] | None:
    """The repeat and the folder that the driver gave this process. None if it is no child."""
    number, _, folder = os.environ.get(CHILD, "").partition(":")
    return (int(number), Path(folder)) if number else None


# --- the driver


def run_repeats(
    settings: config.Settings, folder: Path, stages: Sequence[str], planned: int, start_child: StartChild
) -> None:
    """Run `stages` for each repeat that `folder` lacks, each repeat in a process.

    Resumes an interrupted set if its fixed values are unchanged; otherwise deletes its outputs and starts a new set.
    Raises RepeatFailedError if a child fails, and StageError if another process works in `folder`. The parent run in
    MLflow then gets the status FAILED, or KILLED after Ctrl-C and SIGTERM.
    """
    from pipeline.tracking import publisher, store  # MLflow takes seconds to import, and most commands need no driver

    store.store_uri()  # raises before any work if the store would be lost
    path = folder / stages[0] / PLAN
    with _lock(folder) as lock, _stoppable(twice=True):
        plan = _resume_or_plan(settings, folder, stages, planned)
        try:
            for number in range(1, planned + 1):
                if not missing_stages(folder, stages, number):
                    continue
                if list(stages) != ["evaluate"]:  # accuracy does not depend on the machine's temperature
                    _pause(plan)
                _run_repeat(plan, path, number, lambda number: start_child(number, folder, lock))
                _save_repeat(folder, stages, number)
                if "train" in stages:
                    record = files.read_json(records.stage_folders(folder, number)["train"] / "record.json")
                    publisher.update_parent(record, records.experiment_name(settings, record["tags"]))
            _finish(settings, folder, stages)
        except BaseException as error:
            with suppress(StageError):
                store.end_repeats(plan.id, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        plan.ended = store.now()
        plan.write(path)
        _delete_saved(folder, stages)


def find_unfinished(base: Path, settings: config.Settings, folder: Path) -> Path | None:
    """Find the newest folder below `base` whose interrupted set can be resumed with `settings` and with the machine,
    data and weights of `folder`. If there is none, print why the newest set can't be resumed, and return None."""
    fixed = _fixed_values(settings, folder, ["train"])
    paths = sorted(base.glob(f"*/train/{PLAN}"), key=lambda path: path.stat().st_mtime, reverse=True)
    plans = [(path.parent.parent, plan) for path in paths if (plan := Plan.read(path)) and plan.ended is None]
    for candidate, plan in plans:
        if plan.fixed == fixed and _is_free(candidate):
            return candidate
    if plans and plans[0][1].fixed != fixed:
        newest, plan = plans[0]
        _print_difference(plan, fixed, newest)
    return None


def missing_stages(folder: Path, stages: Sequence[str], number: int) -> list[str]:
    """The stages, of those that the driver runs, that have no record of this repeat of the planned set."""
    plan = Plan(**files.read_json(folder / stages[0] / PLAN))
    folders = records.stage_folders(folder, number)
    paths = {stage: folders[stage] / "record.json" for stage in ("train", *stages)}
    present = {stage: files.read_json(path) for stage, path in paths.items() if path.exists()}
    training = present.get("train")
    if training is None or training["tags"].get("repeats.id") != plan.id:
        return list(stages)
    return [stage for stage in stages if stage not in present or present[stage]["id"] != training["id"]]


def repeat_tags(settings: config.Settings, folder: Path, number: int) -> dict[str, str]:
    """The tags that say which repeat a training is (see records.py); none for a single training."""
    if settings.repeats == 1:
        return {}
    plan = Plan(**files.read_json(folder / "train" / PLAN))
    tags = {"repeats.id": plan.id, "repeat": str(number), "repeats": str(plan.repeats)}
    pause = plan.order[-1].get("pause_seconds")
    return tags if pause is None else tags | {"repeat.pause_seconds": f"{pause:.1f}"}


def clear_outputs(folder: Path, stage: str, number: int, planned: int) -> Path:
    """Delete the old outputs of a stage's repeat and return its folder. The folder of the first of several repeats also
    holds the plan and the other repeats: these stay."""
    out = records.stage_folders(folder, number)[stage]
    preserved = {"repeats", PLAN} if number == 1 and planned > 1 else set()
    for path in out.iterdir() if out.exists() else ():
        if path.name not in preserved:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return out


def summarise(folder: Path, stage: str) -> None:
    """Write the metrics of a stage, a row for each repeat, and their summary."""
    trained = records.training_records(folder)
    if stage == "train":
        metrics = [records.final_metrics(record) for record in trained]
    else:
        paths = [records.stage_folders(folder, records.repeat_number(record))[stage] for record in trained]
        metrics = [files.read_json(path / "record.json")["metrics"] for path in paths]
    records.write_summary(folder, stage, trained, metrics)
    if stage == "evaluate" and len(trained) > 1:
        terminal.say(f"repeats  {descriptions.describe_spread([record['metrics'] for record in trained], metrics)}")


def _resume_or_plan(settings: config.Settings, folder: Path, stages: Sequence[str], planned: int) -> Plan:
    """Return the plan of an interrupted set that can be resumed. Else delete the old outputs and write a new plan."""
    from pipeline.tracking import store

    path = folder / stages[0] / PLAN
    fixed = _fixed_values(settings, folder, stages)
    plan = Plan.read(path)
    if plan is not None and plan.ended is None:
        if plan.fixed == fixed:
            _restore_saved(folder, stages)
            complete = sum(not missing_stages(folder, stages, number) for number in range(1, planned + 1))
            terminal.say(f"resumed  {complete} of {planned} repeats are complete")
            # A process that was killed could not end its MLflow run.
            store.end_repeats(plan.id, "KILLED", [record["id"] for record in records.present_records(folder)])
            store.refer_given_run(plan.id)
            plan.pause_seconds = settings.repeat_pause
            return plan
        _print_difference(plan, fixed, folder)
    if "train" in stages:
        set_id, seeds = uuid.uuid4().hex, [settings.seed + number for number in range(planned)]
    else:
        trained = records.training_records(folder)
        set_id = trained[0]["tags"]["repeats.id"]
        seeds = [int(record["params"]["settings.seed"]) for record in trained]
    _delete_saved(folder, stages)
    for stage in stages:
        shutil.rmtree(folder / stage, ignore_errors=True)
    plan = Plan(set_id, planned, seeds, settings.repeat_pause, fixed)
    plan.write(path)
    return plan


def _save_repeat(folder: Path, stages: Sequence[str], number: int) -> None:
    """Copy the outputs of a repeat to UNFINISHED, whole or not at all."""
    for stage in stages:
        saved = folder / UNFINISHED / stage / str(number)
        partial = saved.with_name(f".{number}")
        shutil.rmtree(partial, ignore_errors=True)
        ignore = shutil.ignore_patterns("repeats", PLAN) if number == 1 else None
        source = records.stage_folders(folder, number)[stage]
        shutil.copytree(source, partial, ignore=ignore, copy_function=_link_if_missing)
        shutil.rmtree(saved, ignore_errors=True)
        partial.replace(saved)


def _restore_saved(folder: Path, stages: Sequence[str]) -> None:
    """Put the files of saved repeats back where they are missing."""
    for stage in stages:
        for saved in (folder / UNFINISHED / stage).glob("[0-9]*"):
            target = records.stage_folders(folder, int(saved.name))[stage]
            shutil.copytree(saved, target, copy_function=_link_if_missing, dirs_exist_ok=True)


def _delete_saved(folder: Path, stages: Sequence[str]) -> None:
    for stage in stages:
        shutil.rmtree(folder / UNFINISHED / stage, ignore_errors=True)


def _link_if_missing(source: str, target: str) -> None:
    """Hard-link a file, which takes no space; copy it if the file system can't."""
    if not Path(target).exists():
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)


def _fixed_values(settings: config.Settings, folder: Path, stages: Sequence[str]) -> dict[str, Any]:
    """What must be the same for all repeats of a set, by dotted key: settings, machine, data, weights and versions. For
    later stages also the trainings."""
    hardware, inputs = files.read_json(folder / "hardware.json"), records.load_inputs(settings, folder)
    fixed = {key: value for key, value in records.effective_settings(settings).items() if key not in MAY_CHANGE}
    fixed |= {
        "machine": hardware["machine"],
        "torch": hardware.get("torch"),
        "data digest": inputs["data"]["digest"],
        "weights digest": inputs["weights"]["digest"],
        "execution version": config.EXECUTION_VERSION,
        "workload version": config.WORKLOAD_VERSION,
    }
    if "train" not in stages:
        fixed["trainings"] = [record["id"] for record in records.training_records(folder)]
    flat: dict[str, Any] = json.loads(json.dumps(config.flatten(fixed)))  # the same types as in a plan that was read
    return flat


def _print_difference(plan: Plan, fixed: dict[str, Any], folder: Path) -> None:
    """Print which fixed values differ from those of the unfinished set in `folder`."""
    keys = [key for key in dict.fromkeys([*plan.fixed, *fixed]) if plan.fixed.get(key) != fixed.get(key)]
    shown = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
    terminal.say(
        f"note     the unfinished set of {plan.repeats} repeats in {folder.name} was started with another {shown}: "
        "a new set starts"
    )


def _pause(plan: Plan) -> None:
    """Wait until `pause_seconds` have passed since the last complete repeat."""
    last = plan.last_end()
    seconds = plan.pause_seconds - (time.time() - last / 1000) if last is not None else 0.0
    if seconds > 0:
        terminal.say(f"pause    {seconds:,.0f} s until the next repeat (repeat_pause)")
        time.sleep(seconds)


def _run_repeat(plan: Plan, path: Path, number: int, start_child: Callable[[int], int]) -> None:
    """Run one repeat in a process. Write its start, end and exit status into the plan."""
    last, start = plan.last_end(), time.time_ns() // 1_000_000
    entry: dict[str, Any] = {"repeat": number, "start": start}
    if last is not None:
        entry["pause_seconds"] = (start - last) / 1000
    plan.order.append(entry)
    plan.write(path)
    terminal.say(f"repeat   {number} of {plan.repeats}, seed {plan.seeds[number - 1]}")
    try:
        status = entry["status"] = start_child(number)
    finally:
        entry["end"] = time.time_ns() // 1_000_000
        plan.write(path)
    if status == 130:
        raise KeyboardInterrupt
    if status:
        raise RepeatFailedError(
            f"repeat {number} of {plan.repeats} ended with exit status {status}; the same command resumes the set",
            status,
        )


def _finish(settings: config.Settings, folder: Path, stages: Sequence[str]) -> None:
    """Summarise a complete set, in files and in the store."""
    from pipeline.tracking import publisher

    trained = records.training_records(folder)
    experiment = records.experiment_name(settings, trained[0]["tags"])
    for stage in stages:
        summarise(folder, stage)
    for record in trained:  # a child that was killed may have written records that it did not log
        publisher.add_missing_stages(record, experiment, records.stage_folders(folder, records.repeat_number(record)))
    publisher.update_parent(trained[0], experiment)


# --- processes


def child_starter(module: str) -> StartChild:
    """Start this process's command line again, as `python -m pipeline.<module>`, for one repeat."""
    return command_starter([sys.executable, "-m", f"pipeline.{module}", *sys.argv[1:]])


def command_starter(command: Sequence[str]) -> StartChild:
    """Start `command` for one repeat. After Ctrl-C or SIGTERM, terminate the child and wait for it; after a second one,
    kill it. A child that a signal killed has the exit status 128 plus the signal's number, as in a shell."""

    def start_child(number: int, folder: Path, lock: IO[str]) -> int:
        environment = os.environ | {CHILD: f"{number}:{folder.absolute()}"}
        inherited = () if sys.platform == "win32" else (lock.fileno(),)
        child = subprocess.Popen(command, env=environment, pass_fds=inherited)
        try:
            status = child.wait()
        except KeyboardInterrupt:
            if sys.platform != "win32":  # on Windows the child gets Ctrl-C itself, and `terminate` kills at once
                child.terminate()
            try:
                child.wait()
            except KeyboardInterrupt:
                child.kill()
                child.wait()
            raise
        return status if status >= 0 else 128 - status

    return start_child


@contextmanager
def _stoppable(*, twice: bool) -> Iterator[None]:
    """Raise KeyboardInterrupt at the first SIGINT or SIGTERM. With `twice`, also when the same signal comes again.

    Ctrl-C in a terminal reaches both driver and child. The driver then sends the child SIGTERM, which must not
    interrupt the child while it cleans up.
    """
    seen: set[int] = set()

    def stop(number: int, frame: FrameType | None) -> None:
        raises = not seen or (twice and number in seen)
        seen.add(number)
        if raises:
            raise KeyboardInterrupt

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    replaced = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    for number in replaced:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)


@contextmanager
def _lock(folder: Path) -> Iterator[IO[str]]:
    """Lock a folder for this process and for children that inherit the file. Raises StageError if it is locked."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as lock:
        try:
            if sys.platform == "win32":
                msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StageError(f"{folder}: another process runs repeats in this folder: wait until it ends") from None
        yield lock


def _is_free(folder: Path) -> bool:
    try:
        with _lock(folder):
            return True
    except StageError:
        return False
