"""One model of every timm family, with random weights: forward mode and attribution by layer, and what they cost."""

import time
import warnings

import pytest
import torch
from torch import nn

import lie_metric as lm
from lie_metric.lie import linearise
from lie_metric.options import Options

timm = pytest.importorskip("timm")
ByoBlockCfg = pytest.importorskip("timm.models.byobnet").ByoBlockCfg

# Family: its smallest model, and an image size that it takes.
FAMILIES = {
    "beit": ("beit_base_patch16_224", 96),
    "byoanet": ("halonet_h1", 128),
    "byobnet": ("test_byobnet", 96),
    "cait": ("cait_xxs24_224", 96),
    "coat": ("coat_tiny", 96),
    "convit": ("convit_tiny", 96),
    "convmixer": ("convmixer_768_32", 96),
    "convnext": ("test_convnext", 96),
    "cpubone": ("cpubone_nano", 96),
    "crossvit": ("crossvit_tiny_240", 240),
    "csatv2": ("csatv2", 96),
    "cspnet": ("cs3darknet_focus_s", 96),
    "cspnext": ("cspnext_tiny", 96),
    "davit": ("davit_tiny", 96),
    "deepseek_vit": ("deepseek_vit_412m", 112),
    "deit": ("deit_tiny_patch16_224", 96),
    "densenet": ("densenet121", 96),
    "dla": ("dla46x_c", 96),
    "dpn": ("dpn48b", 96),
    "edgenext": ("edgenext_xx_small", 96),
    "efficientformer": ("efficientformer_l1", 224),
    "efficientformer_v2": ("efficientformerv2_s0", 96),
    "efficientnet": ("test_efficientnet", 96),
    "efficientvim": ("efficientvim_m1", 64),
    "efficientvit_mit": ("efficientvit_b0", 96),
    "efficientvit_msra": ("efficientvit_m0", 96),
    "eva": ("vit_tiny_patch16_dinov3_qkvb", 96),
    "fasternet": ("fasternet_t0", 96),
    "fastvit": ("fastvit_t8", 96),
    "focalnet": ("focalnet_tiny_srf", 96),
    "gcvit": ("gcvit_xxtiny", 96),
    "gemma4_vit": ("gemma4_vit_167m", 96),
    "ghostnet": ("ghostnet_050", 96),
    "hardcorenas": ("hardcorenas_b", 96),
    "hgnet": ("hgnetv2_b0", 96),
    "hiera": ("hiera_tiny_224", 96),
    "hieradet_sam2": ("sam2_hiera_tiny", 96),
    "hrnet": ("hrnet_w18_small", 96),
    "iformer": ("iformer_t", 96),
    "inception_next": ("inception_next_atto", 96),
    "inception_resnet_v2": ("inception_resnet_v2", 96),
    "inception_v3": ("inception_v3", 96),
    "inception_v4": ("inception_v4", 96),
    "lcnetv2": ("lcnetv2_small", 96),
    "levit": ("levit_128s", 96),
    "lowformer": ("lowformer_b0", 96),
    "mambaout": ("test_mambaout", 96),
    "maxxvit": ("test_coatnet", 96),
    "metaformer": ("poolformerv2_s12", 96),
    "mlp_mixer": ("gmlp_ti16_224", 96),
    "mobilenetv3": ("lcnet_035", 96),
    "mobilenetv5": ("mobilenetv5_base", 96),
    "mobilevit": ("mobilevit_xxs", 96),
    "mvitv2": ("mvitv2_tiny", 96),
    "naflexvit": ("naflexvit_base_patch16_gap", 96),
    "nasnet": ("nasnetalarge", 96),
    "nest": ("nest_tiny", 96),
    "nextvit": ("nextvit_small", 96),
    "nfnet": ("test_nfnet", 96),
    "pit": ("pit_ti_224", 96),
    "pnasnet": ("pnasnet5large", 64),
    "pvt_v2": ("pvt_v2_b0", 96),
    "qwen3_vit": ("qwen3_vit_88m", 96),
    "rdnet": ("rdnet_tiny", 64),
    "regnet": ("regnetx_002", 96),
    "repghost": ("repghostnet_050", 96),
    "repvit": ("repvit_m1", 96),
    "res2net": ("res2next50", 96),
    "resnest": ("resnest14d", 96),
    "resnet": ("test_resnet", 96),
    "resnetv2": ("resnetv2_18", 96),
    "rexnet": ("rexnet_100", 96),
    "selecsls": ("selecsls42", 96),
    "senet": ("legacy_seresnet18", 96),
    "sequencer": ("sequencer2d_s", 96),
    "shvit": ("shvit_s1", 96),
    "sknet": ("skresnet18", 96),
    "starnet": ("starnet_s050", 96),
    "swiftformer": ("swiftformer_xs", 96),
    "swin_transformer": ("swin_tiny_patch4_window7_224", 96),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", 96),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", 96),
    "tiny_vit": ("tiny_vit_5m_224", 96),
    "tnt": ("tnt_s_legacy_patch16_224", 96),
    "tresnet": ("tresnet_m", 96),
    "twins": ("twins_svt_small", 96),
    "vgg": ("vgg11", 96),
    "visformer": ("visformer_tiny", 96),
    "vision_transformer": ("test_vit", 96),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", 96),
    "vision_transformer_relpos": ("test_vit_relpos", 96),
    "vision_transformer_sam": ("samvit_base_patch16_224", 96),
    "vitamin": ("vitamin_small_224", 96),
    "volo": ("volo_d1_224", 96),
    "vovnet": ("ese_vovnet19b_slim_dw", 96),
    "xception": ("legacy_xception", 96),
    "xception_aligned": ("xception41p", 96),
    "xcit": ("xcit_nano_12_p8_224", 96),
}

HALO = tuple(
    ByoBlockCfg(type="self_attn", d=1, c=channels, s=stride, gs=0, br=1.0)
    for channels, stride in ((64, 1), (128, 2), (256, 2), (512, 2))
)
# Where the smallest version is large: fewer of its blocks, or narrower ones.
OPTIONS = {
    "beit_base_patch16_224": {"depth": 2},
    "cait_xxs24_224": {"depth": 4},
    "coat_tiny": {"parallel_depth": 2},
    "deepseek_vit_412m": {"depth": 2, "embed_dim": 256, "num_heads": 4},
    "gemma4_vit_167m": {"depth": 2},
    "halonet_h1": {"blocks": HALO, "self_attn_kwargs": {"block_size": 4, "halo_size": 2}},
    "mobilenetv5_base": {"channel_multiplier": 0.25},
    "naflexvit_base_patch16_gap": {"depth": 2},
    "nasnetalarge": {"stem_size": 32, "num_features": 1056},
    "qwen3_vit_88m": {"depth": 2},
    "sam2_hiera_tiny": {"stages": (1, 1, 3, 1), "global_att_blocks": (3,)},
    "samvit_base_patch16_224": {"depth": 2},
}
# The same where there is no option for it: what is kept of sequences of blocks, at least one of each kind.
KEPT = {
    "convmixer_768_32": {"blocks": range(4)},
    "inception_resnet_v2": {"repeat": range(2), "repeat_1": range(2), "repeat_2": range(2)},
    "inception_v4": {"features": (0, 1, 2, 3, 4, 5, 6, 10, 11, 18, 19)},
}
# In these every cell is given the outputs of the last two: which cells are left out, being like their predecessors, and
# which argument is the newer output.
PASSED = {
    "nasnetalarge": [(range(first, first + 4), 0) for first in (2, 8, 14)],
    "pnasnet5large": [((2, 3, 6, 7), 1)],
}
# Cells, like earlier ones but wider, that come last and are left out: which, and how many channels come before.
WITHOUT = {"pnasnet5large": (range(8, 12), 2160)}

# Bounds of the difference from `vmap` in float64 where it is not 1e-9. A norm is computed in float32, in another order;
# with that in float64 the difference is 4e-16.
DIFFERENCES = {"deepseek_vit_412m": 1e-6}

# Bounds of the completeness error in float64 where it is not 1e-9.
RESIDUALS = {
    # They compute parts in float32 whatever the weights are.
    "efficientvit_b0": 1e-5,
    "deepseek_vit_412m": 1e-5,
    # Forward mode agrees with finite differences to 1e-9; torch's backward pass of the model is off by 1e-7.
    "swinv2_tiny_window8_256": 1e-6,
}

# Relative steps of the finite difference where they are not 1e-8: what is computed in float32 needs a larger one. None:
# linear attention of random weights divides by almost nothing, and no step is both small and above rounding.
STEPS = {"deepseek_vit_412m": 1e-3, "efficientvit_b0": None}


class Newer(nn.Module):
    """Takes the place of a cell that is left out."""

    def __init__(self, argument):
        super().__init__()
        self.argument = argument

    def forward(self, *outputs):
        return outputs[self.argument]


def build(name, size):
    torch.manual_seed(0)
    options = OPTIONS.get(name, {})
    try:
        model = timm.create_model(name, num_classes=10, img_size=size, **options)
    except (TypeError, ValueError, AssertionError):
        model = timm.create_model(name, num_classes=10, **options)
    for sequence, kept in KEPT.get(name, {}).items():
        blocks = model.get_submodule(sequence)
        setattr(model, sequence, nn.Sequential(*(blocks[index] for index in kept)))
    for cells, newer in PASSED.get(name, []):
        for cell in cells:
            setattr(model, f"cell_{cell}", Newer(newer))
    if name in WITHOUT:
        cells, model.num_features = WITHOUT[name]
        for cell in cells:
            setattr(model, f"cell_{cell}", None)
        model.reset_classifier(10)
    for parameter in model.parameters():
        # Branches that begin with a zero would hide what is behind them.
        if parameter.abs().max() == 0:
            nn.init.normal_(parameter, std=0.02)
    return model.eval().double()


def difference(model, x, tangent, relative):
    """A central difference of the model as it is, and how much of it may be rounding of the outputs.

    The step is small enough for few entries to cross the kink of a ReLU.
    """
    step = relative * x.norm() / tangent.norm()
    with torch.no_grad():
        ahead, behind = model(x + step * tangent), model(x - step * tangent)
    slope = (ahead - behind) / (2 * step)
    return slope, (1e-13 * ahead.norm() / step / slope.norm()).item()


def rounding_of(output, lie_derivative):
    """Sixteen roundings of the output against its Lie derivative, which is 1e-4 to 1e-10 of it in some random networks.

    Contributions are as uncertain as the activations they are computed from; how far depends on the processor.
    """
    return (16 * torch.finfo(output.dtype).eps * output.norm() / lie_derivative.norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, capsys):
    name, size = FAMILIES[family]
    generators = lm.generators("rotation", "translation_x")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build(name, size)
        x = torch.randn(2, 3, size, size, dtype=torch.float64)
        with torch.no_grad():
            start = time.perf_counter()
            model(torch.cat([x, x, x]))
            unit = time.perf_counter() - start
            start = time.perf_counter()
            found = linearise(model, x, generators, Options(method="forward"))
            cost = (time.perf_counter() - start) / unit
            wanted = linearise(model, x, generators, known="forward vmap").lie_derivatives
        L = found.lie_derivatives
        error = ((L - wanted).norm() / wanted.norm()).item()
        step = STEPS.get(name, 1e-8)
        slow, rounding = difference(model, x, found.tangents[0], step or 1e-8)
        finite = ((L[0] - slow).norm() / slow.norm()).item()
        report = lm.layerwise_equivariance_error(model, x[:1], generators, probes=2)
        residual = max(report.residual.values())
        single = lm.layerwise_equivariance_error(model.float(), x[:1].float(), generators, probes=2)
        residual32 = max(single.residual.values())
    bound = RESIDUALS.get(name, 1e-9) + rounding_of(found.output, L)
    with capsys.disabled():
        print(
            f"\n{family:26} {name:34} {found.method:13} vmap {error:7.1e}  difference {finite:7.1e}  "
            f"residual {residual:7.1e}, float32 {residual32:7.1e}  cost {cost:5.2f}  "
            f"{len(report.operations):5d} operations"
        )
    assert error <= DIFFERENCES.get(name, 1e-9)
    assert finite <= 1e-3 + rounding or step is None
    assert residual <= bound
    assert residual32 <= 1e-3
