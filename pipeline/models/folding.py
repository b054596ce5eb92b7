"""Fold BatchNorm layers into the convolutions before them, for evaluation only."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pipeline.models.classifier import Classifier, Features


@torch.no_grad()
def fold_batch_norm(model: Classifier, images: Tensor) -> tuple[nn.Module, Callable[[], None]]:
    """A copy of `model.features` with each BatchNorm folded into the convolution before it, and a function that folds
    again, in the same memory, after the model's weights have changed.

    Folds nothing if torch can't trace the model, or if folding would change the features of `images` (B, 3, H, W).
    """
    features = Features(model).eval()
    try:
        folded, pairs = _fold(features)
    except Exception:  # tracing runs the model's own code on stand-ins, which may raise anything
        return features, lambda: None

    def fold_again() -> None:
        for fused, convolution, norm in pairs:
            fused.load_state_dict(fuse_conv_bn_eval(convolution.eval(), norm.eval()).state_dict())

    expected, result = features(images), folded(images)
    # Far above TF32's rounding errors, far below the change from a missing layer.
    equal = (result - expected).abs().max() <= 1e-2 * expected.abs().max()
    return (folded, fold_again) if equal else (features, lambda: None)


def _fold(network: nn.Module) -> tuple[nn.Module, list[tuple[nn.Conv2d, nn.Conv2d, nn.BatchNorm2d]]]:
    """A traced copy of `network` in which each BatchNorm2d that alone follows a Conv2d is part of that convolution; and
    each fused convolution, with the convolution and the norm of `network` that it is made of."""
    traced = torch.fx.symbolic_trace(network)
    pairs = []
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or type(traced.get_submodule(node.target)) is not nn.BatchNorm2d:
            continue
        before = node.args[0]
        if before.op != "call_module" or len(before.users) > 1:
            continue
        convolution = traced.get_submodule(before.target)
        if type(convolution) is nn.Conv2d:
            norm = cast(nn.BatchNorm2d, traced.get_submodule(node.target))
            fused = fuse_conv_bn_eval(convolution, norm)
            pairs.append((fused, convolution, norm))
            traced.add_submodule(before.target, fused)
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced, pairs
