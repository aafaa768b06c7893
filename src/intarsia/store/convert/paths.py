"""Between a model's own module paths, which peers name, and sites, which modules name."""

from __future__ import annotations

from collections.abc import Iterable

from intarsia.errors import ModuleError, listing, nearest
from intarsia.sites.address import Site, SiteMap


class Paths:
    """The sites of a model by module path.

    Args:
        sites: of the model.
        named: module paths of the file; if the model carries another leading word than the file's (`bert.`, `model.`:
            saved with a head, loaded without one, or the other way), it is added or taken away.
    """

    def __init__(self, sites: SiteMap, named: Iterable[str] = ()) -> None:
        self.sites = sites
        self.out: dict[str, list[Site]] = {}
        self.inner: dict[str, Site] = {}
        self.params: dict[tuple[str, str], list[Site]] = {}
        for site in sites.values():
            if site.port == "out" and f"{site.name}.weight" in sites and sites[f"{site.name}.weight"].path == site.path:
                self.out.setdefault(site.path, []).append(site)
            elif site.port == "in":
                self.inner.setdefault(site.path, site)
            elif site.port == "weight":
                for path, param in site.owners or ((site.path, site.param or "weight"),):
                    self.params.setdefault((path, param), []).append(site)
        self.known = {path for path, _ in self.params}
        self.strip, self.lead = self._offset(list(named))

    def _offset(self, named: list[str]) -> tuple[str, str]:
        """(leading word to take away, leading word to add) under which most of the file's paths are known."""
        firsts = {name.split(".")[0] + "." for name in named}
        leads = {path.split(".")[0] + "." for path in self.known if path.split(".")[0] not in self.known}
        options = [("", ""), *((f, "") for f in sorted(firsts)), *(("", x) for x in sorted(leads))]
        return max(options, key=lambda o: sum(self._moved(n, *o) is not None for n in named)) if named else ("", "")

    def _moved(self, name: str, strip: str, lead: str) -> tuple[str, str] | None:
        if not name.startswith(strip):
            return None
        name = lead + name.removeprefix(strip)
        words = name.split(".")
        for end in range(len(words), 0, -1):
            if ".".join(words[:end]) in self.known:
                return ".".join(words[:end]), ".".join(words[end:])
        return None

    def split(self, key: str) -> tuple[str, str] | None:
        """(module path in this model, rest of the key), None if no module of the model is named."""
        return self._moved(key, self.strip, self.lead)

    def linear(self, path: str) -> Site:
        """The output of a linear layer, whole."""
        return self._whole(self.out.get(path, []), path, "an output")

    def weight(self, path: str, param: str = "weight") -> Site:
        """A parameter, whole."""
        return self._whole(self.params.get((path, param), []), path, f"a parameter {param!r}")

    def entry(self, path: str) -> Site | None:
        """The input of a layer, None if that is no site."""
        return self.inner.get(path)

    def _whole(self, found: list[Site], path: str, what: str) -> Site:
        for site in found:
            if site.view is None:
                return site
        if found:
            raise ModuleError(f"{path} is read in parts only ({listing(s.name for s in found)}); a change of the whole has no site on {self.sites.model}")
        raise ModuleError(f"{self.sites.model} has no site for {what} of {path!r}{nearest(path, self.known)}")


def suffixes(chosen: Iterable[str], every: Iterable[str]) -> list[str]:
    """The shortest list of path ends that covers exactly the chosen modules among all: last words if they do, else full paths."""
    chosen, every = set(chosen), set(every)
    for count in (1, 2):
        ends = {".".join(path.split(".")[-count:]) for path in chosen}
        if {path for path in every if any(path == e or path.endswith("." + e) for e in ends)} == chosen:
            return sorted(ends)
    return sorted(chosen)
