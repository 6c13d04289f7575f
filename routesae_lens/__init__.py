"""RouteSAE for SAELens and TransformerLens: sparse autoencoders that read several layers.

Importing this package registers its SAE architectures with SAELens. The names below follow the flow:
model -> multi-layer hook point -> route -> shared SAE -> trainer -> splice -> evaluate.
"""

from importlib.metadata import version

from routesae_lens.analysis.evaluate import SpliceEvaluator, evaluate, evaluate_all, held_out_tokens
from routesae_lens.analysis.metrics import Evaluation, kl_per_token
from routesae_lens.backends import backend_of
from routesae_lens.demo import demo_model_path, demo_text_path
from routesae_lens.hook_points import (
    default_layers,
    join_layers,
    mount_layers,
    mounted_points,
    parse_layers,
    split_layers,
    unmount_layers,
)
from routesae_lens.models import default_device, load_model
from routesae_lens.saes.architectures import (
    ROUTE_ARCHITECTURES,
    RouteBatchTopKTrainingSAE,
    RouteBatchTopKTrainingSAEConfig,
    RouteGatedSAE,
    RouteGatedSAEConfig,
    RouteGatedTrainingSAE,
    RouteGatedTrainingSAEConfig,
    RouteJumpReLUSAE,
    RouteJumpReLUSAEConfig,
    RouteJumpReLUTrainingSAE,
    RouteJumpReLUTrainingSAEConfig,
    RouteMatryoshkaBatchTopKTrainingSAE,
    RouteMatryoshkaBatchTopKTrainingSAEConfig,
    RouteStandardSAE,
    RouteStandardSAEConfig,
    RouteStandardTrainingSAE,
    RouteStandardTrainingSAEConfig,
    RouteTopKSAE,
    RouteTopKSAEConfig,
    RouteTopKTrainingSAE,
    RouteTopKTrainingSAEConfig,
)
from routesae_lens.saes.authors import from_authors_checkpoint
from routesae_lens.saes.route_sae import RouteSAE, RouteTrainingSAE, inference_form
from routesae_lens.saes.router import AGGREGATORS, ROUTINGS, Route, standardize
from routesae_lens.splice.hooked import HookedRouteSAETransformer, RouteSAETransformerBridge
from routesae_lens.training.data import load_text
from routesae_lens.training.interruption import TrainingInterrupted
from routesae_lens.training.train import TrainingResult, train

__all__ = [
    "AGGREGATORS",
    "ROUTE_ARCHITECTURES",
    "ROUTINGS",
    "Evaluation",
    "HookedRouteSAETransformer",
    "Route",
    "RouteBatchTopKTrainingSAE",
    "RouteBatchTopKTrainingSAEConfig",
    "RouteGatedSAE",
    "RouteGatedSAEConfig",
    "RouteGatedTrainingSAE",
    "RouteGatedTrainingSAEConfig",
    "RouteJumpReLUSAE",
    "RouteJumpReLUSAEConfig",
    "RouteJumpReLUTrainingSAE",
    "RouteJumpReLUTrainingSAEConfig",
    "RouteMatryoshkaBatchTopKTrainingSAE",
    "RouteMatryoshkaBatchTopKTrainingSAEConfig",
    "RouteSAE",
    "RouteSAETransformerBridge",
    "RouteStandardSAE",
    "RouteStandardSAEConfig",
    "RouteStandardTrainingSAE",
    "RouteStandardTrainingSAEConfig",
    "RouteTopKSAE",
    "RouteTopKSAEConfig",
    "RouteTopKTrainingSAE",
    "RouteTopKTrainingSAEConfig",
    "RouteTrainingSAE",
    "SpliceEvaluator",
    "TrainingInterrupted",
    "TrainingResult",
    "backend_of",
    "default_device",
    "default_layers",
    "demo_model_path",
    "demo_text_path",
    "evaluate",
    "evaluate_all",
    "from_authors_checkpoint",
    "held_out_tokens",
    "inference_form",
    "join_layers",
    "kl_per_token",
    "load_model",
    "load_text",
    "mount_layers",
    "mounted_points",
    "parse_layers",
    "split_layers",
    "standardize",
    "train",
    "unmount_layers",
]
__version__ = version("routesae-lens")
