"""The shuffled stream of activations, on a store whose activations can be read by eye."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.mixing_buffer import multi_hook_concat_split_iter
from sae_lens.training.prefetch import PrefetchingIterator
from sae_lens.util import get_special_token_ids
from safetensors.torch import load, save
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from routesae_lens.training.buffer import ActivationsNotFinite, MixingBuffer, TrainingBatches

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


# --- Memory, number formats, devices ---------------------------------------------------------------------


class LivePeak(TorchDispatchMode):
    """Bytes of all tensors that were made inside, counted at their most."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {key: one for key, one in self.live.items() if not one[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


class Wide(Numbers):
    """Activations of 256 numbers at each of two hooks."""

    def get_multi_hook_activations(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        kept = tokens[:, slice(*self.seqpos_slice), None].float().expand(-1, -1, 256)
        return {"a": kept + 0, "b": kept + 1}


def peak_of(batches: Iterator[Any], nominal: int) -> float:
    with LivePeak() as counted:
        for _ in range(60):
            next(batches)
            if isinstance(batches, MixingBuffer):
                batches.consumed()
    return counted.peak / nominal


def test_the_peak_stays_within_1_3_of_the_nominal_size(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "routesae_lens.training.rows.CHUNK_BYTES", 2**14
    )  # small, as 16 MB are beside a buffer
    size, nominal = 240, 240 * 512 * 4
    store = numbers(500)
    wide = Wide(500, exclude_special_tokens=store.exclude_special_tokens)
    ours = MixingBuffer(wide, ["a", "b"], buffer_size=size, batch_size=12)
    assert 1 < peak_of(ours, nominal) < 1.3
    theirs = multi_hook_concat_split_iter(size, 12, wide.producer(), ["a", "b"])
    assert peak_of(theirs, nominal) > 1.9  # whole copies
    half = MixingBuffer(wide, ["a", "b"], buffer_size=size, batch_size=12, dtype=torch.bfloat16)
    assert 0.5 < peak_of(half, nominal) < 0.65
    with LivePeak() as counted:  # a checkpoint writes the buffer itself
        state = ours.state_dict()
    assert counted.peak < 1.2 * nominal and state["acts"].data_ptr() == ours._storage.acts.data_ptr()


@given(consumed=st.integers(0, 30), ahead=st.integers(0, 5), activations=st.booleans())
@settings(max_examples=40, deadline=None)
def test_reading_ahead_gives_the_same_batches_and_resumes(consumed: int, ahead: int, activations: bool):
    first, reference = buffer(numbers()), buffer(numbers())
    first.read_ahead = True
    for _ in range(consumed):
        assert torch.equal(next(first)["b"], next(reference)["b"])
        first.consumed()
    for _ in range(ahead):
        next(first)
    second = buffer(numbers(), seed=99)
    state = load(save(first.state_dict(activations=activations)))
    second.load_state_dict(state, progress=False)
    for i in range(20):
        expected = next(reference)["b"]
        assert torch.equal(next(second)["b"], expected)
        if i >= ahead:  # taking the state has not disturbed the buffer
            assert torch.equal(next(first)["b"], expected)


def test_the_language_model_runs_while_batches_are_used():
    """Behind a prefetcher of one batch, reading is spread over the steps, not heaped before a refill."""

    def forwards_per_batch(read_ahead: bool) -> list[int]:
        store = numbers(500)
        stream = MixingBuffer(store, ["a"], buffer_size=220, batch_size=10, read_ahead=read_ahead)
        counts = []
        for _ in range(100):
            before = store.forwards
            next(stream)
            counts.append(store.forwards - before)
        return counts[1:]  # (the first fills the buffer)

    assert max(forwards_per_batch(False)) > 8
    assert max(forwards_per_batch(True)) <= 3

    store = numbers(500)
    forward, training = store.get_multi_hook_activations, threading.Event()
    beside: list[bool] = []  # for every forward: did a training step go on meanwhile?

    def noted(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        beside.append(training.is_set())
        return forward(tokens)

    store.get_multi_hook_activations = noted  # type: ignore[method-assign]
    source = MixingBuffer(store, ["a"], buffer_size=100, batch_size=10, read_ahead=True)
    stream = PrefetchingIterator(source, prefetch=1)
    for _ in range(20):
        next(stream)
        training.set()
        done, until = len(beside), time.monotonic() + 0.3
        while len(beside) == done and time.monotonic() < until:
            time.sleep(0.001)
        training.clear()
    stream.close()
    assert sum(beside) >= 10


@pytest.mark.parametrize("activations", [True, False])
def test_activations_are_stored_in_another_dtype_and_resume_exactly(activations: bool):
    def stream() -> MixingBuffer:
        store = numbers()
        forward = store.get_multi_hook_activations
        store.get_multi_hook_activations = lambda tokens: {  # type: ignore[method-assign]
            hook: acts / 7 for hook, acts in forward(tokens).items()
        }
        return MixingBuffer(store, ["a", "b"], buffer_size=22, batch_size=6, dtype=torch.bfloat16)

    first, exact = stream(), stream()
    exact.dtype = torch.float32
    for _ in range(5):
        got, expected = next(first)["a"], next(exact)["a"]
        first.consumed()
        assert got.dtype == torch.bfloat16 and torch.equal(got, expected.bfloat16())
    second = stream()
    second.load_state_dict(load(save(first.state_dict(activations=activations))), progress=False)
    for _ in range(20):
        assert torch.equal(next(second)["b"], next(first)["b"])


def test_values_beyond_the_storage_format_are_named():
    store = numbers()
    store.get_multi_hook_activations = lambda tokens: {"a": tokens[:, 1:, None] + 65_500.0}  # type: ignore[method-assign]
    stream = MixingBuffer(store, ["a"], buffer_size=22, batch_size=6, dtype=torch.float16)
    with pytest.raises(
        ActivationsNotFinite, match=r"at a are NaN or infinite for 4 of 8 tokens, in token batch 1"
    ):
        for _ in range(20):
            next(stream)


def test_batches_go_to_another_device_once():
    stream = MixingBuffer(
        numbers(), ["a", "b"], buffer_size=22, batch_size=6, output_device=torch.device("meta")
    )
    batch = next(stream)
    assert batch["a"].device.type == batch["b"].device.type == "meta"
    assert (batch["a"].shape, batch["b"].shape) == ((6, 1), (6, 2))
    assert stream._storage is not None and stream._storage.acts.device.type == "cpu"


def test_checkpoints_of_older_versions_are_read():
    first = buffer(numbers())
    for _ in range(4):
        next(first)
        first.consumed()
    state = first.state_dict()
    old = {name: state[name] for name in ("position", "generator", "left", "origin", "widths")}
    old["acts"] = state["acts"][state["order"]]  # in serving order, and nothing read ahead
    second = buffer(numbers())
    second.load_state_dict({name: tensor.clone() for name, tensor in old.items()}, progress=False)
    for _ in range(20):
        assert torch.equal(next(second)["b"], next(first)["b"])


@pytest.mark.parametrize("prepend", [True, False])
def test_padding_and_special_tokens_are_never_trained_on(tiny_proxy: Any, prepend: bool):
    """On a real store: the token embedding tells which token a row comes from."""
    special = [0, 1, 2]  # <s>, </s>, <pad>
    ids = torch.randint(128, (12, 16), generator=torch.Generator().manual_seed(0))
    ids[3, 5:] = 2  # padded on the right
    ids[:, 0] = 0 if prepend else 7
    store = ActivationsStore.from_config_multi_hook(
        tiny_proxy,
        dataset=Dataset.from_dict({"tokens": ids.tolist()}),
        hook_names=["model.embed_tokens"],
        hook_d_ins={"model.embed_tokens": 32},
        context_size=16,
        store_batch_size_prompts=4,
        seqpos_slice=(1, None),
        exclude_special_tokens=torch.tensor(get_special_token_ids(tiny_proxy.tokenizer)),
    )
    kept = ids[:, 1:][~torch.isin(ids[:, 1:], torch.tensor(special))]
    stream = MixingBuffer(
        store, ["model.embed_tokens"], buffer_size=len(kept), batch_size=len(kept), mix_fraction=0.0
    )
    rows = next(stream)["model.embed_tokens"]
    table = tiny_proxy.model.get_input_embeddings().weight.detach()
    assert torch.equal((rows[:, None] == table).all(dim=2).nonzero()[:, 1], kept)
