"""Small models of the papers, as chains of residual blocks: any ``nn.Module`` will do, these are at hand."""

from horizonplan.models.dynamics import DynamicalNet, Dynamics, EulerBlock, VerletBlock
from horizonplan.models.plain_cnn import PlainCNN
from horizonplan.models.residual_cnn import ResidualCNN
from horizonplan.models.residual_mlp import ResidualLinear, ResidualMLP
from horizonplan.models.transformer import CharacterGPT, Patches, SequenceClassifier

__all__ = [
    "CharacterGPT",
    "DynamicalNet",
    "Dynamics",
    "EulerBlock",
    "Patches",
    "PlainCNN",
    "ResidualCNN",
    "ResidualLinear",
    "ResidualMLP",
    "SequenceClassifier",
    "VerletBlock",
]
