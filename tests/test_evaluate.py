"""Evaluation: the authors' KL, hand-written references, closed-form SAEs, and equal numbers on every backend."""

from __future__ import annotations

import json
import math

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.evals import ExplainedVarianceCalculator
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors.torch import load_file

from routesae_lens.analysis.evaluate import (
    SpliceEvaluator,
    evaluate,
    evaluate_all,
    held_out_tokens,
)
from routesae_lens.analysis.metrics import LayerSums
from routesae_lens.analysis.next_tokens import kl_per_token
from routesae_lens.analysis.stream import check_tokens, kept_tokens
from routesae_lens.analysis.subjects import subject_of
from routesae_lens.models import BACKENDS, load_model
from routesae_lens.saes.architectures import (
    RouteBatchTopKTrainingSAE,
    RouteBatchTopKTrainingSAEConfig,
    RouteStandardSAE,
    RouteStandardSAEConfig,
    RouteTopKSAE,
    RouteTopKSAEConfig,
)
from routesae_lens.saes.forms import inference_form
from routesae_lens.splice.replace import splice_hooks

D_MODEL = 32


def route_sae(routing: str = "hard", layers=(1, 2, 4), sharp: float = 8.0, **kwargs) -> RouteTopKSAE:
    torch.manual_seed(3)
    cfg = RouteTopKSAEConfig(
        d_in=len(layers) * D_MODEL, d_sae=64, k=8, layers=list(layers), routing=routing, **kwargs
    )
    sae = RouteTopKSAE(cfg)
    if hasattr(sae, "W_router"):
        sae.W_router.data.mul_(sharp)
    for bias in (sae.b_enc, sae.b_dec):  # without biases a TopK SAE is homogeneous, and p would not matter
        torch.nn.init.normal_(bias, std=0.5)
    return sae


def plain_sae(hook: str = "blocks.4.hook_resid_post") -> TopKSAE:
    torch.manual_seed(4)
    return TopKSAE(TopKSAEConfig(d_in=D_MODEL, d_sae=64, k=8, metadata=SAEMetadata(hook_name=hook)))


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 60, (5, 12), generator=torch.Generator().manual_seed(0))


def test_kl_is_the_authors_number(shared):
    tensors = load_file(shared / "golden/routesaes/tensors.safetensors")
    meta = json.loads((shared / "golden/routesaes/meta.json").read_text())
    kl = kl_per_token(tensors["kl.logits_clean"], tensors["kl.logits_spliced"])
    assert kl.mean().item() == pytest.approx(meta["kl_per_token"], abs=1e-6)
    assert kl.sum(-1).mean().item() == pytest.approx(meta["kl_batchmean"], abs=1e-6)


def test_kl_direction():
    certain, uniform = torch.tensor([20.0, 0.0]), torch.zeros(2)
    assert kl_per_token(certain, uniform).item() == pytest.approx(math.log(2), abs=1e-5)
    assert kl_per_token(uniform, certain).item() > 5


def test_matches_a_hand_written_two_pass_reference(tiny_hooked, tokens):
    sae = route_sae()
    result = evaluate(sae, tiny_hooked, tokens, exclude_special_tokens=False, progress=False, unscaled=True)
    keep = torch.ones_like(tokens, dtype=torch.bool)
    keep[:, 0] = False
    clean, cache = tiny_hooked.run_with_cache(tokens)
    route = sae.route(torch.cat([cache[f"blocks.{i}.hook_resid_post"] for i in (1, 2, 4)], -1))
    for scale_by_p, reported in ((True, result.kl), (False, result.kl_unscaled)):
        hooks = splice_hooks(sae, tiny_hooked, route, keep, scale_by_p=scale_by_p)
        spliced = tiny_hooked.run_with_hooks(tokens, fwd_hooks=hooks)
        kl = torch.nn.functional.kl_div(
            spliced.log_softmax(-1), clean.log_softmax(-1), log_target=True, reduction="none"
        ).sum(-1)
        assert reported == pytest.approx(kl[keep].mean().item(), rel=1e-4)
    assert result.kl_unscaled != pytest.approx(result.kl, rel=1e-3)
    assert result.tokens == 5 * 11
    assert sum(result.layer_share.values()) == pytest.approx(1)
    p = route.probs.max(-1).values[keep].mean().item()
    assert result.mean_p == pytest.approx(p, rel=1e-4)
    assert result.l0 == pytest.approx(
        sae.encode_routed(route.input[keep]).bool().float().sum(-1).mean().item()
    )
    ce = torch.nn.functional.cross_entropy(clean[:, 1:-1].flatten(0, 1), tokens[:, 2:].flatten())
    assert result.ce_clean == pytest.approx(ce.item(), rel=1e-4)
    z = route.input[keep] / route.scale[keep][:, None]
    z_hat = sae.decode(sae.encode_routed(route.input[keep])) / route.scale[keep][:, None]
    ratio = (z - z_hat).pow(2).sum(-1) / z.pow(2).sum(-1)
    assert result.norm_mse == pytest.approx(ratio.mean().item(), rel=1e-4)


def test_explained_variance_is_about_per_layer_means(tiny_hooked, tokens):
    sae = route_sae()
    result = evaluate(sae, tiny_hooked, tokens, exclude_special_tokens=False, progress=False)
    _, cache = tiny_hooked.run_with_cache(tokens)
    route = sae.route(torch.cat([cache[f"blocks.{i}.hook_resid_post"][:, 1:] for i in (1, 2, 4)], -1))
    z = (route.input / route.scale[..., None]).flatten(0, 1)
    z_hat = (sae.decode(sae.encode_routed(route.input)) / route.scale[..., None]).flatten(0, 1)
    layer, errors, variances = route.layer.flatten(), 0.0, 0.0
    for i, block in enumerate((1, 2, 4)):
        mine = layer == i
        if not mine.any():
            continue
        error = (z - z_hat)[mine].pow(2).sum().item()
        variance = (z[mine] - z[mine].mean(0)).pow(2).sum().item()
        assert result.explained_variance_per_layer[block] == pytest.approx(1 - error / variance, rel=1e-3)
        errors, variances = errors + error, variances + variance
    assert result.explained_variance == pytest.approx(1 - errors / variances, rel=1e-3)


@pytest.mark.parametrize("routing", ["hard", "soft", "random", "fixed", "straight_through"])
def test_equal_numbers_on_every_backend(tiny_llama_dir, tokens, routing):
    sae = route_sae(routing, fixed_layer=2 if routing == "fixed" else None)
    saes = {"routed": sae, "plain": plain_sae()}
    results = [
        evaluate_all(saes, load_model(tiny_llama_dir, backend, device="cpu"), tokens, progress=False)
        for backend in BACKENDS
    ]
    for name in saes:
        reference = results[0][name].to_dict()
        for other in results[1:]:
            for metric, value in other[name].to_dict().items():
                if isinstance(value, float):
                    assert value == pytest.approx(reference[metric], rel=2e-3, abs=2e-5), (name, metric)


def test_batch_size_does_not_matter(tiny_hooked, tokens):
    # (random routing draws per batch, so it is not asked)
    one, five = (
        evaluate(route_sae(), tiny_hooked, tokens, batch_size=size, progress=False).to_dict()
        for size in (1, 5)
    )
    for metric, value in one.items():
        if isinstance(value, str | None):
            assert value == five[metric]
            continue
        assert value == pytest.approx(five[metric], rel=1e-4), metric


def identity(cfg, cls):
    """An SAE of width 2 d_model whose reconstruction is its input."""
    sae = cls(cfg)
    eye = torch.eye(D_MODEL)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye], 1))
        sae.W_dec.copy_(torch.cat([eye, -eye], 0))
    return sae


def test_a_perfect_sae(tiny_hooked, tokens):
    routed = RouteStandardSAEConfig(d_in=3 * D_MODEL, d_sae=2 * D_MODEL, layers=[1, 2, 4])
    plain = StandardSAEConfig(
        d_in=D_MODEL, d_sae=2 * D_MODEL, metadata=SAEMetadata(hook_name="blocks.3.hook_resid_post")
    )
    saes = {"routed": identity(routed, RouteStandardSAE), "plain": identity(plain, StandardSAE)}
    for result in evaluate_all(saes, tiny_hooked, tokens, progress=False).values():
        assert result.kl == pytest.approx(0, abs=1e-5)
        assert result.norm_mse == pytest.approx(0, abs=1e-6)
        assert result.explained_variance == pytest.approx(1, abs=1e-5)
        assert result.loss_recovered == pytest.approx(1, abs=1e-3)
        assert result.l0 == pytest.approx(D_MODEL, abs=0.5)
        assert result.dead_latents == 0


def test_a_zero_sae_recovers_nothing(tiny_hooked, tokens):
    sae = plain_sae()
    with torch.no_grad():
        sae.W_dec.zero_()
    result = evaluate(sae, tiny_hooked, tokens, progress=False)
    assert result.ce_spliced == pytest.approx(result.ce_zero, rel=1e-6)
    assert result.loss_recovered == pytest.approx(0, abs=1e-6)
    assert result.kl > 0.01


def test_fixed_routing_is_a_route_sae_over_that_layer(tiny_hooked, tokens):
    single, fixed = route_sae(layers=(4,)), route_sae("fixed", fixed_layer=4)
    fixed.load_state_dict({k: v for k, v in single.state_dict().items() if k != "W_router"})
    results = evaluate_all({"single": single, "fixed": fixed}, tiny_hooked, tokens, progress=False)
    assert results["fixed"].kl == pytest.approx(results["single"].kl, rel=1e-5)
    assert results["fixed"].norm_mse == pytest.approx(results["single"].norm_mse, rel=1e-5)
    assert results["fixed"].layer_share == {1: 0.0, 2: 0.0, 4: 1.0}


def test_special_tokens_and_position_zero_stay_out(tiny_proxy, tokens):
    tokens[1, 5] = tiny_proxy.tokenizer.eos_token_id
    keep = kept_tokens(tokens, tiny_proxy)
    assert not keep[:, 0].any() and not keep[1, 5]
    assert keep.sum() == 5 * 11 - 1
    assert evaluate(route_sae(), tiny_proxy, tokens, progress=False).tokens == keep.sum()
    # the splice leaves them alone
    _, cache = tiny_proxy.run_with_cache(tokens)
    stack = torch.cat([cache[f"model.layers.{i}"] for i in (1, 2, 4)], -1)
    route, x = route_sae().route(stack), torch.randn(5, 12, D_MODEL)
    for _, hook in splice_hooks(route_sae(), tiny_proxy, route, keep):
        out = hook(x)
        assert torch.equal(out[~keep], x[~keep])


def test_training_form_is_evaluated_as_its_inference_form(tiny_hooked, tokens):
    cfg = RouteBatchTopKTrainingSAEConfig(d_in=3 * D_MODEL, d_sae=64, k=8.0, layers=[1, 2, 4])
    sae = RouteBatchTopKTrainingSAE(cfg)
    sae.topk_threshold.fill_(0.5)
    results = evaluate_all(
        {"training": sae, "inference": inference_form(sae)}, tiny_hooked, tokens, progress=False
    )
    assert results["training"].to_dict() == results["inference"].to_dict()
    evaluator = SpliceEvaluator(tiny_hooked, tokens)
    single = evaluator(sae, iter(()), ActivationScaler())
    assert single["eval/kl"] == pytest.approx(results["training"].kl)
    assert single["eval/layer_share/2"] == pytest.approx(results["training"].layer_share[2])
    several = evaluator(
        saes={"a": sae},
        data_provider=iter(()),
        activation_scalers={"a": ActivationScaler()},
        hook_names={"a": "x"},
    )
    assert several["a/eval/kl"] == single["eval/kl"]


def test_held_out_tokens(tiny_proxy):
    tokens = held_out_tokens(tiny_proxy, ["The river was quiet. " * 5] * 4, n_sequences=3, context_size=16)
    assert tokens.shape == (3, 16)
    assert (tokens[:, 0] == tiny_proxy.tokenizer.bos_token_id).all()
    with pytest.raises(ValueError, match="gives 0 sequences of 16 tokens, 3 are asked for"):
        held_out_tokens(tiny_proxy, ["short"], n_sequences=3, context_size=16)


def test_bad_input(tiny_hooked, tokens):
    sae = route_sae()
    with pytest.raises(ValueError, match="no SAEs"):
        evaluate_all({}, tiny_hooked, tokens)
    with pytest.raises(ValueError, match="expected a RouteSAE, a Crosscoder or a SAELens SAE, got str"):
        subject_of("sae", tiny_hooked)
    for bad in (tokens.float(), tokens[0], tokens[:0], tokens[:, :1]):
        with pytest.raises(ValueError, match="expected token ids of shape"):
            check_tokens(bad, tiny_hooked)
    with pytest.raises(ValueError, match=r"between 0 and 63, got .* to 64"):
        evaluate(sae, tiny_hooked, tokens.clone().fill_(64))
    with pytest.raises(ValueError, match="exceed the model's context of 32"):
        evaluate(sae, tiny_hooked, tokens.repeat(1, 4))
    with pytest.raises(ValueError, match="nothing to read"):
        evaluate(sae, tiny_hooked, tokens, exclude_special_tokens=list(range(64)))
    with pytest.raises(ValueError, match=r"no hook .blocks\.9\.hook_z."):
        evaluate(plain_sae("blocks.9.hook_z"), tiny_hooked, tokens)
    with pytest.raises(ValueError, match=r"layers must be between 0 and 5, got \[9\]"):
        evaluate(plain_sae("blocks.9.hook_resid_post"), tiny_hooked, tokens)
    with pytest.raises(ValueError, match=r"the model has d_model = 32"):
        evaluate(
            RouteTopKSAE(RouteTopKSAEConfig(d_in=48, d_sae=64, k=8, layers=[1, 2, 4])), tiny_hooked, tokens
        )
    with pytest.raises(ValueError, match=r"layers must be between 0 and 5, got \[1, 2, 9\]"):
        evaluate(route_sae(layers=(1, 2, 9)), tiny_hooked, tokens)
    with pytest.raises(TypeError, match="unsupported model"):
        evaluate(sae, torch.nn.Linear(2, 2), tokens)
    with torch.no_grad():
        tiny_hooked.blocks[5].mlp.W_in.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        evaluate(sae, tiny_hooked, tokens, progress=False)


def test_saes_come_by_name(tiny_hooked, tokens, unchecked):
    for saes in (route_sae(), [route_sae()]):
        with pytest.raises(ValueError, match=f"expected SAEs by name.*got {type(saes).__name__}"):
            evaluate_all(saes, tiny_hooked, tokens)


def test_without_zero_ablation_there_is_no_loss_recovered(tiny_hooked, tokens):
    short = evaluate(route_sae(), tiny_hooked, tokens, zero_ablation=False, progress=False)
    whole = evaluate(route_sae(), tiny_hooked, tokens, progress=False)
    assert short.ce_zero is None and short.loss_recovered is None
    assert (short.kl, short.ce_spliced) == (whole.kl, whole.ce_spliced)
    assert whole.loss_recovered == pytest.approx(1 - whole.delta_ce / (whole.ce_zero - whole.ce_clean))


def test_explained_variance_in_the_models_units_is_saelens_own(tiny_hooked, tokens):
    sae = plain_sae()
    with torch.no_grad():  # a mean that all tokens share, where centred and not are far apart
        tiny_hooked.blocks[4].mlp.b_out.add_(torch.linspace(-2, 5, D_MODEL))
    result = evaluate(sae, tiny_hooked, tokens, exclude_special_tokens=False, batch_size=2, progress=False)
    _, cache = tiny_hooked.run_with_cache(tokens)
    x = cache["blocks.4.hook_resid_post"][:, 1:].flatten(0, 1)
    theirs = ExplainedVarianceCalculator()
    theirs.add_batch(sae(x), x)
    assert result.explained_variance_raw == pytest.approx(theirs.compute(), rel=1e-4)
    x, error = x.double(), (x - sae(x)).double().pow(2).sum()
    centered = 1 - error / (x - x.mean(0)).pow(2).sum()
    uncentered = 1 - error / x.pow(2).sum()  # Llama Scope, Eq. 6
    assert result.explained_variance_raw == pytest.approx(centered.item(), rel=1e-4)
    assert result.explained_variance_raw_uncentered == pytest.approx(uncentered.item(), rel=1e-4)
    assert result.mse == pytest.approx(error.item() / len(x), rel=1e-5)
    assert uncentered > centered + 0.1
    assert result.explained_variance_raw != pytest.approx(result.explained_variance, rel=1e-2)
    # Standardised tokens are all of one length, so that the mean of ratios is the ratio of means.
    assert result.explained_variance_uncentered == pytest.approx(1 - result.norm_mse, rel=1e-5)


@pytest.mark.parametrize("standardize", [True, False])
def test_explained_variances_of_a_route_sae(tiny_hooked, tokens, standardize):
    sae = route_sae(standardize=standardize)
    result = evaluate(sae, tiny_hooked, tokens, exclude_special_tokens=False, batch_size=2, progress=False)
    _, cache = tiny_hooked.run_with_cache(tokens)
    stack = torch.stack([cache[f"blocks.{i}.hook_resid_post"][:, 1:] for i in (1, 2, 4)], -2)
    route = sae.route(stack.flatten(-2))
    z_hat = (sae.decode(sae.encode_routed(route.input)) / route.scale[..., None]).flatten(0, 1).double()
    layer = route.layer.flatten()
    x = stack.flatten(0, 1)[torch.arange(len(layer)), layer].double()
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True) + 1e-6
    if standardize:
        z, x_hat = (x - mean) / std, z_hat * std + mean
    else:
        z, x_hat, z_hat = (x - mean) / std, z_hat, (z_hat - mean) / std
    assert len(layer.unique()) > 1

    def explained(a, b):
        rest = sum((a[layer == i] - a[layer == i].mean(0)).pow(2).sum() for i in layer.unique())
        return 1 - (a - b).pow(2).sum() / rest, 1 - (a - b).pow(2).sum() / a.pow(2).sum()

    expected = [value.item() for value in (*explained(z, z_hat), *explained(x, x_hat))]
    assert [
        result.explained_variance,
        result.explained_variance_uncentered,
        result.explained_variance_raw,
        result.explained_variance_raw_uncentered,
    ] == pytest.approx(expected, rel=1e-4)
    assert result.mse == pytest.approx((x - x_hat).pow(2).sum(-1).mean().item(), rel=1e-4)


def test_a_mixture_of_layers_is_no_activation_of_the_model(tiny_hooked, tokens):
    result = evaluate(route_sae("soft"), tiny_hooked, tokens, progress=False)
    assert result.explained_variance_raw is result.explained_variance_raw_uncentered is result.mse is None
    assert result.explained_variance_uncentered < 1


def test_sums_lose_nothing_beside_a_large_mean():
    """Worked by hand: two layers whose deviations are about 1e-4 of their means, in two batches."""
    sums = LayerSums(2)
    z = torch.tensor([[1e4, 0.0], [1e4 + 2, 0.0], [5.0, 1e4 - 3], [5.0, 1e4 + 3]])
    layer, error = torch.tensor([0, 0, 1, 1]), torch.tensor([0.5, 0.5, 1.0, 2.0])
    for rows in (slice(0, 3), slice(3, 4)):
        sums.add(z[rows], error[rows], layer[rows])
    assert sums.count.tolist() == [2, 2]
    assert sums.variance.tolist() == pytest.approx([2, 18], abs=1e-6)
    assert sums.explained(sums.variance, every_layer=False) == pytest.approx(1 - 4 / 20, abs=1e-6)
    assert sums.explained(sums.variance, every_layer=True) == pytest.approx(
        ((1 - 1 / 2) + (1 - 3 / 18)) / 2, abs=1e-6
    )


def test_spread_of_the_loss_over_sequences(tiny_hooked, tokens):
    sae = plain_sae()
    result = evaluate(sae, tiny_hooked, tokens, exclude_special_tokens=False, progress=False)
    assert result.predicted == 5 * 10
    alone = [
        evaluate(sae, tiny_hooked, row[None], exclude_special_tokens=False, progress=False).delta_ce
        for row in tokens
    ]
    alone = torch.tensor(alone, dtype=torch.float64)
    assert result.delta_ce == pytest.approx(alone.mean().item(), rel=1e-4)
    assert result.delta_ce_stderr == pytest.approx((alone.std() / 5**0.5).item(), rel=1e-4)
    # every other token special: nothing that counts predicts anything that counts
    tokens = torch.tensor([[3, 4, 5, 6, 5, 7, 5, 8]])
    result = evaluate(sae, tiny_hooked, tokens, exclude_special_tokens=[5], progress=False)
    assert result.predicted == 0 and math.isnan(result.ce_clean) and result.kl > 0


def test_one_row_of_a_table(tiny_hooked, tokens):
    result = evaluate(route_sae(), tiny_hooked, tokens, progress=False)
    row = result.row()
    assert row["kl"] == result.kl and row["explained_variance_raw"] == result.explained_variance_raw
    assert set(result.to_dict()) - set(row) == {
        "layer_share",
        "norm_mse_per_layer",
        "explained_variance_per_layer",
    }
