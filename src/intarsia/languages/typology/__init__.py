"""Languages as feature vectors (URIEL by lang2vec, or a CSV file of one's own) and as paths in a family tree (Glottolog)."""

from intarsia.languages.typology.features import BLOCKS, Missing, Neighbour, Typology, Vector
from intarsia.languages.typology.glottolog import Glottolog
from intarsia.languages.typology.read import read_csv, uriel

__all__ = ["BLOCKS", "Glottolog", "Missing", "Neighbour", "Typology", "Vector", "read_csv", "uriel"]
