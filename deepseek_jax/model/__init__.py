"""What the network computes. Shape letters are DESIGN's: B batch, S sequence, T tokens, D width, H heads, ..."""
