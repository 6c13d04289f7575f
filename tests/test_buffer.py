"""The shuffled stream of activations, on a store whose activations can be read by eye."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.training.mixing_buffer import multi_hook_concat_split_iter
from safetensors.torch import load, save

from routesae_lens.training.buffer import MixingBuffer, TrainingBatches

pytestmark = pytest.mark.filterwarnings("ignore:end of the data")


@dataclass
class Numbers:
    """A store whose activations are the tokens themselves: token t at hook "a", (t, -t) at hook "b"."""

    n_batches: int
    exclude_special_tokens: torch.Tensor | None = None
    seqpos_slice: tuple[int | None, ...] = (1, None)
    store_batch_size_prompts: int = 2
    context_size: int = 6
    forwards: int = 0
    read: int = 0

    def __post_init__(self) -> None:
        self.device = torch.device("cpu")

    def get_batch_tokens(self, raise_at_epoch_end: bool) -> torch.Tensor:
        if self.read == self.n_batches:
            self.read = 0
            raise StopIteration
        self.read += 1
        return torch.arange(12).reshape(2, 6) + 12 * (self.read - 1)

    def get_multi_hook_activations(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        self.forwards += 1
        kept = tokens[:, slice(*self.seqpos_slice), None].float()
        return {"b": torch.cat([kept, -kept], dim=-1), "a": kept}

    def producer(self) -> Iterator[dict[str, torch.Tensor]]:
        """What SAELens makes of these tokens and activations."""
        while True:
            try:
                tokens = self.get_batch_tokens(True)
            except StopIteration:
                continue
            ids = tokens[:, slice(*self.seqpos_slice)].flatten()
            keep = ~torch.isin(ids, self.exclude_special_tokens)
            yield {h: acts.flatten(0, 1)[keep] for h, acts in self.get_multi_hook_activations(tokens).items()}


def numbers(n_batches: int = 7) -> Numbers:
    return Numbers(n_batches, exclude_special_tokens=torch.tensor([3, 14, 15]))


def buffer(store: Any, mix_fraction: float = 0.5, seed: int = 0) -> MixingBuffer:
    return MixingBuffer(store, ["a", "b"], buffer_size=22, batch_size=6, mix_fraction=mix_fraction, seed=seed)


@pytest.mark.parametrize("mix_fraction", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_the_buffer_mixes_exactly_as_sae_lens_does(mix_fraction: float):
    ours = buffer(numbers(), mix_fraction, seed=5)
    torch.manual_seed(5)
    theirs = multi_hook_concat_split_iter(22, 6, numbers().producer(), ["a", "b"], mix_fraction)
    for _ in range(40):
        got, expected = next(ours), next(theirs)
        assert torch.equal(got["a"], expected["a"]) and torch.equal(got["b"], expected["b"])
        assert torch.equal(got["b"], torch.cat([got["a"], -got["a"]], dim=1))  # one shuffle for all hooks


@given(consumed=st.integers(0, 30), ahead=st.integers(0, 5), activations=st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_buffer_continues_from_any_moment(consumed: int, ahead: int, activations: bool):
    first, reference = buffer(numbers()), buffer(numbers())
    for _ in range(consumed):
        next(first)
        first.consumed()
        next(reference)
    for _ in range(ahead):  # given out by a prefetcher, and not trained on
        next(first)
    state = load(save(first.state_dict(activations=activations)))
    store = numbers()
    second = buffer(store, seed=99)
    second.load_state_dict(state, progress=False)
    if activations:
        assert store.forwards == 0
    for _ in range(20):
        assert torch.equal(next(second)["b"], next(reference)["b"])


def test_every_token_is_served_once_in_an_epoch():
    stream = buffer(numbers(500))
    served = torch.cat([next(stream)["a"].flatten() for _ in range(300)])
    assert len(served.unique()) == len(served)


def test_training_batches_pause_and_report():
    source = buffer(numbers())
    batches = TrainingBatches(source, source)
    next(batches)
    assert not source._pending
    with batches.paused(), batches.paused(), pytest.raises(RuntimeError, match="must not draw"):
        next(batches)
    next(batches)


def test_bad_buffers_are_refused():
    with pytest.raises(
        ValueError, match=r"the buffer \(5 tokens\) must hold at least one batch \(6 tokens\)"
    ):
        MixingBuffer(numbers(), ["a"], buffer_size=5, batch_size=6)
    with pytest.raises(ValueError, match="mix_fraction must be between 0 and 1, got 2"):
        buffer(numbers(), mix_fraction=2.0)
    with pytest.raises(ValueError, match="does not fill one forward of 2 sequences of 6 tokens"):
        next(buffer(numbers(0)))
    longer = buffer(numbers(9))
    for _ in range(10):
        next(longer)
    with pytest.raises(ValueError, match="the data ends after 3 token batches"):
        buffer(numbers(3)).load_state_dict(longer.state_dict(), progress=False)
