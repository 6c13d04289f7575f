"""TopK to JumpReLU: the threshold search against a full sort, and conversions against TopK itself."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    JumpReLUSAE,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata
from spliced import make_sae
from spliced_crosscoders import make_crosscoder

from routesae_lens.analysis.evaluate import evaluate
from routesae_lens.analysis.jumprelu import Conversion, compare_conversion, to_jumprelu
from routesae_lens.saes.architectures import RouteJumpReLUSAE
from routesae_lens.saes.crosscoder import CrosscoderJumpReLUSAE
from routesae_lens.saes.forms import inference_form, with_routing
from routesae_lens.saes.k_annealing import AnnealedTopKTrainingSAE, AnnealedTopKTrainingSAEConfig
from routesae_lens.saes.threshold import ThresholdCounts, check_calibration, find_threshold

D_MODEL, D_SAE, K = 32, 48, 6
HOOK = "blocks.3.hook_resid_post"
TOKENS = torch.randint(3, 64, (12, 16), generator=torch.Generator().manual_seed(0))
CALIBRATION = TOKENS[:8]  # 8 x 15 tokens count: enough for 6 latents to sqrt(6 / 120) = 0.224
QUIET: dict[str, Any] = {"progress": False, "tolerance": 0.25}


@torch.no_grad()
def plain(rescale: bool = False, sae_class: Any = TopKSAE, config: Any = TopKSAEConfig, **fields: Any) -> Any:
    """A SAELens SAE with random weights and decoder rows of norms from 0.5 to 4."""
    if config is not StandardSAEConfig:
        fields = {"k": K, "rescale_acts_by_decoder_norm": rescale} | fields
    metadata = SAEMetadata(hook_name=HOOK, model_name="tiny", context_size=16)
    sae = sae_class(config(d_in=D_MODEL, d_sae=D_SAE, metadata=metadata, **fields))
    generator = torch.Generator().manual_seed(1)
    for parameter in sae.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    sae.W_dec.copy_(sae.W_dec / sae.W_dec.norm(dim=-1, keepdim=True) * torch.linspace(0.5, 4, D_SAE)[:, None])
    return sae.eval()


def pre_of(sae: Any, x: torch.Tensor) -> torch.Tensor:
    return (x - sae.b_dec * sae.cfg.apply_b_dec_to_input) @ sae.W_enc + sae.b_enc


def every_kind() -> dict[str, Any]:
    return {
        "plain": plain(),
        "plain, by norm": plain(rescale=True),
        "layer_norm": plain(rescale=True, normalize_activations="layer_norm"),
        "route": make_sae(),
        "route, by norm": make_sae(rescale_acts_by_decoder_norm=True, layer_scale=True),
        "route, soft": make_sae(routing="soft", aggregator="attention"),
        "route, random": make_sae(routing="random"),
        "route, fixed": make_sae(routing="fixed", standardize=False),
        "crosscoder": make_crosscoder(),
        "crosscoder, by norm": make_crosscoder(rescale_acts_by_decoder_norm=True, standardize=False),
    }


# --- The threshold search ------------------------------------------------------------------------------


def stream(*batches: torch.Tensor) -> Any:
    return lambda: iter(batches)


def test_threshold_of_a_hand_worked_example():
    pre = torch.tensor([[5.0, 1.0, -2.0, 0.5], [4.0, 3.0, 2.0, -9.0]])
    # 4 of the 6 positive ones must pass: 5, 4, 3, 2
    found = find_threshold(stream(pre), 2, tolerance=0.01)
    assert 1 <= found.value < 2
    assert (found.l0, found.tokens, found.passes) == (2.0, 2, 1)
    # 3 of them, and nothing between 2 and 3 is nearer to one than to the other
    assert find_threshold(stream(pre), 1.5, tolerance=0.01).value == pytest.approx(2.5, rel=0.05)
    assert find_threshold(stream(pre), 3, tolerance=0.01).value < 0.5


def test_a_value_on_the_threshold_does_not_pass():
    # JumpReLU lets pre > threshold through, and 2 is an edge of the bins.
    counts = ThresholdCounts()
    counts.add(torch.tensor([[2.0, 2.0, 3.0]]))
    found = counts.threshold(1)
    assert 2 <= found.value < 3 and found.l0 == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("k", [0.5, 4, 17.3, 60])
def test_threshold_is_the_quantile_of_a_full_sort(dtype, k):
    generator = torch.Generator().manual_seed(3)
    spread = 10 ** torch.linspace(-3, 3, 150)  # latents of very different sizes
    pre = (torch.randn(400, 150, generator=generator, dtype=torch.float64) * spread).to(dtype)
    found = find_threshold(stream(*pre.split(90)), k, tolerance=0.5)
    assert (pre.double() > found.value).sum().item() / 400 == found.l0
    ordered = pre.flatten().sort(descending=True).values.double()
    at = round(k * 400)
    width = 2**-6 if dtype == torch.bfloat16 else 2**-13
    assert ordered[at] * (1 - width) <= found.value <= ordered[at - 1] * (1 + width)
    if dtype != torch.bfloat16:
        assert found.l0 == pytest.approx(k, abs=0.01)


def test_one_batch_or_many():
    pre = torch.randn(300, 40, generator=torch.Generator().manual_seed(4))
    one, many = ThresholdCounts(), ThresholdCounts()
    one.add(pre)
    for batch in pre.split(7):
        many.add(batch)
    assert one.threshold(5) == many.threshold(5)
    assert one.positive == many.positive == int((pre > 0).sum())


def test_memory_does_not_grow_with_the_stream():
    counts = ThresholdCounts()
    before = counts._counts.nbytes
    for seed in range(20):
        counts.add(torch.randn(50, 40, generator=torch.Generator().manual_seed(seed)))
    assert counts._counts.nbytes == before <= 2**24
    assert counts.tokens == 1000


def test_a_bin_that_holds_too_much_is_counted_again():
    # All within one bin of the first pass: 1 + i * 2^-23 for i = 1 ... 1000, shuffled.
    values = 1 + torch.arange(1, 1001, dtype=torch.float64) * 2**-23
    pre = values[torch.randperm(1000, generator=torch.Generator().manual_seed(5))].reshape(100, 10).float()
    pre[::2] *= 1 + 1e-9  # (unchanged in float32)
    found = find_threshold(stream(*pre.split(30)), 3, tolerance=0.001)
    assert found.passes == 2 and found.l0 == 3
    assert found.value == 1 + 700 * 2**-23  # 300 values are above it
    assert find_threshold(stream(pre, pre * 8), 5 + 1.5, tolerance=0.001).l0 == 6.5  # half of them far above


def test_equal_values_that_no_threshold_parts():
    pre = torch.ones(10, 4)
    with pytest.raises(ValueError, match="closest gives 4, because many pre-activations equal"):
        find_threshold(stream(pre), 3, tolerance=0.5)
    assert find_threshold(stream(pre), 3, tolerance=1).l0 == 4


def test_too_few_positive_and_not_finite():
    pre = torch.tensor([[1.0, 2.0, -1.0], [3.0, -1.0, -1.0]])
    with pytest.raises(ValueError, match=r"only 1\.5 per token are positive"):
        find_threshold(stream(pre), 2, tolerance=0.1)
    assert find_threshold(stream(pre), 2, tolerance=0.5).value == 0
    for bad in (float("nan"), float("inf"), float("-inf")):
        with pytest.raises(ValueError, match="NaN or infinite"):
            ThresholdCounts().add(torch.tensor([[1.0, bad]]))
    with pytest.raises(ValueError, match="no pre-activations"):
        ThresholdCounts().threshold(1)


def test_what_a_tolerance_needs():
    check_calibration(4, 0.1, d_sae=10, tokens=400)
    with pytest.raises(ValueError, match=r"399 tokens count.*needs 400.*tolerance of 0\.1"):
        check_calibration(4, 0.1, d_sae=10, tokens=399)
    with pytest.raises(ValueError, match="k = 11 latents"):
        check_calibration(11, 1.0, d_sae=10, tokens=400)
    for k, tolerance, wrong in ((0, 1, "k"), (True, 1, "k"), (float("nan"), 1, "k"), (3, 0, "tolerance")):
        with pytest.raises(ValueError, match=f"{wrong} must be a positive number"):
            check_calibration(k, tolerance, d_sae=10, tokens=400)


def test_the_rule_is_the_standard_error_of_independent_latents():
    # 200 latents that fire with probability 0.02 each: k = 4, and L0 on 400 tokens is off by about 0.1.
    generator = torch.Generator().manual_seed(6)
    l0 = (torch.rand(300, 400, 200, generator=generator) < 0.02).sum(-1).double().mean(-1)
    assert l0.std().item() == pytest.approx(0.1, rel=0.1)


# --- Conversion -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", every_kind())
def test_k_latents_on_average_whatever_the_sae(kind, tiny_hooked):
    sae = every_kind()[kind]
    before = copy.deepcopy(sae.state_dict())
    conversion = to_jumprelu(sae, tiny_hooked, CALIBRATION, **QUIET)
    assert conversion.tokens == 120 and conversion.k == K
    assert conversion.l0 == pytest.approx(K, abs=1 / 120)
    # by the package's evaluation, which knows nothing of the search
    result = evaluate(conversion.sae, tiny_hooked, CALIBRATION, progress=False, zero_ablation=False)
    assert result.l0 == pytest.approx(conversion.l0, abs=1e-9)
    norms = conversion.sae.W_dec.norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones(D_SAE))
    # what was handed in is as it was
    assert all(torch.equal(before[name], tensor) for name, tensor in sae.state_dict().items())
    assert conversion.topk is sae and sae.cfg.metadata.converted is None


@pytest.mark.parametrize("backend", ["tiny_hooked", "tiny_bridge", "tiny_proxy"])
def test_every_backend(backend, request):
    model = request.getfixturevalue(backend)
    conversion = to_jumprelu(make_sae(), model, CALIBRATION, exclude_special_tokens=False, **QUIET)
    result = evaluate(conversion.sae, model, CALIBRATION, exclude_special_tokens=False, progress=False)
    assert result.l0 == pytest.approx(K, abs=1 / 120)


@pytest.mark.parametrize("kind", ["plain", "route", "crosscoder"])
def test_what_becomes_of_each_kind(kind, tiny_hooked):
    sae = every_kind()[kind]
    form = to_jumprelu(sae, tiny_hooked, CALIBRATION, **QUIET).sae
    expected = {"plain": JumpReLUSAE, "route": RouteJumpReLUSAE, "crosscoder": CrosscoderJumpReLUSAE}[kind]
    assert type(form) is expected and not form.training
    carried = set(form.cfg.to_dict()) - {"architecture", "metadata"}
    assert all(getattr(form.cfg, name) == getattr(sae.cfg, name) for name in carried)
    theirs, ours = sae.cfg.metadata.to_dict(), form.cfg.metadata.to_dict()
    assert ours.pop("converted")["from"] == sae.cfg.architecture()
    assert ours == theirs
    if kind == "route":
        assert torch.equal(form.W_router, sae.W_router) and form.W_router is not sae.W_router


@pytest.mark.parametrize("rescale", [False, True])
def test_folding_is_an_identity(rescale, tiny_hooked):
    """With thresholds between a token's k-th and (k+1)-th latent the JumpReLU SAE is the TopK SAE, in float64."""
    sae = plain(rescale).to(torch.float64)
    x = torch.randn(50, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    pre = pre_of(sae, x)
    ranked = pre * sae.W_dec.norm(dim=-1) if rescale else pre
    top = ranked.topk(K + 1, dim=-1).values
    form = to_jumprelu(sae, tiny_hooked.double(), CALIBRATION, **QUIET).sae
    assert form.dtype == torch.float64
    norms, theta = sae.W_dec.norm(dim=-1), (top[:, -2:].mean(-1))
    for token in range(len(x)):
        form.threshold.data.fill_(theta[token])
        form.threshold.data *= 1 if rescale else norms
        acts, expected = form.encode(x[token]), sae.encode(x[token])
        in_norms = expected if rescale else expected * norms
        torch.testing.assert_close(acts, in_norms, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(form.decode(acts), sae.decode(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rescale", [False, True])
def test_the_threshold_acts_on_what_topk_ranks(rescale, tiny_hooked):
    sae = plain(rescale)
    conversion = to_jumprelu(sae, tiny_hooked, CALIBRATION, **QUIET)
    x = torch.randn(50, D_MODEL, generator=torch.Generator().manual_seed(8)) * 2
    norms = sae.W_dec.norm(dim=-1)
    pre = pre_of(sae, x)
    ranked = pre * norms if rescale else pre
    assert torch.equal(conversion.sae.encode(x) > 0, ranked > conversion.threshold)
    assert conversion.unit == ("folded" if rescale else "raw")
    expected = torch.full((D_SAE,), conversion.threshold)
    torch.testing.assert_close(conversion.sae.threshold.data, expected if rescale else expected * norms)


def test_threshold_of_a_sort_over_the_models_activations(tiny_hooked):
    sae = plain(rescale=True)
    _, cache = tiny_hooked.run_with_cache(CALIBRATION)
    pre = pre_of(sae, cache[HOOK][:, 1:].flatten(0, 1)) * sae.W_dec.norm(dim=-1)
    ordered = pre.flatten().sort(descending=True).values
    conversion = to_jumprelu(sae, tiny_hooked, CALIBRATION, **QUIET)
    assert ordered[120 * K].item() <= conversion.threshold < ordered[120 * K - 1].item()
    several = to_jumprelu(sae, tiny_hooked, CALIBRATION, batch_size=3, **QUIET)
    assert several.threshold == pytest.approx(conversion.threshold, rel=1e-6)


def test_special_tokens_do_not_count(tiny_hooked):
    sae = plain()
    special = sorted(set(CALIBRATION[:, 3].tolist()))
    counted = ~torch.isin(CALIBRATION, torch.tensor(special))
    counted[:, 0] = False
    options = QUIET | {"tolerance": 0.5}
    conversion = to_jumprelu(sae, tiny_hooked, CALIBRATION, exclude_special_tokens=special, **options)
    assert conversion.tokens == int(counted.sum()) < 120
    _, cache = tiny_hooked.run_with_cache(CALIBRATION)
    pre = pre_of(sae, cache[HOOK][counted])
    assert (pre > conversion.threshold).sum().item() / conversion.tokens == pytest.approx(conversion.l0)


def test_a_routesae_is_calibrated_on_its_scaled_input(tiny_hooked):
    sae = make_sae()  # hard routing: times p
    conversion = to_jumprelu(sae, tiny_hooked, CALIBRATION, **QUIET)
    point = sae.mount(tiny_hooked)
    _, cache = tiny_hooked.run_with_cache(CALIBRATION, names_filter=point)
    route = sae.route(cache[point])
    assert route.scale.max() < 1  # and so it matters
    pre = pre_of(sae, route.input[:, 1:].flatten(0, 1))
    assert (pre > conversion.threshold).sum().item() / 120 == pytest.approx(conversion.l0)


def test_another_k_and_narrow_weights(tiny_hooked):
    sae = plain(rescale=True).to(torch.bfloat16)
    conversion = to_jumprelu(sae, tiny_hooked, CALIBRATION, k=3.5, **QUIET)
    assert conversion.l0 == pytest.approx(3.5, abs=1 / 120)
    assert conversion.sae.dtype == torch.float32 and conversion.sae.cfg.dtype == "float32"
    assert sae.dtype == torch.bfloat16
    result = evaluate(conversion.sae, tiny_hooked, CALIBRATION, progress=False, zero_ablation=False)
    assert result.l0 == pytest.approx(3.5, abs=1 / 120)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize(
    "kind",
    [(TopKTrainingSAE, TopKTrainingSAEConfig), (AnnealedTopKTrainingSAE, AnnealedTopKTrainingSAEConfig)],
)
def test_a_training_sae_is_converted_in_its_inference_form(kind, rescale, tiny_hooked):
    training = plain(rescale, *kind)
    conversion = to_jumprelu(training, tiny_hooked, CALIBRATION, **QUIET)
    assert type(conversion.topk) is TopKSAE and type(conversion.sae) is JumpReLUSAE
    direct = to_jumprelu(inference_form(training), tiny_hooked, CALIBRATION, **QUIET)
    assert conversion.threshold == direct.threshold
    assert conversion.sae.cfg.metadata.training_architecture == kind[1].architecture()


def test_the_input_scale_is_folded(tiny_hooked):
    sae = plain(rescale=True, normalize_activations="expected_average_only_in")
    with pytest.raises(ValueError, match="needs the factor of the run"):
        to_jumprelu(sae, tiny_hooked, CALIBRATION, **QUIET)
    with pytest.raises(ValueError, match=r"scaling_factor=2\.0 do not go together"):
        to_jumprelu(plain(), tiny_hooked, CALIBRATION, scaling_factor=2.0, **QUIET)
    conversion = to_jumprelu(sae, tiny_hooked, CALIBRATION, scaling_factor=2.0, **QUIET)
    x = torch.randn(20, D_MODEL, generator=torch.Generator().manual_seed(9))
    # Scaled inputs in, and what is reconstructed scaled back: the same k, here and in the copy kept of it
    expected = sae(2 * x) / 2
    torch.testing.assert_close(conversion.topk(x), expected)
    conversion.sae.threshold.data.zero_()  # without TopK and threshold both are the same linear maps
    relu = pre_of(sae, 2 * x).relu() @ sae.W_dec + sae.b_dec
    torch.testing.assert_close(conversion.sae(x), relu / 2)
    assert sae.cfg.normalize_activations == "expected_average_only_in"
    stack = make_sae(normalize_activations="expected_average_only_in")  # standardises
    assert to_jumprelu(stack, tiny_hooked, CALIBRATION, **QUIET).sae.cfg.normalize_activations == "none"


@pytest.mark.parametrize("kind", every_kind())
def test_saved_and_loaded(kind, tiny_hooked, tmp_path):
    conversion = to_jumprelu(every_kind()[kind], tiny_hooked, CALIBRATION, **QUIET)
    conversion.sae.save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path, device="cpu")
    assert type(loaded) is type(conversion.sae)
    x = torch.randn(2, 5, loaded.cfg.d_in, generator=torch.Generator().manual_seed(10))
    assert torch.equal(loaded(x), conversion.sae(x))
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["metadata"]["converted"] == conversion.to_dict()
    assert config["metadata"]["hook_name"] == conversion.topk.cfg.metadata.hook_name


def test_routed_form_splices(model):
    conversion = to_jumprelu(make_sae(), model, CALIBRATION, exclude_special_tokens=False, **QUIET)
    logits, _ = model.run_with_cache_with_saes(TOKENS, saes=[conversion.sae], exclude_special_tokens=False)
    assert torch.isfinite(logits).all()
    assert with_routing(conversion.sae, "random").cfg.routing == "random"
    clean = model(TOKENS)
    assert not torch.allclose(logits, clean)


def test_before_and_after_on_one_pass(tiny_hooked):
    sae = make_sae()
    conversion = to_jumprelu(sae, tiny_hooked, CALIBRATION, **QUIET)
    held_out = TOKENS[8:]
    result = compare_conversion(conversion, tiny_hooked, held_out, progress=False)
    for found, one in ((result.before, sae), (result.after, conversion.sae)):
        alone = evaluate(one, tiny_hooked, held_out, progress=False)
        assert (found.l0, found.norm_mse, found.kl) == (alone.l0, alone.norm_mse, alone.kl)
    assert result.before.l0 <= K
    assert json.loads(json.dumps(result.to_dict()))["after"]["l0"] == result.after.l0
    assert json.loads(json.dumps(conversion.to_dict()))["threshold"] == conversion.threshold
    lines = str(result).splitlines()
    assert lines[0].split() == ["L0", "NormMSE", "KL", "delta", "CE"]
    assert lines[2].split() == ["JumpReLU"] + [
        f"{number:.4f}"
        for number in (result.after.l0, result.after.norm_mse, result.after.kl, result.after.delta_ce)
    ]
    assert "route_topk with k = 6 became route_jumprelu" in str(conversion)
    assert isinstance(conversion, Conversion)


# --- Bad input: refused before the model runs ---------------------------------------------------------------


class Idle:
    """A model that must not run."""

    def __init__(self, model: Any):
        self.model = model

    def __enter__(self) -> Any:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise AssertionError("the model ran")

        self.model.run_with_cache = refuse
        return self.model

    def __exit__(self, *error: Any) -> None:
        del self.model.run_with_cache


@pytest.mark.parametrize(
    ("sae", "options", "message"),
    [
        (plain, {"k": 49}, r"k = 49 latents per token cannot be active in an SAE with d_sae = 48"),
        (plain, {"k": 0}, "k must be a positive number"),
        (plain, {"tolerance": 0.2}, "too short.*120 tokens count.*needs 150"),
        (plain, {"tolerance": -1}, "tolerance must be a positive number"),
        (lambda: plain(sae_class=StandardSAE, config=StandardSAEConfig), {}, "StandardSAE.*is no TopK SAE"),
        (lambda: make_sae(architecture="jumprelu"), {}, "RouteJumpReLUSAE has thresholds already"),
        (lambda: make_sae(relu=False), {}, "relu=False"),
        (lambda: make_crosscoder(relu=False), {}, "relu=False"),
        (lambda: with_routing(make_sae(), "oracle"), {}, "routing='oracle' gives no input to calibrate on"),
        (lambda: make_sae(routing="every"), {}, "routing='every'"),
        (lambda: make_sae(layers=(1, 9)), {}, "layers"),
    ],
)
def test_bad_input(sae, options, message, tiny_hooked):
    with Idle(tiny_hooked) as model, pytest.raises(ValueError, match=message):
        to_jumprelu(sae(), model, CALIBRATION, **QUIET | options)


def test_bad_types(tiny_hooked, unchecked):
    with Idle(tiny_hooked) as model:
        with pytest.raises(ValueError, match="expected a TopK SAE, got Linear"):
            to_jumprelu(torch.nn.Linear(2, 2), model, CALIBRATION, **QUIET)
        with pytest.raises(ValueError, match="expected token ids"):
            to_jumprelu(plain(), model, CALIBRATION[0], **QUIET)
        with pytest.raises(ValueError, match="k must be a positive number of latents per token, got '6'"):
            to_jumprelu(plain(), model, CALIBRATION, k="6", **QUIET)


@pytest.mark.parametrize("factor", [0, -1.0, float("nan"), True, "2"])
def test_an_input_scale_that_cannot_be(factor, tiny_hooked, unchecked):
    sae = plain(normalize_activations="expected_average_only_in")
    with (
        Idle(tiny_hooked) as model,
        pytest.raises(ValueError, match="scaling_factor must be a positive number"),
    ):
        to_jumprelu(sae, model, CALIBRATION, scaling_factor=factor, **QUIET)


def test_a_comparison_takes_the_conversion(tiny_hooked, unchecked):
    with pytest.raises(ValueError, match="expected the Conversion that to_jumprelu gives, got TopKSAE"):
        compare_conversion(plain(), tiny_hooked, CALIBRATION)


def test_more_than_are_ever_positive(tiny_hooked):
    sae = plain()
    sae.b_enc.data.fill_(-100)
    sae.b_enc.data[:3] = 100
    with pytest.raises(ValueError, match="only 3 per token are positive on average"):
        to_jumprelu(sae, tiny_hooked, CALIBRATION, **QUIET)
