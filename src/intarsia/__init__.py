"""intarsia: modular and parameter-efficient fine-tuning of transformers."""
