"""Text for a terminal: how wide, how bold, and without what could steer it."""

import shutil

BOLD, DIM, PLAIN = "\033[1m", "\033[2m", "\033[0m"


def width() -> int:
    """Columns that lines may take."""
    return min(100, shutil.get_terminal_size((100, 24)).columns)


def printable(text: str, kept: str = "") -> str:
    """Without what could steer a terminal: white space that is not `kept` becomes a space, the rest U+FFFD."""
    return "".join(c if c.isprintable() or c in kept else " " if c.isspace() else "\ufffd" for c in text)
