"""Vocabularies for a language: tokenizers trained on its text, rows of embeddings for their pieces, and both as a module."""
