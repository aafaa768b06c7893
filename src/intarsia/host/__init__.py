"""The only room that touches a live model."""

from intarsia.host.host import Host

__all__ = ["Host"]
