"""From a text in a new language to a module: what the base knows of it, a corpus, a vocabulary, training.

| file | subject |
|---|---|
| `probe`, `measures`, `bits`, `evidence` | what a base's tokenizer and LM head do to a text, and which arms published work suggests |
| `typology/`, `tags` | languages as feature vectors and as paths in a family tree, with missing values explicit; their codes |
| `corpus/`, `romanise` | from files to a folder with text, splits and a manifest of what was dropped and why |
| `vocabulary/` | tokenizers for a language, and rows of embeddings for their pieces |
| `objectives`, `train`, `cards` | a language module by one of the methods and objectives, with what its card says |
| `recipes`, `runner`, `transfer` | the systems of the literature as stages of data, carried out; tasks in other languages compared |
"""
