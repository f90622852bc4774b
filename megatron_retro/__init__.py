"""RETRO pretraining on megatron-core."""

__version__ = "0.3.0"
