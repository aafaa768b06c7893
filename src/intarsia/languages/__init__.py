"""From a text in a new language to a module: what the base knows of it, a corpus, a vocabulary, training.

| file | subject |
|---|---|
| `probe`, `bits`, `advice` | what a base's tokenizer and LM head do to a text, and which arms published work suggests |
| `typology/` | languages as feature vectors and as paths in a family tree, with missing values explicit |
| `corpus/` | from files to a folder with text, splits and a manifest of what was dropped and why |
| `vocabulary/` | tokenizers for a language, and rows of embeddings for their pieces |
"""
