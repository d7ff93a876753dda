"""Looking through footage: an index of moments, labels in a csv, and a local page."""
