"""RouteSAE for SAELens and TransformerLens: sparse autoencoders that read several layers.

Importing this package registers its SAE architectures with SAELens. The names below follow the flow:
model -> multi-layer hook point -> route -> shared SAE -> trainer -> splice -> evaluate.
"""

from importlib.metadata import version

from routesae_lens.analysis.activation_overlap import (
    ActivationSimilarity,
    OverlapCounter,
    activation_similarity,
)
from routesae_lens.analysis.completions import Completion, GenerationOptions, complete
from routesae_lens.analysis.contexts import Context
from routesae_lens.analysis.evaluate import SpliceEvaluator, evaluate, evaluate_all, held_out_tokens
from routesae_lens.analysis.expert_use import ExpertCounter, ExpertUse, expert_utilisation
from routesae_lens.analysis.feature_map import FeatureMap, feature_map
from routesae_lens.analysis.feature_set import (
    BlockActivity,
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
    encoder_directions,
    nearest_across,
    nearest_within,
)
from routesae_lens.analysis.insertion import (
    InsertionEffects,
    ThresholdChoice,
    choose_threshold,
    insertion_effects,
)
from routesae_lens.analysis.jumprelu import Comparison, Conversion, compare_conversion, to_jumprelu
from routesae_lens.analysis.latent_split import LatentGroup, LatentSplit, split_latents
from routesae_lens.analysis.layer_coverage import CoveredLayer, LayerCoverage, layer_coverage
from routesae_lens.analysis.layer_profiles import LayerProfiles, layer_profiles
from routesae_lens.analysis.match_distribution import MatchDistribution, match_distribution
from routesae_lens.analysis.meta_latents import MetaLatents, meta_latents
from routesae_lens.analysis.metrics import Evaluation
from routesae_lens.analysis.model_comparison import ModelComparison, compare_models
from routesae_lens.analysis.next_tokens import kl_per_token
from routesae_lens.analysis.prompts import Conversations, Prompt, conversation_tokens
from routesae_lens.analysis.redundancy import (
    ExpertSimilarity,
    Redundancy,
    expert_similarity,
    feature_redundancy,
)
from routesae_lens.analysis.routing import RoutingProfile, analyse_routing, training_shares
from routesae_lens.analysis.steering import (
    DoseResponse,
    DoseRow,
    SteeredPair,
    dose_response,
    steer_completions,
)
from routesae_lens.analysis.stitched_sae import Move, Stitching
from routesae_lens.analysis.stitching import StitchingCurve, StitchingStep, stitch
from routesae_lens.analysis.stream import Batch, kept_tokens, read_batches, subjects_of
from routesae_lens.analysis.token_classes import TOKEN_CLASSES, class_table, token_class
from routesae_lens.analysis.token_sets import Activity, chosen_tokens, read_token_set
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
from routesae_lens.report.meta_record import MetaRecord
from routesae_lens.report.page import Report, write_report
from routesae_lens.report.people_form import read_form, write_form
from routesae_lens.report.prompt import Interpretation, build_prompt, parse_answer
from routesae_lens.report.stitching_plots import plot_layer_coverage, plot_stitching, plot_threshold
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
from routesae_lens.saes.experts import (
    EXPERT_ARCHITECTURES,
    RouteScaleSAE,
    RouteScaleSAEConfig,
    RouteScaleTrainingSAE,
    RouteScaleTrainingSAEConfig,
    ScaleSAE,
    ScaleSAEConfig,
    ScaleTrainingSAE,
    ScaleTrainingSAEConfig,
    SwitchSAE,
    SwitchSAEConfig,
    SwitchTrainingSAE,
    SwitchTrainingSAEConfig,
)
from routesae_lens.saes.forms import inference_form, with_routing
from routesae_lens.saes.hub import load_from_hub, model_card, push_to_hub
from routesae_lens.saes.k_annealing import AnnealedTopKTrainingSAE, AnnealedTopKTrainingSAEConfig
from routesae_lens.saes.layers import standardize
from routesae_lens.saes.route_sae import RouteSAE, RouteTrainingSAE
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
from routesae_lens.splice.late_logits import Logits
from routesae_lens.splice.replace import splice_hooks
from routesae_lens.training.data import load_text
from routesae_lens.training.interruption import TrainingInterrupted
from routesae_lens.training.memory import MemoryEstimate, estimate_memory
from routesae_lens.training.meta_sae import train_meta_sae
from routesae_lens.training.methods import METHODS, Method, make_config
from routesae_lens.training.positions import scope_configs
from routesae_lens.training.presets import PRESETS, Preset
from routesae_lens.training.sweep import SweepResult, sweep
from routesae_lens.training.sweep_config import SweepConfig
from routesae_lens.training.train import TrainingResult, train

__all__ = [
    "AGGREGATORS",
    "CROSSCODER_ARCHITECTURES",
    "EXPERT_ARCHITECTURES",
    "METHODS",
    "PRESETS",
    "ROUTE_ARCHITECTURES",
    "ROUTINGS",
    "TOKEN_CLASSES",
    "TRANSCODER_ARCHITECTURES",
    "Ablate",
    "ActivationSimilarity",
    "Activity",
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
    "CoveredLayer",
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
    "ExpertCounter",
    "ExpertSimilarity",
    "ExpertUse",
    "Feature",
    "FeatureMap",
    "FeatureRule",
    "FeatureSet",
    "Firing",
    "GenerationOptions",
    "GeometryRecord",
    "HookedRouteSAETransformer",
    "InsertionEffects",
    "Interpretation",
    "Interpretations",
    "Judge",
    "JudgeError",
    "JudgeRefused",
    "LatentGroup",
    "LatentSplit",
    "LayerCoverage",
    "LayerProfiles",
    "LocalJudge",
    "Logits",
    "LongDocuments",
    "MatchDistribution",
    "MeanScore",
    "MemoryEstimate",
    "MetaLatents",
    "MetaRecord",
    "Method",
    "ModelComparison",
    "Move",
    "Neighbours",
    "OverlapCounter",
    "PositionBin",
    "PositionProfile",
    "Preset",
    "Prompt",
    "Redundancy",
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
    "RouteScaleSAE",
    "RouteScaleSAEConfig",
    "RouteScaleTrainingSAE",
    "RouteScaleTrainingSAEConfig",
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
    "ScaleSAE",
    "ScaleSAEConfig",
    "ScaleTrainingSAE",
    "ScaleTrainingSAEConfig",
    "Set",
    "SpliceEvaluator",
    "StandardTranscoderTrainingSAE",
    "StandardTranscoderTrainingSAEConfig",
    "SteeredPair",
    "Stitching",
    "StitchingCurve",
    "StitchingStep",
    "SweepConfig",
    "SweepResult",
    "SwitchSAE",
    "SwitchSAEConfig",
    "SwitchTrainingSAE",
    "SwitchTrainingSAEConfig",
    "ThresholdChoice",
    "TopKTranscoderTrainingSAE",
    "TopKTranscoderTrainingSAEConfig",
    "TrainingInterrupted",
    "TrainingResult",
    "Usage",
    "ViewDifference",
    "activation_similarity",
    "agreement",
    "analyse_routing",
    "backend_of",
    "best_matches",
    "build_prompt",
    "calibrate",
    "choose_threshold",
    "chosen_tokens",
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
    "encoder_directions",
    "estimate_interpretation",
    "estimate_memory",
    "evaluate",
    "evaluate_all",
    "evaluate_by_position",
    "expert_similarity",
    "expert_utilisation",
    "feature_count_curves",
    "feature_map",
    "feature_redundancy",
    "firing_frequencies",
    "from_authors_checkpoint",
    "held_out_tokens",
    "inference_form",
    "insertion_effects",
    "interpret",
    "join_layers",
    "kept_tokens",
    "kl_per_token",
    "layer_coverage",
    "layer_profiles",
    "load_from_hub",
    "load_model",
    "load_text",
    "long_documents",
    "make_config",
    "match_distribution",
    "meta_latents",
    "model_card",
    "mount_layers",
    "mount_sites",
    "mounted_points",
    "nearest_across",
    "nearest_within",
    "parse_answer",
    "parse_layers",
    "plot_agreement",
    "plot_layer_coverage",
    "plot_stitching",
    "plot_threshold",
    "push_to_hub",
    "read_batches",
    "read_form",
    "read_token_set",
    "sample_features",
    "scope_configs",
    "splice_hooks",
    "split_latents",
    "split_layers",
    "standardize",
    "steer_completions",
    "stitch",
    "subjects_of",
    "sweep",
    "to_jumprelu",
    "token_class",
    "train",
    "train_meta_sae",
    "training_shares",
    "unmount_layers",
    "with_routing",
    "write_form",
    "write_report",
]
__version__ = version("routesae-lens")
