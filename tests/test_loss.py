"""The cross entropy of cut logits against F.cross_entropy of the whole ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tp_native as tp
import tp_native.nn
from harness import run_ranks
from oracle import relative_error
from tp_native.group import Group
from tp_native.nn import vocab_parallel_cross_entropy

WORLDS = [1, 2, 3, 4]
F64 = torch.float64
INF = float("inf")


def randn(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def ids(high: int, *shape: int, seed: int = 4) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def dense(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    """F.cross_entropy of ``(..., V)`` and ``(...)``."""
    found = F.cross_entropy(
        logits.reshape(target.numel(), logits.shape[-1]), target.reshape(-1).long(), **options
    )
    return found.view(target.shape) if options.get("reduction") == "none" else found


def cuts(size: int, ranks: int) -> list[tp.Partition]:
    """Even, uneven, and with empty shards at both ends."""
    sizes = [[size - (ranks - 1), *[1] * (ranks - 1)], [*[0] * (ranks - 1), size]]
    sizes.append([size, *[0] * (ranks - 1)])
    return [tp.Partition.even(size, ranks), *map(tp.Partition.from_sizes, sizes)]


def collectives(group: Group) -> int:
    return int(group.stats()["collectives"])


def shapes(vocabulary: int) -> dict[str, Tensor]:
    """Whole logits, as they lie in memory."""
    return {
        "matrix": randn(5, vocabulary),
        "batch": randn(2, 3, vocabulary),
        "deep": randn(2, 3, 2, vocabulary),
        "vector": randn(vocabulary),
        "empty": randn(0, vocabulary),
        "empty batch": randn(3, 0, vocabulary),
        "shifted": randn(2, 5, vocabulary)[:, :-1],  # its rows are in no one stride
        "permuted": randn(3, 2, vocabulary).transpose(0, 1),
        "strided": randn(6, 2 * vocabulary)[::2, ::2],
        "transposed": randn(vocabulary, 4).t(),
    }


def matches_dense(group: Group, vocabulary: int) -> None:
    for cut in cuts(vocabulary, group.size):
        mine = cut.slice(group.rank)
        for name, whole in shapes(vocabulary).items():
            target = ids(vocabulary, *whole.shape[:-1])
            target.view(-1)[1::3] = -100
            for smoothing in (0.0, 0.25, 1.0):
                for known in (True, False):
                    x, ref = whole.detach(), whole.clone().requires_grad_()
                    x = x[..., mine].requires_grad_()
                    expected = dense(ref, target, reduction="none", label_smoothing=smoothing)
                    before = collectives(group)
                    loss = vocab_parallel_cross_entropy(
                        x,
                        target if known else target.int(),
                        label_smoothing=smoothing,
                        partition=cut if known else None,
                        group=group,
                    )
                    what = (name, cut, smoothing, known)
                    forward = collectives(group) - before
                    assert forward == (0 if group.size == 1 else 1 if known else 2), what
                    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
                    cotangent = randn(*target.shape, seed=5)
                    loss.backward(cotangent)
                    expected.backward(cotangent)
                    assert collectives(group) == before + forward, what
                    assert x.grad is not None and ref.grad is not None
                    assert x.grad.shape == x.shape
                    torch.testing.assert_close(x.grad, ref.grad[..., mine], rtol=1e-12, atol=1e-12)
                    assert not x.grad[target == -100].any(), what


@pytest.mark.parametrize("vocabulary", [5, 67])
@pytest.mark.parametrize("world_size", WORLDS)
def test_float64_loss_and_gradient_are_the_dense_ones(world_size: int, vocabulary: int) -> None:
    run_ranks(matches_dense, world_size, vocabulary)


def test_thread_ranks_have_the_dense_loss() -> None:
    tp.simulate(matches_dense, 3, 11)


def narrow_types(group: Group, vocabulary: int) -> list[bytes]:
    bits = []
    cut = tp.Partition.even(vocabulary, group.size)
    mine = cut.slice(group.rank)
    target = ids(vocabulary, 7)
    target[3] = -1
    options = {"ignore_index": -1, "reduction": "none"}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        whole = (randn(7, vocabulary) * 3).to(dtype)
        for smoothing in (0.0, 0.1):
            ref = whole.double().requires_grad_()
            expected = dense(ref, target, label_smoothing=smoothing, **options)
            x = whole[:, mine].clone().requires_grad_()
            loss = vocab_parallel_cross_entropy(
                x, target, label_smoothing=smoothing, ignore_index=-1, partition=cut, group=group
            )
            assert loss.dtype == torch.float32
            # float32 statistics, whatever the logits are
            torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
            loss.sum().backward()
            expected.sum().backward()
            assert x.grad is not None and ref.grad is not None and x.grad.dtype == dtype
            # one rounding to the dtype, and float32's in the exponential and the sum; alone it is
            # torch's, which rounds the logarithm of the sum first
            slack = 5e-6 if group.size > 1 else 1e-4
            torch.testing.assert_close(
                x.grad.double(),
                ref.grad[:, mine],
                rtol=torch.finfo(dtype).eps / 2 + slack,
                # float16's least step; float32's rounding of what cancels at the label
                atol=2**-24 if dtype == torch.float16 else 1e-7,
            )
            bits.append(loss.detach().numpy().tobytes())
    return bits


@pytest.mark.parametrize("vocabulary", [5, 50257])
@pytest.mark.parametrize("world_size", WORLDS)
def test_short_types_have_float32_losses_equal_to_the_bit_on_all_ranks(
    world_size: int, vocabulary: int
) -> None:
    found = run_ranks(narrow_types, world_size, vocabulary)
    assert all(bits == found[0] for bits in found)


def is_dense_alone(group: Group) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        whole = randn(2, 6, 301).to(dtype)
        target = ids(301, 2, 6)
        target[0, 2] = -100
        for reduction in ("none", "mean", "sum"):
            for smoothing in (0.0, 0.1):
                options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
                x, ref = (whole.clone().requires_grad_() for _ in range(2))
                loss = vocab_parallel_cross_entropy(x, target, group=group, **options)
                expected = dense(ref.float(), target, **options)
                assert torch.equal(loss, expected)
                loss.sum().backward()
                expected.sum().backward()
                assert x.grad is not None and ref.grad is not None
                assert torch.equal(x.grad, ref.grad)
    assert collectives(group) == 0


def test_alone_it_is_torchs_to_the_bit() -> None:
    run_ranks(is_dense_alone, 1)


def reduces(group: Group) -> None:
    cut = tp.Partition.even(13, group.size)
    mine = cut.slice(group.rank)
    whole = randn(2, 4, 13)
    some = ids(13, 2, 4)
    some[1, 2:] = -100
    for target in (some, torch.full((2, 4), -100)):
        for reduction in ("none", "mean", "sum"):
            x, ref = whole[..., mine].clone().requires_grad_(), whole.clone().requires_grad_()
            found = vocab_parallel_cross_entropy(x, target, reduction=reduction, group=group)  # type: ignore[arg-type]
            expected = dense(ref, target, reduction=reduction)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0, equal_nan=True)
            found.sum().backward()
            expected.sum().backward()
            torch.testing.assert_close(x.grad, ref.grad[..., mine], rtol=1e-12, atol=1e-15)  # type: ignore[index]
    nothing = vocab_parallel_cross_entropy(
        whole[:, :0, mine], some[:, :0], reduction="mean", group=group
    )
    assert nothing.isnan()


@pytest.mark.parametrize("world_size", WORLDS)
def test_reductions_are_torchs(world_size: int) -> None:
    run_ranks(reduces, world_size)


def megatron_case(group: Group) -> Tensor:
    """Megatron-LM, tests/unit_tests/tensor_parallel/test_cross_entropy.py."""
    whole = torch.arange(8.0).repeat(16, 4)
    local = whole[:, tp.Partition.even(32, group.size).slice(group.rank)]
    return vocab_parallel_cross_entropy(local, torch.arange(0, 32, 2), group=group)


@pytest.mark.parametrize("world_size", WORLDS)
def test_megatrons_constants(world_size: int) -> None:
    # log(4 * (e^0 + ... + e^7)) - target % 8
    expected = torch.tensor([8.8446, 6.8446, 4.8446, 2.8446] * 4)
    for found in run_ranks(megatron_case, world_size):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def large_and_missing(group: Group) -> None:
    vocabulary = 9
    for cut in cuts(vocabulary, group.size):
        mine = cut.slice(group.rank)
        target = torch.tensor([0, 8, 4, -100])
        large = randn(4, vocabulary) * 10 + 1e4
        large[1] -= 2e4
        missing = randn(4, vocabulary)
        missing[0, 1:] = -INF  # other ranks have nothing else
        missing[1, :8] = -INF
        missing[2, cut.slice(group.size // 2)] = -INF
        missing[2, 4] = 3.0
        missing[3] = -INF  # ignored
        for whole in (large, missing):
            for dtype in (F64, torch.float32):
                given = whole.to(dtype)
                ref = given.double().clone().requires_grad_()
                x = given[:, mine].clone().requires_grad_()
                loss = vocab_parallel_cross_entropy(x, target, partition=cut, group=group)
                expected = dense(ref, target, reduction="none")
                limit = 1e-12 if dtype == F64 else 1e-6
                torch.testing.assert_close(loss.double(), expected, rtol=limit, atol=limit)
                loss.sum().backward()
                expected[:3].sum().backward()
                assert x.grad is not None and ref.grad is not None
                torch.testing.assert_close(
                    x.grad.double()[:3], ref.grad[:3, mine], rtol=limit, atol=limit
                )
                if group.size > 1 or whole is large:  # torch has NaN there: 0 * (-inf - -inf)
                    assert not x.grad[3].any()


@pytest.mark.parametrize("world_size", WORLDS)
def test_huge_logits_and_rows_of_minus_infinity(world_size: int) -> None:
    run_ranks(large_and_missing, world_size)


def what_is_not_finite_shows(group: Group) -> list[bool]:
    cut = tp.Partition.even(8, group.size)
    whole = torch.zeros(4, 8)
    whole[0] = -INF
    whole[1, 7] = float("nan")
    whole[2, 7] = INF
    target = torch.tensor([1, 1, 1, 1])
    loss = vocab_parallel_cross_entropy(whole[:, cut.slice(group.rank)], target, group=group)
    expected = dense(whole, target, reduction="none")
    assert expected.isnan().tolist() == [True, True, True, False]
    return [bool(nan) for nan in loss.isnan()]


@pytest.mark.parametrize("world_size", WORLDS)
def test_what_is_nan_in_torch_is_nan(world_size: int) -> None:
    for found in run_ranks(what_is_not_finite_shows, world_size):
        assert found == [True, True, True, False]


def ignores_padding(group: Group) -> None:
    vocabulary, padded = 10, 16
    target = ids(vocabulary, 6)
    target[2] = -100
    for cut in cuts(padded, group.size):
        mine = cut.slice(group.rank)
        for smoothing in (0.0, 0.3):
            for dtype in (F64, torch.float32):
                given = randn(6, padded).to(dtype)
                given[:, vocabulary:] = 50.0  # counted, it would be all there is
                ref = given.double().clone().requires_grad_()
                x = given[:, mine].clone().requires_grad_()
                loss = vocab_parallel_cross_entropy(
                    x,
                    target,
                    label_smoothing=smoothing,
                    vocab_size=vocabulary,
                    partition=cut,
                    group=group,
                )
                expected = dense(
                    ref[:, :vocabulary], target, reduction="none", label_smoothing=smoothing
                )
                limit = 1e-12 if dtype == F64 else 1e-6
                torch.testing.assert_close(loss.double(), expected, rtol=limit, atol=limit)
                loss.sum().backward()
                expected.sum().backward()
                assert x.grad is not None and ref.grad is not None
                torch.testing.assert_close(
                    x.grad.double(), ref.grad[:, mine], rtol=limit, atol=limit
                )
                is_padding = torch.arange(padded)[mine] >= vocabulary
                assert not x.grad[:, is_padding].any()
    with pytest.raises(IndexError, match=r"out of bounds|outside the vocabulary: expected 0 to 9"):
        vocab_parallel_cross_entropy(
            given[:, mine], target + 10, vocab_size=10, partition=cut, group=group
        )


@pytest.mark.parametrize("world_size", WORLDS)
def test_padding_counts_nowhere(world_size: int) -> None:
    run_ranks(ignores_padding, world_size)


def refuses(group: Group) -> None:
    cut = tp.Partition.even(10, group.size)
    x = randn(3, 10)[:, cut.slice(group.rank)]
    target = torch.tensor([1, 2, 3])
    outside = "out of bounds|is outside the vocabulary: expected 0 to 9"
    for wrong in (10, -1):
        for partition in (cut, None):
            with pytest.raises(IndexError, match=outside):
                vocab_parallel_cross_entropy(
                    x, torch.tensor([1, wrong, 3]), partition=partition, group=group
                )
    for vocab_size in (0, 11):
        with pytest.raises(ValueError, match=f"vocab_size {vocab_size}: expected 1 to 10"):
            vocab_parallel_cross_entropy(x, target, vocab_size=vocab_size, group=group)
    with pytest.raises(ValueError, match=r"expected \(..., local_vocab\) and \(...\)"):
        vocab_parallel_cross_entropy(x, target[:2], group=group)
    with pytest.raises(TypeError, match="expected int64 or int32"):
        vocab_parallel_cross_entropy(x, target.float(), group=group)
    with pytest.raises(ValueError, match="reduction 'avg': expected"):
        vocab_parallel_cross_entropy(x, target, reduction="avg", group=group)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"label_smoothing 1.5: expected 0 to 1"):
        vocab_parallel_cross_entropy(x, target, label_smoothing=1.5, group=group)
    assert vocab_parallel_cross_entropy(x, target, group=group).shape == (3,)  # nothing is lost


@pytest.mark.parametrize("world_size", WORLDS)
def test_bad_arguments_are_told_on_every_rank(world_size: int) -> None:
    run_ranks(refuses, world_size)


def tells_what_one_rank_sees(group: Group) -> None:
    """No other rank is left waiting."""
    is_last = group.rank == group.size - 1
    cut = tp.Partition.even(4 * group.size, group.size)
    target = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"columns, the partition says \[4, 4.*: pass this rank's"):
        vocab_parallel_cross_entropy(randn(2, 3 if is_last else 4), target, partition=cut)
    text = "target 99 at position 0 is outside" if is_last else "another rank has a target outside"
    with pytest.raises(IndexError, match=text):
        vocab_parallel_cross_entropy(
            randn(2, 4), torch.tensor([99 if is_last else 0, 1]), partition=cut
        )
    assert (
        vocab_parallel_cross_entropy(randn(2, 4, seed=group.rank), target, partition=cut)
        .isfinite()
        .all()
    )


@pytest.mark.parametrize("world_size", [2, 3])
def test_what_only_one_rank_sees_is_told_to_all(world_size: int) -> None:
    run_ranks(tells_what_one_rank_sees, world_size)


def notices_gathered_logits(group: Group) -> None:
    whole = randn(5, 12)
    target = ids(12, 5)
    target[0] = -100
    advice = "gather_output=False"
    of_gathered = tp.Partition.from_sizes([12] * group.size)
    for dtype in (F64, torch.float32, torch.bfloat16):
        for smoothing in (0.0, 0.1):
            for partition in (None, of_gathered):
                with pytest.raises(ValueError, match=f"look like gathered logits.*{advice}"):
                    vocab_parallel_cross_entropy(
                        whole.to(dtype),
                        target,
                        label_smoothing=smoothing,
                        partition=partition,
                        group=group,
                    )
    cut = tp.Partition.even(12, group.size)
    with pytest.raises(ValueError, match=f"every rank holds the whole vocabulary.*{advice}"):
        vocab_parallel_cross_entropy(whole, target, partition=cut, group=group)
    padded = F.pad(whole, (0, 2))
    with pytest.raises(ValueError, match=f"padding included.*{advice}"):
        vocab_parallel_cross_entropy(padded, target, vocab_size=12, group=group)


def goes_on(group: Group) -> None:
    """What could be mistaken for gathered logits, and is none."""
    target = ids(12, 5)
    target[0] = -100
    zeros = torch.zeros(5, 12)
    expected = torch.full((5,), 12.0 * group.size).log()
    expected[0] = 0
    found = vocab_parallel_cross_entropy(zeros, target, group=group)
    torch.testing.assert_close(found, expected)
    same = randn(5, 12)
    far = torch.tensor([1, 2, 3, 4, 12 * group.size - 1])  # beyond the first rank's
    found = vocab_parallel_cross_entropy(same, far, group=group)
    torch.testing.assert_close(found, dense(same.repeat(1, group.size), far, reduction="none"))
    almost = same.clone()
    almost[4, 11] += 1e-9 * group.rank
    found = vocab_parallel_cross_entropy(almost, target, group=group)
    wide = dense(same.repeat(1, group.size), target, reduction="none")
    torch.testing.assert_close(found, wide)
    cut = tp.Partition.from_sizes([12] * group.size)
    padded = vocab_parallel_cross_entropy(same, target, vocab_size=12, partition=cut, group=group)
    torch.testing.assert_close(padded, dense(same, target, reduction="none"))


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("fn", [notices_gathered_logits, goes_on])
def test_gathered_logits_are_noticed(fn: Any, world_size: int) -> None:
    run_ranks(fn, world_size)


def keeps_no_softmax(group: Group) -> None:
    cut = tp.Partition.even(256 * group.size, group.size)
    x = randn(64, 256, seed=group.rank).float().requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        loss = vocab_parallel_cross_entropy(x, ids(256, 64), partition=cut, group=group)
    assert [t.numel() for t in saved if t.data_ptr() != x.data_ptr()] == [64, 128, 2]
    with torch.profiler.profile(profile_memory=True) as profile:
        (grad,) = torch.autograd.grad(loss.sum(), x)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert grad.nbytes <= allocated <= grad.nbytes + 64  # and the scalars of the sum


@pytest.mark.parametrize("world_size", [2, 3])
def test_backward_makes_the_gradient_and_no_other_buffer(world_size: int) -> None:
    run_ranks(keeps_no_softmax, world_size)


def refuses_second_derivatives(group: Group) -> None:
    x = randn(3, 4, seed=group.rank).requires_grad_()
    loss = vocab_parallel_cross_entropy(x, ids(4, 3), group=group)
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        torch.autograd.grad(loss.sum(), x, create_graph=True)


def test_second_derivatives_are_refused() -> None:
    run_ranks(refuses_second_derivatives, 2)


def compiles(group: Group, backend: str, is_known: bool) -> None:
    torch._dynamo.reset()
    vocabulary = 11
    cut = tp.Partition.from_sizes([vocabulary - 2 * (group.size - 1), *[2] * (group.size - 1)])
    mine = cut.slice(group.rank)

    def run(x: Tensor, target: Tensor) -> Tensor:
        return vocab_parallel_cross_entropy(
            x * 2,
            target,
            label_smoothing=0.1,
            reduction="mean",
            vocab_size=vocabulary - 1,
            partition=cut if is_known else None,
        )

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    for rows in (4, 6):  # the second makes the size symbolic
        target = ids(vocabulary - 1, 2, rows)
        target[0, 1] = -100
        whole = randn(2, rows, vocabulary)
        grads = []
        for fn in (run, compiled):
            x = whole[..., mine].clone().requires_grad_()
            before = collectives(group)
            loss = fn(x, target)
            loss.backward()
            expected = 0 if group.size == 1 else 1 if is_known else 2
            assert collectives(group) - before == expected
            assert x.grad is not None
            grads.append((loss.detach(), x.grad))
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.soak)])
@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, pytest.param(3, marks=pytest.mark.soak)])
def test_it_compiles_with_its_gradient(world_size: int, is_known: bool, backend: str) -> None:
    run_ranks(compiles, world_size, backend, is_known)


def under_autocast(group: Group) -> None:
    cut = tp.Partition.even(9, group.size)
    whole, target = randn(4, 9).float(), ids(9, 4)
    x = whole[:, cut.slice(group.rank)].clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = vocab_parallel_cross_entropy(x, target, partition=cut, group=group)
        loss.sum().backward()
    assert loss.dtype == torch.float32 and x.grad is not None and x.grad.dtype == torch.float32
    assert relative_error(loss, dense(whole.double(), target, reduction="none")) <= 1e-6


@pytest.mark.parametrize("world_size", [1, 2])
def test_autocast_leaves_the_logits_as_they_are(world_size: int) -> None:
    run_ranks(under_autocast, world_size)


def test_both_places_have_the_name() -> None:
    assert tp.vocab_parallel_cross_entropy is tp_native.nn.vocab_parallel_cross_entropy
    assert "vocab_parallel_cross_entropy" in tp.__all__
    assert "vocab_parallel_cross_entropy" in tp_native.nn.__all__
