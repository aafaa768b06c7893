"""Measurements of the library itself: does every method learn, and at what price."""
