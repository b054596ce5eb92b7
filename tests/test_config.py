"""params.yaml and its overrides: every key accepts its values, and refuses all others in one line."""

import copy
import json

import pytest
import ruamel.yaml
import yaml

from pipeline import config
from pipeline.errors import SYNONYMS, UsageError

PARAMS = yaml.safe_load((config.ROOT / "params.yaml").read_text(encoding="utf-8"))
CHOSEN = "linear-probe"  # named in each test, for params.yaml may hold what somebody is trying out

ALLOWED = {key.replace("NAME", CHOSEN): allowed for key, allowed, _ in config.describe()}

# For each key, what it must refuse, as YAML.
REFUSED = {
    "recipe": ["1", "[blog]", ""],
    "device": ["1", "gpu", "'cuda:x'", "'cuda:-1'", "'cpu:0'"],
    "seed": ["1.5", "one", "-1", "2147483648", "true", "null"],
    "label": ["1", "[a]", "' '", "true"],
    "repeats": ["one", "0", "1001"],
    "repeat_pause": ["long", "-1", "null"],
    "resume": ["true", "always", "null"],
    "sustain_seconds": ["long", "-1", ".inf", "true", "null"],
    "largest_batch": ["1", "yes", "null"],
    "data.source": ["1", "web", "[folder]"],
    "data.path": ["1", "", "''"],
    "data.limit": ["all", "0", "-1", "1.5"],
    "data.orientation": ["upright", "1"],
    "data.device_gib": ["all", "-1", ".nan", "true"],
    "data.timeout_seconds": ["soon", "0", "-1", ".nan", ".inf", "true"],
    "data.mirrors": ["[]", "https://a", "[1]", "['']"],
    "energy.source": ["1", "nvml", "[powermetrics]", "null"],
    "compare.reference": ["123456", "[a]", "''"],
    "compare.prices": ["1", "null", "''"],
    "compare.tainted": ["yes", "1", "null"],
    "compare.smallest": ["3%", "-0.01", "3"],
    "compare.accuracy_margin": ["1%", "0", "null"],
    "tracking.experiment": ["1", "null", "''"],
    "model": ["1", "[resnet18]", "null"],
    "weights": ["1", "weights.pt", ".safetensors", "null"],
    "trainable": ["1", "heads", "[]", "[1]", "['']"],
    "head_init": ["1", "kaiming"],
    "frozen_batch_norm": ["true", "freeze"],
    "normalize": ["yes", "1", "null"],
    "flip": ["no", "0", "'true'"],
    "image_size": ["96.0", "big", "7", "2049"],
    "validation": ["1", "train"],
    "batch_size": ["all", "1.5", "0", "1048577"],
    "epochs": ["ten", "1e1", "0", "100001", "true"],
    "optimizer": ["1", "[sgd]", "null"],
    "lr": ["fast", "0", "-1e-3", ".inf", "true", "null"],
    "optimizer_options": ["1", "[sgd]", "{sgd: 1}"],
    "scheduler": ["1", "linear", "null"],
    "scheduler_options": ["1", "cosine", "{cosine: null}"],
    "scheduler_step": ["1", "step"],
    "warmup_epochs": ["one", "-0.5", ".nan", "false"],
    "precision": ["32", "fp64"],
    "channels_last": ["yes", "1", "null"],
    "compile": ["on", "true", "false"],
    "graph": ["1", "on", "null"],
    "features": ["true", "none"],
    "threads": ["four", "0", "4097", "1.5"],
    "target_accuracy": ["high", "0", "1.5", "70%"],
}


def full_key(key):
    """The dotted key of a key in REFUSED."""
    return next(known for known in ALLOWED if known in (key, f"recipes.{CHOSEN}.{key}"))


def refusal(*overrides, path=None):
    """The error message, one line, for these overrides or this file."""
    with pytest.raises(UsageError) as caught:
        config.load(overrides, path) if path else config.load([f"recipe={CHOSEN}", *overrides])
    (line,) = str(caught.value).splitlines()
    return line


@pytest.fixture
def params(tmp_path):
    """Write a params.yaml from a text or a tree, and return its path."""

    def write(content):
        path = tmp_path / "params.yaml"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


# --- what is there


def test_shipped_settings_load():
    settings = config.load()
    assert list(settings.recipes) == ["blog", "linear-probe", "finetune"]
    assert settings.work is settings.recipes[PARAMS["recipe"]]
    assert settings.data.folder == config.ROOT / PARAMS["data"]["path"]
    with pytest.raises(AttributeError):  # frozen
        settings.work.lr = 1.0


def test_blog_recipe_is_the_posts_script():
    blog = config.load(["recipe=blog"]).work
    assert (blog.model, blog.weights, blog.trainable) == ("resnet18.a1_in1k", "pretrained", "head")
    assert (blog.frozen_batch_norm, blog.normalize, blog.flip, blog.validation) == ("train", False, False, "test")
    assert (blog.image_size, blog.batch_size, blog.epochs, blog.precision) == (96, 1024, 10, "fp32")
    assert (blog.optimizer, blog.lr, blog.warmup_epochs) == ("ranger21", 0.1, 0)
    assert blog.resolved()["optimizer_options"] == {"weight_decay": 0, "num_warm_up_iterations": 0}
    assert (blog.scheduler, blog.scheduler_step) == ("cyclic", "epoch")
    assert blog.resolved()["scheduler_options"] == {"base_lr": 1e-5, "max_lr": 0.1}


def test_a_recipe_of_your_own(params):
    mine = PARAMS["recipes"]["finetune"] | {"model": "vgg11.tv_in1k", "trainable": ["blocks.5", "conv"]}
    tree = PARAMS | {"recipe": "mine", "recipes": PARAMS["recipes"] | {"mine": mine}}
    work = config.load(["epochs=2"], path=params(tree)).work
    assert (work.model, work.trainable, work.epochs) == ("vgg11.tv_in1k", ("blocks.5", "conv"), 2)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("device=cuda:1", "cuda:1"),
        ("label=a=b", "a=b"),
        ("label='7'", "7"),
        ("label=猫", "猫"),
        ("seed=2147483647", 2147483647),
        ("data.device_gib=null", None),
        ("weights=~/w.safetensors", "~/w.safetensors"),
        ("trainable=[layer4, fc]", ("layer4", "fc")),
        ("lr=1", 1.0),
        ("channels_last=true", True),
        ("compile=off", "off"),
        ("threads=4", 4),
    ],
)
def test_values_arrive_typed(override, value):
    settings = config.load([override])
    section, _, name = override.partition("=")[0].rpartition(".")
    owner = getattr(settings, section) if section else settings if hasattr(settings, name) else settings.work
    assert (type(getattr(owner, name)), getattr(owner, name)) == (type(value), value)


@pytest.mark.parametrize("path", ["~/images", "images"])
def test_paths_are_relative_to_the_project_or_to_home(path, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    expected = tmp_path / "images" if path.startswith("~") else config.ROOT / "images"
    assert config.load([f"data.path={path}"]).data.folder == expected


def test_an_unknown_home_is_refused():
    with pytest.raises(UsageError, match="nosuchuser"):
        _ = config.load(["data.path=~nosuchuser/x"]).data.folder


# --- what is refused


def test_the_table_of_refused_values_has_every_key():
    assert sorted(map(full_key, REFUSED)) == sorted(ALLOWED)


@pytest.mark.parametrize(("key", "text"), [(full_key(key), text) for key, values in REFUSED.items() for text in values])
def test_a_value_of_the_wrong_type_or_out_of_range_is_refused(key, text):
    line = refusal(f"{key}={text}")
    shown = json.dumps(config.parse_yaml(text, ""), ensure_ascii=False)
    assert line.startswith(f"{key}: {shown} ") and ("blog | " if key == "recipe" else ALLOWED[key]) in line


@pytest.mark.parametrize("key", ALLOWED)
def test_a_misspelt_or_missing_key_is_refused(params, key):
    line = refusal(f"{key}{key[-1]}=1")
    assert line.startswith(f"{key}{key[-1]}: ") and line.endswith(f" {key}?")
    *sections, name = key.split(".")
    tree = copy.deepcopy(PARAMS)
    owner = tree
    for section in sections:
        owner = owner[section]
    del owner[name]
    line = refusal(path=params(tree))
    assert line.startswith(f"{key}: missing from params.yaml") and ALLOWED[key] in line


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("device=gpu", "cuda"),
        ("device=Metal", "mps"),
        ("data.source=sinthetic", "synthetic"),
        ("precision=float16", "fp16"),
        ("epoch=1", "epochs"),
        ("learning-rate=1", "lr"),
        ("Batch-Size=1", "batch_size"),
        ("num_epochs=1", "epochs"),
        ("data-limit=1", "data.limit"),
        ("data.sorce=auto", "data.source"),
        ("recipes.finetune.epoch=1", "recipes.finetune.epochs"),
        ("recipes.finetun.lr=1", "recipes.finetune"),
    ],
)
def test_the_nearest_name_is_suggested(override, meant):
    assert refusal(override).endswith(f"; did you mean {meant}?")


def test_synonyms_stand_for_existing_names():
    words = " ".join([*ALLOWED, *ALLOWED.values()]).replace(".", " ").split()
    assert {name.split(".")[-1] for name in SYNONYMS.values()} <= set(words)


@pytest.mark.parametrize(
    ("override", "key", "words"),
    [
        ("recipe=imagenet", "recipe", "blog | linear-probe | finetune"),
        ("zebra.stripes=1", "zebra", ", ".join(PARAMS)),
        ("data.zebra=1", "data.zebra", "source, path, limit, orientation, device_gib, timeout_seconds, mirrors"),
        # The long common beginning must not make any key look like any other.
        ("recipes.linear-probe.zebra=1", "recipes.linear-probe.zebra", "model, weights, "),
        ("recipes.zebra.lr=1", "recipes.zebra", "blog, linear-probe, finetune"),
        ("seed.more=1", "seed.more", f"seed holds {PARAMS['seed']}"),
        ("data=auto", "data", '"auto"'),
        ("recipes.blog=1", "recipes.blog", "1"),
        ("recipes=null", "recipes", "at least one recipe"),
    ],
)
def test_unknown_keys_are_refused_at_every_level(override, key, words):
    line = refusal(override)
    assert line.startswith(f"{key}: ") and words in line and "did you mean" not in line


def test_a_long_value_is_cut():
    assert len(refusal(f"seed={'x' * 10_000}")) < 200


# --- the file


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("", "params.yaml is empty"),
        ("- recipe\n- blog\n", "params.yaml holds list"),
        ("recipe: blog\ndata: {source: [\n", "params.yaml, line 3: not YAML: "),
        ("recipe: !!int x\n", "params.yaml: not YAML: "),
        ("? [a]\n: 1\n", "params.yaml: not YAML: "),
        ("recipe: !!python/name:os.system x\n", "params.yaml, line 1: not YAML: "),
        ("recipe: \x07\n", "params.yaml: not YAML: "),
        ("a: 1\n---\nb: 1\n", "params.yaml, line 2: not YAML: "),
        ("seed: 1\nseed: 2\n", "params.yaml, line 1: not YAML: seed is given twice"),
    ],
)
def test_a_file_without_settings_is_refused(params, content, line):
    assert refusal(path=params(content)).startswith(line)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    path = tmp_path / "params.yaml"
    assert refusal(path=path).startswith("params.yaml is missing")
    path.write_bytes(b"recipe: \xff\xfe\n")
    assert refusal(path=path).startswith("params.yaml can't be read: ")
    assert refusal(path=tmp_path).startswith(f"{tmp_path.name} can't be read: ")  # a folder


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5), ("1E5", 1e5), ("-1.5e-3", -1.5e-3), (".5", 0.5), ("1.", 1.0), ("+3", 3), ("010", 10),
        ("-.inf", float("-inf")), ("off", "off"), ("on", "on"), ("yes", "yes"), ("n", "n"), ("1:30", "1:30"),
        ("1e", "1e"), ("True", True), ("~", None), ("", None), ("'1'", "1"),
        ("{a: off, b: [1e-3, no]}", {"a": "off", "b": [1e-3, "no"]}),
    ],
)  # fmt: skip
def test_plain_values_are_read_as_dvc_reads_them(text, value):
    parsed = config.parse_yaml(text, "here")
    assert (type(parsed), parsed) == (type(value), value)
    assert parsed == ruamel.yaml.YAML(typ="safe").load(text)  # DVC's reader


@pytest.mark.parametrize("word", ["off", "1e-5", ".5", "1E5", "true", "null", "", "a: b", "1:30", "猫", "-", "x" * 200])
def test_dumped_settings_are_read_back_unchanged(word):
    tree = {"label": word, "lr": 1e-5, "more": {"limit": None, "flip": True, "trainable": ["layer4", word]}}
    text = config.dump(tree | {"tuple": (1, 2.5)})
    expected = tree | {"tuple": [1, 2.5]}
    assert config.parse_yaml(text, "here") == ruamel.yaml.YAML(typ="safe").load(text) == expected
    assert yaml.safe_load(text)["more"]["trainable"][1] == word or word[0] in ".1"  # YAML 1.1 knows other numbers


# --- what is laid over


@pytest.mark.parametrize("text", ["epochs", "", "=2", ".epochs=2", "data..limit=2", "data.=2", "a b=2", "a\nb"])
def test_an_override_needs_a_key_and_a_value(text):
    line = refusal(text)
    assert line.startswith(f"-S {' '.join(text.split())}: ") and "key=value" in line


@pytest.mark.parametrize("overrides", [["recipe=finetune", "lr=0.02"], ["lr=0.02", "recipe=finetune"]])
def test_a_recipes_key_alone_changes_the_chosen_recipe_in_any_order(overrides):
    settings, shipped = config.load(overrides), config.load()
    assert (settings.recipe, settings.work.lr) == ("finetune", 0.02)
    assert all(settings.recipes[name] == shipped.recipes[name] for name in ("blog", "linear-probe"))
    misspelt = [text.replace("recipe=finetune", "recipe=finetun") for text in overrides]
    assert refusal(*misspelt) == refusal("recipe=finetun")


def test_a_full_key_changes_its_recipe_and_the_last_override_wins():
    settings = config.load(["recipe=blog", "epochs=3", "recipes.blog.lr=0.3", "epochs=4", "recipe=finetune"])
    assert (settings.recipe, settings.work.epochs, settings.work.lr) == (
        "finetune", 4, PARAMS["recipes"]["finetune"]["lr"],
    )  # fmt: skip
    assert (settings.recipes["blog"].epochs, settings.recipes["blog"].lr) == (PARAMS["recipes"]["blog"]["epochs"], 0.3)


def test_only_the_options_of_the_chosen_optimizer_are_read():
    work = config.load([f"recipe={CHOSEN}", "optimizer=lamb", "optimizer_options.lamb.weight_decay=1e-4"]).work
    assert work.resolved()["optimizer_options"] == {"weight_decay": 1e-4}
    assert work.optimizer_options["adamw"] == PARAMS["recipes"][CHOSEN]["optimizer_options"]["adamw"]
    assert config.load(["optimizer=lamb"]).work.resolved()["optimizer_options"] == {}


# --- the workload

INPUTS = {
    "data": {"digest": "sha256:aa", "limit": None, "source": "folder", "reason": None},
    "weights": {"digest": "sha256:bb", "used": "pretrained", "reason": None},
}


def workload(*overrides, data=None, weights=None):
    inputs = {"data": INPUTS["data"] | (data or {}), "weights": INPUTS["weights"] | (weights or {})}
    return config.workload(config.load([f"recipe={CHOSEN}", *overrides]).work, inputs)


@pytest.mark.parametrize(
    ("recipe", "digits"), [("blog", "e6e0ee5710"), ("linear-probe", "5fe2109247"), ("finetune", "71803a2635")]
)
def test_the_workloads_of_published_runs_stay_the_same(recipe, digits):
    assert workload(f"recipe={recipe}") == digits


def test_different_work_has_another_workload():
    overrides = [
        "recipe=blog", "recipe=finetune", "model=resnet34.a1_in1k", "trainable=all", "trainable=[fc]",
        "head_init=xavier_normal", "frozen_batch_norm=train", "normalize=false", "flip=true", "image_size=64",
        "validation=test", "batch_size=128", "epochs=21", "optimizer=sgd", "lr=0.006", "scheduler=onecycle",
        "optimizer_options.adamw.weight_decay=0.02", "scheduler_options.cosine.eta_min=0.001", "scheduler_step=epoch",
        "warmup_epochs=2",
    ]  # fmt: skip
    works = [
        workload(),
        workload(data={"digest": "sha256:cc"}),
        workload(data={"limit": 10}),
        workload(weights={"digest": "sha256:dd"}),
        workload(weights={"digest": None, "used": "random"}),
        *map(workload, overrides),
    ]
    assert len(set(works)) == len(works)


@pytest.mark.parametrize(
    "override",
    [
        "precision=bf16", "channels_last=true", "compile=off", "graph=false", "features=recompute", "threads=1",
        "seed=1",         "device=cuda",
        "label=mine", "repeats=1000", "sustain_seconds=1", "largest_batch=false", "data.path=elsewhere",
        "tracking.experiment=mine", "recipes.blog.lr=1", "optimizer_options.sgd.momentum=0.5", "lr=5e-3",
    ],
)  # fmt: skip
def test_how_the_work_is_executed_does_not_change_the_workload(override):
    assert workload(override) == workload()


def test_the_source_of_equal_data_and_the_order_of_keys_do_not_change_the_workload(params, monkeypatch):
    assert workload(data={"source": "auto", "reason": "x"}, weights={"used": "file"}) == workload()
    tree = copy.deepcopy(PARAMS) | {"recipe": CHOSEN}
    tree["recipes"][CHOSEN] = dict(reversed(tree["recipes"][CHOSEN].items()))
    assert config.workload(config.load(path=params(tree)).work, INPUTS) == workload()
    before = workload()
    monkeypatch.setattr(config, "WORKLOAD_VERSION", config.WORKLOAD_VERSION + 1)
    assert workload() != before


# --- prices

PRICED = "{buy: 1234, per_hour: 2.5, currency: EUR, date: 2000-01-01, source: https://example.org/a}"


def prices(tmp_path, text):
    path = tmp_path / "prices.yaml"
    path.write_text(text, encoding="utf-8")
    return config.read_prices(str(path))


def test_prices_are_read_by_hardware(tmp_path):
    more = PRICED.replace("{buy: 1234", "{per_kwh: 0.3, hours_per_day: 8, machine: a desktop")
    read = prices(tmp_path, f"GPU A: {PRICED}\nGPU B: {more}\n")
    assert read["GPU A"] == config.Price(
        buy=1234.0, per_hour=2.5, currency="EUR", date="2000-01-01", source="https://example.org/a"
    )
    other = read["GPU B"]
    assert (other.buy, other.per_kwh, other.hours_per_day, other.machine) == (None, 0.3, 8.0, "a desktop")


def test_only_the_default_file_of_prices_may_be_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "ROOT", tmp_path)
    assert config.read_prices(PARAMS["compare"]["prices"]) is None
    assert refusal("compare.prices=mine.yaml").startswith('compare.prices: "mine.yaml" ')


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (PRICED.replace("currency: EUR, ", ""), ".currency: missing "),
        (PRICED.replace("EUR", "€"), '.currency: "€" '),
        (PRICED.replace("1234", "0"), ".buy: 0 "),
        (PRICED.replace("2.5", "1e999"), ".per_hour: Infinity "),
        (PRICED.replace("2.5", "cheap"), '.per_hour: "cheap" '),
        (PRICED.replace("2000-01-01", "2000-02-30"), '.date: "2000-02-30" '),
        (PRICED.replace("source:", "sauce:"), ".sauce: unknown setting; did you mean GPU A.source?"),
        (PRICED.replace("{", "{hours_per_day: 25, "), ".hours_per_day: 25 "),
        (PRICED.replace("buy: 1234, per_hour: 2.5, ", ""), ": expected buy or per_hour"),
        ("12", ": 12 "),
    ],
)
def test_an_invalid_price_is_refused(tmp_path, text, words):
    with pytest.raises(UsageError) as caught:
        prices(tmp_path, f"GPU A: {text}\n")
    assert str(caught.value).startswith(f"prices.yaml: GPU A{words}") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"), [("", " is empty"), ("[1]", " holds list"), ("a: {b", ", line 1: not YAML")]
)
def test_a_file_without_prices_is_refused(tmp_path, text, words):
    with pytest.raises(UsageError) as caught:
        prices(tmp_path, text)
    assert str(caught.value).startswith(f"prices.yaml{words}") and "\n" not in str(caught.value)
