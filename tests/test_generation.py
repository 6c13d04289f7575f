"""Generation with RouteSAEs and Crosscoders attached: every token is routed, with and without a KV cache."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from spliced import GREEDY, TOKENS, by_hand, left_padded, make_sae, ordinary_sae
from spliced_crosscoders import make_crosscoder
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformers import DynamicCache

from routesae_lens.hook_points import SITES, unmount_layers
from routesae_lens.splice.edits import Ablate, Add, Scale, Set
from routesae_lens.splice.hooked import HookedRouteSAETransformer
from routesae_lens.splice.passes import BridgePasses, HookedPasses, begun

NEW = 4  # tokens to generate
ROUTINGS = ["hard", "soft", "random", "fixed", "distilled", "oracle", "top2", "straight_through"]


@dataclass
class Case:
    """What is attached and how, and the prompts."""

    kind: str = "route"
    layers: tuple[int, ...] = (1, 2, 4)
    routing: str = "hard"
    random_per: str = "token"
    site: str = "hook_resid_post"
    standardize: bool = True
    error: bool = False
    seqpos: tuple[int, ...] | None = None
    excluded: tuple[int, ...] = ()
    share: bool = True
    edits: Any = None
    positions: Any = "all"
    where: str = "routed"
    rows: tuple[tuple[int, ...], ...] = ((5, 17, 33, 8), (44, 9))

    def sae(self) -> Any:
        metadata = {"seqpos_slice": self.seqpos, "exclude_special_tokens": list(self.excluded)}
        if self.kind == "ordinary":
            return ordinary_sae(f"blocks.{self.layers[0]}.hook_resid_post").to(torch.float64)
        fields: dict[str, Any] = {"site": self.site, "standardize": self.standardize}
        if self.kind == "crosscoder":
            sae: Any = make_crosscoder(self.layers, **fields)
            for key, value in metadata.items():
                setattr(sae.cfg.metadata, key, value)
        else:
            sae = make_sae(
                self.layers, metadata=metadata, routing=self.routing, random_per=self.random_per, **fields
            )
        return sae.to(torch.float64)

    @contextmanager
    def on(self, model: Any, prompt: int | None = None) -> Iterator[Any]:
        """Attached and steered; ``prompt``: its length, for passes that know nothing of generation."""
        with ExitStack() as stack:
            model.share_prefix = self.share
            stack.callback(setattr, model, "share_prefix", True)
            sae = self.sae()
            if not self.edits:
                stack.enter_context(model.saes(sae, use_error_term=self.error))
            else:
                layers: Any = None
                if self.kind != "ordinary" and self.where != "routed":
                    layers = "all" if self.where == "all" else self.layers[-1]
                positions = self.positions if prompt is None else absolute(self.positions, prompt)
                stack.enter_context(
                    model.steer(
                        sae, self.edits, positions=positions, layers=layers, use_error_term=self.error
                    )
                )
            yield sae


def absolute(positions: Any, prompt: int) -> Any:
    """What the names mean in one sequence with a prompt of so many tokens."""
    if positions == "prompt":
        return slice(0, prompt)
    if positions == "generated":
        return slice(prompt, None)
    if isinstance(positions, slice):
        bounds = [b if b is None or b >= 0 else max(prompt + b, 0) for b in (positions.start, positions.stop)]
        return slice(*bounds, positions.step)
    return positions


POSITIONS = [
    "all",
    "prompt",
    "generated",
    slice(-2, None),
    slice(1, -1),
    slice(0, None, 2),
    tuple(range(3, 70)),
    lambda tokens: tokens % 2 == 0,
]
EDITS = st.dictionaries(
    st.sampled_from((3, 11, 40)),
    st.sampled_from([Set(6.0), Set(-3.0), Add(4.0), Scale(-2.0), Ablate()]),
    min_size=1,
)
cases = st.builds(
    Case,
    kind=st.sampled_from(["route", "route", "route", "crosscoder", "ordinary"]),
    layers=st.sets(st.integers(0, 5), min_size=1, max_size=4).map(lambda s: tuple(sorted(s))),
    routing=st.sampled_from(ROUTINGS),
    random_per=st.sampled_from(["token", "batch"]),
    site=st.sampled_from(SITES),
    standardize=st.booleans(),
    error=st.booleans(),
    seqpos=st.sampled_from([None, None, (1, None), (2, 6)]),
    excluded=st.sampled_from([(), (), tuple(range(3, 40))]),
    share=st.booleans(),
    edits=st.one_of(st.none(), EDITS),
    positions=st.sampled_from(POSITIONS),
    where=st.sampled_from(["routed", "all", "one"]),
    rows=st.lists(
        st.lists(st.integers(3, 127), min_size=1, max_size=5).map(tuple), min_size=1, max_size=3
    ).map(tuple),
)


def generated(model: Any, rows: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of ``generate`` and the logits (batch, NEW, d_vocab) that they were chosen from."""
    tokens, mask = left_padded([list(row) for row in rows])
    padding = {"attention_mask": mask}
    if isinstance(model, HookedRouteSAETransformer):
        padding = {"padding_side": "left"}
    output = model.generate(tokens, max_new_tokens=NEW, output_logits=True, **GREEDY, **padding, **options)
    return output.sequences, torch.stack(list(output.logits), dim=1)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.dtype == b.dtype == torch.float64
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)  # (RMSNorm computes in float32 whatever the dtype)


# --- Exactness ---------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases)
@example(case=Case(layers=(0,)))
@example(case=Case(routing="random", seqpos=(2, 6)))
@example(case=Case(layers=(5,), routing="soft"))
@example(case=Case(kind="crosscoder", edits={3: Add(4.0)}, positions="generated"))
@example(case=Case(edits={3: Set(20.0)}, positions=slice(-1, None), where="all"))
def test_cached_generation_equals_uncached_and_plain_forwards(exact: Any, case: Case):
    tokens, mask = left_padded([list(row) for row in case.rows])
    with case.on(exact):
        sequences, logits = generated(exact, case.rows, use_past_kv_cache=True)
        again, their_logits = generated(exact, case.rows, use_past_kv_cache=False)
    assert torch.equal(sequences, again)
    close(logits, their_logits)
    if len({len(row) for row in case.rows}) == 1:
        with case.on(exact, prompt=tokens.shape[1]):
            assert torch.equal(sequences, by_hand(exact, tokens, NEW, mask))
            with torch.no_grad():
                close(logits, exact(sequences)[:, -NEW - 1 : -1])
    elif case.positions not in ("prompt", "generated") and not isinstance(case.positions, slice):
        with case.on(exact):
            assert torch.equal(sequences, by_hand(exact, tokens, NEW, mask))
    if case.routing == "random" and case.kind == "route":
        return  # rows of a batch draw differently
    index, row = min(enumerate(case.rows), key=lambda item: len(item[1]))
    with case.on(exact):
        alone, its_logits = generated(exact, [row])
    assert torch.equal(alone[0], sequences[index, -alone.shape[1] :])
    close(its_logits[0], logits[index])


@pytest.mark.parametrize("kind", ["route", "crosscoder"])
def test_the_splice_and_the_edits_make_a_difference(exact: Any, kind: str):
    """Without it, the test above could not fail."""
    rows = Case().rows
    plain = generated(exact, rows)[1]
    results = [plain]
    for edits in (None, {3: Set(6.0)}, {3: Set(6.0), 11: Add(4.0)}):
        for positions in ("all", "prompt", "generated") if edits else ("all",):
            with Case(kind=kind, edits=edits, positions=positions).on(exact):
                results.append(generated(exact, rows)[1])
    for index, one in enumerate(results):
        assert not any(torch.allclose(one, other, atol=1e-3) for other in results[:index])
    with Case(kind=kind, error=True).on(exact):
        close(generated(exact, rows)[1], plain)  # the error term gives back what is lost


def test_a_frozen_shared_cache_would_give_other_tokens(exact: Any, monkeypatch: pytest.MonkeyPatch):
    """Why the routing pass has a cache of its own: routes from the spliced past are other routes."""
    rows = [[7, 30, 55, 90, 4], [99, 12, 63, 41, 28]]
    case = Case(layers=(1, 2, 3, 4))
    with case.on(exact):
        right, logits = generated(exact, rows)
    blocks, routing = HookedPasses._blocks, BridgePasses.routing

    def hooked(self: Any, x: Any, start: int, stop: int, cache: Any) -> Any:
        blocks(self, x, start, stop, cache)
        if self.cache is not None:  # once more, with the past that was spliced; this one is heard
            self.cache.freeze()
            blocks(self, x, start, stop, self.cache)
            self.cache.unfreeze()

    def bridged(self: Any) -> None:
        routing(self)
        if self.cache is not None and self.window.start:
            outputs, own = list(self._outputs), begun(self.cache).clean  # type: ignore[union-attr]
            begun(self.cache).clean = copy.deepcopy(self.cache)  # type: ignore[union-attr]
            routing(self)
            begun(self.cache).clean, self._outputs = own, outputs  # type: ignore[union-attr]

    monkeypatch.setattr(HookedPasses, "_blocks", hooked)
    monkeypatch.setattr(BridgePasses, "routing", bridged)
    with case.on(exact):
        wrong, its_logits = generated(exact, rows)
    close(logits[:, 0], its_logits[:, 0])  # nothing is cached yet
    assert not torch.allclose(logits[:, 1:], its_logits[:, 1:], atol=1e-3)
    assert not torch.equal(right, wrong)


# --- By hand -----------------------------------------------------------------------------------------


class Loop:
    """A caller's own loop over forward with a cache."""

    def __init__(self, model: Any, batch: int):
        self.model, self.hooked = model, isinstance(model, HookedRouteSAETransformer)
        self.cache: Any = None
        if self.hooked:
            self.cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", batch)

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.hooked:
            return self.model(tokens, past_kv_cache=self.cache)
        if self.cache is None:
            self.cache = DynamicCache(config=self.model.original_model.config)
        return self.model(tokens, past_key_values=self.cache, use_cache=True)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kind", ["route", "crosscoder"])
@pytest.mark.parametrize("sizes", [[9], [4, 1, 1, 3]])
def test_a_loop_over_forward_equals_one_pass(exact: Any, kind: str, share: bool, sizes: list[int]):
    case = Case(kind=kind, share=share, edits={3: Add(5.0)}, positions=slice(2, 8))
    with case.on(exact):
        step = Loop(exact, len(TOKENS))
        got = torch.cat([step(part) for part in TOKENS.split(sizes, dim=1)], 1)
        with torch.no_grad():
            close(got, exact(TOKENS))


def test_routes_of_a_step_are_those_of_a_clean_pass(exact: Any):
    sae = Case().sae()
    point = sae.mount(exact)
    with torch.no_grad():
        _, cache = exact.run_with_cache(TOKENS, names_filter=point)
        expected = sae.route(cache[point])
        unmount_layers(exact, point)
        with exact.saes(sae):
            step, seen = Loop(exact, len(TOKENS)), []
            for part in TOKENS.split([4, 1, 1, 3], dim=1):
                step(part)
                [route] = exact.last_routes.values()
                seen.append(route)
    assert len(expected.layer.unique()) > 1
    assert torch.equal(torch.cat([route.layer for route in seen], dim=1), expected.layer)
    close(torch.cat([route.probs for route in seen], dim=1), expected.probs)


@pytest.mark.parametrize("layers", [(2, 3), (0, 5), (4,)])
@pytest.mark.parametrize("share", [True, False])
def test_blocks_run_per_token(exact: Any, share: bool, layers: tuple[int, ...]):
    ran: list[int] = []
    handles = [
        block.attn.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, block in enumerate(exact.blocks)
    ]
    first, last, n = layers[0], layers[-1], len(exact.blocks)
    with Case(layers=layers, share=share).on(exact):
        generated(exact, [[5, 17, 33]])
    for handle in handles:
        handle.remove()
    assert len(ran) == NEW * (last + 1 + n - (first if share else 0))
    assert [ran.count(i) for i in range(n)] == [
        NEW * ((i <= last) + (i >= first or not share)) for i in range(n)
    ]


def test_the_shadow_cache_holds_what_forward_says(exact: Any):
    with Case(layers=(1, 2, 4)).on(exact):
        step = Loop(exact, len(TOKENS))
        step(TOKENS[:, :6])
        step(TOKENS[:, 6:7])
    shadow = begun(step.cache).clean  # type: ignore[union-attr]
    spliced = {tensor.data_ptr() for tensor in tensors_of(step.cache)}
    own = [tensor for tensor in tensors_of(shadow) if tensor.data_ptr() not in spliced]
    kv_heads, d_head = 2, 8
    assert (
        sum(tensor.numel() for tensor in own) == 2 * (4 - 1 + 1) * kv_heads * d_head * TOKENS[:, :7].numel()
    )


def tensors_of(cache: Any) -> list[torch.Tensor]:
    if isinstance(cache, TransformerLensKeyValueCache):
        return [t for entry in cache.entries for t in (entry.past_keys, entry.past_values) if t.numel()]
    return [t for layer in cache.layers if layer.is_initialized for t in (layer.keys, layer.values)]


# --- Ways to generate --------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [True, False])
def test_texts_of_different_lengths(exact: Any, cached: bool):
    texts = ["The quick brown fox", "A", "In the morning the"]
    options = {"max_new_tokens": NEW, "use_past_kv_cache": cached, **GREEDY}
    with Case(edits={3: Add(5.0)}, positions="generated").on(exact):
        batch = exact.generate(texts, **options)
        for row, text in zip(batch, texts, strict=True):
            alone = exact.generate(text, **options)[0]
            assert torch.equal(alone, row[-len(alone) :])
            assert (row[: -len(alone)] == exact.tokenizer.pad_token_id).all()


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("chunk", [1, 3, 25])
def test_a_stream_equals_generate(exact: Any, cached: bool, chunk: int):
    options = {"max_new_tokens": 6, "use_past_kv_cache": cached, "do_sample": False, "stop_at_eos": False}
    with Case(edits={3: Add(5.0)}, positions="generated").on(exact):
        expected = exact.generate(TOKENS, verbose=False, **options)
        stream = exact.generate_stream(TOKENS, max_tokens_per_yield=chunk, verbose=False, **options)
        parts = []
        for part in stream:
            parts.append(part)
            exact(TOKENS[:1, :3])  # other calls may come between two tokens
    assert torch.equal(torch.cat(parts, dim=1), expected)
    assert len(parts) == {1: 6, 3: 2, 25: 1}[chunk] + (chunk == 3)


@pytest.mark.parametrize("cached", [True, False])
def test_a_stream_of_padded_prompts(exact: Any, cached: bool):
    rows = [[5, 17, 33, 8], [44, 9]]
    tokens, _ = left_padded(rows)
    options = {"max_new_tokens": NEW, "use_past_kv_cache": cached, "do_sample": False, "stop_at_eos": False}
    if not isinstance(exact, HookedRouteSAETransformer):  # its stream has no mask, but takes several texts
        texts = ["The quick brown fox", "A"]
        with Case().on(exact):
            got = torch.cat(
                list(exact.generate_stream(texts, verbose=False, return_type="tokens", **options)), 1
            )
            assert torch.equal(got, exact.generate(texts, max_new_tokens=NEW, **GREEDY))
        return
    with Case().on(exact):
        parts = exact.generate_stream(tokens, padding_side="left", verbose=False, **options)
        assert torch.equal(torch.cat(list(parts), dim=1), generated(exact, rows)[0])


def test_sampling_with_a_seed(exact: Any):
    options = {**GREEDY, "do_sample": True, "temperature": 1.3, "top_k": 20, "max_new_tokens": 6}
    results = []
    with Case().on(exact):
        for cached in (True, False, True):
            torch.manual_seed(7 if len(results) < 2 else 8)
            results.append(exact.generate(TOKENS, use_past_kv_cache=cached, **options))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@pytest.mark.parametrize("cached", [True, False])
def test_rows_that_stop_at_different_times(exact: Any, cached: bool):
    rows = [[5, 17, 33, 8], [44, 9]]
    tokens, mask = left_padded(rows)
    with Case().on(exact):
        free = by_hand(exact, tokens, 7, mask)[:, 4:].tolist()
        stops = [free[0][1], free[1][4]]
        ends = [min(row.index(stop) for stop in stops if stop in row) for row in free]
        assert ends[0] != ends[1]  # else it would show nothing
        padding: Any = {"attention_mask": mask}
        if isinstance(exact, HookedRouteSAETransformer):
            padding = {"padding_side": "left"}
        got = exact.generate(
            tokens,
            max_new_tokens=7,
            **GREEDY | {"stop_at_eos": True, "eos_token_id": stops, "use_past_kv_cache": cached},
            **padding,
        )
    filler = exact.tokenizer.eos_token_id
    length = max(ends) + 1
    assert got.shape == (2, 4 + length)
    for row, end, mine in zip(free, ends, got[:, 4:].tolist(), strict=True):
        assert mine == row[: end + 1] + [filler] * (length - end - 1)
