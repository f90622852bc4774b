"""Flags of `tools/inspect_retro_data.py`."""

import dataclasses

from megatron_retro.config.flags import at_least, flag, required
from megatron_retro.errors import UserError


@dataclasses.dataclass
class PageGroup:
    """what to look at, and the page that shows it"""

    retro_work_dir: str | None = flag(None, "work dir whose neighbors are finished (required)")
    output: str | None = flag(None, "directory for index.html: figures, and chunks with their neighbors")
    max_chunks: int = flag(2000, "chunks on the page, sampled where there are more; the hard lists come on top")
    seed: int = flag(1234, "seed of the sample")


@dataclasses.dataclass
class QueryGroup:
    """the nearest chunks of any text, printed"""

    query: str | None = flag(None, "the text")
    k: int = flag(5, "chunks to print")
    json: bool = flag(False, "print JSON")


@dataclasses.dataclass
class InspectConfig:
    """Everything `tools/inspect_retro_data.py` takes."""

    page: PageGroup = dataclasses.field(default_factory=PageGroup)
    query: QueryGroup = dataclasses.field(default_factory=QueryGroup)

    def finish(self) -> None:
        """Check.

        Raises:
            UserError: names the flag and what is missing.
        """
        required(self.page, retro_work_dir="tools/preprocess_retro_data.py builds one")
        if not self.page.output and self.query.query is None:
            raise UserError("nothing to do: --output writes a page, --query finds the nearest chunks of a text")
        if self.query.query is not None and not self.query.query.strip():
            raise UserError("--query is empty; it takes a text")
        if self.query.json and self.query.query is None:
            raise UserError("--json is the form of answers to --query, which is missing")
        at_least(1, self.page, "max_chunks")
        at_least(1, self.query, "k")
        if self.page.seed < 0:
            raise UserError(f"--seed is {self.page.seed}; it takes a whole number of at least 0")
