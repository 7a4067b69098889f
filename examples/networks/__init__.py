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
from networks.clouds import CloudConvolution, CloudNetwork
from networks.dynamics import Hamiltonian, VectorField
from networks.energies import (
    CentredPotential,
    ConvolutionalPotential,
    PairwisePotential,
    PlainPotential,
    TurningPotential,
)
from networks.graphs import EGNN
from networks.images import PlainConvolutions
from networks.layers import ContinuousConvolution, TurningConvolution, perceptron
from networks.lie_convolutions import (
    LieClassifier,
    LieConvolution,
    Motions,
    PlaneGroup,
    Rotations,
    ScaledRotations,
    Shifts,
    even_turns,
)
from networks.molecules import AtomNetwork, GradientForces, PairForces
from networks.orientations import GRIDS, design_strength, permutes, symmetries
from networks.volumes import UNet3d

__all__ = [
    "EGNN",
    "GRIDS",
    "AngularField",
    "AngularHamiltonian",
    "AtomNetwork",
    "CentredPotential",
    "CloudConvolution",
    "CloudNetwork",
    "ConstrainedHamiltonian",
    "ContinuousConvolution",
    "ConvolutionalPotential",
    "FreeField",
    "GradientForces",
    "Hamiltonian",
    "HeightPotential",
    "InAngles",
    "LieClassifier",
    "LieConvolution",
    "Motions",
    "PairForces",
    "PairwisePotential",
    "PlacePotential",
    "PlainConvolutions",
    "PlainPotential",
    "PlaneGroup",
    "Rods",
    "Rotations",
    "ScaledRotations",
    "Shifts",
    "TurningConvolution",
    "TurningPotential",
    "UNet3d",
    "VectorField",
    "design_strength",
    "even_turns",
    "perceptron",
    "permutes",
    "symmetries",
]
