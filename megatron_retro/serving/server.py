"""uvicorn, whose answer to what is not HTTP is JSON as well."""

from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from megatron_retro.serving.guard import encoded
from megatron_retro.serving.requests import Refusal


class _Protocol(H11Protocol):
    def send_400_response(self, msg: str) -> None:
        body = encoded(Refusal(400, "this is not HTTP", "invalid_http").as_json())
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        try:
            answer = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
            for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:  # an answer is on its way already
            pass
        self.transport.close()


def make_server(app: Any) -> uvicorn.Server:
    """A server of one process; it logs neither requests nor addresses."""
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_level="error",
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
    )
    return uvicorn.Server(config)
