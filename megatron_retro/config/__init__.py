"""Every flag, its default and its check. Plain values only; nothing here imports torch."""
