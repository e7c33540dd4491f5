"""Text generation that is the same on every rank by construction: rank 0 chooses, all follow."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .agreement import agreed, check_same
from .errors import TensorParallelError
from .state import ParallelState, state_of, unwrap

_FAILED = -1  # broadcast instead of token ids when rank 0 could not choose


@dataclass(frozen=True)
class _Sampling:
    """How rank 0 picks a token from logits."""

    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    seed: int


@dataclass(frozen=True)
class _Ends:
    """The ids that end a row, and the id that fills it afterwards."""

    eos: tuple[int, ...]
    pad: int


def generate(
    model: nn.Module,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_token_id: int | Sequence[int] | None = None,
    on_token: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """Continue ``input_ids`` by up to ``max_new_tokens`` tokens; greedy unless ``do_sample``.

    Shapes: ``input_ids`` and ``attention_mask`` ``(batch, tokens)``, integer ids and 0/1, shorter
    prompts padded on the left; returns int64 ``(batch, tokens + new)``: the prompt and what
    follows. Works on dense transformers models, parallelized ones and `DistributedModelWrapper`;
    collective for the latter two, and called with the same arguments on every rank.

    A row stops at an id of ``eos_token_id`` (default: the model's generation config; ``[]``:
    never) and is filled with the pad id, or eos, from there on. ``top_k`` 0 and ``top_p`` 1 are
    off; ``seed`` makes sampling repeatable. ``on_token`` gets each step's ids, ``(batch,)``.
    Raises: ValueError, on every rank alike, for arguments out of range, a prompt that leaves no
    room before ``max_position_embeddings``, ids outside the vocabulary, or ranks that disagree.
    """
    state = state_of(model)
    inner = unwrap(model)
    with _in_step(state):
        config = _text_config(inner)
        ids = _check_ids(config, input_ids, max_new_tokens)
        mask = _check_mask(ids, attention_mask)
        sampling = _Sampling(do_sample, temperature, top_k, top_p, seed)
        _check_sampling(sampling)
        ends = _ends(inner, eos_token_id)
    if state is not None:
        said = repr((ids.tolist(), max_new_tokens, mask, sampling, ends)).encode()
        digest = int.from_bytes(hashlib.sha256(said).digest()[:8], "little") >> 1
        check_same(state.group, digest, "arguments of generate")
    with torch.inference_mode():
        return _decode(inner, state, ids, mask, max_new_tokens, sampling, ends, on_token)


def _decode(
    model: nn.Module,
    state: ParallelState | None,
    ids: Tensor,
    mask: Tensor | None,
    max_new_tokens: int,
    sampling: _Sampling,
    ends: _Ends,
    on_token: Callable[[Tensor], object] | None,
) -> Tensor:
    from transformers import DynamicCache

    device = next(model.parameters()).device
    ids = ids.to(device)
    mask = mask.to(device) if mask is not None else None
    generator = torch.Generator(device).manual_seed(sampling.seed)
    stops = torch.tensor(ends.eos, dtype=torch.int64, device=device)
    cache = DynamicCache(config=_text_config(model))
    forward = _forward(model)
    running = torch.ones(ids.shape[0], dtype=torch.bool, device=device)
    tokens, step = ids, ids
    for _ in range(max_new_tokens):
        logits = forward(step, mask, tokens.shape[1], cache)
        chosen = _agree_on_token(state, logits, sampling, generator)
        chosen = torch.where(running, chosen, ends.pad)
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
        if on_token is not None:
            on_token(chosen.clone())
        running &= ~torch.isin(chosen, stops)
        if not running.any():
            break
        step = chosen[:, None]
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
    # A normal tensor: one made in inference mode can't be used in training later.
    with torch.inference_mode(False):
        return tokens.clone()


def _forward(model: nn.Module) -> Callable[[Tensor, Tensor | None, int, Any], Tensor]:
    """One step of the model: the last position's logits in fp32, ``(batch, vocab)``."""
    accepted = inspect.signature(model.forward).parameters

    def run(step: Tensor, mask: Tensor | None, length: int, cache: Any) -> Tensor:
        if mask is None:
            positions = torch.arange(length - step.shape[1], length, device=step.device)[None]
        else:
            positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -step.shape[1] :]
        options: dict[str, Any] = {"position_ids": positions, "logits_to_keep": 1}
        options = {name: value for name, value in options.items() if name in accepted}
        out = model(
            input_ids=step,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **options,
        )
        logits: Tensor = out.logits[:, -1]
        return logits.float()

    return run


def _agree_on_token(
    state: ParallelState | None, logits: Tensor, sampling: _Sampling, generator: torch.Generator
) -> Tensor:
    """Rank 0's choice, on every rank."""
    if state is None:
        return _choose(logits, sampling, generator)
    chosen = torch.full((logits.shape[0],), _FAILED, dtype=torch.int64, device=logits.device)
    failure: Exception | None = None
    if state.group.rank == 0:
        try:
            chosen = _choose(logits, sampling, generator)
        except Exception as error:
            failure = error
    state.group.broadcast_(chosen, 0)
    if chosen.numel() and int(chosen[0]) == _FAILED:
        raise failure or TensorParallelError("rank 0 could not choose a token; its error says why")
    return chosen


def _choose(logits: Tensor, sampling: _Sampling, generator: torch.Generator) -> Tensor:
    """One id per row. Source for the order of filters: transformers, ``generation/utils.py``."""
    if logits.isnan().any():
        raise TensorParallelError("the model's logits are NaN: a weight or an input is not finite")
    if not sampling.do_sample:
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        drop = before >= sampling.top_p  # the first token that crosses top_p stays
        logits = logits.masked_fill(drop.scatter(1, order, drop), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def _in_step(state: ParallelState | None) -> ExitStack:
    """A block whose error every rank raises alike."""
    stack = ExitStack()
    if state is not None:
        stack.enter_context(agreed(state.group))
    return stack


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    can_generate = getattr(model, "can_generate", None)
    is_decoder = can_generate() if callable(can_generate) else hasattr(config, "vocab_size")
    if not is_decoder or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"generate needs a transformers causal language model, got {type(model).__name__}"
            + ("; call its own .generate on all ranks" if is_decoder else "")
        )
    return config


def _check_ids(config: Any, input_ids: Tensor, max_new_tokens: int) -> Tensor:
    if not isinstance(input_ids, Tensor):
        raise ValueError(
            f"input_ids must be a Tensor, got {type(input_ids).__name__}; wrap the ids in "
            "torch.tensor([ids])"
        )
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids must be int64 or int32, got {input_ids.dtype}")
    if input_ids.dim() != 2:
        raise ValueError(
            f"input_ids must be (batch, tokens), got shape {tuple(input_ids.shape)}; "
            "unsqueeze(0) makes one prompt a batch"
        )
    if input_ids.numel() == 0:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}: an empty prompt; start with the bos id"
        )
    _check_int("max_new_tokens", max_new_tokens, 1, None)
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"input_ids go from {low} to {high}, but the vocabulary is 0 to "
            f"{config.vocab_size - 1}; the tokenizer belongs to another model, perhaps"
        )
    limit = getattr(config, "max_position_embeddings", None)
    length = input_ids.shape[1]
    if isinstance(limit, int) and length + max_new_tokens > limit:
        raise ValueError(
            f"prompt of {length} tokens and max_new_tokens {max_new_tokens} make "
            f"{length + max_new_tokens}, more than the model's max_position_embeddings {limit}; "
            f"shorten the prompt or pass max_new_tokens <= {max(0, limit - length)}"
        )
    return input_ids.to(torch.int64)


def _check_mask(ids: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask as int64, or None if nothing is masked."""
    if mask is None:
        return None
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, expected {tuple(ids.shape)}, that of "
            "input_ids"
        )
    whole = mask.to(torch.int64)
    if not bool(((whole == 0) | (whole == 1)).all()):
        raise ValueError("attention_mask must hold 0 (padding) and 1 (token) only")
    if not bool((whole[:, 1:] >= whole[:, :-1]).all()) or not bool(whole[:, -1].all()):
        raise ValueError(
            "attention_mask must be zeros, then ones in every row: pad prompts on the left "
            "(tokenizer.padding_side = 'left') and leave none empty"
        )
    return None if bool(whole.all()) else whole


def _check_sampling(sampling: _Sampling) -> None:
    if not _is_number(sampling.temperature) or not 0 < sampling.temperature < math.inf:
        raise ValueError(
            f"temperature must be a finite number above 0, got {sampling.temperature!r}; for the "
            "most likely token leave do_sample=False"
        )
    if not _is_number(sampling.top_p) or not 0 < sampling.top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1 (off), got {sampling.top_p!r}")
    _check_int("top_k", sampling.top_k, 0, None)
    _check_int("seed", sampling.seed, 0, 2**63 - 1)


def _check_int(what: str, value: object, low: int, high: int | None) -> None:
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= low
    if not fits or (high is not None and isinstance(value, int) and value > high):
        until = f" to {high}" if high is not None else " or more"
        raise ValueError(f"{what} must be an int, {low}{until}, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _ends(model: nn.Module, eos_token_id: int | Sequence[int] | None) -> _Ends:
    settings = getattr(model, "generation_config", None)
    if eos_token_id is None:
        eos_token_id = getattr(settings, "eos_token_id", None)
    if eos_token_id is None:
        eos_token_id = ()
    eos = (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
    for token in eos:
        _check_int("eos_token_id", token, 0, None)
    pad = getattr(settings, "pad_token_id", None)
    return _Ends(eos, pad if isinstance(pad, int) else (eos[0] if eos else 0))
