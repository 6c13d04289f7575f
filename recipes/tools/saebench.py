"""SAEBench's core evaluation of saved layer views. See README.md in this folder.

    python recipes/tools/saebench.py runs/views --output runs/saebench

``multiple_evals`` loads a model by its official name; this calls what it calls, with a local one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from datasets import Dataset
from local_model import load_local
from sae_bench.evals.core import main as core
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.sae_bench_utils import (
    general_utils,
    get_eval_uuid,
    get_sae_bench_version,
    get_sae_lens_version,
)
from sae_lens import SAE, ActivationsStore
from safetensors.torch import load_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path, help="folder written by export_layer_views.py")
    parser.add_argument("--release", default="routesae", help="name of the set of SAEs in the results")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    about = json.loads((args.export / "about.json").read_text())
    model = load_local(about["model"])
    tokens = load_file(args.export / "tokens.safetensors")["tokens"]
    args.output.mkdir(parents=True, exist_ok=True)
    for folder in sorted((args.export / "views").iterdir()):
        sae = SAE.load_from_disk(folder)
        sae.fold_W_dec_norm()  # as SAEBench does with SAEs that it loads itself
        _, sae, _ = general_utils.load_and_format_sae(args.release, sae, "cpu")
        store = ActivationsStore.from_sae(
            model,
            sae,
            dataset=Dataset.from_dict({"tokens": tokens.tolist()}),
            context_size=tokens.shape[1],
            streaming=False,
        )
        config = CoreEvalConfig(
            model_name=Path(about["model"]).name,
            batch_size_prompts=args.batch_size,
            n_eval_reconstruction_batches=args.batches,
            n_eval_sparsity_variance_batches=args.batches,
            exclude_special_tokens_from_reconstruction=True,
            dataset="local",
            context_size=tokens.shape[1],
            compute_kl=True,
            compute_ce_loss=True,
            compute_l2_norms=True,
            compute_sparsity_metrics=True,
            compute_variance_metrics=True,
            compute_featurewise_density_statistics=True,
            compute_featurewise_weight_based_metrics=True,
        )
        tokenizer = model.tokenizer
        special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
        metrics, feature_metrics = core.run_evals(
            sae, store, model, eval_config=config, ignore_tokens=special, verbose=True
        )
        metrics["misc_metrics"] = core.calculate_misc_metrics(feature_metrics)
        result = {"eval_cfg": config, "metrics": metrics, "feature_metrics": feature_metrics}
        result |= {
            "sae_set": args.release,
            "sae_id": folder.name,
            "unique_id": f"{args.release}_{folder.name}",
        }
        path = args.output / f"{args.release}_{folder.name}_eval_results.json"
        core.save_single_eval_result(
            core.replace_nans_with_negative_one(result),
            get_eval_uuid(),
            get_sae_lens_version(),
            get_sae_bench_version(),
            str(path),
            sae,
        )
        print(path, json.dumps(metrics, indent=1))


if __name__ == "__main__":
    main()
