"""BatchNorm is folded into convolutions where that changes no features."""

import pytest
import tiny
import torch
from torch import nn

from pipeline.models import classifier, folding

pytestmark = pytest.mark.usefixtures("one_thread")


class Small(nn.Module):
    """Like timm's models: maps, and what is pooled from them for the head."""

    def __init__(self):
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward_features(self, pixels):
        return self.first(self.conv(pixels))

    def forward_head(self, maps, pre_logits):
        assert pre_logits
        return maps.mean((2, 3))


class Shared(Small):
    """One convolution before two BatchNorms: both would be folded into it."""

    def forward_features(self, pixels):
        return self.first(self.conv(pixels)) + self.second(self.conv(pixels * 2))


class Deciding(Small):
    """It looks at its input's values, of which there are none while it is traced."""

    def forward_features(self, pixels):
        return self.first(self.conv(pixels if pixels.sum() > 0 else -pixels))


def batch_norms(module):
    return [layer for layer in module.modules() if isinstance(layer, classifier.BATCH_NORM)]


@pytest.mark.parametrize("name", tiny.MODELS)
def test_folding_changes_neither_features_nor_the_model(name):
    model = tiny.with_statistics(tiny.build(name=name))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    folded, _ = folding.fold_batch_norm(model, tiny.images())
    with torch.no_grad():
        expected, features = model.eval().features(tiny.images(3)), folded(tiny.images(3))
    assert (features - expected).abs().max() < 1e-4 * expected.abs().max()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    if name == tiny.RESNET:
        assert len(batch_norms(model)) > 5 and batch_norms(folded) == []
        assert not [node for node in folded.graph.nodes if "norm" in f"{node.op} {node.target}".lower()]


def test_folding_again_follows_the_models_weights_in_the_same_memory():
    model, other = tiny.with_statistics(tiny.build()), tiny.with_statistics(tiny.build())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    folded, fold_again = folding.fold_batch_norm(model, tiny.images())
    addresses = [tensor.data_ptr() for tensor in folded.state_dict().values()]
    model.load_state_dict(other.state_dict())
    model.train()
    fold_again()
    expected, _ = folding.fold_batch_norm(other, tiny.images())
    assert [tensor.data_ptr() for tensor in folded.state_dict().values()] == addresses
    with torch.no_grad():
        assert torch.equal(folded(tiny.images(3)), expected(tiny.images(3)))


@pytest.mark.parametrize(("network", "folds"), [(Small, True), (Shared, False), (Deciding, False)])
def test_a_model_that_torch_cannot_trace_or_would_change_is_not_folded(network, folds):
    torch.manual_seed(0)
    model = tiny.with_statistics(classifier.Classifier(network(), *classifier.IDENTITY)).train()
    features, _ = folding.fold_batch_norm(model, tiny.images())
    assert len(batch_norms(features)) == (0 if folds else 2)
    with torch.no_grad():
        assert torch.allclose(features(tiny.images()), model.eval().features(tiny.images()), atol=1e-6)
