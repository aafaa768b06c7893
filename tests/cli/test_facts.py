"""What the table of methods says beyond the specification is read off a built module."""

from __future__ import annotations

import pytest

from intarsia.cli.facts import combines, facts
from intarsia.methods import METHODS, Method, Patch, build
from tests.host.kit import FOLDABLE


@pytest.mark.parametrize("name", list(METHODS))
def test_folding_is_what_the_laws_say(name: str) -> None:
    """`FOLDABLE` is tested on live models of every family."""
    assert (facts(build(name)).why_not_foldable is None) == (name in FOLDABLE)


def test_trained_and_tied() -> None:
    lora = facts(build("lora"))
    assert set(lora.trains) == {"down", "up"} and not lora.ties
    assert facts(build("lora_fa")).trains == ("up",)
    assert facts(build("compacter")).ties == ("left",)
    assert not facts(build("head")).trains


def test_how_it_combines() -> None:
    assert "equal lengths" in combines(build("prompt")) and "equal lengths" in combines(build("mam"))
    assert combines(build("lora")) == combines(build("ia3")) != combines(build("head"))
    assert "alone" in combines(build("supermask")) and "alone" in combines(build("lottery"))


def test_a_method_that_a_bert_has_no_sites_for() -> None:
    lora = build("lora").patches[0]
    found = facts(Method("cross", patches=(Patch("x", "xattn.k", lora.form, lora.op),)))
    assert found.why_not_foldable is not None and found.why_not_foldable.startswith("not on a BERT: ")
