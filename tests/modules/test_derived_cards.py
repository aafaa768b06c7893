"""The card of whatever is made from modules: strictest licence, all warnings, parents; for every public function, by enumeration."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch

from intarsia.host import Host
from intarsia.methods import build
from intarsia.modules import UNKNOWN, Card, DataSource, Metric, Module, arithmetic, informed, merging
from intarsia.modules.derived import derived_card
from intarsia.modules.licences import LICENCES, canonical, strictest
from tests import zoo
from tests.host.kit import disturb

Make = Callable[[Module, Module], Module | tuple[Module, float]]
#: how each public function is called with two modules (or the first of them)
OF_TWO: dict[str, Make] = {
    "arithmetic.add": arithmetic.add, "arithmetic.subtract": arithmetic.subtract, "arithmetic.analogy": lambda a, b: arithmetic.analogy(a, b, a),
    "arithmetic.average": lambda a, b: arithmetic.average([a, b]), "arithmetic.weighted_sum": lambda a, b: arithmetic.weighted_sum([a, b], [1, 2]),
    "merging.ties": lambda a, b: merging.ties([a, b], 0.5), "merging.sparse_union": lambda a, b: merging.sparse_union([a, b]),
    "informed.fisher": lambda a, b: informed.fisher([a, b], statistics(a, b, square=False)),
    "informed.regmean": lambda a, b: informed.regmean([a, b], statistics(a, b, square=True)),
    "arithmetic.assemble": lambda a, b: arithmetic.assemble([a, b], a.method.patches, a.tensors, None, None, "assemble", {}),
    "merging.from_changes": lambda a, b: merging.from_changes([a, b], {}, None, None, "from_changes"),
}  # fmt: skip
OF_ONE: dict[str, Make] = {
    "arithmetic.scale": lambda a, _: arithmetic.scale(a, 2.0), "arithmetic.negate": lambda a, _: arithmetic.negate(a),
    "merging.dense": lambda a, _: merging.dense(a), "merging.magnitude": lambda a, _: merging.magnitude(a, 0.5),
    "merging.dare": lambda a, _: merging.dare(a, 0.5), "merging.svd": lambda a, _: merging.svd(a, 1),
}  # fmt: skip


def public() -> set[str]:
    """Every function of the three files that gives a module."""
    found = set()
    for room in (arithmetic, merging, informed):
        for name, function in vars(room).items():
            mine = inspect.isfunction(function) and function.__module__ == room.__name__ and not name.startswith("_")
            if mine and str(inspect.signature(function).return_annotation) in ("Module", "tuple[Module, float]"):
                found.add(f"{room.__name__.rpartition('.')[2]}.{name}")
    return found


def test_none_is_forgotten() -> None:
    assert public() == {*OF_ONE, *OF_TWO} and len(public()) > 15


@lru_cache
def two() -> tuple[Module, Module]:
    host = Host(zoo.make("bert")[0])
    for seed, name in enumerate("ab"):
        host.add(name, build("lora", rank=2, at="attn.q"), seed=seed)
        disturb(host, name, seed)
    return host.extract("a"), host.extract("b")


def statistics(a: Module, b: Module, *, square: bool) -> list[dict[str, torch.Tensor]]:
    values = {key.partition("/")[0]: t for key, t in merging.dense(a).tensors.items()}
    one = {site: torch.eye(t.shape[1]) if square else torch.ones_like(t) for site, t in values.items()}
    return [one, one]


def carded(licences: tuple[str, str], **first: Any) -> tuple[Module, Module]:
    a, b = two()
    common = Card(base="tiny", task="ner", metrics=(Metric("f1", "dev", "", 0.5),), bias_evaluation="none found", recipe={"epochs": 3})
    one = replace(common, licence=licences[0], languages=("swh",), warnings=("religious text", "small"), data=(DataSource("X"),), out_of_scope="People.", **first)
    other = replace(common, licence=licences[1], languages=("kab", "swh"), warnings=("small", "old"), data=(DataSource("Y"),), out_of_scope="Law.")
    return a.with_card(one), b.with_card(other)


def made(name: str, a: Module, b: Module) -> Module:
    result = {**OF_ONE, **OF_TWO}[name](a, b)
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("name", [*OF_ONE, *OF_TWO])
def test_the_card_is_derived(name: str) -> None:
    a, b = carded(("CC-BY-4.0", "CC-BY-SA-4.0"))
    card, both = made(name, a, b).card, name in OF_TWO
    parents = {a.digest: "a", **({b.digest: "b"} if both else {})}
    assert dict(zip(card.parents, card.parent_names, strict=True)) == parents
    assert card.licence == ("CC-BY-SA-4.0" if both else "CC-BY-4.0")
    assert set(card.warnings) == {"religious text", "small", *(["old"] if both else [])} and len(set(card.warnings)) == len(card.warnings)
    assert {d.name for d in card.data} == {"X", *(["Y"] if both else [])} and set(card.languages) == {"swh", *(["kab"] if both else [])}
    assert set(card.out_of_scope.split("\n")) == {"People.", *(["Law."] if both else [])}
    assert (card.base, card.task, card.method) == ("tiny", "ner", "lora")
    assert card.recipe["operation"] == name.partition(".")[2] and "epochs" not in card.recipe
    assert not card.metrics and card.bias_evaluation == "not evaluated", "what was measured on a parent says nothing about the result"
    assert card.cost is not None and card.cost.trainable == 0 and card.cost.bytes is not None


@pytest.mark.parametrize("name", OF_TWO)
@pytest.mark.parametrize("second", ["", "house rules", "GPL-3.0-only", "CC-BY-ND-4.0", UNKNOWN])
def test_what_nobody_can_derive_is_unknown_and_said(name: str, second: str) -> None:
    for licences in (("CC-BY-SA-4.0", second), (second, "CC-BY-SA-4.0")):
        card = made(name, *carded(licences)).card
        assert card.licence == UNKNOWN and "licence" in card.missing()
        assert sum("for a person to decide" in warning for warning in card.warnings) == 1


def test_a_chain_never_becomes_laxer() -> None:
    """Three steps on: the strictest of all that went in, warnings of all, and the parents of the last step."""
    a, b = carded(("MIT", "CC-BY-NC-4.0"))
    first = arithmetic.add(a, b)
    second = merging.magnitude(arithmetic.average([first, a]), 0.5)
    assert (first.card.licence, second.card.licence) == ("CC-BY-NC-4.0", "CC-BY-NC-4.0")
    assert set(second.card.warnings) == {"religious text", "small", "old"}
    lost = arithmetic.add(arithmetic.add(*carded(("MIT", "house rules"))), a)
    assert lost.card.licence == UNKNOWN, "unknown stays unknown, whatever is added"


def test_a_module_that_stands_twice_is_one_parent() -> None:
    a, b = carded(("MIT", "MIT"))
    card = derived_card([a, b, a.rename("again")], "add", {})
    assert (card.parents, card.parent_names) == ((a.digest, b.digest), ("a", "b"))


# --- licences -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "licence", "doubt"), [
    (["MIT", "MIT"], "MIT", False), (["MIT", "Apache-2.0"], "Apache-2.0", False), (["", ""], "", False), (["MIT", ""], UNKNOWN, True),
    (["MIT", "house rules"], UNKNOWN, True), (["house rules", "house rules"], "house rules", False), (["CC-BY-SA-4.0", "GPL-3.0-only"], UNKNOWN, True),
    (["CC-BY-SA-4.0", "CC-BY-NC-4.0"], UNKNOWN, True), (["CC-BY-4.0", "CC-BY-NC-4.0"], "CC-BY-NC-4.0", False), (["CC-BY-NC-4.0", "CC-BY-NC-SA-4.0"], "CC-BY-NC-SA-4.0", False),
    (["CC0-1.0", "mit", "cc-by-4.0"], "CC-BY-4.0", False), (["GPL-3.0-or-later", "GPL-3.0-only", "Apache-2.0"], "GPL-3.0-only", False),
    (["GPL-3.0-only", "AGPL-3.0-or-later"], UNKNOWN, True), (["GPL-3.0-or-later", "AGPL-3.0-only"], "AGPL-3.0-only", False),
    (["CC-BY-SA-3.0", "CC-BY-SA-4.0"], "CC-BY-SA-4.0", False), (["CC-BY-ND-4.0"], "CC-BY-ND-4.0", True), (["CC-BY-ND-4.0", "MIT"], UNKNOWN, True),
    ([UNKNOWN, UNKNOWN], UNKNOWN, False), ([UNKNOWN, "MIT"], UNKNOWN, True), (["MPL-2.0", "CC-BY-NC-4.0"], UNKNOWN, True),
])  # fmt: skip
def test_strictest_licence(given: list[str], licence: str, doubt: bool) -> None:
    for order in itertools.permutations(given):
        found, warning = strictest(order)
        assert (found, warning is not None) == (licence, doubt)


def test_never_laxer_than_any_parent() -> None:
    """Over every pair and triple of the table: what is found demands all that any of them does, and grouping does not matter."""
    for several in itertools.chain(itertools.combinations(LICENCES, 2), itertools.combinations([*list(LICENCES)[::3], "", "house rules"], 3)):
        found, _ = strictest(several)
        if found != UNKNOWN:
            assert all(LICENCES[one].demands <= LICENCES[found].demands for one in several) and found in several
        elif all(one in LICENCES for one in several):
            demands = frozenset().union(*(LICENCES[one].demands for one in several))
            assert "nothing derived" in demands or all(LICENCES[one].demands != demands for one in several)
        else:
            assert "" in several or "house rules" in several
        stepwise = strictest([strictest(several[:2])[0], *several[2:]])[0]
        assert stepwise in (found, UNKNOWN), "merged step by step it is the same or unknown, never laxer"


def test_licences_are_known_in_any_case_and_by_the_hubs_name() -> None:
    for spdx, row in LICENCES.items():
        assert canonical(f" {spdx.upper()} ") == spdx
        assert LICENCES[canonical(row.hub)].hub == row.hub
    assert canonical(" House Rules ") == "House Rules"
