"""Runs a program (its path and arguments follow) whose files may take no more than so many bytes each.

It finds the disk endless, so that it is not refused before it begins.
"""

import collections
import resource
import runpy
import shutil
import sys

if __name__ == "__main__":
    limit, sys.argv = int(sys.argv[1]), sys.argv[2:]
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    endless = collections.namedtuple("Disk", "total used free")(1 << 60, 0, 1 << 60)
    shutil.disk_usage = lambda path: endless
    runpy.run_path(sys.argv[0], run_name="__main__")
