"""Attention, layers, encoder, decoder, model."""
