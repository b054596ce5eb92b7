"""A checkpoint gives the same model and facts again, or is refused."""

import json

import pytest
import safetensors.torch
import timm
import tiny
import torch
from conftest import fails

from pipeline.errors import StageError
from pipeline.models import checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")


def facts_of(name=tiny.RESNET, classes=5, **changes):
    names = tuple(f"class {index}" for index in range(classes))
    return checkpoints.Checkpoint(**{
        "model": name, "classes": names, "image_size": 32, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6),
        "epoch": 7, "val_accuracy": 0.625, "record": "abc", **changes,
    })  # fmt: skip


@pytest.fixture
def save(tmp_path):
    """Writes a checkpoint and returns its path."""

    def save(model, facts):
        path = tmp_path / "train" / "best.safetensors"
        checkpoints.save(path, model, facts)
        return path

    return save


@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_checkpoint_gives_the_same_logits_and_facts(save, name):
    model = tiny.build(name=name)
    tiny.train(model, tiny.recipe("frozen_batch_norm=train"))
    mean, std = model.normalization
    facts = facts_of(name, mean=mean, std=std)
    loaded, loaded_facts = checkpoints.load(save(model, facts))
    assert loaded_facts == facts
    assert not any(module.training for module in loaded.modules())
    with torch.no_grad():
        assert torch.equal(loaded(tiny.images()), model.eval()(tiny.images()))


def test_a_checkpoint_has_timms_names_whatever_the_memory_layout(save):
    model = tiny.build().to(memory_format=torch.channels_last)
    path = save(model, facts_of())
    net = timm.create_model(tiny.RESNET, num_classes=5)
    net.load_state_dict(safetensors.torch.load_file(path), strict=True)
    assert torch.allclose(net.eval()(tiny.images()), model.eval().net(tiny.images()), atol=1e-5)
    assert [file.name for file in path.parent.iterdir()] == ["best.safetensors"]


@pytest.mark.parametrize(
    ("facts", "problem"),
    [
        (facts_of(classes=4), "fc.weight is (5, 96), expected (4, 96)"),
        (facts_of("test_vit.r160_in1k"), "the file lacks blocks.0.attn.proj.bias (and "),
    ],
)
def test_a_checkpoint_that_is_not_what_it_says_is_refused(save, facts, problem):
    message = fails(StageError, checkpoints.load, save(tiny.build(), facts))
    assert message.startswith("best.safetensors: ") and problem in message


@pytest.mark.parametrize("share", [0, 1e-5, 0.5, 0.999])
def test_half_a_checkpoint_is_refused(save, share):
    path = save(tiny.build(), facts_of())
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert str(path) in fails(StageError, checkpoints.load, path)
    path.unlink()
    assert fails(StageError, checkpoints.load, path) == f"{path} is missing"


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"trainmark": "{"},
        {"trainmark": "[]"},
        {"trainmark": json.dumps({"model": tiny.RESNET})},
        {"trainmark": json.dumps(vars(facts_of()) | {"added": "by a later version"})},
    ],
)
def test_a_file_without_our_facts_is_no_checkpoint(tmp_path, metadata):
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file(tiny.build().net.state_dict(), path, metadata=metadata)
    assert "no checkpoint of ours" in fails(StageError, checkpoints.load, path)


def test_a_training_can_start_from_a_checkpoint_of_ours(save):
    first = tiny.build(seed=1)
    again = tiny.build(seed=2, weights=save(first, facts_of()))
    assert torch.equal(again.head.weight, first.head.weight)
