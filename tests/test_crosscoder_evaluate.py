"""Evaluating Crosscoders: hand-written references, closed-form ones, and equal numbers on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from spliced import D_MODEL, make_sae, ordinary_sae
from spliced_crosscoders import LAYERS, clean_layers, make_crosscoder, two_passes

from routesae_lens.analysis.evaluate import SpliceEvaluator, evaluate, evaluate_all
from routesae_lens.analysis.subjects import subject_of
from routesae_lens.hook_points import layer_hook_name
from routesae_lens.models import BACKENDS, load_model
from routesae_lens.saes.crosscoder import (
    CrosscoderBatchTopKTrainingSAE,
    CrosscoderBatchTopKTrainingSAEConfig,
    CrosscoderStandardSAE,
    CrosscoderStandardSAEConfig,
)
from routesae_lens.saes.forms import inference_form


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 60, (5, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("chosen", [None, [2, 4]])
@pytest.mark.parametrize("standardize", [True, False])
def test_matches_a_hand_written_reference(
    tiny_hooked: Any, tokens: torch.Tensor, chosen: list[int] | None, standardize: bool
):
    sae = make_crosscoder(architecture="standard", standardize=standardize)
    result = evaluate(sae, tiny_hooked, tokens, progress=False, splice_layers=chosen)
    keep = torch.ones_like(tokens, dtype=torch.bool)
    keep[:, 0] = False
    clean = tiny_hooked(tokens)
    spliced = two_passes(tiny_hooked, sae, tokens, keep, chosen)
    kl = torch.nn.functional.kl_div(
        spliced.log_softmax(-1), clean.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert result.tokens == 5 * 11
    assert result.kl == pytest.approx(kl[keep].mean().item(), rel=1e-4)

    def ce(logits: torch.Tensor) -> float:
        return torch.nn.functional.cross_entropy(
            logits[:, 1:-1].flatten(0, 1), tokens[:, 2:].flatten()
        ).item()

    def zero(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return x * ~keep[..., None]

    zeroed = tiny_hooked.run_with_hooks(
        tokens, fwd_hooks=[(layer_hook_name(tiny_hooked, layer), zero) for layer in chosen or LAYERS]
    )
    assert result.ce_zero == pytest.approx(ce(zeroed), rel=1e-5)
    assert result.delta_ce == pytest.approx(ce(spliced) - ce(clean), rel=1e-3, abs=1e-5)
    assert result.loss_recovered == pytest.approx(
        1 - (ce(spliced) - ce(clean)) / (ce(zeroed) - ce(clean)), rel=1e-3
    )

    # Reconstruction: every layer by its own, in standardised space, whatever is spliced.
    x = clean_layers(tiny_hooked, sae, tokens)[keep]  # (token, layer, d_model)
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True) + 1e-6
    z = (x - mean) / std
    acts = sae.encode(x.flatten(-2))
    z_hat = (acts @ sae.W_dec + sae.b_dec).unflatten(-1, (3, D_MODEL))
    if not standardize:
        z_hat = (z_hat - mean) / std
    errors = (z - z_hat).pow(2).sum(-1)
    ratio = (errors / z.pow(2).sum(-1)).mean(0)
    explained = 1 - errors.sum(0) / (z - z.mean(0)).pow(2).sum((0, 2))
    for index, layer in enumerate(LAYERS):
        assert result.norm_mse_per_layer[layer] == pytest.approx(ratio[index].item(), rel=1e-4)
        assert result.explained_variance_per_layer[layer] == pytest.approx(explained[index].item(), rel=1e-3)
    assert result.norm_mse == pytest.approx(ratio.mean().item(), rel=1e-4)
    assert result.explained_variance == pytest.approx(explained.mean().item(), rel=1e-3)
    uncentered = (1 - errors.sum(0) / z.pow(2).sum((0, 2))).mean()
    assert result.explained_variance_uncentered == pytest.approx(uncentered.item(), rel=1e-4)
    raw = (x - (z_hat * std + mean)).pow(2).sum((0, 2))  # in the model's units
    raw_explained = (1 - raw / (x - x.mean(0)).pow(2).sum((0, 2))).mean()
    assert result.explained_variance_raw == pytest.approx(raw_explained.item(), rel=1e-3)
    assert result.mse == pytest.approx(raw.sum().item() / x.shape[:2].numel(), rel=1e-4)
    raw_uncentered = (1 - raw / x.pow(2).sum((0, 2))).mean()
    assert result.explained_variance_raw_uncentered == pytest.approx(raw_uncentered.item(), rel=1e-3)
    fired = acts > 0
    assert result.l0 == pytest.approx(fired.float().sum(-1).mean().item(), rel=1e-5)
    assert result.dead_latents == int((~fired.any(0)).sum())
    torch.testing.assert_close(result.firing_frequency, fired.float().mean(0), rtol=0, atol=1e-6)

    # Nothing is routed.
    assert (result.mean_p, result.entropy, result.kl_unscaled) == (1, 0, None)
    assert result.layer_share == {layer: pytest.approx(1 / 3) for layer in LAYERS}
    assert ("block 2, 4 alone" if chosen else "every block") in result.splice


def test_equal_numbers_on_every_backend(tiny_llama_dir: Any, tokens: torch.Tensor):
    saes = {"crosscoder": make_crosscoder(), "routed": make_sae()}
    results = [
        evaluate_all(saes, load_model(tiny_llama_dir, backend, device="cpu"), tokens, progress=False)[
            "crosscoder"
        ].to_dict()
        for backend in BACKENDS
    ]
    assert results[0]["kl"] > 0.01
    for other in results[1:]:
        for metric, value in other.items():
            if isinstance(value, float | dict):
                assert value == pytest.approx(results[0][metric], rel=2e-3, abs=2e-5), metric


def test_batch_size_does_not_matter(tiny_hooked: Any, tokens: torch.Tensor):
    one, five = (
        evaluate(make_crosscoder(), tiny_hooked, tokens, batch_size=size, progress=False).to_dict()
        for size in (1, 5)
    )
    for metric, value in one.items():
        if not isinstance(value, str | None):
            assert value == pytest.approx(five[metric], rel=1e-4), metric


@pytest.mark.parametrize("chosen", [None, [2]])
def test_a_perfect_crosscoder(tiny_hooked: Any, tokens: torch.Tensor, chosen: list[int] | None):
    d_in = 3 * D_MODEL
    sae = CrosscoderStandardSAE(CrosscoderStandardSAEConfig(d_in=d_in, d_sae=2 * d_in, layers=LAYERS))
    eye = torch.eye(d_in)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye], 1))
        sae.W_dec.copy_(torch.cat([eye, -eye], 0))
    result = evaluate(sae, tiny_hooked, tokens, progress=False, splice_layers=chosen)
    assert result.kl == pytest.approx(0, abs=1e-5)
    assert result.norm_mse == pytest.approx(0, abs=1e-6)
    assert result.explained_variance == pytest.approx(1, abs=1e-5)
    assert result.loss_recovered == pytest.approx(1, abs=1e-3)
    assert result.l0 == pytest.approx(d_in, abs=0.5)


def test_a_zero_crosscoder_recovers_nothing(tiny_hooked: Any, tokens: torch.Tensor):
    sae = make_crosscoder(standardize=False)  # (standardised, the mean of the stream would be left)
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.b_dec.zero_()
    result = evaluate(sae, tiny_hooked, tokens, progress=False)
    assert result.ce_spliced == pytest.approx(result.ce_zero, rel=1e-6)
    assert result.loss_recovered == pytest.approx(0, abs=1e-6)
    assert result.kl > 0.01
    standardized = make_crosscoder()
    with torch.no_grad():
        standardized.W_dec.zero_()
        standardized.b_dec.zero_()
    result = evaluate(standardized, tiny_hooked, tokens, progress=False)
    assert result.norm_mse == pytest.approx(1, abs=1e-6)
    assert result.norm_mse_per_layer == {layer: pytest.approx(1, abs=1e-6) for layer in LAYERS}
    assert all(value <= 0 for value in result.explained_variance_per_layer.values())


def test_over_one_layer_it_is_an_ordinary_sae(tiny_hooked: Any, tokens: torch.Tensor):
    sae, plain = make_crosscoder([4], "standard", standardize=False), ordinary_sae("blocks.4.hook_resid_post")
    plain.load_state_dict(sae.state_dict())
    results = evaluate_all({"one": sae, "plain": plain}, tiny_hooked, tokens, progress=False)
    one, other = (results[name].to_dict() for name in ("one", "plain"))
    assert one.pop("splice") != other.pop("splice")
    assert one.pop("kl_unscaled") is other.pop("kl_unscaled") is None
    for metric, value in one.items():
        assert value == pytest.approx(other[metric], rel=1e-5), metric


def test_a_training_form_through_saelens_evaluator_seam(tiny_hooked: Any, tokens: torch.Tensor):
    cfg = CrosscoderBatchTopKTrainingSAEConfig(d_in=3 * D_MODEL, d_sae=64, k=8.0, layers=LAYERS)
    sae = CrosscoderBatchTopKTrainingSAE(cfg)
    sae.topk_threshold.fill_(0.5)
    options: dict[str, Any] = {"progress": False, "splice_layers": [1, 4]}
    expected = evaluate(inference_form(sae), tiny_hooked, tokens, **options)
    got = SpliceEvaluator(tiny_hooked, tokens, **options)(sae, iter(()))
    assert got["eval/kl"] == pytest.approx(expected.kl)
    assert got["eval/norm_mse_per_layer/2"] == pytest.approx(expected.norm_mse_per_layer[2])


def test_beside_others_on_the_same_clean_pass(tiny_hooked: Any, tokens: torch.Tensor):
    saes = {
        "all": make_crosscoder(),
        "routed": make_sae(),
        "plain": ordinary_sae("blocks.2.hook_resid_post"),
    }
    together = evaluate_all(saes, tiny_hooked, tokens, progress=False, splice_layers=[2])
    assert together["all"].ce_zero == pytest.approx(together["plain"].ce_zero)
    for name in ("routed", "plain"):  # which know nothing of splice_layers
        alone = evaluate(saes[name], tiny_hooked, tokens, progress=False)
        assert together[name].to_dict() == alone.to_dict()


def test_what_a_reading_says(tiny_hooked: Any, tokens: torch.Tensor):
    sae = make_crosscoder()
    subject = subject_of(sae, tiny_hooked)
    stack = clean_layers(tiny_hooked, sae, tokens).flatten(-2)
    reading = subject.read(stack, 0)
    assert reading.every_layer and reading.route is None and (reading.layer == 2).all()
    assert subject.layers[int(reading.layer[0, 0])] == 4  # the last: where the stack is complete
    torch.testing.assert_close(reading.original, sae.standardized(stack))
    assert reading.x is stack


def test_bad_input(tiny_hooked: Any, tokens: torch.Tensor):
    sae = make_crosscoder()
    with pytest.raises(
        ValueError, match=r"mine: splice_layers \[2, 3\] .* not read: \[3\]; it reads \[1, 2, 4\]"
    ):
        evaluate_all({"mine": sae}, tiny_hooked, tokens, splice_layers=[2, 3])
    with pytest.raises(ValueError, match="layers must be a non-empty list"):
        evaluate(sae, tiny_hooked, tokens, splice_layers=[])
    with pytest.raises(ValueError, match=r"splice_layers=\[1\] is for Crosscoders, and none of sae is one"):
        evaluate(make_sae(), tiny_hooked, tokens, splice_layers=[1])
    with pytest.raises(ValueError, match="between 0 and 5"):
        evaluate(make_crosscoder([1, 9]), tiny_hooked, tokens)
    with torch.no_grad():
        sae.W_enc[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite weights: W_enc"):
        evaluate(sae, tiny_hooked, tokens)
