"""Imported last by the process that programs are forked from: what is there by then is never collected.

Else each fork's first garbage collection goes through a million objects, and copies every page that they lie in.
"""

import gc

gc.collect()
gc.freeze()
