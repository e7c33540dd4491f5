"""A GPT in nanoGPT's manner, its heads and widths written into its code, cut without a change.

``make nanogpt`` runs this: it starts itself on ``--ranks`` ranks under torchrun. They compare the
cut model with the dense one (logits, every gradient, generated text) and count the points at which
ranks wait for each other; what each holds of a block is drawn.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from split_drawing import Matrix, draw_picture, draw_text
from torch import Tensor, nn
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

import tp_native as tp

LIMIT = 1e-5  # float32: ranks add in another order than one
BLOCK = "transformer.h.0"  # the block that is drawn; all are cut alike


class Config:
    """Small, and nothing divides: 5 heads and 5027 tokens fit no number of ranks from 2 to 4."""

    block_size = 256
    vocab_size = 5027
    n_layer = 12
    n_head = 5
    n_embd = 80


# -- the model: no line of it knows of ranks


class CausalSelfAttention(nn.Module):
    """All heads' queries, keys and values from one matrix."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_head, self.n_embd = config.n_head, config.n_embd
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q = q.view(batch, length, self.n_head, width // self.n_head).transpose(1, 2)
        k = k.view(batch, length, self.n_head, width // self.n_head).transpose(1, 2)
        v = v.view(batch, length, self.n_head, width // self.n_head).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(1, 2).contiguous().view(batch, length, width)
        out: Tensor = self.c_proj(y)
        return out


class MLP(nn.Module):
    """Four times as wide inside."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c_proj(self.gelu(self.c_fc(x)))
        return out


class Block(nn.Module):
    """Attention, then the MLP, each over a norm and added to the stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class GPT(nn.Module):
    """Logits, and the loss where targets are given; the head is the embedding's own matrix."""

    transformer: Any  # a ModuleDict, whose entries no type checker knows

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        positions = torch.arange(ids.size(1), device=ids.device)
        x = self.transformer.wte(ids) + self.transformer.wpe(positions)
        for block in self.transformer.h:
            x = block(x)
        logits = self.lm_head(self.transformer.ln_f(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))

    @torch.no_grad()
    def generate(self, ids: Tensor, new_tokens: int) -> Tensor:
        """The likeliest token, again and again."""
        for _ in range(new_tokens):
            logits, _ = self(ids[:, -self.config.block_size :])
            ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)
        return ids


def make_model(layers: int) -> GPT:
    """Untrained, with the same weights everywhere; no bias is zero, or nobody would miss it."""
    config = Config()
    config.n_layer = layers
    torch.manual_seed(0)
    model = GPT(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
        elif parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.15)  # large enough that no token repeats itself
    return model


# -- one rank: cut the model, and compare it with the dense one


def compare(dense: GPT, group: tp.Group, new_tokens: int) -> dict[str, Any]:
    """Cut a copy of ``dense``, run both; what was seen, the same on every rank."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(dense.config.vocab_size, (1, dense.config.block_size + 1), generator=draw)
    ids, targets = ids[:, :-1], ids[:, 1:]

    plan = tp.plan(dense, group.size)
    model = copy.deepcopy(dense)
    tp.parallelize(model, group, verify=ids)

    def part(name: str, whole: Tensor) -> Tensor:
        """What this rank holds of a parameter, or of its gradient."""
        cut = plan.shard(name)
        if cut is None:
            return whole
        none = whole.narrow(cut.dim, 0, 0)  # of more ranks than heads, some hold no head
        ranges = cut.layout().ranges[group.rank]
        return torch.cat([none, *(whole.narrow(cut.dim, a, b - a) for a, b in ranges)], cut.dim)

    logits, loss = dense(ids, targets)
    loss.backward()
    cut_logits, cut_loss = model(ids, targets)
    cut_loss.backward()
    held, errors = True, {}
    pairs = zip(dense.named_parameters(), model.parameters(), strict=True)
    for (name, whole), mine in pairs:
        assert whole.grad is not None and mine.grad is not None
        held = held and torch.equal(mine, part(name, whole))
        gap = relative(mine.grad, part(name, whole.grad), whole.grad)
        errors[name] = largest(group, gap)
    worst = max(errors, key=lambda name: errors[name])

    bits = cut_logits.detach().view(torch.int32)
    alike = all(torch.equal(bits[0], other) for other in group.all_gather(bits))
    in_layers, elsewhere = count_collectives(model, ids, group)
    planned = [name for name, entry in plan.entries.items() if entry.features and group.size > 1]
    prompt = ids[:, :8]
    text, cut_text = dense.generate(prompt, new_tokens), model.generate(prompt, new_tokens)

    return {
        "ranks": group.size,
        "layers": dense.config.n_layer,
        "tokens": ids.size(1),
        "parameters": sum(p.numel() for p in dense.parameters()),
        "local_parameters": [plan.local_bytes(rank) // 4 for rank in range(group.size)],
        "logits": largest(group, relative(cut_logits, logits, logits)),
        "gradients": {"count": len(errors), "worst": worst, "error": errors[worst]},
        "shares_held": largest(group, not held) == 0,
        "logits_alike": largest(group, not alike) == 0,
        "collectives": {"in_layers": in_layers, "elsewhere": elsewhere},
        "planned": {
            "in_layers": sum(".h." in name for name in planned),
            "elsewhere": sum(".h." not in name for name in planned),
        },
        "text": text[0, prompt.size(1) :].tolist(),
        "cut_text": cut_text[0, prompt.size(1) :].tolist(),
        "text_equal": largest(group, not torch.equal(text, cut_text)) == 0,
        "matrices": [vars(matrix) for matrix in matrices(dense, plan)],
    }


def relative(actual: Tensor, expected: Tensor, whole: Tensor) -> float:
    """The largest difference, over the largest value of the whole; infinite where there is NaN."""
    if actual.numel() == 0:
        return 0.0
    gap = ((actual - expected).abs().max() / whole.abs().max()).item()
    return gap if gap == gap else float("inf")


def largest(group: tp.Group, value: float) -> float:
    """The largest over the ranks."""
    return group.all_reduce_(torch.tensor([float(value)], dtype=torch.float64), op="max").item()


@torch.no_grad()
def count_collectives(model: GPT, ids: Tensor, group: tp.Group) -> tuple[int, int]:
    """Collectives of one forward pass: in the blocks, and elsewhere; the group counts them."""
    inside = 0

    def count(sign: int) -> Callable[..., None]:
        def hook(*_: object) -> None:
            nonlocal inside
            inside += sign * group.stats()["collectives"]

        return hook

    handles = []
    for block in model.transformer.h:
        handles.append(block.register_forward_pre_hook(count(-1)))
        handles.append(block.register_forward_hook(count(1)))
    before = group.stats()["collectives"]
    model(ids)
    after = group.stats()["collectives"]
    for handle in handles:
        handle.remove()
    return inside, after - before - inside


def matrices(model: GPT, plan: tp.ShardPlan) -> list[Matrix]:
    """The four matrices of a block, and which part of each a rank holds."""
    made = []
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        weight = f"{BLOCK}.{name}.weight"
        rows, columns = plan.shapes[weight]
        cut = plan.shard(weight)
        parts = () if cut is None else cut.layout().ranges
        made.append(Matrix(name, rows, columns, 0 if cut is None else cut.dim, parts))
    return made


# -- the whole: start the ranks, report, draw


def start_ranks(ranks: int, arguments: list[str]) -> bool:
    """This script under torchrun, the cores shared; whether all ranks ended well."""
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # the command's own steps, in this process: that has imported torch already
    command = ["--standalone", "--nproc-per-node", str(ranks), __file__, *arguments]
    try:
        torchrun.run(torchrun.parse_args(command))  # type: ignore[no-untyped-call]
    except ChildFailedError:
        return False
    return True


def failures(seen: dict[str, Any]) -> list[str]:
    """What does not hold, in words."""
    if "error" in seen:
        return [seen["error"]]
    gradients, ranks = seen["gradients"], seen["ranks"]
    expected = 2 * seen["layers"] if ranks > 1 else 0
    count, planned = seen["collectives"], seen["planned"]
    claims = [
        (
            seen["logits"] <= LIMIT,
            f"logits are {seen['logits']:.1e} from the dense model's (limit {LIMIT:.0e})",
        ),
        (
            gradients["error"] <= LIMIT,
            f"the gradient of {gradients['worst']} is {gradients['error']:.1e} from the dense "
            f"model's (limit {LIMIT:.0e})",
        ),
        (seen["shares_held"], "ranks hold other weights than the plan says"),
        (seen["logits_alike"], "the ranks' logits differ from each other"),
        (
            count == planned and count["in_layers"] == expected,
            f"{count} collectives, the plan says {planned} and two a layer are {expected}",
        ),
        (seen["text_equal"], f"generated {seen['cut_text']}, the dense model {seen['text']}"),
    ]
    return [claim for holds, claim in claims if not holds]


def report(seen: dict[str, Any]) -> str:
    """What was seen, as a table."""
    ranks, layers, tokens = seen["ranks"], seen["layers"], seen["tokens"]
    gradients, count, planned = seen["gradients"], seen["collectives"], seen["planned"]
    local = "/".join(f"{n:,}" for n in seen["local_parameters"])
    size = f"{layers} layer{'s' * (layers > 1)}, {seen['parameters']:,} parameters"
    lines = {
        "model": f"{size}; {local} on {ranks} rank{'s' * (ranks > 1)}",
        "logits": f"within {seen['logits']:.1e} of the dense model's; "
        f"bitwise equal on all ranks: {'yes' if seen['logits_alike'] else 'NO'}",
        "gradients": f"all {gradients['count']} within {gradients['error']:.1e}; "
        f"furthest: {gradients['worst']}",
        "sync": f"{count['in_layers']} in the layers, {count['elsewhere']} in embeddings and head, "
        f"in one forward of {tokens} tokens (the group's count)",
        "": f"{planned['in_layers']} and {planned['elsewhere']} by the plan; a pipeline that hands "
        f"on token by token: {layers} x {tokens} = {layers * tokens:,}",
        "text": " ".join(map(str, seen["cut_text"])),
        " ": f"equal to the dense model's: {'yes' if seen['text_equal'] else 'NO'}",
    }
    return "\n".join(f"{name:<11}{text}" for name, text in lines.items())


def main() -> int:
    """Start the ranks, report, draw; 1 if something does not hold. Under torchrun: be a rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2, help="ranks to start (2)")
    parser.add_argument("--layers", type=int, default=Config.n_layer, help="layers (12)")
    parser.add_argument("--tokens", type=int, default=16, help="tokens to generate (16)")
    parser.add_argument("--out", type=Path, default=Path("build/nanogpt"), help="for results")
    options = parser.parse_args()
    for name in ("ranks", "layers", "tokens"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: at least 1")
    record = options.out / "nanogpt.json"

    if torch.distributed.is_torchelastic_launched():
        with tp.init_tensor_parallel() as group:
            try:
                seen = compare(make_model(options.layers), group, options.tokens)
            except tp.PlanError as error:  # raised on all ranks alike
                seen = {"error": str(error)}
            if group.rank == 0:
                record.write_text(json.dumps(seen, indent=1) + "\n")
        return 0

    options.out.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)
    print(f"ranks {options.ranks}, layers {options.layers}: dense, cut, compared", flush=True)
    if not start_ranks(options.ranks, sys.argv[1:]):
        print("error: a rank failed, see above", file=sys.stderr)
        return 1
    seen = json.loads(record.read_text())
    if "error" not in seen:
        drawn = [Matrix(**matrix) for matrix in seen["matrices"]]
        picture = options.out / "split.png"
        alike = f"all {options.layers} are cut alike"
        title = f"A block of the GPT on {options.ranks} ranks ({alike}): who holds what, to scale"
        print(f"\n{report(seen)}\n\n{draw_text(drawn)}\n")
        if draw_picture(drawn, options.ranks, title, picture):
            print(f"The same to scale: {picture}")
        else:
            print("No picture: pip install matplotlib")
    wrong = failures(seen)
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
