"""Feature dashboards of a saved layer view in Neuronpedia's upload format, by sae-dashboard's own runner.

    python recipes/tools/neuronpedia.py runs/views blocks.10.hook_resid_post --batches 2 --output runs/neuronpedia

Only the model is loaded by other means (``local_model.py``), because the runner knows official model names only.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from local_model import load_local
from sae_dashboard.neuronpedia import neuronpedia_runner
from sae_dashboard.neuronpedia.neuronpedia_runner import NeuronpediaRunner
from sae_dashboard.neuronpedia.neuronpedia_runner_config import NeuronpediaRunnerConfig
from sae_lens import ActivationsStore
from safetensors.torch import load_file


class LocalRunner(NeuronpediaRunner):
    """The runner on a local model and on given tokens."""

    def __init__(self, cfg: NeuronpediaRunnerConfig, model_folder: str, tokens: Any):
        self.model_folder, self.given_tokens = model_folder, tokens
        super().__init__(cfg)

    def _extract_model_info(self) -> None:
        super()._extract_model_info()
        self.model_id: str = Path(self.model_folder).name  # it becomes part of a folder's name
        self.cfg.model_id = self.model_id

    def _initialize_model(self) -> None:
        self.model = load_local(self.model_folder)
        self.hook_name = self.sae.cfg.metadata.hook_name

    def _setup_activation_store(self) -> None:
        self.sae.cfg.metadata.context_size = self.cfg.n_tokens_in_prompt
        self.activations_store = ActivationsStore.from_sae(
            model=self.model,
            sae=self.sae,
            dataset=Dataset.from_dict({"tokens": self.given_tokens.tolist()}),
            streaming=False,
            context_size=self.cfg.n_tokens_in_prompt,
            disable_concat_sequences=True,
        )
        self.cached_activations_dir = Path(self.cfg.outputs_dir) / "cached_activations"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path, help="folder written by export_layer_views.py")
    parser.add_argument("view", help="folder of one view in it, its hook name")
    parser.add_argument("--set-name", default="routesae", help="name of the set on Neuronpedia")
    parser.add_argument("--features-per-batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=None, help="stop after so many; all by default")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    tokens = load_file(args.export / "tokens.safetensors")["tokens"]
    config = NeuronpediaRunnerConfig(
        sae_set=args.set_name,
        sae_path=str(args.export / "views" / args.view),
        outputs_dir=str(args.output),
        from_local_sae=True,
        huggingface_dataset_path="local",
        n_prompts_total=len(tokens),
        n_tokens_in_prompt=tokens.shape[1],
        n_prompts_in_forward_pass=16,
        n_features_at_a_time=args.features_per_batch,
        end_batch=None if args.batches is None else args.batches - 1,
        ignore_positions=[0],
    )
    model = json.loads((args.export / "about.json").read_text())["model"]
    runner = LocalRunner(config, model, tokens)
    runner.run()
    written = sorted(Path(runner.cfg.outputs_dir).glob("batch-*.json"))
    for file in written:
        features = json.loads(file.read_text())["features"]
        alive = sum(bool(feature["activations"]) for feature in features)
        print(f"{file}: {len(features)} features, {alive} with activations")
    print(f"{neuronpedia_runner.RUN_SETTINGS_FILE} and {len(written)} batches in {runner.cfg.outputs_dir}")


if __name__ == "__main__":
    main()
