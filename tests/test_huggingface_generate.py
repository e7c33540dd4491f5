"""transformers' own ``generate`` on parallelized models: dense's tokens everywhere, or refused."""

from __future__ import annotations

import contextlib
import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CompileConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)

import model_folders
from harness import run_ranks
from model_folders import FAMILIES
from tp_native.errors import TensorParallelError
from tp_native.group import Group
from tp_native.parallelize import DistributedModelWrapper, parallelize
from tp_native.simulate import simulate

NEW = 6
USUAL = [("LlamaForCausalLM", 3), ("MistralForCausalLM", 2), ("Gemma2ForCausalLM", 2)]
WRITERS = [
    pytest.param(name, size, marks=[] if (name, size) in USUAL else pytest.mark.soak)
    for name, family in FAMILIES.items()
    for size in family.ranks
    if name.endswith(("CausalLM", "ConditionalGeneration", "LMHeadModel", "MTModel"))
]


@functools.cache
def dense(name: str) -> Any:
    """With logits spread out, so that no rounding decides a token."""
    model = model_folders.make(name)
    head = model.get_output_embeddings()
    if head.weight is not model.get_input_embeddings().weight:
        with torch.no_grad():
            head.weight.mul_(20)
    return model


def prompt(name: str) -> dict[str, Tensor]:
    return {k: v for k, v in model_folders.inputs(name).items() if not k.startswith("decoder")}


def padded() -> dict[str, Tensor]:
    ids = model_folders.inputs("LlamaForCausalLM")["input_ids"]
    mask = torch.tensor([[1] * 7, [0, 0, 0, 1, 1, 1, 1]])
    return {"input_ids": ids * mask, "attention_mask": mask}


def rank_generate(group: Group, model: Any, options: list[dict[str, Any]]) -> list[Tensor]:
    ours: Any = parallelize(copy.deepcopy(model), group)
    settings, own = ours.config.to_dict(), ours.generation_config.to_dict()
    made = [ours.generate(**each) for each in options]
    assert (ours.config.to_dict(), ours.generation_config.to_dict()) == (settings, own)
    assert type(ours) is type(model)
    return made


def same_text(model: Any, world_size: int, options: list[dict[str, Any]]) -> None:
    expected, able = [], []
    for each in options:
        with contextlib.suppress(RuntimeError):  # transformers' own: Falcon in a static cache, say
            expected.append(copy.deepcopy(model).generate(**each))
            able.append(each)
    assert expected
    for ours in simulate(rank_generate, world_size, model, able):
        for mine, theirs in zip(ours, expected, strict=True):
            assert torch.equal(mine, theirs)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "static cache, prefilled in parts": {"cache_implementation": "static", "prefill_chunk_size": 3},
    "prefilled in parts": {"prefill_chunk_size": 3},
    "beams": {"num_beams": 3},
}
MORE_WAYS: dict[str, dict[str, Any]] = {
    "hybrid cache": {"cache_implementation": "hybrid"},
    "beams, all told": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
    "beams, static cache": {"num_beams": 3, "cache_implementation": "static"},
    "beams, early": {"num_beams": 3, "early_stopping": True, "eos_token_id": 5},
    "repetition": {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
    "words": {"bad_words_ids": [[5], [7, 9]], "suppress_tokens": [11], "forced_eos_token_id": 4},
    "ends": {"eos_token_id": list(range(50, 70)), "pad_token_id": 0},
    "watermark": {"watermarking_config": {"bias": 2.5, "seeding_scheme": "selfhash"}},
}


def asked(name: str, ways: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    base = prompt(name) | {"max_new_tokens": NEW, "do_sample": False}
    return [base | way for way in ways.values()]


@pytest.mark.parametrize(("name", "world_size"), WRITERS)
def test_caches_and_beams_are_dense(name: str, world_size: int) -> None:
    same_text(dense(name), world_size, asked(name, WAYS))


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.soak)])
@pytest.mark.parametrize("way", MORE_WAYS)
def test_ways_of_decoding_are_dense(way: str, world_size: int) -> None:
    name = "Gemma2ForCausalLM" if "hybrid" in way else "LlamaForCausalLM"
    same_text(dense(name), world_size, asked(name, {way: MORE_WAYS[way]}))


def rank_offload(group: Group, ids: Tensor) -> None:
    ours: Any = parallelize(copy.deepcopy(dense("LlamaForCausalLM")), group)
    for way in ("offloaded", "offloaded_static"):
        # transformers' own, which copies between a host and its device
        with pytest.raises((RuntimeError, AssertionError), match=r"CUDA|accelerator"):
            ours.generate(ids, max_new_tokens=2, cache_implementation=way)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is for machines without")
def test_offloaded_caches_need_an_accelerator() -> None:
    simulate(rank_offload, 2, prompt("LlamaForCausalLM")["input_ids"])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MistralForCausalLM", "Gemma3ForCausalLM"])
def test_padded_batches_are_dense(name: str, attention: str) -> None:
    model = copy.deepcopy(dense(name))
    model.set_attn_implementation(attention)
    base = padded() | {"max_new_tokens": NEW, "do_sample": False}
    same_text(model, 2, [base, base | {"cache_implementation": "static"}, base | {"num_beams": 3}])


def rank_sample(group: Group, name: str, options: dict[str, Any], seeds: list[int]) -> Any:
    ours: Any = parallelize(copy.deepcopy(dense(name)), group)
    torch.manual_seed(seeds[group.rank])
    return ours.generate(**options).tolist()


SAMPLED: dict[str, dict[str, Any]] = {
    "plain": {},
    "cut off": {"top_k": 20, "top_p": 0.9, "temperature": 0.7},
    "several": {"num_return_sequences": 3},
    "beams": {"num_beams": 3},
}


@pytest.mark.parametrize("way", SAMPLED)
@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.soak)])
def test_ranks_seeded_unlike_draw_rank_zeros_tokens(world_size: int, way: str) -> None:
    name = "LlamaForCausalLM"
    options = prompt(name) | {"max_new_tokens": NEW, "do_sample": True} | SAMPLED[way]
    torch.manual_seed(7)
    expected = copy.deepcopy(dense(name)).generate(**options).tolist()
    seeds = [7, 8, 9][:world_size]
    assert run_ranks(rank_sample, world_size, name, options, seeds) == [expected] * world_size
    torch.manual_seed(7)  # threads share a generator, which rank 0 alone draws from
    assert simulate(rank_sample, world_size, name, options, [7] * world_size)[0] == expected


class Streamer:
    def __init__(self) -> None:
        self.seen: list[int] = []
        self.is_over = False

    def put(self, tokens: Tensor) -> None:
        self.seen += tokens.flatten().tolist()

    def end(self) -> None:
        self.is_over = True


def rank_stream(group: Group, ids: Tensor) -> tuple[list[int], list[int]]:
    ours: Any = DistributedModelWrapper(copy.deepcopy(dense("LlamaForCausalLM")), group)
    streamer = Streamer()
    options = {"streamer": streamer} if group.rank == 0 else {}
    made = ours.generate(ids[:1], max_new_tokens=NEW, **options)
    assert streamer.is_over == (group.rank == 0)
    return streamer.seen, made[0].tolist()


def test_one_rank_streams() -> None:
    ids = prompt("LlamaForCausalLM")["input_ids"]
    (seen, first), (nothing, second) = simulate(rank_stream, 2, ids)
    assert seen == first == second
    assert nothing == []


class StopsAt(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


class Noise(LogitsProcessor):
    def __init__(self, strength: float) -> None:
        self.strength = strength

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + self.strength * torch.arange(scores.shape[1])


def rank_parts(group: Group, ids: Tensor) -> list[tuple[int, ...]]:
    ours: Any = parallelize(copy.deepcopy(dense("LlamaForCausalLM")), group)
    lengths = []
    looked_up = ours.generate(ids[:1], max_new_tokens=NEW, prompt_lookup_num_tokens=2)
    assert torch.equal(looked_up, ours.generate(ids[:1], max_new_tokens=NEW))
    for criteria in (StopsAt(9 + group.rank), MaxTimeCriteria(0.0 if group.rank == 0 else 1e9)):
        made = ours.generate(
            ids, max_new_tokens=NEW, stopping_criteria=StoppingCriteriaList([criteria])
        )
        lengths.append(tuple(made.shape))
    alike = LogitsProcessorList([Noise(-100.0)])
    assert bool((ours.generate(ids, logits_processor=alike, max_new_tokens=2)[:, 7:] == 0).all())
    unlike = LogitsProcessorList([Noise(-100.0 if group.rank == 0 else 100.0)])
    with pytest.raises(TensorParallelError, match=r"ranks chose unlike tokens.*logits processor"):
        ours.generate(ids, max_new_tokens=2, logits_processor=unlike)
    return lengths


def test_rank_zero_stops_and_unlike_tokens_are_told() -> None:
    ids = prompt("LlamaForCausalLM")["input_ids"]
    for lengths in simulate(rank_parts, 2, ids):
        assert lengths == [(2, 9), (2, 8)]


def rank_refused(group: Group, ids: Tensor) -> None:
    ours: Any = parallelize(copy.deepcopy(dense("LlamaForCausalLM")), group)
    with pytest.raises(ValueError, match=r"arguments of LlamaForCausalLM.generate differ"):
        ours.generate(ids + group.rank, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"arguments of LlamaForCausalLM.generate differ"):
        ours.generate(ids, generation_config=GenerationConfig(max_new_tokens=2 + group.rank))
    with pytest.raises(ValueError, match="assisted generation with do_sample"):
        ours.generate(ids[:1], max_new_tokens=4, do_sample=True, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="custom_generate on a parallelized"):
        ours.generate(ids, max_new_tokens=2, custom_generate=lambda *a, **k: ids)
    with pytest.raises(TensorParallelError, match=r"generate_batch is refused.*use generate"):
        ours.generate_batch([[1, 2, 3]])
    with pytest.raises(ValueError, match="trust_remote_code"):  # transformers' own refusal
        ours.generate(ids, max_new_tokens=2, penalty_alpha=0.6, top_k=4)
    with torch.no_grad():
        ours.model.norm.weight.fill_(float("nan"))
    error = RuntimeError if group.rank == 0 else TensorParallelError
    with pytest.raises(
        error, match="probability tensor" if group.rank == 0 else "rank 0 could not"
    ):
        ours.generate(ids, max_new_tokens=2, do_sample=True)
    assert "_get_logits_processor" not in vars(ours)


def test_what_ranks_cannot_share_is_refused() -> None:
    simulate(rank_refused, 2, prompt("LlamaForCausalLM")["input_ids"])


def rank_assisted(group: Group, ids: Tensor, assistant: Any) -> Tensor:
    ours: Any = parallelize(copy.deepcopy(dense("LlamaForCausalLM")), group)
    helper = copy.deepcopy(assistant)
    made: Tensor = ours.generate(ids, assistant_model=helper, max_new_tokens=NEW, do_sample=False)
    helper = parallelize(copy.deepcopy(assistant), group)
    again = ours.generate(ids, assistant_model=helper, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(made, again)
    return made


def test_an_assistant_may_be_dense_or_parallelized() -> None:
    ids = prompt("LlamaForCausalLM")["input_ids"][:1]
    helper = model_folders.make("LlamaForCausalLM", num_hidden_layers=1)
    expected = dense("LlamaForCausalLM").generate(ids, max_new_tokens=NEW, do_sample=False)
    for ours in simulate(rank_assisted, 2, ids, helper):
        assert torch.equal(ours, expected)


def rank_compiled(group: Group, name: str, options: dict[str, Any]) -> Any:
    ours: Any = parallelize(copy.deepcopy(dense(name)), group)
    compiling = CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    compiling._compile_all_devices = True
    torch.manual_seed(group.rank + 7)
    return ours.generate(**options, compile_config=compiling).tolist()


@pytest.mark.soak
@pytest.mark.parametrize("do_sample", [False, True])
def test_a_compiled_forward_is_dense(do_sample: bool) -> None:
    name = "LlamaForCausalLM"
    options = prompt(name) | {"max_new_tokens": NEW, "do_sample": do_sample}
    options["cache_implementation"] = "static"
    torch.manual_seed(7)
    expected = copy.deepcopy(dense(name)).generate(**options).tolist()
    assert run_ranks(rank_compiled, 2, name, options, deadline_s=300) == [expected] * 2
