"""Everything that takes a while before the first request can be answered."""

import dataclasses

from megatron_retro.config.model import QA_PROMPT
from megatron_retro.config.serving import ServeConfig
from megatron_retro.data.tokenizer import Tokenizer
from megatron_retro.inference.generate import make_writer, open_trained
from megatron_retro.inference.reader import Reader, open_reader
from megatron_retro.inference.writer import Writer
from megatron_retro.retrieval.journal import Journal
from megatron_retro.retrieval.live import LiveRetriever
from megatron_retro.retrieval.live_database import LiveDatabase


@dataclasses.dataclass
class Opened:
    """A model that can write, and what it reads.

    Attributes:
        library: None for a GPT.
        readers: "on" and "random"; none for a GPT.
        template: what a user's message becomes, with `{question}` in it: that of the checkpoint's --qa-prompt.
    """

    tokenizer: Tokenizer
    writer: Writer
    library: LiveDatabase | None
    readers: dict[str, Reader]
    template: str = QA_PROMPT

    @property
    def reading_seconds(self) -> float:
        return sum(reader.seconds for reader in self.readers.values())


def open_all(config: ServeConfig, journal: Journal | None) -> Opened:
    """Load the model, and the database with the journal's changes.

    Raises:
        UserError: flags, checkpoint, work dir and journal do not fit together.
    """
    served = config.served
    assert served.load and served.retro_work_dir
    work, trained, table, tokenizer = open_trained(served.load, served.retro_work_dir, config.parallel)
    template = trained.template
    if not trained.retro:
        return Opened(tokenizer, make_writer(trained, table, tokenizer, None, 0), None, {}, template)
    library = LiveDatabase(LiveRetriever(work), journal)
    num_neighbors = served.retro_num_neighbors or trained.retro.retro_num_neighbors
    readers = {mode: open_reader(work, table, num_neighbors, mode, library=library) for mode in ("on", "random")}
    writer = make_writer(trained, table, tokenizer, readers["on"], num_neighbors)
    return Opened(tokenizer, writer, library, readers, template)
