"""Read params.yaml, with the command line's changes laid over, as frozen, typed settings. The only reader of YAML."""

import dataclasses
import datetime
import hashlib
import json
import pkgutil
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from pipeline.errors import UsageError, nearest

ROOT = Path(__file__).resolve().parent.parent
"""The project's folder. Relative paths in the settings start here, whatever the current folder is."""

EXECUTION_KEYS = ("precision", "channels_last", "compile", "graph", "features", "threads")
"""A recipe's keys that say how the work is done, not what it is: they stay out of the workload."""

MAX_REPEATS = 1000
"""The largest value of `repeats`."""

WORKLOAD_VERSION = 1
"""Raise it when the meaning of the work changes in the code, so that old and new runs are never compared."""

EXECUTION_VERSION = 4
"""Raise it when the code does the same work faster or slower than before on any backend, beyond noise. Machines are
compared by runs of one version, or the code's gain would pass for a machine's."""

T = TypeVar("T")

DEFAULT_PRICES = "prices.yaml"
"""The value of `compare.prices` whose file may be missing."""

_MODULES = {module.name for module in pkgutil.iter_modules([str(ROOT / "pipeline" / "devices")])}
GPUS = sorted(_MODULES - {"base", "cpu", "graphs", "rapl"})
"""The kinds of GPU that have a backend, by the modules of pipeline/devices: to import one would import torch."""

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

# A text among the annotations says in words what the type admits; `_allowed` finds the words for all other types.
Text = Annotated[str, Field(pattern=r"^\S(.*\S)?$"), "a text"]
Texts = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
Options = Annotated[dict[str, dict[str, Any]], "names, each with its options: {sgd: {momentum: 0.9}}"]
WeightsFile = Annotated[str, Field(pattern=r"^.+\.safetensors$"), "path of a .safetensors file"]
Device = Annotated[
    str,
    Field(pattern=rf"^(auto|cpu|({'|'.join(GPUS)})(:[0-9]+)?)$"),
    f"{' | '.join(['auto', 'cpu', *GPUS])} | one of several, such as cuda:1",
]
Currency = Annotated[str, Field(pattern="^[A-Z]{3}$"), "a currency's three letters, such as EUR"]
Date = Annotated[
    str,
    AfterValidator(lambda text: datetime.date.fromisoformat(text).isoformat()),
    "a date, such as 2026-11-01",
]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Data:
    """Where the images come from."""

    source: Literal["auto", "cifar10", "folder", "synthetic"] = Field(description="where the images come from")
    path: Text = Field(description="folder of cifar10's archive, or one that holds train/<class>/ and test/<class>/")
    limit: int | None = Field(ge=1, description="images of each class and split; null: all")
    device_gib: float | None = Field(ge=0, description="most GiB of images on the device; null: what is free")
    timeout_seconds: float = Field(gt=0, description="how long a mirror may be silent")
    mirrors: Annotated[Texts, "a list of URLs"] = Field(description="of cifar-10-python.tar.gz, in this order")

    @property
    def folder(self) -> Path:
        """The absolute path of `path`."""
        return absolute(self.path)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Energy:
    """How the energy is measured."""

    source: Literal["auto", "powermetrics"] = Field(description="the device's own counter; Apple's tool")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Compare:
    """How the report sets machines side by side."""

    reference: Annotated[Text, "a text, in quotes if it looks like a number"] | None = Field(
        description="the machine that others are compared with, by a unique part of its fingerprint, label or "
        "hardware; null: the one with the most runs"
    )
    prices: Text = Field(description=f"file of prices by hardware; {DEFAULT_PRICES} may be missing")
    tainted: bool = Field(description="let tainted runs into claims")
    smallest: float = Field(
        ge=0, le=1, description="the smallest difference, as a fraction, that fewer than three sessions may claim"
    )
    accuracy_margin: float = Field(
        gt=0, le=1, description="accuracies, as fractions, are equivalent if they differ by less than this"
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Tracking:
    """Where the results go."""

    experiment: Text = Field(description="name of the MLflow experiment")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Price:
    """What a machine costs, as a file of prices gives it by hardware name: to buy, an hour, or both."""

    buy: float | None = Field(None, gt=0, description="to buy")
    per_hour: float | None = Field(None, gt=0, description="to rent for an hour")
    per_kwh: float | None = Field(None, ge=0, description="electricity for a kilowatt-hour")
    hours_per_day: float | None = Field(None, gt=0, le=24, description="hours a day that it is used")
    machine: Text | None = Field(None, description="of a card: the machine it sits in, which `buy` includes")
    currency: Currency = Field(description="of the price")
    date: Date = Field(description="when it was asked")
    source: Text = Field(description="who asked it: an address")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Recipe:
    """The work: what is trained, on what, how long and how. EXECUTION_KEYS say how it is executed."""

    model: Text = Field(description="any timm classification model")
    weights: Literal["pretrained", "random"] | WeightsFile = Field(description="what the model starts from")
    trainable: Literal["head", "all"] | Annotated[Texts, "a list of parameter name prefixes"] = Field(
        description="what is trained"
    )
    head_init: Literal["default", "xavier_normal"] = Field(description="how the new head's linear layers start")
    frozen_batch_norm: Literal["eval", "train"] = Field(description="mode of BatchNorm layers with frozen weights")
    normalize: bool = Field(description="with the mean and std that the weights were trained with")
    flip: bool = Field(description="mirror training images at random, left to right")
    image_size: int = Field(ge=8, le=2048, description="pixels a side; images are resized to it (bilinear)")
    validation: Literal["split", "test"] = Field(description="a stratified tenth of train, or the test split")
    batch_size: int = Field(ge=1, le=2**20, description="images a step")
    epochs: int = Field(ge=1, le=100_000, description="times through the training images")
    optimizer: Text = Field(description="a name, such as sgd, adamw, ranger21 or timm:lamb")
    lr: float = Field(gt=0, description="the highest learning rate")
    optimizer_options: Options = Field(description="by optimizer; only the chosen one's are read")
    scheduler: Literal["cosine", "cyclic", "onecycle", "constant"] = Field(description="the learning rate's course")
    scheduler_options: Options = Field(description="by scheduler; only the chosen one's are read")
    scheduler_step: Literal["batch", "epoch"] = Field(description="how often the schedule moves")
    warmup_epochs: float = Field(ge=0, description="epochs over which the learning rate climbs to lr in a line")
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = Field(description="execution: number format of the network")
    channels_last: Literal["auto"] | bool = Field(description="execution: memory layout of images")
    compile: Literal["auto", "off", "default", "reduce-overhead", "max-autotune"] = Field(
        description="execution: torch.compile, by its modes"
    )
    graph: Literal["auto"] | bool = Field(description="execution: capture a step as a CUDA graph and replay it")
    features: Literal["auto", "cache", "recompute"] = Field(
        description="execution: compute a frozen backbone's features once or every epoch"
    )
    threads: int | None = Field(ge=1, le=4096, description="execution: CPU threads; null: torch's default")
    target_accuracy: float | None = Field(
        gt=0, le=1, description="validation accuracy, as a fraction, to which the time is reported"
    )

    def resolved(self) -> dict[str, Any]:
        """The recipe with the options of the chosen optimizer and scheduler only, as plain JSON values."""
        values = dataclasses.asdict(self)
        values["optimizer_options"] = self.optimizer_options.get(self.optimizer, {})
        values["scheduler_options"] = self.scheduler_options.get(self.scheduler, {})
        return values


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Settings:
    """All of params.yaml."""

    recipe: Text = Field(description="one of the names below recipes")
    device: Device = Field(description="what to train on; auto: a GPU if there is one, else the CPU")
    seed: int = Field(ge=0, le=2**31 - 1, description="of every random choice")
    label: Text | None = Field(description="your own name for this machine")
    repeats: int = Field(ge=1, le=MAX_REPEATS, description="number of processes, with seed, seed + 1, ...")
    repeat_pause: float = Field(ge=0, description="seconds to wait between two of these processes")
    sustain_seconds: float = Field(ge=0, description="seconds that each step of the score is repeated; 0: no score")
    largest_batch: bool = Field(description="find the largest batch of the convnet's step that fits, on GPUs")
    data: Data
    energy: Energy
    compare: Compare
    tracking: Tracking
    recipes: Annotated[dict[str, Recipe], Field(min_length=1), "at least one recipe by its name"]

    @property
    def work(self) -> Recipe:
        """The chosen recipe."""
        return self.recipes[self.recipe]


def load(overrides: Sequence[str] = (), path: Path = ROOT / "params.yaml") -> Settings:
    """Read the settings, with each `key=value` of `overrides` laid over the file.

    Raises UsageError, in one line, for anything that does not fit.
    """
    tree = read_yaml(path)
    changes = [_override(text) for text in overrides]
    recipe = dict(changes).get("recipe", tree.get("recipe"))
    for key, value in changes:
        name = key.split(".")[0]
        if name in _fields(Recipe) and name not in _fields(Settings):
            _check_recipe(recipe, tree.get("recipes"))
            key = f"recipes.{recipe}.{key}"
        _put(tree, key, value)
    if "recipe" in tree:
        _check_recipe(tree["recipe"], tree.get("recipes"))
    settings = _validated(Settings, tree, path.name)
    _find_prices(settings.compare.prices)
    return settings


def read_prices(setting: str) -> dict[str, Price] | None:
    """Read the file of prices that `compare.prices` names, by hardware name as runs have it.

    None where the default file is missing. Raises UsageError, in one line, for anything that does not fit: a file named
    by hand that is missing, or a price without currency, date or source.
    """
    path = _find_prices(setting)
    if path is None:
        return None
    tree = read_yaml(path, "prices by the names of hardware")
    try:
        prices = _validated(dict[str, Price], tree, path.name)
    except UsageError as error:
        raise UsageError(f"{path.name}: {error}") from None
    for name, price in prices.items():
        if price.buy is None and price.per_hour is None:
            raise UsageError(f"{path.name}: {name}: expected buy or per_hour, with currency, date and source")
    return prices


def _find_prices(setting: str) -> Path | None:
    path = absolute(setting)
    if path.exists():
        return path
    if setting == DEFAULT_PRICES:
        return None
    raise UsageError(f"compare.prices: {json.dumps(setting)} does not exist: expected a file of prices")


def workload(recipe: Recipe, inputs: Mapping[str, Any]) -> str:
    """Ten hex digits that name the work. Only runs with the same ones are ever compared.

    `inputs` is what the download stage resolved: the source's digest and limit, the weights' digest or `random`.
    """
    work = {key: value for key, value in recipe.resolved().items() if key not in EXECUTION_KEYS}
    work["weights"] = inputs["weights"]["digest"] or "random"
    work["data"] = [inputs["data"]["digest"], inputs["data"]["limit"]]
    work["version"] = WORKLOAD_VERSION
    return hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()[:10]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys. An empty mapping gives nothing."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return leaves


def describe() -> list[tuple[str, str, str]]:
    """Every setting as (dotted key, what is allowed, meaning). A recipe's keys stand under `recipes.NAME`."""
    return [*_described(Settings, ""), *_described(Recipe, "recipes.NAME.")]


def absolute(path: str) -> Path:
    """A path of the settings: a relative one starts at the project's folder, `~` at the user's home."""
    try:
        return ROOT / Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{json.dumps(path)} can't be found: {error}") from None


def shareable(path: str) -> str:
    """A path as it may leave the machine: of one outside the project, only the last part."""
    inside = not (path.startswith(("/", "~", "\\")) or path[1:2] == ":" or ".." in path)
    return path if inside else path.replace("\\", "/").rstrip("/").split("/")[-1]


# --- YAML


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values, as DVC reads them: `off` is a word and `1e-5` a number, unlike in YAML 1.1."""


class _Dumper(yaml.SafeDumper):
    """Quotes a text that YAML 1.1 or 1.2 would take for something else."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def _construct_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [key.value for key, _ in node.value]
    for key, value in node.value:
        if keys.count(key.value) > 1:  # PyYAML would silently take the last one
            raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", value.start_mark)
    return dict(loader.construct_pairs(node, deep=True))


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))  # PyYAML: a leading 0 means octal


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text. Raises UsageError, beginning with `where`, for anything else."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, TypeError) as error:  # ValueError: `!!int x`; TypeError: a list as a key
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).split("\n", 1)[0]
        raise UsageError(f"{where}{line}: not YAML: {problem}") from None


def read_yaml(path: Path, expected: str = "a mapping of settings; restore it from git") -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises UsageError for anything else."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path.name} is missing: expected {expected}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path.name} can't be read: {error}") from None
    tree = parse_yaml(text, path.name)
    if not isinstance(tree, dict):
        content = "is empty" if tree is None else f"holds {type(tree).__name__}"
        raise UsageError(f"{path.name} {content}: expected {expected}")
    return tree


def dump(tree: Mapping[str, Any]) -> str:
    """`tree` as YAML, in its own order."""
    plain = json.loads(json.dumps(tree))  # tuples become lists
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


# --- the command line's changes


def _override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[^\s.=]+(\.[^\s.=]+)*", key):
        raise UsageError(f"-S {' '.join(text.split())}: expected key=value, such as -S epochs=2")
    return key, parse_yaml(value, f"-S {key}")


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        if node is tree.get("recipes") and parent not in node:  # a single key makes no recipe
            raise _unknown("recipes", parent, list(map(str, node)))
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UsageError(f"{key}: unknown setting: {parent} holds {child!r} and no settings of its own")
        node = child
    node[last] = value


# --- types and errors


def _fields(owner: Any) -> dict[str, Any]:
    return owner.__pydantic_fields__  # type: ignore[no-any-return]


def _described(owner: Any, prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in _fields(owner).items():
        if dataclasses.is_dataclass(field.annotation):
            yield from _described(field.annotation, f"{prefix}{name}.")
        elif name != "recipes":
            yield prefix + name, _allowed(field.annotation, field.metadata), field.description


def _allowed(kind: Any, notes: Sequence[Any] = ()) -> str:
    """What a value of this type may be, in words. `notes` are the type's annotations, such as its limits."""
    words = [note for note in notes if isinstance(note, str)]
    if words:
        return words[-1]
    if dataclasses.is_dataclass(kind):
        return "its settings below it"
    if kind in (bool, NoneType):
        return "true | false" if kind is bool else "null"
    if get_origin(kind) is Annotated:
        return _allowed(get_args(kind)[0], get_args(kind)[1:])
    if get_origin(kind) is Literal:
        return " | ".join(get_args(kind))
    if get_origin(kind) in (Union, UnionType):
        return " | ".join(_allowed(part, notes) for part in get_args(kind))
    names = {"ge": "from", "gt": "above", "le": "to"}
    limits = [f"{word} {getattr(note, name)}" for note in notes for name, word in names.items() if hasattr(note, name)]
    return " ".join(["a whole number" if kind is int else "a number", *limits])


def _validated(kind: type[T], tree: Any, file: str) -> T:
    """`tree` as a `kind`. Raises UsageError, in one line, for the first thing in it that does not fit."""
    text = json.dumps(tree, default=str)  # in JSON mode, pydantic's strict types take a mapping for a dataclass
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False)
    unknown = "unexpected_keyword_argument"
    first = min(errors, key=lambda each: each["type"] != unknown)  # an unknown key may explain a missing one
    owner: Any = kind
    keys: list[str] = []
    value, allowed = json.loads(text), "its settings below it"
    for part in map(str, first["loc"]):
        if dataclasses.is_dataclass(owner) and part not in _fields(owner):
            raise _unknown(".".join(keys), part, list(_fields(owner)), tree.get("recipe"))
        if dataclasses.is_dataclass(owner):
            field = _fields(owner)[part]
            owner, allowed = field.annotation, _allowed(field.annotation, field.metadata)
        elif get_origin(owner) is dict and dataclasses.is_dataclass(get_args(owner)[1]):
            owner = get_args(owner)[1]
            allowed = _allowed(owner)
        else:
            break  # what follows lies within the setting
        keys.append(part)
        value = value.get(part)
    key = ".".join(keys)
    if first["type"] == "missing":
        raise UsageError(f"{key}: missing from {file}: expected {allowed}")
    raise _refusal(key, value, allowed)


def read_value(key: str, value: Any, kind: Any) -> Any:
    """`value` as a `kind`, a type with pydantic's annotations. Raises UsageError, in one line, that names `key`."""
    try:
        return TypeAdapter(kind, config=STRICT).validate_python(value)
    except ValidationError:
        raise _refusal(key, value, _allowed(kind)) from None


def _check_recipe(recipe: Any, recipes: Any) -> None:
    if recipes and isinstance(recipes, dict) and str(recipe) not in map(str, recipes):
        raise _refusal("recipe", recipe, " | ".join(map(str, recipes)))


def _refusal(key: str, value: Any, allowed: str) -> UsageError:
    text = json.dumps(value, ensure_ascii=False, default=str)
    shown = text if len(text) <= 80 else text[:77] + "..."
    close = nearest(value, allowed.split(" | "))
    hint = f"; did you mean {close}?" if close and close != value else ""
    return UsageError(f"{key}: {shown} is not allowed: expected {allowed}{hint}")


def _unknown(section: str, name: str, known: Sequence[str], recipe: Any = None) -> UsageError:
    """For a name that is not `known` in its section ('' at the top, where a recipe's key may stand alone)."""
    prefix = f"{section}." if section else ""
    names = list(known)
    if known == list(_fields(Settings)):
        names += [key.removeprefix("recipes.NAME.") for key, *_ in describe()]
    close = nearest(name, names) or next((key for key in names if key.endswith(f".{name}")), "")
    if close == name:  # a recipe's key at the top of the file
        close = f"recipes.{recipe}.{name}"
    hint = f"did you mean {prefix}{close}?" if close else f"allowed here: {', '.join(known)}"
    return UsageError(f"{prefix}{name}: unknown setting; {hint}")
