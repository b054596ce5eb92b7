"""A model of every timm family goes through a training step and an evaluation: the smallest, with random weights."""

import numpy as np
import pytest
import timm
import torch
from loops import make_setup, recipe_of
from timm.models import _registry

from pipeline.data import batching
from pipeline.errors import UsageError
from pipeline.training import setup

SMALLEST = {
    "vision_transformer": "test_vit",
    "byobnet": "test_byobnet",
    "beit": "beit_base_patch16_224",
    "byoanet": "halonet_h1",
    "metaformer": "poolformerv2_s12",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny",
    "maxxvit": "test_coatnet",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "test_convnext",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "cspnet": "cs3darknet_focus_s",
    "csatv2": "csatv2",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "nfnet": "test_nfnet",
    "dpn": "dpn48b",
    "vovnet": "ese_vovnet19b_slim_dw",
    "resnet": "test_resnet",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "test_efficientnet",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "vit_tiny_patch16_dinov3_qkvb",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "mobilenetv3": "mobilenetv3_small_050",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "ghostnet": "ghostnet_050",
    "mlp_mixer": "gmlp_ti16_224",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "senet": "legacy_seresnet18",
    "xception": "legacy_xception",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "test_mambaout",
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_parfac_gap",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "pit": "pit_ti_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50",
    "resnest": "resnest14d",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "selecsls": "selecsls42",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window16_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "vision_transformer_relpos": "test_vit_relpos",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_legacy_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_svt_small",
    "vgg": "vgg11",
    "visformer": "visformer_tiny",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224",
}
"""timm's module -> its model of the fewest parameters."""

HUGE = {"deepseek_vit", "gemma4_vit"}
"""Their smallest models have more than 150 million parameters."""

LARGE = 20e6
"""Parameters of a model whose head alone is trained here, for time's sake."""

IMAGE_SIZE = 96  # as in the recipes; the model's own where it takes no other


def test_no_family_is_left_out():
    families = {_registry._model_to_module[name] for name in timm.list_models()}
    assert families == SMALLEST.keys()
    assert all(_registry._model_to_module[name] == family for family, name in SMALLEST.items())


def build(name, recipe, splits):
    options = f"model={name}", "batch_size=2", "epochs=1"
    try:
        return make_setup(recipe_of(recipe, *options, f"image_size={IMAGE_SIZE}"), splits)
    except UsageError as error:
        assert str(error).startswith("image_size: ")
        own = timm.get_pretrained_cfg(name).input_size[1]
        return make_setup(recipe_of(recipe, *options, f"image_size={own}"), splits)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # timm's and torch's own, of single families
@pytest.mark.parametrize("family", sorted(SMALLEST.keys() - HUGE))
@pytest.mark.parametrize("recipe", ["linear-probe", "finetune"])
def test_a_family_is_trained_and_evaluated(family, recipe):
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in timm.create_model(SMALLEST[family]).parameters())
    if recipe == "finetune" and parameters > LARGE:
        pytest.skip("a large model")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    images = batching.as_split(pixels, np.array([0, 1, 2, 0, 1]))
    splits = {"train": images.take(np.arange(3)), "validation": images.take(np.arange(3, 5))}
    training = build(SMALLEST[family], recipe, splits)
    samples = splits
    if training.on_features:
        samples = {name: training.compute_features(split) for name, split in splits.items()}
    training.loop.set_train_mode()
    before = [parameter.detach().clone() for parameter in training.net.heads[0].parameters()]
    for inputs, labels in training.train_batches(samples["train"], 0, 1):
        training.loop.step(inputs, labels)
    training.loop.network.eval()
    for inputs, labels in training.val_batches(setup.val_split(samples)):
        assert training.loop.eval_step(inputs, labels).shape == labels.shape
    after = list(training.net.heads[0].parameters())
    assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
