"""Embeddings of chunks, the index over them, and every chunk's neighbors."""
