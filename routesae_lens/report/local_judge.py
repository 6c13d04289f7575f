"""A judge that is a language model on this machine."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from routesae_lens.demo import DEMO_MODEL, demo_model_path
from routesae_lens.models import default_device
from routesae_lens.report.judges import JudgeError, Reply, check_sampling


@dataclass
class LocalJudge:
    """A language model of ``transformers`` on this machine, for people without an endpoint. One prompt at a time.

    Small models seldom keep to the format; what cannot be read is counted as unparsed.

    Args:
        model: Hugging Face name, local folder, or "demo". A chat model: its template is used where it has one.
        temperature: 0 for the likeliest answer; else sampled, with a seed made of ``seed`` and the prompt, so
            that an answer depends on no other.
        max_tokens: longest answer.
        device: by default a GPU where there is one.
        dtype: of the weights.

    Raises:
        ValueError: a bad argument.
    """

    model: str = "demo"
    temperature: int | float = 0.0
    max_tokens: int = 200
    seed: int = 0
    device: str | None = None
    dtype: str = "float32"
    concurrency: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.max_tokens)
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"unknown dtype {self.dtype!r}; expected float32, bfloat16 or float16")

    def describe(self) -> dict[str, Any]:
        name = Path(self.model).name if Path(self.model).is_dir() else self.model
        rest: dict[str, Any] = {"max_tokens": self.max_tokens, "dtype": self.dtype}
        if self.temperature:
            rest["seed"] = self.seed
        return {
            "kind": "local",
            "model": name,
            "base_url": None,
            "temperature": self.temperature,
            "parameters": rest,
        }

    def identity(self) -> dict[str, Any]:
        described = self.describe()
        folder = Path(self.model)
        if folder.is_dir():  # another model may be written to it
            described["files"] = [
                (file.name, file.stat().st_size, file.stat().st_mtime_ns)
                for file in sorted(folder.iterdir())
                if file.suffix in (".json", ".safetensors", ".bin", ".model")
            ]
        return described

    def counted_by(self) -> str:
        return "the model's tokenizer"

    def count_tokens(self, prompt: str) -> int:
        return len(self._ids(prompt))

    def ask(self, prompt: str, stop: threading.Event) -> Reply:
        ids = self._ids(prompt)
        room = getattr(self._model.config, "max_position_embeddings", None)
        if room is not None and len(ids) + self.max_tokens > room:
            raise JudgeError(
                f"prompt of {len(ids)} tokens and an answer of {self.max_tokens} do not fit into the model's "
                f"{room}; set max_contexts lower"
            )
        tokens = torch.tensor([ids], device=self._model.device)
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if self.temperature:
            sampling = {"do_sample": True, "temperature": self.temperature, "top_p": 1.0, "top_k": 0}
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(int(hashlib.sha256(f"{self.seed} {prompt}".encode()).hexdigest()[:15], 16))
            made = self._model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=self.max_tokens,
                pad_token_id=self._tokenizer.pad_token_id or self._tokenizer.eos_token_id,
                stopping_criteria=[lambda ids, scores, **_: torch.full(ids.shape[:1], stop.is_set())],
                **sampling,
            )[0, len(ids) :]
        if stop.is_set():
            raise JudgeError("stopped")  # half an answer must not be kept
        reason = "length" if len(made) == self.max_tokens else "stop"
        return Reply(self._tokenizer.decode(made, skip_special_tokens=True), len(ids), len(made), reason)

    def _ids(self, prompt: str) -> list[int]:
        """The prompt in the model's chat template. What the text of the data spells is never a control token."""

        def plain(text: str) -> list[int]:
            return self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

        if self._tokenizer.chat_template is None:
            bos = self._tokenizer.bos_token_id
            return [*([] if bos is None else [bos]), *plain(prompt)]
        place = "\x00"  # no prompt holds it: build_prompt escapes control characters
        before, after = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": place}], add_generation_prompt=True, tokenize=False
        ).split(place)
        parts = [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, after)]
        return [*parts[0], *plain(prompt), *parts[1]]

    @cached_property
    def _source(self) -> str:
        return str(demo_model_path()) if self.model == DEMO_MODEL else self.model

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._source)

    @cached_property
    def _model(self) -> Any:
        from transformers import AutoModelForCausalLM

        dtype = getattr(torch, self.dtype)
        model: Any = AutoModelForCausalLM.from_pretrained(self._source, dtype=dtype)
        return model.to(self.device or default_device()).eval()
