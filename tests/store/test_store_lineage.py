"""Relations between modules: what requires what is enforced, what was made from what is shown, whatever a card says."""

from __future__ import annotations

import itertools
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intarsia.errors import CompositionError, DataError, StoreError, UsageError
from intarsia.modules import Card, DataSource, Module, dumps, load, read_header, save
from intarsia.modules.arithmetic import average
from intarsia.store.families import OTHER, language_tree
from intarsia.store.lineage import Lineage, check_together, origin
from intarsia.store.store import Store
from tests.modules import make
from tests.store.small import age, lora, module


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_what_is_required_comes_first(store: Store) -> None:
    lang = module(0, name="lang")
    task = module(1, name="task", requires=(lang.digest,))
    with pytest.raises(StoreError, match=f"'task' requires digest {lang.digest[:12]}.*--allow-missing"):
        store.add(task)
    assert store.names() == {} and store.entries() == []
    store.add(lang)
    store.add(task)
    assert store.verify() == [] and store.missing(task.requires) == []
    assert [str(kin) for kin in Lineage(store).requires(store.header("task"))] == ["lang@1"]
    assert [str(kin) for kin in Lineage(store).children(lang.digest)] == ["task@1"]


def test_removing_the_name_of_a_required_module_keeps_it(store: Store) -> None:
    lang = module(0, name="lang")
    sha256 = store.add(lang)
    store.add(module(1, name="task", requires=(lang.digest,)))
    store.remove("lang")
    age(store)
    assert store.gc(grace=0).removed == () and store.get(sha256).digest == lang.digest
    (kin,) = Lineage(store).requires(store.header("task"))
    assert kin.sha256 == sha256 and str(kin) == f"lang ({sha256[:12]}, no name)"


def test_conflicts_are_on_the_card_and_hold_both_ways(store: Store) -> None:
    one, two, three = (module(seed, name=name) for seed, name in enumerate(("one", "two", "three")))
    store.add(one)
    store.add(two, conflicts=["one"])
    store.add(three)
    held = store.get("two")
    assert held.card.conflicts == (one.digest,) and held.digest == two.digest  # another file, the same module
    lineage = Lineage(store)
    assert [str(kin) for kin in lineage.conflicts(store.header("two"))] == ["one@1"]
    assert [str(kin) for kin in lineage.conflicts(store.header("one"))] == ["two@1"]
    assert lineage.conflicts(store.header("three")) == []
    check_together({"a": store.get("one"), "b": store.get("three")})
    for order in itertools.permutations(("one", "two", "three")):
        with pytest.raises(CompositionError, match="'two' must not be used together with 'one'"):
            check_together({name: store.get(name) for name in order})
    with pytest.raises(CompositionError, match="'top' must not be used together with 'both'"):
        foe = lora(5, "foe")
        card = Card(conflicts=(foe.digest,))
        check_together({"both": average([foe, lora(6, "friend")], name="both"), "top": lora(7, "top", card=card)})
    merged = average([lora(7, "top", card=card), foe], name="merged")
    with pytest.raises(CompositionError, match="'merged' must not be used together with 'foe'"):  # though it is made of it
        check_together({"foe": foe, "merged": merged})
    assert average([lora(7, "top", card=card), lora(6, "friend")], name="both").card.conflicts == (foe.digest,)
    with pytest.raises(StoreError, match="no 'nobody'"):
        store.add(three, conflicts=["nobody"])


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_a_conflict_changes_the_card_of_a_file_and_nothing_else(store: Store, tmp_path: Path, dtype: Any) -> None:
    store.add(module(0, name="one"))
    save(module(1, tensors=make.sparse()), tmp_path / "m", dtype=dtype)
    sha256 = store.add(tmp_path / "m", name="foe", conflicts=["one"], allow_missing=True)
    held = load(tmp_path / "m")
    assert store.header("foe").version == read_header(tmp_path / "m").version, "coded tensors stay coded"
    assert store.read(sha256) == dumps(replace(held, card=replace(held.card, conflicts=(store.header("one").digest,))), dtype=dtype)


def test_lineage_of_a_merged_module(store: Store) -> None:
    data = DataSource("SIB-200", licence="CC-BY-SA-4.0", sha256="ab" * 32)
    a = lora(0, "a", card=Card(data=(data,), recipe={"seed": 7, "learning_rate": 1e-3}))
    b = lora(1, "b", card=Card(recipe={"seeds": [1, 2]}))
    both = average([a, b], name="both")
    top = lora(2, "top", requires=(both.digest,))
    for each in (a, b, both, top):
        store.add(each)
    lines = [(line.depth, line.relation, str(line.kin), line.seen) for line in Lineage(store).lines()]
    assert lines == [(0, "", "top@1", False), (1, "requires", "both@1", False), (2, "made from", "a@1", False), (2, "made from", "b@1", False)]
    assert [str(line.kin) for line in Lineage(store).lines(both.digest)] == ["both@1", "a@1", "b@1"]
    assert origin(store.header("a"))["seeds"] == [7] and origin(store.header("b"))["seeds"] == [1, 2]
    assert origin(store.header("a"))["data"] == [{"name": "SIB-200", "sha256": "ab" * 32}]
    assert origin(store.header("both"))["operation"] == "average"
    store.remove("a")
    store.gc(grace=0)
    gone, there = Lineage(store).parents(store.header("both"))
    assert gone.sha256 is None and "not in this store" in str(gone) and str(there) == "b@1"


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=8))
def test_any_relation_is_drawn_to_its_end(tmp_path_factory: pytest.TempPathFactory, edges: list[tuple[int, int]]) -> None:
    """Cards can say anything, circles too: every module is drawn out once, and the walk ends."""
    store = Store(tmp_path_factory.mktemp("lineage"))
    modules: list[Module] = [module(seed, name=f"m{seed}") for seed in range(5)]
    for index, each in enumerate(modules):
        parents = tuple(dict.fromkeys(modules[to].digest for start, to in edges if start == index))
        store.add(each.with_card(replace(each.card, parents=parents)))
    lines = list(Lineage(store).lines())
    out = [line.kin.digest for line in lines if not line.seen]
    assert sorted(out) == sorted(each.digest for each in modules)
    assert len(lines) <= 5 + len(set(edges))


def put(store: Store, name: str, *tags: str, script: str = "", **roles: str) -> None:
    store.add(module(zlib.crc32(name.encode()), name=name, card=Card(languages=tags, script=script), roles=roles))


def names(branch: object, depth: int = 0) -> list[str]:
    from intarsia.store.families import Branch

    assert isinstance(branch, Branch)
    found = []
    for name in sorted(branch.below):
        part = branch.below[name]
        found += ["  " * depth + name + (": " + ", ".join(part.modules) if part.modules else ""), *names(part, depth + 1)]
    return found


GROUPS = {
    "swh": ("Atlantic-Congo", "Bantu"), "zul": ("Atlantic-Congo", "Bantu"), "yor": ("Atlantic-Congo",), "kab": ("Afro-Asiatic", "Berber"),
    "arb": ("Afro-Asiatic", "Semitic"), "arz": ("Afro-Asiatic", "Semitic"), "eus": (), "fin": ("Uralic",),
}  # fmt: skip


def test_the_tree_of_languages(store: Store) -> None:
    put(store, "sw", "sw")  # the macro-language stands for its member
    put(store, "kab", "kab-Latn", language="kab")
    put(store, "egy", "arz")
    put(store, "two", "zul", "eus")
    put(store, "none")
    put(store, "new", "xho")  # not in the data
    root = language_tree(store.entries(), GROUPS)
    assert names(root) == [
        f"{OTHER}: none@1", "Afro-Asiatic", "  Berber", "    kab: kab@1", "  Semitic", "    arz: egy@1", "Atlantic-Congo", "  Bantu", "    swh: sw@1",
        "    zul: two@1", "eus: two@1", "xho: new@1",
    ]  # fmt: skip
    bantu = root.below["Atlantic-Congo"].below["Bantu"]
    assert (bantu.covered, bantu.known) == (2, 2)
    assert (root.below["Afro-Asiatic"].covered, root.below["Afro-Asiatic"].known) == (2, 3)
    assert root.covered == 6 and root.below[OTHER].modules == ["none@1"]
    assert "Uralic" not in root.below
    assert "Uralic" in language_tree(store.entries(), GROUPS, whole=True).below
    assert root.below["Afro-Asiatic"].below["Berber"].below["kab"].scripts == {"Latn"}


def test_without_data_languages_stand_below_their_macro_language(store: Store) -> None:
    put(store, "a", "arz")
    put(store, "b", "arb")
    put(store, "k", "kab")
    root = language_tree(store.entries())
    assert set(root.below) == {"ara", "kab"} and set(root.below["ara"].below) == {"arz", "arb"}
    assert root.covered == 3 and root.known == 0


def test_scripts_and_domains_are_found(store: Store) -> None:
    put(store, "latin", "kab-Latn", domain="news")
    put(store, "tifinagh", "kab-Tfng")
    put(store, "card", "kab", script="Latn+Arab")
    put(store, "usual", "rus", domain="law")

    def found(**asked: str) -> set[str]:
        return {name.partition("@")[0] for entry in store.find(**asked) for name in entry.names}

    assert found(script="Latn") == {"latin", "card"} and found(script="tfng") == {"tifinagh"} and found(script="Cyrl") == {"usual"}
    assert found(language="kab-Arab") == {"card"} and found(language="kab") == {"latin", "tifinagh", "card"}
    assert found(domain="news") == {"latin"} and found(domain="news", language="ru") == set()
    with pytest.raises(UsageError, match="not a registered script"):
        store.find(script="Klingon")


def test_compare_and_swap_of_a_tag(store: Store) -> None:
    first, second = store.add(module(0)), store.add(module(1))
    store.tag("swh@1", "best", expected="none")
    store.tag("swh@2", "best", expected=first[:10])
    for stale in (first[:10], "none", ""):
        with pytest.raises(StoreError, match="another process has moved it"):
            store.tag("swh@1", "best", expected=stale)
    assert store.resolve("swh@best") == second


def test_family_data_are_read_from_files(tmp_path: Path) -> None:
    from intarsia.cli.store_views import family_data

    own = tmp_path / "own.csv"
    own.write_text("iso,family\nkab,Afro-Asiatic>Berber\neus,\n", "utf-8")
    groups, source = family_data(own)
    assert groups == {"kab": ("Afro-Asiatic", "Berber"), "eus": ()} and str(own) in source
    folder = tmp_path / "glottolog"
    folder.mkdir()
    (folder / "languages.csv").write_text("ID,Name,Family_ID,Level,ISO639P3code\nkaby1243,Kabyle,afro1255,language,kab\nafro1255,Afro-Asiatic,,family,\n", "utf-8")
    assert family_data(folder)[0] == {"kab": ("Afro-Asiatic",)}
    own.write_text("iso,S_SVO\nkab,1\n", "utf-8")
    with pytest.raises(DataError, match="no column 'family'"):
        family_data(own)
