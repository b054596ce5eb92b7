"""params.yaml -> frozen, typed settings. The only reader of YAML."""

import dataclasses
import datetime
import difflib
import hashlib
import json
import math
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
"""The project's folder: relative paths in the settings start here, whatever the current folder is."""

EXECUTION_KEYS = ("precision", "channels_last", "compile", "graph", "features", "threads")
"""A recipe's keys that say how the work is done, not what it is: they stay out of the workload."""

MOST_REPEATS = 1000
"""As far as `repeats` goes."""

WORKLOAD_VERSION = 1
"""Raised when the meaning of the work changes in the code, so that old and new runs are never compared."""

EXECUTION_VERSION = 3
"""Raised when the code does the same work faster or slower than before on any backend, beyond noise: machines are
compared by runs of one version, or its gain would pass for a machine's."""


@dataclass(frozen=True)
class Check:
    """What a setting may hold: `read` gives the value typed, or raises ValueError; `allowed` says it in words."""

    read: Callable[[Any], Any]
    allowed: str


def one_of(*names: str) -> Check:
    """One of these words."""

    def read(value: Any) -> str:
        if value not in names or not isinstance(value, str):
            raise ValueError(nearest(value, names))
        return value

    return Check(read, " | ".join(names))


def whole(low: int, high: int = 2**31 - 1) -> Check:
    """A whole number from `low` to `high`."""

    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError
        return value

    return Check(read, f"a whole number from {low}" + ("" if high == 2**31 - 1 else f" to {high}"))


def real(low: float, high: float = math.inf, *, open_low: bool = False) -> Check:
    """A finite number of at least `low` (above it where `open_low`) and at most `high`."""

    def read(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError
        if value < low or value > high or (open_low and value == low):
            raise ValueError
        return float(value)

    below = "" if math.isinf(high) else f" to {high:g}"
    return Check(read, f"a number {'above' if open_low else 'from'} {low:g}{below}")


def matching(pattern: str, allowed: str) -> Check:
    """A text that the whole of `pattern` matches."""

    def read(value: Any) -> str:
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise ValueError
        return value

    return Check(read, allowed)


def device_name() -> Check:
    """`auto` or the name of a backend, with an index if there are several such devices: cuda:1.

    The backends are the modules of pipeline/devices/. They are listed, not imported: that would import torch.
    """
    modules = {module.name for module in pkgutil.iter_modules([str(ROOT / "pipeline" / "devices")])}
    gpus = sorted(modules - {"base", "cpu", "energy", "graphs"})
    names = ["auto", "cpu", *gpus]

    def read(value: Any) -> str:
        if not isinstance(value, str) or not re.fullmatch(rf"auto|cpu|({'|'.join(gpus)})(:[0-9]+)?", value):
            raise ValueError("cuda" if value == "gpu" else nearest(value, names))
        return value

    return Check(read, f"{' | '.join(names)}, or one of several, such as cuda:1")


def texts(allowed: str) -> Check:
    """A list of at least one text, none of them empty."""

    def read(value: Any) -> tuple[str, ...]:
        if not isinstance(value, list) or not value or not all(isinstance(v, str) and v for v in value):
            raise ValueError
        return tuple(value)

    return Check(read, allowed)


def either(*checks: Check) -> Check:
    """What one of `checks` takes."""

    def read(value: Any) -> Any:
        hint = ""
        for check in checks:
            try:
                return check.read(value)
            except ValueError as error:
                hint = hint or str(error)
        raise ValueError(hint)

    return Check(read, " | ".join(check.allowed for check in checks))


def _read_switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _read_null(value: Any) -> None:
    if value is not None:
        raise ValueError


def _read_options(value: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(value, dict):
        raise ValueError
    for name, options in value.items():
        if not isinstance(name, str) or not isinstance(options, dict):
            raise ValueError
    return value


def _read_date(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return datetime.date.fromisoformat(value).isoformat()


SWITCH = Check(_read_switch, "true | false")
NULL = Check(_read_null, "null")
OPTIONS = Check(_read_options, "names, each with its options: {sgd: {momentum: 0.9}}")
TEXT = matching(r"\S(.*\S)?", "a text")


def setting(check: Check, meaning: str, **default: Any) -> Any:
    """A settings field: what it may hold, what it means (for --help), and its `default` where it may be missing."""
    return dataclasses.field(metadata={"check": check, "meaning": meaning}, **default)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the images come from."""

    source: str = setting(one_of("auto", "cifar10", "folder", "synthetic"), "where the images come from")
    path: str = setting(TEXT, "folder of cifar10's archive, or one holding train/<class>/ and test/<class>/")
    limit: int | None = setting(either(NULL, whole(1)), "images taken of each class and split; null: all")
    device_gib: float | None = setting(either(NULL, real(0)), "most GiB of images on the device; null: what is free")
    timeout_seconds: float = setting(real(0, open_low=True), "how long a mirror may be silent")
    mirrors: tuple[str, ...] = setting(texts("a list of URLs"), "of cifar-10-python.tar.gz, in this order")

    @property
    def folder(self) -> Path:
        """The absolute path of `path`."""
        return absolute(self.path)


@dataclass(frozen=True, kw_only=True)
class Energy:
    """How the energy is measured."""

    source: str = setting(one_of("auto", "powermetrics"), "the device's own counter; Apple's tool")


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """Where the results go."""

    experiment: str = setting(TEXT, "name of the MLflow experiment")


@dataclass(frozen=True, kw_only=True)
class Compare:
    """How the report sets machines side by side."""

    reference: str | None = setting(
        either(NULL, Check(TEXT.read, "a text, in quotes where it looks like a number")),
        "the machine that others are compared with: fingerprint, label or hardware; null: that with the most runs",
    )
    prices: str = setting(TEXT, "file of prices by hardware, where there is one")
    tainted: bool = setting(SWITCH, "let tainted runs into claims")
    smallest: float = setting(
        real(0, 1), "the smallest difference, as a fraction, that runs of fewer than three sessions may be claimed of"
    )
    accuracy_margin: float = setting(
        real(0, 1, open_low=True), "accuracies, as fractions, are equivalent if they differ by less than this"
    )


@dataclass(frozen=True, kw_only=True)
class Price:
    """What a machine costs, as a file of prices says it by hardware name: to buy, an hour, or both."""

    buy: float | None = setting(real(0, open_low=True), "to buy", default=None)
    per_hour: float | None = setting(real(0, open_low=True), "to rent for an hour", default=None)
    per_kwh: float | None = setting(real(0), "electricity for a kilowatt-hour", default=None)
    hours_per_day: float | None = setting(real(0, 24, open_low=True), "hours a day that it is used", default=None)
    machine: str | None = setting(TEXT, "of a card: the machine it sits in, which `buy` includes", default=None)
    currency: str = setting(matching("[A-Z]{3}", "a currency's three letters, such as EUR"), "of the price")
    date: str = setting(Check(_read_date, "a date, such as 2026-11-01"), "when it was asked")
    source: str = setting(TEXT, "who asked it: an address")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The work: what is trained, on what, how long and how; EXECUTION_KEYS say how it is executed."""

    model: str = setting(TEXT, "any timm classification model")
    weights: str = setting(
        either(one_of("pretrained", "random"), matching(r".+\.safetensors", "path of a .safetensors file")),
        "what the model starts from",
    )
    trainable: str | tuple[str, ...] = setting(
        either(one_of("head", "all"), texts("a list of parameter name prefixes")), "what is trained"
    )
    head_init: str = setting(one_of("default", "xavier_normal"), "how the new head's linear layers start")
    frozen_batch_norm: str = setting(one_of("eval", "train"), "mode of BatchNorm layers with frozen weights")
    normalize: bool = setting(SWITCH, "with the mean and std that the weights were trained with")
    flip: bool = setting(SWITCH, "mirror training images at random, left to right")
    image_size: int = setting(whole(8, 2048), "pixels a side; images are resized to it (bilinear)")
    validation: str = setting(one_of("split", "test"), "a stratified tenth of train, or the test split")
    batch_size: int = setting(whole(1, 2**20), "images a step")
    epochs: int = setting(whole(1, 100_000), "times through the training images")
    optimizer: str = setting(TEXT, "a name, such as sgd, adamw, ranger21 or timm:lamb")
    lr: float = setting(real(0, open_low=True), "the highest learning rate")
    optimizer_options: dict[str, dict[str, Any]] = setting(OPTIONS, "by optimizer; the chosen one's are read")
    scheduler: str = setting(one_of("cosine", "cyclic", "onecycle", "constant"), "the learning rate's course")
    scheduler_options: dict[str, dict[str, Any]] = setting(OPTIONS, "by scheduler; the chosen one's are read")
    scheduler_step: str = setting(one_of("batch", "epoch"), "how often the schedule moves")
    warmup_epochs: float = setting(real(0), "epochs over which the learning rate climbs to lr in a line")
    precision: str = setting(one_of("fp32", "tf32", "bf16", "fp16"), "execution: number format of the network")
    channels_last: str | bool = setting(either(one_of("auto"), SWITCH), "execution: memory layout of images")
    compile: str = setting(
        one_of("auto", "off", "default", "reduce-overhead", "max-autotune"), "execution: torch.compile, by its modes"
    )
    graph: str | bool = setting(either(one_of("auto"), SWITCH), "execution: a step's launches recorded (CUDA graphs)")
    features: str = setting(
        one_of("auto", "cache", "recompute"), "execution: a frozen backbone's features, once or every epoch"
    )
    threads: int | None = setting(either(NULL, whole(1, 4096)), "execution: CPU threads; null: what torch takes")
    target_accuracy: float | None = setting(
        either(NULL, real(0, 1, open_low=True)), "validation accuracy, as a fraction, to which the time is reported"
    )

    def resolved(self) -> dict[str, Any]:
        """The recipe with the options of the chosen optimizer and scheduler alone, as plain JSON values."""
        values = dataclasses.asdict(self)
        values["optimizer_options"] = self.optimizer_options.get(self.optimizer, {})
        values["scheduler_options"] = self.scheduler_options.get(self.scheduler, {})
        return values


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All of params.yaml."""

    recipe: str = setting(TEXT, "one of the names below recipes")
    device: str = setting(device_name(), "what to train on; auto: a GPU if there is one, else the CPU")
    seed: int = setting(whole(0), "of every random choice")
    label: str | None = setting(either(NULL, TEXT), "your own name for this machine")
    repeats: int = setting(whole(1, MOST_REPEATS), "number of processes, with seed, seed + 1, ...")
    repeat_pause: float = setting(real(0), "seconds to wait between two of these processes")
    sustain_seconds: float = setting(real(0), "seconds that each step of the score is repeated; 0: not at all")
    largest_batch: bool = setting(SWITCH, "find the largest batch of the convnet's step that fits, on GPUs")
    data: Data
    energy: Energy
    compare: Compare
    tracking: Tracking
    recipes: dict[str, Recipe]

    @property
    def work(self) -> Recipe:
        """The chosen recipe."""
        return self.recipes[self.recipe]


def nearest(name: Any, names: Sequence[str]) -> str:
    """The valid name that looks most like `name`, or ''."""
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.7)
    return close[0] if close else ""


def load(overrides: Sequence[str] = (), path: Path = ROOT / "params.yaml") -> Settings:
    """Reads the settings, each `key=value` of `overrides` laid over the file.

    Raises UsageError, in one line, for anything that does not fit.
    """
    tree = _tree(path)
    changes = [_override(text) for text in overrides]
    chosen = dict(changes).get("recipe", tree.get("recipe"))
    for key, value in changes:
        head = key.split(".")[0]
        if head not in _fields(Settings) and head in _fields(Recipe):
            recipes = tree.get("recipes")
            if isinstance(recipes, dict) and str(chosen) not in map(str, recipes):
                raise _refusal("recipe", chosen, one_of(*map(str, recipes)))
            key = f"recipes.{chosen}.{key}"
        _put(tree, key, value)
    settings: Settings = _typed(Settings, tree, "")
    if settings.recipe not in settings.recipes:
        raise _refusal("recipe", settings.recipe, one_of(*settings.recipes))
    return settings


def prices(path: Path) -> dict[str, Price] | None:
    """The prices that a file holds, by hardware name as runs have it; None where there is no such file.

    Raises UsageError, in one line, for anything that does not fit: a price with no currency, date or source, or of 0.
    """
    if not path.exists():
        return None
    tree = _tree(path, "prices by the names of hardware")
    return {str(name): _price(price, f"{path.name}: {name}") for name, price in tree.items()}


def _price(tree: Any, where: str) -> Price:
    fields = _fields(Price)
    if not isinstance(tree, dict) or not ("buy" in tree or "per_hour" in tree):
        raise UsageError(f"{where}: expected buy or per_hour, with currency, date and source")
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in fields:
            close = nearest(key, list(fields))
            raise _unknown(f"{where}.{key}", close, list(fields))
        check: Check = fields[key].metadata["check"]
        try:
            values[key] = check.read(value)
        except ValueError:
            raise _refusal(f"{where}.{key}", value, check) from None
    for key, field in fields.items():
        if key not in values and field.default is dataclasses.MISSING:
            raise UsageError(f"{where}.{key}: missing: expected {field.metadata['check'].allowed}")
    return Price(**values)


def workload(recipe: Recipe, inputs: Mapping[str, Any]) -> str:
    """Ten hex digits that name the work; only runs with the same ones are ever compared.

    `inputs` is what the download stage resolved: the source's digest and limit, the weights' digest or `random`.
    """
    work = {key: value for key, value in recipe.resolved().items() if key not in EXECUTION_KEYS}
    work["weights"] = inputs["weights"]["digest"] or "random"
    work["data"] = [inputs["data"]["digest"], inputs["data"]["limit"]]
    work["version"] = WORKLOAD_VERSION
    return hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()[:10]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys; an empty mapping gives nothing."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return leaves


def describe() -> list[tuple[str, str, str]]:
    """Every setting as (dotted key, what is allowed, meaning); a recipe's keys under `recipes.NAME`."""
    rows = []
    for prefix, owner in (
        ("", Settings),
        ("data.", Data),
        ("energy.", Energy),
        ("compare.", Compare),
        ("tracking.", Tracking),
        ("recipes.NAME.", Recipe),
    ):
        for field in dataclasses.fields(owner):
            if "check" in field.metadata:
                rows.append((prefix + field.name, field.metadata["check"].allowed, field.metadata["meaning"]))
    return rows


def absolute(path: str) -> Path:
    """A path of the settings: a relative one starts at the project's folder, `~` at the user's home."""
    try:
        return ROOT / Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(f'"{path}" can\'t be found: {error}') from None


def shareable(path: str) -> str:
    """A path as it may leave the machine: only the last part of one from outside the project."""
    inside = not (path.startswith(("/", "~", "\\")) or path[1:2] == ":" or ".." in path)
    return path if inside else path.replace("\\", "/").rstrip("/").split("/")[-1]


def dump(tree: Mapping[str, Any]) -> str:
    """`tree` as YAML, in its own order."""
    return yaml.dump(_plain(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values, as DVC reads them: `off` is a word and `1e-5` a number, unlike in YAML 1.1."""


class _Dumper(yaml.SafeDumper):
    """Puts in quotes a text that YAML 1.1 or 1.2 would take for something else."""


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


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(node.value)  # PyYAML's own takes a leading 0 for octal


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", node.value.lower()))


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def _construct_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [key.value for key, _ in node.value]
    for key, value in node.value:
        if keys.count(key.value) > 1:  # PyYAML would take the last one without a word
            raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", value.start_mark)
    return dict(loader.construct_pairs(node, deep=True))


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: of `!!int x`
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).split("\n", 1)[0]
        raise UsageError(f"{where}{line}: not YAML: {problem}") from None


def _tree(path: Path, expected: str = "a mapping of settings; restore it from git") -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path.name} is missing: it holds every setting; restore it from git") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path.name} can't be read: {error}") from None
    tree = _parse(text, path.name)
    if not isinstance(tree, dict):
        what = "is empty" if tree is None else f"holds {type(tree).__name__}"
        raise UsageError(f"{path.name} {what}: expected {expected}")
    return tree


def _override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[^\s.=]+(\.[^\s.=]+)*", key):
        raise UsageError(f"-S {' '.join(text.split())}: expected key=value, such as -S epochs=2")
    return key, _parse(value, f"-S {key}")


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        if node is tree.get("recipes") and parent not in node:  # a setting alone makes no recipe
            close = nearest(parent, list(map(str, node)))
            raise _unknown(f"recipes.{parent}", close and f"recipes.{close}", list(map(str, node)))
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UsageError(f"{key}: unknown setting: {parent} holds {child!r} and no settings of its own")
        node = child
    node[last] = value


def _fields(owner: Any) -> dict[str, Any]:
    return {field.name: field for field in dataclasses.fields(owner)}


def _refusal(key: str, value: Any, check: Check, hint: str = "") -> UsageError:
    hint = hint or nearest(value, check.allowed.split(" | "))
    meant = f"; did you mean {hint}?" if hint and hint != value else ""
    return UsageError(f"{key}: {_shown(value)} is not allowed: expected {check.allowed}{meant}")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _unknown(key: str, close: str, known: Sequence[str]) -> UsageError:
    meant = f"did you mean {close}?" if close else f"allowed here: {', '.join(known)}"
    return UsageError(f"{key}: unknown setting; {meant}")


def _typed(owner: Any, tree: Any, prefix: str) -> Any:
    """`tree` as the dataclass `owner`; recurses into its sections. `prefix` is the dotted key so far."""
    if not isinstance(tree, dict):
        raise UsageError(f"{prefix.rstrip('.')}: {_shown(tree)} is not allowed: expected its settings below it")
    fields = _fields(owner)
    for key in tree:
        if key not in fields:
            alone = [] if prefix else _fields(Recipe)  # which may stand alone on the command line
            close = nearest(key, [*fields, *alone])
            if close == key:  # but not in the file
                close = f"recipes.{tree.get('recipe')}.{key}"
            raise _unknown(f"{prefix}{key}", close and prefix + close, list(fields))
    values: dict[str, Any] = {}
    for name, field in fields.items():
        key = prefix + name
        if name not in tree:
            raise UsageError(f"{key}: missing from params.yaml")
        if name == "recipes":
            values[name] = _recipes(tree[name])
        elif dataclasses.is_dataclass(field.type):
            values[name] = _typed(field.type, tree[name], f"{key}.")
        else:
            check: Check = field.metadata["check"]
            try:
                values[name] = check.read(tree[name])
            except ValueError as error:
                raise _refusal(key, tree[name], check, str(error)) from None
    return owner(**values)


def _recipes(tree: Any) -> dict[str, Recipe]:
    if not isinstance(tree, dict) or not tree:
        raise UsageError(f"recipes: {_shown(tree)} is not allowed: expected at least one recipe by its name")
    return {str(name): _typed(Recipe, recipe, f"recipes.{name}.") for name, recipe in tree.items()}
