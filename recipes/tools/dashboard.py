"""A page of features from a saved layer view, by sae-dashboard. See README.md in this folder.

python recipes/tools/dashboard.py runs/views blocks.10.hook_resid_post --features 16 --output page.html
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from local_model import load_local
from sae_dashboard.data_writing_fns import save_feature_centric_vis
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_lens import SAE
from safetensors.torch import load_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path, help="folder written by export_layer_views.py")
    parser.add_argument("view", help="folder of one view in it, its hook name")
    parser.add_argument("--features", type=int, default=16, help="how many, the most frequent ones first")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    model = load_local(json.loads((args.export / "about.json").read_text())["model"])
    tokens = load_file(args.export / "tokens.safetensors")["tokens"]
    sae = SAE.load_from_disk(args.export / "views" / args.view)
    features = most_frequent(sae, model, tokens, args.view, args.features)
    special = {model.tokenizer.bos_token_id, model.tokenizer.eos_token_id, model.tokenizer.pad_token_id}
    config = SaeVisConfig(
        hook_point=args.view,
        features=features,
        minibatch_size_tokens=16,
        ignore_tokens={token for token in special if token is not None},
        ignore_positions=[0],
        verbose=True,
    )
    data = SaeVisRunner(config).run(encoder=sae, model=model, tokens=tokens)
    save_feature_centric_vis(data, args.output)
    print(f"{len(data.feature_data_dict)} features on {tokens.numel()} tokens: {args.output}")


@torch.no_grad()
def most_frequent(sae: SAE, model: object, tokens: torch.Tensor, hook: str, n: int) -> list[int]:
    counts = torch.zeros(sae.cfg.d_sae)
    for batch in tokens.split(16):
        _, cache = model.run_with_cache(batch, names_filter=[hook])  # type: ignore[attr-defined]
        counts += sae.encode(cache[hook][:, 1:]).bool().sum((0, 1))
    # Not those that fire nearly everywhere: their pages say nothing.
    counts[counts > 0.2 * tokens.numel()] = 0
    return counts.topk(n).indices.tolist()


if __name__ == "__main__":
    main()
