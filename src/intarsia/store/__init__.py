"""Modules kept and exchanged: other libraries' formats are in `convert`."""
