"""`bench speed`: this library against others, side by side in one process."""

from intarsia.bench.speed.cases import CASES
from intarsia.bench.speed.pairs import Case, Pair, measure

__all__ = ["CASES", "Case", "Pair", "measure"]
