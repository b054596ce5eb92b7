"""Any timm model: its own head, what is frozen stays so, weights and checkpoints that fit or are refused."""

import json

import pytest
import safetensors.torch
import timm
import torch
from loops import make_loop
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline import config
from pipeline.data import batching
from pipeline.devices.cpu import Cpu
from pipeline.errors import StageError, UsageError
from pipeline.models import checkpoints, classifier, folding
from pipeline.training import loop

RESNET = "test_resnet.r160_in1k"
TINY = [
    RESNET,  # head: fc
    "test_vit.r160_in1k",  # head
    "test_efficientnet.r160_in1k",  # classifier
    "test_byobnet.r160_in1k",  # head.fc
    "test_convnext.r160_in1k",  # head.fc, after a norm of the head
    "mobilenetv3_small_050.lamb_in1k",  # classifier, after a layer between pooling and head
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """So little work is done fastest by one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def recipe(*overrides, name=RESNET):
    return config.load([f"model={name}", "weights=random", "image_size=32", *overrides]).work


def built(*overrides, name=RESNET, classes=5, weights=None, seed=0):
    torch.manual_seed(seed)
    return classifier.build(recipe(*overrides, name=name), classes, weights)


def images(count=2, size=32, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def line(kind, call, *args, **kwargs):
    """The one line that `call` fails with."""
    with pytest.raises(StageError) as caught:
        call(*args, **kwargs)
    assert caught.type is kind
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def trainable_names(net):
    return {name for name, parameter in net.net.named_parameters() if parameter.requires_grad}


def statistics(net):
    return {name: buffer.clone() for name, buffer in net.net.named_buffers() if "running" in name or "tracked" in name}


def trained(net, chosen, epochs=3, precision="fp32"):
    """Trains `net` on noise as the recipe `chosen` says; gives every epoch's figures."""
    split = batching.Split(images(12), torch.arange(12) % 5)
    train_loop = make_loop(
        net,
        set_train_mode=lambda: classifier.set_train_mode(net, chosen.frozen_batch_norm),
        epochs=epochs,
        steps=2,
        lr=0.01,
        precision=precision,
    )
    return list(
        loop.train(
            train_loop, lambda epoch: batching.batches(split, 8, Cpu()), lambda: batching.batches(split, 8, Cpu())
        )
    )


# --- names


@pytest.mark.parametrize("name", ["resnet18", "resnet18.a1_in1k", "test_vit", *TINY])
def test_models_of_timm_pass(name):
    classifier.check_name(name)


def test_an_unknown_model_is_refused_with_the_nearest():
    assert line(UsageError, classifier.check_name, "resnet81") == (
        'model: "resnet81" is not allowed: expected a name that timm.list_models() has; did you mean resnet18?'
    )
    assert line(UsageError, classifier.check_name, "resnet18d0.ra2_in1k").endswith("; did you mean resnet18d?")
    assert line(UsageError, classifier.check_name, "my own").endswith(" a name that timm.list_models() has")


def test_an_unknown_tag_is_refused_with_those_that_are_there():
    said = line(UsageError, classifier.check_name, "resnet18.a1_in2k")
    assert said.startswith('model: "resnet18.a1_in2k" is not allowed: timm has resnet18 as ')
    assert "resnet18.a1_in1k, " in said
    assert line(UsageError, classifier.check_name, "test_coatnet.r160").endswith(
        "timm has test_coatnet as test_coatnet"
    )
    assert line(UsageError, classifier.build, recipe(name="resnet18.a1_in2k"), 5, None) == said


def test_where_weights_are_published():
    assert classifier.hub_file("resnet18.a1_in1k") == ("timm/resnet18.a1_in1k", "model.safetensors")
    assert classifier.hub_file("resnet18") == classifier.hub_file("resnet18.a1_in1k")  # timm's own choice of several
    assert classifier.hub_file("test_coatnet") is None
    line(UsageError, classifier.hub_file, "resnet81")


# --- what is trained


@pytest.mark.parametrize("name", TINY)
def test_any_models_head_gets_the_classes_and_is_all_that_is_trained(name):
    net = built(name=name)
    assert net(images()).shape == (2, 5)
    assert isinstance(net.head, nn.Linear)
    assert net.head.out_features == 5
    head = timm.get_pretrained_cfg(name).classifier
    assert trainable_names(net) == {f"{head}.weight", f"{head}.bias"}
    assert classifier.count_parameters(net) == (
        5 * net.head.in_features + 5,
        sum(parameter.numel() for parameter in net.parameters()),
    )


@pytest.mark.parametrize("name", TINY)
def test_logits_are_the_head_of_the_features(name):
    net = built(name=name).eval()
    with torch.no_grad():
        logits, features = net(images(3)), net.features(images(3))
    assert features.shape == (3, net.head.in_features)
    assert torch.allclose(net.head(features), logits, atol=1e-5)
    assert logits.std() > 1e-3


def test_all_is_trained():
    net = built("trainable=all")
    trainable, every = classifier.count_parameters(net)
    assert trainable == every == sum(parameter.numel() for parameter in net.parameters())


def test_prefixes_choose_what_is_trained():
    net = built("trainable=[layer4, fc]")
    names = {name for name, _ in net.net.named_parameters()}
    assert trainable_names(net) == {name for name in names if name.split(".")[0] in ("layer4", "fc")}
    assert 485 < classifier.count_parameters(net)[0] < classifier.count_parameters(net)[1]
    assert classifier.count_parameters(built("trainable=[fc]")) == (485, 373173)


def test_a_prefix_of_no_parameter_is_refused_with_the_nearest():
    assert line(UsageError, built, "trainable=[fc, layer5]") == (
        'trainable: no parameter\'s name starts with "layer5"; did you mean layer4?'
    )


def test_a_model_of_two_heads_has_none_to_train_alone():
    chosen = "deit_tiny_distilled_patch16_224.fb_in1k"
    assert line(UsageError, built, "image_size=224", name=chosen).startswith(
        'trainable: "head" is not allowed: this model has no single head'
    )
    assert trainable_names(built("image_size=224", "trainable=[head]", name=chosen)) == {
        "head.weight", "head.bias", "head_dist.weight", "head_dist.bias"
    }  # fmt: skip


def test_an_image_size_that_the_model_cannot_take_is_refused():
    for name, said in (("test_vit3", "Input height (32) doesn't match model (160)."), ("test_coatnet", "")):
        message = line(UsageError, built, name=name)
        assert message.startswith(f"image_size: 32 is not allowed with {name} ({said}")
        assert message.endswith("): its own is 160")
        assert all(module.training for module in built("image_size=160", name=name).modules())


def test_xavier_starts_the_head_alone():
    name = "mobilenetv3_small_050.lamb_in1k"
    default, xavier = built(name=name), built("head_init=xavier_normal", name=name)
    fan_in = xavier.head.in_features
    assert xavier.head.weight.std().item() == pytest.approx((2 / (fan_in + 5)) ** 0.5, rel=0.05)
    assert not torch.equal(default.head.weight, xavier.head.weight)
    others = set(default.net.state_dict()) - {"classifier.weight"}
    for key in others:
        assert torch.equal(default.net.state_dict()[key], xavier.net.state_dict()[key])


# --- normalisation


def test_images_are_normalised_as_the_weights_were_trained():
    net = built().eval()
    published = timm.get_pretrained_cfg(RESNET)
    assert net.normalization == (published.mean, published.std)
    pixels = images()
    shift, scale = (torch.tensor(value).view(1, 3, 1, 1) for value in net.normalization)
    assert torch.equal(net(pixels), net.net((pixels - shift) / scale))
    assert not torch.allclose(net(pixels), net.net(pixels), atol=1e-3)


class Operations(TorchDispatchMode):
    """Names of torch's operations in `done`."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.done.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


def test_images_are_normalised_in_one_pass():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    net, pixels = classifier.Classifier(nn.Identity(), mean, std), images()
    with Operations() as operations:
        found = net(pixels)
    assert operations.done == ["addcmul"]
    exact = (pixels.double() - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    assert torch.allclose(found.double(), exact, atol=1e-6)
    last = net(pixels.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, found)


def test_the_blogs_images_are_not_normalised():
    net = built("recipe=blog").eval()
    assert net.normalization == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert torch.equal(net(images()), net.net(images()))
    pixels = images()
    assert classifier.Classifier(nn.Identity(), *net.normalization)(pixels) is pixels


def test_statistics_of_images_are_no_part_of_the_state():
    net = built()
    assert {name.split(".")[0] for name in net.state_dict()} == {"net"}
    net.to(torch.float64)  # but move with the model
    assert (net.scale.dtype, net.shift.dtype) == (torch.float64, torch.float64)


# --- frozen BatchNorm


def test_frozen_batch_norm_stays_as_it_is_through_epochs_of_training():
    net, chosen = built(), recipe()
    before, backbone = statistics(net), {k: v.clone() for k, v in net.net.state_dict().items()}
    assert len(before) > 10
    losses = [row["train/loss"] for row in trained(net, chosen)]
    assert len(set(losses)) == 3
    after = net.net.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    changed = {name for name, value in backbone.items() if not torch.equal(value, after[name])}
    assert changed == {"fc.weight", "fc.bias"}


def test_the_blogs_frozen_batch_norm_moves_and_its_weights_do_not():
    net, chosen = built("recipe=blog"), recipe("recipe=blog")
    before = {k: v.clone() for k, v in net.net.state_dict().items()}
    trained(net, chosen)
    after = net.net.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == set(statistics(net)) | {"fc.weight", "fc.bias"}
    tracked = {int(value) for name, value in after.items() if name.endswith("tracked")}
    assert tracked == {6}  # three epochs of two steps, and not one of validation


def test_batch_norm_in_what_is_trained_moves_beside_frozen_ones():
    prefixes = "trainable=[layer4, fc]"
    net = built(prefixes)
    before = statistics(net)
    trained(net, recipe(prefixes))
    after = statistics(net)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith("layer4")}


def test_no_batch_norm_is_frozen_where_all_is_trained():
    net = built("recipe=finetune")
    before = statistics(net)
    trained(net, recipe("recipe=finetune"), epochs=1)
    after = statistics(net)
    assert not any(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("kept", "frozen_ones_train"), [("eval", False), ("train", True)])
def test_set_mode_knows_timms_own_batch_norm(kept, frozen_ones_train):
    net = built(name="test_efficientnet.r160_in1k")
    own = [module for module in net.modules() if isinstance(module, timm.layers.BatchNormAct2d)]
    net.eval()
    classifier.set_train_mode(net, kept)
    assert own
    assert {module.training for module in own} == {frozen_ones_train}
    assert net.training


# --- checkpoints


def facts_of(name=RESNET, classes=5, **changes):
    names = tuple(f"class {index}" for index in range(classes))
    return checkpoints.Checkpoint(**{
        "model": name, "classes": names, "image_size": 32, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6),
        "epoch": 7, "val_accuracy": 0.625, "record": "abc", **changes,
    })  # fmt: skip


@pytest.fixture
def saved(tmp_path):
    """Makes checkpoints; gives the path."""

    def save(net, facts):
        path = tmp_path / "train" / "best.safetensors"
        checkpoints.save(path, net, facts)
        return path

    return save


@pytest.mark.parametrize("name", TINY)
def test_a_checkpoint_gives_the_same_logits_and_facts(saved, name):
    net = built(name=name)
    trained(net, recipe("frozen_batch_norm=train"), epochs=1)
    mean, std = net.normalization
    facts = facts_of(name, mean=mean, std=std)
    loaded, told = checkpoints.load(saved(net, facts))
    assert told == facts
    assert not any(module.training for module in loaded.modules())
    with torch.no_grad():
        assert torch.equal(loaded(images()), net.eval()(images()))


def test_a_checkpoint_holds_timms_names_whatever_the_memory_layout(saved):
    net = built().to(memory_format=torch.channels_last)
    path = saved(net, facts_of())
    state = safetensors.torch.load_file(path)
    timms = timm.create_model(RESNET, num_classes=5)
    timms.load_state_dict(state, strict=True)
    assert torch.allclose(timms.eval()(images()), net.eval().net(images()), atol=1e-5)
    assert [file.name for file in path.parent.iterdir()] == ["best.safetensors"]


def test_a_checkpoint_replaces_an_earlier_one(saved):
    saved(built(seed=1), facts_of(epoch=1))
    net = built(seed=2)
    loaded, told = checkpoints.load(saved(net, facts_of(epoch=2)))
    assert told.epoch == 2
    assert torch.equal(loaded.head.weight, net.head.weight)


def test_a_checkpoint_of_a_bf16_training_is_float32(saved):
    net = built("recipe=finetune")
    trained(net, recipe("recipe=finetune"), epochs=1, precision="bf16")
    dtypes = {value.dtype for value in safetensors.torch.load_file(saved(net, facts_of())).values()}
    assert dtypes == {torch.float32, torch.int64}


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (
            facts_of(classes=4),
            "test_resnet.r160_in1k of 4 classes: fc.weight is (5, 96), expected (4, 96)",
        ),
        (
            facts_of("test_vit.r160_in1k"),
            "test_vit.r160_in1k of 5 classes: the file lacks blocks.0.attn.proj.bias (and ",
        ),
    ],
)
def test_a_checkpoint_that_is_not_what_it_says_is_refused(saved, facts, said):
    message = line(StageError, checkpoints.load, saved(built(), facts))
    assert message.startswith(f"best.safetensors: it says it is {said}")


@pytest.mark.parametrize("kept", [0, 1, 8, 100, 0.5, 0.999])
def test_half_a_checkpoint_is_refused(saved, kept):
    path = saved(built(), facts_of())
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(len(whole) * kept)])
    said = line(StageError, checkpoints.load, path)
    assert said.startswith(f"{path} is no readable .safetensors file (")


def test_a_checkpoint_that_is_missing(tmp_path):
    path = tmp_path / "best.safetensors"
    assert line(StageError, checkpoints.load, path) == f"{path} is missing"


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"format": "pt"},
        {"trainmark": "{"},
        {"trainmark": "[]"},
        {"trainmark": json.dumps({"model": RESNET})},
        {"trainmark": json.dumps(vars(facts_of()) | {"added": "by a later version"})},
    ],
)
def test_a_file_that_says_not_which_model_it_is_is_no_checkpoint(tmp_path, metadata):
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file(built().net.state_dict(), path, metadata=metadata)
    assert line(StageError, checkpoints.load, path) == (
        "other.safetensors is no checkpoint of ours: its metadata does not say which model it is"
    )


# --- weights from a file


@pytest.fixture
def file_of(tmp_path):
    """Makes files of weights as they are published; gives (path, state)."""

    def make(name=RESNET, classes=1000, without=(), seed=5):
        torch.manual_seed(seed)
        state = timm.create_model(name, num_classes=classes).state_dict()
        state = {key: value for key, value in state.items() if key not in without}
        path = tmp_path / "mine.safetensors"
        safetensors.torch.save_file(state, path)
        return path, state

    return make


@pytest.mark.parametrize("name", TINY)
def test_published_weights_leave_the_head_for_other_classes_fresh(file_of, name):
    path, state = file_of(name)
    net = built(name=name, classes=10, weights=path)
    head = timm.get_pretrained_cfg(name).classifier
    heads = {f"{head}.weight", f"{head}.bias"}
    loaded = net.net.state_dict()
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[key], state[key]) for key in set(state) - heads)
    assert torch.equal(net.head.weight, built(name=name, classes=10).head.weight)  # as random ones start
    assert net.head.weight.std() > 1e-3


@pytest.mark.parametrize("classes", [10, 1000])
def test_a_head_for_as_many_classes_is_taken(file_of, classes):
    path, state = file_of(classes=classes)
    net = built(classes=classes, weights=path)
    assert torch.equal(net.head.weight, state["fc.weight"])
    assert torch.equal(net.head.bias, state["fc.bias"])


def test_the_xavier_head_is_drawn_after_the_weights_are_loaded(file_of):
    path, state = file_of(classes=10)
    net = built("head_init=xavier_normal", classes=10, weights=path)
    assert not torch.equal(net.head.weight, state["fc.weight"])
    assert torch.equal(net.net.conv1[0].weight, state["conv1.0.weight"])


def test_weights_that_do_not_fit_are_refused_by_a_tensors_name(file_of):
    what = "weights: mine.safetensors does not fit test_resnet.r160_in1k with 10 classes: "
    path, _ = file_of(classes=7)
    assert line(UsageError, built, classes=10, weights=path) == (what + "fc.weight is (7, 96), expected (10, 96)")
    path, _ = file_of(without=["conv1.0.weight"])
    assert line(UsageError, built, classes=10, weights=path) == what + "the file lacks conv1.0.weight"
    path, _ = file_of("test_byobnet.r160_in1k")
    said = line(UsageError, built, classes=10, weights=path)
    assert said.startswith(what + "the file lacks bn1.bias (and ")


def test_weights_with_a_tensor_too_many_are_refused(tmp_path, file_of):
    path, state = file_of()
    safetensors.torch.save_file(state | {"extra.weight": torch.zeros(1)}, path)
    assert line(UsageError, built, weights=path).endswith("the file holds an unknown extra.weight")


def test_a_checkpoint_of_ours_can_be_what_another_training_starts_from(saved):
    first = built(seed=1)
    again = built(seed=2, weights=saved(first, facts_of()))
    assert torch.equal(again.head.weight, first.head.weight)


def test_a_file_of_no_weights_is_refused(tmp_path):
    path = tmp_path / "mine.safetensors"
    path.write_text("<html>not found</html>\n" * 50)
    assert line(StageError, built, weights=path).startswith(f"{path} is no readable .safetensors file (")


# --- features computed once


def caching(*overrides, name=RESNET, size=32):
    chosen = recipe(*overrides, f"image_size={size}", name=name)
    torch.manual_seed(0)
    return classifier.caches_features(classifier.build(chosen, 5, None), chosen, images(size=size))


@pytest.mark.parametrize("name", TINY)
def test_features_of_a_frozen_network_are_computed_once(name):
    assert caching(name=name) is True
    assert caching("features=cache", name=name) is True
    assert caching("features=recompute", name=name) is False


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["frozen_batch_norm=train"], "frozen_batch_norm: train moves the statistics before the head"),
        (["flip=true"], "flip: true shows other images in each epoch"),
        (["trainable=all"], "more than the head is trained"),
        (["trainable=[layer4, fc]"], "more than the head is trained"),
    ],
)
def test_features_that_change_are_computed_every_epoch(overrides, reason):
    assert caching(*overrides) is False
    assert caching("features=recompute", *overrides) is False
    assert line(UsageError, caching, "features=cache", *overrides) == (
        f'features: "cache" is not allowed here: {reason}; expected auto | recompute'
    )


def test_the_prefix_of_the_head_is_as_good_as_head():
    assert caching("trainable=[fc]") is True


def test_frozen_batch_norm_matters_only_where_there_is_some():
    assert caching("frozen_batch_norm=train", name="test_vit.r160_in1k") is True


def test_features_at_random_are_computed_every_epoch():
    chosen = {"name": "test_vit_relpos", "size": 160}  # it drops paths
    assert caching(**chosen) is False
    assert "drops units at random before its head" in line(UsageError, caching, "features=cache", **chosen)


def test_dropout_before_the_head_is_found():
    chosen, net = recipe(), built()
    net.net.global_pool = nn.Sequential(net.net.global_pool, nn.Dropout(0.1))
    assert classifier.caches_features(net, chosen, images()) is False
    net.net.global_pool[1].p = 0.0
    assert classifier.caches_features(net, chosen, images()) is True


def test_a_head_that_is_not_all_there_is_after_the_features_is_found(monkeypatch):
    net = built()
    forward = net.net.forward
    monkeypatch.setattr(net.net, "forward", lambda pixels: forward(pixels) * 1.5)
    assert classifier.caches_features(net, recipe(), images()) is False
    assert line(UsageError, classifier.caches_features, net, recipe("features=cache"), images()).startswith(
        "features: \"cache\" is not allowed here: this model's logits are not its head's alone; "
    )


def test_no_features_of_two_heads():
    chosen = ("trainable=[head]", "image_size=224")
    assert caching(*chosen, name="deit_tiny_distilled_patch16_224.fb_in1k", size=224) is False


# --- BatchNorm folded away


class Small(nn.Module):
    """As timm's models are: maps, and what is pooled from them for the head."""

    def __init__(self):
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward_features(self, pixels):
        return self.first(self.conv(pixels))

    def forward_head(self, maps, pre_logits):
        assert pre_logits
        return maps.mean((2, 3))


class Shared(Small):
    """One convolution before two BatchNorms: torch folds both into it."""

    def forward_features(self, pixels):
        return self.first(self.conv(pixels)) + self.second(self.conv(pixels * 2))


class Deciding(Small):
    """It looks at its input's values, of which there are none while it's traced."""

    def forward_features(self, pixels):
        return self.first(self.conv(pixels if pixels.sum() > 0 else -pixels))


def with_statistics(net):
    """`net` with BatchNorms that do something, as after some training."""
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, classifier.BATCH_NORM):
            for tensor in (module.running_mean, module.bias.data):
                tensor.normal_(0, 0.3, generator=generator)
            for tensor in (module.running_var, module.weight.data):
                tensor.uniform_(0.5, 2.0, generator=generator)
    return net


def batch_norms(module):
    return [each for each in module.modules() if isinstance(each, classifier.BATCH_NORM)]


def test_each_batch_norm_of_a_resnet_is_folded_into_its_convolution():
    net = with_statistics(built())
    state = {name: value.clone() for name, value in net.state_dict().items()}
    fused, _ = folding.fold_batch_norm(net, images())
    assert len(batch_norms(net)) > 5
    assert batch_norms(fused) == []
    assert not [node for node in fused.graph.nodes if "norm" in f"{node.op} {node.target}".lower()]
    with torch.no_grad():
        expected, found = net.eval().features(images(3)), fused(images(3))
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    # The model that is trained and saved is left as it is.
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_what_is_folded_follows_the_models_weights_in_its_own_memory():
    net, other = with_statistics(built()), with_statistics(built())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    fused, again = folding.fold_batch_norm(net, images())
    where = [tensor.data_ptr() for tensor in fused.state_dict().values()]
    net.load_state_dict(other.state_dict())
    net.train()
    again()
    expected, _ = folding.fold_batch_norm(other, images())
    assert [tensor.data_ptr() for tensor in fused.state_dict().values()] == where
    with torch.no_grad():
        assert torch.equal(fused(images(3)), expected(images(3)))


@pytest.mark.parametrize("name", TINY)
def test_folding_changes_no_models_features(name):
    net = with_statistics(built(name=name))
    with torch.no_grad():
        expected = net.eval().features(images(3))
        found = folding.fold_batch_norm(net, images())[0](images(3))
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(("network", "folds"), [(Small, True), (Shared, False), (Deciding, False)])
def test_a_model_that_torch_cannot_trace_or_would_change_is_taken_as_it_is(network, folds):
    torch.manual_seed(0)
    net = with_statistics(classifier.Classifier(network(), *classifier.IDENTITY)).train()
    found, _ = folding.fold_batch_norm(net, images())
    assert isinstance(found, classifier.Features) is not folds
    assert len(batch_norms(found)) == (0 if folds else 2)
    with torch.no_grad():
        assert torch.allclose(found(images()), net.eval().features(images()), atol=1e-6)  # in evaluation mode


def test_folding_alone_would_change_a_convolution_that_is_used_twice():
    features = classifier.Features(with_statistics(classifier.Classifier(Shared(), *classifier.IDENTITY))).eval()
    with torch.no_grad():
        assert not torch.allclose(folding._fold(features)[0](images()), features(images()), atol=0.1)


def test_features_as_a_module_are_the_models():
    net = built().eval()
    module = classifier.Features(net)
    with torch.no_grad():
        assert torch.equal(module(images()), net.features(images()))
    assert next(module.parameters()) is next(net.parameters())
