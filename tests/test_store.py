"""``ActivationsStore.from_sae`` mounts a RouteSAE's hook point by itself, and touches nothing else."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import ActivationsStore, StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata

from routesae_lens.hook_points import mounted_points
from routesae_lens.saes import store as store_module
from routesae_lens.saes.architectures import RouteTopKSAE, RouteTopKSAEConfig

BACKENDS = ["tiny_hooked", "tiny_bridge", "tiny_proxy"]


def metadata(**kwargs: Any) -> SAEMetadata:
    return SAEMetadata(context_size=8, prepend_bos=False, model_name="tiny", **kwargs)


def dataset() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    return Dataset.from_dict({"tokens": torch.randint(3, 60, (40, 8), generator=generator).tolist()})


def store_of(model, sae, **kwargs) -> ActivationsStore:
    kwargs = {
        "store_batch_size_prompts": 4,
        "n_batches_in_buffer": 4,
        "train_batch_size_tokens": 16,
        **kwargs,
    }
    return ActivationsStore.from_sae(model, sae, dataset(), streaming=False, total_tokens=100, **kwargs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mounted", [False, True])
def test_a_route_sae_is_mounted(backend, mounted, request):
    model = request.getfixturevalue(backend)
    if backend == "tiny_hooked":
        model.tokenizer = request.getfixturevalue("tiny_proxy").tokenizer
    sae = RouteTopKSAE(RouteTopKSAEConfig(d_in=3 * 32, d_sae=16, k=2, layers=[1, 2, 4], metadata=metadata()))
    if mounted:
        sae.mount(model)
    store = store_of(model, sae)
    (name,) = mounted_points(model)
    assert store.hook_name == name
    assert name.startswith("model.layers.4." if backend == "tiny_proxy" else "blocks.4.")
    tokens = store.get_batch_tokens(2)
    acts = store.get_activations(tokens)
    assert torch.equal(acts.squeeze(2), model.run_with_cache(tokens, names_filter=[name])[1][name])
    batch = next(iter(store.get_data_loader()))
    assert sae(batch.squeeze(1)).shape == (16, 32)


def test_keywords_and_subclasses(tiny_hooked, tiny_proxy):
    class Store(ActivationsStore):
        pass

    tiny_hooked.tokenizer = tiny_proxy.tokenizer
    sae = RouteTopKSAE(RouteTopKSAEConfig(d_in=64, d_sae=16, k=2, layers=[1, 4], metadata=metadata()))
    store = Store.from_sae(model=tiny_hooked, sae=sae, dataset=dataset(), streaming=False, total_tokens=100)
    assert type(store) is Store and store.hook_name in tiny_hooked.hook_dict


def test_a_model_of_another_size_is_refused(tiny_hooked):
    sae = RouteTopKSAE(RouteTopKSAEConfig(d_in=40, d_sae=16, k=2, layers=[1, 4], metadata=metadata()))
    with pytest.raises(ValueError, match="d_model = 20"):
        store_of(tiny_hooked, sae)


def test_other_saes_pass_through(tiny_hooked, tiny_proxy):
    tiny_hooked.tokenizer = tiny_proxy.tokenizer
    stock = StandardSAE(
        StandardSAEConfig(d_in=32, d_sae=16, metadata=metadata(hook_name="blocks.2.hook_resid_post"))
    )
    store = store_of(tiny_hooked, stock)
    assert store.hook_name == "blocks.2.hook_resid_post" and mounted_points(tiny_hooked) == []
    stock.cfg.metadata.hook_name = None
    with pytest.raises(ValueError, match="hook_name is required"):
        store_of(tiny_hooked, stock)


def test_loading_the_module_again_wraps_saelens_own_methods_once(tiny_hooked):
    importlib.reload(store_module)
    for name in ("from_sae", "from_config", "from_config_multi_hook"):
        installed = getattr(ActivationsStore, name).__func__
        stock = installed.__wrapped__  # (what wraps us in the tests, for the shapes, keeps this)
        assert installed.__globals__ is not stock.__globals__ and not hasattr(stock, "__wrapped__")
        assert stock.__globals__["__name__"] == "sae_lens.training.activations_store"
    hook = "blocks.4.hook_resid_post_stack_2_4"
    store = ActivationsStore.from_config_multi_hook(
        tiny_hooked,
        dataset=Dataset.from_dict({"tokens": [[5] * 8] * 8}),
        hook_names=[hook],
        hook_d_ins={hook: 64},
        context_size=8,
        streaming=False,
    )
    acts = store.get_multi_hook_activations(store.get_batch_tokens(2))
    assert acts[hook].shape == (2, 8, 64)
