# For type checkers: the lazy names of __init__.py, spelled out. A test keeps the
# two equal.
from repscope import errors as errors
from repscope import optim as optim
from repscope import plots as plots
from repscope import studies as studies
from repscope.analysis import measure as measure
from repscope.capture import Probe as Probe
from repscope.capture import at_steps as at_steps
from repscope.capture import every as every
from repscope.capture import layers as layers
from repscope.capture import log_spaced as log_spaced
from repscope.landscape import hessian_top_eigenvalue as hessian_top_eigenvalue
from repscope.landscape import hessian_trace as hessian_trace
from repscope.landscape import loss_barrier as loss_barrier
from repscope.landscape import match_units as match_units
from repscope.landscape import sparsity_curve as sparsity_curve
from repscope.landscape import sparsity_within as sparsity_within
from repscope.linalg import Moments as Moments
from repscope.linalg import covariance as covariance
from repscope.linalg import eigvalsh as eigvalsh
from repscope.metrics.agreement import disagreement as disagreement
from repscope.metrics.agreement import error_consistency as error_consistency
from repscope.metrics.alignment import class_alignment as class_alignment
from repscope.metrics.alignment import class_cosine as class_cosine
from repscope.metrics.alignment import class_means as class_means
from repscope.metrics.alignment import cross_class_cosine as cross_class_cosine
from repscope.metrics.collapse import neural_collapse as neural_collapse
from repscope.metrics.comparison import compare as compare
from repscope.metrics.comparison import holm as holm
from repscope.metrics.comparison import mean_interval as mean_interval
from repscope.metrics.comparison import paired_difference as paired_difference
from repscope.metrics.comparison import verdict as verdict
from repscope.metrics.continual import average_accuracy as average_accuracy
from repscope.metrics.continual import backward_transfer as backward_transfer
from repscope.metrics.continual import forgetting as forgetting
from repscope.metrics.continual import interference as interference
from repscope.metrics.continual import learning_accuracy as learning_accuracy
from repscope.metrics.continual import plasticity as plasticity
from repscope.metrics.dimension import class_dimension as class_dimension
from repscope.metrics.dimension import rank_stability as rank_stability
from repscope.metrics.movement import (
    distance_from_initialisation as distance_from_initialisation,
)
from repscope.metrics.movement import movement as movement
from repscope.metrics.movement import never_updated as never_updated
from repscope.metrics.movement import wasted_movement as wasted_movement
from repscope.metrics.probe import linear_probe_accuracy as linear_probe_accuracy
from repscope.metrics.similarity import MinibatchCKA as MinibatchCKA
from repscope.metrics.similarity import between_within as between_within
from repscope.metrics.similarity import linear_cka as linear_cka
from repscope.metrics.similarity import principal_angles as principal_angles
from repscope.metrics.similarity import procrustes_distance as procrustes_distance
from repscope.metrics.similarity import subspace_overlap as subspace_overlap
from repscope.metrics.spectra import compare_spectra as compare_spectra
from repscope.metrics.spectra import effective_rank as effective_rank
from repscope.metrics.spectra import (
    explained_variance_ratio as explained_variance_ratio,
)
from repscope.metrics.spectra import hill_number as hill_number
from repscope.metrics.spectra import majorizes as majorizes
from repscope.metrics.spectra import n_components as n_components
from repscope.metrics.spectra import n_significant as n_significant
from repscope.metrics.spectra import participation_ratio as participation_ratio
from repscope.metrics.spectra import (
    participation_ratio_from_features as participation_ratio_from_features,
)
from repscope.metrics.spectra import power_law as power_law
from repscope.metrics.spectra import rankme as rankme
from repscope.metrics.spectra import spectra as spectra
from repscope.metrics.spectra import spectrum as spectrum
from repscope.metrics.spectra import stable_rank as stable_rank
from repscope.metrics.spectra import weight_spectrum as weight_spectrum
from repscope.metrics.units import activation_overlap as activation_overlap
from repscope.metrics.units import dormant_fraction as dormant_fraction
from repscope.metrics.units import dormant_scores as dormant_scores
from repscope.metrics.units import population_sparseness as population_sparseness
from repscope.metrics.weights import hoyer_sparsity as hoyer_sparsity
from repscope.metrics.weights import weight_histogram as weight_histogram
from repscope.networks import compare_networks as compare_networks
from repscope.recorder import Recorder as Recorder
from repscope.results import ActivationOverlap as ActivationOverlap
from repscope.results import Band as Band
from repscope.results import Barrier as Barrier
from repscope.results import BetweenWithin as BetweenWithin
from repscope.results import ClassAlignment as ClassAlignment
from repscope.results import ClassCosine as ClassCosine
from repscope.results import ClassDimension as ClassDimension
from repscope.results import Compared as Compared
from repscope.results import Comparison as Comparison
from repscope.results import Displacement as Displacement
from repscope.results import Histogram as Histogram
from repscope.results import Holm as Holm
from repscope.results import Interference as Interference
from repscope.results import Interval as Interval
from repscope.results import Movement as Movement
from repscope.results import NeuralCollapse as NeuralCollapse
from repscope.results import PowerLaw as PowerLaw
from repscope.results import Primary as Primary
from repscope.results import RankStability as RankStability
from repscope.results import SparsityCurve as SparsityCurve
from repscope.results import Spectrum as Spectrum
from repscope.results import SubspaceOverlap as SubspaceOverlap
from repscope.results import TopEigenvalue as TopEigenvalue
from repscope.results import TraceEstimate as TraceEstimate
from repscope.snapshot import Snapshot as Snapshot
from repscope.store import Run as Run
from repscope.store import open as open

__version__: str
__all__: list[str]
