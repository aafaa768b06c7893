"""A network that must not be used: what is tested fails where it opens a connection or looks up a host."""

from __future__ import annotations

import socket

import pytest


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to open a connection or to look up a host fails the test."""

    def refuse(*words: object, **_: object) -> None:
        raise AssertionError(f"network was used: {words}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("create_connection", "getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
