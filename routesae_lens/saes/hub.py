"""RouteSAEs and Crosscoders on the Hugging Face hub, through SAELens' own upload and load paths.

SAELens uploads any SAE (``upload_saes_to_huggingface``) and ``SAE.from_pretrained(repo_id, sae_id)`` loads a
registered architecture from any repository, so RouteSAEs need neither a format nor a loader of their own.
What is added here: a model card that says what the SAE is, local paths kept out of the uploaded configs, and
:func:`load_from_hub` for a fixed revision, which ``SAE.from_pretrained`` cannot name.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, create_repo, hf_hub_download, upload_file
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from sae_lens import SAE, TrainingSAE, upload_saes_to_huggingface
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from routesae_lens.saes.forms import inference_form

PACKAGE = "routesae-lens"
CITATION = """@misc{shi2025routesae,
  title = {Route Sparse Autoencoder to Interpret Large Language Models},
  author = {Shi, Wei and Li, Sihang and Liang, Tao and Wan, Mingyang and Ma, Guojun and Wang, Xiang and He, Xiangnan},
  year = {2025},
  eprint = {2503.08200},
  archivePrefix = {arXiv}
}"""

# What a card shows, in this order: a config field and what it is called there.
_FIELDS = {
    "layers": "Blocks read",
    "site": "Site",
    "d_model": "d_model",
    "d_sae": "Latents",
    "k": "k",
    "n_experts": "Experts",
    "active_experts": "Experts per token",
    "expert_weights": "Weights of experts",
    "relu": "ReLU after TopK",
    "standardize": "Each token's activations standardised",
    "normalize_activations": "SAELens input normalisation",
    "apply_b_dec_to_input": "Decoder bias subtracted from the input",
    "rescale_acts_by_decoder_norm": "Latents in units of the decoder norm",
    "dtype": "dtype",
}
_ROUTER = {
    "routing": "Routing",
    "aggregator": "Router input: layers pooled by",
    "fixed_layer": "Fixed block",
    "random_per": "Random per",
    "layer_scale": "Learned factor per layer",
}
_RECORDED = {
    "model_name": "Model",
    "hook_name": "Hook",
    "dataset_path": "Data",
    "context_size": "Context",
    "prepend_bos": "BOS prepended",
    "training_architecture": "Training architecture",
    "sae_lens_version": "SAELens",
}
_METRICS = {
    "tokens": "Tokens",
    "kl": "KL(original ‖ spliced), nats per token",
    "kl_stderr": "... its standard error over sequences",
    "delta_ce": "ΔCE, nats per token",
    "loss_recovered": "Loss recovered",
    "norm_mse": "NormMSE",
    "explained_variance": "Explained variance",
    "l0": "L0",
    "dead_latents": "Dead latents",
    "mean_p": "Mean p of the chosen layer",
    "entropy": "Routing entropy, nats",
    "splice": "Splice",
}


def push_to_hub(
    saes: Mapping[str, Any],
    repo_id: str,
    *,
    evaluations: Mapping[str, str | Path | Mapping[str, Any]] | None = None,
    license: str | None = None,
    revision: str = "main",
    private: bool | None = None,
    show_progress: bool = True,
) -> ModelCard:
    """Upload SAEs, each to a folder of its own, and a model card.

    The login is huggingface_hub's (``hf auth login`` or ``HF_TOKEN``). Paths of this machine in the SAEs'
    metadata (a model or data set loaded from a folder) are cut to their last part.

    Args:
        saes: SAEs by the folder (``sae_id``) they get; training SAEs are uploaded in their inference form.
        repo_id: ``owner/name``; the repository is made if it does not exist.
        evaluations: for the card: ``Evaluation.to_dict()`` or a JSON file of it, by the same names.
        license: identifier of the weights' licence, as the hub knows it ("mit", "apache-2.0", ...).
        revision: branch.
        private: of a new repository; None: the account's default.
        show_progress: show progress bars.

    Returns:
        The card that was uploaded. A card that is there already is replaced.

    Raises:
        ValueError: no SAEs, something that is no SAE, a folder that is no plain relative path, or an
            evaluation that is not readable or has no SAE.
        huggingface_hub.errors.HfHubHTTPError: the hub refused.
    """
    inference = _inference_forms(saes)
    card = model_card(inference, repo_id, evaluations=evaluations, license=license)
    create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folders: dict[str, SAE[Any] | Path | str] = {}
        for number, (sae_id, sae) in enumerate(inference.items()):
            folders[sae_id] = folder = Path(scratch) / str(number)
            sae.save_model(folder)
            _without_local_paths(folder / SAE_CFG_FILENAME)
        upload_saes_to_huggingface(
            folders, repo_id, hf_revision=revision, show_progress=show_progress, add_default_readme=False
        )
        upload_file(
            path_or_fileobj=str(card).encode(),
            path_in_repo="README.md",
            repo_id=repo_id,
            revision=revision,
            commit_message="Model card",
        )
    return card


def load_from_hub(
    repo_id: str,
    sae_id: str,
    *,
    revision: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
) -> SAE[Any]:
    """Load one SAE of a repository, at a fixed revision if one is given.

    ``SAE.from_pretrained(repo_id, sae_id)`` loads the same from the branch main, always as float32 unless
    told otherwise; this keeps the dtype that was saved.

    Args:
        repo_id: ``owner/name``, or a local folder laid out like one.
        sae_id: folder of the SAE in it.
        revision: branch, tag or commit.
        device: where to.
        dtype: of the weights, such as "bfloat16"; None keeps that of the file.

    Raises:
        ValueError: no such SAE in the repository, a name that leads out of it, or a revision of a local folder.
        huggingface_hub.errors.HfHubHTTPError: no such repository or revision.
    """
    _check_folder(sae_id)
    names = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME)
    if not Path(repo_id).is_dir():
        try:
            paths = [hf_hub_download(repo_id, f"{sae_id}/{name}", revision=revision) for name in names]
        except LocalEntryNotFoundError:  # offline, and not in the cache
            raise
        except EntryNotFoundError as error:
            raise ValueError(f"{repo_id} holds no SAE {sae_id!r}: {error}") from error
        return SAE.load_from_disk(Path(paths[0]).parent, device=device, dtype=dtype)
    if revision is not None:
        raise ValueError(f"{repo_id} is a local folder, which has no revision {revision!r}")
    folder = Path(repo_id) / sae_id
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{repo_id} holds no SAE {sae_id!r}: no {' and no '.join(missing)} there")
    return SAE.load_from_disk(folder, device=device, dtype=dtype)


def model_card(
    saes: Mapping[str, Any],
    repo_id: str,
    *,
    evaluations: Mapping[str, str | Path | Mapping[str, Any]] | None = None,
    license: str | None = None,
) -> ModelCard:
    """The card that :func:`push_to_hub` uploads: what the SAEs are, their metrics, how to load and cite them.

    Args and errors are those of :func:`push_to_hub`.
    """
    inference = _inference_forms(saes)
    metrics = {name: _evaluation(name, given) for name, given in (evaluations or {}).items()}
    if unknown := sorted(set(metrics) - set(inference)):
        raise ValueError(f"evaluations of {unknown}, which are none of the SAEs {sorted(inference)}")
    parts = [
        f"# {repo_id.rsplit('/', 1)[-1]}",
        "Sparse autoencoders over several layers of a language model, made with "
        f"{PACKAGE}, for [SAELens](https://github.com/decoderesearch/SAELens).",
        _how_to_load(repo_id, inference),
        *(_section(sae_id, sae, metrics.get(sae_id)) for sae_id, sae in inference.items()),
        "## Licence\n\n" + (f"`{license}`" if license else "The uploader has stated none."),
        f"## Citation\n\n```bibtex\n{CITATION}\n```",
    ]
    bases = {_last_part(str(sae.cfg.metadata.model_name)) for sae in inference.values()} - {"None", ""}
    data = ModelCardData(
        library_name="saelens",
        license=license,
        tags=["sparse-autoencoder", "interpretability", PACKAGE],
        base_model=sorted(bases) if all("/" in base for base in bases) and bases else None,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _inference_forms(saes: Mapping[str, Any]) -> dict[str, SAE[Any]]:
    if not saes:
        raise ValueError("no SAEs given")
    for sae_id, sae in saes.items():
        if not isinstance(sae, SAE):
            raise ValueError(f"expected an SAE under {sae_id!r}, got {type(sae).__name__}")
        _check_folder(sae_id)
    return {i: inference_form(sae) if isinstance(sae, TrainingSAE) else sae for i, sae in saes.items()}


def _check_folder(sae_id: str) -> None:
    if not PurePath(sae_id).parts or {"..", ".", ""} & set(sae_id.split("/")):
        raise ValueError(f"{sae_id!r} is no folder inside a repository, such as 'k32' or 'smollm2/k32'")


def _evaluation(name: str, given: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(given, Mapping):
        return given
    try:
        read = json.loads(Path(given).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"the evaluation of {name!r} is not readable: {given}: {error}") from error
    if not isinstance(read, dict):
        raise ValueError(f"{given} holds no evaluation of {name!r}: expected a JSON object")
    return read


def _how_to_load(repo_id: str, saes: Mapping[str, SAE[Any]]) -> str:
    first = next(iter(saes))
    return f"""## Load

```python
import routesae_lens  # registers the architectures with SAELens
from sae_lens import SAE

sae = SAE.from_pretrained({repo_id!r}, {first!r})
```

`routesae_lens.load_from_hub({repo_id!r}, {first!r}, revision=...)` loads a fixed revision. Where the package is not
installed, use the single layers that `sae.save_layer_views(path)` writes: each is an ordinary SAELens SAE."""


def _section(sae_id: str, sae: SAE[Any], metrics: Mapping[str, Any] | None) -> str:
    rows = [("Architecture", f"`{sae.cfg.architecture()}`"), *_rows(sae.cfg, _FIELDS)]
    if hasattr(sae.cfg, "routing"):
        rows += _rows(sae.cfg, _ROUTER)
    recorded = [
        (label, _text(_last_part(value) if isinstance(value, str) else value))
        for name, label in _RECORDED.items()
        if (value := sae.cfg.metadata.get(name)) not in (None, "")
    ]
    parts = [f"## `{sae_id}`", _table(("", ""), rows), "Recorded at training:", _table(("", ""), recorded)]
    if not recorded:
        parts = parts[:2]
    if metrics is None:
        return "\n\n".join([*parts, "No evaluation was given."])
    shown = [
        (label, _text(metrics[name])) for name, label in _METRICS.items() if metrics.get(name) is not None
    ]
    parts.append(_table(("Metric", "Value"), shown))
    if shares := metrics.get("layer_share"):
        parts.append(
            _table(
                ("Block", "Share of tokens"),
                [(_text(block), f"{share:.1%}") for block, share in shares.items()],
            )
        )
    return "\n\n".join(parts)


def _rows(cfg: Any, names: Mapping[str, str]) -> list[tuple[str, str]]:
    values = {label: getattr(cfg, name, None) for name, label in names.items()}
    return [(label, _text(value)) for label, value in values.items() if value is not None]


def _text(value: Any) -> str:
    """A value for a cell of a Markdown table: nothing in it can end the cell or become HTML."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")


def _table(header: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [f"| {one} | {other} |" for one, other in (header, ("---", "---"), *rows)]
    return "\n".join(lines)


def _last_part(value: str) -> str:
    """``value``, or the last part of it where it is a path on this machine."""
    local = Path(value).is_absolute() or value.startswith((".", "~")) or "\\" in value
    return PurePath(value.replace("\\", "/")).name if local else value


def _without_local_paths(cfg_file: Path) -> None:
    cfg = json.loads(cfg_file.read_text(encoding="utf-8"))
    for name in ("model_name", "dataset_path"):
        if isinstance(cfg["metadata"].get(name), str):
            cfg["metadata"][name] = _last_part(cfg["metadata"][name])
    cfg_file.write_text(json.dumps(cfg), encoding="utf-8")
