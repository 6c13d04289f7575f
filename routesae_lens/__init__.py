"""RouteSAE for SAELens and TransformerLens: sparse autoencoders that read several layers.

Importing this package registers its SAE architectures with SAELens. The names below follow the flow:
model -> multi-layer hook point -> route -> shared SAE -> trainer -> splice -> evaluate.
"""

from importlib.metadata import version

from routesae_lens.analysis.completions import Completion, GenerationOptions, complete
from routesae_lens.analysis.evaluate import SpliceEvaluator, evaluate, evaluate_all, held_out_tokens
from routesae_lens.analysis.feature_map import FeatureMap, feature_map
from routesae_lens.analysis.feature_set import (
    BlockActivity,
    Context,
    Feature,
    FeatureRule,
    FeatureSet,
    feature_count_curves,
)
from routesae_lens.analysis.features import collect_features
from routesae_lens.analysis.firing import Firing, firing_frequencies
from routesae_lens.analysis.generalisation import (
    LongDocuments,
    PositionBin,
    PositionProfile,
    evaluate_by_position,
    long_documents,
)
from routesae_lens.analysis.geometry import (
    BestMatches,
    Neighbours,
    best_matches,
    cosine_bound,
    decoder_directions,
    nearest_across,
    nearest_within,
)
from routesae_lens.analysis.jumprelu import Comparison, Conversion, compare_conversion, to_jumprelu
from routesae_lens.analysis.layer_profiles import LayerProfiles, layer_profiles
from routesae_lens.analysis.match_distribution import MatchDistribution, match_distribution
from routesae_lens.analysis.metrics import Evaluation
from routesae_lens.analysis.model_comparison import ModelComparison, compare_models
from routesae_lens.analysis.next_tokens import kl_per_token
from routesae_lens.analysis.prompts import Conversations, Prompt, conversation_tokens
from routesae_lens.analysis.routing import RoutingProfile, analyse_routing, training_shares
from routesae_lens.analysis.steering import (
    DoseResponse,
    DoseRow,
    SteeredPair,
    dose_response,
    steer_completions,
)
from routesae_lens.analysis.stream import Batch, kept_tokens, read_batches, subjects_of
from routesae_lens.analysis.token_classes import TOKEN_CLASSES, class_table, token_class
from routesae_lens.analysis.view_differences import ViewDifference, compare_views
from routesae_lens.backends import backend_of
from routesae_lens.demo import demo_model_path, demo_text_path
from routesae_lens.hook_points import (
    default_layers,
    join_layers,
    mount_layers,
    mount_sites,
    mounted_points,
    parse_layers,
    split_layers,
    unmount_layers,
)
from routesae_lens.models import default_device, load_model
from routesae_lens.report.agreement import Agreement, agreement, plot_agreement
from routesae_lens.report.endpoint_judge import EndpointJudge
from routesae_lens.report.geometry_record import GeometryRecord
from routesae_lens.report.interpret import Estimate, estimate_interpretation, interpret, sample_features
from routesae_lens.report.interpretations import Interpretations, MeanScore, Usage
from routesae_lens.report.judges import Judge, JudgeError, JudgeRefused, Reply
from routesae_lens.report.local_judge import LocalJudge
from routesae_lens.report.page import Report, write_report
from routesae_lens.report.people_form import read_form, write_form
from routesae_lens.report.prompt import Interpretation, build_prompt, parse_answer
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
from routesae_lens.saes.crosscoder import (
    CROSSCODER_ARCHITECTURES,
    Crosscoder,
    CrosscoderBatchTopKTrainingSAE,
    CrosscoderBatchTopKTrainingSAEConfig,
    CrosscoderJumpReLUSAE,
    CrosscoderJumpReLUSAEConfig,
    CrosscoderStandardSAE,
    CrosscoderStandardSAEConfig,
    CrosscoderStandardTrainingSAE,
    CrosscoderStandardTrainingSAEConfig,
    CrosscoderTopKSAE,
    CrosscoderTopKSAEConfig,
    CrosscoderTopKTrainingSAE,
    CrosscoderTopKTrainingSAEConfig,
)
from routesae_lens.saes.hub import load_from_hub, model_card, push_to_hub
from routesae_lens.saes.k_annealing import AnnealedTopKTrainingSAE, AnnealedTopKTrainingSAEConfig
from routesae_lens.saes.layers import standardize
from routesae_lens.saes.route_sae import RouteSAE, RouteTrainingSAE, inference_form, with_routing
from routesae_lens.saes.router import AGGREGATORS, ROUTINGS, Route
from routesae_lens.saes.transcoder import (
    TRANSCODER_ARCHITECTURES,
    StandardTranscoderTrainingSAE,
    StandardTranscoderTrainingSAEConfig,
    TopKTranscoderTrainingSAE,
    TopKTranscoderTrainingSAEConfig,
    calibrate,
)
from routesae_lens.splice.edits import Ablate, Add, Edit, Scale, Set
from routesae_lens.splice.hooked import HookedRouteSAETransformer, RouteSAETransformerBridge
from routesae_lens.splice.replace import splice_hooks
from routesae_lens.training.data import load_text
from routesae_lens.training.interruption import TrainingInterrupted
from routesae_lens.training.memory import MemoryEstimate, estimate_memory
from routesae_lens.training.methods import METHODS, Method, make_config
from routesae_lens.training.positions import scope_configs
from routesae_lens.training.presets import PRESETS, Preset
from routesae_lens.training.sweep import SweepResult, sweep
from routesae_lens.training.sweep_config import SweepConfig
from routesae_lens.training.train import TrainingResult, train

__all__ = [
    "AGGREGATORS",
    "CROSSCODER_ARCHITECTURES",
    "METHODS",
    "PRESETS",
    "ROUTE_ARCHITECTURES",
    "ROUTINGS",
    "TOKEN_CLASSES",
    "TRANSCODER_ARCHITECTURES",
    "Ablate",
    "Add",
    "Agreement",
    "AnnealedTopKTrainingSAE",
    "AnnealedTopKTrainingSAEConfig",
    "Batch",
    "BestMatches",
    "BlockActivity",
    "Comparison",
    "Completion",
    "Context",
    "Conversations",
    "Conversion",
    "Crosscoder",
    "CrosscoderBatchTopKTrainingSAE",
    "CrosscoderBatchTopKTrainingSAEConfig",
    "CrosscoderJumpReLUSAE",
    "CrosscoderJumpReLUSAEConfig",
    "CrosscoderStandardSAE",
    "CrosscoderStandardSAEConfig",
    "CrosscoderStandardTrainingSAE",
    "CrosscoderStandardTrainingSAEConfig",
    "CrosscoderTopKSAE",
    "CrosscoderTopKSAEConfig",
    "CrosscoderTopKTrainingSAE",
    "CrosscoderTopKTrainingSAEConfig",
    "DoseResponse",
    "DoseRow",
    "Edit",
    "EndpointJudge",
    "Estimate",
    "Evaluation",
    "Feature",
    "FeatureMap",
    "FeatureRule",
    "FeatureSet",
    "Firing",
    "GenerationOptions",
    "GeometryRecord",
    "HookedRouteSAETransformer",
    "Interpretation",
    "Interpretations",
    "Judge",
    "JudgeError",
    "JudgeRefused",
    "LayerProfiles",
    "LocalJudge",
    "LongDocuments",
    "MatchDistribution",
    "MeanScore",
    "MemoryEstimate",
    "Method",
    "ModelComparison",
    "Neighbours",
    "PositionBin",
    "PositionProfile",
    "Preset",
    "Prompt",
    "Reply",
    "Report",
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
    "RoutingProfile",
    "Scale",
    "Set",
    "SpliceEvaluator",
    "StandardTranscoderTrainingSAE",
    "StandardTranscoderTrainingSAEConfig",
    "SteeredPair",
    "SweepConfig",
    "SweepResult",
    "TopKTranscoderTrainingSAE",
    "TopKTranscoderTrainingSAEConfig",
    "TrainingInterrupted",
    "TrainingResult",
    "Usage",
    "ViewDifference",
    "agreement",
    "analyse_routing",
    "backend_of",
    "best_matches",
    "build_prompt",
    "calibrate",
    "class_table",
    "collect_features",
    "compare_conversion",
    "compare_models",
    "compare_views",
    "complete",
    "conversation_tokens",
    "cosine_bound",
    "decoder_directions",
    "default_device",
    "default_layers",
    "demo_model_path",
    "demo_text_path",
    "dose_response",
    "estimate_interpretation",
    "estimate_memory",
    "evaluate",
    "evaluate_all",
    "evaluate_by_position",
    "feature_count_curves",
    "feature_map",
    "firing_frequencies",
    "from_authors_checkpoint",
    "held_out_tokens",
    "inference_form",
    "interpret",
    "join_layers",
    "kept_tokens",
    "kl_per_token",
    "layer_profiles",
    "load_from_hub",
    "load_model",
    "load_text",
    "long_documents",
    "make_config",
    "match_distribution",
    "model_card",
    "mount_layers",
    "mount_sites",
    "mounted_points",
    "nearest_across",
    "nearest_within",
    "parse_answer",
    "parse_layers",
    "plot_agreement",
    "push_to_hub",
    "read_batches",
    "read_form",
    "sample_features",
    "scope_configs",
    "splice_hooks",
    "split_layers",
    "standardize",
    "steer_completions",
    "subjects_of",
    "sweep",
    "to_jumprelu",
    "token_class",
    "train",
    "training_shares",
    "unmount_layers",
    "with_routing",
    "write_form",
    "write_report",
]
__version__ = version("routesae-lens")
