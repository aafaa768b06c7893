"""`intarsia store export | import | push | pull`: modules into and out of a store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intarsia.cli.console import Console
from intarsia.cli.options import StoreFolder
from intarsia.cli.store import AllowMissing
from intarsia.errors import UsageError

if TYPE_CHECKING:
    from intarsia.store.transfer import Moved

References = Annotated[list[str] | None, typer.Argument(help="Names, name@version or name@tag; what they require goes with them.", metavar="[MODULE]...")]
RemoteUrl = Annotated[str, typer.Argument(help="A store's folder, hf://USER/REPOSITORY, or a URL of fsspec such as s3://BUCKET/PATH.", metavar="REMOTE")]
Everything = Annotated[bool, typer.Option("--all", help="Every module under every name.")]
Network = Annotated[bool, typer.Option("--allow-network", help="The remote may be reached over the network.")]
MaxBytes = Annotated[int | None, typer.Option("--max-bytes", help="Refuse files that announce more.", min=1, show_default="2 GiB")]


def export(
    console: Console,
    words: Annotated[list[str], typer.Argument(help="Modules, and the new file: .tar for a bundle with names and what is required.", metavar="MODULE... FILE")],
    everything: Everything = False,
    allow_missing: AllowMissing = False,
    store: StoreFolder = None,
) -> None:
    """Copy a module's file out of the store, verified; or several modules into one bundle.

    intarsia store export topics@best topics.safetensors
    """
    from intarsia.store.store import Store
    from intarsia.store.transfer import bundle

    references, out = words[:-1], Path(words[-1])
    if out.suffix == ".tar":
        moved = bundle(Store(store), out, references, everything=everything, allow_missing=allow_missing)
        console.result({"path": str(out), **_payload(moved)}, lambda: _report(console, moved, f"in {out}"))
        return
    if len(references) != 1 or everything:
        raise UsageError("give one module and a new file; for several the file is a bundle and ends with .tar")
    path = Store(store).export(references[0], out)
    console.result({"path": str(path)}, lambda: console.line(str(path)))


def take(
    console: Console,
    place: Annotated[Path, typer.Argument(help="A module file, a bundle (.tar), a folder of module files, or another store's folder.")],
    max_bytes: MaxBytes = None,
    allow_missing: AllowMissing = False,
    store: StoreFolder = None,
) -> None:
    """Take modules into the store, every byte verified; of a damaged or hostile bundle nothing is taken."""
    from intarsia.store.bundle import LARGEST
    from intarsia.store.store import Store
    from intarsia.store.transfer import take as taken

    moved = taken(Store(store), place, limit=max_bytes or LARGEST, allow_missing=allow_missing)
    console.result(_payload(moved), lambda: _report(console, moved, "in the store"))


def push(
    console: Console,
    remote: RemoteUrl,
    modules: References = None,
    everything: Everything = False,
    allow_network: Network = False,
    allow_missing: AllowMissing = False,
    store: StoreFolder = None,
) -> None:
    """Send modules to a remote, with what they require; each file is read back and compared.

    intarsia store push /mnt/shared/modules topics@best
    """
    from intarsia.store.remote import open_remote
    from intarsia.store.store import Store
    from intarsia.store.transfer import push as pushed

    moved = pushed(Store(store), open_remote(remote, allow_network=allow_network), modules or (), everything=everything, allow_missing=allow_missing)
    console.result({"remote": remote, **_payload(moved)}, lambda: _report(console, moved, f"at {remote}"))


def pull(
    console: Console,
    remote: RemoteUrl,
    modules: References = None,
    everything: Everything = False,
    allow_network: Network = False,
    max_bytes: MaxBytes = None,
    allow_missing: AllowMissing = False,
    store: StoreFolder = None,
) -> None:
    """Fetch modules from a remote, with what they require; every byte is verified before a name points at it.

    intarsia store pull hf://user/modules topics --allow-network
    """
    from intarsia.store.bundle import LARGEST
    from intarsia.store.remote import open_remote
    from intarsia.store.store import Store
    from intarsia.store.transfer import pull as pulled

    place = open_remote(remote, allow_network=allow_network)
    moved = pulled(Store(store), place, modules or (), everything=everything, limit=max_bytes or LARGEST, allow_missing=allow_missing)
    console.result({"remote": remote, **_payload(moved)}, lambda: _report(console, moved, "in the store"))


def _payload(moved: Moved) -> dict[str, Any]:
    return {"names": [str(each) for each in moved.labels], "files": list(moved.files), "required": list(moved.required)}


def _report(console: Console, moved: Moved, where: str) -> None:
    for each in moved.labels:
        console.line(f"{each.sha256[:12]}  {each}")
    along = f", {len(moved.required)} of them because others require them" if moved.required else ""
    console.line(f"{len(moved.files)} module{'s' * (len(moved.files) != 1)} {where}{along}")
