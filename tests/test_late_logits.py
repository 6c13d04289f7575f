"""Forwards without their unembedding: the logits are the model's, and it steps aside where they would not be."""

from __future__ import annotations

import pytest
import torch
from sae_lens.load_model import HookedProxyLM
from test_evaluate import route_sae
from transformers import Gemma2Config, Gemma2ForCausalLM

from routesae_lens.analysis import next_tokens
from routesae_lens.analysis.evaluate import evaluate_all
from routesae_lens.splice import late_logits
from routesae_lens.splice.late_logits import Unembedding

TOKENS = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["tiny_hooked", "tiny_bridge", "tiny_proxy"])
def model(request):
    return request.getfixturevalue(request.param)


def unembedding_of(model):
    return Unembedding(model).module


@torch.no_grad()
def test_blocks_are_the_logits_of_the_model(model):
    calls = []

    def forward():
        calls.append(1)
        return model(TOKENS)

    logits, expected = Unembedding(model).logits(forward), model(TOKENS)
    assert logits.late and len(calls) == 1 and logits.source.shape[-1] == 32 < logits.d_vocab
    block = logits.block(slice(10, 30), slice(7, 60))
    torch.testing.assert_close(block, expected.flatten(0, 1)[10:30, 7:60])
    torch.testing.assert_close(logits.whole(), expected)
    assert not logits.late
    torch.testing.assert_close(logits.block(slice(10, 30), slice(7, 60)), block)
    torch.testing.assert_close(model(TOKENS), expected, rtol=0, atol=0)  # nothing is left behind


@torch.no_grad()
def test_what_listens_on_the_unembedding_hears_all_of_it(model):
    unembedding, heard = Unembedding(model), []
    module = unembedding_of(model)
    for listened in [module, *module.children(), model]:
        heard.clear()
        handle = listened.register_forward_hook(lambda _module, _args, out: heard.append(out))
        logits = unembedding.logits(lambda: model(TOKENS))
        handle.remove()
        assert not logits.late and [tuple(out.shape[:2]) for out in heard] == [(4, 12)]
        torch.testing.assert_close(logits.whole(), model(TOKENS), rtol=0, atol=0)
    assert unembedding.logits(lambda: model(TOKENS)).late  # as soon as nothing does


@torch.no_grad()
@pytest.mark.parametrize(
    "model, name",
    [("tiny_hooked", "unembed.hook_in"), ("tiny_bridge", "unembed.hook_out"), ("tiny_proxy", "lm_head")],
    indirect=["model"],
)
def test_a_hook_of_the_forward_on_the_unembedding_counts(model, name):
    def double(x, hook):
        return 2 * x

    def forward():
        return model.run_with_hooks(TOKENS, fwd_hooks=[(name, double)])

    logits = Unembedding(model).logits(forward)
    assert not logits.late and torch.equal(logits.whole(), forward())
    assert not torch.allclose(logits.whole(), model(TOKENS))


def soft_capped_hooked(tiny_hooked):
    tiny_hooked.cfg.output_logits_soft_cap = 2.0
    return tiny_hooked


def gemma2(_):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64, num_attention_heads=2, num_key_value_heads=2, final_logit_softcapping=0.5, **sizes
    )
    return HookedProxyLM(Gemma2ForCausalLM(config).eval(), None)


@torch.no_grad()
@pytest.mark.parametrize("capped", [soft_capped_hooked, gemma2])
def test_models_that_cap_their_logits(capped, tiny_hooked):
    model, calls = capped(tiny_hooked), []

    def forward():
        calls.append(1)
        return model(TOKENS)

    unembedding = Unembedding(model)
    for expected_calls in (2, 3):  # the first time it is found out
        logits = unembedding.logits(forward)
        assert not logits.late and len(calls) == expected_calls
        assert torch.equal(logits.whole(), model(TOKENS))


@torch.no_grad()
@pytest.mark.parametrize("change", ["in place", "its head patched", "reshaped"])
def test_heads_that_are_no_longer_what_their_weights_say(tiny_proxy, change):
    language_model = tiny_proxy.model
    own, head = language_model.forward, language_model.lm_head

    def changed(*args, **kwargs):
        output = own(*args, **kwargs)
        if change == "in place":
            output.logits.mul_(0.85)
        if change == "reshaped":
            output.logits = 2 * output.logits.reshape(4, 12, -1)
        return output

    language_model.forward = changed
    if change == "its head patched":
        weight = head.weight.clone()
        head.forward = lambda x: torch.nn.functional.linear(x, weight) + x.mean(-1, keepdim=True)
    logits = Unembedding(tiny_proxy).logits(lambda: tiny_proxy(TOKENS))
    assert not logits.late and torch.equal(logits.whole(), tiny_proxy(TOKENS))


def test_whole_logits_have_no_gradient_to_the_weights(model):
    assert not Unembedding(model).logits(lambda: model(TOKENS)).whole().requires_grad


def test_an_error_leaves_the_unembedding_as_it_was(model):
    module = unembedding_of(model)

    def broken():
        model(TOKENS)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Unembedding(model).logits(broken)
    assert "forward" not in module.__dict__
    assert model(TOKENS).shape[:2] == (4, 12)


@pytest.mark.parametrize("several", [False, True])
def test_evaluation_does_not_depend_on_it(model, several, monkeypatch):
    saes = {f"sae{i}": route_sae(sharp=8.0 / (1 + i)) for i in range(1 + several)}
    options = {"progress": False, "unscaled": True, "batch_size": 3}
    monkeypatch.setitem(next_tokens.BLOCK, "cpu", 100)
    monkeypatch.setitem(next_tokens.ROWS, "cpu", 7)
    late = evaluate_all(saes, model, TOKENS, **options)
    monkeypatch.setattr(late_logits, "_weights", lambda module: None)
    whole = evaluate_all(saes, model, TOKENS, **options)
    for name in saes:
        assert whole[name].kl > 1e-3
        for metric, value in whole[name].row().items():
            ours = late[name].row()[metric]
            assert ours == (pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value)
