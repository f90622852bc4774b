"""A text of an answer while it grows: from tokens to characters that will not change any more, up to a stop text."""

import dataclasses
from typing import Any

from megatron_retro.data.tokenizer import Tokenizer
from megatron_retro.inference.reader import Library
from megatron_retro.inference.writer import Event, Text
from megatron_retro.retrieval.described import describe_neighbors

_CONTEXT, _WINDOW = 16, 64  # tokens
_LONGEST_START = 3  # bytes that may begin a character of UTF-8 without ending it
_UNREADABLE = "\ufffd"


@dataclasses.dataclass
class Piece:
    """What is new of a text.

    Attributes:
        index: of the text in its answer.
        text: more of it.
        reads: chunks that were read for, with their neighbors.
        finish: "stop" behind the end of the document or at a stop text, "length" where the text was cut; else None.
    """

    index: int
    text: str = ""
    reads: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    finish: str | None = None

    def __bool__(self) -> bool:
        return bool(self.text or self.reads or self.finish)


class Characters:
    """Tokens to characters, one token at a time; a character that is not complete is held back.

    Only the last tokens are decoded each time, behind enough others that the decoder treats them as inside of a text.
    """

    def __init__(self, prompt: list[int], tokenizer: Tokenizer):
        self._tokenizer, self._context = tokenizer, prompt[-_CONTEXT:]
        self._tokens: list[int] = []
        self._told = 0  # characters of the window that were handed out
        self._start()

    def _start(self) -> None:
        self._before = len(self._tokenizer.decode([self._context])[0])

    def add(self, token: int) -> str:
        """What can be told now."""
        self._tokens.append(token)
        text = self._window()
        held = len(text) - len(text.rstrip(_UNREADABLE))
        new = self._tell(text[: len(text) - min(held, _LONGEST_START)])
        if len(self._tokens) >= _WINDOW and not held:
            self._context, self._tokens, self._told = self._tokens[-_CONTEXT:], [], 0
            self._start()
        return new

    def rest(self) -> str:
        """What was held back: there will be no more tokens."""
        return self._tell(self._window())

    def _window(self) -> str:
        return self._tokenizer.decode([self._context + self._tokens])[0][self._before :]

    def _tell(self, text: str) -> str:
        new = text[self._told :]
        self._told = max(self._told, len(text))
        return new


class Answer:
    """One text of an answer.

    Args:
        index: in its answer.
        text: that the writer writes on.
        library: has the chunks that are read.
        stops: texts before which it ends.

    Attributes:
        num_tokens: how many were written.
        finish: None while it grows.
    """

    def __init__(self, index: int, text: Text, tokenizer: Tokenizer, library: Library | None, stops: list[str]):
        self.index, self.text, self._tokenizer, self._library, self._stops = index, text, tokenizer, library, stops
        self._characters = Characters(text.tokens, tokenizer)
        self._held = ""  # it may begin a stop text
        self.num_tokens = 0
        self.finish: str | None = None

    def add(self, event: Event) -> Piece:
        """What an event brings."""
        piece = Piece(self.index)
        if self.finish:
            return piece
        if event.chunk is not None:
            piece.reads.append(self._describe(event))
        if event.token is not None:
            self.num_tokens += 1
            self._held += self._characters.add(event.token)
        return self._told(piece, event.finish)

    def end(self) -> Piece:
        """Cut the text here."""
        return Piece(self.index) if self.finish else self._told(Piece(self.index), "length")

    def _told(self, piece: Piece, finish: str | None) -> Piece:
        if finish:
            self._held += self._characters.rest()
        places = [place for place in (self._held.find(stop) for stop in self._stops) if place >= 0]
        if places:
            piece.text, finish = self._held[: min(places)], "stop"
        else:
            kept = 0 if finish else self._beginning_of_a_stop()
            cut = len(self._held) - kept
            piece.text, self._held = self._held[:cut], self._held[cut:]
        piece.finish = self.finish = finish
        return piece

    def _beginning_of_a_stop(self) -> int:
        """How many of the last characters may begin a stop text."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest

    def _describe(self, event: Event) -> dict[str, Any]:
        assert self._library and event.chunk is not None and event.ids is not None and event.distances is not None
        table = self._library.table
        length = table.chunk_length
        tokens = self.text.tokens[event.chunk * length : (event.chunk + 1) * length]
        neighbors = describe_neighbors(table, self._tokenizer, event.ids, event.distances)
        return {"chunk": event.chunk, "text": self._tokenizer.decode([tokens])[0], "neighbors": neighbors}
