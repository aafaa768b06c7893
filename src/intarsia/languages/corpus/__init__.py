"""From files in a language to a corpus: lines with their origin, filters that count what they drop, splits, a manifest."""
