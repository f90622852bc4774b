"""Questions and conversations as files hold them, and how a prompt is laid out: JSON lines to texts, texts to tokens.

    {"question": "…", "answers": ["…", …], "ctxs": […]?}
    {"messages": [{"role": "system" | "user" | "assistant", "content": "…"}, …], "ctxs": […]?}

A chunk's neighbors are read from its last token on, so a prompt is filled up on the left until it ends with a chunk:
its neighbors are then read from the first token of the answer on (Wang et al., arXiv 2304.06762, do the same). The
filler is one token that says nothing, where the tokenizer has it a line feed: the embedder does not see white space.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any, TypeVar

from megatron_retro.data.tokenizer import Tokenizer
from megatron_retro.errors import UserError
from megatron_retro.reading import parse_json, read_text

_FILLERS = ("\n", " ", ".")

Record = TypeVar("Record")


@dataclasses.dataclass(frozen=True)
class Question:
    """A question, the answers that are right, and the texts to read, if any are given."""

    question: str
    answers: list[str]
    ctxs: list[str]


@dataclasses.dataclass(frozen=True)
class Turn:
    """What the model goes on from, as text, and what it shall answer."""

    prompt: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Turns in their order, and the texts to read, if any are given.

    Attributes:
        line: of the file, from 1.
    """

    turns: list[Turn]
    ctxs: list[str]
    line: int


_QUESTION = (
    '{"question": "…", "answers": ["…"]} on each line, and "ctxs": ["…"] or [{"title": "…", "text": "…"}] where texts '
    "are given"
)
_CONVERSATION = (
    '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]} or {"question": "…", '
    '"answers": ["…"]} on each line, and "ctxs": ["…"] or [{"title": "…", "text": "…"}] where texts are given'
)


def read_questions(path: pathlib.Path) -> list[Question]:
    """The questions of a file of JSON lines.

    Raises:
        UserError: the file cannot be read, or a line is no question; it names the line.
    """
    return _records("--qa", path, "question", _QUESTION, lambda record, line: _question(record))


def read_conversations(flag: str, path: pathlib.Path, template: str) -> list[Conversation]:
    """The conversations of a file of JSON lines of either form; of a question's answers the first one is given.

    Args:
        template: the prompt of every turn, with `{question}` in it.

    Raises:
        UserError: the file cannot be read, or a line is none; it names the line.
    """

    def read(record: dict[str, Any], line: int) -> Conversation:
        if "messages" not in record:
            asked = _question(record)
            return Conversation([Turn(prompt(template, asked.question), asked.answers[0])], asked.ctxs, line)
        turns, unanswered = dialog(record["messages"], template)
        if unanswered is not None:
            raise TypeError('"messages" do not end with an "assistant"')
        if not all(message["content"].strip() for message in record["messages"] if message["role"] != "system"):
            raise TypeError('the "content" of a message is empty')
        return Conversation(turns, _contexts(record), line)

    return _records(flag, path, "example", _CONVERSATION, read)


def _records(
    flag: str, path: pathlib.Path, kind: str, form: str, read: Callable[[dict[str, Any], int], Record]
) -> list[Record]:
    if path.is_dir() or path.suffix in (".gz", ".zst"):
        what = "a directory" if path.is_dir() else "compressed"
        raise UserError(f"{flag} {path} is {what}; give a file of JSON lines, not compressed")
    records = []
    text = read_text(f"{flag} {path}", path).removeprefix("\ufeff")  # a byte order mark is no text
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                record = parse_json(line)
                if not isinstance(record, dict):
                    raise TypeError("it is no JSON object")
                json.dumps(record, ensure_ascii=False).encode()  # a ValueError where it holds what is no Unicode text
                records.append(read(record, number))
            except (ValueError, KeyError, TypeError) as error:
                reason = f"no key {error}" if isinstance(error, KeyError) else str(error)
                raise UserError(f"{flag} {path}:{number}: {reason}; write {form}") from None
    if not records:
        raise UserError(f"{flag} {path} holds no {kind}; write one a line")
    return records


def _question(record: dict[str, Any]) -> Question:
    question, expected = record["question"], record["answers"]
    if not (isinstance(question, str) and question.strip()):
        raise TypeError('"question" is no text')
    if not (isinstance(expected, list) and expected and all(isinstance(one, str) for one in expected)):
        raise TypeError('"answers" is no list of texts')
    if not all(one.strip() for one in expected):
        raise TypeError('"answers" holds an empty text')
    return Question(question, expected, _contexts(record))


def dialog(messages: Any, template: str) -> tuple[list[Turn], str | None]:
    """OpenAI's messages as turns, and the prompt of a user who has no answer yet; a system stands before the first one.

    Raises:
        TypeError, KeyError: they are none, or not of user and assistant in turn.
    """
    if not (isinstance(messages, list) and all(isinstance(message, dict) for message in messages)):
        raise TypeError('"messages" is no list of objects')
    texts = [(message["role"], message["content"]) for message in messages]
    if not all(isinstance(content, str) for _, content in texts):
        raise TypeError('the "content" of a message is no text')
    system = f"{texts.pop(0)[1]}\n" if texts and texts[0][0] == "system" else ""
    if not texts or [role for role, _ in texts] != [("user", "assistant")[place % 2] for place in range(len(texts))]:
        raise TypeError('the roles of "messages" are not "system" (or none), then "user" and "assistant" in turn')
    prompts = [prompt(template, question) for _, question in texts[::2]]
    prompts[0] = system + prompts[0]
    answers = [answer for _, answer in texts[1::2]]
    turns = [Turn(*pair) for pair in zip(prompts, answers, strict=False)]
    return turns, prompts[-1] if len(prompts) > len(answers) else None


def _contexts(record: dict[str, Any]) -> list[str]:
    ctxs = record.get("ctxs") or []
    if not isinstance(ctxs, list):
        raise TypeError('"ctxs" is no list')
    return [_context(ctx) for ctx in ctxs]


def _context(ctx: Any) -> str:
    if isinstance(ctx, dict):
        ctx = "\n".join(str(ctx[key]) for key in ("title", "text") if ctx.get(key))
    if not isinstance(ctx, str):
        raise TypeError('"ctxs" holds what is neither text nor {"title", "text"}')
    if not ctx.strip():
        raise TypeError('"ctxs" holds an empty text, or an object without "title" and "text"')
    return ctx


# ------------------------------------------------------------------------------------------------ prompts


def prompt(template: str, question: str) -> str:
    """The template with the question in it."""
    return template.replace("{question}", question)


def filler(tokenizer: Tokenizer) -> int:
    """The token that fills prompts up: a line feed, space or full stop of one token, else the end of a document."""
    rows = tokenizer.encode(list(_FILLERS))
    return next((row[0] for row in rows if len(row) == 1), tokenizer.eod)


def filled(tokens: list[int], chunk_length: int, fill: int, behind: int = 0) -> list[int]:
    """Tokens behind so many fillers that they end with a chunk; at least one.

    Args:
        behind: tokens that stand before them.
    """
    missing = -(behind + len(tokens)) % chunk_length
    return [fill] * (missing if tokens or missing else chunk_length) + tokens


def encoded(turns: list[Turn], tokenizer: Tokenizer) -> list[tuple[list[int], list[int]]]:
    """(tokens of the prompt, tokens of its answer) of turns.

    Prompt and answer are encoded as one text, with a space between where the prompt ends without: the answer's tokens
    are then what a model that goes on from the prompt would write. Where no token ends with the prompt they are encoded
    one by one.
    """
    prompts = tokenizer.encode([turn.prompt for turn in turns])
    answers = [turn.answer if turn.prompt[-1:].isspace() else f" {turn.answer}" for turn in turns]
    wholes = tokenizer.encode([turn.prompt + answer for turn, answer in zip(turns, answers, strict=True)])
    pairs = []
    for tokens, whole, answer in zip(prompts, wholes, answers, strict=True):
        joined = whole[: len(tokens)] == tokens
        pairs.append((tokens, whole[len(tokens) :] if joined else tokenizer.encode([answer])[0]))
    return pairs


def laid_out(
    pairs: list[tuple[list[int], list[int]]], chunk_length: int, fill: int, eod: int
) -> tuple[list[int], list[bool]]:
    """A conversation as the model reads it: every prompt ends with a chunk, every answer with `eod`.

    Args:
        pairs: (tokens of the prompt, tokens of its answer) of each turn.

    Returns:
        (tokens, which of them are an answer's).
    """
    row: list[int] = []
    is_answer: list[bool] = []
    for prompt_tokens, answer_tokens in pairs:
        row += filled(prompt_tokens, chunk_length, fill, len(row))
        is_answer += [False] * (len(row) - len(is_answer))
        row += [*answer_tokens, eod]
        is_answer += [True] * (len(row) - len(is_answer))
    return row, is_answer
