"""Memory of gradients serves again, and never while anything still looks at it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from routesae_lens.saes import recycled
from routesae_lens.saes.topk_function import topk_autoencode, topk_autoencode_dense

LIKE = torch.zeros(0)


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(recycled, "SMALLEST", 1)
    recycled.forget()
    yield
    recycled.forget()


def test_memory_that_nothing_holds_serves_again():
    first, second = (recycled.empty(LIKE, 30, 20) for _ in range(2))
    assert first.shape == (30, 20) and first.dtype == torch.float32 and recycled.kept_bytes() == 0
    places = {first.data_ptr(), second.data_ptr()}
    assert len(places) == 2
    del first, second
    assert recycled.kept_bytes() == 2 * 30 * 20 * 4
    again = [recycled.empty(LIKE, 20, 30) for _ in range(2)]
    assert {tensor.data_ptr() for tensor in again} == places and recycled.kept_bytes() == 0


@pytest.mark.parametrize(
    "hold", [lambda x: x[3:5], torch.detach, lambda x: x.T.numpy(), torch.Tensor.untyped_storage]
)
def test_memory_that_something_looks_at_stays_its_own(hold):
    tensor = recycled.empty(LIKE, 30, 20).fill_(1.0)
    held, place = hold(tensor), tensor.data_ptr()
    del tensor
    other = recycled.empty(LIKE, 30, 20)
    assert other.data_ptr() != place and recycled.kept_bytes() == 0
    del held
    assert recycled.kept_bytes() == 30 * 20 * 4


def test_another_size_lets_go_of_what_is_kept():
    del (tensor := [recycled.empty(LIKE, 30, 20)])[:]
    assert not tensor and recycled.kept_bytes() == 30 * 20 * 4
    other = recycled.empty(LIKE, 10)
    assert recycled.kept_bytes() == 0 and other.shape == (10,)


def test_small_ones_are_ordinary(monkeypatch):
    monkeypatch.setattr(recycled, "SMALLEST", 1000)
    tensor = recycled.empty(LIKE, 10)
    del tensor
    assert recycled.kept_bytes() == 0


def test_gradients_of_one_step_survive_the_next():
    generator = torch.Generator().manual_seed(0)
    shapes = [(9, 5), (5, 12), (12,), (12, 5), (5,)]
    x, *weights = (torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)
    kept, places = [], []
    for step, function in enumerate([topk_autoencode] * 4 + [topk_autoencode_dense] * 2):
        # (the inputs of the third step are those of the first, and its gradients are held as well)
        (function(x * (1 + step % 2), *weights, 4).out.sin() ** 2).sum().backward()
        kept.append([weight.grad for weight in weights])
        places.append(weights[0].grad.data_ptr())
        for weight in weights:
            weight.grad = None
    for step in (0, 1, 2, 3):
        for ours, theirs in zip(kept[step], kept[4 + step % 2], strict=True):
            torch.testing.assert_close(ours, theirs)
    assert len(set(places)) == 6
    kept.clear()
    assert recycled.kept_bytes() == 2 * 5 * 12 * 8
    (topk_autoencode(x, *weights, 4).out.sin() ** 2).sum().backward()
    assert recycled.kept_bytes() == 0  # both gradients are in what was left
