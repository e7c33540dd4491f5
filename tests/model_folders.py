"""Tiny random models of many transformers families, by class name; nothing is downloaded."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

VOCAB = 97  # prime: no world size divides it
_lock = threading.Lock()  # thread ranks share torch's generator

_TEXT = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
_DECODER = _TEXT | {
    "hidden_size": 48,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "intermediate_size": 70,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
}
_ENCODER = {k: v for k, v in _DECODER.items() if k not in ("head_dim", "num_key_value_heads")}
_GEMMA = _DECODER | {"hidden_activation": "gelu_pytorch_tanh"}
_SLIDING = _GEMMA | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_GPT2 = _TEXT | {"n_embd": 48, "n_head": 8, "n_layer": 2, "n_positions": 64, "n_inner": 70}
_BART = {
    "vocab_size": VOCAB,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 70,
    "decoder_ffn_dim": 70,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 48,
    "d_kv": 8,
    "d_ff": 70,
    "num_layers": 2,
    "num_heads": 6,
    "pad_token_id": 0,
    "eos_token_id": None,
    "decoder_start_token_id": 0,
}
_IMAGE = {"image_size": 8, "patch_size": 4, "num_channels": 3}
_VISION = _IMAGE | {
    "hidden_size": 48,
    "num_attention_heads": 4,
    "intermediate_size": 70,
    "num_hidden_layers": 2,
}
_CLIP = {
    "text_config": _ENCODER | {"projection_dim": 16, "eos_token_id": 2},
    "vision_config": _VISION | {"projection_dim": 16},
    "projection_dim": 16,
}
_LABELS = {"num_labels": 3}


@dataclass(frozen=True)
class Family:
    """How one model is made: its class's name, its config's, and the settings that make it tiny."""

    config: str
    settings: dict[str, Any]
    inputs: str = "text"
    ranks: tuple[int, ...] = field(default=())  # worlds in which it can be cut


FAMILIES = {
    "LlamaForCausalLM": Family("LlamaConfig", _DECODER, ranks=(2, 3)),
    "MistralForCausalLM": Family("MistralConfig", _DECODER | {"sliding_window": 4}, ranks=(2, 3)),
    "Qwen2ForCausalLM": Family("Qwen2Config", _DECODER, ranks=(2, 3)),
    "Qwen3ForCausalLM": Family("Qwen3Config", _DECODER, ranks=(2, 3)),
    "GemmaForCausalLM": Family("GemmaConfig", _GEMMA, ranks=(2, 3)),
    "Gemma2ForCausalLM": Family("Gemma2Config", _SLIDING, ranks=(2, 3)),
    "Gemma3ForCausalLM": Family("Gemma3TextConfig", _SLIDING, ranks=(2, 3)),
    "LlamaModel": Family("LlamaConfig", _DECODER, ranks=(2, 3)),
    "LlamaForSequenceClassification": Family("LlamaConfig", _DECODER | _LABELS, ranks=(2, 3)),
    "Phi3ForCausalLM": Family("Phi3Config", _DECODER, ranks=(2, 3)),
    "Olmo2ForCausalLM": Family("Olmo2Config", _DECODER, ranks=(2, 3)),
    "MixtralForCausalLM": Family(
        "MixtralConfig",
        _DECODER | {"intermediate_size": 72, "num_local_experts": 3, "num_experts_per_tok": 2},
    ),
    "GPT2LMHeadModel": Family("GPT2Config", _GPT2, ranks=(2, 3)),
    "GPTJForCausalLM": Family("GPTJConfig", _GPT2 | {"rotary_dim": 4}, ranks=(2, 3)),
    "GPTNeoXForCausalLM": Family("GPTNeoXConfig", _ENCODER, ranks=(2, 3)),
    "OPTForCausalLM": Family(
        "OPTConfig", _ENCODER | {"ffn_dim": 70, "word_embed_proj_dim": 48}, ranks=(2, 3)
    ),
    "BloomForCausalLM": Family(
        "BloomConfig", _TEXT | {"hidden_size": 48, "n_head": 8, "n_layer": 2}
    ),
    "FalconForCausalLM": Family("FalconConfig", _ENCODER, ranks=(2, 3)),
    "BertModel": Family("BertConfig", _ENCODER),
    "BertForMaskedLM": Family("BertConfig", _ENCODER, ranks=(2, 3)),
    "BertForSequenceClassification": Family("BertConfig", _ENCODER | _LABELS),
    "RobertaForMaskedLM": Family("RobertaConfig", _ENCODER, ranks=(2, 3)),
    "DistilBertForTokenClassification": Family(
        "DistilBertConfig",
        _TEXT | _LABELS | {"dim": 48, "n_heads": 4, "n_layers": 2, "hidden_dim": 70},
    ),
    "ElectraForPreTraining": Family("ElectraConfig", _ENCODER | {"embedding_size": 24}),
    "AlbertForMaskedLM": Family("AlbertConfig", _ENCODER | {"embedding_size": 24}, ranks=(2, 3)),
    "DebertaV2Model": Family("DebertaV2Config", _ENCODER),
    "T5ForConditionalGeneration": Family("T5Config", _T5, "pair", ranks=(2, 3)),
    "T5EncoderModel": Family("T5Config", _T5),
    "MT5ForConditionalGeneration": Family(
        "MT5Config", _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, "pair"
    ),
    "BartForConditionalGeneration": Family("BartConfig", _BART, "pair", ranks=(2, 3)),
    "MarianMTModel": Family("MarianConfig", _BART, "pair"),
    "ViTForImageClassification": Family("ViTConfig", _VISION | _LABELS, "image", ranks=(2, 3)),
    "DeiTModel": Family("DeiTConfig", _VISION, "image"),
    "Dinov2Model": Family("Dinov2Config", _VISION, "image"),
    "BeitForImageClassification": Family("BeitConfig", _VISION | _LABELS, "image"),
    "CLIPModel": Family("CLIPConfig", _CLIP, "both", ranks=(2, 3)),
    "CLIPVisionModel": Family("CLIPVisionConfig", _VISION, "image"),
    "SiglipModel": Family("SiglipConfig", _CLIP, "both"),
    "ConvNextForImageClassification": Family(
        "ConvNextConfig",
        {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "image_size": 32} | _LABELS,
        "image",
    ),
    "SwinForImageClassification": Family(
        "SwinConfig",
        _LABELS
        | {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 2]}
        | {"num_heads": [2, 2], "window_size": 2},
        "image",
    ),
    "WhisperForConditionalGeneration": Family(
        "WhisperConfig",
        _BART | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32},
        "audio",
    ),
    "Wav2Vec2ForCTC": Family(
        "Wav2Vec2Config",
        _ENCODER
        | {"conv_dim": [16, 16], "conv_kernel": [4, 4], "conv_stride": [2, 2]}
        | {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
        "wave",
    ),
}


def settings_of(name: str) -> dict[str, Any]:
    """Settings of a family as its config takes them."""
    return dict(FAMILIES[name].settings)


def make(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The dense model, the same on every call, in eval mode."""
    family = FAMILIES[name]
    with _lock:
        torch.manual_seed(0)
        config = getattr(transformers, family.config)(**(family.settings | changes))
        model = getattr(transformers, name)._from_config(config, dtype=dtype).eval()
        with torch.no_grad():  # biases and norms are not told apart by their first values
            for path, parameter in model.named_parameters():
                if path in (model._keys_to_ignore_on_save or ()):
                    continue
                parameter.add_(torch.randn(parameter.shape, dtype=torch.float32).to(dtype) * 0.02)
    return model


def inputs(name: str) -> dict[str, Tensor]:
    """Arguments of one forward pass."""
    generator = torch.Generator().manual_seed(1)
    kind = FAMILIES[name].inputs
    found: dict[str, Tensor] = {}
    if kind in ("text", "pair", "both"):
        found["input_ids"] = torch.randint(3, VOCAB, (2, 7), generator=generator)
    if kind in ("pair", "audio"):
        found["decoder_input_ids"] = torch.randint(3, VOCAB, (2, 5), generator=generator)
    if kind in ("image", "both"):
        side = FAMILIES[name].settings.get("image_size", 8)
        found["pixel_values"] = torch.randn(2, 3, side, side, generator=generator)
    if kind == "audio":
        found["input_features"] = torch.randn(2, 8, 32, generator=generator)
    if kind == "wave":
        found["input_values"] = torch.randn(2, 96, generator=generator)
    return found


def outputs(model: Any, name: str) -> list[Tensor]:
    """Floating-point tensors of one forward pass, in order."""
    with torch.no_grad():
        found = model(**inputs(name))
    values = [v for v in found.to_tuple() if isinstance(v, Tensor) and v.is_floating_point()]
    assert values, name
    return values
