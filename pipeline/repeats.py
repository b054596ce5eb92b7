"""Repeats: each is a process, one after another, with the seeds `seed`, `seed` + 1, ...

The driver imports no torch. It writes a plan before it starts the first process, and starts one for each repeat that
is missing, so that a set that was interrupted goes on. A child learns from an environment variable which repeat it is.
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
"""Environment variable that a driver sets for its child: `<number of the repeat>:<folder>`. Not a user's setting."""

PLAN, LOCK = "set.json", ".lock"
"""The plan, in the folder of the driver's first stage, and the file that a driver and its children lock."""

UNFINISHED = ".unfinished"
"""Folder beside the stages' with the outputs of each complete repeat of an unfinished set. DVC deletes the outputs of a
stage before it starts it again."""

NOT_FIXED = ("compare", "tracking", "repeat_pause")
"""Settings that may change before a set goes on."""

RunStage = Callable[[config.Settings, Path, int], Any]
"""Runs a stage for one repeat: settings, folder of all stages, number of the repeat from 1."""

StartChild = Callable[[int, Path, IO[str]], int]
"""Runs a repeat in a process: its number, the folder of all stages, the locked file. Returns the exit status."""


class RepeatFailedError(StageError):
    """A child ended with another exit status than 0. The driver ends with the same."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


@dataclass
class Plan:
    """What is written before the first repeat starts, and what happened since. Times are in ms since 1970."""

    id: str
    repeats: int
    seeds: list[int]
    pause_seconds: float
    fixed: dict[str, Any]
    """What must be the same for all repeats, by dotted key."""
    order: list[dict[str, Any]] = field(default_factory=list)
    """For each process: `repeat`, `start`, `end`, `status`, and `pause_seconds` since the end of the last complete one.
    A process that was killed together with its driver has no end."""
    ended: int | None = None
    """When the set was complete. None: not yet."""

    @classmethod
    def read(cls, path: Path) -> "Plan | None":
        """The plan at `path`. None if there is none that can be read."""
        with suppress(StageError, TypeError):
            return cls(**files.read_json(path))
        return None

    def write(self, path: Path) -> None:
        """Write the plan atomically."""
        files.write_json(path, dataclasses.asdict(self))

    def last_end(self) -> int | None:
        """When the last complete repeat ended."""
        return max((entry["end"] for entry in self.order if entry.get("status") == 0), default=None)


# --- the command line of the stages


def start_stage(doc: str | None, stage: str) -> None:
    """Answer --help and refuse a wrong setting before torch is imported, which takes seconds. Then run the repeats of a
    stage that has several, and exit."""
    settings = cli.parse_early(doc)
    if _child_environment() is None:
        with cli.exit_on_error(cli.program()):
            planned = settings.repeats if stage == "train" else records.planned_repeats(cli.OUTPUTS)
            if planned > 1:
                run_repeats(settings, cli.OUTPUTS, [stage], planned, child_starter(stage))
                sys.exit(0)


def run_stage(stage: str, run: RunStage, doc: str | None) -> None:
    """Run a stage from the command line, for one repeat in a driver's child, else once."""

    def once(settings: config.Settings, folder: Path) -> None:
        run(settings, folder, 1)
        summarise(folder, stage)

    if not run_as_child(run, doc):
        cli.main(once, doc)


def run_as_child(run: RunStage, doc: str | None) -> bool:
    """Run one repeat if this process is a driver's child. Returns whether it is."""
    child = _child_environment()
    if child is None:
        return False
    number, folder = child

    def repeat(settings: config.Settings, _: Path) -> None:
        try:
            run(settings, folder, number)
        except KeyboardInterrupt:
            sys.exit(130)  # the driver says why

    with _stoppable(twice=False):
        cli.main(repeat, doc)
    return True


def _child_environment() -> tuple[int, Path] | None:
    number, _, folder = os.environ.get(CHILD, "").partition(":")
    return (int(number), Path(folder)) if number else None


# --- the driver


def run_repeats(
    settings: config.Settings, folder: Path, stages: Sequence[str], planned: int, start_child: StartChild
) -> None:
    """Run `stages` for each repeat that is missing in `folder`, each in a process.

    An interrupted set goes on if nothing that matters has changed, else a new set starts and old outputs are deleted.
    Raises RepeatFailedError if a child fails, and StageError if another process works there. The parent run is then
    FAILED, or KILLED after Ctrl-C and SIGTERM.
    """
    from pipeline.tracking import publisher, store  # MLflow takes seconds to import, and most commands need no driver

    store.store_uri()  # refuses a store that would be lost, before any work
    path = folder / stages[0] / PLAN
    with _lock(folder) as lock, _stoppable(twice=True):
        plan = _resume_or_plan(settings, folder, stages, planned)
        try:
            for number in range(1, planned + 1):
                if not _missing_stages(plan, folder, stages, number):
                    continue
                if list(stages) != ["evaluate"]:  # an accuracy does not depend on the machine's temperature
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
    """The folder below `base` with an interrupted set that goes on with `settings` and the machine, data and weights of
    `folder`, the last one used if there are several. If there is none, say why the last set does not go on."""
    fixed = _fixed_values(settings, folder, ["train"])
    paths = sorted(base.glob(f"*/train/{PLAN}"), key=lambda path: path.stat().st_mtime, reverse=True)
    plans = [(path.parent.parent, plan) for path in paths if (plan := Plan.read(path)) and plan.ended is None]
    for other, plan in plans:
        if plan.fixed == fixed and _is_free(other):
            return other
    if plans and plans[0][1].fixed != fixed:
        other, plan = plans[0]
        terminal.say(f"note     {_difference(plan, fixed)}, in {other.name}: a new set starts")
    return None


def missing_stages(folder: Path, stages: Sequence[str], number: int) -> list[str]:
    """Those of a process's `stages` that have no record of this repeat."""
    plan = Plan(**files.read_json(folder / stages[0] / PLAN))
    return _missing_stages(plan, folder, stages, number)


def repeat_tags(settings: config.Settings, folder: Path, number: int) -> dict[str, str]:
    """The tags of a training that say which repeat it is (see records.py). A single one has none."""
    if settings.repeats == 1:
        return {}
    plan = Plan(**files.read_json(folder / "train" / PLAN))
    tags = {"repeats.id": plan.id, "repeat": str(number), "repeats": str(plan.repeats)}
    pause = plan.order[-1].get("pause_seconds")
    return tags if pause is None else tags | {"repeat.pause_seconds": f"{pause:.1f}"}


def clear_outputs(folder: Path, stage: str, number: int, planned: int) -> Path:
    """Delete what an earlier repeat left in a stage's folder, and return that folder. The first of several repeats has
    the other ones and the plan in its folder, which stay."""
    out = records.stage_folders(folder, number)[stage]
    preserved = {"repeats", PLAN} if number == 1 and planned > 1 else set()
    for path in out.iterdir() if out.exists() else ():
        if path.name not in preserved:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return out


def summarise(folder: Path, stage: str) -> None:
    """Write the metrics of all repeats of a stage, or of a single training, and their summary."""
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
    """The plan of an interrupted set, or a new one, after deleting the outputs of an earlier set."""
    from pipeline.tracking import store

    path = folder / stages[0] / PLAN
    fixed = _fixed_values(settings, folder, stages)
    plan = Plan.read(path)
    if plan is not None and plan.ended is None:
        if plan.fixed == fixed:
            _restore_saved(folder, stages)
            complete = sum(not _missing_stages(plan, folder, stages, number) for number in range(1, planned + 1))
            terminal.say(f"resumed  {complete} of {planned} repeats are there")
            # A process that was killed could not end its run.
            store.end_repeats(plan.id, "KILLED", [record["id"] for record in records.present_records(folder)])
            store.refer_given_run(plan.id)
            plan.pause_seconds = settings.repeat_pause
            return plan
        terminal.say(f"note     {_difference(plan, fixed)}: it starts anew")
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
    """Save what a repeat left, whole or not at all, as links where the file system has them."""
    for stage in stages:
        saved = folder / UNFINISHED / stage / str(number)
        partial = saved.with_name(f".{number}")
        shutil.rmtree(partial, ignore_errors=True)
        not_its_own = shutil.ignore_patterns("repeats", PLAN) if number == 1 else None
        source = records.stage_folders(folder, number)[stage]
        shutil.copytree(source, partial, ignore=not_its_own, copy_function=_link_if_missing)
        shutil.rmtree(saved, ignore_errors=True)
        partial.replace(saved)


def _restore_saved(folder: Path, stages: Sequence[str]) -> None:
    """Put back what was deleted of each saved repeat."""
    for stage in stages:
        for saved in (folder / UNFINISHED / stage).glob("[0-9]*"):
            target = records.stage_folders(folder, int(saved.name))[stage]
            shutil.copytree(saved, target, copy_function=_link_if_missing, dirs_exist_ok=True)


def _delete_saved(folder: Path, stages: Sequence[str]) -> None:
    for stage in stages:
        shutil.rmtree(folder / UNFINISHED / stage, ignore_errors=True)


def _link_if_missing(source: str, target: str) -> None:
    if not Path(target).exists():
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)


def _missing_stages(plan: Plan, folder: Path, stages: Sequence[str], number: int) -> list[str]:
    folders = records.stage_folders(folder, number)
    paths = {stage: folders[stage] / "record.json" for stage in ("train", *stages)}
    present = {stage: files.read_json(path) for stage, path in paths.items() if path.exists()}
    training = present.get("train")
    if training is None or training["tags"].get("repeats.id") != plan.id:
        return list(stages)
    return [stage for stage in stages if stage not in present or present[stage]["id"] != training["id"]]


def _fixed_values(settings: config.Settings, folder: Path, stages: Sequence[str]) -> dict[str, Any]:
    """What all repeats of a set share, by dotted key: settings, machine, data, weights and versions. For later stages
    also the trainings."""
    hardware, inputs = files.read_json(folder / "hardware.json"), records.load_inputs(settings, folder)
    fixed = {key: value for key, value in records.effective_settings(settings).items() if key not in NOT_FIXED}
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
    flat: dict[str, Any] = json.loads(json.dumps(config.flat(fixed)))  # as it is read from a file
    return flat


def _difference(plan: Plan, fixed: dict[str, Any]) -> str:
    """Which fixed values differ from a plan's, in words."""
    keys = [key for key in dict.fromkeys([*plan.fixed, *fixed]) if plan.fixed.get(key) != fixed.get(key)]
    shown = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
    return f"a set of {plan.repeats} repeats is not complete, but was begun with another {shown}"


def _pause(plan: Plan) -> None:
    """Wait until the planned pause after the last process is over."""
    last = plan.last_end()
    seconds = plan.pause_seconds - (time.time() - last / 1000) if last is not None else 0.0
    if seconds > 0:
        terminal.say(f"pause    {seconds:,.0f} s until the next repeat (repeat_pause)")
        time.sleep(seconds)


def _run_repeat(plan: Plan, path: Path, number: int, start_child: Callable[[int], int]) -> None:
    """Run one repeat in a process, and write that into the plan."""
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
            f"repeat {number} of {plan.repeats} ended with exit status {status}; the same command goes on from it",
            status,
        )


def _finish(settings: config.Settings, folder: Path, stages: Sequence[str]) -> None:
    """Summarise all repeats, in files and in the store."""
    from pipeline.tracking import publisher

    trained = records.training_records(folder)
    experiment = records.experiment_name(settings, trained[0]["tags"])
    for stage in stages:
        summarise(folder, stage)
    for record in trained:  # a child that was killed may not have logged all that it left
        publisher.add_missing_stages(record, experiment, records.stage_folders(folder, records.repeat_number(record)))
    publisher.update_parent(trained[0], experiment)


# --- processes


def child_starter(module: str) -> StartChild:
    """Start this process's own command line, as `python -m pipeline.<module>`, for one repeat."""
    return command_starter([sys.executable, "-m", f"pipeline.{module}", *sys.argv[1:]])


def command_starter(command: Sequence[str]) -> StartChild:
    """Start `command` for one repeat. The exit status is a shell's: 128 plus the signal that killed the child. Ctrl-C
    and SIGTERM are passed on and the child's end is waited for. A second signal kills it."""

    def start_child(number: int, folder: Path, lock: IO[str]) -> int:
        environment = os.environ | {CHILD: f"{number}:{folder.absolute()}"}
        inherited = () if sys.platform == "win32" else (lock.fileno(),)
        child = subprocess.Popen(command, env=environment, pass_fds=inherited)
        try:
            status = child.wait()
        except KeyboardInterrupt:
            if sys.platform != "win32":  # there Ctrl-C reaches all, and `terminate` leaves no time for an end
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
    """Let SIGTERM raise KeyboardInterrupt as SIGINT does, but only once, so that a signal sent to both driver and child
    does not disturb the child's end. `twice`: the same signal raises it a second time."""
    seen: set[int] = set()

    def stop(number: int, frame: FrameType | None) -> None:
        is_first, is_same = not seen, number in seen
        seen.add(number)
        if is_first or (twice and is_same):
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
    """Lock a folder for this process and the children that inherit the file. Raises StageError if another has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as lock:
        try:
            if sys.platform == "win32":
                msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StageError(f"{folder}: another process repeats a training there: wait for its end") from None
        yield lock


def _is_free(folder: Path) -> bool:
    try:
        with _lock(folder):
            return True
    except StageError:
        return False
