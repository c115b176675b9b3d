"""Where images come from: cards, decoding, batches."""
