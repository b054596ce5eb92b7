"""params.yaml and what is laid over it: every key refuses what it can't take, in one line."""

import copy
import json

import pytest
import yaml

from pipeline import config
from pipeline.errors import UsageError

PARAMS = yaml.safe_load((config.ROOT / "params.yaml").read_text(encoding="utf-8"))
CHOSEN = "linear-probe"  # named in each test, for params.yaml may hold what somebody is trying out
RECIPES = list(PARAMS["recipes"])

ALLOWED = {key: allowed for key, allowed, _ in config.describe()}
KEYS = [key.replace("NAME", CHOSEN) for key in ALLOWED]

# For each key: what it must refuse, as YAML, and how the message shows it (None: just so).
REFUSED = {
    "recipe": {"1": None, "[blog]": '["blog"]', "": "null"},
    "device": {
        "1": None,
        "gpu": '"gpu"',
        "'cuda:x'": '"cuda:x"',
        "'cuda:-1'": '"cuda:-1"',
        "'cpu:0'": '"cpu:0"',
    },
    "seed": {"1.5": None, "one": '"one"', "-1": None, "2147483648": None, "true": None, "null": None},
    "label": {"1": None, "[a]": '["a"]', "' '": '" "', "true": None},
    "repeats": {"one": '"one"', "0": None, "1001": None},
    "sustain_seconds": {"long": '"long"', "-1": None, ".inf": "Infinity", "true": None, "null": None},
    "largest_batch": {"1": None, "yes": '"yes"', "null": None},
    "data.source": {"1": None, "web": '"web"', "[folder]": '["folder"]'},
    "data.path": {"1": None, "": "null", "''": '""'},
    "data.limit": {"all": '"all"', "0": None, "-1": None, "1.5": None},
    "data.device_gib": {"all": '"all"', "-1": None, ".nan": "NaN", "true": None},
    "data.timeout_seconds": {
        "soon": '"soon"',
        "0": None,
        "-1": None,
        ".nan": "NaN",
        ".inf": "Infinity",
        "true": None,
    },
    "data.mirrors": {"[]": None, "https://a": '"https://a"', "[1]": None, "['']": '[""]'},
    "energy.source": {"1": None, "nvml": '"nvml"', "meter": '"meter"', "[auto]": '["auto"]', "null": None},
    "compare.reference": {"123456": None, "[a]": '["a"]', "''": '""'},
    "compare.prices": {"1": None, "null": None, "''": '""'},
    "compare.tainted": {"yes": '"yes"', "1": None, "null": None},
    "tracking.experiment": {"1": None, "null": None, "''": '""'},
    "model": {"1": None, "[resnet18]": '["resnet18"]', "null": None},
    "weights": {"1": None, "weights.pt": '"weights.pt"', ".safetensors": '".safetensors"', "null": None},
    "trainable": {"1": None, "heads": '"heads"', "[]": None, "[1]": None, "['']": '[""]'},
    "head_init": {"1": None, "kaiming": '"kaiming"'},
    "frozen_batch_norm": {"true": None, "freeze": '"freeze"'},
    "normalize": {"yes": '"yes"', "1": None, "null": None},
    "flip": {"no": '"no"', "0": None, "'true'": '"true"'},
    "image_size": {"96.0": None, "big": '"big"', "7": None, "2049": None},
    "validation": {"1": None, "train": '"train"'},
    "batch_size": {"all": '"all"', "1.5": None, "0": None, "1048577": None},
    "epochs": {"ten": '"ten"', "1e1": "10.0", "0": None, "100001": None, "true": None},
    "optimizer": {"1": None, "[sgd]": '["sgd"]', "null": None},
    "lr": {"fast": '"fast"', "0": None, "-1e-3": "-0.001", ".inf": "Infinity", "true": None, "null": None},
    "optimizer_options": {"1": None, "[sgd]": '["sgd"]', "{sgd: 1}": '{"sgd": 1}', "{1: {}}": '{"1": {}}'},
    "scheduler": {"1": None, "linear": '"linear"', "null": None},
    "scheduler_options": {"1": None, "cosine": '"cosine"', "{cosine: null}": '{"cosine": null}'},
    "scheduler_step": {"1": None, "step": '"step"'},
    "warmup_epochs": {"one": '"one"', "-0.5": None, ".nan": "NaN", "false": None},
    "precision": {"32": None, "fp64": '"fp64"'},
    "channels_last": {"yes": '"yes"', "1": None, "null": None},
    "compile": {"on": '"on"', "true": None, "false": None},
    "graph": {"1": None, "on": '"on"', "null": None},
    "features": {"true": None, "none": '"none"'},
    "threads": {"four": '"four"', "0": None, "4097": None, "1.5": None},
    "target_accuracy": {"high": '"high"', "0": None, "1.5": None, "70%": '"70%"'},
    "repeat_pause": {"long": '"long"', "-1": None, "null": None},
    "compare.smallest": {"3%": '"3%"', "-0.01": None, "3": None},
    "compare.accuracy_margin": {"1%": '"1%"', "0": None, "null": None},
}


def whole(key):
    """The dotted key of one in REFUSED."""
    return next(known for known in KEYS if known in (key, f"recipes.{CHOSEN}.{key}"))


def refusal(*overrides, path=None):
    """The one line with which these settings are refused."""
    with pytest.raises(UsageError) as caught:
        config.load(overrides, path) if path else config.load([f"recipe={CHOSEN}", *overrides])
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.fixture
def params(tmp_path):
    """Writes a params.yaml of its own: the text, or the tree (JSON is YAML), that it is given."""

    def write(content):
        path = tmp_path / "params.yaml"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


def changed(*keys, **changes):
    """A copy of params.yaml's tree, with changes to the mapping below `keys`; None takes a key out."""
    tree = copy.deepcopy(PARAMS)
    node = tree
    for key in keys:
        node = node[key]
    for key, value in changes.items():
        if value is None:
            del node[key]
        else:
            node[key] = value
    return tree


# --- what is there


def test_shipped_settings_load():
    settings = config.load()
    assert list(settings.recipes) == ["blog", "linear-probe", "finetune"]
    assert settings.work is settings.recipes[PARAMS["recipe"]]
    assert settings.data.folder == config.ROOT / PARAMS["data"]["path"]
    assert settings.seed == PARAMS["seed"]
    assert isinstance(settings.data.mirrors, tuple)


def test_blog_recipe_is_the_posts_script():
    blog = config.load(["recipe=blog"]).work
    assert (blog.model, blog.weights, blog.trainable) == ("resnet18.a1_in1k", "pretrained", "head")
    assert (blog.frozen_batch_norm, blog.normalize, blog.flip, blog.validation) == (
        "train",
        False,
        False,
        "test",
    )
    assert (blog.image_size, blog.batch_size, blog.epochs, blog.precision) == (96, 1024, 10, "fp32")
    assert (blog.optimizer, blog.lr, blog.warmup_epochs) == ("ranger21", 0.1, 0)
    assert blog.resolved()["optimizer_options"] == {"weight_decay": 0, "num_warm_up_iterations": 0}
    assert (blog.scheduler, blog.scheduler_step) == ("cyclic", "epoch")
    assert blog.resolved()["scheduler_options"] == {"base_lr": 1e-5, "max_lr": 0.1}


def test_each_recipe_is_execution_and_work():
    fields = {key.removeprefix("recipes.NAME.") for key in ALLOWED if key.startswith("recipes.NAME.")}
    assert set(config.EXECUTION_KEYS) < fields
    assert all(set(recipe) == fields for recipe in PARAMS["recipes"].values())


def test_settings_are_frozen():
    settings = config.load()
    with pytest.raises(AttributeError):
        settings.work.lr = 1.0


def test_a_recipe_of_ones_own(params):
    mine = dict(PARAMS["recipes"]["finetune"], model="mobilenetv3_small_100.lamb_in1k", trainable=["blocks.5", "conv"])
    tree = changed(recipe="mine") | {"recipes": PARAMS["recipes"] | {"mine": mine}}
    work = config.load(["epochs=2"], path=params(tree)).work
    assert (work.model, work.trainable, work.epochs) == (mine["model"], ("blocks.5", "conv"), 2)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("device=cuda:1", "cuda:1"),
        ("device=xpu", "xpu"),
        ("label=my old laptop", "my old laptop"),
        ("label=a=b", "a=b"),
        ("label='7'", "7"),
        ("label=猫", "猫"),
        ("seed=2147483647", 2147483647),
        ("sustain_seconds=0", 0.0),
        ("sustain_seconds=0.5", 0.5),
        ("largest_batch=false", False),
        ("data.limit=1", 1),
        ("data.device_gib=0", 0.0),
        ("data.device_gib=null", None),
        ("data.timeout_seconds=3", 3.0),
        ("energy.source=powermetrics", "powermetrics"),
        ("tracking.experiment=a b", "a b"),
        ("weights=~/w.safetensors", "~/w.safetensors"),
        ("trainable=[layer4, fc]", ("layer4", "fc")),
        ("lr=1e-3", 0.001),
        ("lr=1", 1.0),
        ("channels_last=true", True),
        ("channels_last=auto", "auto"),
        ("compile=off", "off"),
        ("graph=false", False),
        ("threads=4", 4),
    ],
)
def test_values_arrive_typed(override, value):
    settings = config.load([override])
    *owners, name = override.split("=")[0].split(".")
    owner = settings
    for part in owners:
        owner = getattr(owner, part)
    found = getattr(owner if hasattr(owner, name) else settings.work, name)
    assert (type(found), found) == (type(value), value)


# --- what is refused


def test_every_key_is_in_the_table():
    assert sorted(map(whole, REFUSED)) == sorted(KEYS)


@pytest.mark.parametrize(
    ("key", "text", "shown"),
    [(whole(key), text, shown or text) for key, values in REFUSED.items() for text, shown in values.items()],
)
def test_wrong_type_or_out_of_range(key, text, shown):
    line = refusal(f"{key}={text}")
    allowed = ALLOWED[key.replace(CHOSEN, "NAME")]
    assert line.split("; did you mean ")[0] == f"{key}: {shown} is not allowed: expected {allowed}"


@pytest.mark.parametrize("key", KEYS)
def test_misspelt_key_gets_the_nearest(key):
    assert refusal(f"{key}{key[-1]}=1") == f"{key}{key[-1]}: unknown setting; did you mean {key}?"


@pytest.mark.parametrize("key", KEYS)
def test_missing_key(params, key):
    *owners, name = key.split(".")
    assert refusal(path=params(changed(*owners, **{name: None}))) == f"{key}: missing from params.yaml"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "recipe=finetun",
            'recipe: "finetun" is not allowed: expected blog | linear-probe | finetune; did you mean finetune?',
        ),
        ("recipe=imagenet", 'recipe: "imagenet" is not allowed: expected blog | linear-probe | finetune'),
        (
            "device=cude",
            'device: "cude" is not allowed: expected auto | cpu | cuda | mps | xpu, or one of several, such as cuda:1; '
            "did you mean cuda?",
        ),
        (
            "data.source=sinthetic",
            'data.source: "sinthetic" is not allowed: expected auto | cifar10 | folder | '
            "synthetic; did you mean synthetic?",
        ),
        (
            "scheduler=cosin",
            'recipes.linear-probe.scheduler: "cosin" is not allowed: expected cosine | cyclic | '
            "onecycle | constant; did you mean cosine?",
        ),
        ("trainable=heads", None),
        (
            "epochs=two",
            'recipes.linear-probe.epochs: "two" is not allowed: expected a whole number from 1 to 100000',
        ),
        (
            "weights=pretraned",
            'recipes.linear-probe.weights: "pretraned" is not allowed: expected pretrained | random '
            "| path of a .safetensors file; did you mean pretrained?",
        ),
        (
            "precision=bf61",
            'recipes.linear-probe.precision: "bf61" is not allowed: '
            "expected fp32 | tf32 | bf16 | fp16; did you mean bf16?",
        ),
    ],
)
def test_whole_line(override, line):
    line = line or (
        'recipes.linear-probe.trainable: "heads" is not allowed: expected head | all | '
        "a list of parameter name prefixes; did you mean head?"
    )
    assert refusal(override) == line


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("zebra=1", f"zebra: unknown setting; allowed here: {', '.join(PARAMS)}"),
        ("zebra.stripes=1", f"zebra: unknown setting; allowed here: {', '.join(PARAMS)}"),
        ("epoch=1", "epoch: unknown setting; did you mean epochs?"),
        (
            "data.zebra=1",
            "data.zebra: unknown setting; allowed here: source, path, limit, device_gib, timeout_seconds, mirrors",
        ),
        ("data.sorce=auto", "data.sorce: unknown setting; did you mean data.source?"),
        ("energy.meter=1", "energy.meter: unknown setting; allowed here: source"),
        ("tracking.uri=x", "tracking.uri: unknown setting; allowed here: experiment"),
        (
            "recipes.finetune.epoch=1",
            "recipes.finetune.epoch: unknown setting; did you mean recipes.finetune.epochs?",
        ),
        ("recipes.finetun.lr=1", "recipes.finetun: unknown setting; did you mean recipes.finetune?"),
        (
            "recipes.zebra.lr=1",
            "recipes.zebra: unknown setting; allowed here: blog, linear-probe, finetune",
        ),
        (
            "seed.more=1",
            f"seed.more: unknown setting: seed holds {PARAMS['seed']} and no settings of its own",
        ),
        ("data=auto", 'data: "auto" is not allowed: expected its settings below it'),
        ("recipes.blog=1", "recipes.blog: 1 is not allowed: expected its settings below it"),
        ("recipes={}", "recipes: {} is not allowed: expected at least one recipe by its name"),
        ("recipes=null", "recipes: null is not allowed: expected at least one recipe by its name"),
    ],
)
def test_unknown_at_every_level(override, line):
    assert refusal(override) == line


def test_an_unlike_key_of_a_recipe_gets_the_whole_list():
    # The long common beginning must not make any key look like any other.
    line = refusal("recipes.linear-probe.zebra=1")
    assert line.startswith("recipes.linear-probe.zebra: unknown setting; allowed here: model, weights, ")


def test_a_recipes_key_at_the_files_top_is_sent_to_its_place(params):
    assert refusal(path=params(PARAMS | {"epochs": 3})) == (
        f"epochs: unknown setting; did you mean recipes.{PARAMS['recipe']}.epochs?"
    )


def test_an_unknown_key_in_a_recipe_that_is_not_chosen(params):
    tree = changed("recipes", "blog", learning_rate=1)
    assert refusal(path=params(tree)).startswith("recipes.blog.learning_rate: unknown setting; ")


def test_a_long_value_is_cut(params):
    assert len(refusal(f"seed={'x' * 10_000}")) < 200


# --- the file


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("", "params.yaml is empty: expected a mapping of settings; restore it from git"),
        ("# nothing\n", "params.yaml is empty: expected a mapping of settings; restore it from git"),
        ("- recipe\n- blog\n", "params.yaml holds list: expected a mapping of settings; restore it from git"),
        ("blog", "params.yaml holds str: expected a mapping of settings; restore it from git"),
        ("recipe: blog\ndata: {source: [\n", "params.yaml, line 3: not YAML: "),
        ("recipe: blog\n\tseed: 1\n", "params.yaml, line 2: not YAML: "),
        ("recipe: !!int x\n", "params.yaml: not YAML: "),
        ("recipe: !!python/name:os.system x\n", "params.yaml, line 1: not YAML: "),
        ("recipe: \x07\n", "params.yaml: not YAML: "),
        ("a: 1\n---\nb: 1\n", "params.yaml, line 2: not YAML: "),
    ],
)
def test_files_that_are_no_settings(params, content, line):
    assert refusal(path=params(content)).startswith(line)


def test_missing_file(tmp_path):
    line = refusal(path=tmp_path / "params.yaml")
    assert line == "params.yaml is missing: it holds every setting; restore it from git"


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_bytes(b"recipe: \xff\xfe\n")
    assert refusal(path=path).startswith("params.yaml can't be read: ")
    assert refusal(path=tmp_path).startswith(f"{tmp_path.name} can't be read: ")  # a folder


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-1.5e-3", -1.5e-3),
        (".5", 0.5),
        ("1.", 1.0),
        ("+3", 3),
        ("007", 7),
        ("12e03", 12000.0),
        ("-.inf", float("-inf")),
        ("off", "off"),
        ("on", "on"),
        ("yes", "yes"),
        ("n", "n"),
        ("1:30", "1:30"),
        ("1e", "1e"),
        ("True", True),
        ("~", None),
        ("", None),
        ("'1'", "1"),
        ("{a: off, b: [1e-3, no]}", {"a": "off", "b": [1e-3, "no"]}),
    ],
)
def test_plain_values_are_read_as_dvc_reads_them(text, value):
    ruamel = pytest.importorskip("ruamel.yaml")
    found = config._parse(text, "here")
    assert (type(found), found) == (type(value), value)
    assert found == ruamel.YAML(typ="safe").load(text)


@pytest.mark.parametrize("word", ["off", "1e-5", ".5", "1E5", "true", "null", "", "a: b", "1:30", "猫", "-", "x" * 200])
def test_what_is_written_is_read_again(word):
    ruamel = pytest.importorskip("ruamel.yaml")
    tree = {"label": word, "lr": 1e-5, "more": {"limit": None, "flip": True, "trainable": ["layer4", word]}}
    text = config.dump(tree | {"tuple": (1, 2.5)})
    assert config._parse(text, "here") == tree | {"tuple": [1, 2.5]}
    assert ruamel.YAML(typ="safe").load(text) == tree | {"tuple": [1, 2.5]}


def test_the_shipped_file_is_read_as_dvc_reads_it():
    ruamel = pytest.importorskip("ruamel.yaml")
    path = config.ROOT / "params.yaml"
    with path.open(encoding="utf-8") as file:
        assert config._tree(path) == ruamel.YAML(typ="safe").load(file)


# --- what is laid over


@pytest.mark.parametrize(
    "text", ["epochs", "", "=2", ".epochs=2", "data..limit=2", "data.=2", "a b=2", " lr=1", "a\nb"]
)
def test_an_override_needs_a_key_and_a_value(text):
    line = refusal(text)
    assert line.startswith(f"-S {' '.join(text.split())}")
    assert line.endswith(": expected key=value, such as -S epochs=2")


@pytest.mark.parametrize("value", ["[1", "{a", "'x", "a: b: c", "\x07", "!!float x", "@a"])
def test_a_value_that_is_not_yaml(value):
    line = refusal(f"trainable={value}")
    assert line.startswith("-S trainable")
    assert ": not YAML: " in line


@pytest.mark.parametrize("overrides", [["recipe=finetune", "lr=0.02"], ["lr=0.02", "recipe=finetune"]])
def test_a_recipes_key_alone_goes_to_the_chosen_recipe_in_any_order(overrides):
    settings, shipped = config.load(overrides), config.load()
    assert settings.recipe == "finetune"
    assert settings.work.lr == 0.02
    assert [settings.recipes[name] for name in RECIPES[:2]] == [shipped.recipes[name] for name in RECIPES[:2]]


def test_a_whole_key_goes_where_it_says():
    settings = config.load(["recipe=finetune", "recipes.blog.lr=0.3"])
    assert settings.recipes["blog"].lr == 0.3
    assert settings.work.lr == PARAMS["recipes"]["finetune"]["lr"]


def test_the_last_of_two_overrides_holds():
    settings = config.load(["recipe=blog", "epochs=3", "epochs=4", "recipe=finetune"])
    assert (settings.recipe, settings.work.epochs) == ("finetune", 4)
    assert settings.recipes["blog"].epochs == PARAMS["recipes"]["blog"]["epochs"]


def test_a_misspelt_recipe_beside_a_key_of_it():
    for overrides in (["recipe=finetun", "lr=0.02"], ["lr=0.02", "recipe=finetun"]):
        assert refusal(*overrides) == refusal("recipe=finetun")


def test_options_of_another_optimizer_can_be_laid_over():
    work = config.load([f"recipe={CHOSEN}", "optimizer=lamb", "optimizer_options.lamb.weight_decay=1e-4"]).work
    assert work.resolved()["optimizer_options"] == {"weight_decay": 1e-4}
    assert work.optimizer_options["adamw"] == PARAMS["recipes"][CHOSEN]["optimizer_options"]["adamw"]


def test_options_of_an_optimizer_without_any():
    assert config.load(["optimizer=lamb"]).work.resolved()["optimizer_options"] == {}


# --- the workload


INPUTS = {
    "data": {"digest": "sha256:aa", "limit": None, "source": "folder", "reason": None},
    "weights": {"digest": "sha256:bb", "used": "pretrained", "reason": None},
}


def workload(*overrides, data=None, weights=None):
    inputs = {"data": INPUTS["data"] | (data or {}), "weights": INPUTS["weights"] | (weights or {})}
    return config.workload(config.load([f"recipe={CHOSEN}", *overrides]).work, inputs)


def test_a_workload_is_ten_hex_digits():
    assert len(workload()) == 10
    int(workload(), 16)


def test_workloads_that_differ():
    works = [
        workload(),
        workload(data={"digest": "sha256:cc"}),
        workload(data={"limit": 10}),
        workload(weights={"digest": "sha256:dd"}),
        workload(weights={"digest": None, "used": "random"}),
        *(workload(f"recipe={name}") for name in RECIPES if name != CHOSEN),
        *map(
            workload,
            [
                "model=resnet34.a1_in1k",
                "trainable=all",
                "trainable=[fc]",
                "head_init=xavier_normal",
                "frozen_batch_norm=train",
                "normalize=false",
                "flip=true",
                "image_size=64",
                "validation=test",
                "batch_size=128",
                "epochs=21",
                "optimizer=sgd",
                "lr=0.006",
                "optimizer_options.adamw.weight_decay=0.02",
                "scheduler=onecycle",
                "scheduler_options.cosine.eta_min=0.001",
                "scheduler_step=epoch",
                "warmup_epochs=2",
            ],
        ),
    ]
    assert len(set(works)) == len(works)


@pytest.mark.parametrize(
    "override",
    [
        "precision=bf16",
        "channels_last=true",
        "compile=off",
        "graph=false",
        "features=recompute",
        "threads=1",
        "seed=1",
        "device=cuda",
        "label=mine",
        "repeats=1000",
        "sustain_seconds=1",
        "largest_batch=false",
        "data.device_gib=0",
        "energy.source=powermetrics",
        "tracking.experiment=mine",
        "data.path=elsewhere",
        "data.timeout_seconds=1",
        "recipes.blog.lr=1",
        "optimizer_options.sgd.momentum=0.5",
        "scheduler_options.onecycle.pct_start=0.5",
        "lr=5e-3",
    ],
)
def test_the_same_work_done_otherwise(override):
    assert workload(override) == workload()


def test_where_inputs_came_from_is_not_the_work():
    assert workload(data={"source": "auto", "reason": "x"}, weights={"used": "file"}) == workload()


def test_the_order_of_keys_is_not_the_work(params):
    tree = changed(recipe=CHOSEN)
    tree["recipes"][CHOSEN] = dict(reversed(tree["recipes"][CHOSEN].items()))
    assert config.workload(config.load(path=params(tree)).work, INPUTS) == workload()


def test_a_version_raised_is_other_work(monkeypatch):
    before = workload()
    monkeypatch.setattr(config, "WORKLOAD_VERSION", config.WORKLOAD_VERSION + 1)
    assert workload() != before


def test_flat():
    assert config.flat({"a": 1, "b": {"c": [2], "d": {"e": None}}, "f": {}}) == {
        "a": 1,
        "b.c": [2],
        "b.d.e": None,
    }
    assert config.flat({"lr": 1}, "train.") == {"train.lr": 1}


def test_a_key_given_twice_is_refused(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text((config.ROOT / "params.yaml").read_text() + "\nseed: 1\n")
    with pytest.raises(UsageError, match=r"params\.yaml, line \d+: .*seed is given twice"):
        config.load(path=path)


def test_an_unknown_home_is_refused():
    with pytest.raises(UsageError, match="nosuchuser"):
        _ = config.load(["data.path=~nosuchuser/x"]).data.folder


# --- prices

PRICED = "{buy: 1234, per_hour: 2.5, currency: EUR, date: 2000-01-01, source: https://example.org/a}"


def prices(tmp_path, text):
    path = tmp_path / "prices.yaml"
    path.write_text(text, encoding="utf-8")
    return config.prices(path)


def test_prices_by_hardware(tmp_path):
    found = prices(tmp_path, f"GPU A: {PRICED}\nGPU B: {PRICED.replace('buy: 1234, ', '')}\n")
    assert found["GPU A"] == config.Price(
        buy=1234.0, per_hour=2.5, currency="EUR", date="2000-01-01", source="https://example.org/a"
    )
    assert found["GPU B"].buy is None and found["GPU B"].per_hour == 2.5
    full = PRICED.replace("{", "{per_kwh: 0.3, hours_per_day: 8, machine: a desktop, ")
    price = prices(tmp_path, f"GPU A: {full}\n")["GPU A"]
    assert (price.per_kwh, price.hours_per_day, price.machine) == (0.3, 8.0, "a desktop")


def test_there_need_be_no_prices(tmp_path):
    assert config.prices(tmp_path / "prices.yaml") is None


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (PRICED.replace("currency: EUR, ", ""), ".currency: missing: expected a currency's three letters, such as EUR"),
        (PRICED.replace("EUR", "€"), '.currency: "€" is not allowed: expected a currency\'s three letters, such as'),
        (PRICED.replace("1234", "0"), ".buy: 0 is not allowed: expected a number above 0"),
        (PRICED.replace("2.5", "-2.5"), ".per_hour: -2.5 is not allowed: expected a number above 0"),
        (PRICED.replace("2.5", ".nan"), ".per_hour: NaN is not allowed: expected a number above 0"),
        (PRICED.replace("2.5", "1e999"), ".per_hour: Infinity is not allowed: expected a number above 0"),
        (PRICED.replace("2.5", "cheap"), '.per_hour: "cheap" is not allowed: expected a number above 0'),
        (PRICED.replace("2000-01-01", "today"), '.date: "today" is not allowed: expected a date, such as 2026-11-01'),
        (PRICED.replace("2000-01-01", "2000-02-30"), '.date: "2000-02-30" is not allowed: expected a date, such as'),
        (PRICED.replace("source:", "sauce:"), ".sauce: unknown setting; did you mean source?"),
        (PRICED.replace("per_hour", "hourly"), ".hourly: unknown setting; allowed here: buy, per_hour, per_kwh, "),
        (PRICED.replace("{", "{per_kwh: -1, "), ".per_kwh: -1 is not allowed: expected a number from 0"),
        (PRICED.replace("{", "{hours_per_day: 25, "), ".hours_per_day: 25 is not allowed: expected a number above 0"),
        (PRICED.replace("{", "{machine: 1, "), ".machine: 1 is not allowed: expected a text"),
        ("{currency: EUR}", ": expected buy or per_hour, with currency, date and source"),
        ("12", ": expected buy or per_hour, with currency, date and source"),
    ],
)  # fmt: skip
def test_a_price_that_can_not_be_one_is_refused(tmp_path, text, line):
    with pytest.raises(UsageError) as caught:
        prices(tmp_path, f"GPU A: {text}\n")
    assert str(caught.value).startswith(f"prices.yaml: GPU A{line}") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "prices.yaml is empty: expected prices by the names of hardware"),
        ("[1]", "prices.yaml holds list: expected prices by the names of hardware"),
        ("a: {b", "prices.yaml, line 1: not YAML: "),
    ],
)
def test_a_file_that_holds_no_prices_is_refused(tmp_path, text, line):
    with pytest.raises(UsageError) as caught:
        prices(tmp_path, text)
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)
