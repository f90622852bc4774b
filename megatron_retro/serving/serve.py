"""Start the service: check, listen, load, answer."""

import pathlib
import socket

from megatron_retro import distributed, mcore
from megatron_retro.config.serving import ServeConfig
from megatron_retro.errors import UserError
from megatron_retro.reading import read_text
from megatron_retro.retrieval.journal import Journal


def serve(config: ServeConfig) -> None:
    """Do what `tools/serve_retro.py` is asked, until a signal ends it.

    Raises:
        UserError: flags, checkpoint, work dir and journal do not fit together, or the port is taken.
    """
    config.finish(distributed.world_size())
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise UserError("the service needs fastapi and uvicorn: pip install 'megatron_retro[serve]'") from None
    from megatron_retro.serving.app import Service
    from megatron_retro.serving.engine import Engine
    from megatron_retro.serving.opening import open_all
    from megatron_retro.serving.server import make_server

    key = read_key(config.door.api_key_file)
    listening = listen(config.door.host, config.door.port)
    journal = Journal(config.served.journal) if config.served.journal else None
    opened = open_all(config, journal)
    engine = Engine(opened.writer, config.limits.max_batch_size)
    engine.start()
    host = f"[{config.door.host}]" if ":" in config.door.host else config.door.host
    print(f"serving {config.served.model_name} at http://{host}:{listening.getsockname()[1]}", flush=True)
    make_server(Service(config, opened, engine, key).app).run(sockets=[listening])
    engine.stop()
    mcore.shut_down()


def read_key(path: str | None) -> str | None:
    """The token in a file; None without a file.

    Raises:
        UserError: it cannot be read, or holds no token.
    """
    if path is None:
        return None
    key = read_text(f"--api-key-file {path}", pathlib.Path(path), "ascii").strip()
    if not key or len(key.split()) > 1:
        raise UserError(f"--api-key-file {path} holds no token; write one line without spaces")
    return key


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, before anything slow is done.

    Raises:
        UserError: the address cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise UserError(f"--host {host} --port {port} cannot be had ({error.strerror}); take another") from None
