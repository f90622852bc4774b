"""The page at `/`: one file, whose script and style alone may run in it, and which asks nobody but this service."""

import base64
import hashlib
import json
import pathlib

from fastapi import Request, Response

from megatron_retro import webpage

_TEMPLATE = pathlib.Path(__file__).with_suffix(".html")


class Page:
    """The page of a service.

    Args:
        model_name: in requests.
        retrieval: what is chosen at first.
        wants_key: requests must carry a token, so the page asks for it.
        reads: the model reads a database.
    """

    def __init__(self, model_name: str, retrieval: str, wants_key: bool, reads: bool):
        settings = {"model": model_name, "retrieval": retrieval if reads else "off", "key": wants_key, "reads": reads}
        shown = json.dumps(settings).replace("<", "\\u003c")
        script, style = webpage.fill(_TEMPLATE.with_suffix(".js"), settings=shown), webpage.style(_TEMPLATE)
        self._html = webpage.fill(_TEMPLATE, style=style, script=script)
        policy = f"script-src '{_hash(script)}'; style-src '{_hash(style)}'; connect-src 'self'; img-src data:"
        self._policy = f"default-src 'none'; {policy}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

    async def show(self, request: Request) -> Response:
        return Response(self._html, media_type="text/html", headers={"content-security-policy": self._policy})


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
