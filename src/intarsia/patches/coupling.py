"""`Coupling`: an invertible change of the embeddings (MAD-X, Pfeiffer et al. 2020, arXiv 2005.00052, section 3.3).

NICE coupling (Dinh et al. 2015, arXiv 1410.8516) on the halves x = [x1; x2]:

    y1 = x1 + F(x2)        x2 = y2 - G(y1)
    y2 = x2 + G(y1)        x1 = y1 - F(x2)

F and G are bottlenecks, Linear - activation - Linear.  It stands where the stack begins (`stem`), and the host undoes it in
front of the output embedding, tied or not: the model's own, or that of a `LanguageModelHead`.  Several stacks (encoder and
decoder) share one coupling, so that there is one inverse.

What is not here: affine couplings (GLOW), for which no published language module exists.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia._codec import register
from intarsia.errors import SpecError
from intarsia.patches.activations import ACTIVATIONS
from intarsia.patches.delta import Form, Seen, back, same_dtype
from intarsia.patches.init import INITS
from intarsia.patches.place import Place


class Half(nn.Module):
    """[..., in] -> [..., out], through a narrow layer."""

    def __init__(self, reads: int, writes: int, place: Place, spec: Coupling) -> None:
        super().__init__()
        width, fill = max(1, int(reads // spec.reduction)), INITS[spec.init]
        self.down = place.parameter(width, reads, fill=fill)
        self.down_bias = place.parameter(width)
        self.up = place.parameter(writes, width, fill=0.0 if spec.zero_up else fill)
        self.up_bias = place.parameter(writes)
        self.activation = ACTIVATIONS[spec.activation]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.activation(F.linear(x, self.down, self.down_bias)), self.up, self.up_bias)


class Couple(nn.Module):
    """Both halves of one coupling over `width` features."""

    def __init__(self, width: int, place: Place, spec: Coupling) -> None:
        super().__init__()
        self.cut = width // 2
        self.first = Half(width - self.cut, self.cut, place, spec)
        self.second = Half(self.cut, width - self.cut, place, spec)

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = same_dtype(x, self.first.down)
        return x[..., : self.cut], x[..., self.cut :]


class CouplingForm(Form):
    """The change [..., d] of x [..., d]; `undo` is that of the inverse."""

    invertible = True
    couple: Couple

    def __init__(self, couple: Couple) -> None:
        super().__init__()
        self.__dict__["couple"] = couple  # shared by the stacks: registered once, at the root

    def forward(self, h: Tensor, seen: Seen) -> Tensor:
        one, two = self.couple.halves(h)
        first = self.couple.first(two)
        return back(torch.cat([first, self.couple.second(one + first)], -1), h)

    def undo(self, h: Tensor) -> Tensor:
        """What to add to y to have x again."""
        one, two = self.couple.halves(h)
        second = self.couple.second(one)
        return back(-torch.cat([self.couple.first(two - second), second], -1), h)


@register("coupling")
@dataclass(frozen=True, slots=True)
class Coupling:
    """An invertible adapter.

    Attributes:
        reduction: what each half reads, over the width of its narrow layer.
        zero_up: start as the identity.
    """

    reduction: float = 2.0
    activation: str = "relu"
    init: str = "bert"
    zero_up: bool = False

    def __post_init__(self) -> None:
        ACTIVATIONS[self.activation]
        if self.reduction <= 0:
            raise SpecError(f"reduction must be positive, found {self.reduction}")

    def build(self, place: Place) -> CouplingForm:
        width = place.site.features
        if not place.site.name.endswith("stem") or width < 2:
            raise SpecError(f"{place.site.name}: an invertible change stands where a stack begins (at='stem'), where the host knows how to undo it")
        if any(peer.site.features != width for peer in place.peers):
            raise SpecError("the stacks of this model have unlike widths, and one coupling serves them all; name one: at='encoder.stem'")
        return CouplingForm(place.tied(("coupling",), lambda: Couple(width, place, self)))
