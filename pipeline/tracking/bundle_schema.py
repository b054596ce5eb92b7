"""The schema of a bundle: its manifest and the records in it, as strict pydantic models.

Strangers make bundles. Anything that does not fit ends in one line that says where it is and what is wrong.
"""

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pipeline import config
from pipeline.errors import UsageError
from pipeline.tracking import records

SCHEMA = 3
"""Raise it when a bundle, or a record in it, changes its structure."""

JSON_BYTES, FILE_BYTES, TOTAL_BYTES = 2**23, 2**30, 2**31
"""The most bytes of a JSON file, of any file, and of all files together."""

VALUES = 100_000
"""An upper limit of the metric values of a stage; seven hours of training log some 60,000."""

LARGEST = 3.5e38
"""An upper limit of all figures: float32 ends before it."""

NOT_NEGATIVE = ("time/", "speed/", "sustained/", "memory/", "energy/", "ceiling/")
RESERVED_TAGS = ("mlflow.", "record", "restored", "imported")
REQUIRED_TAGS = ("hardware", "device", "backend", "software.torch", "recipe", "precision", "dataset", "weights")
TAG_FORMS = {"machine": r"[0-9a-f]{8,64}", "workload": r"[0-9a-f]{8,64}"}
REPEAT_FORMS = {"repeats.id": r"[0-9a-f]{32}", "repeat": r"[1-9][0-9]{0,3}", "repeats": r"[2-9]|[1-9][0-9]{1,3}"}

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, ends of lines, changes of the writing direction, and halves of surrogate pairs."""

Model = TypeVar("Model", bound=BaseModel)


def refusal(where: str, problem: str) -> UsageError:
    """The error that says on one line where a bundle is wrong, and how."""
    return UsageError(f"{where}: {shorten(problem, 250)}")


def shorten(text: str, length: int = 60) -> str:
    """`text`, cut to at most `length` characters."""
    return text if len(text) <= length else text[: length - 3] + "..."


def parse(data: bytes, where: str) -> Any:
    """The JSON in `data`. Raises UsageError for numbers that are not finite and for control characters, too."""
    if len(data) > JSON_BYTES:
        raise refusal(where, f"it has more than {JSON_BYTES:,} bytes")
    try:
        tree = json.loads(data.decode())
        json.dumps(tree, allow_nan=False, indent=1)  # as it will be written again: this limits the nesting
        if match := next(filter(None, map(CONTROL.search, texts(tree))), None):
            raise ValueError(f"a text holds the control character {match[0]!a}")
    except (ValueError, RecursionError) as error:
        raise refusal(where, f"it is no valid JSON: {error}") from None
    return tree


def texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from texts(inner)


def validate(model: type[Model], tree: Any, where: str) -> Model:
    """`tree` as `model`. Raises UsageError with the place and the message of the first error."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(shorten(ascii(part).strip("'")) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise refusal(where, f"{place}: {message}" if place else message) from None


def _check_metrics(metrics: dict[str, float]) -> dict[str, float]:
    for name, value in metrics.items():
        low = 0 if name.startswith(NOT_NEGATIVE) or name.endswith("accuracy") else -LARGEST
        high = 1 if name.endswith("accuracy") else LARGEST
        if not low <= value <= high:
            raise ValueError(f"{name}: expected a number from {low:g} to {high:g}")
    return metrics


def _check_epoch(metrics: Any) -> Any:
    if isinstance(metrics, dict) and type(metrics.get("epoch")) is not int:
        raise ValueError("epoch: expected a whole number")
    return metrics


def _check_training_tags(tags: dict[str, str]) -> dict[str, str]:
    is_repeat = not tags.keys().isdisjoint(REPEAT_FORMS)
    forms = dict.fromkeys(REQUIRED_TAGS, ".+") | TAG_FORMS | (REPEAT_FORMS if is_repeat else {})
    for key, form in forms.items():
        if not re.fullmatch(form, tags.get(key, "")):
            raise ValueError(f"{key}: expected the form {form}")
    if is_repeat and not int(tags["repeat"]) <= int(tags["repeats"]) <= config.MAX_REPEATS:
        raise ValueError(f"repeat: there is no repeat {tags['repeat']} of {tags['repeats']}")
    for key in tags:
        if key.startswith(RESERVED_TAGS):
            raise ValueError(f"{key} is no tag of a training")
    return tags


def _name_course(series: Any) -> Any:
    """Before schema 3, `series` was the course of the only step."""
    return {"sustained/images_per_second": series} if isinstance(series, list) else series


Id = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Key = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_][a-zA-Z0-9_.-]*(/[a-zA-Z0-9_][a-zA-Z0-9_.-]*)*$", max_length=246)]
"""Of a metric, param or tag. MLflow takes 250 characters, of which `std/` above repeats has four."""

SustainTag = Annotated[str, Field(pattern=r"^sustained\.[a-z0-9_.]+$", max_length=246)]
CourseName = Annotated[str, Field(pattern=r"^sustained/([a-z0-9_]+_course|images_per_second)$", max_length=246)]
FILE_NAME = (
    r"^((train|evaluate|sustain)/record\.json|train/(hardware\.json|params\.yaml|best\.safetensors)"
    r"|(train|evaluate)/plots/[a-z_]{4,50}\.png)$"
)
"""Of a file of a run. No two such names are one file on any system, and none is a device of Windows."""

Name = Annotated[str, Field(min_length=1, max_length=250)]
Sentence = Annotated[str, Field(min_length=1, max_length=1000)]
Warnings = Annotated[list[Sentence], Field(max_length=100)]
Tag = Annotated[str, Field(min_length=1, max_length=5000)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Moment = Annotated[int, Field(ge=1_577_836_800_000, lt=4_102_444_800_000)]
"""Milliseconds since 1970, from 2020 to 2099."""

Metrics = Annotated[dict[Key, float], Field(max_length=1000), AfterValidator(_check_metrics)]
Course = Annotated[list[Annotated[float, Field(ge=0, le=LARGEST)]], Field(max_length=VALUES // 4)]
DatasetText = Annotated[str, Field(min_length=1, max_length=100_000)]
Dataset = Annotated[
    dict[Literal["name", "digest", "source", "context", "profile"], DatasetText], Field(min_length=5, max_length=5)
]
Datasets = Annotated[list[Dataset], Field(max_length=10)]


class Strict(BaseModel):
    """Refuses unknown keys, other types, NaN and infinities."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, populate_by_name=True)


class File(Strict):
    """A file of a run in the manifest."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=1, le=FILE_BYTES)]


class Entry(Strict):
    """A run in the manifest. `run_id`: in the store where it was trained."""

    record: Id
    run_id: Id
    start: Moment
    end: Moment
    files: dict[Annotated[str, Field(pattern=FILE_NAME)], File]


class Manifest(Strict):
    """`bundle.json`."""

    format: Literal["trainmark-bundle"]
    version: Annotated[int, Field(alias="schema", ge=1)]
    created: Moment
    runs: Annotated[list[Entry], Field(min_length=1, max_length=1000)]

    @model_validator(mode="after")
    def _check_runs(self) -> Self:
        if len({entry.record for entry in self.runs}) < len(self.runs):
            raise ValueError("runs: one record is listed twice")
        if sum(file.bytes for entry in self.runs for file in entry.files.values()) > TOTAL_BYTES:
            raise ValueError(f"runs: together they have more than {TOTAL_BYTES:,} bytes")
        return self


class Sample(Strict):
    """The state of the machine during an epoch."""

    at: Moment
    step: Count
    figures: Metrics


class Epoch(Strict):
    """An epoch of a training."""

    at: Moment
    figures: Annotated[Metrics, BeforeValidator(_check_epoch)]
    system: list[Sample]


class Facts(Strict, extra="allow"):
    """What a training knows of its model and data."""

    model: Name
    classes: Annotated[list[Name], Field(min_length=1, max_length=100_000)]
    images: dict[Literal["train", "validation", "test"], Count]
    trainable: Count
    parameters: Count
    image_size: Annotated[int, Field(ge=1, le=4096)]
    verdict: Sentence


class Training(Strict):
    """`train/record.json`."""

    id: Id
    name: Name
    experiment: Name
    started: Moment
    ended: Moment
    params: Annotated[dict[Key, Annotated[str, Field(max_length=6000)]], Field(max_length=500)]
    tags: Annotated[dict[Key, Tag], Field(max_length=80), AfterValidator(_check_training_tags)]
    datasets: Datasets
    epochs: Annotated[list[Epoch], Field(min_length=1, max_length=10_000)]
    metrics: Metrics
    warnings: Warnings
    facts: Facts
    hardware: dict[str, Any]

    @model_validator(mode="after")
    def _check_whole(self) -> Self:
        if [epoch.figures["epoch"] for epoch in self.epochs] != list(range(1, len(self.epochs) + 1)):
            raise ValueError("epochs: they are not numbered from 1")
        of_machine = sum(len(sample.figures) for epoch in self.epochs for sample in epoch.system)
        if of_machine + sum(len(epoch.figures) for epoch in self.epochs) > VALUES:
            raise ValueError(f"epochs: they have more than {VALUES:,} metric values")
        if self.name != records.run_name(self.tags):
            raise ValueError("name: it does not match the tags")
        if "fallback" in self.tags and not self.experiment.endswith("-demo"):
            raise ValueError("experiment: a run with a fallback belongs to one that ends with -demo")
        return self


class Evaluation(Strict):
    """`evaluate/record.json`; a tag that is null is removed."""

    id: Id
    metrics: Metrics
    tags: dict[Literal["label"], Tag | None]
    datasets: Datasets
    ended: Moment


class Sustained(Strict):
    """`sustain/record.json`; a tag that is null is removed."""

    id: Id
    metrics: Metrics
    tags: Annotated[dict[SustainTag, Tag | None], Field(max_length=80)]
    series: Annotated[dict[CourseName, Course], Field(max_length=3), BeforeValidator(_name_course)]
    warnings: Warnings
    ended: Moment


STAGES: dict[str, type[Training | Evaluation | Sustained]] = {
    "train": Training,
    "evaluate": Evaluation,
    "sustain": Sustained,
}
"""The model of each stage's record."""
