"""generate: transformers' greedy text, the same on every rank; bad input is named."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import model_folders
from tiny import VOCAB, llama, qwen3, tokens
from tp_native.errors import TensorParallelError
from tp_native.generate import generate
from tp_native.group import Group
from tp_native.parallelize import DistributedModelWrapper, parallelize
from tp_native.simulate import simulate

WORLDS = [1, 2, 3, 4]


def sharp(model: Any) -> Any:
    """Spread the logits out, so that no rounding decides a token."""
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def rank_generate(group: Group, dense: Any, ids: Tensor, options: dict[str, Any]) -> Tensor:
    model = parallelize(copy.deepcopy(dense), group)
    return generate(model, ids, 12, **options)


def padded() -> tuple[Tensor, Tensor]:
    ids = tokens(3, 6)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]])
    return ids * mask, mask


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("make", [llama, qwen3])
def test_greedy_is_transformers_greedy(make: Any, world_size: int) -> None:
    dense = sharp(make())
    expected = dense.generate(tokens(), max_new_tokens=12, do_sample=False)
    for ours in simulate(rank_generate, world_size, dense, tokens(), {}):
        assert ours.dtype == torch.int64
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("world_size", WORLDS)
def test_left_padded_batch_is_transformers_batch(world_size: int) -> None:
    dense = sharp(llama())
    ids, mask = padded()
    expected = dense.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    for ours in simulate(rank_generate, world_size, dense, ids, {"attention_mask": mask}):
        assert torch.equal(ours, expected)


def test_a_padded_row_is_what_it_is_alone() -> None:
    dense = sharp(llama())
    ids, mask = padded()
    together = generate(dense, ids, 8, attention_mask=mask)
    for row, length in ((1, 4), (2, 1)):
        alone = generate(dense, ids[row : row + 1, 6 - length :], 8)
        assert torch.equal(together[row, 6 - length :], alone[0])


@pytest.mark.parametrize("world_size", [1, 2])
def test_rows_end_at_eos_and_are_padded(world_size: int) -> None:
    dense = sharp(llama())
    free = generate(dense, tokens(), 12)
    eos = int(free[0, 9])  # the third new token of the first row
    dense.generation_config.eos_token_id = [eos, VOCAB - 1]
    expected = dense.generate(tokens(), max_new_tokens=12, do_sample=False)
    ours = simulate(rank_generate, world_size, dense, tokens(), {})[0]
    assert torch.equal(ours, expected)
    assert bool((ours[0, 10:] == dense.generation_config.pad_token_id).all())
    one_row = generate(dense, tokens()[:1], 12, eos_token_id=eos)
    assert one_row.shape[1] <= 10
    assert generate(dense, tokens()[:1], 12, eos_token_id=[]).shape[1] == 7 + 12


@pytest.mark.parametrize("world_size", WORLDS)
def test_sampling_is_repeatable_and_equal_on_all_ranks(world_size: int) -> None:
    dense = sharp(llama())
    options = {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.9, "seed": 5}
    state = torch.get_rng_state()
    results = simulate(rank_generate, world_size, dense, tokens(), options)
    again = simulate(rank_generate, world_size, dense, tokens(), options)
    assert all(torch.equal(results[0], other) for other in results + again)
    other = simulate(rank_generate, world_size, dense, tokens(), {**options, "seed": 6})
    assert not torch.equal(results[0], other[0])
    assert torch.equal(state, torch.get_rng_state())


def test_filters_leave_only_likely_tokens() -> None:
    dense = sharp(llama())
    greedy = generate(dense, tokens(), 12)
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        assert torch.equal(generate(dense, tokens(), 12, do_sample=True, **options), greedy)


def test_on_token_sees_every_step() -> None:
    seen: list[Tensor] = []
    ours = generate(sharp(llama()), tokens(), 5, on_token=seen.append)
    assert torch.equal(torch.stack(seen, 1), ours[:, 7:])


def rank_wrapped(group: Group, dense: Any) -> Tensor:
    return generate(DistributedModelWrapper(copy.deepcopy(dense), group), tokens(), 4)


def test_the_wrapper_generates_and_the_result_may_be_trained_on() -> None:
    dense = sharp(llama())
    for ours in simulate(rank_wrapped, 2, dense):
        assert torch.equal(ours, generate(dense, tokens(), 4))
        assert not ours.is_inference()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "list": ({"input_ids": [[1, 2]]}, "must be a Tensor, got list"),
    "float ids": ({"input_ids": torch.ones(1, 3)}, "int64 or int32, got torch.float32"),
    "one dimension": ({"input_ids": torch.ones(3, dtype=torch.int64)}, r"unsqueeze\(0\)"),
    "empty": ({"input_ids": torch.ones(1, 0, dtype=torch.int64)}, "empty prompt"),
    "no rows": ({"input_ids": torch.ones(0, 3, dtype=torch.int64)}, "empty prompt"),
    "id too large": (
        {"input_ids": torch.tensor([[1, VOCAB]])},
        "97, but the vocabulary is 0 to 96",
    ),
    "id negative": ({"input_ids": torch.tensor([[-1]])}, "from -1 to -1"),
    "too long": ({"max_new_tokens": 58}, "max_position_embeddings 64.*max_new_tokens <= 57"),
    "nothing new": ({"max_new_tokens": 0}, "max_new_tokens must be an int, 1 or more, got 0"),
    "cold": ({"temperature": 0.0}, "temperature must be a finite number above 0, got 0.0"),
    "not finite": ({"temperature": float("nan")}, "temperature"),
    "top_p 0": ({"top_p": 0.0}, "top_p must be above 0"),
    "top_p 2": ({"top_p": 2.0}, "top_p must be above 0 and at most 1"),
    "top_k -1": ({"top_k": -1}, "top_k must be an int, 0 or more, got -1"),
    "seed": ({"seed": -1}, "seed"),
    "mask shape": ({"attention_mask": torch.ones(2, 6)}, r"shape \(2, 6\), expected \(2, 7\)"),
    "right padded": ({"attention_mask": torch.tensor([[1] * 6 + [0]] * 2)}, "on the left"),
    "mask values": ({"attention_mask": torch.full((2, 7), 2)}, "0 .padding. and 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str) -> None:
    change, words = BAD[case]
    arguments: dict[str, Any] = {"input_ids": tokens(), "max_new_tokens": 3} | change
    with pytest.raises(ValueError, match=words):
        generate(llama(), **arguments)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("BertModel", "causal language model, got BertModel$"),
        ("LlamaModel", "causal language model, got LlamaModel$"),
        ("T5ForConditionalGeneration", r"T5ForConditionalGeneration; call its own .generate"),
    ],
)
def test_models_that_do_not_continue_text_are_named(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        generate(model_folders.make(name), tokens(), 3)


def rank_bad(group: Group, dense: Any) -> None:
    model = parallelize(copy.deepcopy(dense), group)
    with pytest.raises(ValueError, match="temperature must be"):
        generate(model, tokens(), 3, temperature=float(group.rank))  # bad on rank 0 only
    with pytest.raises(ValueError, match="arguments of generate differ between ranks"):
        generate(model, tokens(), 3, seed=group.rank)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TensorParallelError, match="NaN" if group.rank == 0 else "rank 0"):
        generate(model, tokens(), 3)


def test_errors_are_raised_on_every_rank() -> None:
    simulate(rank_bad, 2, llama())
