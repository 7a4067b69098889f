"""Small networks of the examples, each tested for the symmetry that it claims."""

from networks.dynamics import Hamiltonian, VectorField
from networks.energies import CentredPotential, ConvolutionalPotential, PairwisePotential, PlainPotential
from networks.graphs import EGNN
from networks.layers import ContinuousConvolution, perceptron
from networks.molecules import AtomNetwork, GradientForces, PairForces
from networks.volumes import UNet3d

__all__ = [
    "EGNN",
    "AtomNetwork",
    "CentredPotential",
    "ContinuousConvolution",
    "ConvolutionalPotential",
    "GradientForces",
    "Hamiltonian",
    "PairForces",
    "PairwisePotential",
    "PlainPotential",
    "UNet3d",
    "VectorField",
    "perceptron",
]
