"""One training step (forward, backward, optimiser) of every contender, and its peak memory."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor, nn

import routesae_lens as rl
from routesae_lens.saes import recycled


class Size(NamedTuple):
    d: int
    width: int
    k: int
    batch: int
    layers: int = 9

    def __str__(self) -> str:
        return f"d {self.d:,}, width {self.width:,}, k {self.k}, {self.batch:,} tokens"


@dataclass
class Step:
    """A contender, ready to run any number of steps."""

    run: Callable[[], Any]
    optimizer: torch.optim.Optimizer
    batch: Tensor
    size: Size

    def needed_bytes(self) -> int:
        """Parameters, gradients, Adam's two moments, the batch and one batch x width matrix."""
        matrix = self.size.batch * self.size.width * self.batch.element_size()
        return 4 * _bytes(self._parameters()) + _bytes([self.batch]) + matrix

    def peak_bytes(self) -> int:
        """Most memory that tensors take at once during a step, everything included.

        On a CPU it is counted from what torch's allocator reports to its profiler: scratch memory of the
        matrix library is not in it. The step must have run once, so that the optimiser has its moments.
        """
        recycled.forget()
        self.run()  # what is kept for later gradients now is its own
        moments = [
            value
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        at_rest = _bytes([*self._parameters(), *gradients, *moments, self.batch])
        if self.batch.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.run()
            torch.cuda.synchronize()
            return at_rest + torch.cuda.max_memory_allocated() - before
        return at_rest + recycled.kept_bytes() + _profiled_peak(self.run)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _profiled_peak(work: Callable[[], Any]) -> int:
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    if not changes:
        raise RuntimeError("torch's profiler reported no allocation")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


def mixed_precision(device: str) -> AbstractContextManager[Any]:
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()


def _batch(size: Size, device: str, layers: int = 1) -> Tensor:
    return torch.randn(size.batch, layers * size.d, device=device)


def _saelens_step(sae: Any, size: Size, device: str, layers: int, *, fused: bool) -> Step:
    """A step as SAELens' trainer takes it, without its logging and its gradient clipping."""
    batch = _batch(size, device, layers)
    # fused as our runner sets it; SAELens' own trainer leaves torch's default
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, fused=True if fused else None)
    dead = torch.zeros(size.width, dtype=torch.bool, device=device)

    def run() -> None:
        # (a new tensor each time, as in training: SAEs share what they make of the very same one)
        step_input = TrainStepInput(batch.detach(), {}, dead, 0, False)
        with mixed_precision(device):
            loss = sae.training_forward_pass(step_input).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Step(run, optimizer, batch, size)


def route(size: Size, device: str, *, dense: bool = False) -> Step:
    layers = list(range(size.layers))
    cfg = rl.RouteTopKTrainingSAEConfig(
        d_in=size.layers * size.d, d_sae=size.width, k=size.k, layers=layers, device=device
    )
    sae = rl.RouteTopKTrainingSAE(cfg)
    if dense:
        sae.hook_sae_recons.add_hook(_look)  # with hooks on the SAE, the computation is SAELens' own
    return _saelens_step(sae, size, device, size.layers, fused=True)


def experts(size: Size, device: str, *, n_experts: int, active: int, scaling: str = "mean") -> Step:
    """A Scale SAE on one layer, with the loss and standardisation of :func:`route`."""
    cfg = rl.RouteScaleTrainingSAEConfig(
        d_in=size.d,
        d_sae=size.width,
        k=size.k,
        layers=[0],
        n_experts=n_experts,
        active_experts=active,
        feature_scaling=scaling,  # type: ignore[arg-type]
        device=device,
    )
    return _saelens_step(rl.RouteScaleTrainingSAE(cfg), size, device, 1, fused=True)


def _look(activation: Tensor, hook: Any) -> None:
    """A hook that changes nothing."""


def crosscoder(size: Size, device: str) -> Step:
    layers = list(range(size.layers))
    cfg = rl.CrosscoderTopKTrainingSAEConfig(
        d_in=size.layers * size.d, d_sae=size.width, k=size.k, layers=layers, device=device
    )
    return _saelens_step(rl.CrosscoderTopKTrainingSAE(cfg), size, device, size.layers, fused=True)


def saelens(size: Size, device: str, *, sparse: bool, fused: bool = False) -> Step:
    """SAELens' own SAE. With sparse activations the gradient of its decoder-norm rescaling raises, so it is off."""
    cfg = TopKTrainingSAEConfig(
        d_in=size.d,
        d_sae=size.width,
        k=size.k,
        device=device,
        use_sparse_activations=sparse,
        rescale_acts_by_decoder_norm=not sparse,
    )
    return _saelens_step(TopKTrainingSAE(cfg), size, device, 1, fused=fused)


def sparsify(size: Size, device: str) -> Step:
    """EleutherAI's SAE, its own loss, without its normalisation of the decoder after each step."""
    if device != "cuda":
        os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # its kernels are for GPUs only
    from sparsify import SparseCoder, SparseCoderConfig

    cfg = SparseCoderConfig(num_latents=size.width, k=size.k, normalize_decoder=False)
    coder = SparseCoder(size.d, cfg, device=device)
    batch = _batch(size, device)
    optimizer = torch.optim.Adam(coder.parameters(), lr=1e-4, fused=True)

    def run() -> None:
        coder(batch).fvu.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Step(run, optimizer, batch, size)


def plain_formula(size: Size, device: str) -> Step:
    """Encoder, TopK, scatter, decoder and squared error as they are written down, with torch's default Adam."""
    W_enc, W_dec, b_enc, b_dec = (
        nn.Parameter(torch.randn(shape, device=device) * size.d**-0.5)
        for shape in ((size.d, size.width), (size.width, size.d), (size.width,), (size.d,))
    )
    batch = _batch(size, device)
    optimizer = torch.optim.Adam([W_enc, W_dec, b_enc, b_dec], lr=1e-4)

    def run() -> None:
        with mixed_precision(device):
            top = (batch @ W_enc + b_enc).topk(size.k)
            acts = top.values.new_zeros(size.batch, size.width).scatter(-1, top.indices, top.values.relu())
            loss = (acts @ W_dec + b_dec - batch).pow(2).sum(-1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Step(run, optimizer, batch, size)


def floor(size: Size, device: str) -> Step:
    """What no step can do without: encoder matmul, TopK, fused Adam. It learns nothing."""
    W_enc, W_dec = (
        nn.Parameter(torch.randn(shape, device=device))
        for shape in ((size.d, size.width), (size.width, size.d))
    )
    batch = _batch(size, device)
    for parameter in (W_enc, W_dec):
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.Adam([W_enc, W_dec], lr=1e-4, fused=True)

    def run() -> None:
        with torch.no_grad(), mixed_precision(device):
            (batch @ W_enc).topk(size.k)
        optimizer.step()

    return Step(run, optimizer, batch, size)


def encoder_matmul(size: Size, device: str, layers: int = 1) -> Callable[[], Tensor]:
    """The unit: ``x @ W_enc`` of one batch, in the precision of the step."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = _batch(size, device, layers).to(dtype)
    W_enc = torch.randn(layers * size.d, size.width, device=device, dtype=dtype)
    return lambda: x @ W_enc
