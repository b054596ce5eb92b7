"""Repeats: each is a process of its own, one after another, with the seeds `seed`, `seed` + 1, ...

The driver, which imports no torch, writes a plan before it starts the first process, and starts one for each repeat
that is missing. So a set of repeats that was cut off goes on where it ended. A child learns from an environment
variable which repeat it is.
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
from pipeline.tracking import records

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

CHILD = "TRAINMARK_REPEAT"
"""Environment variable that a driver sets for its child: `<number of the repeat>:<folder>`. No user's setting."""

PLAN, LOCK = "set.json", ".lock"
"""The plan, in the folder of the driver's first stage; and the file that a driver and its children hold."""

UNFINISHED = ".unfinished"
"""Folder beside the stages' that keeps what each repeat of an unfinished set left. DVC deletes the outputs of a stage
before it starts it again."""

NOT_FIXED = ("compare", "tracking", "repeat_pause")
"""Settings that may change while a set of repeats goes on."""

Run = Callable[[config.Settings, Path, int], Any]
"""Runs a stage for one repeat: settings, folder of all stages, number of the repeat from 1."""


class RepeatFailedError(StageError):
    """A child ended with another exit status than 0, which is the driver's then."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


@dataclass
class Plan:
    """What is written before the first repeat starts, and what has happened since."""

    id: str
    repeats: int
    """How many are planned."""
    seeds: list[int]
    pause_seconds: float
    """Of waiting between two processes."""
    fixed: dict[str, Any]
    """What must not change between two repeats, by dotted key."""
    order: list[dict[str, Any]] = field(default_factory=list)
    """Of each process that was started: `repeat`, `start`, `end` (milliseconds since 1970), `status`, and
    `pause_seconds` since the repeat before it was complete. One that was killed together with its driver has no end."""
    ended: int | None = None
    """When the set was complete; None: it is not yet."""

    @classmethod
    def read(cls, path: Path) -> "Plan | None":
        """The plan at `path`; None where there is none that can be read."""
        with suppress(StageError, TypeError):
            return cls(**files.read_json(path))
        return None

    def write(self, path: Path) -> None:
        """Writes the plan, whole or not at all."""
        files.write_json(path, dataclasses.asdict(self))

    def last_end(self) -> int | None:
        """When the last complete repeat ended, in milliseconds since 1970."""
        return max((entry["end"] for entry in self.order if entry.get("status") == 0), default=None)


# --- the command line of the stages


def start_stage(doc: str | None, stage: str) -> None:
    """What a stage's command does before it imports torch, which takes seconds: answers --help, refuses a wrong
    setting, and drives the stage where it is repeated, which ends the process."""
    settings = cli.parse_early(doc)
    if _child_environment() is None:
        with cli.exit_on_error(cli.program()):
            planned = settings.repeats if stage == "train" else records.planned_repeats(cli.OUTPUTS)
            if planned > 1:
                run_repeats(settings, cli.OUTPUTS, [stage], planned, child_command(stage))
                sys.exit(0)


def run_stage(stage: str, run: Run, doc: str | None) -> None:
    """Runs a stage from the command line, as a driver's child or once, and ends the process with its exit status."""

    def once(settings: config.Settings, folder: Path) -> None:
        run(settings, folder, 1)
        summarise(folder, stage)

    if not run_as_child(run, doc):
        cli.main(once, doc)


def run_as_child(run: Run, doc: str | None) -> bool:
    """Runs one repeat where this process is a driver's child, and ends the process; else False."""
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


def child_command(name: str) -> list[str]:
    """The command of a child: this process's own, as a module of Python."""
    return [sys.executable, "-m", f"pipeline.{name}", *sys.argv[1:]]


def _child_environment() -> tuple[int, Path] | None:
    number, _, folder = os.environ.get(CHILD, "").partition(":")
    return (int(number), Path(folder)) if number else None


# --- the driver


def run_repeats(
    settings: config.Settings, folder: Path, stages: Sequence[str], planned: int, command: Sequence[str]
) -> None:
    """Starts `command`, which runs `stages` for one repeat, for each repeat that is missing in `folder`.

    A set that was cut off goes on, if nothing that matters has changed; everything else starts anew, and what earlier
    ones left is deleted. Raises RepeatFailedError where a child fails, StageError where another process is at it;
    the run above the repeats is then FAILED, after Ctrl-C (and SIGTERM) KILLED.
    """
    from pipeline.tracking import publisher, store  # MLflow takes seconds to import, and most commands need no driver

    store.store_uri()  # refuses a store that would be lost, before any work
    path = folder / stages[0] / PLAN
    with _lock(folder) as lock, _stoppable(twice=True):
        plan = _load_or_new_plan(settings, folder, stages, planned)
        try:
            for number in range(1, planned + 1):
                if not _missing_of(plan, folder, stages, number):
                    continue
                if "train" in stages or "sustain" in stages:  # an accuracy is the same at any hour
                    _pause(plan)
                _run_repeat(plan, path, number, command, folder, lock)
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
    """The folder below `base` that holds a set of repeats which was cut off, and which goes on with `settings` and with
    what `folder` says of machine, data and weights; of several the one that was worked on last. Where there is none,
    it says why the last set does not go on."""
    fixed = _fixed_values(settings, folder, ["train"])
    paths = sorted(base.glob(f"*/train/{PLAN}"), key=lambda path: path.stat().st_mtime, reverse=True)
    plans = [(path.parent.parent, plan) for path in paths if (plan := Plan.read(path)) and plan.ended is None]
    for other, plan in plans:
        if plan.fixed == fixed and _is_free(other):
            return other
    for other, plan in plans[:1]:
        if plan.fixed != fixed:
            terminal.say(f"note     {_difference(plan, fixed)}, in {other.name}: a new set starts")
    return None


def missing_stages(folder: Path, stages: Sequence[str], number: int) -> list[str]:
    """The stages, of those that a driver runs in one process, whose record of this repeat is not there."""
    return _missing_of(_plan(folder, stages[0]), folder, stages, number)


def repeat_tags(settings: config.Settings, folder: Path, number: int) -> dict[str, str]:
    """The tags of the training that is this repeat (see records.py); of a single one there are none."""
    if settings.repeats == 1:
        return {}
    plan = _plan(folder, "train")
    own = {"repeats.id": plan.id, "repeat": str(number), "repeats": str(plan.repeats)}
    pause = plan.order[-1].get("pause_seconds")
    return own if pause is None else own | {"repeat.pause_seconds": f"{pause:.1f}"}


def clear_outputs(folder: Path, stage: str, number: int, planned: int) -> Path:
    """The folder of a stage's repeat, without anything of an earlier one. The first of several has the others, and the
    plan, in it: these stay."""
    out = records.stage_folders(folder, number)[stage]
    kept = {"repeats", PLAN} if number == 1 and planned > 1 else set()
    for path in out.iterdir() if out.exists() else ():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return out


def summarise(folder: Path, stage: str) -> None:
    """Writes what a stage found of all repeats, or of a single training."""
    trained = records.training_records(folder)
    if stage == "train":
        figures = [records.final_metrics(record) for record in trained]
    else:
        paths = [
            records.stage_folders(folder, records.repeat_number(record))[stage] / "record.json" for record in trained
        ]
        figures = [files.read_json(path)["metrics"] for path in paths]
    records.write_summary(folder, stage, trained, figures)
    if stage == "evaluate" and len(trained) > 1:
        terminal.say(f"repeats  {records.describe_spread([record['metrics'] for record in trained], figures)}")


def _load_or_new_plan(settings: config.Settings, folder: Path, stages: Sequence[str], planned: int) -> Plan:
    """The plan of a set that was cut off, or a new one, written, with nothing left of what was there."""
    from pipeline.tracking import store

    path = folder / stages[0] / PLAN
    fixed = _fixed_values(settings, folder, stages)
    plan = Plan.read(path)
    if plan is not None and plan.ended is None and plan.fixed == fixed:
        _restore_repeats(folder, stages)
        whole = sum(not _missing_of(plan, folder, stages, number) for number in range(1, planned + 1))
        terminal.say(f"resumed  {whole} of {planned} repeats are there")
        # What was killed could not say so.
        store.end_repeats(plan.id, "KILLED", [record["id"] for record in records.present_records(folder)])
        store.refer_given_run(plan.id)
        plan.pause_seconds = settings.repeat_pause
        return plan
    if plan is not None and plan.ended is None:
        terminal.say(f"note     {_difference(plan, fixed)}: it starts anew")
    if "train" in stages:
        set_id, seeds = uuid.uuid4().hex, [settings.seed + number for number in range(planned)]
    else:
        trained = records.training_records(folder)
        set_id, seeds = trained[0]["tags"]["repeats.id"], [int(each["params"]["settings.seed"]) for each in trained]
    _delete_saved(folder, stages)
    for stage in stages:
        shutil.rmtree(folder / stage, ignore_errors=True)
    plan = Plan(set_id, planned, seeds, settings.repeat_pause, fixed)
    plan.write(path)
    return plan


def _save_repeat(folder: Path, stages: Sequence[str], number: int) -> None:
    """Keeps what a repeat left, whole or not at all. Links take no room."""
    for stage in stages:
        kept = folder / UNFINISHED / stage / str(number)
        aside = kept.with_name(f".{number}")
        shutil.rmtree(aside, ignore_errors=True)
        others = shutil.ignore_patterns("repeats", PLAN) if number == 1 else None
        shutil.copytree(records.stage_folders(folder, number)[stage], aside, ignore=others, copy_function=_link)
        shutil.rmtree(kept, ignore_errors=True)
        aside.replace(kept)


def _restore_repeats(folder: Path, stages: Sequence[str]) -> None:
    """Puts what was kept of each repeat back to where it was deleted."""
    for stage in stages:
        for kept in (folder / UNFINISHED / stage).glob("[0-9]*"):
            target = records.stage_folders(folder, int(kept.name))[stage]
            shutil.copytree(kept, target, copy_function=_link, dirs_exist_ok=True)


def _delete_saved(folder: Path, stages: Sequence[str]) -> None:
    for stage in stages:
        shutil.rmtree(folder / UNFINISHED / stage, ignore_errors=True)


def _link(source: str, target: str) -> None:
    """Makes `target` the same file, or a copy where the file system has no links; one that is there stays."""
    if not Path(target).exists():
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)


def _plan(folder: Path, stage: str) -> Plan:
    """The plan that a driver wrote for its children."""
    return Plan(**files.read_json(folder / stage / PLAN))


def _missing_of(plan: Plan, folder: Path, stages: Sequence[str], number: int) -> list[str]:
    own = records.stage_folders(folder, number)
    left = {stage: own[stage] / "record.json" for stage in ("train", *stages)}
    found = {stage: files.read_json(path) for stage, path in left.items() if path.exists()}
    training = found.get("train")
    if training is None or training["tags"].get("repeats.id") != plan.id:
        return list(stages)
    return [stage for stage in stages if stage not in found or found[stage]["id"] != training["id"]]


def _fixed_values(settings: config.Settings, folder: Path, stages: Sequence[str]) -> dict[str, Any]:
    """What all repeats of a set share, by dotted key: settings, machine, data, weights and versions; for later stages
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
    flat: dict[str, Any] = json.loads(json.dumps(config.flat(fixed)))  # as it comes back from a file
    return flat


def _difference(plan: Plan, fixed: dict[str, Any]) -> str:
    """What differs from a plan, in words."""
    every = dict.fromkeys([*plan.fixed, *fixed])
    keys = [key for key in every if plan.fixed.get(key) != fixed.get(key)]
    shown = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
    return f"a set of {plan.repeats} repeats is not complete, but was begun with another {shown}"


def _pause(plan: Plan) -> None:
    """Waits until the planned pause after the last process has passed."""
    last = plan.last_end()
    left = plan.pause_seconds - (time.time() - last / 1000) if last is not None else 0.0
    if left > 0:
        terminal.say(f"pause    {left:,.0f} s until the next repeat (repeat_pause)")
        time.sleep(left)


def _run_repeat(plan: Plan, path: Path, number: int, command: Sequence[str], folder: Path, lock: IO[str]) -> None:
    """Runs one repeat in a process of its own, and notes it in the plan."""
    last, start = plan.last_end(), time.time_ns() // 1_000_000
    entry: dict[str, Any] = {"repeat": number, "start": start}
    if last is not None:
        entry["pause_seconds"] = (start - last) / 1000
    plan.order.append(entry)
    plan.write(path)
    terminal.say(f"repeat   {number} of {plan.repeats}, seed {plan.seeds[number - 1]}")
    try:
        status = entry["status"] = _run_child(command, number, folder, lock)
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


def _run_child(command: Sequence[str], number: int, folder: Path, lock: IO[str]) -> int:
    """The exit status of a child as a shell counts it: 128 and the signal that killed it. Ctrl-C and SIGTERM are passed
    on, and the child's end is waited for; a second time kills it."""
    environment = os.environ | {CHILD: f"{number}:{folder.absolute()}"}
    held = () if sys.platform == "win32" else (lock.fileno(),)
    child = subprocess.Popen(command, env=environment, pass_fds=held)
    try:
        status = child.wait()
    except KeyboardInterrupt:
        if sys.platform != "win32":  # where Ctrl-C reaches all, and `terminate` leaves no time for an end
            child.terminate()
        try:
            child.wait()
        except KeyboardInterrupt:
            child.kill()
            child.wait()
        raise
    return status if status >= 0 else 128 - status


def _finish(settings: config.Settings, folder: Path, stages: Sequence[str]) -> None:
    """Brings together what all repeats left."""
    from pipeline.tracking import publisher

    trained = records.training_records(folder)
    experiment = records.experiment_name(settings, trained[0]["tags"])
    for stage in stages:
        summarise(folder, stage)
    for record in trained:  # a child that was killed may have left what it had not logged yet
        publisher.add_missing_stages(record, experiment, records.stage_folders(folder, records.repeat_number(record)))
    publisher.update_parent(trained[0], experiment)


# --- processes


@contextmanager
def _stoppable(*, twice: bool) -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt as SIGINT does, but only one of both, so that the other one, or the same from
    terminal and driver, does not disturb the end. `twice`: the same signal a second time raises it again."""
    seen: set[int] = set()

    def stop(number: int, frame: FrameType | None) -> None:
        first, again = not seen, number in seen
        seen.add(number)
        if first or (twice and again):
            raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handled = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for number in handled:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, before[number])


@contextmanager
def _lock(folder: Path) -> Iterator[IO[str]]:
    """Holds a folder for this process and the children that inherit the file. Raises StageError where another does."""
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
    """Whether nobody holds a folder."""
    try:
        with _lock(folder):
            return True
    except StageError:
        return False
