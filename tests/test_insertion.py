"""What inserting a latent does to the error, against inserting it; and the threshold that follows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from stitchable import HOOK, activations, sae, same_router

from routesae_lens.analysis.geometry import BestMatches
from routesae_lens.analysis.insertion import InsertionEffects, choose_threshold, insertion_effects
from routesae_lens.analysis.latent_split import split_latents
from routesae_lens.report.stitching_plots import plot_threshold

TOKENS = torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(0))
LAYER_NORM = {"normalize_activations": "layer_norm"}


def by_hand(small: Any, large: Any, x: torch.Tensor) -> list[float]:
    """Mean squared error with each latent of ``large`` added to the reconstruction, minus that without."""
    acts = large.encode(x)
    scaled = small.cfg.normalize_activations == "layer_norm"  # inserted before the scale is undone
    stats = x.std(-1, keepdim=True) if scaled else torch.ones_like(x[:, :1])
    large.decode(acts)  # (SAELens forgets the scale of the tokens there)
    before = small(x)
    plain = (x - before).pow(2).sum(-1).mean()
    return [
        ((x - before - stats * acts[:, j : j + 1] * large.W_dec[j]).pow(2).sum(-1).mean() - plain).item()
        for j in range(large.cfg.d_sae)
    ]


@pytest.mark.parametrize(
    ("ours", "theirs", "fields"),
    [
        ("standard", "jumprelu", {}),
        ("jumprelu", "standard", LAYER_NORM),
        ("standard", "standard", LAYER_NORM),
    ],
)
def test_effects_are_those_of_really_inserting(ours: str, theirs: str, fields: dict[str, Any]):
    small, large = (sae(kind, n, n, dtype="float64", **fields) for kind, n in ((ours, 12), (theirs, 30)))
    with torch.no_grad():
        large.b_enc[3], large.W_enc[:, 3] = -1.0, 0.0  # never fires
    x = activations(3, 20, dtype=torch.float64)
    found = insertion_effects(small, large, activations=x, progress=False)
    expected = by_hand(small, large, x.flatten(0, 1))
    torch.testing.assert_close(
        found.change, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-9
    )
    assert found.tokens == 60 and found.fires[3] == 0 and found.change[3] == 0
    assert found.mse == pytest.approx((x - small(x)).pow(2).sum(-1).mean().item())
    assert found.fires.tolist() == (large.encode(x) > 0).sum((0, 1)).tolist()
    assert json.loads(json.dumps(found.to_dict()))["latents"] == list(range(30))


def test_a_sample_is_a_part_of_all_and_the_seeds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("routesae_lens.analysis.insertion.ROWS_AT_ONCE", 7)  # in many parts
    small, large, x = sae("standard", 12, 1), sae("jumprelu", 30, 2), activations(60)
    every = insertion_effects(small, large, activations=x, progress=False)
    some, again, other = (
        insertion_effects(small, large, activations=x, sample=9, seed=seed, progress=False)
        for seed in (0, 0, 1)
    )
    assert some.latents.tolist() == again.latents.tolist() != other.latents.tolist()
    assert len(set(some.latents.tolist())) == 9
    torch.testing.assert_close(some.change, every.change[some.latents], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("routed", [False, True])
def test_a_model_gives_what_its_activations_give(routed: bool, tiny_hooked: Any):
    kind = "route_standard" if routed else "standard"
    small, large = sae(kind, 12, 1), sae(kind, 30, 2)
    if routed:
        same_router(large, small)
    found = insertion_effects(small, large, tiny_hooked, TOKENS, progress=False)
    point = small.mount(tiny_hooked) if routed else HOOK
    with torch.no_grad():
        stack = tiny_hooked.run_with_cache(TOKENS, names_filter=point)[1][point][:, 1:]
    alone = insertion_effects(small, large, activations=stack, progress=False)
    assert alone.tokens == found.tokens == 33
    torch.testing.assert_close(alone.change, found.change, rtol=1e-4, atol=1e-6)
    if routed:  # the routed input is where the error is
        read = small.route(stack.flatten(0, 1)).input
        error = (read - small.decode(small.encode_routed(read))).pow(2).sum(-1).mean().item()
        assert found.mse == pytest.approx(error, rel=1e-4)


# --- The threshold ----------------------------------------------------------------------------------------


def effects(change: list[float], fires: list[int] | None = None) -> InsertionEffects:
    n = len(change)
    return InsertionEffects(
        tokens=100,
        mse=1.0,
        latents=torch.arange(n),
        change=torch.tensor(change, dtype=torch.float64),
        fires=torch.tensor(fires or [5] * n),
    )


def matches(cosines: list[float], latents: list[int] | None = None) -> BestMatches:
    return BestMatches(torch.tensor(cosines), torch.tensor(latents or [0] * len(cosines)))


def test_a_threshold_that_tells_all_apart_lies_in_the_middle():
    found = choose_threshold(matches([0.1, 0.3, 0.5, 0.9, 0.8]), effects([-1, -2, -1, 1, 3]))
    assert found.threshold == pytest.approx(0.66, abs=0.011) and found.balanced_accuracy == 1.0
    assert (found.lowering, found.raising, found.left_out) == (3, 2, 0)
    assert len(found.thresholds) == len(found.accuracies) == 101


def test_a_cosine_equal_to_the_threshold_is_foretold_to_raise_the_error():
    """As in the split; 0.7 is not the same number in float32 and float64."""
    found = choose_threshold(matches([0.69, 0.7]), effects([-1, 1]))
    assert dict(zip(found.thresholds, found.accuracies, strict=True))[0.7] == 1.0


def test_the_balanced_accuracy_by_hand():
    """Below 0.6: lowering 0.1, 0.2, 0.5 of four (0.75); from there on: raising 0.7 of two (0.5)."""
    found = choose_threshold(matches([0.1, 0.2, 0.5, 0.8, 0.4, 0.7]), effects([-1, -1, -1, -1, 1, 1]))
    at = dict(zip(found.thresholds, found.accuracies, strict=True))
    assert at[0.6] == pytest.approx((0.75 + 0.5) / 2)
    assert at[0.0] == pytest.approx(0.5) and at[1.0] == pytest.approx(0.5)
    assert found.balanced_accuracy == pytest.approx((0.5 + 1) / 2) and 0.2 < (found.threshold or 0) <= 0.4


def test_latents_that_say_nothing_are_left_out():
    found = choose_threshold(
        matches([0.1, 0.9, 0.95, 0.0, 0.2], [0, 0, 0, -1, 0]), effects([-1, 1, -5, -5, 0], [5, 5, 0, 5, 5])
    )
    assert (found.lowering, found.raising, found.left_out) == (1, 1, 3) and found.balanced_accuracy == 1.0


def test_without_two_kinds_there_is_no_threshold(tmp_path: Path):
    found = choose_threshold(matches([0.1, 0.9]), effects([-1, -2]))
    assert found.threshold is None and found.balanced_accuracy is None and found.accuracies == []
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["lowering"] == 2
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_threshold(found, tmp_path / "threshold.svg")


def test_copies_and_new_directions_are_told_apart_by_their_effect(tmp_path: Path):
    """Planted: the smaller SAE knows 12 of 24 directions; the larger has noisy copies of these and the other 12."""
    basis = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(3)))[0]
    generator = torch.Generator().manual_seed(4)
    amounts = torch.rand(400, 24, generator=generator)
    x = (amounts * (amounts > 0.7)) @ basis[:24]
    small, large = sae("standard", 12, 1), sae("standard", 24, 2)
    with torch.no_grad():
        noise = torch.randn(12, 32, generator=generator) * 0.05
        for one, rows in ((small, basis[:12]), (large, torch.cat([basis[:12] + noise, basis[12:24]]))):
            one.W_dec.copy_(rows)
            one.W_enc.copy_(rows.T)
            one.b_dec.zero_()
            one.b_enc.fill_(-0.1)
    found = insertion_effects(small, large, activations=x, progress=False)
    assert (found.change[:12] > 0).all() and (found.change[12:] < 0).all()
    choice = choose_threshold(split_latents(small, large, progress=False).large, found)
    assert choice.balanced_accuracy == 1.0 and 0.4 < (choice.threshold or 0) < 0.8
    assert "<svg" in plot_threshold(choice, tmp_path / "threshold.svg").read_text()


def test_wrong_input_is_refused(unchecked: None):
    small, large, x = sae("standard", 12, 1), sae("standard", 30, 2), activations(5)
    for sample in (0, 31, 2.5):
        with pytest.raises(
            ValueError, match=f"sample must be 1 to the 30 latents of the larger SAE, got {sample}"
        ):
            insertion_effects(small, large, activations=x, sample=sample, progress=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected activations as a tensor, got list"):
        insertion_effects(small, large, activations=[[0.0]], progress=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="effects of latent 1, but matches of 1"):
        choose_threshold(matches([0.5]), effects([1, -1]))
    with pytest.raises(ValueError, match="to_jumprelu"):
        insertion_effects(small, sae("topk", 30, 2, k=3), activations=x, progress=False)
    with pytest.raises(ValueError, match="expected an SAE, got str"):
        insertion_effects("small", large, activations=x, progress=False)  # type: ignore[arg-type]
