"""One self-contained `index.html`: the template, its style and script, and the data.

The data is gzipped JSON in base64, a third of its size. So no text of a corpus stands in the HTML, and the script puts
texts into the page as text alone. The page's own policy forbids all requests.
"""

import base64
import gzip
import json
import pathlib
from typing import Any

from megatron_retro import webpage
from megatron_retro.errors import UserError
from megatron_retro.storage import write_atomically

_TEMPLATE = pathlib.Path(__file__).with_suffix(".html")


def write_page(directory: pathlib.Path, data: dict[str, Any]) -> pathlib.Path:
    """Write `index.html` into `directory`; what `collect` returned goes in.

    Raises:
        UserError: it cannot be written.
    """
    path, content = directory / "index.html", render(data).encode()
    try:
        write_atomically(path, lambda file: file.write(content))
    except OSError as error:
        raise UserError(
            f"--output {directory} cannot be written to ({error.strerror}); give another directory"
        ) from None
    return path


def render(data: dict[str, Any]) -> str:
    """The page's HTML; the same data gives the same bytes."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    packed = base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
    script = webpage.fill(_TEMPLATE.with_suffix(".js"))
    return webpage.fill(_TEMPLATE, style=webpage.style(_TEMPLATE), script=script, data=packed)
