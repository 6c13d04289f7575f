"""What generation refuses, and that the model is left clean after every error."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from spliced import D_MODEL, GREEDY, TOKENS, assert_clean, by_hand, make_sae, ordinary_sae, state_of
from spliced_crosscoders import make_crosscoder
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformers import AutoTokenizer, DynamicCache, Lfm2Config, Lfm2ForCausalLM, StaticCache

from routesae_lens.hook_points import layer_hook_name
from routesae_lens.models import load_model
from routesae_lens.splice.edits import Set
from routesae_lens.splice.hooked import HookedRouteSAETransformer, RouteSAETransformerBridge

N_CTX = 64
LONG = torch.full((1, N_CTX + 1), 5)


@pytest.fixture(autouse=True)
def left_clean(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test here ends with nothing attached; then nothing may be left of its errors."""
    if "exact" not in request.fixturenames:
        yield
        return
    exact = request.getfixturevalue("exact")
    before = state_of(exact)
    yield
    assert_clean(exact, before)


def new_cache(model: Any, batch: int = len(TOKENS)) -> dict[str, Any]:
    """An empty cache as the model's forward takes one."""
    if isinstance(model, HookedRouteSAETransformer):
        return {"past_kv_cache": TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", batch)}
    return {"past_key_values": DynamicCache(config=model.original_model.config), "use_cache": True}


SAES = {"route": make_sae, "crosscoder": make_crosscoder}


@pytest.mark.parametrize("kind", SAES)
def test_a_cache_belongs_to_what_it_was_begun_with(exact: Any, kind: str):
    sae = SAES[kind]()
    with torch.no_grad():
        cache = new_cache(exact)
        exact(TOKENS[:, :5], **cache)
        with exact.saes(sae):
            with pytest.raises(ValueError, match=r"holds 5 positions that were computed with no RouteSAE"):
                exact(TOKENS[:, 5:6], **cache)
            cache = new_cache(exact)
            exact(TOKENS[:, :5], **cache)
        with pytest.raises(ValueError, match=r"begun with .* attached, and now nothing is"):
            exact(TOKENS[:, 5:6], **cache)
        with (
            exact.saes(make_sae((0, 5))),
            pytest.raises(ValueError, match=r"computed with .* attached, and now there is"),
        ):
            exact(TOKENS[:, 5:6], **cache)
        other = ordinary_sae("blocks.3.hook_resid_post").to(torch.float64)
        with exact.steer(other, {3: Set(5.0)}), pytest.raises(ValueError, match=r"computed with .* attached"):
            exact(TOKENS[:, 5:6], **cache)
        with exact.saes(sae):  # attached again, it goes on
            got = exact(TOKENS[:, 5:], **cache)
            torch.testing.assert_close(got, exact(TOKENS)[:, 5:], rtol=0, atol=1e-5)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("call", [1, 2])
def test_a_cache_after_an_interrupted_pass(exact: Any, share: bool, later: bool, call: int):
    """Block 2 is run by the routing pass and by the spliced one; either may be interrupted there."""
    calls = []

    def fail(x: torch.Tensor, hook: Any) -> None:
        calls.append(hook.name)
        if len(calls) == call:
            raise Interrupted

    exact.share_prefix = share
    with torch.no_grad(), exact.saes(make_sae((1, 4))):
        cache = new_cache(exact)
        if later:
            exact(TOKENS[:, :5], **cache)
        with pytest.raises(Interrupted):
            exact.run_with_hooks(TOKENS[:, 5:7], fwd_hooks=[(layer_hook_name(exact, 2), fail)], **cache)
        with pytest.raises(ValueError, match="a pass was interrupted"):
            exact(TOKENS[:, 5:7], **cache)
        step = exact(TOKENS, **new_cache(exact))  # a new one serves
        torch.testing.assert_close(step, exact(TOKENS), rtol=0, atol=1e-5)


def test_a_cache_whose_first_pass_failed_at_once(exact: Any):
    """Nothing is in it yet, so it may be begun with something else; unless its mask has grown already."""

    def fail(x: torch.Tensor, hook: Any) -> None:
        raise Interrupted

    cache = new_cache(exact)
    embedding = "hook_embed" if isinstance(exact, HookedRouteSAETransformer) else "embed.hook_out"
    with torch.no_grad():
        with exact.saes(make_sae((4, 5))), pytest.raises(Interrupted):
            exact.run_with_hooks(TOKENS[:, :5], fwd_hooks=[(embedding, fail)], **cache)
        with exact.saes(make_sae()):
            if isinstance(exact, HookedRouteSAETransformer):
                with pytest.raises(ValueError, match=r"0 positions and a mask of 5: a pass was interrupted"):
                    exact(TOKENS[:, :5], **cache)
                return
            steps = [exact(part, **cache) for part in TOKENS.split([5, 4], dim=1)]
            torch.testing.assert_close(torch.cat(steps, 1), exact(TOKENS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("method", ["generate", "generate_stream"])
def test_generation_that_fails_leaves_the_model_clean(exact: Any, cached: bool, method: str):
    calls = []

    def fail(x: torch.Tensor, hook: Any) -> None:
        calls.append(hook.name)
        if len(calls) == 5:  # after some tokens
            raise Interrupted

    with pytest.raises(Interrupted), exact.steer(make_sae(), {3: Set(5.0)}):
        expected = exact.generate(TOKENS, max_new_tokens=3, use_past_kv_cache=cached, **GREEDY)
        with exact.hooks(fwd_hooks=[(layer_hook_name(exact, 3), fail)]), pytest.raises(Interrupted):
            options = {"stop_at_eos": False, "do_sample": False, "verbose": False}
            result = getattr(exact, method)(TOKENS, max_new_tokens=5, use_past_kv_cache=cached, **options)
            list(result)
        again = exact.generate(TOKENS, max_new_tokens=3, use_past_kv_cache=cached, **GREEDY)
        assert torch.equal(again, expected)
        raise Interrupted


def test_a_stream_that_is_abandoned(exact: Any):
    with exact.saes(make_sae()):
        stream = exact.generate_stream(TOKENS, max_tokens_per_yield=1, verbose=False)
        next(stream)
        assert exact.generate(TOKENS, max_new_tokens=2, **GREEDY).shape == (2, 11)
        stream.close()


@pytest.mark.parametrize("cached", [True, False])
def test_changing_what_is_attached_while_a_stream_runs(exact: Any, cached: bool):
    sae, other = make_sae(), ordinary_sae("blocks.3.hook_resid_post").to(torch.float64)
    options = {"max_tokens_per_yield": 1, "verbose": False, "use_past_kv_cache": cached}
    with exact.saes(sae):
        stream = exact.generate_stream(TOKENS, **options)
        next(stream)
    with pytest.raises(RuntimeError, match="changed while generate_stream was running"):
        next(stream)
    with exact.steer(sae, {3: Set(5.0)}):
        stream = exact.generate_stream(TOKENS, **options)
        next(stream)
        with (
            exact.steer(other, {3: Set(5.0)}),
            pytest.raises(RuntimeError, match="changed while generate_stream was running"),
        ):
            next(stream)
    if cached:  # begun with nothing, the stream is upstream's own, but its cache knows
        stream = exact.generate_stream(TOKENS, max_new_tokens=12, **options)
        next(stream)
        with exact.saes(sae), pytest.raises(ValueError, match="computed with no RouteSAE or Crosscoder"):
            next(stream)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("seqpos", [(0, -1), (-4, None)])
@pytest.mark.parametrize("kind", SAES)
def test_positions_from_the_end_have_no_meaning_while_it_moves(
    exact: Any, kind: str, seqpos: tuple[int, Any], cached: bool
):
    sae = SAES[kind]()
    sae.cfg.metadata.seqpos_slice = seqpos
    with exact.saes(sae):
        exact(TOKENS)  # the sequence is all there
        with pytest.raises(ValueError, match=r"end elsewhere with every generated token"):
            exact.generate(TOKENS, max_new_tokens=2, use_past_kv_cache=cached, **GREEDY)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("method", ["generate", "generate_stream"])
def test_nothing_to_generate_and_nothing_to_begin_with(exact: Any, method: str):
    with exact.saes(make_sae()):
        for n in (0, -1, 1.5, True, None):
            with pytest.raises(ValueError, match="max_new_tokens must be a whole number of 1 or more, got"):
                getattr(exact, method)(TOKENS, max_new_tokens=n, verbose=False)
        for shape in ((1, 0), (0, 3)):
            empty = torch.zeros(shape, dtype=torch.long)
            with pytest.raises(ValueError, match=f"got {shape[0]} sequences of {shape[1]} tokens; expected"):
                list(getattr(exact, method)(empty, max_new_tokens=2, verbose=False))


@pytest.mark.parametrize("cached", [True, False])
def test_more_tokens_than_the_context_holds(exact: Any, cached: bool):
    other = ordinary_sae("blocks.3.hook_resid_post").to(torch.float64)
    options = {"use_past_kv_cache": cached, **GREEDY}
    for on in (exact.saes(make_sae()), exact.steer(other, {3: Set(5.0)}), exact.saes(make_crosscoder())):
        ran: list[int] = []
        with on:
            with pytest.raises(ValueError, match=r"65 positions .* context is 64"):
                exact(LONG)
            handle = exact.blocks[5].attn.register_forward_hook(lambda *_, ran=ran: ran.append(1))
            with pytest.raises(ValueError, match=r"context is 64"):
                exact.generate(LONG, max_new_tokens=1, **options)
            with pytest.raises(ValueError, match=r"max_new_tokens=8 .* at most 7 tokens"):
                exact.generate(LONG[:, :58], max_new_tokens=8, **options)
            with pytest.raises(ValueError, match=r"at most 7 tokens"):
                list(exact.generate_stream(LONG[:, :58], max_new_tokens=8, verbose=False))
            handle.remove()
            assert ran == []  # nothing was computed in vain
    with exact.saes(make_sae()):
        assert exact.generate(LONG[:, :58], max_new_tokens=7, **options).shape == (1, 65)


def test_stopping_early(exact: Any):
    with exact.saes(make_sae((2, 4))):
        if isinstance(exact, HookedRouteSAETransformer):
            with pytest.raises(ValueError, match=r"stop_at_layer=5 with a KV cache .* incomplete"):
                exact(TOKENS, stop_at_layer=5, **new_cache(exact))
            for stop in (1, 2, -5):
                with pytest.raises(ValueError, match="ends the pass before layer 2"):
                    exact(TOKENS, stop_at_layer=stop)
        else:
            for option in ({"start_at_layer": 0}, {"stop_at_layer": 5}):
                with pytest.raises(NotImplementedError, match=f"{next(iter(option))} on a bridge"):
                    exact(TOKENS, **option)


@contextmanager
def steered(model: Any) -> Iterator[None]:
    with model.steer(ordinary_sae("blocks.3.hook_resid_post").to(model.cfg.dtype), {3: Set(5.0)}):
        yield


@pytest.mark.parametrize("method", ["hf_generate", "diffusion_generate"])
def test_ways_around_forward(bridge: RouteSAETransformerBridge, method: str):
    before = state_of(bridge)
    for on in (bridge.saes(make_sae()), bridge.saes(make_crosscoder()), steered(bridge)):
        with on, pytest.raises(NotImplementedError, match=f"{method} does not go through .* use generate"):
            getattr(bridge, method)(TOKENS)
    assert_clean(bridge, before)


def test_a_cache_that_cannot_be_shadowed(bridge: RouteSAETransformerBridge):
    before = state_of(bridge)
    cache = StaticCache(config=bridge.original_model.config, max_cache_len=16)
    with (
        torch.no_grad(),
        bridge.saes(make_sae()),
        pytest.raises(ValueError, match=r"StaticCache; .* expected a transformers.DynamicCache"),
    ):
        bridge(TOKENS, past_key_values=cache, use_cache=True)
    assert_clean(bridge, before)


@pytest.mark.parametrize("exact", ["bridge"], indirect=True)
def test_a_cache_made_without_the_models_config(exact: Any):
    cache = DynamicCache()
    with torch.no_grad(), exact.saes(make_sae((2, 4))):
        steps = [exact(part, past_key_values=cache, use_cache=True) for part in TOKENS.split([5, 4], dim=1)]
        torch.testing.assert_close(torch.cat(steps, 1), exact(TOKENS), rtol=0, atol=1e-5)


def test_a_cache_of_recurrent_layers(tiny_llama_dir: Path, tmp_path: Path):
    """Two passes would move its state on twice."""
    config = Lfm2Config(
        num_hidden_layers=4, hidden_size=D_MODEL, intermediate_size=64, num_attention_heads=4, vocab_size=128,
        num_key_value_heads=2, layer_types=["conv", "full_attention"] * 2, initializer_range=0.2,
        max_position_embeddings=N_CTX, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    Lfm2ForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_llama_dir).save_pretrained(tmp_path)
    model = load_model(tmp_path, "bridge", "cpu", model_class=RouteSAETransformerBridge).eval()
    with model.saes(make_sae((1, 2))):
        with pytest.raises(NotImplementedError, match=r"has recurrent layers.* use_past_kv_cache=False"):
            model.generate(TOKENS, max_new_tokens=5, **GREEDY)
        tokens = model.generate(TOKENS, max_new_tokens=5, use_past_kv_cache=False, **GREEDY)
        assert torch.equal(tokens, by_hand(model, TOKENS, 5))
        with pytest.raises(NotImplementedError, match="has recurrent layers"):
            model(TOKENS, cache_params=DynamicCache())


def test_backward_hooks_without_gradients(exact: Any):
    hooks = [(layer_hook_name(exact, 5), lambda grad, hook: None)]
    with torch.no_grad():
        for on in (exact.saes(make_sae()), steered(exact)):
            with on:
                with pytest.raises(ValueError, match="incl_bwd=True needs gradients"):
                    exact.run_with_cache(TOKENS, incl_bwd=True)
                with pytest.raises(ValueError, match="bwd_hooks needs gradients"):
                    exact.run_with_hooks(TOKENS, bwd_hooks=hooks)
                exact.run_with_hooks(TOKENS)


def test_without_tokenizer_only_the_uncached_way(hooked: HookedRouteSAETransformer):
    """A model that adds position embeddings: without a mask upstream counts cached positions twice."""
    before = state_of(hooked)
    options = {"max_new_tokens": 5, **GREEDY}
    with hooked.saes(make_sae(metadata={"seqpos_slice": (1, None)})):
        expected = by_hand(hooked, TOKENS, 5)
        assert torch.equal(hooked.generate(TOKENS, use_past_kv_cache=False, **options), expected)
        with pytest.raises(NotImplementedError, match="use_past_kv_cache=False"):
            hooked.generate(TOKENS, **options)
    with steered(hooked), pytest.raises(NotImplementedError, match="use_past_kv_cache=False"):
        hooked.generate(TOKENS, **options)
    assert not torch.equal(expected, hooked.generate(TOKENS, use_past_kv_cache=False, **options))
    assert_clean(hooked, before)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("beside_a_route_sae", [True, False])
def test_ordinary_saes_leave_special_tokens_alone_while_generating(
    exact_models: dict, cached: bool, beside_a_route_sae: bool
):
    model = copy.deepcopy(exact_models["hooked"])
    saes: list[Any] = [ordinary_sae("blocks.3.hook_resid_post").to(torch.float64)]
    if beside_a_route_sae:
        saes.append(make_sae((4, 5)).to(torch.float64))
    special = [int(TOKENS[0, 3]), int(TOKENS[1, -1])]
    with model.saes(saes):
        everywhere = by_hand(model, TOKENS, 5)
    with model.saes(saes, exclude_special_tokens=special):
        expected = by_hand(model, TOKENS, 5)
        got = model.generate(TOKENS, max_new_tokens=5, use_past_kv_cache=cached, **GREEDY)
        with pytest.raises(ValueError, match="embeddings"):
            model(model.embed(TOKENS), start_at_layer=0)
    assert torch.equal(got, expected) and not torch.equal(got, everywhere)
