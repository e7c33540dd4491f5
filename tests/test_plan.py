"""plan: which module is cut how, from the model's own plan; errors name the way out."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MixtralConfig, MixtralForCausalLM

from tiny import llama, qwen3
from tp_native.errors import PlanError
from tp_native.partition import Partition
from tp_native.plan import plan


def on_meta(make: object, *args: object, **kwargs: object) -> nn.Module:
    with torch.device("meta"):
        return make(*args, **kwargs)  # type: ignore[operator, no-any-return]


def test_llama_is_cut_on_key_value_groups_columns_and_vocabulary() -> None:
    made = plan(on_meta(llama), 3)
    layer = "model.layers.1."
    assert made.shard(layer + "self_attn.q_proj.weight").partition.sizes == (32, 16, 16)
    assert made.shard(layer + "self_attn.k_proj.weight").partition.sizes == (16, 8, 8)
    out = made.shard(layer + "self_attn.o_proj.weight")
    assert (out.dim, out.partition.sizes) == (1, (32, 16, 16))
    assert made.shard(layer + "mlp.down_proj.weight").partition == Partition.even(70, 3)
    assert made.shard("model.norm.weight") is None
    assert made.entries["lm_head"].gather_output
    embedding = made.entries["model.embed_tokens"]
    assert embedding.partition == made.entries["lm_head"].partition == Partition.even(97, 3)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_shards_add_up_to_the_model(world_size: int, tied: bool) -> None:
    model = llama(tied)
    made = plan(model, world_size)
    for name, param in model.named_parameters():
        shapes = [made.local_shape(name, rank) for rank in range(world_size)]
        cut = made.shard(name)
        if cut is None:
            assert set(shapes) == {tuple(param.shape)}
        else:
            assert sum(shape[cut.dim] for shape in shapes) == param.shape[cut.dim]
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    shared = sum(p.numel() * 4 for n, p in model.named_parameters() if made.shard(n) is None)
    held = sum(made.local_bytes(rank) for rank in range(world_size))
    assert held == whole + (world_size - 1) * shared


def test_eight_heads_on_three_ranks_are_three_three_two() -> None:
    model = on_meta(llama, num_key_value_heads=8, num_attention_heads=16)
    cut = plan(model, 3).shard("model.layers.0.self_attn.k_proj.weight")
    assert cut.partition.sizes == (24, 24, 16)


def test_fewer_heads_than_ranks_are_shared_with_the_queries_dealt_out() -> None:
    made = plan(on_meta(llama), 5)
    layer = "model.layers.0.self_attn."
    assert made.shard(layer + "q_proj.weight").partition.sizes == (8, 8, 16, 16, 16)
    keys = made.shard(layer + "k_proj.weight").layout()
    assert keys.ranges == (((0, 8),), ((0, 8),), ((8, 16),), ((16, 24),), ((24, 32),))
    assert made.attributes[layer[:-1]] == {"num_key_value_groups": (1, 1, 2, 2, 2)}


def test_ratios_shift_the_cut_and_may_leave_a_rank_without_heads() -> None:
    made = plan(on_meta(llama), 2, ratios=[3, 1])
    assert made.shard("model.layers.0.self_attn.k_proj.weight").partition.sizes == (24, 8)
    assert made.shard("model.layers.0.mlp.up_proj.weight").partition.sizes == (53, 17)
    far = plan(on_meta(llama), 2, ratios=[20, 1])
    assert far.shard("model.layers.0.self_attn.k_proj.weight").partition.sizes == (32, 0)
    with pytest.raises(PlanError, match="2 ratios"):
        plan(on_meta(llama), 3, ratios=[1, 1])


def test_explain_folds_layers_and_counts_collectives() -> None:
    text = plan(on_meta(llama, tied=True), 2).explain()
    assert "model.layers.*.self_attn.q_proj" in text
    assert "35 of 70" in text
    assert "49/48 of 97" in text
    assert "tied" in text
    # embedding, two per layer, the head's gather
    assert "collectives per forward: 6, " in text
    assert f"{4 * (48 + 2 * 2 * 48 + 97)} bytes per token" in text


def test_rules_override_the_models_own_plan() -> None:
    rules = {
        "model.layers.*.mlp.gate_proj": "replicate",
        "model.layers.*.mlp.up_proj": "replicate",
        "model.layers.*.mlp.down_proj": "replicate",
        "model.layers.1.mlp.up_proj": "colwise_rep",
    }
    made = plan(on_meta(llama), 2, rules=rules)
    assert "model.layers.0.mlp.up_proj" not in made.entries
    assert made.entries["model.layers.1.mlp.up_proj"].gather_output
    assert "model.layers.0.self_attn.q_proj" in made.entries


def test_star_is_one_number_and_nothing_else() -> None:
    for pattern in ("model.*.self_attn", "model.layers.*.mlp", "model.layers.*.mlp.up"):
        rules = {pattern + ".nothing": "colwise"}
        with pytest.raises(PlanError, match="matches no module"):
            plan(on_meta(llama), 2, rules=rules)
    with pytest.raises(PlanError, match="names a parameter"):
        plan(on_meta(llama), 2, rules={"model.layers.*.input_layernorm.weight": "colwise"})


def test_a_weights_name_means_its_module() -> None:
    made = plan(on_meta(llama), 2, rules={"model.layers.*.mlp.up_proj.weight": "colwise_rep"})
    assert made.entries["model.layers.1.mlp.up_proj"].gather_output


def test_a_model_rule_without_match_warns() -> None:
    model = llama()
    model._tp_plan = {**model._tp_plan, "model.layers.*.gone": "colwise"}
    with pytest.warns(UserWarning, match=r"model\.layers\.\*\.gone.*match nothing"):
        plan(model, 2)


def test_a_plain_model_works_with_rules_and_without() -> None:
    model = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6))
    made = plan(model, 4, rules={"0": "colwise", "2": "rowwise"})
    assert plan(model, 4).entries == made.entries
    assert made.local_shape("0.weight", 0) == (3, 6)
    assert made.local_shape("0.bias", 3) == (2,)
    assert made.local_shape("2.weight", 3) == (6, 2)
    assert made.local_shape("2.bias", 3) == (6,)


def test_unsupported_styles_and_modules_are_refused_with_the_list() -> None:
    with pytest.raises(PlanError, match=r"'sideways'.*supported styles are \['colwise'"):
        plan(on_meta(llama), 2, rules={"model.norm": "sideways"})
    with pytest.raises(PlanError, match=r"model\.norm is a LlamaRMSNorm"):
        plan(on_meta(llama), 2, rules={"model.norm": "colwise"})
    mixture = MixtralConfig(
        vocab_size=20,
        hidden_size=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=8,
        num_hidden_layers=1,
    )
    with pytest.raises(PlanError, match=r"model\.layers\.0\.mlp\.experts.*mixtures of experts"):
        plan(on_meta(MixtralForCausalLM, mixture), 2)
    made = plan(
        on_meta(MixtralForCausalLM, mixture), 2, rules={"model.layers.*.mlp.experts": "replicate"}
    )
    assert "model.layers.0.self_attn.q_proj" in made.entries


def test_tied_weights_cut_differently_are_refused() -> None:
    with pytest.raises(PlanError, match="one tied parameter"):
        plan(llama(tied=True), 2, rules={"lm_head": "replicate"})
    made = plan(
        llama(tied=True), 2, rules={"lm_head": "replicate", "model.embed_tokens": "replicate"}
    )
    assert made.shard("lm_head.weight") is None


def test_an_embedding_that_scales_its_rows_is_cut() -> None:
    config = Gemma3TextConfig(
        vocab_size=20,
        hidden_size=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=8,
        num_hidden_layers=1,
    )
    made = plan(Gemma3ForCausalLM(config), 2)
    assert made.entries["model.embed_tokens"].partition == made.entries["lm_head"].partition


class NormedEmbedding(nn.Embedding):
    """Reads its weight past its base class's forward."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) / self.weight.norm()


def test_an_embedding_that_reads_its_table_stays_whole_with_what_is_tied_to_it() -> None:
    model = nn.Sequential(NormedEmbedding(20, 16), nn.Linear(16, 20, bias=False))
    model[1].weight = model[0].weight
    made = plan(model, 2)
    assert not made.entries
    assert "NormedEmbedding does more" in made.whole["0"]
    assert "tied to 0" in made.whole["1"]


def test_norms_inside_heads_sum_their_gradients() -> None:
    assert "model.layers.0.self_attn.q_norm.weight" in plan(on_meta(qwen3), 2).partial_gradients


def test_bad_arguments() -> None:
    for world_size in (0, -1, 2.0, True):
        with pytest.raises(PlanError, match="world_size"):
            plan(on_meta(llama), world_size)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'nope' is not a parameter"):
        plan(on_meta(llama), 2).shard("nope")


def test_planning_is_silent_and_leaves_the_model_alone() -> None:
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan(model, 2)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
