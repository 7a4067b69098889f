"""Small networks of the examples, each tested for the symmetry that it claims."""

from networks.clouds import CloudConvolution, CloudNetwork
from networks.dynamics import Hamiltonian, VectorField
from networks.energies import CentredPotential, ConvolutionalPotential, PairwisePotential, PlainPotential
from networks.graphs import EGNN
from networks.layers import ContinuousConvolution, perceptron
from networks.orientations import GRIDS, design_strength, permutes, symmetries
from networks.volumes import UNet3d

__all__ = [
    "EGNN",
    "GRIDS",
    "CentredPotential",
    "CloudConvolution",
    "CloudNetwork",
    "ContinuousConvolution",
    "ConvolutionalPotential",
    "Hamiltonian",
    "PairwisePotential",
    "PlainPotential",
    "UNet3d",
    "VectorField",
    "design_strength",
    "perceptron",
    "permutes",
    "symmetries",
]
