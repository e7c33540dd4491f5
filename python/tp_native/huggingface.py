"""What a parallelized transformers model does under transformers' own names: right, or refused.

Nothing here imports transformers: a model that has its methods brought it along.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .agreement import agreed, check_same
from .checkpoint.writer import parse_bytes, save_pretrained
from .errors import TensorParallelError
from .group import Group
from .guards import fingerprint
from .nn import mark_of

T = TypeVar("T")

_DENSE_FIRST = "do it to the dense model, then parallelize that"
_NO_BATCHER = "its cache has all key/value heads, a rank has its own; use generate"
# What would silently be wrong on this rank's share of a model, and what to do instead.
_REFUSED = {
    "resize_token_embeddings": _DENSE_FIRST,
    "resize_position_embeddings": _DENSE_FIRST,
    "prune_heads": _DENSE_FIRST,
    "init_weights": _DENSE_FIRST,
    "initialize_weights": _DENSE_FIRST,
    "push_to_hub": "save_pretrained to a folder on all ranks, then upload that from one of them",
    "add_adapter": "use tp.add_lora",
    "load_adapter": "use tp.load_lora",
    "generate_batch": _NO_BATCHER,
    "init_continuous_batching": _NO_BATCHER,
    "continuous_batching_context_manager": _NO_BATCHER,
}
_FAILED = -1  # broadcast instead of token ids when rank 0 could not draw


def attach(model: nn.Module, group: Group) -> None:
    """Give every transformers model in ``model`` methods that know of ``group``. Its class, config
    and keys stay.
    """
    for module in model.modules():
        if callable(getattr(type(module), "save_pretrained", None)):
            _attach(module, group)


def _attach(model: nn.Module, group: Group) -> None:
    own = model.__dict__

    def bind(name: str, method: Callable[..., Any]) -> None:
        if hasattr(model, name):
            own[name] = MethodType(method, model)

    # transformers' own would write this rank's share as if it were the model.
    bind("save_pretrained", _of(group, _save_pretrained))
    bind("num_parameters", _num_parameters)
    # The static cache then takes its heads from the first keys it sees, not from the config.
    bind("_get_static_cache_init_shape", _no_early_shape)
    for name, advice in _REFUSED.items():
        bind(name, _refusal(name, advice))
    theirs = getattr(type(model), "generate", None)
    if callable(theirs):  # with their signature and documentation
        bind("generate", functools.update_wrapper(_of(group, _generate), theirs))


def _of(group: Group, method: Callable[..., T]) -> Callable[..., T]:
    """``method(model, group, ...)`` as a method."""

    def bound(model: nn.Module, *args: Any, **kwargs: Any) -> T:
        return method(model, group, *args, **kwargs)

    bound.__name__, bound.__doc__ = method.__name__, method.__doc__
    return bound


def _refusal(name: str, advice: str) -> Callable[..., Any]:
    def refused(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        is_question = name == "resize_token_embeddings" and not any((*args, *kwargs.values()))
        if is_question:  # asked for the embeddings as they are
            return model.get_input_embeddings()  # type: ignore[operator]
        raise TensorParallelError(
            f"{name} is refused on a parallelized {type(model).__name__}, of which this rank holds "
            f"a share: {advice}"
        )

    return refused


def _save_pretrained(
    model: nn.Module,
    group: Group,
    save_directory: str,
    *,
    max_shard_size: int | str = "5GB",
    **options: Any,
) -> None:
    """`tp_native.save_pretrained` under the name and options that transformers' users know."""
    known = inspect.signature(type(model).save_pretrained).parameters  # type: ignore[attr-defined]
    usual = {name: known[name].default for name in options if name in known}
    free = ("is_main_process", "save_peft_format")  # rank 0 writes; adapters are refused there
    odd = {n: v for n, v in options.items() if n not in free and (n, v) not in usual.items()}
    if odd:
        raise ValueError(
            f"save_pretrained of a parallelized model does not take {odd}; call it on all ranks "
            "with the folder and, if you like, max_shard_size"
        )
    save_pretrained(model, save_directory, max_shard_bytes=parse_bytes(max_shard_size), group=group)


def _num_parameters(
    model: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False
) -> int:
    """The dense model's number of parameters."""
    whole = 0
    embeddings = model.get_input_embeddings() if exclude_embeddings else None  # type: ignore[operator]
    skipped = {id(p) for p in embeddings.parameters()} if embeddings is not None else set()
    skipped |= {
        id(p)
        for module in model.modules()
        if exclude_embeddings and isinstance(module, nn.Embedding)
        for p in module.parameters(recurse=False)
    }
    for param in model.parameters():
        if id(param) in skipped or (only_trainable and not param.requires_grad):
            continue
        mark = mark_of(param)
        whole += param.numel() if mark is None else math.prod(mark.full_shape(param))
    return whole


def _no_early_shape(model: nn.Module) -> None:
    return None


def _generate(model: nn.Module, group: Group, *args: Any, **kwargs: Any) -> Any:
    """transformers' ``generate``, the same on every rank. Collective.

    Rank 0 draws where tokens are sampled, and decides when to stop; every step's tokens are
    compared. Raises: ValueError, on every rank, for arguments that differ between ranks and for
    ways of decoding that ranks cannot share; TensorParallelError for tokens that differ.
    """
    kind: Any = type(model)
    with agreed(group):
        digest = hashlib.sha256(_said((args, kwargs, getattr(model, "generation_config", None))))
    value = int.from_bytes(digest.digest()[:8], "little") >> 1
    check_same(group, value, f"arguments of {kind.__name__}.generate")
    with ExitStack() as stack:
        choice = stack.enter_context(_open(_Choice(group)))

        def validate(self: Any, mode: Any, config: Any, options: Any) -> None:
            kind._validate_generation_mode(self, mode, config, options)
            is_assisted = "assisted" in str(getattr(mode, "value", mode))
            _check_way(kwargs.get("custom_generate"), is_assisted and bool(config.do_sample))

        def processors(self: Any, *inner: Any, **options: Any) -> Any:
            made = kind._get_logits_processor(self, *inner, **options)
            made.append(choice.begin)
            return made

        def criteria(self: Any, *inner: Any, **options: Any) -> Any:
            return _Stops(kind._get_stopping_criteria(self, *inner, **options), choice)

        for name, method in (
            ("_validate_generation_mode", validate),
            ("_get_logits_processor", processors),
            ("_get_stopping_criteria", criteria),
        ):
            stack.enter_context(_bound(model, name, method))
        _check_way(kwargs.get("custom_generate"), False)
        return kind.generate(model, *args, **kwargs)


def _check_way(custom: Any, draws_at_random: bool) -> None:
    if custom is not None:
        raise ValueError(
            "custom_generate on a parallelized model: its ranks might choose unlike tokens; use "
            "the ways of decoding that transformers itself has"
        )
    if draws_at_random:
        raise ValueError(
            "assisted generation with do_sample=True on a parallelized model: ranks would accept "
            "unlike tokens; pass do_sample=False, or leave the assistant out"
        )


@contextmanager
def _bound(model: nn.Module, name: str, method: Callable[..., Any]) -> Any:
    """``method`` as the model's for a while."""
    missing = object()
    before = model.__dict__.get(name, missing)
    model.__dict__[name] = MethodType(method, model)
    try:
        yield
    finally:
        if before is missing:
            del model.__dict__[name]
        else:
            model.__dict__[name] = before


class _Choice(TorchFunctionMode):
    """One step's choice of tokens: from the last logits processor until the stopping criteria.

    Between them, and only there, ``torch.multinomial`` is rank 0's.
    """

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group
        self.is_on = False

    def begin(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Called as the last logits processor, which changes nothing."""
        if not self.is_on:
            super().__enter__()  # type: ignore[no-untyped-call]
            self.is_on = True
        return scores

    def end(self) -> None:
        """No choice is being made."""
        if self.is_on:
            self.is_on = False
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func not in (torch.multinomial, Tensor.multinomial):
            return func(*args, **(kwargs or {}))
        return self._draw(*args, **(kwargs or {}))

    def _draw(self, input: Tensor, num_samples: int, **options: Any) -> Tensor:
        shape = (*input.shape[:-1], num_samples)
        chosen = torch.full(shape, _FAILED, dtype=torch.int64, device=input.device)
        failure: Exception | None = None
        if self.group.rank == 0:
            try:
                chosen = torch.multinomial(input, num_samples, **options)
            except Exception as error:
                failure = error
        self.group.broadcast_(chosen, 0)
        if chosen.numel() and int(chosen.flatten()[0]) == _FAILED:
            raise failure or TensorParallelError(
                "rank 0 could not draw a token; its error says why"
            )
        return chosen


@contextmanager
def _open(choice: _Choice) -> Any:
    try:
        yield choice
    finally:
        choice.end()


class _Stops(list[Any]):
    """transformers' stopping criteria, as rank 0 sees them, after a look at everyone's tokens."""

    def __init__(self, inner: Any, choice: _Choice) -> None:
        super().__init__(inner)
        self.inner, self.choice = inner, choice

    @property
    def max_length(self) -> int | None:
        """As transformers' list has it."""
        found: int | None = self.inner.max_length
        return found

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.choice.end()
        group = self.choice.group
        done: Tensor = self.inner(input_ids, scores, **kwargs)
        # The sums stand for what lies further back: beams that were reordered, drafts accepted.
        mine = torch.stack([input_ids[:, -1], input_ids.sum(1), done.to(input_ids.device)])
        seen = group.all_gather(mine.to(group.device)[None])
        tokens = seen[:, :2]
        if not bool((tokens == tokens[:1]).all()):
            raise TensorParallelError(
                f"ranks chose unlike tokens, the last of each row: {seen[:, 0].tolist()}, by rank; "
                "a logits processor that draws random numbers or keeps state of its own must be "
                "the same on all ranks"
            )
        return seen[0, 2].bool().to(done.device)


def _said(value: Any) -> bytes:
    """What one rank says that ``generate`` was called with; a streamer may be one rank's only."""
    if isinstance(value, Tensor):
        known = () if value.is_meta else (int(fingerprint(value)),)
        return repr((tuple(value.shape), value.dtype, *known)).encode()
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value).encode()
    if isinstance(value, Mapping):
        pairs = sorted((str(k), _said(v)) for k, v in value.items() if k != "streamer")
        return repr(pairs).encode()
    if isinstance(value, (list, tuple)):
        return repr([type(value).__name__, *map(_said, value)]).encode()
    settings = vars(value) if hasattr(value, "to_diff_dict") else None
    return repr(type(value).__qualname__).encode() + (_said(settings) if settings else b"")
