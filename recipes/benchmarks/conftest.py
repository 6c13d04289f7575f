"""How every benchmark measures: the reference right before the target, in one process, as a ratio.

    make bench                    # all of it; writes results.json, results.md and scaling.png here
    BENCH_QUICK=1 make bench      # tiny sizes: does it run at all?
    make bench ARGS="-k step"     # some of it

``BENCH_OUTPUT`` names another folder for the results.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Before the libraries are imported: they read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pandas as pd
import pytest
import report
import torch

import routesae_lens as rl

QUICK = os.environ.get("BENCH_QUICK", "0") not in ("", "0")
OUTPUT = Path(os.environ.get("BENCH_OUTPUT") or Path(__file__).parent)
DEVICE = rl.default_device()
ROUNDS = 3 if QUICK else 5
PACKAGES = (
    "routesae-lens",
    "torch",
    "sae-lens",
    "transformer-lens",
    "transformers",
    "eai-sparsify",
    "triton",
)

ROWS: list[dict[str, Any]] = []
"""What was measured, in order; written when the session ends."""


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def finished(work: Callable[[], Any]) -> None:
    """``work``, until the device is done with it."""
    work()
    synchronize()


class Compare:
    """Times ``target`` in units of ``reference`` and keeps the row."""

    def __init__(self, benchmark: Any):
        self.benchmark = benchmark

    def __call__(
        self,
        target: Callable[[], Any],
        reference: Callable[[], Any],
        *,
        group: str,
        name: str,
        unit: str,
        rounds: int = ROUNDS,
        times_faster: bool = False,
        goal: tuple[str, float] | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """One row: the ratio target / reference of every round, after one round that warms up.

        Args:
            target, reference: what is timed.
            group, name, unit: what the table calls them; ``unit`` is the reference.
            rounds: how often.
            times_faster: the ratio is reference / target instead.
            goal: for instance ("<=", 1.05), about the median.
            more: further columns of the row.
        """
        references: list[float] = []

        def time_reference() -> None:
            start = time.perf_counter()
            finished(reference)
            references.append(time.perf_counter() - start)

        self.benchmark.group = group
        self.benchmark.pedantic(
            finished, args=(target,), setup=time_reference, rounds=rounds, warmup_rounds=1
        )
        targets = self.benchmark.stats.stats.data
        ratios = [own / ref for own, ref in zip(targets, references[-rounds:], strict=True)]
        if times_faster:
            ratios = [1 / ratio for ratio in ratios]
        row = add_row(
            group=group,
            name=name,
            unit=f"times faster than {unit}" if times_faster else unit,
            ratios=ratios,
            goal=goal,
            seconds=statistics.median(targets),
            reference_seconds=statistics.median(references[-rounds:]),
            **more,
        )
        self.benchmark.extra_info.update(row)
        return row


def add_row(*, ratios: list[float], goal: tuple[str, float] | None = None, **columns: Any) -> dict[str, Any]:
    """Keep a row with median and range of ``ratios``, and whether the median meets ``goal``."""
    median = statistics.median(ratios)
    row = columns | {"median": median, "range": [min(ratios), max(ratios)], "rounds": len(ratios)}
    row["ratios"] = ratios
    if goal is not None and not QUICK:  # (a target is about real sizes)
        sign, limit = goal
        row |= {"goal": f"{sign} {limit:g}", "met": median <= limit if sign == "<=" else median >= limit}
    ROWS.append(row)
    return row


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # what the libraries hold is not looked at again


@pytest.fixture
def compare(benchmark: Any) -> Iterator[Compare]:
    yield Compare(benchmark)
    gc.collect()  # training SAEs hang in cycles with their optimisers


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of eight blocks with a tokenizer of its own: a language model whose pass costs little."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        texts()[: 20 if QUICK else 400], vocab_size=600 if QUICK else 4000, special_tokens=["<s>"]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="<s>", model_max_length=256
    )
    config = LlamaConfig(
        num_hidden_layers=8,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        initializer_range=0.2,  # with the default 0.02 so small a model hardly does anything
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("small-llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def load(small_folder: Path) -> Callable[..., Any]:
    """``load(backend, small=False)``: SmolLM2-135M (bfloat16 on a GPU), or the small Llama; each once."""

    @cache
    def loaded(backend: str, small: bool = QUICK) -> Any:
        dtype = "bfloat16" if DEVICE == "cuda" else "float32"
        return rl.load_model(small_folder if small else "demo", backend, device=DEVICE, dtype=dtype).eval()

    return loaded


def texts() -> list[str]:
    return pd.read_parquet(rl.demo_text_path())["text"].tolist()


def tokens_of(model: Any, n_sequences: int = 2 if QUICK else 4, context: int = 32 if QUICK else 128) -> Any:
    """Real text in full contexts."""
    return rl.held_out_tokens(model, texts(), n_sequences=n_sequences, context_size=context).to(DEVICE)


def model_name(small: bool = QUICK) -> str:
    return "a random Llama, 8 blocks, d 64" if small else "SmolLM2-135M"


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not ROWS:
        return
    report.write(OUTPUT, {"machine": machine(), "quick": QUICK, "rows": ROWS})
    print(f"\nwrote {report.TABLE} and {report.RESULTS}")


def machine() -> dict[str, Any]:
    """What the numbers depend on; no names of hosts or folders."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if DEVICE == "cuda" else None,
        "dtype": "bfloat16 (autocast for SAEs)" if DEVICE == "cuda" else "float32",
        "python": platform.python_version(),
        "versions": versions,
    }


def _processor() -> str:
    try:
        import cpuinfo  # comes with pytest-benchmark

        return str(cpuinfo.get_cpu_info()["brand_raw"])
    except (ImportError, KeyError):
        return platform.processor() or platform.machine()
