"""The families that must work, whatever their sizes."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

import tp_native as tp
from families import NEW_TOKENS, Case, Draw, family, greedy_loop
from nanogpt_model import GPT, GPTConfig


def pretrained(draw: Draw, kind: str, **settings: Any) -> Any:
    """A model of transformers from its config's settings, with the attention that was drawn."""
    cls = getattr(transformers, kind)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = cls.config_class(**(ends | settings))
    kind_of_attention = draw.attention
    if not getattr(cls, "_supports_sdpa", False):
        kind_of_attention = "eager"
    model = cls._from_config(config, attn_implementation=kind_of_attention)
    model.train(draw.seed % 4 >= 2)
    return model


def text(draw: Draw, model: Any, vocab: int | None = None) -> Case:
    """A decoder that continues two prompts."""
    ids = draw.ids(vocab=vocab)
    return Case(model, {"input_ids": ids}, greedy=generated(ids[:, :5]))


def text_of_both(draw: Draw, model: Any) -> Case:
    """As `text`; the tokens of `tp_native.generate`, behind a padded prompt, follow the others."""
    case = text(draw, model)
    greedy, prompt = case.greedy, draw.ids()[:, :6]
    mask = torch.ones_like(prompt)
    mask[1, :2] = 0

    def run(dense: Any) -> Tensor:
        assert greedy is not None
        theirs = greedy(dense)
        was_training = dense.training
        dense.eval()
        ours = tp.generate(dense, prompt, NEW_TOKENS, attention_mask=mask, eos_token_id=[])
        dense.train(was_training)
        return torch.cat([theirs, ours], 1)

    return Case(model, case.inputs, greedy=run)


def generated(prompt: Tensor, **options: Any) -> Any:
    """transformers' own greedy ``generate``, which here never meets its end."""

    def run(model: Any) -> Tensor:
        model.generation_config.eos_token_id = None
        was_training = model.training
        model.eval()
        tokens: Tensor = model.generate(
            prompt.clone(),
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            **options,
        )
        model.train(was_training)
        return tokens

    return run


def llama_like(draw: Draw, **changes: Any) -> dict[str, Any]:
    """The names that Llama and all after it use."""
    settings: dict[str, Any] = {
        "vocab_size": draw.vocab,
        "hidden_size": draw.hidden,
        "num_attention_heads": draw.heads,
        "num_key_value_heads": draw.kv_heads,
        "intermediate_size": draw.ffn,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": draw.coin(),
        "attention_dropout": 0.0,
    }
    return settings | changes


def free_width(draw: Draw) -> dict[str, int]:
    """A hidden size that is not heads x head_dim, though Llama's config wants it divisible."""
    return {"hidden_size": draw.heads * draw.one_of(3, 5, 6), "head_dim": draw.head_dim}


@family("llama", "bar")
def llama(draw: Draw) -> Case:
    bias = {"attention_bias": draw.coin(), "mlp_bias": draw.coin()}
    settings = llama_like(draw, **free_width(draw), **bias)
    return text_of_both(draw, pretrained(draw, "LlamaForCausalLM", **settings))


@family("mistral", "bar")
def mistral(draw: Draw) -> Case:
    settings = llama_like(draw, **free_width(draw), sliding_window=draw.one_of(None, 4))
    return text_of_both(draw, pretrained(draw, "MistralForCausalLM", **settings))


@family("qwen2", "bar")
def qwen2(draw: Draw) -> Case:
    return text_of_both(draw, pretrained(draw, "Qwen2ForCausalLM", **llama_like(draw)))


@family("qwen3", "bar")
def qwen3(draw: Draw) -> Case:
    settings = llama_like(draw, **free_width(draw), attention_bias=draw.coin())
    return text_of_both(draw, pretrained(draw, "Qwen3ForCausalLM", **settings))


@family("gemma", "bar")
def gemma(draw: Draw) -> Case:
    settings = llama_like(draw, **free_width(draw))
    return text_of_both(draw, pretrained(draw, "GemmaForCausalLM", **settings))


@family("gpt2", "bar")
def gpt2(draw: Draw) -> Case:
    settings = {
        "vocab_size": draw.vocab,
        "n_embd": draw.hidden,
        "n_head": draw.heads,
        "n_layer": 2,
        "n_inner": draw.one_of(None, draw.ffn),
        "n_positions": 32,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "scale_attn_by_inverse_layer_idx": draw.coin(),
    }
    return text_of_both(draw, pretrained(draw, "GPT2LMHeadModel", **settings))


@family("nanogpt", "bar")
def nanogpt(draw: Draw) -> Case:
    config = GPTConfig(
        block_size=16,
        vocab_size=draw.vocab,
        n_head=draw.heads,
        n_embd=draw.hidden,
        bias=draw.coin(),
    )
    ids = draw.ids()

    def run(model: Any) -> Tensor:
        return model.generate(ids[:, :5].clone(), NEW_TOKENS)

    # without targets, the original gives the last position only; here all are compared
    return Case(GPT(config), {"idx": ids, "targets": ids.roll(-1, 1)}, greedy=run)


def encoder(draw: Draw, **changes: Any) -> nn.TransformerEncoder:
    options: dict[str, Any] = {
        "d_model": draw.hidden,
        "nhead": draw.heads,
        "dim_feedforward": draw.ffn,
        "dropout": 0.0,
        "activation": draw.one_of("relu", "gelu"),
        "batch_first": True,
        "norm_first": False,
    }
    layer = nn.TransformerEncoderLayer(**(options | changes))
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@family("transformer-encoder", "bar")
def transformer_encoder(draw: Draw) -> Case:
    model = encoder(draw, norm_first=draw.coin(), batch_first=draw.coin())
    return Case(model, {"src": draw.values(3, 5, draw.hidden)})


@family("transformer-encoder-masked", "bar")
def transformer_encoder_masked(draw: Draw) -> Case:
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    inputs = {"src": draw.values(3, 5, draw.hidden), "src_key_padding_mask": padding}
    return Case(encoder(draw, norm_first=draw.coin()), {**inputs, "mask": causal})


@family("transformer-encoder-eval", "bar")
def transformer_encoder_eval(draw: Draw) -> Case:
    """In eval mode without gradients PyTorch takes one fused kernel for a whole layer."""
    model = encoder(draw, norm_first=draw.coin()).eval()
    return Case(model, {"src": draw.values(3, 5, draw.hidden)}, has_gradients=False)


@family("vit", "bar")
def vit(draw: Draw) -> Case:
    model = pretrained(draw, "ViTForImageClassification", **vision(draw))
    return Case(model, {"pixel_values": draw.values(2, 3, 12, 12)})


def vision(draw: Draw, **changes: Any) -> dict[str, Any]:
    """The names that ViT and its kin use."""
    settings: dict[str, Any] = {
        "image_size": 12,
        "patch_size": 4,
        "hidden_size": draw.hidden,
        "num_attention_heads": draw.heads,
        "intermediate_size": draw.ffn,
        "num_hidden_layers": 2,
        "num_labels": 11,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "qkv_bias": draw.coin(),
    }
    return settings | changes


@family("t5", "bar")
def t5(draw: Draw) -> Case:
    return encoder_decoder(draw, pretrained(draw, "T5ForConditionalGeneration", **t5_like(draw)))


def t5_like(draw: Draw, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "vocab_size": draw.vocab,
        "d_model": 2 * draw.rng.randrange(12, 24),
        "d_kv": draw.head_dim,
        "d_ff": draw.ffn,
        "num_heads": draw.heads,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 16,
        "feed_forward_proj": draw.one_of("relu", "gated-gelu"),
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
        "tie_word_embeddings": draw.coin(),
    }
    return settings | changes


def encoder_decoder(draw: Draw, model: Any, length: int = 7) -> Case:
    ids = draw.ids(length=length)
    inputs = {"input_ids": ids, "decoder_input_ids": ids.flip(1)[:, :5]}
    return Case(model, inputs, greedy=generated(ids))


@family("sequential", "bar")
def sequential(draw: Draw) -> Case:
    """A chain of Linears, one to five deep."""
    return chain(draw, draw.rng.randrange(1, 6))


@family("sequential-deep", "bar")
def sequential_deep(draw: Draw) -> Case:
    return chain(draw, 6)


@family("sequential-nested", "bar")
def sequential_nested(draw: Draw) -> Case:
    width = draw.hidden
    blocks = [
        nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, draw.ffn, bias=draw.coin()),
            activation(draw),
            nn.Dropout(0.0),
            nn.Linear(draw.ffn, width),
        )
        for _ in range(2)
    ]
    head = nn.Sequential(nn.RMSNorm(width, 1e-6), nn.Linear(width, 13))
    return Case(nn.Sequential(*blocks, head), {"input": draw.values(2, 3, width)})


@family("sequential-text", "bar")
def sequential_text(draw: Draw) -> Case:
    """The smallest language model: embedding, MLP, head."""
    model = nn.Sequential(
        nn.Embedding(draw.vocab, draw.hidden),
        nn.Linear(draw.hidden, draw.ffn),
        activation(draw),
        nn.Linear(draw.ffn, draw.hidden),
        nn.LayerNorm(draw.hidden),
        nn.Linear(draw.hidden, draw.vocab, bias=False),
    )
    ids = draw.ids()
    return Case(model, {"input": ids}, greedy=greedy_loop(ids[:, :5], lambda m, seen: m(seen)))


def activation(draw: Draw) -> nn.Module:
    module: nn.Module = draw.one_of(nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.ELU)()
    return module


def chain(draw: Draw, depth: int) -> Case:
    widths = [draw.rng.randrange(9, 40) for _ in range(depth + 1)]
    layers: list[nn.Module] = []
    for i in range(depth):
        layers.append(nn.Linear(widths[i], widths[i + 1], bias=draw.coin()))
        if i < depth - 1:
            layers.append(activation(draw))
    return Case(nn.Sequential(*layers), {"input": draw.values(5, widths[0])})
