"""What a stranger's JSON may say, at the edges; whole records are tested as bundles (test_bundle.py)."""

import json

import pytest
from test_bundle import evaluation_of, record_of, sustained_before_schema_3, sustained_of

from pipeline.errors import UsageError
from pipeline.tracking import bundle_schema


def refused(call, *arguments):
    with pytest.raises(UsageError) as caught:
        call(*arguments)
    assert str(caught.value).startswith("here") and len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, -2.5, None, True, "größer · 漢字 👩‍💻"]},
        9_223_372_036_854_775_807,
        3.4e38,
        "x" * bundle_schema.TEXT_LENGTH,
        json.loads("[" * bundle_schema.DEPTH + "]" * bundle_schema.DEPTH),
    ],
)
def test_json_of_ours_is_read_as_it_is(value):
    assert bundle_schema.parse(json.dumps(value, ensure_ascii=False).encode(), "here") == value


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "it is no JSON of ours"),
        (b"1 2", "it is no JSON of ours"),
        (b"\xef\xbb\xbf1", "it is no JSON of ours"),
        (b"-Infinity", "-Infinity is no number"),
        (b"-1e400", "'-1e400' is too large"),
        (b"99999999999999999999", "'99999999999999999999' is too large"),
        (b'{"a": 1, "a": 1}', "a key stands twice"),
        (b'{"a\\u0000": 1}', "control character '\\x00'"),
        (b'"\\udfff"', "control character '\\udfff'"),
        (b"[" * 14 + b"]" * 14, "nested too deeply"),
        (b'"' + b"x" * 100_001 + b'"', "a text has 100,001 characters"),
    ],
)
def test_json_that_is_none_of_ours_is_a_line(data, said):
    assert said in refused(bundle_schema.parse, data, "here")


@pytest.mark.parametrize("key", ["a", "a/b", "A.b-c_9", "train.optimizer_options.betas", "x" * 246])
def test_keys_that_mlflow_takes_everywhere(key):
    assert bundle_schema.figures({key: 1.5}, "here") == 1


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "a/./b", "../a", ".", "a b", "a:b", "ä", "a\n", "x" * 251])
def test_keys_that_it_does_not(key):
    refused(bundle_schema.figures, {key: 1.5}, "here")


@pytest.mark.parametrize(
    ("key", "value", "right"),
    [
        ("loss", -1, True),
        ("time/x_seconds", 0, True),
        ("time/x_seconds", -1e-9, False),
        ("val/accuracy", 1, True),
        ("best/val_accuracy", 1.0000001, False),
        ("loss", bundle_schema.LARGEST * 2, False),
        ("loss", False, False),
        ("loss", None, False),
    ],
)
def test_figures_are_of_what_can_be_measured(key, value, right):
    if right:
        assert bundle_schema.figures({key: value}, "here") == 1
    else:
        assert f"here: {key}: " in refused(bundle_schema.figures, {key: value}, "here")


def test_the_values_of_a_record_are_counted():
    record = record_of()
    assert bundle_schema.record(record, "here") == 2 * (10 + 1) + 4
    assert bundle_schema.evaluation(evaluation_of(record), "here") == 3
    assert bundle_schema.sustained(sustained_of(record), "here") == 4 + 2
    assert bundle_schema.sustained(sustained_before_schema_3(record), "here") == 2 + 2
    for series in ([], {}):  # with sustain_seconds=0, before schema 3 and since
        nothing = {"metrics": {}, "tags": {}, "series": series, "warnings": []}
        assert bundle_schema.sustained(sustained_of(record, **nothing), "here") == 0


@pytest.mark.parametrize("figure", ["first_third_images_per_second", "seconds", "batch_size"])
def test_the_speed_of_a_step_needs_what_belongs_to_it(figure):
    sustained = sustained_of(record_of())
    del sustained["metrics"][f"sustained/convnet_fp32_{figure}"]
    assert f'"sustained/convnet_fp32_{figure}" is missing' in refused(bundle_schema.sustained, sustained, "here")


def test_on_features_an_epoch_needs_no_speed():
    record = record_of()
    for epoch in record["epochs"]:
        del epoch["figures"]["speed/train_images_per_second"]
    assert "is missing" in refused(bundle_schema.record, record, "here")
    record["metrics"]["speed/feature_images_per_second"] = 90.0
    assert bundle_schema.record(record, "here")


def test_a_refusal_is_no_longer_than_a_line():
    assert len(refused(bundle_schema.text, ["x" * 100_000], "here")) < 200
    assert len(str(bundle_schema.refusal("here", "x" * 1000))) < 300
