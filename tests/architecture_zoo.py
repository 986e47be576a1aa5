"""Architectures of torchvision, timm and Hugging Face: how each is built small, and what it takes as inputs.

Shared by the tests and by ``benchmarks/architectures.py``. Nothing is downloaded: all weights are random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel  # noqa: F401 - what all of its models import

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named."""


@dataclass(frozen=True)
class Architecture:
    """One row of the catalogue.

    Args:
        source: "torchvision", "timm" or "Hugging Face".
        family: what it is a variant of.
        name: as its library calls it.
        make: a new model with random weights.
        inputs: two examples.
        note: how it differs from the published one.
    """

    source: str
    family: str
    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    note: str = ""


def catalogue() -> Iterator[Architecture]:
    """All architectures."""
    yield from torchvision_models()
    yield from timm_models()
    yield from hugging_face_models()


def image(size: int) -> Inputs:
    return (torch.randn(2, 3, size, size),), {}


# -- torchvision ----------------------------------------------------------------------------------

SIZES = {
    "vit_b_16": 64, "vit_b_32": 128, "vit_l_16": 64, "vit_l_32": 128, "vit_h_14": 56,
    "maxvit_t": 224, "inception_v3": 96, "alexnet": 96, "s3d": 224, "mvit_v1_b": 224,
    "mvit_v2_s": 224,
}  # fmt: skip
"""The size of the images of those that do not take 64 pixels."""


def torchvision_models() -> Iterator[Architecture]:
    """Every classification, segmentation and video model, by torchvision's own list."""
    models = torchvision.models
    for module in (models, models.segmentation, models.video):
        for name in models.list_models(module=module):
            video = module is models.video
            make, inputs = partial(_torchvision, name), partial(_torchvision_inputs, name, video)
            note = TORCHVISION_NOTES.get(name, "")
            family = models.get_model_builder(name).__module__.rpartition(".")[2]
            yield Architecture("torchvision", family, name, make, inputs, note)


TORCHVISION_NOTES = {
    "googlenet": "no auxiliary heads",
    "inception_v3": "no auxiliary heads",
    **dict.fromkeys(
        torchvision.models.list_models(include="vgg*"),
        "pooled to 2 x 2 before the classifier",
    ),
    **dict.fromkeys(
        (
            "convnext_large", "efficientnet_v2_l", "regnet_x_32gf", "regnet_y_32gf", "regnet_y_128gf",
            "vit_h_14", "vit_l_16", "vit_l_32", "wide_resnet101_2",
        ),
        "two of equal blocks",
    ),
}  # fmt: skip


def _torchvision(name: str) -> nn.Module:
    options: dict[str, Any] = {"weights": None}
    if name.startswith("vit_"):
        options["image_size"] = SIZES[name]
    elif name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": False}
    elif name.startswith(("deeplabv3", "fcn", "lraspp")):
        options["weights_backbone"] = None
    model: nn.Module = torchvision.models.get_model(name, **options)
    if name.startswith("vgg"):
        model.avgpool = nn.AdaptiveAvgPool2d(2)
        model.classifier[0] = nn.Linear(512 * 2 * 2, 4096)
    if TORCHVISION_NOTES.get(name, "").startswith("two"):
        _shorten(model)
    return model


def _shorten(model: nn.Module) -> None:
    """Of equal blocks that follow each other, leave two."""
    for part in list(model.modules()):
        if isinstance(part, nn.Sequential | nn.ModuleList):
            shapes = [(type(block), [p.shape for p in block.parameters()]) for block in part]
            for k, name in reversed(list(enumerate(part._modules))):
                if k > 1 and shapes[k][1] and shapes[k] == shapes[k - 1] == shapes[k - 2]:
                    del part._modules[name]


def _torchvision_inputs(name: str, video: bool) -> Inputs:
    size = SIZES.get(name, 64)
    return ((torch.randn(2, 3, 16, size, size),), {}) if video else image(size)


# -- timm -----------------------------------------------------------------------------------------

TIMM = {
    "beit": "beit_base_patch16_224 beitv2_base_patch16_224",
    "byoanet": "halonet_h1 eca_botnext26ts_256 lambda_resnet26rpt_256 botnet26t_256 lamhalobotnet50ts_256",
    "byobnet": "mobileone_s1 gernet_s repvgg_a0 regnetz_b16 resnext26ts gcresnext26ts bat_resnext26ts",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny coat_lite_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "convnext_atto convnextv2_atto convnext_zepto_rms_ols",
    "cpubone": "cpubone_nano cpubone_b1_dwnorm",
    "crossvit": "crossvit_tiny_240 crossvit_9_dagger_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s darknet17 cspresnext50 cs3sedarknet_xdw cspdarknet53",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_distilled_patch16_224 deit3_small_patch16_224",
    "densenet": "densenet121 densenetblur121d",
    "dla": "dla46x_c dla60_res2next dla34",
    "dpn": "dpn48b dpn68b",
    "edgenext": "edgenext_xx_small edgenext_small_rw",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "efficientnet_b0 mobilenetv2_050 mnasnet_small tinynet_e tf_efficientnetv2_b0 mixnet_s"
    " spnasnet_100 efficientnet_lite0 gc_efficientnetv2_rw_t",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0 efficientvit_l1",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "vit_tiny_patch16_dinov3_qkvb eva02_tiny_patch14_224 vit_pe_core_tiny_patch16_384"
    " vit_small_patch16_rope_mixed_224",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8 fastvit_sa12 fastvit_mci0",
    "focalnet": "focalnet_tiny_srf focalnet_tiny_lrf",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "ghostnet": "ghostnet_050 ghostnetv2_100 ghostnetv3_050",
    "hardcorenas": "hardcorenas_a",
    "hgnet": "hgnetv2_b0 hgnet_tiny",
    "hiera": "hiera_tiny_224 hiera_small_abswin_256",
    "hieradet_sam2": "sam2_hiera_tiny hieradet_small",
    "hrnet": "hrnet_w18_small hrnet_w18_ssld",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s levit_conv_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "mambaout_femto",
    "maxxvit": "maxvit_rmlp_pico_rw_256 coatnet_pico_rw_224 coatnet_nano_cc_224 coatnext_nano_rw_224"
    " maxxvitv2_nano_rw_256",
    "metaformer": "poolformerv2_s12 poolformer_s12 caformer_s18 convformer_s18",
    "mlp_mixer": "gmlp_ti16_224 gmixer_12_224 resmlp_12_224 mixer_s32_224",
    "mobilenetv3": "mobilenetv3_small_050 lcnet_035 mobilenetv4_conv_small fbnetv3_b mobilenetv4_hybrid_medium",
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs mobilevitv2_050",
    "mvitv2": "mvitv2_tiny mvitv2_small_cls",
    "naflexvit": "naflexvit_base_patch16_gap naflexvit_base_patch16_map naflexvit_base_patch16_parfac_gap",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny nest_tiny_jx",
    "nextvit": "nextvit_small",
    "nfnet": "nf_regnet_b0 nf_resnet26 nf_ecaresnet26 nfnet_l0 dm_nfnet_f0",
    "pit": "pit_ti_224 pit_ti_distilled_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0 pvt_v2_b2_li",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002 regnety_002 regnetz_005 regnetv_040",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50 res2net50_14w_8s",
    "resnest": "resnest14d resnest50d_4s2x40d",
    "resnet": "resnet10t resnetblur18 seresnet18 ecaresnext26t_32x4d resnet26d wide_resnet50_2 resnetrs50",
    "resnetv2": "resnetv2_18 resnetv2_50x1_bit resnetv2_50d_evos resnetv2_50d_frn",
    "rexnet": "rexnet_100 rexnetr_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18 legacy_seresnext26_32x4d",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18 skresnext50_32x4d",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224 swin_s3_tiny_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224 swinv2_cr_tiny_ns_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_patch16_224 tnt_s_legacy_patch16_224",
    "tresnet": "tresnet_m tresnet_v2_l",
    "twins": "twins_svt_small twins_pcpvt_small",
    "vgg": "vgg11_bn",
    "visformer": "visformer_tiny",
    "vision_transformer": "vit_tiny_patch16_224 vit_wee_patch16_reg1_gap_256"
    " vit_dpwee_patch16_reg1_gap_256 vit_small_patch14_reg4_dinov2"
    " vit_base_patch16_siglip_224 vit_base_patch32_clip_224 vit_base_patch16_rpn_224"
    " vit_medium_patch16_gap_240 aimv2_large_patch14_224",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224 vit_small_resnet26d_224 vit_base_mci_224",
    "vision_transformer_relpos": "vit_srelpos_small_patch16_224 vit_relpos_small_patch16_rpn_224"
    " vit_relpos_medium_patch16_cls_224",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw vovnet39a eca_vovnet39b",
    "xception": "legacy_xception",
    "xception_aligned": "xception41 xception41p",
    "xcit": "xcit_nano_12_p16_224 xcit_tiny_12_p8_224",
}
"""At least one of every module of timm, more of the large ones."""
TWO_BLOCKS = {
    "beit_base_patch16_224",
    "beitv2_base_patch16_224",
    "deepseek_vit_412m",
    "gemma4_vit_167m",
    "naflexvit_base_patch16_gap",
    "naflexvit_base_patch16_map",
    "naflexvit_base_patch16_parfac_gap",
    "qwen3_vit_88m",
    "vit_base_patch16_siglip_224",
    "vit_base_patch32_clip_224",
    "vit_base_patch16_rpn_224",
    "vit_medium_patch16_gap_240",
    "aimv2_large_patch14_224",
    "vit_small_resnet26d_224",
    "vit_base_mci_224",
    "vit_relpos_medium_patch16_cls_224",
    "samvit_base_patch16_224",
}
"""Made with ``depth=2``."""
PIXELS = {
    "crossvit_tiny_240": 240,
    "crossvit_9_dagger_240": 240,
    "halonet_h1": 256,
    "lamhalobotnet50ts_256": 128,
    "bat_resnext26ts": 256,
    "deepseek_vit_412m": 112,
    "efficientformer_l1": 224,
    "inception_resnet_v2": 112,
    "inception_v3": 112,
    "inception_v4": 112,
}
"""The size of the images of those that do not take 64."""


def timm_models() -> Iterator[Architecture]:
    """At least one of every family, some shortened to two blocks."""
    for family, names in TIMM.items():
        for name in names.split():
            note = "two blocks" if name in TWO_BLOCKS else ""
            size = PIXELS.get(name, 64)
            yield Architecture(
                "timm", family, name, partial(_timm, name, size), partial(image, size), note
            )


def _timm(name: str, size: int) -> nn.Module:
    options: dict[str, Any] = {"num_classes": 10}
    if name in TWO_BLOCKS:
        options["depth"] = 2
    try:
        model: nn.Module = timm.create_model(name, img_size=size, **options)
    except TypeError:  # takes images of any size
        model = timm.create_model(name, **options)
    return model


# -- Hugging Face ---------------------------------------------------------------------------------

TOKENS = 99
SMALL: dict[str, Any] = {
    "vocab_size": TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
SEQ2SEQ: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40, "decoder_start_token_id": 1,
}  # fmt: skip
VISION: dict[str, Any] = {"image_size": 32, "patch_size": 8, "num_labels": 5}
SPEECH: dict[str, Any] = {
    "conv_dim": (32, 32), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
TWO = {
    "text_config": SMALL,
    "vision_config": {k: v for k, v in SMALL.items() if k != "vocab_size"} | VISION,
}
EXPERTS: dict[str, Any] = {
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "experts_implementation": "eager",
}

HUGGING_FACE: dict[str, dict[str, tuple[str, str, dict[str, Any]]]] = {
    "text encoder": {
        "bert": ("BertForSequenceClassification", "text", SMALL),
        "roberta": ("RobertaForSequenceClassification", "text", SMALL),
        "distilbert": ("DistilBertForSequenceClassification", "text", {**SMALL, "hidden_dim": 48}),
        "albert": ("AlbertForSequenceClassification", "text", {**SMALL, "embedding_size": 16}),
        "electra": ("ElectraForSequenceClassification", "text", {**SMALL, "embedding_size": 16}),
        "deberta": (
            "DebertaForSequenceClassification",
            "text",
            {**SMALL, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        ),
        "deberta-v2": (
            "DebertaV2ForSequenceClassification",
            "text",
            {**SMALL, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        ),
        "mpnet": ("MPNetForSequenceClassification", "text", SMALL),
        "convbert": ("ConvBertForSequenceClassification", "text", {**SMALL, "embedding_size": 16}),
        "modernbert": ("ModernBertForSequenceClassification", "text", SMALL),
        "fnet": ("FNetForSequenceClassification", "tokens", SMALL),
        "funnel": (
            "FunnelForSequenceClassification",
            "text",
            {
                "vocab_size": TOKENS,
                "block_sizes": [1, 1],
                "d_model": 32,
                "n_head": 4,
                "d_head": 8,
                "d_inner": 48,
            },
        ),
        "longformer": (
            "LongformerForSequenceClassification",
            "text",
            {**SMALL, "attention_window": 4},
        ),
        "roformer": ("RoFormerForSequenceClassification", "text", SMALL),
        "squeezebert": (
            "SqueezeBertForSequenceClassification",
            "text",
            {
                **SMALL,
                "embedding_size": 32,
                "q_groups": 2,
                "k_groups": 2,
                "v_groups": 2,
                "post_attention_groups": 2,
                "intermediate_groups": 4,
                "output_groups": 4,
            },
        ),
        "xlnet": (
            "XLNetForSequenceClassification",
            "text",
            {**SMALL, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
        ),
    },
    "decoder": {
        "gpt2": ("GPT2LMHeadModel", "text", SMALL),
        "gpt_neo": (
            "GPTNeoForCausalLM",
            "text",
            {**SMALL, "attention_types": [[["global", "local"], 1]], "window_size": 4},
        ),
        "gpt_neox": ("GPTNeoXForCausalLM", "text", SMALL),
        "gptj": ("GPTJForCausalLM", "text", {**SMALL, "rotary_dim": 4}),
        "gpt_bigcode": ("GPTBigCodeForCausalLM", "text", SMALL),
        "opt": ("OPTForCausalLM", "text", {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32}),
        "bloom": ("BloomForCausalLM", "text", SMALL),
        "mpt": ("MptForCausalLM", "text", {**SMALL, "d_model": 32, "n_heads": 4, "n_layers": 2}),
        "falcon": (
            "FalconForCausalLM",
            "text",
            {**SMALL, "new_decoder_architecture": True, "num_kv_heads": 2},
        ),
        "llama": ("LlamaForCausalLM", "text", {**SMALL, **GROUPED}),
        "mistral": ("MistralForCausalLM", "text", {**SMALL, **GROUPED}),
        "mixtral": (
            "MixtralForCausalLM",
            "text",
            {**SMALL, **GROUPED, "num_local_experts": 3, "experts_implementation": "eager"},
        ),
        "qwen2": ("Qwen2ForCausalLM", "text", {**SMALL, **GROUPED}),
        "qwen3": ("Qwen3ForCausalLM", "text", {**SMALL, **GROUPED, "head_dim": 8}),
        "qwen3_moe": (
            "Qwen3MoeForCausalLM",
            "text",
            {**SMALL, **GROUPED, **EXPERTS, "head_dim": 8, "num_experts": 3},
        ),
        "gemma": ("GemmaForCausalLM", "text", {**SMALL, **GROUPED, "head_dim": 8}),
        "gemma2": ("Gemma2ForCausalLM", "text", {**SMALL, **GROUPED, "head_dim": 8}),
        "gemma3_text": ("Gemma3ForCausalLM", "text", {**SMALL, **GROUPED, "head_dim": 8}),
        "phi": ("PhiForCausalLM", "text", SMALL),
        "phi3": ("Phi3ForCausalLM", "text", {**SMALL, **GROUPED}),
        "stablelm": ("StableLmForCausalLM", "text", {**SMALL, **GROUPED}),
        "starcoder2": ("Starcoder2ForCausalLM", "text", {**SMALL, **GROUPED}),
        "olmo2": ("Olmo2ForCausalLM", "text", {**SMALL, **GROUPED}),
        "cohere": ("CohereForCausalLM", "text", {**SMALL, **GROUPED}),
        "granite": ("GraniteForCausalLM", "text", {**SMALL, **GROUPED}),
        "deepseek_v3": (
            "DeepseekV3ForCausalLM",
            "text",
            {
                **SMALL,
                **EXPERTS,
                "num_key_value_heads": 4,
                "n_routed_experts": 4,
                "n_group": 2,
                "topk_group": 1,
                "q_lora_rank": 16,
                "kv_lora_rank": 16,
                "qk_rope_head_dim": 8,
                "qk_nope_head_dim": 8,
                "v_head_dim": 8,
                "first_k_dense_replace": 1,
            },
        ),
        "gpt_oss": (
            "GptOssForCausalLM",
            "text",
            {
                **SMALL,
                **GROUPED,
                "head_dim": 8,
                "num_local_experts": 3,
                "num_experts_per_tok": 2,
                "experts_implementation": "eager",
            },
        ),
        "codegen": ("CodeGenForCausalLM", "text", {**SMALL, "rotary_dim": 4, "n_inner": 48}),
        "ctrl": ("CTRLForSequenceClassification", "text", {**SMALL, "dff": 48}),
    },
    "encoder and decoder": {
        "t5": (
            "T5ForConditionalGeneration",
            "pairs",
            {**SMALL, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        ),
        "bart": ("BartForConditionalGeneration", "pairs", {**SMALL, **SEQ2SEQ}),
        "pegasus": ("PegasusForConditionalGeneration", "pairs", {**SMALL, **SEQ2SEQ}),
        "marian": ("MarianMTModel", "pairs", {**SMALL, **SEQ2SEQ}),
        "m2m_100": ("M2M100ForConditionalGeneration", "pairs", {**SMALL, **SEQ2SEQ}),
        "led": (
            "LEDForConditionalGeneration",
            "pairs",
            {**SMALL, **SEQ2SEQ, "attention_window": 4},
        ),
    },
    "state space": {
        "mamba": ("MambaForCausalLM", "tokens", {**SMALL, "state_size": 8}),
        "mamba2": (
            "Mamba2ForCausalLM",
            "tokens",
            {
                **SMALL,
                "state_size": 8,
                "num_heads": 8,
                "head_dim": 8,
                "n_groups": 2,
                "chunk_size": 4,
            },
        ),
        "falcon_mamba": ("FalconMambaForCausalLM", "tokens", {**SMALL, "state_size": 8}),
        "rwkv": (
            "RwkvForCausalLM",
            "tokens",
            {**SMALL, "attention_hidden_size": 32, "context_length": 12},
        ),
        "jamba": (
            "JambaForCausalLM",
            "text",
            {
                **SMALL,
                **GROUPED,
                "mamba_d_state": 8,
                "mamba_dt_rank": 4,
                "attn_layer_period": 2,
                "attn_layer_offset": 1,
                "num_experts": 2,
                "expert_layer_period": 2,
                "experts_implementation": "eager",
                "expert_layer_offset": 1,
                "use_mamba_kernels": False,
            },
        ),
        "recurrent_gemma": (
            "RecurrentGemmaForCausalLM",
            "text",
            {
                **SMALL,
                "num_hidden_layers": 3,
                "lru_width": 32,
                "num_key_value_heads": 1,
                "attention_window_size": 8,
            },
        ),
        "xlstm": (
            "xLSTMForCausalLM",
            "tokens",
            {
                **SMALL,
                "num_heads": 4,
                "num_blocks": 2,
                "chunkwise_kernel": "chunkwise--native_autograd",
                "sequence_kernel": "native_sequence__native",
                "step_kernel": "native",
            },
        ),
    },
    "vision": {
        "vit": ("ViTForImageClassification", "image", {**SMALL, **VISION}),
        "deit": ("DeiTForImageClassification", "image", {**SMALL, **VISION}),
        "beit": (
            "BeitForImageClassification",
            "image",
            {**SMALL, **VISION, "use_relative_position_bias": True},
        ),
        "dinov2": ("Dinov2ForImageClassification", "image", {**SMALL, **VISION}),
        "dinov3_vit": ("DINOv3ViTModel", "image", {**SMALL, **VISION, "num_register_tokens": 2}),
        "swin": (
            "SwinForImageClassification",
            "image",
            {
                "image_size": 32,
                "patch_size": 2,
                "embed_dim": 16,
                "depths": [2, 2],
                "num_heads": [2, 4],
                "window_size": 4,
            },
        ),
        "swinv2": (
            "Swinv2ForImageClassification",
            "image",
            {
                "image_size": 32,
                "patch_size": 2,
                "embed_dim": 16,
                "depths": [2, 2],
                "num_heads": [2, 4],
                "window_size": 4,
            },
        ),
        "convnext": (
            "ConvNextForImageClassification",
            "image",
            {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
        ),
        "convnextv2": (
            "ConvNextV2ForImageClassification",
            "image",
            {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
        ),
        "resnet": (
            "ResNetForImageClassification",
            "image",
            {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2]},
        ),
        "regnet": (
            "RegNetForImageClassification",
            "image",
            {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2], "groups_width": 8},
        ),
        "segformer": (
            "SegformerForSemanticSegmentation",
            "image64",
            {
                "hidden_sizes": [8, 16, 24, 32],
                "num_attention_heads": [1, 2, 2, 4],
                "depths": [1, 1, 1, 1],
                "decoder_hidden_size": 16,
            },
        ),
        "poolformer": (
            "PoolFormerForImageClassification",
            "image64",
            {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
        ),
        "cvt": (
            "CvtForImageClassification",
            "image64",
            {
                "embed_dim": [8, 16, 32],
                "num_heads": [1, 2, 4],
                "depth": [1, 2, 3],
                "cls_token": [False, False, True],
            },
        ),
        "mobilevit": (
            "MobileViTForImageClassification",
            "image64",
            {
                "image_size": 64,
                "hidden_sizes": [16, 24, 32],
                "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32],
            },
        ),
        "pvt_v2": (
            "PvtV2ForImageClassification",
            "image64",
            {
                "image_size": 64,
                "hidden_sizes": [8, 16, 24, 32],
                "num_attention_heads": [1, 2, 2, 4],
                "depths": [1, 1, 1, 1],
            },
        ),
        "videomae": (
            "VideoMAEForVideoClassification",
            "video",
            {**SMALL, **VISION, "num_frames": 4},
        ),
        "detr": (
            "DetrForObjectDetection",
            "image64",
            {
                **SMALL,
                **SEQ2SEQ,
                "num_queries": 5,
                "use_timm_backbone": True,
                "use_pretrained_backbone": False,
                "backbone": "resnet18",
            },
        ),
    },
    "audio": {
        "wav2vec2": ("Wav2Vec2ForSequenceClassification", "audio", {**SMALL, **SPEECH}),
        "hubert": ("HubertForSequenceClassification", "audio", {**SMALL, **SPEECH}),
        "wavlm": ("WavLMForSequenceClassification", "audio", {**SMALL, **SPEECH}),
        "data2vec-audio": (
            "Data2VecAudioForSequenceClassification",
            "audio",
            {**SMALL, **SPEECH, "conv_pos_kernel_size": 5},
        ),
        "audio-spectrogram-transformer": (
            "ASTForAudioClassification",
            "spectrogram",
            {
                **SMALL,
                "patch_size": 4,
                "frequency_stride": 4,
                "time_stride": 4,
                "max_length": 24,
                "num_mel_bins": 16,
            },
        ),
        "whisper": (
            "WhisperForConditionalGeneration",
            "mel",
            {
                **SMALL,
                **SEQ2SEQ,
                "num_mel_bins": 16,
                "max_source_positions": 20,
                "max_target_positions": 20,
            },
        ),
        "speech_to_text": (
            "Speech2TextForConditionalGeneration",
            "features",
            {**SMALL, **SEQ2SEQ, "input_feat_per_channel": 16, "conv_channels": 24},
        ),
    },
    "several kinds of input": {
        "clip": ("CLIPModel", "both", {**TWO, "projection_dim": 24}),
        "siglip": ("SiglipModel", "both", TWO),
        "blip": ("BlipForImageTextRetrieval", "both", {**TWO, "image_text_hidden_size": 24}),
        "vilt": (
            "ViltForImagesAndTextClassification",
            "both",
            {**SMALL, **VISION, "num_images": 1, "modality_type_vocab_size": 3},
        ),
        "patchtst": (
            "PatchTSTForClassification",
            "series",
            {
                "num_input_channels": 3,
                "context_length": 24,
                "patch_length": 4,
                "patch_stride": 4,
                "d_model": 32,
                "ffn_dim": 48,
                "num_targets": 4,
                "use_cls_token": True,
            },
        ),
    },
}


def hugging_face_models() -> Iterator[Architecture]:
    """Tiny random models of many types, by their configurations."""
    for family, types in HUGGING_FACE.items():
        for name, (kind, takes, options) in types.items():
            make = partial(_hugging_face, name, kind, options)
            yield Architecture("Hugging Face", family, name, make, INPUTS[takes], "tiny")


def _hugging_face(name: str, kind: str, options: Mapping[str, Any]) -> nn.Module:
    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.for_model(name, **options)
    model: nn.Module = getattr(transformers, kind)(config)
    return model


def tokens(length: int = 12) -> Tensor:
    return torch.randint(3, TOKENS, (2, length))


def text() -> dict[str, Tensor]:
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    return {"input_ids": tokens(), "attention_mask": mask}


INPUTS: dict[str, Callable[[], Inputs]] = {
    "tokens": lambda: ((), {"input_ids": tokens()}),
    "text": lambda: ((), text()),
    "pairs": lambda: ((), {**text(), "decoder_input_ids": tokens(7)}),
    "image": lambda: ((), {"pixel_values": torch.randn(2, 3, 32, 32)}),
    "image64": lambda: ((), {"pixel_values": torch.randn(2, 3, 64, 64)}),
    "video": lambda: ((), {"pixel_values": torch.randn(2, 4, 3, 32, 32)}),
    "audio": lambda: ((), {"input_values": torch.randn(2, 400)}),
    "spectrogram": lambda: ((), {"input_values": torch.randn(2, 24, 16)}),
    "mel": lambda: ((), {"input_features": torch.randn(2, 16, 40), "decoder_input_ids": tokens(7)}),
    "features": lambda: ((), {"input_features": torch.randn(2, 40, 16), "decoder_input_ids": tokens(7)}),
    "both": lambda: ((), {**text(), "pixel_values": torch.randn(2, 3, 32, 32)}),
    "series": lambda: ((), {"past_values": torch.randn(2, 24, 3)}),
}  # fmt: skip
