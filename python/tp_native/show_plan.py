"""``tp-native plan``: how a folder's model would be cut. Reads ``config.json`` alone."""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from .errors import PlanError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("folder", nargs="?", metavar="MODEL", help="a Hugging Face model folder")
    parser.add_argument("--model", metavar="DIR", help="the folder, as the other commands take it")
    parser.add_argument("--tp", type=int, metavar="N", help="number of ranks")
    parser.add_argument("--ratios", metavar="R,R,...", help="the ranks' shares, such as 2,1,1")
    parser.add_argument("--rules", metavar="FILE", help="JSON: an object of patterns and styles")
    parser.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="PATTERN=STYLE",
        help="a style for the modules of a pattern; goes before those of --rules",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, every module by itself")
    parser.add_argument("--no-color", action="store_true", help="plain text on terminals too")


def show_plan(options: argparse.Namespace) -> int:
    """Print the plan; 0. Weights are not opened.

    Raises: ValueError for bad arguments; CheckpointError and PlanError where there is no plan.
    """
    folder = _folder(options)
    ratios = _ratios(options.ratios)
    ranks = len(ratios or ()) if options.tp is None else options.tp
    if options.tp is None and ratios is None:
        raise ValueError("--tp is missing: the number of ranks\ngive one, for example --tp 2")
    if ranks < 1:
        raise ValueError(f"--tp {ranks}: expected 1 rank or more\ngive one, for example --tp 2")
    if ratios is not None and len(ratios) != ranks:
        raise ValueError(
            f"--ratios {options.ratios}: {len(ratios)} shares for {ranks} ranks\n"
            f"give each rank one, for example --ratios {','.join(['2'] + ['1'] * (ranks - 1))}"
        )
    rules = _rules(options)

    from .checkpoint.skeleton import build_skeleton, read_config, resolve_dtype
    from .plan import plan
    from .plan.styles import check_rules

    config = read_config(folder)
    model = build_skeleton(config, resolve_dtype(config, {}, None))
    try:
        check_rules(model, rules)
    except PlanError as error:
        raise ValueError(_in_lines(error)) from error
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        try:
            made = plan(model, ranks, rules=rules, ratios=ratios)
        except PlanError as error:
            raise PlanError(_in_lines(error)) from error
    for one in told:
        if issubclass(one.category, UserWarning):
            print(f"warning: {one.message}", file=sys.stderr)
    if options.json:
        print(made.explain("json"))
    elif options.no_color or not sys.stdout.isatty() or find_spec("rich") is None:
        print(made.explain())
    else:
        from rich.console import Console

        Console().print(made.explain("rich"))
    return 0


def _folder(options: argparse.Namespace) -> Path:
    if (options.folder is None) == (options.model is None):
        raise ValueError(
            "expected one model folder\nfor example: tp-native plan path/to/model --tp 2"
        )
    folder = Path(options.folder or options.model)
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: no such folder\n"
            "give a Hugging Face model folder; its config.json is enough (nothing is downloaded)"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder}: no config.json\ngive a Hugging Face model folder; weights are not needed"
        )
    return folder


def _ratios(given: str | None) -> list[float] | None:
    if given is None:
        return None
    try:
        ratios = [float(word) for word in given.split(",")]
    except ValueError:
        ratios = []
    if not ratios or not all(r >= 0 and math.isfinite(r) for r in ratios) or not any(ratios):
        raise ValueError(
            f"--ratios {given}: expected numbers of at least 0, not all 0\n"
            "give each rank its share, for example --ratios 2,1,1"
        )
    return ratios


def _rules(options: argparse.Namespace) -> Mapping[str, str]:
    rules: dict[str, str] = {}
    if options.rules is not None:
        try:
            found = json.loads(Path(options.rules).read_text())
        except (OSError, ValueError) as error:
            said = error.strerror if isinstance(error, OSError) else error
            raise ValueError(
                f"--rules {options.rules}: {said}\ngive a JSON file of patterns and styles"
            ) from error
        if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
            raise ValueError(
                f"--rules {options.rules}: expected one object of patterns and styles\n"
                'for example {"model.layers.*.mlp.up_proj": "colwise"}'
            )
        rules |= found
    for rule in options.rule:
        pattern, equals, style = rule.rpartition("=")
        if not equals or not pattern or not style:
            raise ValueError(
                f"--rule {rule}: expected PATTERN=STYLE\nfor example --rule lm_head=replicate"
            )
        rules[pattern] = style
    return rules


def _in_lines(error: PlanError) -> str:
    """What is wrong in the first line, what to do in the next."""
    return str(error).replace("; ", "\n", 1)
