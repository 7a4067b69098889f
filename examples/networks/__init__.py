"""Small networks of the examples, each tested for the symmetry that it claims."""

from networks.dynamics import Hamiltonian, VectorField
from networks.energies import CentredPotential, ConvolutionalPotential, PairwisePotential, PlainPotential
from networks.layers import ContinuousConvolution, perceptron

__all__ = [
    "CentredPotential",
    "ContinuousConvolution",
    "ConvolutionalPotential",
    "Hamiltonian",
    "PairwisePotential",
    "PlainPotential",
    "VectorField",
    "perceptron",
]
