"""The public contract: it holds for methods of every form, finds broken ones, and the page's example is what it says."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from intarsia._codec import register
from intarsia.methods import METHODS, Method, Patch
from intarsia.patches import Form
from intarsia.testing import LawBroken, check_method
from tests.host.kit import small

PAGE = Path(__file__).parents[1] / "docs" / "own-method.md"


@pytest.mark.parametrize(("name", "start"), [("lora", "base"), ("pfeiffer", "near"), ("prefix", "anywhere"), ("ia3", "base"), ("prompt", "anywhere"), ("supermask", "anywhere")])
def test_the_contract_holds(name: str, start: Any) -> None:
    found = check_method(small(name), start=start)
    assert set(found.taken) == {"bert", "gpt2", "llama", "t5"} and not found.refused
    assert (found.folds["bert"] is None) == (name in ("lora", "ia3", "supermask"))


def test_a_family_without_the_sites_is_reported() -> None:
    found = check_method(small("bitfit"))
    assert "llama" in found.refused and "bert" in found.taken


class Leaky(Form):
    """Writes into its own parameter in the forward, as no form may."""

    def __init__(self, value: nn.Parameter) -> None:
        super().__init__()
        self.value = value

    def forward(self, h: Tensor, seen: Any) -> Tensor:
        self.value.data.add_(0.01)
        return self.value


class Deaf(Leaky):
    """Does not read its parameter."""

    def forward(self, h: Tensor, seen: Any) -> Tensor:
        return h * 0.1


class Writer(Leaky):
    """Writes into the base."""

    def forward(self, h: Tensor, seen: Any) -> Tensor:
        with torch.no_grad():
            seen.weight.add_(1e-3)
        return self.value


_KINDS = {"leaky": Leaky, "deaf": Deaf, "writer": Writer}


@register("broken_for_tests")
@dataclass(frozen=True, slots=True)
class Broken:
    kind: str = "leaky"

    def build(self, place: Any) -> Form:
        return _KINDS[self.kind](place.parameter(place.site.features, fill=0.0))


@pytest.mark.parametrize("kind", list(_KINDS))
def test_a_broken_method_is_found(kind: str) -> None:
    method = Method("broken", patches=(Patch("p", "attn.q", Broken(kind)),))
    with pytest.raises(LawBroken, match="broken on bert"):
        check_method(method, families=("bert",), start="base")


def test_the_wrong_start_is_found() -> None:
    with pytest.raises(LawBroken, match="a fresh module is not the base"):
        check_method(small("pfeiffer"), families=("bert",), start="base")


def test_no_site_anywhere() -> None:
    method = Method("nowhere", patches=small("lora").patches[:1])
    lost = Method("nowhere", patches=tuple(Patch(p.name, "xattn.k", p.form, p.op) for p in method.patches))
    with pytest.raises(LawBroken, match="no family has a site"):
        check_method(lost, families=("bert",))


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example is registered, found through an entry point, and passes its own test."""
    blocks = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL))
    assert set(blocks) == {"rank_one", "test_rank_one"}
    for name, text in blocks.items():
        (tmp_path / f"{name}.py").write_text(text)
    info = tmp_path / "rank_one-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rank-one\nVersion: 1\n")
    (info / "entry_points.txt").write_text(re.search(r"```toml\n.*?\n(\[project.*?)```", PAGE.read_text("utf-8"), re.DOTALL)[1].replace("project.entry-points.", "").replace('"', "", 2).replace('"rank_one:ROW"', "rank_one:ROW"))  # type: ignore[index]
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(METHODS, "_plugins_loaded", False)
    try:
        assert METHODS["rank_one"].build(scale=1.0).settings == {"scale": 1.0}
        import test_rank_one  # type: ignore[import-not-found]

        test_rank_one.test_rank_one()
        assert len(blocks["rank_one"].splitlines()) < 60
    finally:
        METHODS._items.pop("rank_one", None)
        for name in blocks:
            sys.modules.pop(name, None)
