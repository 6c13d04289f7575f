"""Transcoders: their step, their scales, and what is saved of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.transcoder import JumpReLUSkipTranscoder, JumpReLUTranscoder, SkipTranscoder, Transcoder

from routesae_lens.saes.fast_topk import is_fast
from routesae_lens.saes.forms import inference_form
from routesae_lens.saes.topk_function import topk_autoencode, topk_autoencode_dense
from routesae_lens.saes.transcoder import (
    StandardTranscoderTrainingSAE,
    StandardTranscoderTrainingSAEConfig,
    TopKTranscoderTrainingSAE,
    TopKTranscoderTrainingSAEConfig,
    calibrate,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:To copy construct", "ignore:the data holds", "ignore:end of the data"),
]
LAYER, READ, OUT, WIDTH, K = 2, 6, 4, 12, 3
CONTEXT, BATCH = 16, 32


def made(kind: str = "topk", **options: Any) -> Any:
    """A float64 transcoder from 6 to 4 numbers with weights that are far from their start."""
    sizes: dict[str, Any] = {
        "d_in": READ + OUT,
        "d_out": OUT,
        "d_sae": WIDTH,
        "layer": LAYER,
        "dtype": "float64",
    }
    torch.manual_seed(0)
    sae: Any
    if kind == "topk":
        sae = TopKTranscoderTrainingSAE(TopKTranscoderTrainingSAEConfig(**{**sizes, "k": K, **options}))
    else:
        sae = StandardTranscoderTrainingSAE(StandardTranscoderTrainingSAEConfig(**sizes, **options))
    with torch.no_grad():
        for weights in sae.parameters():
            weights += torch.randn_like(weights)
    return sae


def data(n: int = 50) -> torch.Tensor:
    scale = torch.cat([torch.full((READ,), 5.0), torch.full((OUT,), 0.1)])
    return torch.randn(n, READ + OUT, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * scale


def step_on(sae: Any, x: torch.Tensor, step: int = 0, dead: Any = None) -> Any:
    coefficients = {"l1": 0.7}
    return sae.training_forward_pass(TrainStepInput(x, coefficients, dead, step, False))


def naive(sae: Any, x: torch.Tensor, k: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, scaled prediction and scaled target, as the paper writes them (Eq. 5, 3.3.3)."""
    read, target = x[:, :READ], x[:, READ:]
    s_in, s_out = sae.scales
    pre = (read * s_in) @ sae.W_enc + sae.b_enc
    if k is not None:
        order = pre.relu() * sae.W_dec.norm(dim=1)
        pre = pre * torch.zeros_like(pre).scatter(1, order.topk(k).indices, 1.0)
    latents = pre.relu()
    out = latents @ sae.W_dec + sae.b_dec
    if sae.cfg.skip:
        out = out + (read * s_in) @ sae.W_skip.T
    return latents, out, target * s_out


# --- A step ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_a_topk_step_is_the_papers(skip, dense):
    sae, x = made(skip=skip), data()
    if dense:  # hooks see dense latents
        sae.hook_sae_acts_pre.add_hook(lambda acts, hook: None)
    assert is_fast(sae) is not dense
    output = step_on(sae, x)
    latents, out, target = naive(sae, x, K)
    torch.testing.assert_close(output.sae_out, out)
    torch.testing.assert_close(output.sae_in, target)
    acts = output.feature_acts.to_dense()
    torch.testing.assert_close(acts, latents * sae.W_dec.norm(dim=1))
    torch.testing.assert_close(output.loss, (out - target).pow(2).sum(-1).mean())
    assert set(output.losses) == {"mse_loss"}  # no auxiliary loss by default
    got = torch.autograd.grad(output.loss, list(sae.parameters()))
    expected = torch.autograd.grad((out - target).pow(2).sum(-1).mean(), list(sae.parameters()))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("skip", [False, True])
def test_a_relu_step_pays_for_its_latents(skip):
    sae, x = made("standard", skip=skip), data()
    output = step_on(sae, x)
    latents, out, target = naive(sae, x, None)
    l1 = 0.7 * (latents * sae.W_dec.norm(dim=1)).sum(-1).mean()
    torch.testing.assert_close(output.losses["l1_loss"], l1)
    torch.testing.assert_close(output.loss, (out - target).pow(2).sum(-1).mean() + l1)


@pytest.mark.parametrize("skip", [False, True])
def test_the_auxiliary_loss_is_the_same_fast_and_dense(skip):
    losses = []
    for dense in (False, True):
        sae = made(skip=skip, aux_loss_coefficient=0.3)
        if dense:
            sae.hook_sae_acts_pre.add_hook(lambda acts, hook: None)
        dead = torch.arange(WIDTH) % 3 == 0
        losses.append(step_on(sae, data(), dead=dead).losses["auxiliary_reconstruction_loss"])
    assert losses[0] > 0
    torch.testing.assert_close(*losses)


def test_the_sparse_function_takes_an_output_of_another_width():
    torch.manual_seed(0)
    shapes = ((50, READ), (READ, WIDTH), (WIDTH,), (WIDTH, OUT), (OUT,))
    dead, results = torch.tensor([1, 5, 7]), []
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    for function in (topk_autoencode, topk_autoencode_dense):
        own = [tensor.clone().requires_grad_() for tensor in tensors]
        code = function(*own, K, norm=tensors[3].norm(dim=-1), dead=dead, k_dead=2)
        loss = code.out.sin().sum() + code.dead_out.cos().sum()
        results.append([code.out, code.dead_out, *torch.autograd.grad(loss, own)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_k_is_annealed_from_the_width_of_the_output():
    sae = made(k_anneal_steps=4, k=2)
    x = data()
    for step, k in enumerate([4, 4, 3, 2, 2, 2]):  # 4 + (2 - 4) step / 4, halves to even numbers
        output = step_on(sae, x, step)
        assert output.metrics["k"] == k if step < 4 else sae.cfg.k == k
        torch.testing.assert_close(output.sae_out, naive(sae, x, k)[1])


# --- Initialisation and scales -----------------------------------------------------------------------------


def test_initialisation():
    cfg = TopKTranscoderTrainingSAEConfig(d_in=96, d_out=32, d_sae=256, layer=0, k=4, skip=True)
    torch.manual_seed(0)
    sae = TopKTranscoderTrainingSAE(cfg)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((256,), (2 * 32 / 256) ** 0.5))
    torch.testing.assert_close(sae.W_enc.norm(dim=0), torch.full((256,), (2 * 64 / 256) ** 0.5))
    assert not sae.b_enc.any() and not sae.b_dec.any() and not sae.W_skip.any()
    # The encoder is not the decoder's transpose (section 3.3.1), and not related to it.
    cosine = torch.nn.functional.cosine_similarity(sae.W_enc.T[:, :32], sae.W_dec, dim=1)
    assert cosine.abs().mean() < 0.25
    standard = StandardTranscoderTrainingSAE(
        StandardTranscoderTrainingSAEConfig(d_in=64, d_out=32, d_sae=8, layer=0)
    )
    torch.testing.assert_close(standard.W_dec.norm(dim=1), torch.full((8,), 0.1))


def test_each_site_has_its_scale_from_the_first_batches():
    sae, x = made(norm_batches=2), data(60)
    assert sae.scales.tolist() == [1, 1]
    batches = x.split(20)
    for step, batch in enumerate(batches):
        step_on(sae, batch, step)
    seen = x[:40]  # the third batch comes too late
    expected = torch.stack(
        [READ**0.5 / seen[:, :READ].norm(dim=1).mean(), OUT**0.5 / seen[:, READ:].norm(dim=1).mean()]
    )
    torch.testing.assert_close(sae.scales, expected)
    assert expected[1] > 10 * expected[0]
    sae.eval()
    step_on(sae, batches[2], 0)  # nor does an evaluation count
    torch.testing.assert_close(sae.scales, expected)
    plain = made(normalize=False)
    step_on(plain, x)
    assert plain.scales.tolist() == [1, 1]


# --- What is saved -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["topk", "standard"])
@pytest.mark.parametrize("skip", [False, True])
def test_the_saved_form_is_the_same_function_on_unscaled_values(kind, skip, tmp_path):
    """k = d_sae and threshold 0: TopK and JumpReLU are then both ReLU."""
    sae, x = made(kind, skip=skip, **({"k": WIDTH} if kind == "topk" else {})), data()
    step_on(sae, x)
    if kind == "topk":
        sae.topk_threshold.zero_()
    _, out, _ = naive(sae, x, None)
    expected = out / sae.scales[1]
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    classes = {
        ("topk", False): JumpReLUTranscoder,
        ("topk", True): JumpReLUSkipTranscoder,
        ("standard", False): Transcoder,
        ("standard", True): SkipTranscoder,
    }
    assert type(loaded) is classes[kind, skip]
    for form in (loaded, inference_form(sae)):
        torch.testing.assert_close(form(x[:, :READ]), expected)
        torch.testing.assert_close(form.W_dec.norm(dim=1), torch.ones(WIDTH, dtype=torch.float64))
        assert (form.cfg.d_in, form.cfg.d_out) == (READ, OUT)
    torch.testing.assert_close(sae(x), expected)
    for name, tensor in sae.state_dict().items():  # saving leaves the training form alone
        assert torch.equal(tensor, before[name]), name
    assert loaded.cfg.metadata.hook_name == "blocks.2.mlp.hook_in"
    assert loaded.cfg.metadata.hook_name_out == "blocks.2.hook_mlp_out"


def test_folding_is_the_papers():
    """Section 3.3.4, equation by equation."""
    sae, x = made(), data()
    step_on(sae, x)
    s_in, s_out = sae.scales
    W_dec, b_dec, b_enc = sae.W_dec / s_out * s_in, sae.b_dec / s_out, sae.b_enc / s_in
    norm = W_dec.norm(dim=1)
    form = inference_form(sae)
    torch.testing.assert_close(form.W_dec, W_dec / norm[:, None])
    torch.testing.assert_close(form.W_enc, sae.W_enc * norm)
    torch.testing.assert_close(form.b_enc, b_enc * norm)
    torch.testing.assert_close(form.b_dec, b_dec)


@pytest.mark.parametrize("rescale", [True, False])
def test_the_threshold_lets_k_through_on_average(rescale):
    sae, x = made(rescale_acts_by_decoder_norm=rescale), data(100)
    step_on(sae, x)
    form = inference_form(sae)
    active = (form.encode(x[:, :READ]) > 0).sum(1)
    assert active.sum() == 100 * K and len(active.unique()) > 2  # on average, not each
    chosen = naive(sae, x, WIDTH)[0] * (sae.W_dec.norm(dim=1) if rescale else 1)
    assert torch.equal(form.encode(x[:, :READ]) > 0, chosen > sae.topk_threshold)


def test_the_threshold_is_a_running_mean_of_the_batches():
    sae, x = made(topk_threshold_lr=0.4, normalize=False), data(120)

    def edge(batch: torch.Tensor) -> torch.Tensor:
        ordered = (naive(sae, batch, WIDTH)[0] * sae.W_dec.norm(dim=1)).flatten().sort(descending=True).values
        return (ordered[40 * K - 1] + ordered[40 * K]) / 2

    edges = [edge(batch) for batch in x.split(40)]
    expected = [edges[0], (edges[0] + edges[1]) / 2, 0.6 * (edges[0] + edges[1]) / 2 + 0.4 * edges[2]]
    for step, batch in enumerate(x.split(40)):
        output = step_on(sae, batch, step)
        torch.testing.assert_close(output.metrics["topk_threshold"].clone(), expected[step])


def test_calibration_hits_k(unchecked):
    sae, x = made(), data(400)
    step_on(sae, x[:100])
    form: Any = inference_form(sae)
    found = calibrate(form, lambda: x[:, :READ].split(64), 2.5, tolerance=0.1)
    assert (form.encode(x[:, :READ]) > 0).sum() / 400 == found.l0 == pytest.approx(2.5, abs=0.1)
    with pytest.raises(ValueError, match="expected a JumpReLUTranscoder, got Transcoder"):
        calibrate(inference_form(made("standard")), lambda: [], 1, tolerance=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("n", "width", "k", "tolerance", "message"),
    [
        (400, READ, 0, 0.1, "k must be a positive number of latents per token, got 0"),
        (400, READ, float("nan"), 0.1, "k must be a positive number"),
        (400, READ, 13, 0.5, "k = 13 latents per token cannot be active in an SAE with d_sae = 12"),
        (400, READ, 2, float("nan"), "tolerance must be a positive number"),
        (199, READ, 2, 0.1, "too short for the tolerance asked: 199 tokens count.*needs 200"),
        (400, OUT, 2, 0.1, r"reads 6 values per token, got shape \(400, 4\)"),
    ],
)
def test_a_refused_calibration_changes_nothing(n, width, k, tolerance, message, unchecked):
    form: Any = inference_form(made())
    before = form.threshold.clone()
    with pytest.raises(ValueError, match=message):
        calibrate(form, lambda: [data(n)[:, :width]], k, tolerance=tolerance)
    assert torch.equal(form.threshold, before)


# --- Bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_in": 4}, "more than d_out = 4; got 4"),
        ({"d_out": 0}, "d_out must be an integer, 1 or more; got 0"),
        ({"k": 13}, "k must be an integer between 1 and d_sae = 12, got 13"),
        ({"k": 0}, "k must be an integer between 1 and d_sae = 12, got 0"),
        ({"layer": -1}, "layer must be an integer, 0 or more; got -1"),
        ({"topk_threshold_lr": -0.1}, "topk_threshold_lr must be a number from 0 to 1, got -0.1"),
        ({"topk_threshold_lr": float("nan")}, "topk_threshold_lr must be a number from 0 to 1"),
        ({"norm_batches": 0}, "norm_batches must be an integer, 1 or more"),
        ({"skip": 1}, "skip must be True or False, got 1"),
        (
            {"normalize_activations": "expected_average_only_in"},
            r"does not work for transcoders; expected 'none'",
        ),
        ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input=True does not work for transcoders"),
        ({"k_start": 99, "k_anneal_steps": 3}, "k_start must be an integer between k = 3 and d_sae = 12"),
    ],
)
def test_configs_that_cannot_work(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        made(**options)


def test_a_value_of_another_width():
    with pytest.raises(
        ValueError, match="expected 6 values that are read and 4 to be predicted side by side"
    ):
        made()(data()[:, 1:])
