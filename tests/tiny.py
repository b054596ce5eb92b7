"""Tiny models of timm, built as a recipe says."""

import torch

from pipeline import config
from pipeline.models import classifier

RESNET = "test_resnet.r160_in1k"
MODELS = [
    RESNET,  # head: fc
    "test_vit.r160_in1k",  # head
    "test_efficientnet.r160_in1k",  # classifier
    "test_byobnet.r160_in1k",  # head.fc
    "test_convnext.r160_in1k",  # head.fc, after a norm of the head
    "mobilenetv3_small_050.lamb_in1k",  # classifier, after a layer between pooling and head
]


def recipe(*overrides, name=RESNET):
    return config.load([f"model={name}", "weights=random", "image_size=32", *overrides]).work


def build(*overrides, name=RESNET, classes=5, weights=None, seed=0):
    torch.manual_seed(seed)
    return classifier.build(recipe(*overrides, name=name), classes, weights)


def images(count=2, size=32, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def train(model, chosen, steps=3):
    """A few steps of SGD on noise, in the training mode that the recipe `chosen` says."""
    classifier.set_train_mode(model, chosen.frozen_batch_norm)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(steps):
        loss = torch.nn.functional.cross_entropy(model(images(8, seed=step)), torch.arange(8) % 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def with_statistics(model):
    """`model` with BatchNorms that do something, as after some training."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, classifier.BATCH_NORM):
            for tensor in (module.running_mean, module.bias.data):
                tensor.normal_(0, 0.3, generator=generator)
            for tensor in (module.running_var, module.weight.data):
                tensor.uniform_(0.5, 2.0, generator=generator)
    return model
