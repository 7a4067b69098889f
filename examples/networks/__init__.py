"""Small networks of the examples, each tested for the symmetry that it claims."""

from networks.chains import (
    AngularField,
    AngularHamiltonian,
    ConstrainedHamiltonian,
    FreeField,
    HeightPotential,
    InAngles,
    PlacePotential,
    Rods,
)
from networks.dynamics import Hamiltonian, VectorField
from networks.energies import CentredPotential, ConvolutionalPotential, PairwisePotential, PlainPotential
from networks.graphs import EGNN
from networks.layers import ContinuousConvolution, perceptron
from networks.molecules import AtomNetwork, GradientForces, PairForces
from networks.volumes import UNet3d

__all__ = [
    "EGNN",
    "AngularField",
    "AngularHamiltonian",
    "AtomNetwork",
    "CentredPotential",
    "ConstrainedHamiltonian",
    "ContinuousConvolution",
    "ConvolutionalPotential",
    "FreeField",
    "GradientForces",
    "Hamiltonian",
    "HeightPotential",
    "InAngles",
    "PairForces",
    "PairwisePotential",
    "PlacePotential",
    "PlainPotential",
    "Rods",
    "UNet3d",
    "VectorField",
    "perceptron",
]
