"""What a stranger's records may say: edges, and random changes."""

import json

import pytest
from bundle_files import COURSE, SPEED, evaluation, put, repeat, sustained, sustained_before_schema_3, training
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import AT

from pipeline.errors import UsageError
from pipeline.tracking import bundle_schema

RECORDS = {"train": training(), "evaluate": evaluation(training()), "sustain": sustained(training())}


def validate(stage, tree):
    return bundle_schema.validate(bundle_schema.STAGES[stage], tree, "here")


def refusal(call, *arguments):
    with pytest.raises(UsageError, match=r"^here: ") as caught:
        call(*arguments)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300
    return str(caught.value)


def test_records_of_every_kind_pass():
    for stage, record in RECORDS.items():
        validate(stage, record)
    validate("train", json.loads(repeat(2)["train/record.json"]))
    validate("sustain", sustained_before_schema_3(training()))
    for series in ([], {}):  # of `sustain_seconds: 0`, before schema 3 and since
        validate("sustain", sustained(training(), metrics={}, tags={}, series=series, warnings=[]))


REPEAT = {"repeats.id": "a" * 32, "repeat": "2", "repeats": "3"}
MANY = {f"figure{number}": 0.5 for number in range(1000)}
BAD = [
    # figures
    ("train", "metrics|test", float("nan"), "metrics.test"),
    ("train", "epochs|0|figures|train/loss", float("inf"), "epochs.0.figures.train/loss"),
    ("train", "metrics|test", 10**400, "metrics.test"),
    ("train", "metrics|test", 1e39, "test"),
    ("train", "metrics|test", True, "metrics.test"),
    ("train", "metrics|time/total_seconds", -0.5, "time/total_seconds"),
    ("sustain", f"metrics|{SPEED}", -1, SPEED),
    ("sustain", f"series|{COURSE}|0", -1, f"{COURSE}.0"),
    ("sustain", "series", [-1], "series"),
    ("sustain", "series", {"test/accuracy": [1.0]}, "test/accuracy"),
    ("evaluate", "metrics|test/accuracy", 1.5, "test/accuracy"),
    # times and counts
    ("train", "started", 5, "started"),
    ("train", "started", AT + 0.5, "started"),
    ("train", "epochs|1|figures|epoch", 1, "epochs"),
    ("train", "epochs|0|system|0|step", 0.5, "step"),
    ("train", "epochs", [], "epochs"),
    ("train", "facts|classes", [1], "facts.classes.0"),
    ("train", "facts|image_size", 10**6, "facts.image_size"),
    # amounts
    ("train", "metrics", MANY | {"one/more": 1.0}, "metrics"),
    ("train", "epochs|0|system", [{"at": AT, "step": 0, "figures": MANY}] * 101, "epochs"),
    ("sustain", f"series|{COURSE}", [1.0] * 30_000, COURSE),
    ("train", "params|x", "y" * 6001, "params.x"),
    ("train", "tags|x", "y" * 5001, "tags.x"),
    ("train", "warnings", ["x" * 1001], "warnings.0"),
    ("train", "warnings", ["x"] * 101, "warnings"),
    # names
    ("train", "id", "../../../etc", "id"),
    ("train", "metrics|a/../../b", 1.0, "a/../../b"),
    ("train", "metrics|", 1.0, "metrics"),
    ("train", "metrics|" + "x" * 247, 1.0, "metrics"),
    ("train", "params|x", 1, "params.x"),
    ("train", "tags|x", "", "tags.x"),
    ("train", "tags|mlflow.parentRunId", "1", "mlflow.parentRunId"),
    ("train", "tags|record.sha256", "1", "record.sha256"),
    ("train", "tags|imported", "1", "imported"),
    ("train", "tags|workload", "mine", "workload"),
    ("evaluate", "tags|fallback", None, "fallback"),
    ("train", "tags|fallback", "data", "name"),
    ("train", "name", "DEMO · x", "name"),
    ("train", "datasets|0|more", "x", "more"),
    ("train", "more", 1, "more"),
    # repeats
    *[("train", "tags", training()["tags"] | REPEAT | other, "repeat") for other in (
        {"repeat": "4"}, {"repeat": "0"}, {"repeat": ""}, {"repeats": "1", "repeat": "1"}, {"repeats": "1001"},
        {"repeats.id": "mine"},
    )],
    ("train", "tags", training()["tags"] | REPEAT, "name"),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "path", "value", "place"), BAD)
def test_a_bad_value_is_named(stage, path, value, place):
    tree = json.loads(json.dumps(RECORDS[stage]))
    put(tree, path, value)
    assert place in refusal(validate, stage, tree)


@pytest.mark.parametrize(
    "value", [{"a": [1, -2.5, None, True, "größer · 漢字 👩‍💻"]}, 2**62, 3.4e38, "x" * 100_000, [[[[[]]]]]]
)
def test_json_is_read_as_it_is(value):
    assert bundle_schema.parse(json.dumps(value, ensure_ascii=False).encode(), "here") == value


@pytest.mark.parametrize(
    "data",
    [
        b"", b"1 2", b"\xef\xbb\xbf1", b"\xff\xfe", b"\x80\x04\x95.", b"NaN", b"-Infinity", b'{"a": 1e999}',
        b"9" * 5000, b'{"a\\u0000": 1}', b'["a\\nb"]', b'"\\ud800"', b'"a\\u202eb"', b"[" * 2000 + b"]" * 2000,
        b"[" * 200_000,
        b" " * (bundle_schema.JSON_BYTES + 1),
    ],
)  # fmt: skip
def test_other_json_is_refused(data):
    refusal(bundle_schema.parse, data, "here")


WORDS = st.text(max_size=20) | st.sampled_from(["", "..", "x" * 10_000, "mlflow.user", "DEMO · x"])
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -(10**18), 2**63, 1e308, -0.0, AT, AT * 1000])
JUNK = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=5,
)


@st.composite
def mutated(draw, tree):
    """`tree` with a value replaced, taken out or added."""
    tree = json.loads(json.dumps(tree))
    node = tree
    while True:
        key = draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
        if not isinstance(node[key], dict | list) or not node[key] or draw(st.integers(0, 3)) == 0:
            break
        node = node[key]
    deed = draw(st.sampled_from(["replace", "delete", "add"]))
    if deed == "replace":
        node[key] = draw(JUNK)
    elif deed == "delete":
        del node[key]
    elif isinstance(node, list):
        node.append(draw(JUNK))
    else:
        node[draw(WORDS)] = draw(JUNK)
    return tree


@pytest.mark.parametrize("stage", RECORDS)
@pytest.mark.parametrize("count", [150, pytest.param(4000, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_no_record_ends_in_a_traceback(stage, count):
    outcomes = set()

    def check(tree):
        try:
            validate(stage, bundle_schema.parse(json.dumps(tree).encode(), "here"))
            outcomes.add("passed")
        except UsageError as error:
            assert str(error).isprintable() and len(str(error)) < 300
            outcomes.add("refused")

    limits = settings(
        max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    limits(given(mutated(RECORDS[stage]))(check))()
    assert outcomes == {"passed", "refused"}
