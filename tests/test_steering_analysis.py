"""Steered completions and dose-response against forwards by hand."""

from __future__ import annotations

import json
import math
import statistics
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from spliced import make_sae, ordinary_sae
from spliced_crosscoders import make_crosscoder
from transformer_lens import HookedTransformer
from transformers import AutoTokenizer

from routesae_lens.analysis.completions import Completion, GenerationOptions, complete
from routesae_lens.analysis.steering import dose_response, steer_completions
from routesae_lens.hook_points import layer_hook_name, mounted_points
from routesae_lens.models import load_model
from routesae_lens.saes.forms import with_routing
from routesae_lens.splice.edits import Ablate, Scale, Set
from routesae_lens.splice.hooked import HookedRouteSAETransformer, RouteSAETransformerBridge

EIGHT = GenerationOptions(max_new_tokens=8)
PROMPTS = ["The river was quiet", "A router picks the layer; how"]


@pytest.fixture(params=["hooked", "bridge"])
def llama(request: pytest.FixtureRequest, tiny_llama_dir):
    """The same tiny language model, with its tokenizer, in both classes."""
    classes = {"hooked": HookedRouteSAETransformer, "bridge": RouteSAETransformerBridge}
    return load_model(tiny_llama_dir, request.param, "cpu", model_class=classes[request.param]).eval()


def state(model: Any) -> Any:
    return set(model.hook_dict), mounted_points(model), dict(model.acts_to_saes)


@torch.no_grad()
def by_hand(model: Any, sae: Any, prompt: str, edits: dict, n: int, latent: int, **steering: Any) -> Any:
    """Greedy, without generate and without a cache: a steered and a clean forward for every token."""
    tokens = model.to_tokens(prompt)
    start, kl, log_probs = tokens.shape[1], [], []
    if steering.get("positions") == "generated":  # to a forward without generate all is prompt
        steering["positions"] = slice(start, None)
    for _ in range(n):
        clean = model(tokens)[0, -1].double().log_softmax(-1)
        with model.steer(sae, edits, **steering):
            ours = model(tokens)[0, -1].double().log_softmax(-1)
        token = ours.argmax()
        kl.append(float((clean.exp() * (clean - ours)).sum()))
        log_probs.append(float(clean[token]))
        tokens = torch.cat([tokens, token[None, None]], dim=1)
        if int(token) == model.tokenizer.eos_token_id:
            break
    point = sae.mount(model)
    _, cache = model.run_with_cache(tokens, names_filter=point)
    route = sae.route(cache[point])
    acts = sae.encode_routed(route.input[0]).double()[:, latent] / route.scale[0].double()
    return SimpleNamespace(
        tokens=tokens[0, start:].tolist(),
        kl=kl,
        log_probs=log_probs,
        blocks=[sae.layers[i] for i in route.layer[0, start:].tolist()],
        activations=acts[start:].tolist(),
    )


def fits(found: Completion, expected: Any, model: Any, latent: int) -> None:
    special = {*model.tokenizer.all_special_ids}
    assert found.tokens == expected.tokens
    assert found.kl == pytest.approx(expected.kl, abs=2e-5)
    assert found.log_probs == pytest.approx(expected.log_probs, abs=2e-5)
    for i, token in enumerate(found.tokens):
        if token in special:
            assert found.blocks[i] is None and found.activations[latent][i] is None
        else:
            assert found.blocks[i] == expected.blocks[i]
            assert found.activations[latent][i] == pytest.approx(expected.activations[i], abs=1e-4)


@pytest.mark.parametrize("steering", [{}, {"positions": "generated"}, {"use_error_term": False}], ids=str)
def test_pairs_are_those_of_forwards_by_hand(llama, steering):
    sae, latent, edits = make_sae(), 7, {7: Set(6.0)}
    before = state(llama)
    pairs = steer_completions(llama, sae, edits, PROMPTS, options=EIGHT, progress=False, **steering)
    assert state(llama) == before
    for prompt, pair in zip(PROMPTS, pairs, strict=True):
        fits(pair.steered, by_hand(llama, sae, prompt, edits, 8, latent, **steering), llama, latent)
        none = by_hand(llama, sae, prompt, {latent: Scale(1.0)}, 8, latent)
        none.kl = [0.0] * len(none.tokens)
        fits(pair.original, none, llama, latent)
        assert pair.prompt == "<s>" + prompt and sum(pair.steered.kl) > 0.01
        ours = pair.steered
        assert ours.perplexity == pytest.approx(math.exp(-statistics.fmean(ours.log_probs)))
        assert ours.text == llama.tokenizer.decode(ours.tokens, skip_special_tokens=True)
        assert ours.strings == [llama.tokenizer.decode([token]) for token in ours.tokens]
        same = [a == b for a, b in zip(ours.tokens, pair.original.tokens, strict=False)]
        longest = max(len(ours.tokens), len(pair.original.tokens))
        assert pair.changed == pytest.approx(1 - sum(same) / longest)
    assert json.loads(json.dumps([pair.to_dict() for pair in pairs], allow_nan=False))


def test_an_edit_without_effect_has_no_kl(llama):
    [pair] = steer_completions(llama, make_sae(), {3: Scale(1.0)}, PROMPTS[:1], options=EIGHT, progress=False)
    assert pair.changed == 0 and max(pair.steered.kl) < 1e-5
    assert pair.original.kl == [0.0] * len(pair.original.tokens)


def test_random_routes_are_those_of_the_generation(llama):
    sae = with_routing(make_sae(), "random")
    [pair] = steer_completions(llama, sae, {7: Set(3.0)}, PROMPTS[:1], options=EIGHT, progress=False)
    fits(pair.steered, by_hand(llama, sae, PROMPTS[0], {7: Set(3.0)}, 8, 7), llama, 7)
    assert len({*pair.steered.blocks}) > 1


@pytest.mark.parametrize("kind", ["crosscoder", "ordinary"])
def test_other_saes(llama, kind):
    sae = (
        make_crosscoder()
        if kind == "crosscoder"
        else ordinary_sae(layer_hook_name(llama, 3, "hook_resid_post"))
    )
    latents = list(range(sae.cfg.d_sae))
    [found] = complete(llama, sae, PROMPTS[:1], {5: Set(9.0)}, read=latents, options=EIGHT, progress=None)
    assert {*found.blocks} - {None} == ({3} if kind == "ordinary" else set())
    assert found.mean_kl > 0
    with torch.no_grad():
        tokens = torch.cat([llama.to_tokens(PROMPTS[0])[0], torch.tensor(found.tokens)])[None]
        point = sae.mount(llama) if kind == "crosscoder" else sae.cfg.metadata.hook_name
        acts = sae.encode(llama.run_with_cache(tokens, names_filter=[point])[1][point])[0]
    acts = acts[-len(found.tokens) :]
    fired = 0
    for latent in latents:
        for i, value in enumerate(found.activations[latent]):
            if found.tokens[i] in llama.tokenizer.all_special_ids:
                assert value is None
            else:
                assert value == pytest.approx(float(acts[i, latent]), abs=1e-4)
                fired += value > 0
    assert fired > 10


def test_completions_do_not_depend_on_what_runs_beside_them(llama):
    sae, edits = make_sae(), {7: Set(4.0)}
    prompts = ["The river", "The boats lay still", "The river", "The dog"]
    together = complete(llama, sae, prompts, edits, options=EIGHT, progress=None)
    alone = [complete(llama, sae, [p], edits, options=EIGHT, progress=None)[0] for p in prompts]
    for i, (one, other) in enumerate(zip(together, alone, strict=True)):
        assert one.prompt == i and one.tokens == other.tokens
        assert one.kl == pytest.approx(other.kl, abs=1e-5)


def test_a_completion_ends_with_the_end_of_text(llama, monkeypatch):
    """Also where another one, side by side with it, goes on."""
    prompts = ["The river #", "The river ~"]
    sae, given = make_sae(), {"options": EIGHT, "read": [1], "progress": None}
    long = complete(llama, sae, prompts, **given)
    same_length = {len(llama.to_tokens(prompt)[0]) for prompt in prompts}
    assert len(same_length) == 1
    ends = [token for token in long[0].tokens[1:7] if token not in long[1].tokens + long[0].tokens[:1]]
    cut = long[0].tokens.index(ends[0]) + 1
    llama.tokenizer.eos_token = llama.tokenizer.convert_ids_to_tokens(ends[0])
    monkeypatch.setattr(llama.cfg, "eos_token_id", ends[0], raising=False)
    shorter, other = complete(llama, sae, prompts, **given)
    assert cut < 8 and shorter.tokens == long[0].tokens[:cut] and other.tokens == long[1].tokens
    assert shorter.log_probs == pytest.approx(long[0].log_probs[:cut], abs=1e-5)
    assert len(shorter.kl) == len(shorter.blocks) == len(shorter.activations[1]) == cut
    # the end of text is a special token, which the SAE leaves alone
    assert shorter.blocks == [*long[0].blocks[: cut - 1], None] and None not in shorter.blocks[:-1]
    assert shorter.activations[1][-1] is None and None not in shorter.activations[1][:-1]


def test_activations_are_in_units_of_p_1(llama):
    sae = make_sae()
    with torch.no_grad():
        sae.W_router.mul_(0.1)
    latents = list(range(sae.cfg.d_sae))
    [found] = complete(llama, sae, PROMPTS[:1], read=latents, options=EIGHT, progress=None)
    tokens = torch.cat([llama.to_tokens(PROMPTS[0])[0], torch.tensor(found.tokens)])[None]
    point = sae.mount(llama)
    with torch.no_grad():
        route = sae.route(llama.run_with_cache(tokens, names_filter=point)[1][point])
        acts = sae.encode_routed(route.input[0])
    p = route.probs[0].max(-1).values
    assert p.max() < 0.95
    expected = (acts / p[:, None])[-len(found.tokens) :]
    read = torch.tensor([found.activations[latent] for latent in latents]).T
    torch.testing.assert_close(read, expected, rtol=1e-4, atol=1e-4)
    assert (read > 0).sum() > 10
    firing = (expected > 0).float().mean(0)
    assert [found.firing_share(i) for i in latents] == pytest.approx(firing.tolist())
    assert [found.mean_activation(i) for i in latents] == pytest.approx(expected.mean(0).tolist(), abs=1e-4)


def test_sampled_pairs_share_their_random_numbers(llama):
    options = GenerationOptions(6, do_sample=True, temperature=0.9, top_k=20, seed=3, samples=3, batch_size=4)
    sae = make_sae()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    pairs = steer_completions(llama, sae, {7: Scale(1.0)}, PROMPTS, options=options, progress=False)
    torch.testing.assert_close(torch.rand(3), expected)  # the caller's random numbers go on
    assert [(p.original.prompt, p.original.sample) for p in pairs] == [
        (i, j) for i in (0, 1) for j in range(3)
    ]
    assert all(pair.original.tokens == pair.steered.tokens for pair in pairs)
    assert len({tuple(pair.original.tokens) for pair in pairs[:3]}) == 3
    again = complete(llama, make_sae(), PROMPTS, options=options, progress=None)
    assert [one.tokens for one in again] == [pair.original.tokens for pair in pairs]


def test_dose_response(llama):
    sae, values, feature = make_sae(), [2.0, 8.0], 7
    options = GenerationOptions(6, do_sample=True, samples=2)
    unsteered = complete(llama, sae, PROMPTS, read=[feature], options=options, progress=None)
    given = {"options": options, "progress": False, "maxima": {feature: 3.0}, "relative": True}
    found = dose_response(llama, sae, feature, values, PROMPTS, unsteered=unsteered, read=[1], **given)
    assert found.completions[0] is unsteered and 1 in found.completions[1][0].activations
    own = dose_response(llama, sae, feature, values, PROMPTS, **given)
    assert own.to_dict() == found.to_dict()
    assert [row.value for row in found.rows] == [None, *values]
    base = [one.tokens for one in unsteered]
    for row, value in zip(found.rows[1:], values, strict=True):
        ours = found.completions[1 + values.index(value)]
        kl = [statistics.fmean(one.kl) for one in ours]
        acts = [[a for a in one.activations[feature] if a is not None] for one in ours]
        nll = [-statistics.fmean(one.log_probs) for one in ours]
        assert row.completions == 4 and row.tokens == sum(len(one.tokens) for one in ours)
        assert (row.kl, row.kl_std) == pytest.approx((statistics.fmean(kl), statistics.stdev(kl)))
        assert row.activation == pytest.approx(statistics.fmean(map(statistics.fmean, acts)))
        assert row.firing_share == pytest.approx(
            statistics.fmean(sum(x > 0 for x in a) / len(a) for a in acts)
        )
        assert row.perplexity == pytest.approx(math.exp(statistics.fmean(nll)))
        different = [
            1 - sum(x == y for x, y in zip(a, b.tokens, strict=False)) / max(len(a), len(b.tokens))
            for a, b in zip(base, ours, strict=True)
        ]
        assert row.changed == pytest.approx(statistics.fmean(different))
    assert found.rows[0].kl == 0 and found.rows[0].changed == 0 and found.rows[2].kl > found.rows[1].kl > 0
    frame = found.to_frame()
    assert frame["value"].isna().tolist() == [True, False, False] and (frame["feature"] == feature).all()
    json.dumps(found.to_dict(), allow_nan=False)


def test_relative_strengths_are_multiples_of_the_maximum(llama):
    sae = make_sae(routing="fixed")  # p = 1: then relative and absolute are the same
    absolute = complete(llama, sae, PROMPTS, {7: Set(6.0)}, options=EIGHT, progress=None)
    found = dose_response(
        llama, sae, 7, [2.0], PROMPTS, relative=True, maxima={7: 3.0}, options=EIGHT, progress=False
    )
    assert [one.tokens for one in found.completions[1]] == [one.tokens for one in absolute]
    one_only = dose_response(llama, sae, 7, [0.5], PROMPTS[:1], edit=Scale, options=EIGHT, progress=False)
    assert one_only.edit == "Scale" and one_only.rows[1].kl_std is None


# --- prompts --------------------------------------------------------------------------------------

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}bot:"


def test_chats_go_through_the_template_and_have_one_bos(llama, monkeypatch):
    turns = [{"role": "user", "content": "The river"}]
    monkeypatch.setattr(llama.tokenizer, "chat_template", TEMPLATE)
    chat, text = steer_completions(
        llama, make_sae(), {7: Set(4.0)}, [turns, "user: The river\nbot:"], options=EIGHT, progress=False
    )
    assert chat.prompt == text.prompt == "<s>user: The river\nbot:"
    assert chat.steered.tokens == text.steered.tokens
    [written] = steer_completions(
        llama, make_sae(), {7: Set(4.0)}, ["<s>user: The river\nbot:"], options=EIGHT, progress=False
    )
    assert written.prompt == chat.prompt and written.steered.tokens == chat.steered.tokens
    monkeypatch.setattr(llama.tokenizer, "chat_template", "{{ raise_exception('no such role') }}")
    with pytest.raises(ValueError, match="prompt 0: the chat template refuses these turns: no such role"):
        complete(llama, make_sae(), [turns], options=EIGHT)


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([], ValueError, "no prompts given"),
        ("The river", TypeError, "expected a list of prompts, got str"),
        (["The river", ""], ValueError, "prompt 1 is empty"),
        ([[{"role": "user"}]], ValueError, "prompt 0: expected turns such as"),
        ([[]], ValueError, "prompt 0: expected a text or the turns of a chat"),
        ([[{"role": "user", "content": "Hello"}]], ValueError, "no chat template: give a text"),
        (["The river " * 9], ValueError, r"prompt 0 has \d+ tokens; with max_new_tokens=8 .* context of 64"),
    ],
)
def test_prompts_that_do_not_do(llama, monkeypatch, prompts, error, message):
    monkeypatch.setattr(llama, "generate", lambda *_, **__: pytest.fail("generated before the check"))
    before = state(llama)
    with pytest.raises(error, match=message):
        steer_completions(llama, make_sae(), {7: Set(1.0)}, prompts, options=EIGHT)
    assert state(llama) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of 1 or more, got 0"),
        ({"samples": 2}, "samples needs do_sample=True"),
        ({"temperature": 0.5, "top_k": 3}, "temperature, top_k needs do_sample=True"),
        ({"do_sample": True, "temperature": 0.0}, "temperature must be a positive number, got 0.0"),
        ({"do_sample": True, "temperature": math.inf}, "must be finite"),
        ({"do_sample": True, "top_k": 0}, "top_k must be"),
        ({"seed": -1}, "seed must be"),
        ({"batch_size": 0}, "batch_size must be"),
    ],
)
def test_options_that_do_not_do(options, message):
    with pytest.raises(ValueError, match=message):
        GenerationOptions(**options)


def test_models_saes_and_edits_that_do_not_do(llama, tiny_llama_dir, tiny_hooked, monkeypatch):
    sae = make_sae()
    with pytest.raises(TypeError, match="got HookedTransformer; load_model"):
        complete(tiny_hooked, sae, PROMPTS)
    assert type(tiny_hooked) is HookedTransformer
    without = HookedRouteSAETransformer.from_model(tiny_hooked)
    with pytest.raises(ValueError, match="no tokenizer"):
        complete(without, sae, PROMPTS)
    monkeypatch.setattr(llama, "generate", lambda *_, **__: pytest.fail("generated before the check"))
    before = state(llama)
    with pytest.raises(ValueError, match="latent 48 is out of range"):
        steer_completions(llama, sae, {48: Ablate()}, PROMPTS)
    with pytest.raises(ValueError, match=r"latents \[-1\] are out of range"):
        complete(llama, sae, PROMPTS, read=[-1])
    with pytest.raises(ValueError, match="positions given, but no edits"):
        complete(llama, sae, PROMPTS, positions="all")
    with pytest.raises(ValueError, match="relative to the feature's maximum"):
        dose_response(llama, sae, 3, [1.0], PROMPTS, relative=True)
    with pytest.raises(ValueError, match="no values to steer at"):
        dose_response(llama, sae, 3, [], PROMPTS)
    with pytest.raises(ValueError, match="must be finite numbers, got nan"):
        dose_response(llama, sae, 3, [1.0, math.nan], PROMPTS)
    with pytest.raises(TypeError, match="Scale takes no relative strength"):
        dose_response(llama, sae, 3, [1.0], PROMPTS, edit=Scale, relative=True, maxima={3: 1.0})
    with pytest.raises(TypeError, match="which take a strength"):
        dose_response(llama, sae, 3, [1.0], PROMPTS, edit=Ablate)
    with pytest.raises(ValueError, match="unsteered must be 1 completions of each of 2 prompts"):
        dose_response(llama, sae, 3, [1.0], PROMPTS, unsteered=[])
    top = GenerationOptions(do_sample=True, top_k=129)
    with pytest.raises(ValueError, match="top_k=129 is more than the 128 tokens"):
        complete(llama, sae, PROMPTS, options=top)
    assert state(llama) == before
    assert AutoTokenizer.from_pretrained(tiny_llama_dir).bos_token == "<s>"
