"""The service: with a real model in a process of its own, and its limits with a stand-in that is slow on purpose."""

import contextlib
import http.client
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from conftest import files_of_at_most
from launch import ROOT, LeftAlone, command, environment, run_forked
from test_inspect import INJECTED, PATIENCE, browser, needs_chromium  # noqa: F401 - browser is a fixture

from megatron_retro.config.flags import parse
from megatron_retro.config.serving import ServeConfig
from megatron_retro.errors import UserError
from megatron_retro.inference.writer import Choice, Event, Text
from megatron_retro.retrieval.described import document_names
from megatron_retro.retrieval.embedding import EmbeddingTable
from megatron_retro.retrieval.journal import Journal
from megatron_retro.retrieval.live import LiveRetriever
from megatron_retro.retrieval.live_database import LiveDatabase, NoSuchDocument
from megatron_retro.serving.answers import Answer, Characters
from megatron_retro.serving.app import Service
from megatron_retro.serving.engine import Engine
from megatron_retro.serving.opening import Opened
from megatron_retro.serving.serve import listen, read_key
from megatron_retro.serving.server import make_server
from megatron_retro.workdir import WorkDir

TOOL = "tools/serve_retro.py"
SONG = "The lighthouse keeper of Skerryvore counts seventeen herring gulls every morning before he lights his pipe. "


class Bytes:
    """Stands in for a tokenizer: a token a byte, 256 ends a document."""

    vocab_size, eod, pad = 257, 256, 256

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, tokens: list[list[int]]) -> list[str]:
        return [bytes(token for token in row if token < 256).decode(errors="replace") for row in tokens]


# ------------------------------------------------------------------------------------------------ growing texts


def test_characters_come_whole() -> None:
    """Whatever the bytes are: told piece by piece or at once, the text is the same."""
    draw = random.Random(1)
    for _ in range(300):
        text = "".join(draw.choice(["a", " ", "é", "€", "😀", "\ufffd"]) for _ in range(draw.randrange(150)))
        tokens = list(text.encode())
        for _ in range(draw.randrange(3) if tokens else 0):
            tokens[draw.randrange(len(tokens))] = draw.randrange(256)
        growing = Characters(list(b"Begin: "), Bytes())  # type: ignore[arg-type]
        pieces = [growing.add(token) for token in tokens]
        assert "".join(pieces) + growing.rest() == bytes(tokens).decode(errors="replace")
        if tokens == list(text.encode()) and "\ufffd" not in text:
            assert "\ufffd" not in "".join(pieces) and "".join(pieces) == text


def test_a_text_ends_before_its_stop() -> None:
    draw = random.Random(2)
    for _ in range(300):
        text = "".join(draw.choice("abc") for _ in range(30))
        stops = ["".join(draw.choice("abc") for _ in range(draw.randint(1, 4))) for _ in range(draw.randint(0, 3))]
        answer = Answer(0, Text(0, [1], Choice(), 0, 30, None), Bytes(), None, stops)  # type: ignore[arg-type]
        told = ""
        for place, token in enumerate(text.encode()):
            piece = answer.add(Event(0, token=token, finish="length" if place == 29 else None))
            told += piece.text
            assert text.startswith(told)
            if piece.finish:
                break
        # The stop that is complete first ends the text; of several that are complete at once, the longest.
        ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
        assert (told, answer.finish) == ((text[: min(ends)[1]], "stop") if ends else (text, "length"))


# ------------------------------------------------------------------------------------------------ the live database


@pytest.fixture(scope="module")
def retriever(small_work: pathlib.Path) -> LiveRetriever:
    return LiveRetriever(WorkDir(small_work))


def naive_search(
    retriever: LiveRetriever, work: pathlib.Path, added: dict[str, str], removed: set[str], query: str
) -> list[tuple[float, str]]:
    """(distance, document) of all chunks, nearest first."""
    table, tokenizer, length = retriever.table, retriever.tokenizer, retriever.table.chunk_length
    chunks = retriever.stream.chunks(np.arange(len(retriever.stream)))
    names, vectors = document_names(table, table.document(chunks)), EmbeddingTable(WorkDir(work)).rows(chunks)
    for name, text in added.items():
        own = [*tokenizer.encode([text])[0], tokenizer.eod]
        rows = tokenizer.decode([own[begin : begin + length] for begin in range(0, len(own), length)])
        names, vectors = names + [name] * len(rows), np.concatenate([vectors, retriever.embed(rows)])
    distances = ((vectors.astype(np.float64) - retriever.embed([query]).astype(np.float64)) ** 2).sum(1)
    return sorted((float(d), name) for d, name in zip(distances, names, strict=True) if name not in removed)


def test_a_live_database_is_searched_as_one(retriever: LiveRetriever, small_work: pathlib.Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in small_work.rglob("*")}
    live, query = LiveDatabase(retriever), "herring gulls at the lighthouse, import json"
    added = {f"live:{number}": f"{SONG}{number} " * (1 + 3 * number) for number in range(3)}
    removed: set[str] = set()

    def check() -> None:
        ids, distances = live.search([query, SONG], 40)
        for row, text in enumerate((query, SONG)):
            expected = naive_search(retriever, small_work, added, removed, text)[:40]
            names = document_names(live.table, live.table.document(ids[row]))
            np.testing.assert_allclose(distances[row], [distance for distance, _ in expected], atol=1e-2)
            assert len(set(names) & {name for _, name in expected}) >= len({name for _, name in expected}) - 1
            assert not removed & set(names)

    assert live.add([added["live:0"]]) == ["live:0"]
    assert live.add([added["live:1"], added["live:2"]]) == ["live:1", "live:2"]
    check()
    ids, _ = live.search([SONG], 3)
    tokens, _ = live.table.tokens(ids[0], 20, 0)
    assert document_names(live.table, live.table.document(ids[0]))[0].startswith("live:")
    assert "lighthouse" in retriever.tokenizer.decode([tokens[0].tolist()])[0]
    first_own = naive_search(retriever, small_work, {}, set(), query)[0][1]
    removed |= {"live:1", first_own}
    live.remove(["live:1", first_own])
    check()
    assert live.added == ["live:0", "live:2"] and live.removed == [first_own] and live.counts == (2, 1)
    held_out = set(range(40)) - set(np.flatnonzero(retriever.database.is_member).tolist())
    for name in ("live:1", first_own, "live:3", "live:-1", "live:", "x:0", "", f"my_text_data:{held_out.pop()}", "²"):
        with pytest.raises(NoSuchDocument):
            live.remove([name])
    assert before == {path: path.stat().st_mtime_ns for path in small_work.rglob("*")}


def test_an_emptied_database_has_no_neighbors(retriever: LiveRetriever) -> None:
    live = LiveDatabase(retriever)
    members = np.flatnonzero(retriever.database.is_member)
    live.remove(document_names(retriever.table, members))
    ids, distances = live.search(["anything"], 3)
    assert (ids == -1).all() and np.isinf(distances).all() and len(live.stream) == 0
    live.add(["One document about everything."])
    assert (live.search(["anything"], 3)[0] >= 0).sum() == 1 and len(live.stream) == 1


def test_words_cannot_be_added(retriever: LiveRetriever, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retriever, "kind", "bm25")
    with pytest.raises(UserError, match="--retro-tasks add-documents"):
        LiveDatabase(retriever).add(["x"])


def test_a_journal_is_replayed(retriever: LiveRetriever, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "notes.jsonl"
    journal = Journal(str(path))
    live = LiveDatabase(retriever, journal)
    assert live.add([SONG, "Another one."]) == ["notes:0", "notes:1"]
    own = document_names(retriever.table, np.flatnonzero(retriever.database.is_member)[:1])[0]
    live.remove(["notes:1"])
    live.remove([own])
    with pytest.raises(UserError, match=r"notes\.jsonl is open in another process"):
        Journal(str(path))
    journal.close()
    with open(path, "ab") as file:
        file.write(b'{"change": "add", "document": "notes:2", "te')  # a crash in the middle of a line
    journal = Journal(str(path))
    again = LiveDatabase(retriever, journal)
    assert (again.added, again.removed) == (["notes:0"], [own]) and again.add(["More."]) == ["notes:2"]
    np.testing.assert_array_equal(again.search([SONG], 1)[1], live.search([SONG], 1)[1])
    journal.close()
    assert [json.loads(line)["document"] for line in path.read_text().splitlines()] == [
        "notes:0", "notes:1", "notes:1", own, "notes:2",
    ]  # fmt: skip


def test_a_journal_that_the_disk_refuses(retriever: LiveRetriever, tmp_path: pathlib.Path) -> None:
    """Nothing is changed, neither in the file nor in what is answered; with room it goes on."""
    path = tmp_path / "notes.jsonl"
    journal = Journal(str(path))
    live = LiveDatabase(retriever, journal)
    live.add([SONG])
    before, found = path.read_bytes(), live.search([SONG], 2)[1]
    for num_bytes in (len(before), len(before) + 100):  # the second: in the middle of the first line
        with files_of_at_most(num_bytes), pytest.raises(OSError, match="File too large"):
            live.add([SONG * 3, "Another one."])
        with files_of_at_most(len(before) + 10), pytest.raises(OSError, match="File too large"):
            live.remove(["notes:0"])
        assert path.read_bytes() == before and (live.added, live.removed) == (["notes:0"], [])
        np.testing.assert_array_equal(live.search([SONG], 2)[1], found)
    assert live.add(["Another one."]) == ["notes:1"]
    journal.close()
    assert len(Journal(str(path)).changes) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("notes.txt", "", r"ends in \.jsonl"),
        ("nowhere/notes.jsonl", "", "cannot be written to"),
        ("notes.jsonl", "{}\n", r"notes\.jsonl:1 is no change"),
        ("notes.jsonl", '{"change": "remove", "document": "a:1"}\nx\n', r"notes\.jsonl:2 is no change"),
        ("notes.jsonl", '{"change": "add", "document": 1, "text": "a"}\n', r"notes\.jsonl:1 is no change"),
        ("notes.jsonl", '{"change": "add", "document": "other:0", "text": "a"}\n', "is called 'other:0'"),
        ("my_text_data.jsonl", "", "the work dir has a corpus 'my_text_data'"),
    ],
)
def test_journals_that_cannot_be(
    retriever: LiveRetriever, tmp_path: pathlib.Path, name: str, content: str, message: str
) -> None:
    if "/" not in name:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        LiveDatabase(retriever, Journal(str(tmp_path / name)))


# ------------------------------------------------------------------------------------------------ limits


class SlowWriter:
    """Stands in for the model: writes `abcabc…`, a letter every few milliseconds; fails at a prompt with `!`."""

    model_seconds, pause = 0.0, 0.005

    def write_texts(self, arriving: Callable[[], list[Text]]) -> Iterator[Event]:
        texts: list[Text] = []
        while texts := [text for text in texts if not text.is_cancelled] + arriving():
            time.sleep(self.pause)
            for text in list(texts):
                if ord("!") in text.tokens:
                    raise RuntimeError("a failure with a /path/in/it.py")
                written = len(text.tokens) - text.num_prompt
                text.tokens.append(b"abc"[written % 3])
                ended = written + 1 == text.max_new_tokens
                yield Event(text.number, token=text.tokens[-1], finish="length" if ended else None)
                if ended:
                    texts.remove(text)


Ask = Callable[..., tuple[int, Any]]


def start_slow(*flags: str, key: str | None = None) -> tuple[Any, Engine, Service, int]:
    config = parse(ServeConfig, ["--load", "l", "--retro-work-dir", "w", *flags])
    config.finish(1)
    engine = Engine(SlowWriter(), config.limits.max_batch_size)  # type: ignore[arg-type]
    engine.start()
    service = Service(config, Opened(Bytes(), SlowWriter(), None, {}), engine, key)  # type: ignore[arg-type]
    listening = listen("127.0.0.1", 0)
    server = make_server(service.app)
    server.config.timeout_graceful_shutdown = 1
    thread = threading.Thread(target=lambda: server.run(sockets=[listening]), daemon=True)
    thread.start()

    def stop() -> None:
        server.should_exit = True
        thread.join()
        engine.stop()

    return stop, engine, service, listening.getsockname()[1]


@pytest.fixture
def slow() -> Iterator[Callable[..., Any]]:
    stops = []

    def start(*flags: str, key: str | None = None) -> Any:
        stop, *others = start_slow(*flags, key=key)
        stops.append(stop)
        return others

    yield start
    for stop in stops:
        stop()


def ask(
    port: int, content: Any, path: str = "/v1/completions", method: str = "POST", **headers: str
) -> tuple[int, dict[str, Any], dict[str, str]]:
    """(status, answer, headers)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = content if isinstance(content, (bytes, str)) or content is None else json.dumps(content)
    with contextlib.suppress(BrokenPipeError):  # refused by its head: the answer is there before the body is sent
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    text = response.read()
    connection.close()
    given = {name.lower(): value for name, value in response.getheaders()}
    return response.status, json.loads(text) if "json" in given["content-type"] else text, given


def wait_until(holds: Callable[[], bool]) -> None:
    limit = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.005)


def test_too_many_requests_are_told_to_come_back(slow: Callable[..., Any]) -> None:
    engine, service, port = slow("--max-concurrency", "2", "--max-batch-size", "1")
    threads = [threading.Thread(target=ask, args=(port, {"prompt": "x", "max_tokens": 200})) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: service._active == 2)
    status, answer, headers = ask(port, {"prompt": "x"})
    assert status == 429 and headers["retry-after"] == "1" and answer["error"]["type"] == "rate_limit_error"
    assert b"retro_requests_active 2" in ask(port, None, "/metrics", "GET")[1]  # type: ignore[operator]
    for thread in threads:
        thread.join()
    assert ask(port, {"prompt": "x"})[0] == 200
    wait_until(lambda: engine.num_running == engine.num_waiting == 0)  # a text leaves after its last event is told


def test_a_deadline_ends_what_is_written_and_refuses_what_waits(slow: Callable[..., Any]) -> None:
    _, _, port = slow("--deadline-seconds", "0.5", "--max-batch-size", "1")
    found = {}

    def request(name: str) -> None:
        found[name] = ask(port, {"prompt": "x", "max_tokens": 1000})[:2]

    early = threading.Thread(target=request, args=("early",))
    early.start()
    late = threading.Thread(target=request, args=("late",))
    late.start()
    early.join()
    late.join()
    (first, second) = sorted(found.values(), key=lambda answer: answer[0])
    assert first[0] == 200 and first[1]["choices"][0]["finish_reason"] == "length"
    text = first[1]["choices"][0]["text"]
    assert 5 < len(text) < 200 and text == ("abc" * 400)[: len(text)]
    assert first[1]["usage"]["completion_tokens"] == len(text)
    if second[0] != 200:  # else the first one's end left it a moment
        assert second[0] == 504 and second[1]["error"]["code"] == "deadline"


def test_a_client_that_leaves_frees_its_place(slow: Callable[..., Any]) -> None:
    engine, service, port = slow("--max-concurrency", "1")
    for stream in (True, False):
        connection = socket.create_connection(("127.0.0.1", port))
        body = json.dumps({"prompt": "x", "max_tokens": 1000, "stream": stream}).encode()
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
        )
        connection.sendall(body)
        wait_until(lambda: engine.num_running == 1)
        connection.close()
        wait_until(lambda: engine.num_running == 0 and service._active == 0)
    assert ask(port, {"prompt": "x"})[0] == 200


def test_a_failure_of_the_model_is_an_error_and_no_end(slow: Callable[..., Any], capfd: Any) -> None:
    engine, _, port = slow()
    status, answer, _ = ask(port, {"prompt": "fail!"})
    assert status == 500 and "path" not in json.dumps(answer) and "Traceback" in capfd.readouterr().err
    assert ask(port, {"prompt": "x"})[1]["choices"][0]["text"] == "abcabcabcabcabca"
    assert engine.is_alive and ask(port, None, "/health", "GET")[0] == 200


def test_sizes_and_keys(slow: Callable[..., Any]) -> None:
    _, _, port = slow("--max-body-bytes", "300", "--max-prompt-tokens", "20", "--max-new-tokens", "30", key="secret")
    key = {"Authorization": "Bearer secret"}
    assert ask(port, {"prompt": "x"}, **key)[0] == 200
    for wrong in (
        {},
        {"Authorization": "Bearer secre"},
        {"Authorization": "secret"},
        {"Authorization": "Basic secret"},
    ):
        status, answer, headers = ask(port, {"prompt": "x"}, **wrong)
        assert (
            status == 401 and answer["error"]["code"] == "invalid_api_key" and headers["www-authenticate"] == "Bearer"
        )
    for path, status in (("/", 200), ("/health", 200), ("/metrics", 401), ("/v1/models", 401), ("/v1/documents", 401)):
        assert ask(port, None, path, "GET")[0] == status
    assert ask(port, {"prompt": "x" * 300}, **key)[0] == 413
    chunked = iter([b'{"prompt": "', b"x" * 400, b'"}'])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/completions", chunked, key, encode_chunked=True)
    assert connection.getresponse().status == 413
    for field, value in (("prompt", "x" * 21), ("max_tokens", 31), ("n", 17), ("retrieval", "on")):
        status, answer, _ = ask(port, {"prompt": "x", field: value}, **key)
        assert status == 400 and answer["error"]["param"] == field, answer
    assert ask(port, {"text": "a document"}, "/v1/documents", **key)[0] == 409


def test_other_peoples_pages_are_refused(slow: Callable[..., Any]) -> None:
    _, _, port = slow()
    own = f"127.0.0.1:{port}"
    for host, origin, status in (
        (own, f"http://{own}", 200), (f"localhost:{port}", None, 200), (own, "http://evil.example", 403),
        (own, "null", 403), ("evil.example", None, 403), (f"evil.example:{port}", f"http://evil.example:{port}", 403),
    ):  # fmt: skip
        headers = {"Host": host, **({"Origin": origin} if origin else {})}
        assert ask(port, {"prompt": "x"}, **headers)[0] == status


# ------------------------------------------------------------------------------------------------ the tool


class Server:
    """`tools/serve_retro.py` as a user starts it."""

    def __init__(self, *arguments: object):
        line = self._start("--port", 0, *arguments)
        assert line.startswith("serving megatron-retro at http://127.0.0.1:"), line
        self.address = line.split()[-1]
        self.port = int(self.address.rpartition(":")[2])

    def _start(self, *arguments: object) -> str:
        """The first line of what it prints."""
        self._process = subprocess.Popen(
            command(TOOL, *arguments), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        assert self._process.stdout and self._process.stderr
        return self._process.stdout.readline() or self._process.stderr.read()

    def ask(self, *arguments: Any, **headers: str) -> Any:
        status, answer, _ = ask(self.port, *arguments, **headers)
        assert status == 200, answer
        return answer

    def stop(self) -> str:
        """What it said of problems."""
        self._process.send_signal(signal.SIGTERM)
        _, errors = self._process.communicate(timeout=60)
        return errors


class ForkedServer(Server):
    """The same, many times as quick to start."""

    def __init__(self, folder: pathlib.Path, *arguments: object):
        self._folder = folder
        super().__init__(*arguments)

    def _start(self, *arguments: object) -> str:
        self._fork = LeftAlone(self._folder, TOOL, *arguments, ranks=1)
        self._fork.wait_until_printed(0, "\n")
        return self._fork.printed(0).splitlines()[0]

    def stop(self) -> str:
        self._fork.signal(0, signal.SIGTERM)
        self._fork.wait(0)
        return self._fork.printed(0)


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("journal") / "notes.jsonl"


@pytest.fixture(scope="module")
def server(trained: pathlib.Path, small_work: pathlib.Path, journal: pathlib.Path) -> Iterator[Server]:
    started = Server("--load", trained, "--retro-work-dir", small_work, "--journal", journal)
    yield started
    started.stop()


@pytest.fixture
def client(server: Server) -> Any:
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)


def told(pieces: list[Any], index: int) -> tuple[str, str | None, list[Any]]:
    """(text, finish, neighbors) of one choice of a stream."""
    choices = [choice for piece in pieces for choice in piece.choices if choice.index == index]
    text, reads = "".join(choice.text for choice in choices), [read for choice in choices for read in choice.neighbors]
    assert all(choice.finish_reason is None for choice in choices[:-1])
    return text, choices[-1].finish_reason, reads


def test_openais_client(client: Any, server: Server) -> None:
    assert [model.id for model in client.models.list()] == ["megatron-retro"]
    asked = dict(
        model="megatron-retro", prompt=[SONG * 3, "import json\n"], max_tokens=80, seed=5, n=2, temperature=0.9
    )
    whole = client.completions.create(**asked)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert whole.object == "text_completion" and whole.usage.total_tokens > 4 * 60
    first, second = whole.choices[0], whole.choices[1]
    assert first.text != second.text and first.finish_reason in ("length", "stop")
    reads = first.neighbors
    assert [read["chunk"] for read in reads] == list(range(len(reads))) and SONG.startswith(reads[0]["text"][:40])
    assert len(reads[0]["neighbors"]) == 2 and reads[0]["neighbors"][0]["document"].startswith("my_text_data:")
    assert {"document", "distance", "text", "continuation"} <= set(reads[0]["neighbors"][0])
    pieces = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert pieces[-1].usage == whole.usage
    for choice in whole.choices:
        assert told(pieces, choice.index) == (choice.text, choice.finish_reason, choice.neighbors)
    off = client.completions.create(**asked, extra_body={"retrieval": "off"})
    assert all(choice.neighbors == [] for choice in off.choices) and off.choices[0].text != first.text
    assert client.completions.create(**asked, extra_body={"retrieval": "random", "top_k": 3}).choices[0].neighbors


def test_openais_chat(client: Any) -> None:
    """A question is filled up to a chunk, whose neighbors the answer reads from its first token on."""
    import openai

    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What does os.path.join do?"}]
    asked = dict(model="megatron-retro", messages=talk, max_completion_tokens=20, seed=5, n=2)
    whole = client.chat.completions.create(**asked)
    assert whole.object == "chat.completion" and whole.usage.prompt_tokens == 64 and len(whole.choices) == 2
    first = whole.choices[0]
    assert first.message.role == "assistant" and first.message.content == first.message.content.lstrip() != ""
    (read,) = first.neighbors
    assert read["chunk"] == 0 and read["text"].endswith("Question: What does os.path.join do?\nAnswer:")
    assert read["text"].lstrip("\n").startswith("Be brief.\n") and len(read["neighbors"]) == 2
    pieces = [piece for piece in client.chat.completions.create(**asked, stream=True)]
    assert {piece.object for piece in pieces} == {"chat.completion.chunk"}
    deltas = [choice.delta.content for piece in pieces for choice in piece.choices if choice.index == 0]
    assert "".join(deltas) == first.message.content
    more = [*talk, {"role": "assistant", "content": "It joins."}, {"role": "user", "content": "Joins what?"}]
    again = client.chat.completions.create(**{**asked, "messages": more}, extra_body={"retrieval": "random"})
    assert again.usage.prompt_tokens == 2 * 64 and [read["chunk"] for read in again.choices[0].neighbors] == [0, 1]
    given = [client.chat.completions.create(**asked, extra_body={"ctxs": [text]}) for text in (SONG, "import os")]
    assert given[0].choices[0].message != given[1].choices[0].message
    assert [read["neighbors"] for read in given[0].choices[0].neighbors] == [[]]
    for wrong in (more[:-1], more[2:], []):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**{**asked, "messages": wrong})
        assert caught.value.param == "messages"
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        client.chat.completions.create(**asked, tools=[{"type": "function", "function": {"name": "f"}}])


def test_openais_errors(client: Any) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="max_tokens") as caught:
        client.completions.create(model="megatron-retro", prompt="x", max_tokens="many")
    assert caught.value.param == "max_tokens" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError, match="there is no such model"):
        client.completions.create(model="gpt", prompt="x")
    with pytest.raises(openai.BadRequestError, match="logprobs is not supported"):
        client.completions.create(model="megatron-retro", prompt="x", logprobs=1)


def test_texts_do_not_depend_on_who_else_asks(server: Server) -> None:
    """Requests of all kinds at once, each answered as it would be alone."""
    requests = [
        {"prompt": SONG * (1 + number % 3), "max_tokens": 20 + 9 * number, "temperature": 0,
         "retrieval": ("on", "off")[number % 2]}
        for number in range(8)
    ]  # fmt: skip

    def said(choice: dict[str, Any]) -> tuple[str, str, list[set[str]]]:
        reads = [{neighbor["document"] for neighbor in read["neighbors"]} for read in choice["neighbors"]]
        return choice["text"], choice["finish_reason"], reads

    alone = [said(server.ask(request)["choices"][0]) for request in requests]
    together: list[Any] = [None] * 8

    def request(number: int) -> None:
        together[number] = said(server.ask(requests[number])["choices"][0])

    threads = [threading.Thread(target=request, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_documents_come_and_go(server: Server, trained: pathlib.Path, small_work: pathlib.Path) -> None:
    def nearest() -> list[str]:
        (choice,) = server.ask({"prompt": SONG * 3, "max_tokens": 1})["choices"]
        return [neighbor["document"] for read in choice["neighbors"] for neighbor in read["neighbors"]]

    before = nearest()
    added = server.ask({"documents": [{"text": SONG * 4, "id": 7}, {"text": "Nothing of the kind."}]}, "/v1/documents")
    names = [document["id"] for document in added["data"]]
    assert names[0] in nearest() and server.ask(None, "/v1/documents", "GET")["data"] == added["data"]
    assert server.ask(None, f"/v1/documents/{names[0]}", "DELETE")["deleted"]
    assert nearest() == before
    server.ask(None, f"/v1/documents/{before[0].replace(':', '%3A')}", "DELETE")
    assert before[0] not in nearest()
    assert ask(server.port, None, f"/v1/documents/{before[0]}", "DELETE")[0] == 404
    metrics = ask(server.port, None, "/metrics", "GET")[1]
    assert b"retro_documents_added 1\n" in metrics and b"retro_documents_removed 1\n" in metrics  # type: ignore[operator]


# ------------------------------------------------------------------------------------------------ malformed requests

WRONG: dict[str, list[Any]] = {
    "prompt": [None, 5, {}, [], [1, 2], [[1]], "", [""], ["a", 3], "\ud800", ["\udfff"], [None], {"a": 1}, ["a"] * 99],
    "max_tokens": ["5", 1.5, True, -1, 0, 10**12, [], {}, float("inf"), float("nan"), 10**400],
    "temperature": ["hot", -1, 3, float("nan"), float("inf"), [], {}],
    "top_p": ["x", 0, 1.5, -0.1, float("nan"), []],
    "top_k": [-1, "1", 1.5, [], 10**30],
    "n": [0, -1, 10**9, "2", 1.5, 129],
    "seed": [2**70, "1", 1.5, -(2**64)],
    "stop": [5, [""], "", ["a"] * 9, [1], {}, "\ud800", ["x" * 1001]],
    "stream": ["yes", 1, []],
    "stream_options": ["x", 3, []],
    "retrieval": ["maybe", 1, [], ""],
    "model": [3, "gpt-5", [], "../../etc/passwd"],
    "echo": [True], "logprobs": [5], "suffix": ["x"], "best_of": [3], "logit_bias": [{"5": 1}],
}  # fmt: skip


def malformed(draw: random.Random) -> bytes:
    """One request that must be refused."""
    kind, junk = draw.randrange(8), bytes(draw.randrange(256) for _ in range(draw.randrange(40)))
    path, method, host, more = "/v1/completions", "POST", "localhost", ""
    if kind <= 3:
        content = {"prompt": "x", "max_tokens": 1}
        for field in draw.sample(sorted(WRONG), draw.randint(1, 3)):
            content[field] = draw.choice(WRONG[field])
        body = json.dumps(content).encode()
        if draw.random() < 0.2:
            body = body[: draw.randrange(len(body))]
    elif kind == 4:
        body = draw.choice([junk, b"[" * 5000, b"{" + junk, b'"text"', b"null", b"9" * 5000, b"\xff\xfe{}"])
    elif kind == 5:
        path = "/v1/documents"
        text = draw.choice([None, 5, "", "  \n", [], {}, "\ud800"])
        content = draw.choice(
            [{"text": text}, {"documents": [{"text": text}]}, {"documents": text}, {"documents": [3]}]
        )
        body = json.dumps(content).encode() if draw.random() < 0.9 else junk
    elif kind == 6:
        body = junk if draw.random() < 0.3 else b""
        method = draw.choice(["GET", "PUT", "PATCH", "OPTIONS", "BREW", "DELETE", "TRACE", "HEAD"])
        if method == "HEAD":  # its answer has no body that could be read
            method = "LINK"
        odd = [
            "..",
            "%2e%2e",
            "etc/passwd",
            "%00",
            "%ff",
            "x" * 3000,
            "notes:999",
            ":",
            "a:b:c",
            "my_text_data:-1",
            "~",
        ]
        path = draw.choice(["/v1/", "/v1/documents/", "/", "//"]) + draw.choice(odd) + draw.choice(["", "?a=b", "/"])
    else:
        body = b'{"prompt": "x", "max_tokens": 1}'
        host, more = draw.choice([
            ("evil.example", ""), ("localhost", "Origin: http://evil.example\r\n"), ("[::1", "X: \x7f\r\n"),
            ("localhost:99999999999", "Origin: null\r\n"), ("\xe9\xe9", ""), ("localhost", "Origin: \xff\r\n"),
        ])  # fmt: skip
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n{more}Content-Length: {len(body)}\r\n\r\n"
    return head.encode("latin-1") + body


def not_http(draw: random.Random) -> bytes:
    """Bytes that are hardly a request."""
    junk = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 300)))
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    return draw.choice([
        junk, head + junk + b"\r\n\r\n", head + b"Content-Length: -5\r\n\r\n", head + b"Content-Length: 5\r\n\r\n{}",
        head + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx", head + b"Content-Length: %d\r\n\r\n" % 10**20,
        head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", head + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab",
        b"GET / HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET " + junk.hex().encode() * 3 + b"\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", head + b"A: b\r\n" * 4000 + b"\r\n", b"\x16\x03\x01" + junk,
        head + b"Upgrade: websocket\r\nConnection: Upgrade\r\nContent-Length: 1\r\n\r\n{", b"\x00" * 50,
    ])  # fmt: skip


class Line:
    """A connection that is used again while it is open."""

    def __init__(self, port: int):
        self._port, self._socket, self._buffer, self._asked = port, socket.socket(), b"", b""
        self._open()

    def _open(self) -> None:
        self._socket.close()
        self._socket, self._buffer = socket.create_connection(("127.0.0.1", self._port), timeout=60), b""

    def send(self, request: bytes, last: bool = False) -> None:
        """With `last`, on a new connection, and nothing more is sent."""
        self._asked = request
        if last:
            self._open()
        try:
            self._socket.sendall(request)
            if last:
                self._socket.shutdown(socket.SHUT_WR)
        except OSError:  # closed behind the last answer, or in the middle of what is too much
            pass

    def answer(self) -> tuple[int, bytes, bytes]:
        """(status, head, body)."""
        try:
            return self._read()
        except (OSError, EOFError):  # closed behind the last answer
            self._open()
            self._socket.sendall(self._asked)
            return self._read()

    def rest(self) -> bytes:
        """All that comes until the connection ends; then it is a new one."""
        try:
            while True:
                self._more()
        except (EOFError, OSError):
            pass
        answer = self._buffer
        self._open()
        return answer

    def _read(self) -> tuple[int, bytes, bytes]:
        while b"\r\n\r\n" not in self._buffer:
            self._more()
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        while len(self._buffer) < length:
            self._more()
        body, self._buffer = self._buffer[:length], self._buffer[length:]
        return int(head.split(b" ")[1]), head, body

    def _more(self) -> None:
        more = self._socket.recv(65536)
        if not more:
            raise EOFError
        self._buffer += more


def test_malformed_requests_are_refused(server: Server, small_work: pathlib.Path, trained: pathlib.Path) -> None:
    """2,000 of them: no failure, nothing of the machine in an answer, and the service goes on."""
    draw, lines = random.Random(3), [Line(server.port) for _ in range(50)]
    secrets = [b"Traceback", b".py", *(str(path).encode() for path in (ROOT, small_work, trained, pathlib.Path.home()))]
    counts: dict[int, int] = {}
    for turn in range(40):
        is_last = turn % 10 == 9
        requests = [(not_http if is_last else malformed)(draw) for _ in lines]
        for line, request in zip(lines, requests, strict=True):
            line.send(request, last=is_last)
        for line, request in zip(lines, requests, strict=True):
            if is_last:
                answer = line.rest()
                assert not answer or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 200")), (request, answer)
                assert not answer.startswith(b"HTTP/1.1 4") or b'{"error":' in answer
            else:
                status, head, answer = line.answer()
                counts[status] = counts.get(status, 0) + 1
                assert 400 <= status < 500 and b"application/json" in head, (request, status, answer)
                error = json.loads(answer)["error"]
                assert set(error) == {"message", "type", "param", "code"} and error["message"], request
            assert not any(secret in answer for secret in secrets if len(secret) > 1), (request, answer)
    assert set(counts) == {400, 403, 404, 405}, counts
    assert server.ask({"prompt": "x", "max_tokens": 2})["usage"]["completion_tokens"] >= 1
    metrics = ask(server.port, None, "/metrics", "GET")[1]
    assert b'status="5' not in metrics and b"retro_requests_active 0\n" in metrics  # type: ignore[operator]


# ------------------------------------------------------------------------------------------------ the page


@needs_chromium
def test_the_page(browser: Any, server: Server) -> None:  # noqa: F811
    complaints: list[str] = []
    hosts: set[str] = set()
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(PATIENCE)
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]) if "://" in request.url else None)
    page.goto(server.address)
    hostile = f"{SONG}{INJECTED} " * 3
    page.fill("#document", hostile)
    page.click("#add button")
    page.wait_for_selector("#changed:has-text('was added')")
    name = page.inner_text("#changed").split()[0]

    def write(prompt: str, mode: str) -> str:
        page.click(f"button[value={mode}]")
        page.fill("#prompt", prompt)
        page.fill("#tokens", "40")
        page.click("#write")
        page.wait_for_selector("#status:has-text('tokens in')")
        page.wait_for_selector("#write:enabled")
        return page.locator("#text").text_content()

    text = write(hostile, "on")
    assert text.startswith(hostile) and len(text) > len(hostile)
    cards = page.locator(f".neighbor[data-document='{name}']")
    assert cards.count() and "distance 0.0" in cards.first.inner_text()
    assert "<img src=x onerror=" in page.inner_text("#reads") + page.inner_text("#text")
    assert page.locator("img, main script").count() == 0
    cards.first.get_by_role("button").click()
    page.wait_for_selector("#changed:has-text('was removed')")
    assert page.locator(f".neighbor.gone[data-document='{name}']").count() == cards.count()
    write(hostile, "on")
    assert page.locator(f".neighbor[data-document='{name}']").count() == 0 and page.locator(".neighbor").count()
    write(SONG, "random")
    write(SONG, "off")
    assert page.locator(".neighbor").count() == 0 and "off" in page.inner_text("#reads-note")
    page.fill("#name", "nobody:7")
    page.click("#remove button")
    page.wait_for_selector("#changed.wrong:has-text('no such document')")
    page.fill("#tokens", "1024")
    page.click("#write")
    page.wait_for_selector("#stop:enabled")
    page.click("#stop")
    page.wait_for_selector("#write:enabled")
    for width in (1280, 400):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.locator("html").evaluate("page => page.scrollWidth") == width
    page.close()
    assert [text for text in complaints if "404" not in text] == []  # the browser tells of the answer to nobody:7
    assert hosts == {server.address.split("/")[2]}


# ------------------------------------------------------------------------------------------------ starting


def test_a_restart_keeps_the_documents(
    server: Server, trained: pathlib.Path, small_work: pathlib.Path, journal: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """The last test of this server: it ends, and another one takes its journal."""
    (name,) = [document["id"] for document in server.ask({"text": SONG * 4}, "/v1/documents")["data"]]
    before = server.ask(None, "/v1/documents", "GET")
    asked = {"prompt": SONG * 3, "max_tokens": 20, "temperature": 0}

    def nearest(server: Server, **key: str) -> list[set[str]]:
        """Documents that each chunk reads; embeddings differ in the last bit with the batch they are computed in."""
        reads = server.ask(asked, **key)["choices"][0]["neighbors"]
        return [{neighbor["document"] for neighbor in read["neighbors"]} for read in reads]

    known = nearest(server)
    assert name in known[0] and "Traceback" not in server.stop()
    (tmp_path / "key").write_text("a-token\n")
    where = ["--load", trained, "--retro-work-dir", small_work]
    again = ForkedServer(tmp_path / "again", *where, "--journal", journal, "--api-key-file", tmp_path / "key")
    try:
        key = {"Authorization": "Bearer a-token"}
        assert again.ask(None, "/v1/documents", "GET", **key) == before
        assert nearest(again, **key)[:4] == known[:4]
        assert ask(again.port, asked)[0] == 401
        with pytest.raises(UserError, match=f"--port {again.port} cannot be had"):
            listen("127.0.0.1", again.port)
    finally:
        assert "Traceback" not in again.stop()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--retro-work-dir w", "--load is missing"),
        ("--load l", "--retro-work-dir is missing"),
        ("--load l --retro-work-dir w --host 0.0.0.0", "--host 0.0.0.0 can be reached .* needs --api-key-file"),
        (
            "--load l --retro-work-dir w --tensor-model-parallel-size 2",
            "--tensor-model-parallel-size is 2; .* one rank",
        ),
        ("--load l --retro-work-dir w --pipeline-model-parallel-size 2", "--pipeline-model-parallel-size is 2"),
        ("--load l --retro-work-dir w --port 70000", "--port is 70000"),
        ("--load l --retro-work-dir w --max-concurrency 0", "--max-concurrency is 0; it must be at least 1"),
        ("--load l --retro-work-dir w --deadline-seconds 0", "--deadline-seconds is 0.0; it must be above 0"),
        ("--load l --retro-work-dir w --deadline-seconds nan", "--deadline-seconds is nan"),
        ("--load l --retro-work-dir w --retro-num-neighbors 0", "--retro-num-neighbors is 0"),
        ("--load l --retro-work-dir w --retrieval maybe", "maybe"),
    ],
)
def test_flags_that_cannot_be(flags: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(ServeConfig, flags.split()).finish(1)


def test_a_wrong_start_is_one_line(tmp_path: pathlib.Path) -> None:
    shown = run_forked(TOOL, "--load", tmp_path, "--retro-work-dir", tmp_path, "--host", "0.0.0.0", expect=2)
    assert "needs --api-key-file" in shown and len(shown.splitlines()) == 1


def test_loopback_alone_needs_no_key(tmp_path: pathlib.Path) -> None:
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        parse(ServeConfig, ["--load", "l", "--retro-work-dir", "w", "--host", host]).finish(1)
    with pytest.raises(UserError, match="one rank"):
        parse(ServeConfig, ["--load", "l", "--retro-work-dir", "w"]).finish(2)
    for content in ("", "two words", "\n"):
        (tmp_path / "key").write_text(content)
        with pytest.raises(UserError, match="holds no token"):
            read_key(str(tmp_path / "key"))
    with pytest.raises(UserError, match="cannot be read"):
        read_key(str(tmp_path / "none"))
    assert not os.path.exists(tmp_path / "none")
