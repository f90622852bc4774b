"""Documents, tokens, chunks, samples."""
