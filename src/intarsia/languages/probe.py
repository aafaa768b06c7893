"""`probe`: look at a text in a language before anything is trained: size, script, pieces, neighbours, modules of neighbours, arms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from intarsia.errors import DataError, UsageError
from intarsia.languages.evidence import BY_KEY, CONFLICT, Evidence
from intarsia.languages.measures import Fit, Measures, fit, measures
from intarsia.languages.tags import alternatives, iso639_3
from intarsia.languages.typology import Glottolog, Typology

UNKNOWN_WORDS = 0.05
"""Share of words with unknown pieces above which the script is called unseen; ours, not published."""
LITTLE_TEXT = 1_000
"""Lines below which no module of a language's own is suggested; ours, not published."""
BLOCKS = ("syntax", "phonology")


@dataclass(frozen=True, slots=True)
class Near:
    """A language near the probed one.

    Attributes:
        language: ISO 639-3 code.
        by: `family`, or the block of features.
        measure: number of shared groups of the tree, or cosine distance.
        shared: features that were observed for both (0 for `family`).
        modules: names of modules in the store.
    """

    language: str
    by: str
    measure: float
    shared: int
    modules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Neighbourhood:
    """What typology and family tree say.

    Attributes:
        source: of the typology.
        path: from the family to the language.
        near: neighbours by family and by each block, of all languages and of those with modules.
        observed: per block, (features observed for the language, features).
        warnings: values that are imputed or shared, languages that are missing.
    """

    source: str
    path: tuple[str, ...]
    near: tuple[Near, ...]
    observed: dict[str, tuple[int, int]]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Probe:
    """Everything `lang probe` found.

    Attributes:
        language: as given.
        iso: ISO 639-3 code.
        base: name of the base.
        measures: of the text.
        bits: bits per character of the base on the text, None where it has no LM head or nobody asked.
        bits_note: how they were measured, or why not.
        fit: to the task's text, None if none was given.
        neighbours: None where there is no typology.
        own_modules: modules of this very language in the store.
        advice: rows of the evidence table that apply, the first first.
        warnings: what should be looked at.
    """

    language: str
    iso: str
    base: str
    measures: Measures
    bits: float | None
    bits_note: str
    fit: Fit | None
    neighbours: Neighbourhood | None
    own_modules: tuple[str, ...]
    advice: tuple[Evidence, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        found = asdict(self)
        return {**found, "measures": self.measures.to_dict(), "conflict": CONFLICT}


def probe(
    texts: Sequence[str],
    language: str,
    base: Any,
    *,
    typology: Typology | None = None,
    tree: Glottolog | None = None,
    coverage: dict[str, tuple[str, ...]] | None = None,
    task_texts: Sequence[str] = (),
    bits_lines: int = 32,
    k: int = 5,
) -> Probe:
    """Look at a text in a language under a base.

    Args:
        texts: lines.
        language: BCP-47 tag or ISO 639 code.
        base: as `intarsia.bases.load` gives it.
        typology: feature vectors; None where there are none.
        tree: Glottolog's tree; None for the groups that the typology has.
        coverage: modules by the ISO 639-3 code of their language, see `coverage_of`.
        task_texts: texts of the task, to see whether both are in the same variety.
        bits_lines: lines on which the base's LM head is measured; 0 for none.
        k: neighbours of each kind.

    Raises:
        DataError: the text has no words.
        UsageError: the language is not registered.
    """
    iso = iso639_3(language)
    found = measures(base.tokenizer, texts)
    if not found.words:
        raise DataError("the text has no words: nothing to probe")
    coverage = coverage or {}
    near = None if typology is None and tree is None else neighbourhood(iso, typology, tree, coverage, k)
    bits, note = _bits(base, texts, bits_lines)
    compared = fit(texts, task_texts) if task_texts else None
    headless = base.model.get_output_embeddings() is None
    own = tuple(name for code in alternatives(iso) for name in coverage.get(code, ()))
    rows = advise(found, headless=headless, relatives=[n for n in near.near if n.modules] if near else [])
    warnings = [*_warnings(found, language, base, compared), *(near.warnings if near else ["no typology: neighbours are unknown (see --typology)"])]
    return Probe(language, iso, base.name, found, bits, note, compared, near, own, rows, tuple(warnings))


def _bits(base: Any, texts: Sequence[str], lines: int) -> tuple[float | None, str]:
    from intarsia.languages.bits import bits_of_base

    if base.model.get_output_embeddings() is None:
        return None, f"{base.name} has no LM head: bits per character cannot be measured"
    if any("freshly made" in note for note in base.notes):
        return None, f"the LM head of {base.name} is freshly made: bits per character would mean nothing"
    if not lines:
        return None, "not measured"
    found = bits_of_base(base, texts, lines)
    return found.bits, found.note


def advise(found: Measures, *, headless: bool, relatives: Sequence[Near]) -> tuple[Evidence, ...]:
    """Rows of the evidence table that apply, in the order in which to try them."""
    keys: list[str] = []
    if found.unknown_word_share > UNKNOWN_WORDS:
        keys.append("script")
    if found.lines < LITTLE_TEXT:
        keys.append("relatives" if relatives else "typology")
        if relatives:
            keys.append("family")
    else:
        if found.unknown_word_share <= UNKNOWN_WORDS:
            keys += ["testament", "modular"]
        if relatives:
            keys += ["family", "relatives"]
    keys.append("sources")
    if headless:
        keys.append("headless")
    return tuple(BY_KEY[key] for key in keys)


def _warnings(found: Measures, language: str, base: Any, compared: Fit | None) -> list[str]:
    lines = []
    if found.unknown_word_share > UNKNOWN_WORDS:
        lacks = ", ".join(f"{point} {name}" for point, name, _ in found.lacking[:5]) or "no single character"
        lines.append(f"{found.unknown_word_share:.1%} of the words have pieces that the tokenizer of {base.name} does not know; it lacks {lacks}")
    elif found.pieces_per_word > 2.5:
        lines.append(f"{found.pieces_per_word:.2f} pieces per word: the vocabulary was not made for this language, though no word is unknown")
    asked = _script_of(language)
    if asked and found.script and asked != found.script:
        lines.append(f"{language} asks for the script {asked}, most letters of the text are {found.script}")
    if compared is not None and compared.words < 0.3:
        lines.append(
            f"only {compared.words:.1%} of the task's words occur in the text ({compared.grams:.1%} of its 4-grams): another variety, orthography, "
            "case or script?"
        )
    return lines


def _script_of(tag: str) -> str:
    """The script that a tag names, as `data.characters` calls it; empty if it names none or one that is written otherwise."""
    import langcodes

    code = langcodes.Language.get(tag).script
    names = {"Latn": "Latin", "Cyrl": "Cyrillic", "Arab": "Arabic", "Grek": "Greek", "Deva": "Devanagari", "Beng": "Bengali", "Ethi": "Ethiopic",
             "Tfng": "Tifinagh", "Nkoo": "Nko", "Olck": "Ol Chiki", "Copt": "Coptic", "Cher": "Cherokee", "Syrc": "Syriac", "Tibt": "Tibetan",
             "Cans": "Canadian Syllabics", "Hebr": "Hebrew", "Armn": "Armenian", "Geor": "Georgian", "Khmr": "Khmer", "Thai": "Thai"}  # fmt: skip
    return names.get(code or "", "")


def neighbourhood(
    iso: str, typology: Typology | None, tree: Glottolog | None, coverage: dict[str, tuple[str, ...]], k: int = 5
) -> Neighbourhood:
    """Neighbours of a language by family and by each block of features, of all languages and of those that have modules."""
    near: dict[tuple[str, str], Near] = {}
    observed: dict[str, tuple[int, int]] = {}
    warnings: list[str] = []
    path: tuple[str, ...] = (iso,)

    def put(language: str, by: str, measure: float, shared: int) -> None:
        near.setdefault((language, by), Near(language, by, measure, shared, coverage.get(language, ())))

    deep = tree is not None and tree.deep
    if tree is not None:
        path = _try(lambda: tuple(f"{tree.names[code]} ({code})" for code in tree.path(iso)), warnings) or path
        # where only the family is known, its members are all alike: those with modules are worth a line
        for pool in (tuple(tree.codes) if deep else (), tuple(coverage)):
            for language, shared in _try(lambda pool=pool: tree.relatives(iso, pool, k), warnings) or ():
                put(language, "family", shared, 0)
    if typology is not None:
        _by_features(iso, typology, not deep, coverage, k, put, observed, warnings)
        if not deep:
            path = _try(lambda: typology.path(iso), []) or path
    source = " + ".join(filter(None, (typology.source if typology else "", "Glottolog" if tree else "")))
    return Neighbourhood(source, path, tuple(near.values()), observed, tuple(dict.fromkeys(warnings)))


def _by_features(
    iso: str, typology: Typology, families: bool, coverage: dict[str, tuple[str, ...]], k: int, put: Any, observed: dict[str, tuple[int, int]],
    warnings: list[str],
) -> None:  # fmt: skip
    if _try(lambda: typology.code(iso), warnings) is None:
        return
    pools = (None, tuple(coverage))
    if families:
        for pool in pools:
            for language, shared in typology.relatives(iso, pool, k):
                put(language, "family", shared, 0)
    for block in BLOCKS:
        vector = _try(lambda block=block: typology.vector(iso, (block,)), [])
        if vector is None:
            continue
        observed[block] = (vector.observed, len(vector.mask))
        missing = "mask" if vector.observed >= 20 or typology.imputed is None else "knn"
        if missing == "knn":
            warnings.append(
                f"{block}: only {vector.observed} of {len(vector.mask)} features of {iso} were observed; neighbours are by imputed values, "
                "which come from relatives and make them look alike"
            )
            twins = typology.twins(iso, (block,))
            if twins:
                shown = ", ".join(twins[:5]) + (f" ... ({len(twins)} in all)" if len(twins) > 5 else "")
                warnings.append(f"{block}: the imputed vector of {iso} is shared with {shown}: nothing can tell them apart by it")
        for pool in pools:
            for found in typology.nearest(iso, pool, k, (block,), missing):  # type: ignore[arg-type]
                put(found.language, block, found.distance, found.shared)


def _try(ask: Any, warnings: list[str]) -> Any:
    """The answer, or None with the reason among the warnings."""
    try:
        return ask()
    except UsageError as error:
        warnings.append(str(error))
        return None


def coverage_of(store: Any, base: Any = None) -> dict[str, tuple[str, ...]]:
    """Names of a store's modules by the ISO 639-3 code of each language they are for.

    Args:
        store: `intarsia.store.store.Store`.
        base: a fingerprint; modules of other bases do not count.
    """
    found: dict[str, dict[str, None]] = {}
    for entry in store.entries():
        header = entry.header
        if header is None or not entry.names or (base is not None and header.base.difference(base)):
            continue
        spoken = {*header.card.languages, *header.roles.get("language", "").split("+")} - {""}
        for tag in sorted(spoken):
            try:
                code = iso639_3(tag)
            except UsageError:
                continue
            found.setdefault(code, {}).setdefault(entry.names[0].partition("@")[0])
    return {code: tuple(names) for code, names in found.items()}
