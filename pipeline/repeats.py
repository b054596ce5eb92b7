"""The command's own process, the driver, and the processes that it starts to do the work.

A process that trains, a child, imports neither MLflow nor matplotlib. It leaves what it learns in files. The driver
imports no torch: it waits for the child and meanwhile brings these files into the MLflow store. Each repeat of the same
work is a child of its own, with the seeds `seed`, `seed` + 1, ... The driver writes a plan before the first one, so
that an interrupted set can be resumed.
"""

import dataclasses
import gc
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pipeline import children, cli, config, files, terminal
from pipeline.errors import StageError, Stopped
from pipeline.tracking import descriptions, pending, records

PLAN, LOCK = "set.json", ".lock"
"""File of the plan, in the folder of the driver's first stage. File that the driver locks."""

UNFINISHED = ".unfinished"
"""Folder that holds copies of the complete repeats of an unfinished set. DVC deletes a stage's outputs before it runs
the stage again."""

MAY_CHANGE = ("compare", "tracking", "repeat_pause", "resume")
"""Settings that may differ when a set is resumed."""

RunStage = Callable[[config.Settings, Path, int], Any]
"""Runs a stage for one repeat. Arguments: settings, folder of all stages, number of the repeat from 1."""

StartChild = Callable[[int, Path], int]
"""Runs a repeat in a process and returns its exit status. Arguments: number, folder of all stages."""


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
        with suppress(StageError, TypeError, LookupError, ValueError, AttributeError):
            plan = cls(**files.read_json(path))
            plan.last_end()
            if len(plan.seeds) == plan.repeats and plan.fixed.keys() and isinstance(plan.id, str):
                return plan
        return None

    def write(self, path: Path) -> None:
        """Write the plan atomically."""
        files.write_json(path, dataclasses.asdict(self))

    def last_end(self) -> int | None:
        """When the last complete repeat ended; None before the first."""
        return max((entry["end"] for entry in self.order if entry.get("status") == 0), default=None)


# --- the command line of the stages


def start_stage(doc: str | None, stage: str) -> None:
    """In the driver: answer --help, refuse wrong settings, run the stage in children and exit. In a child: return, so
    that the stage imports torch, which takes seconds."""
    settings = cli.parse_early(doc)
    if children.is_child():
        children.watch_driver()
        return
    with cli.exit_on_error(cli.program()):
        planned = settings.repeats if stage == "train" else records.planned_repeats(cli.OUTPUTS)
        start_child = children.starter(stage, settings.device)
        if planned > 1:
            run_repeats(settings, cli.OUTPUTS, [stage], planned, start_child)
        else:
            run_single(settings, cli.OUTPUTS, [stage], start_child)
    sys.exit(0)


def run_stage(run: RunStage, doc: str | None) -> None:
    """In a child: run a stage for the repeat that the driver names."""

    def run_repeat(settings: config.Settings, _: Path) -> None:
        number, folder = children.wait_for_work()
        gc.freeze()  # what was imported stays: collecting it again and again takes time
        try:
            run(settings, folder, number)
        except Stopped as error:
            sys.exit(error.status)  # without a message: the driver prints one

    with children.stoppable():
        cli.main(run_repeat, doc)
    cli.leave()


# --- the driver


def run_single(settings: config.Settings, folder: Path, stages: Sequence[str], start_child: StartChild) -> None:
    """Run `stages` once, in a process. Ends this process with the child's exit status if that is not 0. Raises
    StageError if another process works in `folder`."""
    with _lock(folder), children.stoppable():
        _check_given_run(settings, folder, stages)
        status = start_child(1, folder)
        if status:
            sys.exit(status)
        for stage in stages:
            summarise(folder, stage)


def run_repeats(
    settings: config.Settings, folder: Path, stages: Sequence[str], planned: int, start_child: StartChild
) -> None:
    """Run `stages` for each repeat that `folder` lacks, each repeat in a process.

    Resumes an interrupted set if its fixed values are unchanged; otherwise deletes its outputs and starts a new set.
    Raises RepeatFailedError if a child fails, and StageError if another process works in `folder`.
    """
    path = folder / stages[0] / PLAN
    with _lock(folder), children.stoppable():
        unfinished = _read_unfinished(settings, folder, stages)
        _check_given_run(settings, folder, stages, unfinished.id if unfinished else None)
        plan = unfinished or _start_set(settings, folder, stages, planned)
        for number in range(1, planned + 1):
            if not missing_stages(folder, stages, number):
                continue
            if list(stages) != ["evaluate"]:  # accuracy does not depend on the machine's temperature
                _pause(plan)
            _run_repeat(plan, path, number, lambda number: start_child(number, folder))
            _save_repeat(folder, stages, number)
        for stage in stages:
            summarise(folder, stage)
        plan.ended = records.now()
        plan.write(path)
        _delete_saved(folder, stages)


def _check_given_run(
    settings: config.Settings, folder: Path, stages: Sequence[str], repeats_id: str | None = None
) -> None:
    """Refuse a MLFLOW_RUN_ID that a training must not write to. Says so if the store does not answer."""
    if "train" not in stages or not os.environ.get("MLFLOW_RUN_ID"):
        return
    from pipeline.tracking import store  # MLflow takes seconds to import

    identity = training_identity(settings, folder, 1)
    resumable = [pending.partial_record(entry)["id"] for entry in pending.unfinished(identity)]
    try:
        store.check_given_run([*resumable, *([repeats_id] if repeats_id else [])])
    except store.StoreError as error:
        terminal.say(f"note     {error}: the run that MLFLOW_RUN_ID names could not be looked at")


def find_unfinished(base: Path, settings: config.Settings, folder: Path) -> Path | None:
    """Find the newest folder below `base` whose interrupted set can be resumed with `settings` and with the machine,
    data and weights of `folder`. If there is none, print why the newest set can't be resumed, and return None."""
    fixed = fixed_values(settings, folder, ["train"])
    paths = sorted(base.glob(f"*/train/{PLAN}"), key=lambda path: path.stat().st_mtime, reverse=True)
    plans = [(path.parent.parent, plan) for path in paths if (plan := Plan.read(path)) and plan.ended is None]
    for candidate, plan in plans:
        if plan.fixed == fixed and not files.is_locked(candidate / LOCK):
            return candidate
    if plans and plans[0][1].fixed != fixed and plans[0][1].repeats > 1:
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
    if training is None or (plan.repeats > 1 and training["tags"].get("repeats.id") != plan.id):
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
    preserved = {PLAN, "repeats"} if number == 1 and planned > 1 else {PLAN}
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


def _read_unfinished(settings: config.Settings, folder: Path, stages: Sequence[str]) -> Plan | None:
    """Return the plan of an interrupted set that can be resumed, after its saved files are put back. None without one;
    prints why, if it is for other fixed values."""
    plan = Plan.read(folder / stages[0] / PLAN)
    if plan is None or plan.ended is not None:
        return None
    fixed = fixed_values(settings, folder, stages)
    if plan.fixed != fixed:
        if plan.repeats > 1:
            _print_difference(plan, fixed, folder)
        return None
    _restore_saved(folder, stages)
    if plan.repeats > 1:
        complete = sum(not missing_stages(folder, stages, number) for number in range(1, plan.repeats + 1))
        terminal.say(f"resumed  {complete} of {plan.repeats} repeats are complete")
    plan.pause_seconds = settings.repeat_pause
    return plan


def _start_set(settings: config.Settings, folder: Path, stages: Sequence[str], planned: int) -> Plan:
    """Delete the old outputs of the stages and write the plan of a new set."""
    fixed = fixed_values(settings, folder, stages)
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
    plan.write(folder / stages[0] / PLAN)
    return plan


def _save_repeat(folder: Path, stages: Sequence[str], number: int) -> None:
    """Copy the outputs of a repeat to UNFINISHED, whole or not at all."""
    for stage in stages:
        saved = folder / UNFINISHED / stage / str(number)
        partial = saved.with_name(f".{number}")
        shutil.rmtree(partial, ignore_errors=True)
        ignore = shutil.ignore_patterns("repeats", PLAN) if number == 1 else None
        source = records.stage_folders(folder, number)[stage]
        shutil.copytree(source, partial, ignore=ignore, copy_function=files.link)
        shutil.rmtree(saved, ignore_errors=True)
        partial.replace(saved)


def _restore_saved(folder: Path, stages: Sequence[str]) -> None:
    """Put the files of saved repeats back where they are missing."""
    for stage in stages:
        for saved in (folder / UNFINISHED / stage).glob("[0-9]*"):
            target = records.stage_folders(folder, int(saved.name))[stage]
            shutil.copytree(saved, target, copy_function=files.link, dirs_exist_ok=True)


def _delete_saved(folder: Path, stages: Sequence[str]) -> None:
    for stage in stages:
        shutil.rmtree(folder / UNFINISHED / stage, ignore_errors=True)


def training_identity(settings: config.Settings, folder: Path, number: int) -> dict[str, Any]:
    """All that must be the same when the training of a repeat is resumed."""
    plan = Plan.read(folder / "train" / PLAN) if settings.repeats > 1 else None
    return fixed_values(settings, folder, ["train"]) | {"repeat": number, "repeats.id": plan.id if plan else None}


def fixed_values(settings: config.Settings, folder: Path, stages: Sequence[str]) -> dict[str, Any]:
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
    shown = records.changed_keys(plan.fixed, fixed)
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
    last, start = plan.last_end(), records.now()
    entry: dict[str, Any] = {"repeat": number, "start": start}
    if last is not None:
        entry["pause_seconds"] = (start - last) / 1000
    plan.order.append(entry)
    plan.write(path)
    if plan.repeats > 1:
        terminal.say(f"repeat   {number} of {plan.repeats}, seed {plan.seeds[number - 1]}")
    try:
        status = entry["status"] = start_child(number)
    finally:
        entry["end"] = records.now()
        plan.write(path)
    if status in children.STOPPED:
        raise Stopped(status)
    if status and plan.repeats == 1:
        sys.exit(status)  # the child said why
    if status:
        raise RepeatFailedError(
            f"repeat {number} of {plan.repeats} ended with exit status {status}; the same command resumes the set",
            status,
        )


def _lock(folder: Path) -> IO[str]:
    """Lock a folder for this process. A process that was just killed may hold it for a moment."""
    try:
        return files.lock(folder / LOCK, patience_seconds=2.0)
    except StageError:
        raise StageError(f"{folder}: another process works in this folder: wait until it ends") from None
