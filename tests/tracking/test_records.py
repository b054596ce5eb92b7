"""What a run shows: parameters, tags, data sets, warnings and a description, from which no path leaks."""

import copy
import json
from types import SimpleNamespace

import pytest
from conftest import fails

from pipeline import config, files
from pipeline.errors import StageError, UsageError
from pipeline.profiling import score_steps
from pipeline.tracking import descriptions, records

HARDWARE = {
    "machine": "b72054f1a41b", "model": "LENOVO 20XW", "cpu": "AMD EPYC", "cores": 2, "logical_cores": 4,
    "os": "Debian GNU/Linux 12", "torch": "2.14.1", "gpus": [],
}  # fmt: skip
GPU = {
    "name": "NVIDIA T4", "memory_gib": 14.6, "gpu_cores": 40, "power_limit_watts": 70.0, "driver": "580.65",
    "threads": 3,
}  # fmt: skip
SPEED = score_steps.metric("convnet_fp32", "images_per_second")
"""The figure of a sustained step."""


def backend(kind="cuda", index=0, name=None):
    return SimpleNamespace(kind=kind, index=index, name=name or kind)


def inputs_of(settings, **changes):
    """What `download` would write down for `settings`."""
    data = {
        "requested": settings.data.source, "source": "folder", "digest": "sha256:d1", "limit": settings.data.limit,
        "classes": ["blue", "green", "red"], "counts": {"train": 60, "test": 30}, "size": [16, 16], "reason": None,
    }  # fmt: skip
    weights = {
        "model": settings.work.model, "requested": config.public_path(settings.work.weights), "used": "random",
        "digest": None, "hub": None, "reason": None,
    }  # fmt: skip
    inputs = {"data": data, "weights": weights, "fallback": []}
    for key, value in changes.items():
        inputs[key] = value if key == "fallback" else inputs[key] | value
    return inputs


def tags_of(settings, *, inputs=None, hardware=HARDWARE, on=None, accelerator=GPU, conditions=None, fallback=()):
    inputs = inputs or inputs_of(settings)
    return records.run_tags(settings, inputs, hardware, on or backend(), accelerator, conditions or {}, list(fallback))


# --- what download left


def test_inputs_are_those_that_download_left_for_these_data_and_weights(settings_of, tmp_path):
    settings = settings_of("data.limit=5", "weights=~/mine.safetensors")
    files.write_json(tmp_path / "inputs.json", inputs_of(settings))
    for other in ((), ("seed=3",), ("epochs=2", "image_size=32"), ("device=cpu",)):
        same = settings_of("data.limit=5", "weights=/srv/mine.safetensors", *other)
        assert records.load_inputs(same, tmp_path) == inputs_of(settings)


@pytest.mark.parametrize(
    "override",
    ["data.source=synthetic", "data.limit=3", "model=resnet34", "weights=pretrained", "weights=/srv/a.safetensors"],
)
def test_inputs_for_other_data_or_weights_are_refused(settings_of, tmp_path, override):
    files.write_json(tmp_path / "inputs.json", inputs_of(settings_of()))
    message = fails(UsageError, records.load_inputs, settings_of(override), tmp_path)
    assert message.startswith(override.split("=")[0] + ": ") and "python -m pipeline.download" in message


# --- parameters


def test_parameters_are_the_chosen_recipe_and_the_rest_of_the_settings(settings_of):
    found = records.run_params(settings_of("recipe=blog", "seed=4", "lr=0.25", "trainable=[layer4, fc]"))
    assert {key.partition(".")[0] for key in found} == {"train", "settings"}
    assert all(type(value) is str for value in found.values())
    assert found["train.optimizer"] == "ranger21"
    assert found["train.lr"] == "0.25"
    assert found["train.trainable"] == '["layer4", "fc"]'
    assert found["train.normalize"] == "false"
    assert found["train.threads"] == "null"
    assert found["train.optimizer_options.num_warm_up_iterations"] == "0"
    assert not any("momentum" in key for key in found)  # of an optimizer that was not chosen
    assert found["train.scheduler_options.max_lr"] == "0.1"
    assert found["settings.recipe"] == "blog"
    assert found["settings.seed"] == "4"
    assert found["settings.data.source"] == "folder"
    assert found["settings.tracking.experiment"] == "trainmark"
    assert json.loads(found["settings.data.mirrors"]) == list(settings_of().data.mirrors)


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("weights/mine.safetensors", "weights/mine.safetensors"),
        ("/home/jane/pictures/", "pictures"),
        ("~/pictures", "pictures"),
        ("../jane/pictures", "pictures"),
        ("c:/Users/jane/pictures", "pictures"),
        ("\\\\server\\jane\\pictures", "pictures"),
        ("pretrained", "pretrained"),
    ],
)
def test_of_a_path_outside_the_project_the_last_part_alone_is_shared(path, shown):
    assert config.public_path(path) == shown


def test_no_absolute_path_leaves_the_machine(settings_of, pictures, tmp_path):
    settings = settings_of(f"weights={tmp_path}/jane/mine.safetensors")
    assert settings.data.path == str(pictures)
    inputs = inputs_of(settings, weights={"used": "file", "digest": "sha256:w1"})
    tags = tags_of(settings, inputs=inputs)
    shared = [
        records.effective_settings(settings),
        records.run_params(settings),
        tags,
        records.dataset_inputs(inputs, {"train": 54, "validation": 6}, 0),
        records.run_warnings(settings, inputs, tags, None, False),
    ]
    assert str(tmp_path) not in json.dumps(shared) and "jane" not in json.dumps(shared)
    assert records.run_params(settings)["settings.data.path"] == "pictures"
    assert records.run_params(settings)["train.weights"] == "mine.safetensors"


def test_of_keys_that_changed_the_first_three_are_told():
    before = {"lr": 1, "epochs": 2, "seed": 3, "recipe": "blog"}
    assert records.changed_keys(before, before) == ""
    assert records.changed_keys(before, {"epochs": 2, "seed": 4, "new": None}) == "lr, seed, recipe"
    assert records.changed_keys(before, {"new": 1}) == "lr, epochs, seed, ..."


# --- tags


def test_tags_say_what_ran_where(settings_of):
    settings = settings_of("recipe=blog", "precision=bf16", "label=my desk")
    assert tags_of(settings, on=backend(index=1), conditions={"power_source": "mains"}) == {
        "hardware": "NVIDIA T4", "hardware.model": "LENOVO 20XW", "hardware.memory_gib": "14.6",
        "hardware.cpu": "AMD EPYC", "hardware.cores": "2", "hardware.usable_cores": "4", "hardware.gpu_cores": "40",
        "hardware.power_limit_watts": "70.0", "machine": "b72054f1a41b", "label": "my desk", "device": "cuda:1",
        "backend": "cuda", "software.os": "Debian GNU/Linux 12", "software.torch": "2.14.1", "software.threads": "3",
        "software.driver": "580.65", "recipe": "blog", "precision": "bf16", "dataset": "folder", "weights": "random",
        "workload": config.workload(settings.work, inputs_of(settings)),
        "software.execution": str(config.EXECUTION_VERSION), "power_source": "mains",
    }  # fmt: skip

    machine = {"machine": "b72054f1a41b"}
    unknown = tags_of(settings_of(), hardware=machine, on=backend("mps"), accelerator={"name": "Apple M3"})
    assert set(unknown) == {
        "hardware", "machine", "device", "backend", "software.execution", "recipe", "precision", "dataset", "weights",
        "workload",
    }  # fmt: skip


# --- demos


@pytest.mark.parametrize(("fallback", "demo", "suffix"), [((), "", ""), (("data", "device"), "DEMO · ", "-demo")])
def test_a_run_with_a_fallback_is_a_demo_by_name_and_experiment(settings_of, monkeypatch, fallback, demo, suffix):
    settings = settings_of("recipe=blog", "tracking.experiment=mine")
    tags = tags_of(settings, fallback=fallback)
    assert tags.get("fallback") == (" ".join(fallback) or None)
    assert records.run_name(tags) == f"{demo}NVIDIA T4 · blog · fp32"
    repeats = tags | {"repeats.id": "a", "repeats": "5"}
    assert records.run_name(repeats | {"repeat": "2"}) == f"{demo}NVIDIA T4 · blog · fp32 · 2/5"
    assert records.run_name(repeats) == f"{demo}NVIDIA T4 · blog · fp32 × 5"
    assert records.experiment_name(settings, tags) == f"mine{suffix}"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "MLflow's")
    assert records.experiment_name(settings, tags) == f"MLflow's{suffix}"


# --- warnings


@pytest.mark.parametrize("metal", [True, False])
def test_what_makes_a_run_doubtful_is_told_with_its_reason(settings_of, monkeypatch, metal):
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # which says nothing on cuda
    plain = settings_of()
    assert records.run_warnings(plain, inputs_of(plain), tags_of(plain), None, False) == []
    settings = settings_of("recipe=blog")
    lacking = {"data": {"reason": "no mirror"}, "weights": {"reason": "no hub"}, "fallback": ["data", "weights"]}
    tags = tags_of(settings, on=backend("mps" if metal else "cuda"))
    warnings = records.run_warnings(settings, inputs_of(settings, **lacking), tags, "a GTX 1060 is there", True)
    words = ["no mirror", "no hub", "GTX 1060", *["Metal"] * metal, "test split", "ranger21 overrides the schedule"]
    assert len(warnings) == len(words)
    assert all(word in sentence for word, sentence in zip(words, warnings, strict=True))


# --- data sets


def test_each_split_is_a_data_set_with_its_purpose(settings_of):
    rows = records.dataset_inputs(inputs_of(settings_of()), {"train": 54, "validation": 6, "test": 30}, 0)
    assert [(row["name"], row["context"]) for row in rows] == [
        ("folder-train", "training"), ("folder-validation", "validation"), ("folder-test", "testing")
    ]  # fmt: skip
    assert [json.loads(row["profile"]) for row in rows] == [
        {"images": count, "classes": ["blue", "green", "red"]} for count in (54, 6, 30)
    ]
    assert all(0 < len(row["digest"]) <= 36 for row in rows)
    assert len({row["digest"] for row in rows}) == 3


def test_digests_tell_other_images_apart_and_nothing_else(settings_of):
    inputs, counts = inputs_of(settings_of()), {"train": 54, "validation": 6, "test": 30}

    def digests(inputs=inputs, counts=counts, seed=0):
        return [row["digest"] for row in records.dataset_inputs(inputs, counts, seed)]

    same = digests()
    assert digests() == same
    reseeded = digests(seed=1)
    assert reseeded[2] == same[2]  # the test split is the same under every seed
    assert not set(reseeded[:2]) & set(same)
    for other in ({"digest": "sha256:d2"}, {"limit": 3}):
        assert not set(digests(inputs_of(settings_of(), data=other))) & set(same)
    alone = records.dataset_inputs(inputs, {"test": 30}, 0)[0]
    assert alone["digest"] == same[2]  # what evaluate says beside what train said


# --- description


@pytest.fixture
def record(settings_of):
    settings = settings_of("recipe=finetune")
    own = tags_of(settings)
    last = {"epoch": 2, "speed/train_images_per_second": 12345.6}
    return {
        "tags": own,
        "facts": {
            "model": "resnet18.a1_in1k", "trainable": 5130, "parameters": 11181642, "images": {"train": 45000},
            "classes": ["blue", "green", "red"], "verdict": "limited by compute: 99% of the speed of one fixed batch",
        },
        "metrics": {"best/val_accuracy": 0.8765, "best/epoch": 2, "time/total_seconds": 61.5},
        "epochs": [{"figures": {"epoch": 1}}, {"figures": last}],
        "warnings": [],
    }  # fmt: skip


def test_the_description_says_machine_work_and_result(record):
    machine, work, result, part = descriptions.describe_run(record, {}).strip().split("\n\n")
    for text, values in (
        (
            machine,
            ("NVIDIA T4", "14.6 GiB", "LENOVO 20XW", "AMD EPYC", "Debian GNU/Linux 12", "torch 2.14.1", "`cuda`"),
        ),
        (work, ("`finetune`", record["tags"]["workload"], "resnet18.a1_in1k", "5,130 of 11,181,642", "45,000", "fp32")),
        (result, ("87.65% in epoch 2", "61.50 s", "12,346 images/s")),
        (part, ("limited by compute",)),
    ):
        assert [value for value in values if value not in text] == []
    tested = descriptions.describe_run(record, {"evaluate": {"metrics": {"test/accuracy": 0.8571}}})
    assert "**test accuracy 85.71%**" in tested
    for key in ("hardware.memory_gib", "hardware.model", "hardware.cpu", "software.os"):
        del record["tags"][key]
    assert "None" not in descriptions.describe_run(record, {})


@pytest.fixture
def sustained():
    """What `sustain` found."""
    figures = {SPEED: 8765.4, score_steps.metric("convnet_fp32", "batch_size"): 128.0}
    return {"metrics": figures, "tags": {score_steps.tag("convnet_fp32", "precision"): "fp32"}, "warnings": []}


def test_the_description_says_what_the_machine_keeps_up(record, sustained):
    before = descriptions.describe_run(record, {})
    text = descriptions.describe_run(record, {"sustain": sustained})
    assert text == f"{before}\n**Sustained** convnet fp32 8,765.4 images/s (fp32, batch 128)\n"
    older = {
        "metrics": {"speed/sustained_images_per_second": 8765.4},
        "tags": {"sustained.workload": "0123456789"},
        "warnings": [],
    }
    text = descriptions.describe_run(record, {"sustain": older})
    assert text.startswith(before) and "8,765 images/s" in text and "`0123456789`" in text


def test_the_description_lists_the_warnings_of_all_stages(record, sustained):
    record["warnings"], sustained["warnings"] = ["it ran on battery"], ["it was hot"]
    text = descriptions.describe_run(record, {"sustain": sustained})
    assert text.endswith("- it ran on battery\n- it was hot\n")


# --- repeats


@pytest.mark.parametrize(("repeat", "below"), [(1, ""), (2, "/repeats/2"), (10, "/repeats/10")])
def test_the_first_repeat_lies_where_a_single_training_does(tmp_path, repeat, below):
    found = records.stage_folders(tmp_path, repeat)
    assert {stage: path.relative_to(tmp_path).as_posix() for stage, path in found.items()} == {
        stage: stage + below for stage in ("train", "evaluate", "sustain")
    }


def test_the_records_of_all_repeats_are_read_in_their_order(tmp_path):
    assert records.planned_repeats(tmp_path) == 1 and records.present_records(tmp_path) == []
    for repeat in range(1, 12):
        folder = records.stage_folders(tmp_path, repeat)["train"]
        files.write_json(folder / "record.json", {"tags": {"repeat": str(repeat), "repeats": "11"}})
    assert list(map(records.repeat_number, records.training_records(tmp_path))) == list(range(1, 12))
    (records.stage_folders(tmp_path, 7)["train"] / "record.json").unlink()
    assert list(map(records.repeat_number, records.present_records(tmp_path))) == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11]
    with pytest.raises(StageError, match=r"7.record\.json is missing"):
        records.training_records(tmp_path)
    files.write_json(tmp_path / "train" / "record.json", {"tags": {}})
    assert list(map(records.repeat_number, records.training_records(tmp_path))) == [1]


def test_the_summary_is_median_and_sample_deviation_of_what_all_have():
    found = records.summarise_metrics(
        [
            {"test/accuracy": 0.5, "time/total_seconds": 9.0, "time/to_target_seconds": 5.0},
            {"test/accuracy": 0.75, "time/total_seconds": 1.0},
            {"test/accuracy": 1.0, "time/total_seconds": 2.0, "time/to_target_seconds": 1.0},
        ]
    )
    assert found == {
        "test/accuracy": 0.75, "std/test/accuracy": 0.25,
        "time/total_seconds": 2.0, "std/time/total_seconds": pytest.approx(19**0.5),
    }  # fmt: skip


def test_the_course_is_the_median_of_each_epoch(record):
    three = [copy.deepcopy(record) for _ in range(3)]
    for each, losses in zip(three, ([4.0, 3.0], [1.0, 2.0], [2.0, 9.0]), strict=True):
        each["epochs"] = [
            {"at": 100 * number + int(loss), "system": [{}], "figures": {"epoch": number, "train/loss": loss}}
            for number, loss in enumerate(losses, 1)
        ]
    three[1]["epochs"][1]["figures"]["energy"] = 1.0
    assert records.median_epochs(three) == [
        {"at": 104, "figures": {"epoch": 1, "train/loss": 2.0}, "system": []},
        {"at": 209, "figures": {"epoch": 2, "train/loss": 3.0}, "system": []},
    ]
    assert [type(epoch["figures"]["epoch"]) for epoch in records.median_epochs(three[:2])] == [int, int]


def test_tags_above_repeats_are_those_that_all_share_and_every_word_of_any():
    first = {"hardware": "M1", "repeats": "2", "repeat": "1", "energy.source": "rapl", "taints": "load", "label": None}
    other = {"hardware": "M1", "repeats": "2", "repeat": "2", "repeat.pause_seconds": "3.0", "energy.source": "nvml"}
    other |= {"taints": "swap load", "behavior": "thermal", "sustained.taints": "load"}
    assert records.shared_tags([first, other]) == {
        "hardware": "M1", "repeats": "2", "energy.source": None, "taints": "load swap", "label": None,
        "behavior": "thermal", "sustained.taints": "load",
    }  # fmt: skip
    assert records.shared_tags([first | {"taints": None}, {"hardware": "M2"}])["taints"] is None


def repeats_of(record, count=3):
    found = []
    for number in range(1, count + 1):
        own = copy.deepcopy(record)
        own["tags"] |= {"repeats.id": "a" * 32, "repeat": str(number), "repeats": str(count)}
        own |= {"experiment": "trainmark", "started": 1, "params": {"settings.seed": str(number + 6)}}
        own["metrics"] |= {"time/total_seconds": 10.0 + number, "best/val_accuracy": number / 8}
        found.append({"train": own, "evaluate": {"metrics": {"test/accuracy": number / 4}}})
    return found


def test_what_stands_above_repeats_begins_with_what_they_share(record):
    (_, second, _) = repeats_of(record)
    second["train"]["tags"] |= {"taints": "load", "behavior": "drift", "repeat.pause_seconds": "3.0"}
    second["train"]["params"] |= {"train.lr": "0.1"}
    found = records.parent_fields(second["train"])
    assert found["name"].endswith(" × 3") and found["params"] == {"train.lr": "0.1"} and found["datasets"] == []
    assert found["tags"] == record["tags"] | {"repeats.id": "a" * 32, "repeats": "3"}


def test_the_description_above_repeats_has_a_row_for_each_and_their_spread(record, sustained):
    three = repeats_of(record)
    for each, speed in zip(three, (100.0, 104.0, 102.0), strict=True):
        each["sustain"] = copy.deepcopy(sustained)
        each["sustain"]["metrics"][SPEED] = speed
    three[1]["train"]["warnings"] = three[2]["train"]["warnings"] = ["it was hot"]
    text = descriptions.describe_parent(three)
    for words in (
        "**Machine**", "**Work**", "**Sustained** convnet fp32 102.0 images/s (fp32, batch 128)",
        "median and range of 3: 12.00 s (11.00 to 13.00) in all, "
        "test accuracy 50.00% (25.00% to 75.00%), best validation accuracy 25.00% (12.50% to 37.50%)",
        "| Seconds in all | convnet fp32 |", "| 1 | 7 | 25.00% | 12.50% | 11.00 | 100.0 |",
        "| 3 | 9 | 75.00% | 37.50% | 13.00 | 102.0 |", "- it was hot (repeat 2, 3)",
    ):  # fmt: skip
        assert words in text, words
    del three[1]["evaluate"], three[1]["sustain"]
    assert "| 2 | 8 |  | 25.00% | 12.00 |  |" in descriptions.describe_parent(three)


def test_a_description_ends_where_mlflow_has_no_more_room(record):
    text = descriptions.describe_parent(repeats_of(record, 400))
    assert 7900 < len(text) <= descriptions.MAX_LENGTH
    assert text.endswith(" |\n\nMore in the repeats' own runs.\n")
