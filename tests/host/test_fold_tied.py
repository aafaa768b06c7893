"""Folding where one weight is two layers': the answer beforehand is the one that folding gives."""

from __future__ import annotations

import pytest
import torch

from intarsia.errors import CompositionError
from intarsia.host import Host
from intarsia.methods import Method, Patch
from intarsia.patches import Affine, LowRank, Matrix
from tests import zoo
from tests.host import kit


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "t5"])
def test_a_change_of_a_tied_output_layer_does_not_fold_and_says_so(family: str) -> None:
    model, inputs = zoo.make(family)
    host = Host(model).add("m", Method("head", (Patch("p", "head", Affine(LowRank(2))),)))
    kit.disturb(host, "m")
    why = host.why_not_foldable("m")
    if any(len(site.owners) > 1 for site in host.sites.parameters()):
        assert why is not None and "tied to the word embeddings" in why
        with pytest.raises(CompositionError, match="tied to the word embeddings"):
            host.fold("m")
        host.add("both", Method("both", (Patch("p", "embed.weight", Matrix(LowRank(2)), port="weight"),)))
        kit.disturb(host, "both")
        assert host.why_not_foldable("both") is None, "a change of the shared parameter itself changes both, as it does when active"
        with host.using("both"):
            expected = kit.run(model, inputs)
        assert torch.allclose(kit.run(host.fold("both"), inputs), expected, atol=1e-4)
    else:
        assert why is None
