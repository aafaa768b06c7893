"""Modules kept and exchanged: the store is in `store`, other libraries' formats are in `convert`."""
