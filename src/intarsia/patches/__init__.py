"""What is changed at a site: forms, ops, factors, initial values."""

from intarsia.patches.affine import Affine
from intarsia.patches.attend import Attend
from intarsia.patches.biaffine import Biaffine
from intarsia.patches.bottleneck import Bottleneck
from intarsia.patches.channels import Columns
from intarsia.patches.circulant import Circulant
from intarsia.patches.combine import Blocks, Hadamard, Sum
from intarsia.patches.const import Const
from intarsia.patches.core import Core, Free, Seeded, Singular
from intarsia.patches.coupling import Coupling
from intarsia.patches.delta import Delta, Form, FormSpec, Linear, OpSpec, Seen, WhyNot
from intarsia.patches.factors import Dense, Factor, FactorSpec, LowRank
from intarsia.patches.fourier import Fourier
from intarsia.patches.gated import Gated, Scaled
from intarsia.patches.heads import Head, LanguageModelHead
from intarsia.patches.hyper import Hyper
from intarsia.patches.kron import Kron, KronPair
from intarsia.patches.labels import MultiMaskLabels
from intarsia.patches.ladder import Ladder
from intarsia.patches.masks import HardConcrete, KeptMask, Ticket, TopMask
from intarsia.patches.matrix import Matrix
from intarsia.patches.ops import Add, Concat, Gain, Mul, Replace, Rot, Set, Weigh
from intarsia.patches.orthogonal import Butterfly, Cayley, Householder
from intarsia.patches.pairs import Pairs
from intarsia.patches.pattern import Diag, Pattern
from intarsia.patches.place import Place
from intarsia.patches.principal import Principal
from intarsia.patches.projection import Projection
from intarsia.patches.renorm import Renorm
from intarsia.patches.router import Attention, Router, RouterForm
from intarsia.patches.rows import Rows
from intarsia.patches.scores import Basis, Gate, Gaussian, Prototype, Table
from intarsia.patches.sketch import Sketch
from intarsia.patches.sparse import Sparse
from intarsia.patches.subspace import SubspaceEdit
from intarsia.patches.tokens import Tokens

__all__ = [
    "Add",
    "Affine",
    "Attend",
    "Attention",
    "Basis",
    "Biaffine",
    "Blocks",
    "Bottleneck",
    "Butterfly",
    "Cayley",
    "Circulant",
    "Columns",
    "Concat",
    "Const",
    "Core",
    "Coupling",
    "Delta",
    "Dense",
    "Diag",
    "Factor",
    "FactorSpec",
    "Form",
    "FormSpec",
    "Fourier",
    "Free",
    "Gain",
    "Gate",
    "Gated",
    "Gaussian",
    "Hadamard",
    "HardConcrete",
    "Head",
    "Householder",
    "Hyper",
    "KeptMask",
    "Kron",
    "KronPair",
    "Ladder",
    "LanguageModelHead",
    "Linear",
    "LowRank",
    "Matrix",
    "Mul",
    "MultiMaskLabels",
    "OpSpec",
    "Pairs",
    "Pattern",
    "Place",
    "Principal",
    "Projection",
    "Prototype",
    "Renorm",
    "Replace",
    "Rot",
    "Router",
    "RouterForm",
    "Rows",
    "Scaled",
    "Seeded",
    "Seen",
    "Set",
    "Singular",
    "Sketch",
    "Sparse",
    "SubspaceEdit",
    "Sum",
    "Table",
    "Ticket",
    "Tokens",
    "TopMask",
    "Weigh",
    "WhyNot",
]
