"""Tiny random transformers models, the same on every call; nothing is downloaded."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

VOCAB = 97  # prime: no world size divides it
_lock = threading.Lock()  # thread ranks share torch's generator and default dtype


def llama(tied: bool = False, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A two-layer Llama, 8 heads in 4 key/value groups, an odd intermediate width."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "intermediate_size": 70,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    with _lock:
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**(settings | changes))).to(dtype).eval()


def qwen3(tied: bool = False, **changes: Any) -> Any:
    """As `llama`, with norms inside the heads, whose gradients must be summed over ranks."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "intermediate_size": 70,
        "num_hidden_layers": 2,
        "tie_word_embeddings": tied,
        "attention_bias": True,
    }
    with _lock:
        torch.manual_seed(0)
        return Qwen3ForCausalLM(Qwen3Config(**(settings | changes))).eval()


def tokens(batch: int = 2, length: int = 7) -> Tensor:
    """Token ids ``(batch, length)``, none of them the pad id."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, VOCAB, (batch, length), generator=generator)


def relative(actual: Tensor, expected: Tensor) -> float:
    """``max|actual - expected| / max|expected|``."""
    return float((actual - expected).abs().max() / expected.abs().max())


def save(model: Any, folder: Path, **options: Any) -> Path:
    """Save with transformers' own writer."""
    model.save_pretrained(folder, **options)
    return folder


def same_state(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert torch.equal(ours[name], value), name
