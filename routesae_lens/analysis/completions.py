"""Completions of prompts, steered or not, and how the clean model and an SAE read them.

Per completion there is one forward pass beside the generation: the finished text through the clean model. It
gives the distributions that a steered one is compared with, how likely the text is without steering, and
what the SAE sees in it. "Clean" is the model without the SAE; hooks of the user stay on in both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Int
from sae_lens import SAE, TrainingSAE
from torch import Tensor
from tqdm.auto import tqdm

from routesae_lens.analysis.next_tokens import kl_of_log_probs
from routesae_lens.analysis.prompts import Prompt, prompt_tokens
from routesae_lens.analysis.stream import kept_tokens, subjects_of
from routesae_lens.analysis.subjects import Subject
from routesae_lens.hook_points import mounted_points, unmount_layers
from routesae_lens.saes.fast_topk import Latents
from routesae_lens.splice.edits import Edit
from routesae_lens.splice.steering import Steering


@dataclass(frozen=True)
class GenerationOptions:
    """How completions are generated, steered or not."""

    max_new_tokens: int = 40
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    seed: int = 0
    """Of the sampling. With the same one, steered and unsteered completions draw the same random numbers."""
    samples: int = 1
    """Completions of each prompt, sampled independently."""
    batch_size: int = 8
    """Completions generated side by side, of prompts of the same length (so nothing is padded). What is
    sampled depends on it, as on the seed."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "samples", "batch_size"):
            if not _whole(getattr(self, name)) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number of 1 or more, got {getattr(self, name)!r}")
        if not _whole(self.seed) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be a whole number of 0 or more, got {self.seed!r}")
        temperature = self.temperature
        if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not temperature > 0:
            raise ValueError(f"temperature must be a positive number, got {temperature!r}")
        if not math.isfinite(temperature):
            raise ValueError(f"temperature must be finite, got {temperature!r}")
        if self.top_k is not None and (not _whole(self.top_k) or self.top_k < 1):
            raise ValueError(f"top_k must be a whole number of 1 or more, or none, got {self.top_k!r}")
        if not self.do_sample:
            set_for_sampling = {
                "temperature": self.temperature != 1.0,
                "top_k": self.top_k is not None,
                "samples": self.samples != 1,
            }
            if given := [name for name, is_given in set_for_sampling.items() if is_given]:
                raise ValueError(f"{', '.join(given)} needs do_sample=True: greedy decoding has one result")


@dataclass
class Completion:
    """What was generated after a prompt; lists have one entry per generated token."""

    prompt: int
    """Number of the prompt."""
    sample: int
    tokens: list[int]
    strings: list[str]
    text: str
    kl: list[float]
    """KL(clean || steered) of the distribution that the token was drawn from, nats; 0 if not steered."""
    log_probs: list[float]
    """Log-probability of the token under the clean model, nats."""
    blocks: list[int | None]
    """The block that the token is routed to; None for special tokens, and for a Crosscoder, which reads all
    its blocks. An SAE of one block names that."""
    activations: dict[int, list[float | None]]
    """By latent, in a clean reading of the completion: does the text itself express the feature? In units of
    p = 1; None for special tokens."""

    @property
    def mean_kl(self) -> float:
        return math.fsum(self.kl) / len(self.kl)

    @property
    def nll(self) -> float:
        """Mean negative log-probability of the tokens under the clean model, nats."""
        return -math.fsum(self.log_probs) / len(self.log_probs)

    @property
    def perplexity(self) -> float:
        """Under the clean model: the lower, the more fluent (and a loop is very fluent)."""
        return perplexity(self.nll)

    def mean_activation(self, latent: int) -> float:
        """Over the tokens that are not special; 0 where there are none."""
        read = self._read(latent)
        return math.fsum(read) / max(len(read), 1)

    def firing_share(self, latent: int) -> float:
        """Share of the tokens that are not special on which the latent fires; 0 where there are none."""
        read = self._read(latent)
        return sum(activation > 0 for activation in read) / max(len(read), 1)

    def _read(self, latent: int) -> list[float]:
        return [activation for activation in self.activations[latent] if activation is not None]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON, the means included."""
        return asdict(self) | {
            "mean_kl": self.mean_kl,
            "nll": self.nll,
            "perplexity": self.perplexity,
            "mean_activation": {latent: self.mean_activation(latent) for latent in self.activations},
            "firing_share": {latent: self.firing_share(latent) for latent in self.activations},
        }


def perplexity(nll: float) -> float:
    """exp(nll), and the largest such number where a float holds no more."""
    return math.exp(min(nll, 700.0))


@torch.no_grad()
def complete(
    model: Any,
    sae: SAE[Any],
    prompts: Sequence[Prompt],
    edits: Mapping[int, Edit] | None = None,
    *,
    read: Iterable[int] = (),
    options: GenerationOptions | None = None,
    progress: str | None = "completions",
    **steering: Any,
) -> list[Completion]:
    """Complete every prompt, with ``edits`` at work or without, and read the completions with the clean model.

    Args:
        model: a HookedRouteSAETransformer or RouteSAETransformerBridge with a tokenizer.
        sae: a RouteSAE, Crosscoder or ordinary SAE, not attached.
        prompts: texts, or chats as lists of turns (rendered by the tokenizer's chat template).
        edits: as ``model.steer`` takes them; None: the model as it is.
        read: latents whose activations are wanted, besides those that are edited.
        options: how to generate; by default 40 tokens, greedily.
        progress: caption of the progress bar, none without.
        **steering: the other arguments of ``model.steer``: positions, layers, use_error_term, maxima,
            exclude_special_tokens, scale_by_p.

    Returns:
        ``options.samples`` completions of each prompt, in the order of the prompts. They end with the end
        of text token where one was generated.

    Raises:
        TypeError, ValueError: a model, SAE, edit or prompt that does not do; before anything is generated.
    """
    options = options or GenerationOptions()
    with prepared(model, sae, prompts, options) as ready:
        latents = check_latents([*read, *(edits or ())], sae)
        if edits is None and steering:
            raise ValueError(f"{', '.join(steering)} given, but no edits")
        if edits is not None:
            with model.steer(sae, edits, **steering):
                pass  # what is wrong with the edits shows here, not after a long generation
        found: dict[int, Completion] = {}
        rows = len(ready.prompts) * options.samples
        with tqdm(total=rows, desc=progress, unit="completion", disable=progress is None) as bar:
            for number, chunk in enumerate(ready.chunks()):
                tokens = torch.stack([ready.prompts[row // options.samples] for row in chunk])
                with ExitStack() as stack:
                    if edits is not None:
                        stack.enter_context(model.steer(sae, edits, **steering))
                    sequences, logits = ready.generate(tokens, options.seed + 1_000_003 * number)
                for row, completion in zip(
                    chunk,
                    ready.read(sequences, tokens.shape[1], None if edits is None else logits, latents),
                    strict=True,
                ):
                    completion.prompt, completion.sample = divmod(row, options.samples)
                    found[row] = completion
                bar.update(len(chunk))
    return [found[row] for row in sorted(found)]


def check_latents(latents: Iterable[int], sae: SAE[Any]) -> list[int]:
    """``latents`` without repetitions.

    Raises:
        ValueError: one that the SAE does not have.
    """
    wanted = list(dict.fromkeys(latents))
    if bad := [one for one in wanted if not _whole(one) or not 0 <= one < sae.cfg.d_sae]:
        raise ValueError(f"latents {bad} are out of range: this SAE has latents 0 to {sae.cfg.d_sae - 1}")
    return wanted


class prepared(ExitStack):
    """Context manager: prompts as tokens and the SAE ready to read, once all is known to be right.

    At its end the multi-layer hook point that it mounted is gone.
    """

    def __init__(self, model: Any, sae: Any, prompts: Sequence[Prompt], options: GenerationOptions):
        super().__init__()
        if not issubclass(type(model), Steering):
            raise TypeError(
                f"expected a HookedRouteSAETransformer or RouteSAETransformerBridge, got {type(model).__name__}; "
                "load_model(name, backend='hooked', model_class=HookedRouteSAETransformer) makes one, and so does "
                "HookedRouteSAETransformer.from_model(model)"
            )
        if isinstance(sae, TrainingSAE):
            raise TypeError(f"{type(sae).__name__} is a training SAE; give inference_form(sae)")
        self.model = model
        self.options = options
        self.prompts = prompt_tokens(model, prompts, options.max_new_tokens)
        vocabulary = model.cfg.d_vocab
        if options.top_k is not None and options.top_k > vocabulary:
            raise ValueError(f"top_k={options.top_k} is more than the {vocabulary} tokens of the vocabulary")
        before = mounted_points(model)
        self.subject: Subject = subjects_of({"sae": sae}, model)["sae"]
        if self.subject.point in mounted_points(model) and self.subject.point not in before:
            self.callback(unmount_layers, model, self.subject.point)
        stop = getattr(model.cfg, "eos_token_id", None)  # (of a chat model there may be several)
        stop = model.tokenizer.eos_token_id if stop is None else stop
        self.stop: list[int] = [] if stop is None else [stop] if isinstance(stop, int) else list(stop)

    def chunks(self) -> list[list[int]]:
        """Completions (prompt x samples + sample) that are generated side by side."""
        by_length: dict[int, list[int]] = {}
        for row in range(len(self.prompts) * self.options.samples):
            by_length.setdefault(len(self.prompts[row // self.options.samples]), []).append(row)
        size = self.options.batch_size
        return [rows[i : i + size] for rows in by_length.values() for i in range(0, len(rows), size)]

    def generate(
        self, tokens: Int[Tensor, "batch prompt"], seed: int
    ) -> tuple[Int[Tensor, "batch pos"], tuple[Tensor, ...]]:
        """Whole sequences, and the logits of every step, each (batch, vocab)."""
        options = self.options
        more: dict[str, Any] = {"eos_token_id": self.stop} if self.stop else {}
        if options.do_sample:
            more |= {"temperature": options.temperature, "top_k": options.top_k}
        with torch.random.fork_rng(enabled=options.do_sample):
            if options.do_sample:
                torch.manual_seed(seed % 2**63)
            out = self.model.generate(
                tokens,
                max_new_tokens=options.max_new_tokens,
                do_sample=options.do_sample,
                stop_at_eos=bool(self.stop),
                return_type="tokens",
                verbose=False,
                output_logits=True,
                **more,
            )
        return out.sequences, out.logits

    def read(
        self,
        sequences: Int[Tensor, "batch pos"],
        start: int,
        steered: tuple[Tensor, ...] | None,
        latents: list[int],
    ) -> list[Completion]:
        """The completions after ``start``, each up to its first end of text, read by the clean model."""
        model, subject = self.model, self.subject
        lengths = [self._length(row[start:].tolist()) for row in sequences]
        sequences = sequences[:, : start + max(lengths)]
        # Generation attends to every token. Left to itself the model may take the end of text for padding.
        mask = torch.ones_like(sequences)
        logits, cache = model.run_with_cache(sequences, attention_mask=mask, names_filter=[subject.point])
        reading = subject.read(cache[subject.point], 0)
        keep = kept_tokens(sequences, model)
        activations = torch.zeros(*keep.shape, len(latents), dtype=torch.float64, device=keep.device)
        keep[:, :start] = False
        if latents and keep.any():
            active = Latents.of(subject.encode(reading, keep))
            acts = torch.zeros(
                int(keep.sum()), subject.sae.cfg.d_sae, dtype=torch.float64, device=keep.device
            )
            acts[active.token, active.latent] = active.value.double()
            acts = acts[:, latents]
            if reading.route is not None:
                acts = acts / reading.route.scale[keep].double()[:, None]
            activations[keep] = acts
        completions = []
        for row, length in enumerate(lengths):
            new = slice(start, start + length)
            tokens = sequences[row, new]
            clean = logits[row, start - 1 : start - 1 + length].float().log_softmax(-1)
            kl = torch.zeros(length)
            if steered is not None:
                ours = torch.stack([step[row] for step in steered[:length]]).float().log_softmax(-1)
                if not torch.isfinite(ours).all():
                    raise ValueError(
                        "the steered model's logits are not finite: steer with a smaller strength"
                    )
                kl = kl_of_log_probs(clean, ours.to(clean.device)).clamp_min(0)  # (rounding)
            kept = keep[row, new].tolist()
            blocks = [subject.layers[index] for index in reading.layer[row, new].tolist()]
            if reading.every_layer:
                kept_blocks: list[int | None] = [None] * length
            else:
                kept_blocks = [
                    block if is_kept else None for block, is_kept in zip(blocks, kept, strict=True)
                ]
            columns = activations[row, new].T.tolist()
            ids = tokens.tolist()
            completions.append(
                Completion(
                    prompt=0,
                    sample=0,
                    tokens=ids,
                    strings=[model.tokenizer.decode([token]) for token in ids],
                    text=model.tokenizer.decode(ids, skip_special_tokens=True),
                    kl=kl.tolist(),
                    log_probs=clean.gather(-1, tokens[:, None]).squeeze(-1).tolist(),
                    blocks=kept_blocks,
                    activations={
                        latent: [
                            value if is_kept else None for value, is_kept in zip(column, kept, strict=True)
                        ]
                        for latent, column in zip(latents, columns, strict=True)
                    },
                )
            )
        return completions

    def _length(self, generated: list[int]) -> int:
        ends = (place + 1 for place, token in enumerate(generated) if token in self.stop)
        return next(ends, len(generated))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
