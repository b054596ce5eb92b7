"""Read params.yaml and the command line's overrides as frozen, typed settings. No other module reads YAML."""

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

from pipeline.errors import UsageError, hint, nearest


def _project(root: Path) -> Path:
    """The project's folder. DVC runs `--temp` and `--queue` experiments in a temporary copy, `.dvc/tmp/exps/*/*/`."""
    project, _, copy = root.as_posix().partition("/.dvc/tmp/exps/")
    return Path(project, *Path(copy).parts[2:])


ROOT = Path(__file__).resolve().parent.parent
"""The folder of this code and of params.yaml."""

PROJECT = _project(ROOT)
"""The project's folder. Relative paths in the settings start here, not in the current folder."""

EXECUTION_KEYS = ("precision", "channels_last", "compile", "graph", "features", "threads")
"""A recipe's keys that say how the work is executed, not what it is. They are no part of the workload."""

MAX_REPEATS = 1000
"""The highest value of `repeats`."""

WORKLOAD_VERSION = 1
"""Raise it when the code changes what the work is, so that old and new runs are never compared."""

EXECUTION_VERSION = 4
"""Raise it when the code does the same work faster or slower than before on any backend, beyond noise. Only runs of the
same version are compared, so that a faster code does not look like a faster machine."""

T = TypeVar("T")

DEFAULT_PRICES = "prices.yaml"
"""The only value of `compare.prices` whose file may be missing."""

_MODULES = {module.name for module in pkgutil.iter_modules([str(ROOT / "pipeline" / "devices")])}
GPUS = sorted(_MODULES - {"base", "cpu", "graphs", "rapl"})
"""The kinds of GPU with a backend, from the file names in pipeline/devices: importing these would import torch."""

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

# A string among the annotations says which values are allowed. `_allowed` derives that text for all other types.
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
    """Settings of the data."""

    source: Literal["auto", "cifar10", "folder", "synthetic"] = Field(description="where the images come from")
    path: Text = Field(description="folder of cifar10's archive, or of train/<class>/ and test/<class>/")
    limit: int | None = Field(ge=1, description="images of each class and split; null: all")
    orientation: Literal["exif", "stored"] = Field(
        description="exif: photos are turned upright, as their EXIF data says; stored: pixels as they are in the file"
    )
    device_gib: float | None = Field(ge=0, description="most GiB of images on the device; null: what is free")
    timeout_seconds: float = Field(gt=0, description="how long a mirror may be silent")
    mirrors: Annotated[Texts, "a list of URLs"] = Field(
        description="where to download cifar-10-python.tar.gz, tried in this order"
    )

    @property
    def folder(self) -> Path:
        """The absolute path of `path`."""
        return absolute(self.path)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Energy:
    """Settings of the energy measurement."""

    source: Literal["auto", "powermetrics"] = Field(
        description="auto: the device's own counter; powermetrics: Apple's tool"
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Compare:
    """Settings of the comparison report."""

    reference: Annotated[Text, "a text, in quotes if it looks like a number"] | None = Field(
        description="the machine that others are compared with, by a unique part of its fingerprint, label or "
        "hardware; null: the one with the most runs"
    )
    prices: Text = Field(description=f"file of prices by hardware; {DEFAULT_PRICES} may be missing")
    tainted: bool = Field(description="allow claims from tainted runs")
    smallest: float = Field(
        ge=0, le=1, description="the smallest difference, as a fraction, that fewer than three sessions may claim"
    )
    accuracy_margin: float = Field(
        gt=0, le=1, description="accuracies, as fractions, are equivalent if they differ by less than this"
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Tracking:
    """Settings of MLflow."""

    experiment: Text = Field(description="name of the MLflow experiment")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Price:
    """The price of a machine: to buy, per hour, or both. A file of prices has one for each hardware name."""

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
    """The work: what is trained, on what, how long and how. EXECUTION_KEYS only change how it is executed."""

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
    optimizer_options: Options = Field(description="options by optimizer; only those of the chosen one are used")
    scheduler: Literal["cosine", "cyclic", "onecycle", "constant"] = Field(description="how the learning rate changes")
    scheduler_options: Options = Field(description="options by scheduler; only those of the chosen one are used")
    scheduler_step: Literal["batch", "epoch"] = Field(description="how often the schedule moves")
    warmup_epochs: float = Field(ge=0, description="epochs in which the learning rate rises linearly to lr")
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
        gt=0, le=1, description="the time to this validation accuracy (a fraction) is reported"
    )

    def resolved(self) -> dict[str, Any]:
        """The recipe as plain JSON values, with the options of the chosen optimizer and scheduler only."""
        values = dataclasses.asdict(self)
        values["optimizer_options"] = self.optimizer_options.get(self.optimizer, {})
        values["scheduler_options"] = self.scheduler_options.get(self.scheduler, {})
        return values


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Settings:
    """All of params.yaml."""

    recipe: Text = Field(description="one of the names below recipes")
    device: Device = Field(description="what to train on; auto: a GPU if there is one, else the CPU")
    seed: int = Field(ge=0, le=2**31 - 1, description="seed of every random choice")
    label: Text | None = Field(description="your own name for this machine")
    repeats: int = Field(ge=1, le=MAX_REPEATS, description="number of processes, with seed, seed + 1, ...")
    repeat_pause: float = Field(ge=0, description="seconds to wait between two of these processes")
    resume: Literal["auto", "never"] = Field(description="auto: go on with an interrupted training of the same work")
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
    """Read the settings of the file, changed by each `key=value` of `overrides`.

    Raises UsageError, in one line, for an unknown key or a value that is not allowed.
    """
    tree = read_yaml(path)
    changes = [_parse_override(text) for text in overrides]
    recipe = dict(changes).get("recipe", tree.get("recipe"))  # the last override of `recipe` counts
    for key, value in changes:
        name = key.split(".")[0]
        if name in _fields(Recipe) and name not in _fields(Settings):
            _check_recipe(recipe, tree.get("recipes"))
            key = f"recipes.{recipe}.{key}"
        _set(tree, key, value)
    if "recipe" in tree:
        _check_recipe(tree["recipe"], tree.get("recipes"))
    settings = _validate(Settings, tree, path.name)
    _find_prices(settings.compare.prices)
    return settings


def read_prices(setting: str) -> dict[str, Price] | None:
    """Read the file of prices that `compare.prices` names: hardware name, as in the runs -> price.

    Returns None if the default file is missing. Raises UsageError, in one line, for another missing file, and for a
    price that is not valid, such as one without currency, date or source.
    """
    path = _find_prices(setting)
    if path is None:
        return None
    tree = read_yaml(path, "prices by the names of hardware")
    try:
        prices = _validate(dict[str, Price], tree, path.name)
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
    """The workload's fingerprint, ten hex digits. Only runs with the same fingerprint are compared.

    `inputs` is the result of the stage `download`, with the digests of data and weights.
    """
    work = {key: value for key, value in recipe.resolved().items() if key not in EXECUTION_KEYS}
    work["weights"] = inputs["weights"]["digest"] or "random"
    work["data"] = [inputs["data"]["digest"], inputs["data"]["limit"]]
    work["version"] = WORKLOAD_VERSION
    return hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()[:10]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings into one with dotted keys. Empty mappings disappear."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return leaves


def describe() -> list[tuple[str, str, str]]:
    """Every setting as (dotted key, allowed values, meaning). A recipe's keys begin with `recipes.NAME.`."""
    return [*_describe_fields(Settings, ""), *_describe_fields(Recipe, "recipes.NAME.")]


def absolute(path: str) -> Path:
    """The absolute path for a path in the settings, which is relative to the project's folder. `~` is expanded."""
    try:
        return PROJECT / Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{json.dumps(path)} can't be found: {error}") from None


def public_path(path: str) -> str:
    """Only the last part of a path outside the project: its folders may name the user. Other paths are unchanged."""
    is_outside = path.startswith(("/", "~", "\\")) or path[1:2] == ":" or ".." in path
    return path.replace("\\", "/").rstrip("/").split("/")[-1] if is_outside else path


# --- YAML


class _Loader(yaml.SafeLoader):
    """Reads plain values as in YAML 1.2, as DVC does: `off` is a text and `1e-5` a number, unlike in YAML 1.1."""


class _Dumper(yaml.SafeDumper):
    """Quotes a text that YAML 1.1 or 1.2 would read as something else."""


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
        if keys.count(key.value) > 1:  # PyYAML would take the last one without a word
            raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", value.start_mark)
    return dict(loader.construct_pairs(node, deep=True))


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))  # PyYAML takes 010 as octal


def parse_yaml(text: str, where: str) -> Any:
    """Parse a YAML text. Raises UsageError if it is no YAML; the message begins with `where`."""
    try:
        return yaml.load(text, _Loader)
    # ValueError: `!!int x`; TypeError: a list as a key; RecursionError: a thousand brackets
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).split("\n", 1)[0]
        raise UsageError(f"{where}{line}: not YAML: {problem}") from None


def read_yaml(path: Path, expected: str = "a mapping of settings; restore it from git") -> dict[str, Any]:
    """Read a YAML file that contains a mapping. Raises UsageError, with the `expected` content, for any other file."""
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
    """Format `tree` as YAML, with its keys in their order."""
    plain = json.loads(json.dumps(tree))  # tuples become lists
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


# --- overrides


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[^\s.=]+(\.[^\s.=]+)*", key):
        raise UsageError(f"-S {' '.join(text.split())}: expected key=value, such as -S epochs=2")
    return key, parse_yaml(value, f"-S {key}")


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set the value of a dotted key in the tree."""
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        if node is tree.get("recipes") and parent not in node:  # a recipe has many keys: this one is misspelt
            raise _unknown_setting("recipes", parent, list(map(str, node)))
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UsageError(f"{key}: unknown setting: {parent} holds {child!r} and no settings of its own")
        node = child
    node[last] = value


# --- validation: allowed values in words, mistakes in one line


def _fields(owner: Any) -> dict[str, Any]:
    return owner.__pydantic_fields__  # type: ignore[no-any-return]


def _describe_fields(owner: Any, prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in _fields(owner).items():
        if dataclasses.is_dataclass(field.annotation):
            yield from _describe_fields(field.annotation, f"{prefix}{name}.")
        elif name != "recipes":
            yield prefix + name, _allowed(field.annotation, field.metadata), field.description


def _allowed(kind: Any, notes: Sequence[Any] = ()) -> str:
    """The allowed values of a type, in words. `notes` are its annotations, such as limits."""
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


def _validate(kind: type[T], tree: Any, file: str) -> T:
    """Convert `tree` to a `kind`. Raises UsageError, in one line, for the first mistake in it."""
    text = json.dumps(tree, default=str)  # from JSON only, pydantic's strict mode converts a mapping to a dataclass
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False)
    # An unknown key may explain a missing one, so it comes first.
    first = min(errors, key=lambda error: error["type"] != "unexpected_keyword_argument")
    raise _explain(first, kind, json.loads(text), file)


def _explain(error: Any, kind: Any, tree: Any, file: str) -> UsageError:
    """Translate one of pydantic's errors about `tree`: follow its location down to the setting, and name that."""
    keys: list[str] = []
    value, allowed = tree, "its settings below it"
    for part in map(str, error["loc"]):
        if dataclasses.is_dataclass(kind):
            fields = _fields(kind)
            if part not in fields:
                return _unknown_setting(".".join(keys), part, list(fields), tree.get("recipe"))
            kind, allowed = fields[part].annotation, _allowed(fields[part].annotation, fields[part].metadata)
        elif get_origin(kind) is dict and dataclasses.is_dataclass(get_args(kind)[1]):
            kind = get_args(kind)[1]
            allowed = _allowed(kind)
        else:
            break  # the mistake is inside this setting's value
        keys.append(part)
        value = value.get(part)
    key = ".".join(keys)
    if error["type"] == "missing":
        return UsageError(f"{key}: missing from {file}: expected {allowed}")
    return _not_allowed(key, value, allowed)


def read_value(key: str, value: Any, kind: Any) -> Any:
    """Convert `value` to `kind`, a type that pydantic knows. Raises UsageError, in one line, that names `key`."""
    try:
        return TypeAdapter(kind, config=STRICT).validate_python(value)
    except ValidationError:
        raise _not_allowed(key, value, _allowed(kind)) from None


def _check_recipe(recipe: Any, recipes: Any) -> None:
    if recipes and isinstance(recipes, dict) and str(recipe) not in map(str, recipes):
        raise _not_allowed("recipe", recipe, " | ".join(map(str, recipes)))


def _not_allowed(key: str, value: Any, allowed: str) -> UsageError:
    text = json.dumps(value, ensure_ascii=False, default=str)
    shown = text if len(text) <= 80 else text[:77] + "..."
    others = [word for word in allowed.split(" | ") if word != value]
    return UsageError(f"{key}: {shown} is not allowed: expected {allowed}{hint(value, others)}")


def _unknown_setting(section: str, name: str, known: Sequence[str], recipe: Any = None) -> UsageError:
    """The error for a name that is not `known` in a section. At the top (''), it may also be a recipe's key."""
    prefix = f"{section}." if section else ""
    names = list(known)
    if known == list(_fields(Settings)):
        names += [key.removeprefix("recipes.NAME.") for key, *_ in describe()]
    close = nearest(name, names) or next((key for key in names if key.endswith(f".{name}")), "")
    if close == name:  # a recipe's key at the top of the file
        close = f"recipes.{recipe}.{name}"
    help_text = f"did you mean {prefix}{close}?" if close else f"allowed here: {', '.join(known)}"
    return UsageError(f"{prefix}{name}: unknown setting; {help_text}")
