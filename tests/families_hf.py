"""More of what transformers has: every layout of a fused projection, positions, norms, experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from families import Case, Draw, family, greedy_loop
from families_bar import (
    encoder_decoder,
    free_width,
    llama_like,
    pretrained,
    t5_like,
    text,
    vision,
)

Settings = Callable[[Draw], dict[str, Any]]


def decoder(name: str, kind: str, settings: Settings, *, may_refuse: bool = False) -> None:
    """Enter a causal language model."""

    def make(draw: Draw) -> Case:
        return text(draw, pretrained(draw, kind, **settings(draw)))

    family(name, "transformers", may_refuse=may_refuse)(make)


def masked(name: str, kind: str, settings: Settings, **more: Any) -> None:
    """Enter an encoder of text; the second row is padded."""

    def make(draw: Draw) -> Case:
        mask = torch.ones(2, 7, dtype=torch.int64)
        mask[1, 5:] = 0
        model = pretrained(draw, kind, **settings(draw))
        return Case(model, {"input_ids": draw.ids(), "attention_mask": mask, **more})

    family(name, "transformers")(make)


def image(name: str, kind: str, settings: Settings, size: int = 12, channels: int = 3) -> None:
    """Enter a model of images."""

    def make(draw: Draw) -> Case:
        model = pretrained(draw, kind, **settings(draw))
        return Case(model, {"pixel_values": draw.values(2, channels, size, size)})

    family(name, "transformers")(make)


def two_sided(name: str, kind: str, settings: Settings, length: int = 7) -> None:
    """Enter an encoder and decoder of text."""

    def make(draw: Draw) -> Case:
        return encoder_decoder(draw, pretrained(draw, kind, **settings(draw)), length)

    family(name, "transformers")(make)


def gpt_like(draw: Draw, **changes: Any) -> dict[str, Any]:
    """GPT-2's names."""
    settings: dict[str, Any] = {
        "vocab_size": draw.vocab,
        "n_embd": draw.hidden,
        "n_head": draw.heads,
        "n_layer": 2,
        "n_inner": draw.ffn,
        "n_positions": 32,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": False,
    }
    return settings | changes


def bert_like(draw: Draw, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "vocab_size": draw.vocab,
        "hidden_size": draw.hidden,
        "num_attention_heads": draw.heads,
        "intermediate_size": draw.ffn,
        "num_hidden_layers": 2,
        "max_position_embeddings": 40,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_labels": 5,
    }
    return settings | changes


def bart_like(draw: Draw, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "vocab_size": draw.vocab,
        "d_model": draw.hidden,
        "encoder_attention_heads": draw.heads,
        "decoder_attention_heads": draw.heads,
        "encoder_ffn_dim": draw.ffn,
        "decoder_ffn_dim": draw.ffn + 2,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "max_position_embeddings": 40,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "decoder_start_token_id": 1,
        "forced_eos_token_id": None,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
    }
    return settings | changes


def falcon_like(draw: Draw, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "vocab_size": draw.vocab,
        "hidden_size": draw.hidden,
        "num_attention_heads": draw.heads,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias": draw.coin(),
        "parallel_attn": draw.coin(),
        "alibi": False,
    }
    return settings | changes


decoder(
    "opt",
    "OPTForCausalLM",
    lambda d: {
        "vocab_size": d.vocab,
        "hidden_size": d.hidden,
        "num_attention_heads": d.heads,
        "ffn_dim": d.ffn,
        "num_hidden_layers": 2,
        "max_position_embeddings": 40,
        "word_embed_proj_dim": d.one_of(d.hidden, 10),
        "do_layer_norm_before": True,
        "dropout": 0.0,
        "layerdrop": 0.0,
    },
)
decoder(
    "bloom",
    "BloomForCausalLM",
    lambda d: {
        "vocab_size": d.vocab,
        "hidden_size": d.hidden,
        "n_head": d.heads,
        "n_layer": 2,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "apply_residual_connection_post_layernorm": d.coin(),
    },
)
decoder(
    "falcon-old",
    "FalconForCausalLM",
    lambda d: falcon_like(d, multi_query=False, new_decoder_architecture=False, alibi=d.coin()),
)
decoder(
    "falcon-multi-query",
    "FalconForCausalLM",
    lambda d: falcon_like(d, multi_query=True, new_decoder_architecture=False),
)
decoder(
    "falcon-new",
    "FalconForCausalLM",
    lambda d: falcon_like(
        d, new_decoder_architecture=True, num_kv_heads=d.kv_heads, parallel_attn=True
    ),
)
decoder(
    "gpt-neox",
    "GPTNeoXForCausalLM",
    lambda d: llama_like(
        d,
        rotary_pct=d.one_of(0.5, 1.0),
        hidden_dropout=0.0,
        use_parallel_residual=d.coin(),
        attention_bias=d.coin(),
    ),
)
decoder(
    "gpt-neo",
    "GPTNeoForCausalLM",
    lambda d: {
        "vocab_size": d.vocab,
        "hidden_size": d.hidden,
        "num_heads": d.heads,
        "num_layers": 2,
        "intermediate_size": d.ffn,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 4,
        "max_position_embeddings": 64,
        "resid_dropout": 0.0,
        "embed_dropout": 0.0,
        "attention_dropout": 0.0,
    },
)
decoder("gptj", "GPTJForCausalLM", lambda d: gpt_like(d, rotary_dim=4))
decoder(
    # its projection is cut in 4 pieces (mp_num): heads are a multiple of 4
    "codegen",
    "CodeGenForCausalLM",
    lambda d: gpt_like(d, rotary_dim=4, n_head=8, n_embd=8 * d.head_dim),
)
decoder("gpt-bigcode", "GPTBigCodeForCausalLM", lambda d: gpt_like(d, multi_query=True))
decoder("gpt-bigcode-heads", "GPTBigCodeForCausalLM", lambda d: gpt_like(d, multi_query=False))
decoder("imagegpt", "ImageGPTForCausalImageModeling", lambda d: gpt_like(d, vocab_size=d.vocab))
decoder("openai-gpt", "OpenAIGPTLMHeadModel", lambda d: gpt_like(d))
decoder(
    "mpt",
    "MptForCausalLM",
    # slopes of heads that are no power of two are made from the next power
    lambda d: {
        "vocab_size": d.vocab,
        "d_model": d.hidden,
        "n_heads": d.heads,
        "n_layers": 2,
        "expansion_ratio": 3,
        "max_seq_len": 64,
        "no_bias": True,
    },
)
decoder(
    "phi",
    "PhiForCausalLM",
    lambda d: llama_like(
        d, tie_word_embeddings=False, partial_rotary_factor=0.5, resid_pdrop=0.0, embd_pdrop=0.0
    ),
)
decoder(
    "phi-qk-norm",
    "PhiForCausalLM",
    lambda d: llama_like(d, qk_layernorm=True, partial_rotary_factor=0.5, resid_pdrop=0.0),
)
decoder(
    "phi3",
    "Phi3ForCausalLM",
    lambda d: llama_like(d, resid_pdrop=0.0, embd_pdrop=0.0),
)
decoder(
    "stablelm",
    "StableLmForCausalLM",
    lambda d: llama_like(
        d,
        use_qkv_bias=d.coin(),
        qk_layernorm=d.coin(),
        use_parallel_residual=d.coin(),
        hidden_dropout=0.0,
        partial_rotary_factor=0.5,
    ),
)
decoder("olmo", "OlmoForCausalLM", lambda d: llama_like(d, clip_qkv=d.one_of(None, 1.0)))
decoder("olmo2", "Olmo2ForCausalLM", lambda d: llama_like(d, attention_bias=d.coin()))
decoder(
    "cohere",
    "CohereForCausalLM",
    lambda d: llama_like(d, use_qk_norm=d.coin(), logit_scale=0.5, tie_word_embeddings=True),
)
decoder("cohere2", "Cohere2ForCausalLM", lambda d: llama_like(d, sliding_window=4))
decoder(
    "gemma2",
    "Gemma2ForCausalLM",
    lambda d: llama_like(d, **free_width(d), query_pre_attn_scalar=8, sliding_window=4),
)
decoder(
    "gemma3",
    "Gemma3ForCausalLM",
    lambda d: llama_like(d, **free_width(d), query_pre_attn_scalar=8, sliding_window=4),
)
decoder(
    "granite",
    "GraniteForCausalLM",
    lambda d: llama_like(
        d,
        embedding_multiplier=2.0,
        logits_scaling=3.0,
        residual_multiplier=0.5,
        attention_multiplier=0.3,
    ),
)
decoder(
    "starcoder2",
    "Starcoder2ForCausalLM",
    lambda d: llama_like(d, residual_dropout=0.0, embedding_dropout=0.0, sliding_window=None),
)
decoder(
    "glm",
    "GlmForCausalLM",
    lambda d: llama_like(d, head_dim=d.head_dim, attention_bias=d.coin()),
)
decoder("glm4", "Glm4ForCausalLM", lambda d: llama_like(d, head_dim=d.head_dim))
decoder("nemotron", "NemotronForCausalLM", lambda d: llama_like(d, hidden_dropout=0.0))
decoder("persimmon", "PersimmonForCausalLM", lambda d: llama_like(d, hidden_dropout=0.0))
decoder("smollm3", "SmolLM3ForCausalLM", lambda d: llama_like(d))
decoder("helium", "HeliumForCausalLM", lambda d: llama_like(d, head_dim=d.head_dim))
decoder("exaone4", "Exaone4ForCausalLM", lambda d: llama_like(d, sliding_window=4))
decoder("ministral", "MinistralForCausalLM", lambda d: llama_like(d, head_dim=d.head_dim))
decoder(
    "diffllama",
    "DiffLlamaForCausalLM",
    lambda d: llama_like(d, num_attention_heads=8, num_key_value_heads=4, hidden_size=64),
)
decoder(
    "biogpt",
    "BioGptForCausalLM",
    lambda d: bert_like(d, layerdrop=0.0, activation_dropout=0.0),
)
decoder(
    "xglm",
    "XGLMForCausalLM",
    lambda d: {
        "vocab_size": d.vocab,
        "d_model": d.hidden,
        "ffn_dim": d.ffn,
        "num_layers": 2,
        "attention_heads": d.heads,
        "max_position_embeddings": 40,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "layerdrop": 0.0,
    },
)
decoder(
    "ctrl",
    "CTRLLMHeadModel",
    lambda d: gpt_like(d, dff=d.ffn, n_inner=None),
)
# Experts: torch's grouped matrix product wants rows of 16 bytes, so their widths are even ones.
decoder(
    "mixtral",
    "MixtralForCausalLM",
    lambda d: llama_like(d, num_local_experts=4, num_experts_per_tok=2, intermediate_size=64),
    may_refuse=True,
)
decoder(
    "qwen2-moe",
    "Qwen2MoeForCausalLM",
    lambda d: llama_like(
        d,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=24,
    ),
    may_refuse=True,
)
decoder(
    "deepseek-v3",
    "DeepseekV3ForCausalLM",
    lambda d: llama_like(
        d,
        num_key_value_heads=d.heads,
        q_lora_rank=12,
        kv_lora_rank=10,
        qk_rope_head_dim=4,
        qk_nope_head_dim=6,
        v_head_dim=5,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        n_shared_experts=1,
        first_k_dense_replace=1,
    ),
    may_refuse=True,
)
decoder(
    "mamba",
    "MambaForCausalLM",
    lambda d: {
        "vocab_size": d.vocab,
        "hidden_size": d.hidden,
        "state_size": 5,
        "num_hidden_layers": 2,
        "time_step_rank": 3,
        "use_mambapy": False,
    },
)


@family("rwkv", "transformers")
def rwkv(draw: Draw) -> Case:
    """Its state, where it keeps one, is written in place, which has no gradient."""
    settings = {
        "vocab_size": draw.vocab,
        "context_length": 64,
        "hidden_size": draw.hidden,
        "attention_hidden_size": draw.hidden,
        "intermediate_size": draw.ffn,
        "num_hidden_layers": 2,
    }
    case = text(draw, pretrained(draw, "RwkvForCausalLM", **settings).eval())
    return replace(case, inputs={**case.inputs, "use_cache": False})


decoder(
    "recurrent-gemma",
    "RecurrentGemmaForCausalLM",
    lambda d: llama_like(d, lru_width=d.hidden, attention_window_size=8, num_hidden_layers=3),
)

masked("bert", "BertForMaskedLM", bert_like)
masked("bert-labels", "BertForSequenceClassification", bert_like)
masked("roberta", "RobertaForMaskedLM", bert_like)
masked(
    "albert",
    "AlbertForMaskedLM",
    lambda d: bert_like(d, embedding_size=11, num_hidden_groups=d.one_of(1, 2)),
)
masked("electra", "ElectraForMaskedLM", lambda d: bert_like(d, embedding_size=11))
masked(
    "distilbert",
    "DistilBertForMaskedLM",
    lambda d: {
        "vocab_size": d.vocab,
        "dim": d.hidden,
        "n_heads": d.heads,
        "hidden_dim": d.ffn,
        "n_layers": 2,
        "max_position_embeddings": 40,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    },
)
masked(
    "deberta-v2",
    "DebertaV2ForMaskedLM",
    lambda d: bert_like(
        d,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=d.coin(),
        position_buckets=8,
        share_att_key=d.coin(),
        norm_rel_ebd="layer_norm",
    ),
)
masked(
    "deberta",
    "DebertaForMaskedLM",
    lambda d: bert_like(
        d, relative_attention=True, pos_att_type=["p2c", "c2p"], max_relative_positions=16
    ),
)
masked("mpnet", "MPNetForMaskedLM", bert_like)
masked("xlm-roberta-xl", "XLMRobertaXLForMaskedLM", bert_like)
masked("camembert", "CamembertForMaskedLM", bert_like)
masked("roformer", "RoFormerForMaskedLM", lambda d: bert_like(d, embedding_size=d.hidden))
masked("ernie", "ErnieForMaskedLM", bert_like)
masked(
    "esm",
    "EsmForMaskedLM",
    lambda d: bert_like(d, position_embedding_type="rotary", mask_token_id=3, token_dropout=False),
)
masked(
    "modernbert",
    "ModernBertForMaskedLM",
    lambda d: llama_like(
        d, embedding_dropout=0.0, mlp_dropout=0.0, local_attention=4, global_attn_every_n_layers=2
    ),
)
masked(
    "squeezebert",
    "SqueezeBertForMaskedLM",
    lambda d: bert_like(
        d, num_attention_heads=4, hidden_size=32, embedding_size=32, intermediate_size=80
    ),
)
masked("fnet", "FNetForMaskedLM", bert_like)
masked(
    "xlnet",
    "XLNetLMHeadModel",
    lambda d: {
        "vocab_size": d.vocab,
        "d_model": d.hidden,
        "n_head": d.heads,
        "n_layer": 2,
        "d_inner": d.ffn,
        "dropout": 0.0,
    },
    use_mems=False,
)

two_sided("bart", "BartForConditionalGeneration", bart_like)
two_sided("marian", "MarianMTModel", lambda d: bart_like(d, share_encoder_decoder_embeddings=True))
two_sided("pegasus", "PegasusForConditionalGeneration", bart_like)
two_sided("mbart", "MBartForConditionalGeneration", bart_like)
two_sided("blenderbot", "BlenderbotForConditionalGeneration", bart_like)
two_sided("m2m-100", "M2M100ForConditionalGeneration", bart_like)
two_sided("mt5", "MT5ForConditionalGeneration", t5_like)
two_sided("umt5", "UMT5ForConditionalGeneration", t5_like)
two_sided(
    "longt5",
    "LongT5ForConditionalGeneration",
    lambda d: t5_like(d, encoder_attention_type="local", local_radius=3),
)


def whisper_like(draw: Draw) -> dict[str, Any]:
    return bart_like(
        draw,
        num_mel_bins=8,
        max_source_positions=6,
        max_target_positions=40,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )


@family("whisper", "transformers")
def whisper(draw: Draw) -> Case:
    """Its own ``generate`` wants audio and special tokens: greedy by hand."""
    model = pretrained(draw, "WhisperForConditionalGeneration", **whisper_like(draw))
    sound, ids = draw.values(2, 8, 12), draw.ids()

    def step(dense: Any, seen: Tensor) -> Any:
        return dense(input_features=sound.clone(), decoder_input_ids=seen)

    inputs = {"input_features": sound, "decoder_input_ids": ids}
    return Case(model, inputs, greedy=greedy_loop(ids[:, :3], step))


def clip_parts(draw: Draw) -> tuple[dict[str, Any], dict[str, Any]]:
    words = bert_like(draw, projection_dim=9, attention_dropout=0.0)
    sight = vision(draw, projection_dim=9, attention_dropout=0.0)
    return words, sight


@family("clip", "transformers")
def clip(draw: Draw) -> Case:
    words, sight = clip_parts(draw)
    settings = {"text_config": words, "vision_config": sight, "projection_dim": 9}
    model = pretrained(draw, "CLIPModel", **settings)
    inputs = {"input_ids": draw.ids(), "pixel_values": draw.values(2, 3, 12, 12)}
    return Case(model, inputs, output=lambda out: out.logits_per_text)


masked("clip-text", "CLIPTextModelWithProjection", lambda d: clip_parts(d)[0])
image("clip-vision", "CLIPVisionModelWithProjection", lambda d: clip_parts(d)[1])
image("siglip-vision", "SiglipVisionModel", lambda d: clip_parts(d)[1])
image("deit", "DeiTForImageClassification", vision)
image(
    "beit",
    "BeitForImageClassification",
    lambda d: vision(
        d,
        use_relative_position_bias=True,
        use_mask_token=False,
        drop_path_rate=0.0,
        layer_scale_init_value=0.1,
    ),
)
image(
    "dinov2",
    "Dinov2ForImageClassification",
    lambda d: vision(d, mlp_ratio=3, drop_path_rate=0.0, use_swiglu_ffn=d.coin()),
)
image(
    "dinov3",
    "DINOv3ViTModel",
    lambda d: vision(
        d, drop_path_rate=0.0, num_register_tokens=2, use_gated_mlp=d.coin(), pos_embed_rescale=None
    ),
)
image("ijepa", "IJepaForImageClassification", vision)
image("vit-msn", "ViTMSNForImageClassification", vision)
image(
    "swin",
    "SwinForImageClassification",
    lambda d: {
        "image_size": 16,
        "patch_size": 2,
        "embed_dim": 4 * d.head_dim,
        "depths": [2, 2],
        "num_heads": [4, 8],
        "window_size": 4,
        "mlp_ratio": 3.0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "num_labels": 11,
    },
    size=16,
)
image(
    "segformer",
    "SegformerForImageClassification",
    lambda d: {
        "depths": [1, 1],
        "num_encoder_blocks": 2,
        "sr_ratios": [2, 1],
        "hidden_sizes": [16, 4 * d.head_dim],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "num_attention_heads": [2, 4],
        "mlp_ratios": [3, 3],
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "num_labels": 11,
    },
    size=24,
)
image(
    "sam-vision",
    "SamVisionModel",
    lambda d: vision(
        d,
        image_size=16,
        mlp_dim=d.ffn,
        output_channels=8,
        window_size=2,
        global_attn_indexes=[1],
        use_rel_pos=True,
        use_abs_pos=True,
    ),
    size=16,
)


@family("wav2vec2", "transformers")
def wav2vec2(draw: Draw) -> Case:
    """Convolutions over sound, positions by a grouped convolution."""
    settings = bert_like(
        draw,
        conv_dim=(8, 8),
        conv_stride=(3, 2),
        conv_kernel=(5, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=1,
        feat_proj_dropout=0.0,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        final_dropout=0.0,
        layerdrop=0.0,
        apply_spec_augment=False,
        do_stable_layer_norm=draw.coin(),
    )
    model = pretrained(draw, "Wav2Vec2ForCTC", **settings)
    return Case(model, {"input_values": draw.values(2, 90)})
