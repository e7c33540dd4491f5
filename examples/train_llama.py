"""Train a small byte-level Llama on several ranks, without a line of parallel code in the model.

torchrun --standalone --nproc-per-node 2 examples/train_llama.py --out DIR

The text is the English documentation that every CPython carries (``pydoc_data.topics``). All ranks
see the same batches; the model is transformers' own, cut by ``tp.parallelize``. ``--steps`` makes
runs repeatable, ``--stop`` ends one early and ``--resume`` goes on with it, at any number of ranks.
"""

from __future__ import annotations

import argparse
import json
import math
import pydoc_data.topics
import time
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import tp_native as tp

BATCH, LENGTH = 16, 128


def byte_tokenizer() -> tokenizers.Tokenizer:
    """One token for each of the 256 byte values, none merged: any text survives the round trip."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def read_text() -> str:
    """The documentation's topics in a fixed order."""
    topics: dict[str, str] = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def make_model() -> LlamaForCausalLM:
    """A Llama of 0.8 M parameters; nothing in it knows of ranks."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


@torch.no_grad()
def held_out_loss(model: Any, ids: Tensor) -> float:
    """Mean loss in nats per byte over the end of the text, which is never trained on."""
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)[:32]
    return float(model(input_ids=rows, labels=rows).loss)


def main() -> None:
    """Train, report, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--seconds", type=float, default=60.0, help="training time")
    parser.add_argument("--rate", type=float, default=5e-3, help="peak learning rate")
    parser.add_argument("--steps", type=int, help="train so many steps, not --seconds")
    parser.add_argument("--stop", type=int, help="with --steps: end after this step")
    parser.add_argument("--resume", type=Path, help="with --steps: go on with this folder's state")
    options = parser.parse_args()
    if options.steps is None and (options.stop or options.resume):
        parser.error("--stop and --resume go with --steps: a time says nothing of where a run is")

    with tp.init_tensor_parallel() as group:
        tokenizer = byte_tokenizer()
        ids = torch.tensor(tokenizer.encode(read_text()).ids)
        split = len(ids) - len(ids) // 20
        train, held_out = ids[:split], ids[split:]
        model = tp.parallelize(make_model(), group)
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
        before = held_out_loss(model, held_out)
        step, last = 0, options.stop or options.steps
        if options.resume is not None:
            tp.DistributedCheckpointLoader(options.resume, group).load(model, optimizer)
            step = json.loads((options.resume / "training.json").read_text())["steps"]
        losses = []

        progress = torch.zeros(1, dtype=torch.float64)
        bar = tqdm(total=100, unit="%", disable=group.rank != 0, bar_format="{l_bar}{bar}{postfix}")
        started = time.monotonic()
        while progress.item() < 1 if last is None else step < last:
            draw = torch.Generator().manual_seed(step)  # the same batch on every rank
            starts = torch.randint(len(train) - LENGTH, (BATCH,), generator=draw)
            rows = torch.stack([train[s : s + LENGTH] for s in starts])
            warm_up = min(1.0, (step + 1) / 20)
            if options.steps is not None:
                progress.fill_(step / options.steps)
            for settings in optimizer.param_groups:
                decay = 0.5 * (1 + math.cos(math.pi * progress.item()))
                settings["lr"] = options.rate * warm_up * max(decay, 0.05)
            loss = model(input_ids=rows, labels=rows).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            step += 1
            if options.steps is None:
                # rank 0's clock decides for all, or the ranks would stop at different steps
                progress.fill_((time.monotonic() - started) / options.seconds)
                group.broadcast_(progress)
            bar.n = min(100, math.ceil(100 * progress.item()))
            bar.set_postfix_str(f"step {step}, loss {losses[-1]:.3f}")
        bar.close()

        facts = {
            "parameters": sum(math.prod(t.shape) for t in make_model().parameters()),
            "text_bytes": len(ids),
            "steps": step,
            "loss_before": before,
            "loss_after": held_out_loss(model, held_out),
            "losses": losses,
        }
        tp.CheckpointSaver(options.out, group).save(model, optimizer if options.stop else None)
        if group.rank == 0:
            PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(options.out)
            (options.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
            print(
                f"held-out loss {before:.3f} -> {facts['loss_after']:.3f} nats per byte", flush=True
            )


if __name__ == "__main__":
    main()
