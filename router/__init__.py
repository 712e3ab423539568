"""Text to decision: score a prompt against a pool of experts and choose the few to blend.

Importing this package loads numpy only; FAISS, tokenizers and torch come with the first router.
"""

from .classifier import Classifier, LinearClassifier, TransformerClassifier
from .decision import MAX_TOP_M, STRATEGIES, Decision, RoutingOptions, RoutingPlan, Strategy
from .encoder import Encoded, Encoder, EncoderSpec
from .errors import RouterError, RouterFileError, RoutingExamplesError, RoutingOptionsError
from .joining import Joined
from .policy import POLICIES, Policy
from .ranked import Candidate
from .router import DEFAULTS, Router, ScoreRow, ScoreTable
from .service import RoutingService, ServiceStats
from .state import Calibration, RouterState, Samples
from .store import load_router, load_state, save_router

__all__ = [
    "DEFAULTS",
    "MAX_TOP_M",
    "POLICIES",
    "STRATEGIES",
    "Calibration",
    "Candidate",
    "Classifier",
    "Decision",
    "Encoded",
    "Encoder",
    "EncoderSpec",
    "Joined",
    "LinearClassifier",
    "Policy",
    "Router",
    "RouterError",
    "RouterFileError",
    "RouterState",
    "RoutingExamplesError",
    "RoutingOptions",
    "RoutingOptionsError",
    "RoutingPlan",
    "RoutingService",
    "Samples",
    "ScoreRow",
    "ScoreTable",
    "ServiceStats",
    "Strategy",
    "TransformerClassifier",
    "load_router",
    "load_state",
    "save_router",
]
