"""What is shown on a terminal cannot steer it."""

import sys

from megatron_retro.terminal import printable


def test_nothing_that_is_shown_steers_a_terminal():
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    shown = printable(every)
    assert len(shown) == len(every) and shown.replace("\ufffd", "").isprintable()
    assert printable("a\x1b[2Jb\u202e\td\u3000\r\n", "\n\t") == "a\ufffd[2Jb\ufffd\td  \n"
