"""Flags of `tools/serve_retro.py`."""

import dataclasses
import ipaddress

from megatron_retro.config.flags import at_least, flag, flag_name, required
from megatron_retro.config.model import RETRIEVAL_MODES, ParallelConfig
from megatron_retro.errors import UserError


@dataclasses.dataclass
class ServedGroup:
    """what to serve"""

    load: str | None = flag(None, "directory of checkpoints, the newest is taken (required)")
    retro_work_dir: str | None = flag(None, "work dir with the tokenizer and the database to read (required)")
    retro_num_neighbors: int | None = flag(None, "neighbors a chunk", show="the checkpoint's")
    retrieval: str = flag("on", "what requests that do not say it get", choices=RETRIEVAL_MODES)
    journal: str | None = flag(None, "file ending in .jsonl that keeps added and removed documents over a restart")
    model_name: str = flag("megatron-retro", "the model's name in requests and answers")


@dataclasses.dataclass
class DoorGroup:
    """who may ask"""

    host: str = flag("127.0.0.1", "address to listen at")
    port: int = flag(8000, "port to listen at; 0 takes a free one")
    api_key_file: str | None = flag(None, "file with the token that requests must carry; needed beyond this machine")


@dataclasses.dataclass
class LimitsGroup:
    """how much may be asked"""

    max_prompt_tokens: int = flag(4096, "tokens of a prompt")
    max_new_tokens: int = flag(1024, "tokens to write for a prompt")
    max_batch_size: int = flag(16, "texts written at once, also the most of one request")
    max_concurrency: int = flag(64, "requests waiting or running; one more is told to come back later")
    deadline_seconds: float = flag(120.0, "time of a request, waiting included")
    max_body_bytes: int = flag(1_000_000, "size of a request")


@dataclasses.dataclass
class ServeConfig:
    """Everything `tools/serve_retro.py` takes."""

    served: ServedGroup = dataclasses.field(default_factory=ServedGroup)
    door: DoorGroup = dataclasses.field(default_factory=DoorGroup)
    limits: LimitsGroup = dataclasses.field(default_factory=LimitsGroup)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)

    def finish(self, world_size: int) -> None:
        """Check.

        Raises:
            UserError: names the flag, its value and what would do.
        """
        served, door, parallel = self.served, self.door, self.parallel
        required(
            served,
            load="it takes the --save directory of a training run",
            retro_work_dir="it takes the work dir whose database the model reads",
        )
        at_least(1, served, "retro_num_neighbors")
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
            if getattr(parallel, name) != 1:
                raise UserError(f"{flag_name(name)} is {getattr(parallel, name)}; the service runs on one rank, take 1")
        if world_size > 1 or parallel.sequence_parallel:
            raise UserError("the service runs on one rank; start it with python, without --sequence-parallel")
        if not 0 <= door.port < 65536:
            raise UserError(f"--port is {door.port}; it takes 0 … 65535")
        if not (door.api_key_file or is_loopback(door.host)):
            raise UserError(f"--host {door.host} can be reached from other machines; that needs --api-key-file")
        counts = (field.name for field in dataclasses.fields(self.limits) if field.type is int)
        at_least(1, self.limits, *counts)
        if not 0 < self.limits.deadline_seconds < float("inf"):
            raise UserError(f"--deadline-seconds is {self.limits.deadline_seconds}; it must be above 0")


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
