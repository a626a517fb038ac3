"""The public names, for type checkers; ``__init__.py`` imports them when they are used."""

from gemmascope_plugin import catalog as catalog
from gemmascope_plugin import causes as causes
from gemmascope_plugin import circuits as circuits
from gemmascope_plugin import features as features
from gemmascope_plugin import figures as figures
from gemmascope_plugin import graphs as graphs
from gemmascope_plugin import loading as loading
from gemmascope_plugin import measures as measures
from gemmascope_plugin import models as models
from gemmascope_plugin import pages as pages
from gemmascope_plugin import saes as saes
from gemmascope_plugin import tracing as tracing
from gemmascope_plugin import training as training
from gemmascope_plugin.catalog import SaeSpec as SaeSpec
from gemmascope_plugin.catalog import find as find
from gemmascope_plugin.catalog import refresh as refresh
from gemmascope_plugin.causes import Effects as Effects
from gemmascope_plugin.causes import Task as Task
from gemmascope_plugin.causes import activation_patching as activation_patching
from gemmascope_plugin.causes import attribution_patching as attribution_patching
from gemmascope_plugin.causes import cross_entropy as cross_entropy
from gemmascope_plugin.causes import custom as custom
from gemmascope_plugin.causes import direct_logit_attribution as direct_logit_attribution
from gemmascope_plugin.causes import edge_attribution as edge_attribution
from gemmascope_plugin.causes import edge_patching as edge_patching
from gemmascope_plugin.causes import kl_divergence as kl_divergence
from gemmascope_plugin.causes import logit_diff as logit_diff
from gemmascope_plugin.causes import logit_lens as logit_lens
from gemmascope_plugin.causes import margin as margin
from gemmascope_plugin.causes import path_patching as path_patching
from gemmascope_plugin.causes import probability as probability
from gemmascope_plugin.causes import sequence_logprob as sequence_logprob
from gemmascope_plugin.circuits import discover as discover
from gemmascope_plugin.circuits import evaluate as evaluate
from gemmascope_plugin.cli.doctor import doctor as doctor
from gemmascope_plugin.demo import tiny as tiny
from gemmascope_plugin.errors import GemmaScopeError as GemmaScopeError
from gemmascope_plugin.features import analyze as analyze
from gemmascope_plugin.graphs import Circuit as Circuit
from gemmascope_plugin.graphs import Graph as Graph
from gemmascope_plugin.graphs import Node as Node
from gemmascope_plugin.graphs import contrast as contrast
from gemmascope_plugin.graphs import union as union
from gemmascope_plugin.loading import footprint as footprint
from gemmascope_plugin.loading import load as load
from gemmascope_plugin.loading import load_suite as load_suite
from gemmascope_plugin.loading import register as register
from gemmascope_plugin.measures import compare as compare
from gemmascope_plugin.measures import measure as measure
from gemmascope_plugin.models import load_model as load_model
from gemmascope_plugin.splice import Ablate as Ablate
from gemmascope_plugin.splice import Add as Add
from gemmascope_plugin.splice import Clamp as Clamp
from gemmascope_plugin.splice import Custom as Custom
from gemmascope_plugin.splice import HookedCrossLayer as HookedCrossLayer
from gemmascope_plugin.splice import HookedSAE as HookedSAE
from gemmascope_plugin.splice import Project as Project
from gemmascope_plugin.splice import Replace as Replace
from gemmascope_plugin.splice import Scale as Scale
from gemmascope_plugin.splice import splice as splice
from gemmascope_plugin.splice import steer as steer
from gemmascope_plugin.splice import verify as verify
from gemmascope_plugin.tracing import check_by_ablation as check_by_ablation
from gemmascope_plugin.tracing import head_loadings as head_loadings
from gemmascope_plugin.tracing import intervene as intervene
from gemmascope_plugin.tracing import qk_attribution as qk_attribution
from gemmascope_plugin.tracing import supernodes as supernodes
from gemmascope_plugin.tracing import trace as trace
from gemmascope_plugin.training import TrainSpec as TrainSpec
from gemmascope_plugin.training import train as train

__version__: str
__all__: list[str]
_HOME_OF: dict[str, str]
_FLOORS: tuple[str, ...]

def _version() -> str: ...
