"""Any timm model: its own head, what is frozen stays so, weights that fit or are refused, features computed once."""

import re

import pytest
import safetensors.torch
import timm
import tiny
import torch
from conftest import fails
from tiny import build, images
from torch import nn

from pipeline.errors import StageError, UsageError
from pipeline.models import classifier

MOBILENET = "mobilenetv3_small_050.lamb_in1k"
HEADS = ("fc.", "classifier.", "head.fc.")
TWO_HEADS = "deit_tiny_distilled_patch16_224.fb_in1k"


pytestmark = pytest.mark.usefixtures("one_thread")


def refused(*overrides, **options):
    """The one line that building such a model fails with."""
    return fails(UsageError, lambda: build(*overrides, **options))


def trainable_names(model):
    return {name for name, parameter in model.net.named_parameters() if parameter.requires_grad}


# --- names


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet81", "did you mean resnet18?"),
        ("resnet18d0.ra2_in1k", "did you mean resnet18d?"),
        ("my own", "timm.list_models()"),
        ("resnet18.a1_in2k", "resnet18.a1_in1k, "),
        ("test_coatnet.r160", "timm has test_coatnet as test_coatnet"),
    ],
)
def test_an_unknown_model_or_tag_is_refused_with_a_hint(name, hint):
    message = fails(UsageError, classifier.check_name, name)
    assert message.startswith(f'model: "{name}" is not allowed') and hint in message
    assert refused(name=name) == message


def test_where_weights_are_published():
    assert classifier.hub_file("resnet18.a1_in1k") == ("timm/resnet18.a1_in1k", "model.safetensors")
    assert classifier.hub_file("resnet18") == classifier.hub_file("resnet18.a1_in1k")  # timm's own choice of several
    assert classifier.hub_file("test_coatnet") is None


# --- what is trained


@pytest.mark.parametrize("name", tiny.MODELS)
def test_any_models_head_gets_the_classes_and_is_all_that_is_trained(name):
    model = build(name=name).eval()
    head = timm.get_pretrained_cfg(name).classifier
    assert trainable_names(model) == {f"{head}.weight", f"{head}.bias"}
    assert model.head.out_features == 5
    assert classifier.count_parameters(model) == (
        5 * model.head.in_features + 5,
        sum(parameter.numel() for parameter in model.parameters()),
    )
    with torch.no_grad():
        logits, features = model(images(3)), model.features(images(3))
        assert torch.equal(classifier.Features(model)(images(3)), features)
    assert (logits.shape, features.shape) == ((3, 5), (3, model.head.in_features))
    assert torch.allclose(model.head(features), logits, atol=1e-5)
    assert logits.std() > 1e-3


def test_all_or_prefixes_choose_what_is_trained():
    names = {name for name, _ in build().net.named_parameters()}
    assert trainable_names(build("trainable=all")) == names
    assert trainable_names(build("trainable=[layer4, fc]")) == {n for n in names if n.startswith(("layer4.", "fc."))}
    assert "did you mean layer4?" in refused("trainable=[fc, layer5]")


def test_of_a_model_of_two_heads_both_are_trained():
    model = build("image_size=224", name=TWO_HEADS)
    assert trainable_names(model) == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


@pytest.mark.parametrize("name", ["dla46x_c", "dpn48b", "resnetv2_18"])
def test_a_head_that_is_a_convolution_is_trained_on_pooled_features(name):
    model = build(name=name).eval()
    with torch.no_grad():
        features = model.features(images(3))
        assert features.ndim == 2
        assert torch.allclose(model.head(features), model(images(3)), atol=1e-5)
    assert trainable_names(model) == {name for name, _ in model.net.named_parameters() if name.startswith(HEADS)}
    assert caches(name=name) is True


def test_a_model_without_a_head_has_none_to_train_alone():
    model = build()
    model.net.fc = nn.Identity()
    assert model.heads[0] is model.net.fc
    assert fails(UsageError, classifier._freeze, model, "head").startswith('trainable: "head" is not allowed')


@pytest.mark.parametrize("name", ["test_vit3", "test_coatnet"])
def test_an_image_size_that_the_model_cannot_take_is_refused(name):
    message = refused(name=name)
    assert message.startswith(f"image_size: 32 is not allowed with {name}") and message.endswith("its own is 160")
    assert all(module.training for module in build("image_size=160", name=name).modules())


def test_xavier_draws_the_head_alone():
    default, xavier = build(name=MOBILENET), build("head_init=xavier_normal", name=MOBILENET)
    deviation = (2 / (xavier.head.in_features + 5)) ** 0.5
    assert xavier.head.weight.std().item() == pytest.approx(deviation, rel=0.05)
    first, second = default.net.state_dict(), xavier.net.state_dict()
    assert {name for name in first if not torch.equal(first[name], second[name])} == {"classifier.weight"}


# --- normalization


def test_images_are_normalized_as_the_weights_were_trained_or_not_at_all():
    model, published = build().eval(), timm.get_pretrained_cfg(tiny.RESNET)
    assert model.normalization == (published.mean, published.std)
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in model.normalization)
    assert torch.equal(model(images()), model.net((images() - mean) / std))
    blog = build("recipe=blog").eval()
    assert blog.normalization == classifier.IDENTITY
    assert torch.equal(blog(images()), blog.net(images()))


# --- frozen BatchNorm


@pytest.mark.parametrize(
    ("overrides", "moving"),
    [
        ([], ()),
        (["recipe=blog"], ("",)),
        (["trainable=[layer4, fc]"], ("layer4.",)),
        (["recipe=finetune"], ("",)),
    ],
    ids=["frozen", "blog", "prefixes", "all"],
)
def test_the_statistics_of_frozen_batch_norm_move_only_where_the_recipe_says_so(overrides, moving):
    model = build(*overrides)
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    statistics = {name for name in before if "running" in name or "tracked" in name}
    tiny.train(model, tiny.recipe(*overrides))
    after = model.net.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert len(statistics) > 10
    assert changed & statistics == {name for name in statistics if name.startswith(moving or ("nothing",))}
    assert changed - statistics <= trainable_names(model) and {"fc.weight", "fc.bias"} <= changed


@pytest.mark.parametrize(("mode", "trains"), [("eval", False), ("train", True)])
def test_train_mode_knows_timms_own_batch_norm(mode, trains):
    model = build(name="test_efficientnet.r160_in1k").eval()
    norms = [module for module in model.modules() if isinstance(module, timm.layers.BatchNormAct2d)]
    classifier.set_train_mode(model, mode)
    assert {module.training for module in norms} == {trains}
    assert model.training


# --- weights from a file


@pytest.fixture
def weights_file(tmp_path):
    """Writes a file of weights as they are published; returns (path, state)."""

    def write(name=tiny.RESNET, classes=1000, without=(), extra=()):
        torch.manual_seed(5)
        state = timm.create_model(name, num_classes=classes).state_dict()
        state = {key: value for key, value in state.items() if key not in without}
        state |= {key: torch.zeros(1) for key in extra}
        path = tmp_path / "mine.safetensors"
        safetensors.torch.save_file(state, path)
        return path, state

    return write


@pytest.mark.parametrize("name", tiny.MODELS)
def test_published_weights_leave_the_head_for_other_classes_as_it_was_drawn(weights_file, name):
    path, state = weights_file(name)
    model = build(name=name, classes=10, weights=path)
    head = timm.get_pretrained_cfg(name).classifier
    loaded = model.net.state_dict()
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[key], state[key]) for key in set(state) - {f"{head}.weight", f"{head}.bias"})
    assert torch.equal(model.head.weight, build(name=name, classes=10).head.weight)


def test_a_head_for_as_many_classes_is_loaded_unless_it_is_drawn_anew(weights_file):
    path, state = weights_file(classes=10)
    model = build(classes=10, weights=path)
    assert torch.equal(model.head.weight, state["fc.weight"]) and torch.equal(model.head.bias, state["fc.bias"])
    xavier = build("head_init=xavier_normal", classes=10, weights=path)
    assert not torch.equal(xavier.head.weight, state["fc.weight"])
    assert torch.equal(xavier.net.conv1[0].weight, state["conv1.0.weight"])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"classes": 7}, "fc.weight is (7, 96), expected (10, 96)"),
        ({"without": ["conv1.0.weight"]}, "the file lacks conv1.0.weight"),
        ({"name": "test_byobnet.r160_in1k"}, "the file lacks bn1.bias (and "),
        ({"extra": ["extra.weight"]}, "the file holds an unknown extra.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_a_tensors_name(weights_file, content, problem):
    message = refused(classes=10, weights=weights_file(**content)[0])
    assert message.startswith("weights: mine.safetensors") and problem in message


def test_a_head_that_was_not_published_is_drawn(weights_file):
    name = "vit_tiny_patch16_dinov3_qkvb"  # published as a backbone
    assert timm.get_pretrained_cfg(name).num_classes == 0
    path, state = weights_file(name, classes=0)
    model = build("image_size=256", name=name, weights=path)
    assert model.head.out_features == 5
    assert all(torch.equal(model.net.state_dict()[key], state[key]) for key in state)


FACEBOOK = {  # ConvNeXt's names by its authors, which timm converts
    r"^stem\.": "downsample_layers.0.",
    r"^stages\.(\d)\.blocks\.": r"stages.\1.",
    r"^stages\.(\d)\.downsample\.": r"downsample_layers.\1.",
    "conv_dw": "dwconv",
    r"mlp\.fc": "pwconv",
    r"^head\.norm": "norm",
    r"^head\.fc": "head",
}


def test_a_published_file_is_converted_as_timm_does_it(tmp_path):
    name, path = "test_convnext.r160_in1k", tmp_path / "published.safetensors"
    torch.manual_seed(5)
    expected = timm.create_model(name).state_dict()
    published = dict(expected)
    for pattern, replacement in FACEBOOK.items():
        published = {re.sub(pattern, replacement, key): value for key, value in published.items()}
    safetensors.torch.save_file(published, path)
    model, initial = build(name=name, weights=path), build(name=name)
    state, drawn = model.net.state_dict(), initial.net.state_dict()
    assert all(torch.equal(state[key], (drawn if "head.fc" in key else expected)[key]) for key in expected)


def test_a_file_of_no_weights_is_refused(tmp_path):
    path = tmp_path / "mine.safetensors"
    path.write_text("<html>not found</html>\n" * 50)
    assert str(path) in fails(StageError, lambda: build(weights=path))


# --- features computed once


def caches(*overrides, name=tiny.RESNET, size=32):
    chosen = tiny.recipe(*overrides, f"image_size={size}", name=name)
    model = build(*overrides, f"image_size={size}", name=name)
    return classifier.caches_features(model, chosen, images(size=size))


@pytest.mark.parametrize("name", tiny.MODELS)
def test_features_of_a_frozen_network_are_computed_once(name):
    assert caches(name=name) is True
    assert caches("features=cache", name=name) is True
    assert caches("features=recompute", name=name) is False


@pytest.mark.parametrize(
    ("overrides", "options", "reason"),
    [
        (["frozen_batch_norm=train"], {}, "frozen_batch_norm: train"),
        (["flip=true"], {}, "flip: true"),
        (["trainable=all"], {}, "more than the head"),
        (["trainable=[layer4, fc]"], {}, "more than the head"),
        ([], {"name": "test_vit_relpos", "size": 160}, "drops units at random"),  # it drops paths
        ([], {"name": TWO_HEADS, "size": 224}, "logits are not its head's alone"),
        ([], {"name": "crossvit_tiny_240", "size": 240}, "logits are not its head's alone"),
        ([], {"name": "efficientvim_m1"}, "logits are not its head's alone"),
    ],
)
def test_features_that_change_are_computed_every_epoch(overrides, options, reason, capsys):
    assert caches(*overrides, **options) is False
    output = capsys.readouterr().out
    assert (reason in output) != any(override.startswith("trainable") for override in overrides)
    message = fails(UsageError, lambda: caches("features=cache", *overrides, **options))
    assert message.startswith('features: "cache" is not allowed') and reason in message


def test_what_changes_nothing_before_the_head_is_no_obstacle():
    assert caches("trainable=[fc]") is True
    assert caches("frozen_batch_norm=train", name="test_vit.r160_in1k") is True


def test_dropout_before_the_head_is_an_obstacle():
    model, chosen = build(), tiny.recipe()
    model.net.global_pool = nn.Sequential(model.net.global_pool, nn.Dropout(0.1))
    assert classifier.caches_features(model, chosen, images()) is False
    model.net.global_pool[1].p = 0.0
    assert classifier.caches_features(model, chosen, images()) is True


def test_work_after_the_head_is_an_obstacle(monkeypatch):
    model = build()
    forward = model.net.forward
    monkeypatch.setattr(model.net, "forward", lambda pixels: forward(pixels) * 1.5)
    assert classifier.caches_features(model, tiny.recipe(), images()) is False
