"""The command line: ``tp-native generate | plan | doctor | blame``.

Exit status: 0 good, 1 the work failed, 2 bad arguments, 130 interrupted. Errors are one line on
stderr, then what to do; set ``TP_NATIVE_DEBUG=1`` for the traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import flight
from .errors import TensorParallelError
from .launch import follow_parent, launch
from .show_plan import add_arguments, show_plan


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options, arguments))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1
    except (TensorParallelError, OSError, MemoryError) as error:
        return _report(error, 1)
    except (ValueError, TypeError) as error:
        return _report(error, 2)
    except Exception as error:
        return _report(error, 1)


def _report(error: BaseException, status: int) -> int:
    if os.environ.get("TP_NATIVE_DEBUG", "") not in ("", "0"):
        traceback.print_exc()
    print(f"error: {error or type(error).__name__}", file=sys.stderr, flush=True)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tp-native", description="One model, N ranks.")
    commands = parser.add_subparsers(required=True, metavar="generate | plan | doctor | blame")

    generate = commands.add_parser("generate", help="continue a text on N ranks of this host")
    generate.set_defaults(run=_generate)
    _add_model(generate)
    generate.add_argument("--prompt", required=True, help="the text to continue")
    generate.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    generate.add_argument("--dtype", choices=["float32", "bfloat16", "float16", "float64"])
    generate.add_argument("--sample", action="store_true", help="draw tokens; default: greedy")
    generate.add_argument("--temperature", type=float, default=1.0)
    generate.add_argument("--top-k", type=int, default=0, metavar="K", help="0: off")
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P", help="1: off")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument(
        "--compare", action="store_true", help="run on 1 rank too and compare tokens and logits"
    )
    generate.add_argument(
        "--record", metavar="DIR", help="write tokens, figures and the prompt's logits into DIR"
    )

    plan = commands.add_parser("plan", help="show how a model would be cut; reads no weights")
    plan.set_defaults(run=lambda options, arguments: show_plan(options))
    add_arguments(plan)

    doctor = commands.add_parser("doctor", help="show versions, backends and the machine")
    doctor.set_defaults(run=_doctor)

    blame = commands.add_parser("blame", help="read a flight record: who made a group fail, where")
    blame.set_defaults(run=_blame)
    blame.add_argument("file", type=Path, help="the file that the error named")
    blame.add_argument("--last", type=int, default=5, metavar="N", help="operations to show")
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="a Hugging Face model folder")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="number of ranks; default 1")


# -- generate


def _generate(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    if "TP_NATIVE_LAUNCHED" in os.environ:
        follow_parent()
        return _generate_rank(options)
    if os.environ.get("RANK"):  # under torchrun
        return _generate_rank(options)
    _check_generate(options)
    if not options.compare:
        return launch(arguments, options.tp)
    with tempfile.TemporaryDirectory(prefix="tp_native-") as scratch:
        records = []
        for ranks in (1, options.tp):
            print(f"--- {_ranks(ranks)}", flush=True)
            folder = Path(options.record or scratch) / f"tp{ranks}"
            again = [a for a in arguments if a != "--compare"]
            status = launch([*again, "--tp", str(ranks), "--record", str(folder)], ranks)
            if status != 0:
                return status
            records.append(folder)
        comparison = compare(*records)
    if options.record:
        _write_json(Path(options.record) / "comparison.json", comparison)
    print(_comparison_text(comparison), flush=True)
    return 0


def _check_generate(options: argparse.Namespace) -> None:
    """What can be refused before ranks are started."""
    folder = _check_model(options)
    if not options.prompt:
        raise ValueError("--prompt is empty: give the text to continue")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise ValueError(
            f"{folder}: no tokenizer.json: expected the tokenizer's files beside the weights; "
            "copy them there"
        )
    if options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {options.max_new_tokens}: expected 1 or more")


def _check_model(options: argparse.Namespace) -> Path:
    folder = Path(options.model)
    if not folder.is_dir():
        raise ValueError(
            f"--model {folder}: no such folder; expected a Hugging Face model folder with "
            "config.json and *.safetensors (nothing is downloaded)"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model {folder}: no config.json; expected a Hugging Face model folder")
    if not 1 <= options.tp <= 16:
        raise ValueError(f"--tp {options.tp}: expected 1 to 16 ranks")
    return folder


def _generate_rank(options: argparse.Namespace) -> int:
    import torch

    from .checkpoint.loader import load_pretrained
    from .generate import generate
    from .group import init_tensor_parallel

    with init_tensor_parallel() as group:
        if group.size != options.tp:
            raise ValueError(
                f"--tp {options.tp} inside a job of {group.size} ranks: give --tp {group.size}, or "
                "start tp-native without torchrun"
            )
        started = time.perf_counter()
        dtype = getattr(torch, options.dtype) if options.dtype else None
        model = load_pretrained(options.model, group, dtype=dtype)
        load_s = time.perf_counter() - started
        tokenizer = _Tokenizer(Path(options.model))
        ids = torch.tensor([tokenizer.encode(options.prompt)], dtype=torch.int64)
        _check_fits(model, ids.shape[1], options.max_new_tokens)

        before = group.stats()
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0].float()
        after = group.stats()

        printer = _Printer(tokenizer, options.prompt if group.rank == 0 else None)
        times: list[float] = []

        def on_token(chosen: torch.Tensor) -> None:
            times.append(time.perf_counter())
            printer.add(int(chosen[0]))

        started = time.perf_counter()
        tokens = generate(
            model,
            ids,
            options.max_new_tokens,
            do_sample=options.sample,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
            on_token=on_token,
        )
        printer.end()
        peaks = group.all_gather(torch.tensor([_peak_bytes()]))
        facts = {
            "ranks": group.size,
            "tokens": tokens[0].tolist(),
            "prompt_tokens": ids.shape[1],
            "load_s": load_s,
            "first_token_s": times[0] - started,
            "tokens_per_s": (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None,
            "collectives_per_forward": after["collectives"] - before["collectives"],
            "bytes_per_forward": after["bytes"] - before["bytes"],
            "peak_bytes": peaks.tolist(),
        }
        if group.rank == 0:
            print(_facts_text(facts), file=sys.stderr, flush=True)
            if options.record:
                from safetensors.torch import save_file

                folder = Path(options.record)
                folder.mkdir(parents=True, exist_ok=True)
                _write_json(folder / "facts.json", facts)
                save_file({"logits": logits.contiguous()}, folder / "logits.safetensors")
    return 0


def _check_fits(model: Any, prompt_tokens: int, max_new_tokens: int) -> None:
    if prompt_tokens == 0:
        raise ValueError("--prompt has no tokens: give some text")
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and prompt_tokens + max_new_tokens > limit:
        raise ValueError(
            f"the prompt has {prompt_tokens} tokens and --max-new-tokens is {max_new_tokens}, but "
            f"the model's context is {limit}: shorten the prompt, or give --max-new-tokens "
            f"{max(0, limit - prompt_tokens)} or less"
        )


class _Tokenizer:
    """The folder's tokenizer, by the tokenizers library where its file allows."""

    def __init__(self, folder: Path) -> None:
        self._fast: Any = None
        self._slow: Any = None
        if (folder / "tokenizer.json").is_file():
            from tokenizers import Tokenizer

            try:
                self._fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
            except Exception as error:
                raise TensorParallelError(
                    f"{folder / 'tokenizer.json'} cannot be read: {error}"
                ) from error
        else:
            from transformers import AutoTokenizer

            self._slow = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def encode(self, text: str) -> list[int]:
        """Ids, with the special tokens that the tokenizer adds."""
        ids = self._fast.encode(text).ids if self._fast else self._slow(text).input_ids
        return list(ids)

    def decode(self, ids: list[int]) -> str:
        """Text without special tokens."""
        tokenizer = self._fast or self._slow
        return str(tokenizer.decode(ids, skip_special_tokens=True))


class _Printer:
    """Streams the text; holds back bytes that are not a whole character yet."""

    def __init__(self, tokenizer: _Tokenizer, prompt: str | None) -> None:
        self._tokenizer = tokenizer
        self._is_on = prompt is not None
        self._ids: list[int] = []
        self._shown = 0
        if prompt is not None:
            print(prompt, end="", flush=True)

    def add(self, token: int) -> None:
        if not self._is_on:
            return
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if not text.endswith("\ufffd"):
            print(text[self._shown :], end="", flush=True)
            self._shown = len(text)

    def end(self) -> None:
        if self._is_on:
            print(self._tokenizer.decode(self._ids)[self._shown :], flush=True)


def _peak_bytes() -> int:
    """Largest resident size of this process so far. Not ru_maxrss, which survives exec."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _write_json(path: Path, facts: dict[str, Any]) -> None:
    path.write_text(json.dumps(facts, indent=2) + "\n")


def _ranks(count: int) -> str:
    return f"{count} rank" if count == 1 else f"{count} ranks"


def _facts_text(facts: dict[str, Any]) -> str:
    rate = f"{facts['tokens_per_s']:.1f} tokens/s" if facts["tokens_per_s"] else "one token"
    peaks = ", ".join(f"{peak / 2**20:.0f}" for peak in facts["peak_bytes"])
    return (
        f"[{_ranks(facts['ranks'])}: {rate}, first after {facts['first_token_s'] * 1e3:.0f} ms; "
        f"{facts['collectives_per_forward']} collectives and {facts['bytes_per_forward']} bytes "
        "per "
        f"forward of the {facts['prompt_tokens']}-token prompt; peak memory {peaks} MiB]"
    )


def compare(one: Path, many: Path) -> dict[str, Any]:
    """Two recorded runs side by side: equal tokens, logit difference, speed and memory."""
    from safetensors.torch import load_file

    facts = [json.loads((folder / "facts.json").read_text()) for folder in (one, many)]
    reference, logits = (
        load_file(folder / "logits.safetensors")["logits"] for folder in (one, many)
    )
    difference = float((logits - reference).abs().max())
    return {
        "tokens_equal": facts[0]["tokens"] == facts[1]["tokens"],
        "logit_difference": difference,
        "logit_difference_relative": difference / float(reference.abs().max()),
        "runs": facts,
    }


def _comparison_text(comparison: dict[str, Any]) -> str:
    lines = [
        f"tokens equal: {'yes' if comparison['tokens_equal'] else 'NO'}",
        f"largest logit difference: {comparison['logit_difference']:.3g} "
        f"({comparison['logit_difference_relative']:.2g} of the largest logit)",
    ]
    return "\n".join([*lines, *(_facts_text(facts).strip("[]") for facts in comparison["runs"])])


# -- doctor, blame


def _doctor(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    import platform

    import torch

    from . import gpu
    from ._native import _C

    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    rows = {
        "tp_native": f"{_C.__version__}, built against torch {_C.TORCH_VERSION}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "backends": ", ".join(
            b for b in ("shm", "local", "c10d", "nccl") if b == "c10d" or _C.is_available(b)
        ),
        "reductions": _C.reduce_isa(),
        **gpu.facts(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory / 2**30:.1f} GiB",
        "kernel": platform.release(),
    }
    for name in ("transformers", "tokenizers", "safetensors", "rich"):
        rows[name] = _version(name)
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    return 0


def _blame(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    if options.last < 0:
        raise ValueError(f"--last {options.last}: expected 0 or more")
    print(flight.explain(flight.read(options.file), options.last))
    return 0


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return 'not installed: pip install "tp_native[hf]"'
