"""Write layer views of a RouteSAE for sae-dashboard, SAEBench and Neuronpedia, and say what they leave out.

The tools run in environments of their own (recipes/tools/README.md) and never import routesae_lens. They get a
folder: one SAELens SAE per layer, token ids to run on, and where the language model lies.

    python recipes/export_layer_views.py RUN_OR_SAE_FOLDER --layers 10,16 --output runs/views
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from sae_lens import SAE, TrainingSAE
from safetensors.torch import save_file

from routesae_lens import (
    RouteSAE,
    compare_views,
    demo_model_path,
    held_out_tokens,
    inference_form,
    load_model,
    load_text,
    parse_layers,
)


def main(
    sae: Annotated[Path, typer.Argument(help="folder of a RouteSAE, or of one member of a checkpoint")],
    output: Annotated[Path, typer.Option(help="new folder")],
    layers: Annotated[str | None, typer.Option(help="blocks, such as 10,16 or 6:21; all by default")] = None,
    model: Annotated[str, typer.Option(help="local folder in Hugging Face format, or demo")] = "demo",
    dataset: Annotated[str, typer.Option(help="text, as for routesae-lens train")] = "demo",
    sequences: Annotated[int, typer.Option(help="sequences of text for the tools")] = 64,
    context_size: Annotated[int, typer.Option()] = 128,
) -> None:
    if output.exists():
        raise typer.BadParameter(f"{output} exists", param_hint="--output")
    folder = demo_model_path() if model == "demo" else Path(model).expanduser()
    if not folder.is_dir():
        raise typer.BadParameter(f"{folder} is no folder; the tools need one", param_hint="--model")
    route_sae = load_route_sae(sae)
    chosen = None if layers is None else parse_layers(layers)
    route_sae.save_layer_views(output / "views", chosen)

    language_model = load_model(str(folder))
    texts = (str(row["text"]) for row in load_text(dataset))
    tokens = held_out_tokens(language_model, texts, n_sequences=sequences, context_size=context_size)
    save_file({"tokens": tokens.to(torch.int64)}, output / "tokens.safetensors")
    differences = [one.to_dict() for one in compare_views(route_sae, language_model, tokens, chosen)]
    (output / "differences.json").write_text(json.dumps(differences, indent=1), encoding="utf-8")
    about = {"model": str(folder.resolve()), "sae": str(sae.resolve()), "sequences": list(tokens.shape)}
    (output / "about.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    for one in differences:
        print(", ".join(f"{name} {_short(value)}" for name, value in one.items()))


def load_route_sae(folder: Path) -> RouteSAE:
    cfg = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
    in_training = "decoder_init_norm" in cfg  # a checkpoint's member holds the config of training
    loaded: Any = TrainingSAE.load_from_disk(folder) if in_training else SAE.load_from_disk(folder)
    route_sae = inference_form(loaded) if in_training else loaded
    if not isinstance(route_sae, RouteSAE):
        raise typer.BadParameter(f"{folder} holds a {type(route_sae).__name__}, not a RouteSAE")
    return route_sae


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    typer.run(main)
