"""Whether what a stranger made is a record: its structure, and the range of all that it says.

What passes can be put into MLflow and described without an error half-way. A refusal is a UsageError: one line, which
begins with where it was found. What is not known here is refused too: nobody would have looked at it.
"""

import json
import math
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from pipeline import config
from pipeline.errors import UsageError
from pipeline.profiling import score_steps

HEX = r"[0-9a-f]{8,64}"
RECORD_ID = r"[0-9a-f]{32}"
RUN_ID = r"[0-9a-f]{32}"
"""MLflow's, too, is a UUID."""

KEY = r"\w[\w.-]*(/\w[\w.-]*)*"
"""Of a metric, param or tag. MLflow also takes blanks and, but on Windows, colons."""

KEY_LENGTH, NAME_LENGTH, PARAM_LENGTH, TAG_LENGTH = 246, 250, 6000, 5000
"""In characters. MLflow takes keys of 250, of which `std/` above repeats has four, params of 6,000 and tags of 8,000,
of which the description is one (`records.DESCRIPTION_LENGTH`); its databases take names of runs of 250."""

SENTENCE_LENGTH, TEXT_LENGTH = 1000, 100_000
"""In characters: of a warning, and of any text in JSON."""

TOGETHER = 500_000
"""Characters that a run's params or tags may take as JSON: MLflow's server takes a million bytes a call."""

PARAMS, TAGS, NAMES, EPOCHS, DATASETS, WARNINGS, CLASSES = 500, 80, 1000, 10_000, 10, 100, 100_000
"""The most of each; NAMES is of the metrics in one place. MLflow takes 100 tags a call."""

VALUES = 100_000
"""A run has fewer values than this in all its metrics: a training of seven hours has some 60,000."""

DEPTH = 12
"""How deep JSON may be nested; a record is 6 deep."""

LARGEST = 3.5e38
"""No figure is larger: float32, in which most is computed, ends before."""

EARLIEST, AHEAD = 1_577_836_800_000, 86_400_000
"""Milliseconds: 2020, before the first run; and how far another machine's clock may be ahead of this one's."""

NOT_NEGATIVE = ("time/", "speed/", "sustained/", "memory/", "energy/", "ceiling/")
"""Figures that begin so are durations, rates and amounts."""

PER_EPOCH = frozenset({
    "epoch", "train/loss", "train/accuracy", "val/loss", "val/accuracy", "train/lr", "time/train_seconds",
    "time/val_seconds",
})  # fmt: skip
OF_TRAINING = frozenset({
    "hardware", "machine", "device", "backend", "software.torch", "recipe", "precision", "dataset", "weights",
    "workload",
})  # fmt: skip
"""Figures of each epoch, and tags, that every record has."""

OF_REPEAT = frozenset({"repeats.id", "repeat", "repeats"})
"""Tags that a repeat has, all of them, and no other record."""

RESERVED = ("mlflow.", "record", "restored", "imported")
"""Tags that begin so are MLflow's, or say what we did with a run."""

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What is no character to be seen, ends a line, turns the direction of writing, or has no UTF-8."""


def refusal(where: str, problem: str) -> UsageError:
    """What is wrong, and where, on one line of moderate length."""
    return UsageError(f"{where}: {problem if len(problem) <= 250 else problem[:247] + '...'}")


def shown(value: Any) -> str:
    """A stranger's value as it may be printed."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def parse(data: bytes, where: str) -> Any:
    """`data` as JSON: UTF-8, no key twice, every number finite, no long integers, nothing deeply nested, no control
    characters in texts."""
    try:
        tree = json.loads(
            data.decode(),
            object_pairs_hook=_once,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_no_number,
        )
        _plain(tree, 0)
    except RecursionError:
        raise refusal(where, "it is nested too deeply") from None
    except ValueError as error:
        raise refusal(where, f"it is no JSON of ours: {error}") from None
    return tree


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in one place")
    return found


def _integer(text: str) -> int:
    if len(text) > 19:
        raise ValueError(f"{shown(text)} is too large")
    return int(text)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{shown(text)} is too large")
    return value


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _plain(value: Any, depth: int) -> None:
    if depth > DEPTH:
        raise ValueError("it is nested too deeply")
    if isinstance(value, str):
        if len(value) > TEXT_LENGTH:
            raise ValueError(f"a text has {len(value):,} characters, of at most {TEXT_LENGTH:,}")
        if found := CONTROL.search(value):
            raise ValueError(f"a text holds the control character {found[0]!a}")
    elif isinstance(value, dict):
        for key, inner in value.items():
            _plain(key, depth + 1)
            _plain(inner, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            _plain(inner, depth + 1)


def members(
    value: Any, where: str, required: Collection[str], optional: Collection[str] | None = ()
) -> Mapping[str, Any]:
    """A JSON object that has all of `required` and else only `optional`; None: whatever there is."""
    if not isinstance(value, dict):
        raise refusal(where, f"{shown(value)} is not allowed: expected an object")
    for key in required:
        if key not in value:
            raise refusal(where, f'"{key}" is missing')
    if optional is not None:
        for key in value:
            if key not in required and key not in optional:
                raise refusal(where, f"{shown(key)} is not known here")
    return value


def items(value: Any, where: str, most: int, least: int = 0) -> Iterable[tuple[str, Any]]:
    """The members of a JSON array of `least` to `most`, each with where it is."""
    if not isinstance(value, list):
        raise refusal(where, f"{shown(value)} is not allowed: expected an array")
    if not least <= len(value) <= most:
        raise refusal(where, f"there are {len(value):,}: expected {least} to {most:,}")
    return [(f"{where}[{index}]", each) for index, each in enumerate(value)]


def text(value: Any, where: str, most: int = NAME_LENGTH, least: int = 1) -> str:
    """A text of `least` to `most` characters."""
    if not isinstance(value, str) or not least <= len(value) <= most:
        raise refusal(where, f"{shown(value)} is not allowed: expected a text of {least} to {most:,} characters")
    return value


def matching(value: Any, where: str, pattern: str) -> str:
    """A text that is whole of the form `pattern`."""
    if not isinstance(value, str) or not re.fullmatch(pattern, value, re.ASCII):
        raise refusal(where, f"{shown(value)} is not allowed: expected the form {pattern}")
    return value


def whole(value: Any, where: str, low: int = 0, high: int = 2**53) -> int:
    """An integer from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise refusal(where, f"{shown(value)} is not allowed: expected a whole number from {low:,} to {high:,}")
    return value


def number(value: Any, where: str, low: float = -LARGEST, high: float = LARGEST) -> float:
    """A number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise refusal(where, f"{shown(value)} is not allowed: expected a number from {low:g} to {high:g}")
    return value


def moment(value: Any, where: str, since: int = EARLIEST) -> int:
    """Milliseconds since 1970, from `since` to now."""
    now = time.time_ns() // 1_000_000
    if isinstance(value, bool) or not isinstance(value, int) or not since <= value <= now + AHEAD:
        what = f"milliseconds since 1970, from {since} to now"
        raise refusal(where, f"{shown(value)} is not allowed: expected {what}")
    return value


def figures(value: Any, where: str, required: Collection[str] = ()) -> int:
    """Metrics by name; how many."""
    found = _keyed(members(value, where, required, None), where, NAMES)
    for key, figure in found.items():
        low = 0.0 if key.startswith(NOT_NEGATIVE) or key.endswith("accuracy") else -LARGEST
        number(figure, f"{where}: {key}", low, 1.0 if key.endswith("accuracy") else LARGEST)
    return len(found)


def record(value: Any, where: str) -> int:
    """What `train` left: `record.json` (see records.py); how many values its metrics have."""
    members(
        value,
        where,
        (
            "id", "name", "experiment", "started", "ended", "params", "tags", "datasets", "epochs", "metrics",
            "warnings", "facts", "hardware",
        ),
    )  # fmt: skip
    matching(value["id"], f"{where}: id", RECORD_ID)
    text(value["name"], f"{where}: name")
    text(value["experiment"], f"{where}: experiment")
    started = moment(value["started"], f"{where}: started")
    moment(value["ended"], f"{where}: ended", started)
    _params(value["params"], f"{where}: params")
    _tags(value["tags"], f"{where}: tags")
    _datasets(value["datasets"], f"{where}: datasets")
    _sentences(value["warnings"], f"{where}: warnings")
    _facts(value["facts"], f"{where}: facts")
    members(value["hardware"], f"{where}: hardware", (), None)
    once = ("best/epoch", "best/val_accuracy", "time/total_seconds")
    values = figures(value["metrics"], f"{where}: metrics", once)
    on_features = bool(value["metrics"].get("speed/feature_images_per_second"))
    values += _epochs(value["epochs"], f"{where}: epochs", on_features)
    whole(value["metrics"]["best/epoch"], f"{where}: metrics: best/epoch", 1, len(value["epochs"]))
    own = value["tags"]
    if "repeat" in own and not value["name"].endswith(f" · {own['repeat']}/{own['repeats']}"):
        raise refusal(where, "a repeat's name ends with its number and theirs")
    demo = "fallback" in own
    if demo != value["name"].startswith("DEMO") or (demo and not value["experiment"].endswith("-demo")):
        raise refusal(where, "a run with a fallback and its experiment are named as demos, and no other run is")
    return values


def evaluation(value: Any, where: str) -> int:
    """What `evaluate` left: `record.json`; how many values its metrics have."""
    members(value, where, ("id", "metrics", "tags", "datasets", "ended"))
    matching(value["id"], f"{where}: id", RECORD_ID)
    moment(value["ended"], f"{where}: ended")
    _later_tags(value["tags"], f"{where}: tags", lambda key: key == "label")
    _datasets(value["datasets"], f"{where}: datasets")
    return figures(value["metrics"], f"{where}: metrics", ("test/accuracy",))


def sustained(value: Any, where: str) -> int:
    """What `sustain` left: `record.json`; how many values its metrics have. Before schema 3 `series` is the course of
    the only step."""
    members(value, where, ("id", "metrics", "tags", "series", "warnings", "ended"))
    matching(value["id"], f"{where}: id", RECORD_ID)
    moment(value["ended"], f"{where}: ended")
    values = figures(value["metrics"], f"{where}: metrics")
    series, place = value["series"], f"{where}: series"
    if isinstance(series, list):
        courses = {place: series}
    else:
        known = [score_steps.metric(step.name, "course") for step in score_steps.STEPS]
        courses = {f"{place}: {key}": course for key, course in members(series, place, (), known).items()}
    for course_place, course in courses.items():
        for speed_place, speed in items(course, course_place, VALUES):
            values += 1
            number(speed, speed_place, 0.0)
    _later_tags(value["tags"], f"{where}: tags", lambda key: key.startswith("sustained."))
    _sentences(value["warnings"], f"{where}: warnings")
    if "speed/sustained_images_per_second" in value["metrics"]:
        figures(value["metrics"], f"{where}: metrics", ("time/sustain_seconds",))
        members(value["tags"], f"{where}: tags", ("sustained.workload",), None)
        matching(value["tags"]["sustained.workload"], f"{where}: tags: sustained.workload", HEX)
    for step in score_steps.STEPS:
        if score_steps.metric(step.name, "images_per_second") in value["metrics"]:
            _step(value, step.name, where)
    return values


STAGES: dict[str, Callable[[Any, str], int]] = {"train": record, "evaluate": evaluation, "sustain": sustained}
"""By stage, what its record must be."""


def few(values: int, where: str) -> None:
    """Refuses as many metric values as no run has."""
    if values >= VALUES:
        raise refusal(where, f"it has {values:,} values of metrics: a run has fewer than {VALUES:,}")


def _keyed(value: Mapping[str, Any], where: str, most: int) -> Mapping[str, Any]:
    """Refuses keys that MLflow does not take, or its database takes for one another."""
    if len(value) > most:
        raise refusal(where, f"there are {len(value):,}: expected at most {most:,}")
    for key in value:
        if len(key) > KEY_LENGTH:
            raise refusal(where, f"the key {shown(key)} has more than {KEY_LENGTH} characters")
        matching(key, f"{where}: key", KEY)
    if len({key.lower() for key in value}) < len(value):
        raise refusal(where, "two keys differ in case alone")
    if len(json.dumps(value)) > TOGETHER:
        raise refusal(where, f"together they have more than {TOGETHER:,} characters")
    return value


def _params(value: Any, where: str) -> None:
    for key, param in _keyed(members(value, where, (), None), where, PARAMS).items():
        text(param, f"{where}: {key}", PARAM_LENGTH, 0)


def _tags(value: Any, where: str) -> None:
    for key, tag in _keyed(members(value, where, OF_TRAINING, None), where, TAGS).items():
        text(tag, f"{where}: {key}", TAG_LENGTH)
        if key.startswith(RESERVED):
            raise refusal(where, f'"{key}" is no tag of a training')
    for key in ("machine", "workload"):
        matching(value[key], f"{where}: {key}", HEX)
    matching(value.get("software.execution", "1"), f"{where}: software.execution", r"[1-9]\d{0,3}")
    if not value.keys().isdisjoint(OF_REPEAT):
        members(value, where, OF_REPEAT, None)
        matching(value["repeats.id"], f"{where}: repeats.id", RECORD_ID)
        for key in ("repeat", "repeats"):
            matching(value[key], f"{where}: {key}", r"[1-9]\d{0,3}")
        whole(int(value["repeats"]), f"{where}: repeats", 2, config.MOST_REPEATS)
        whole(int(value["repeat"]), f"{where}: repeat", 1, int(value["repeats"]))


def _later_tags(value: Any, where: str, known: Callable[[str], bool]) -> None:
    for key, tag in _keyed(members(value, where, (), None), where, TAGS).items():
        if not known(key):
            raise refusal(where, f'"{key}" is no tag of this stage')
        if tag is not None:
            text(tag, f"{where}: {key}", TAG_LENGTH)


def _step(value: Mapping[str, Any], step: str, where: str) -> None:
    """What a record with the speed of a sustained step says of it, too."""
    told = [score_steps.metric(step, figure) for figure in ("first_third_images_per_second", "seconds", "batch_size")]
    figures(value["metrics"], f"{where}: metrics", told)
    for fact, form in (("workload", HEX), ("precision", "fp32|tf32|bf16|fp16")):
        tag = score_steps.tag(step, fact)
        members(value["tags"], f"{where}: tags", (tag,), None)
        matching(value["tags"][tag], f"{where}: tags: {tag}", form)


def _datasets(value: Any, where: str) -> None:
    for place, dataset in items(value, where, DATASETS):
        members(dataset, place, ("name", "digest", "source", "context", "profile"))
        text(dataset["name"], f"{place}: name")
        matching(dataset["digest"], f"{place}: digest", r"[0-9a-f]{1,36}")
        matching(dataset["context"], f"{place}: context", "training|validation|testing")
        text(dataset["source"], f"{place}: source", TAG_LENGTH)
        text(dataset["profile"], f"{place}: profile", TEXT_LENGTH)


def _sentences(value: Any, where: str) -> None:
    for place, sentence in items(value, where, WARNINGS):
        text(sentence, place, SENTENCE_LENGTH)


def _facts(value: Any, where: str) -> None:
    members(value, where, ("model", "classes", "images", "trainable", "parameters", "image_size", "verdict"), None)
    text(value["model"], f"{where}: model")
    for place, name in items(value["classes"], f"{where}: classes", CLASSES, 1):
        text(name, place)
    images = members(value["images"], f"{where}: images", ("train",), ("validation", "test"))
    for split, count in images.items():
        whole(count, f"{where}: images: {split}")
    whole(value["trainable"], f"{where}: trainable")
    whole(value["parameters"], f"{where}: parameters")
    whole(value["image_size"], f"{where}: image_size", 1, 4096)
    text(value["verdict"], f"{where}: verdict", SENTENCE_LENGTH)


def _epochs(value: Any, where: str, on_features: bool) -> int:
    """Every epoch in its order; how many values they have."""
    required = PER_EPOCH | (set() if on_features else {"speed/train_images_per_second"})
    values = 0
    for index, (place, epoch) in enumerate(items(value, where, EPOCHS, 1), 1):
        members(epoch, place, ("at", "figures", "system"))
        moment(epoch["at"], f"{place}: at")
        values += figures(epoch["figures"], f"{place}: figures", required)
        whole(epoch["figures"]["epoch"], f"{place}: figures: epoch", index, index)
        for each, sample in items(epoch["system"], f"{place}: system", VALUES):
            members(sample, each, ("at", "figures", "step"))
            moment(sample["at"], f"{each}: at")
            whole(sample["step"], f"{each}: step")
            values += figures(sample["figures"], f"{each}: figures")
    return values
