"""The rules that weigh tasks by the Gram matrix of their gradients, a file each; every one has three forms."""

from .aligned import AlignedMTL
from .cagrad import CAGrad
from .dualproj import DualProj
from .fairgrad import FairGrad
from .gram_rule import GramRule
from .imtlg import IMTLG
from .mgda import MGDA
from .nash_mtl import NashMTL
from .pcgrad import PCGrad
from .upgrad import UPGrad

__all__ = [
    "IMTLG",
    "MGDA",
    "AlignedMTL",
    "CAGrad",
    "DualProj",
    "FairGrad",
    "GramRule",
    "NashMTL",
    "PCGrad",
    "UPGrad",
]
