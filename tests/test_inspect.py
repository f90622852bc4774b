"""The page that shows a work dir, read as data and in a browser; answers in the terminal; what bad input says."""

import base64
import gzip
import json
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

import launch
import numpy as np
import pytest
from conftest import SMALL, build, write_jsonl
from launch import ROOT
from test_overlap import naive

from megatron_retro.config.flags import parse
from megatron_retro.config.inspection import InspectConfig
from megatron_retro.data.chunks import ChunkTable
from megatron_retro.errors import UserError
from megatron_retro.inspection import collect as collecting
from megatron_retro.inspection import terminal
from megatron_retro.inspection.collect import collect
from megatron_retro.inspection.inspect import inspect
from megatron_retro.inspection.page import render
from megatron_retro.inspection.texts import ChunkTexts
from megatron_retro.retrieval.corpora import open_tokenizer
from megatron_retro.retrieval.neighbors import NeighborTable
from megatron_retro.workdir import WorkDir

INJECTED = (
    '</script><img src=x onerror="window.injected=1"><script>window.injected=1</script> &lt; \u2028 \u2029 {{style}}'
)
FACE = "\U0001f600"


def run(work: pathlib.Path, *arguments: str) -> None:
    inspect(parse(InspectConfig, ["--retro-work-dir", str(work), *arguments]))


def embedded(html: str) -> dict[str, Any]:
    """The data that a page carries."""
    packed = re.search(r'<script type="application/gzip" id="data">([^<]*)</script>', html)
    assert packed
    return json.loads(gzip.decompress(base64.b64decode(packed[1])))


def characters(text: str, begin: int, end: int) -> str:
    """`text.slice(begin, end)` of JavaScript."""
    return text.encode("utf-16-le")[2 * begin : 2 * end].decode("utf-16-le")


@pytest.fixture(scope="session")
def hostile_work(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Two corpora whose text wants to be markup; so few chunks that all have fewer neighbors than were asked for."""
    folder = tmp_path_factory.mktemp("hostile")
    words = ["apples and pears", "trains and stations", "rivers and bridges"]
    pages = [f"{INJECTED} {FACE} page about {topic}. " * 4 for topic in words]
    notes = [f"note {number} on {topic}, a quiet place by the sea. " * 8 for number, topic in enumerate(words)]
    web, other = write_jsonl(folder / "web.jsonl", pages), write_jsonl(folder / "notes.jsonl", notes)
    build(folder / "work", "--input", str(web), str(other), *SMALL, "--split", "100,0,0",
          "--retro-query-num-neighbors-save", "300")  # fmt: skip
    return folder / "work"


# ------------------------------------------------------------------------------------------------ figures


Small = tuple[WorkDir, ChunkTable, dict[str, Any]]


@pytest.fixture(scope="module")
def small(small_work: pathlib.Path) -> Small:
    work = WorkDir(small_work)
    return work, ChunkTable.open(work), collect(work, 2000, 1)


def test_all_chunks_of_a_small_work_dir_are_shown(small: Small) -> None:
    work, table, data = small
    assert data["shown"] == list(range(table.num_chunks)) and data["num_chunks"] == data["sampled"] == table.num_chunks
    ids = NeighborTable(work).ids(np.arange(table.num_chunks))
    distances = NeighborTable(work).distances(np.arange(table.num_chunks))
    assert [[row[0] for row in rows] for rows in data["neighbors"]] == [row[row >= 0].tolist() for row in ids]
    assert [row[1] for rows in data["neighbors"] for row in rows] == pytest.approx(distances[ids >= 0], abs=1e-4)


def test_texts_and_places(small: Small) -> None:
    work, table, data = small
    tokenizer = open_tokenizer(work)
    for chunk in range(0, table.num_chunks, 7):
        corpus, number, place, all_chunks, text = data["texts"][chunk]
        document = int(table.document(np.array([chunk]))[0])
        tokens, length = table.tokens(np.array([chunk]), table.chunk_length, 0)
        assert (corpus, number) == (0, document) and text == tokenizer.decode([tokens[0, : length[0]].tolist()])[0]
        assert table.first_chunk[document] + place == chunk
        assert table.first_chunk[document] + all_chunks == table.first_chunk[document + 1]


def test_marks_are_the_longest_shared_run(small: Small) -> None:
    _, table, data = small
    for chunk in range(0, table.num_chunks, 29):
        for near, _, tokens, *cuts in data["neighbors"][chunk][:2]:
            rows, lengths = table.tokens(np.array([chunk, near]), table.chunk_length, 0)
            a, b = (row[:length].tolist() for row, length in zip(rows, lengths, strict=True))
            own, other = data["texts"][chunk][4], data["texts"][near][4]
            assert tokens == naive(a, b)[0]
            assert characters(own, *cuts[:2]) == characters(other, *cuts[2:])
            assert tokens < 2 or characters(own, *cuts[:2])  # one token may be the end of the document


def test_distributions(small: Small) -> None:
    data = small[2]
    distances, runs = data["histograms"]
    nearest = [rows[0] for rows in data["neighbors"]]
    high = max(row[1] for row in nearest)
    expected = np.zeros(len(distances["counts"]), int)
    for row in nearest:
        expected[min(int(row[1] / high * len(expected)), len(expected) - 1)] += 1
    assert np.abs(np.subtract(distances["counts"], expected)).sum() <= 2  # the page's distances are rounded
    assert runs["counts"] == [sum(row[2] // 2 == bar for row in nearest) for bar in range(len(runs["counts"]))]
    assert len(runs["counts"]) == len(runs["ranges"]) == 33 and runs["ranges"][-1].startswith("64 ")


def test_hard_lists(small: Small) -> None:
    data = small[2]
    runs = {chunk: rows[0][2] for chunk, rows in enumerate(data["neighbors"])}
    assert data["hard"]["overlap"] == sorted(runs, key=lambda chunk: (-runs[chunk], chunk))[:20]
    far = [data["neighbors"][chunk][0][1] for chunk in data["hard"]["far"]]
    assert len(far) == 20 and far == sorted((rows[0][1] for rows in data["neighbors"]), reverse=True)[:20]
    assert data["hard"]["few"] == []  # every chunk has all


def test_source_mix(hostile_work: pathlib.Path) -> None:
    data = collect(WorkDir(hostile_work), 2000, 1)
    corpus = {chunk: place[0] for chunk, place in data["texts"].items()}
    counts = np.zeros((2, 2))
    for chunk, rows in zip(data["shown"], data["neighbors"], strict=True):
        for row in rows:
            counts[corpus[chunk], corpus[row[0]]] += 1
    assert data["mix"]["corpora"] == ["web", "notes"]
    np.testing.assert_allclose(data["mix"]["shares"], counts / counts.sum(1, keepdims=True), atol=1e-4)
    share = np.bincount(list(corpus.values())) / len(corpus)  # all documents are in the database
    np.testing.assert_allclose(data["mix"]["database"], share, atol=1e-4)


def test_chunks_with_fewer_neighbors_are_listed(hostile_work: pathlib.Path) -> None:
    data = collect(WorkDir(hostile_work), 2000, 1)
    found = {chunk: len(rows) for chunk, rows in zip(data["shown"], data["neighbors"], strict=True)}
    assert (
        max(found.values()) < 300 and data["hard"]["few"] == sorted(found, key=lambda chunk: (found[chunk], chunk))[:20]
    )


def test_a_large_work_dir_is_sampled(small_work: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "_SAMPLED", 100)
    data, again, other = (collect(WorkDir(small_work), 30, seed) for seed in (1, 1, 2))
    assert data == again and data["shown"] != other["shown"]
    hard = {chunk for chunks in data["hard"].values() for chunk in chunks}
    shown = set(data["shown"])
    assert data["sampled"] == 100 and hard <= shown and 15 <= len(shown - hard) <= 30
    assert sum(data["histograms"][0]["counts"]) == 100
    linked = [rows[0][0] in shown for rows in data["neighbors"]]
    assert sum(linked) >= 15  # of each chunk at random, the nearest neighbor is there as well
    assert {row[0] for rows in data["neighbors"] for row in rows} <= set(data["texts"])


def test_figures_of_the_stages(small: Small, tmp_path: pathlib.Path) -> None:
    work, table, data = small
    rows = {name: value for _, rows in data["figures"] for name, value in rows}
    assert rows["documents"] == "40" and rows["tokens"] == f"{table.num_tokens:,}"
    assert rows["recall@2"] == "1.0000" and "embed" in rows
    bare = tmp_path / "bare"
    shutil.copytree(work.path, bare)
    (bare / "report" / "summary.json").unlink()
    facts = {name: value for _, rows in collect(WorkDir(bare), 5, 1)["figures"] for name, value in rows}
    assert facts["recall@2"] == facts["time a query"] == "not measured"


def test_a_cut_inside_of_a_character_is_before_it(hostile_work: pathlib.Path) -> None:
    """The face is four byte tokens and two UTF-16 units."""
    work = WorkDir(hostile_work)
    table, tokenizer = ChunkTable.open(work), open_tokenizer(work)
    chunks = np.arange(table.num_chunks)
    texts = ChunkTexts(table, tokenizer, chunks)
    chunk = next(number for number in chunks.tolist() if FACE in texts.text[number].strip())
    text = texts.text[chunk]
    before = text[: text.index(FACE)]
    begin = len(before.encode("utf-16-le")) // 2
    offsets = texts.offsets(np.full(65, chunk), np.arange(65)).tolist()
    assert offsets == sorted(offsets) and offsets[0] == 0 and offsets[-1] == len(text.encode("utf-16-le")) // 2
    assert begin in offsets and begin + 1 not in offsets


# ------------------------------------------------------------------------------------------------ page


def test_no_text_is_markup(hostile_work: pathlib.Path) -> None:
    data = collect(WorkDir(hostile_work), 2000, 1)
    html = render(data)
    assert any("<img src=x" in place[4] for place in data["texts"].values())
    assert "<img" not in html and "window.injected" not in html and html.count("</script>") == 2
    assert not {"\u2028", "\u2029"} & set(html)
    assert embedded(html) == json.loads(json.dumps(data)) and render(data) == html


def test_page_names_no_address() -> None:
    """But the name of SVG, which is no request."""
    html = render({}).replace("http://www.w3.org/2000/svg", "")
    assert "://" not in html and "src=" not in html and "{{" not in html and "default-src 'none'" in html


def test_templates_are_installed_with_the_package() -> None:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    others = [
        path.name for path in (ROOT / "megatron_retro" / "inspection").iterdir() if path.suffix not in (".py", "")
    ]
    assert sorted(others) == ["page.css", "page.html", "page.js"] and all(f'"{name}"' in setup for name in others)


# ------------------------------------------------------------------------------------------------ bad input


WRONG = {
    "": "nothing to do: --output .* --query",
    "--query=": "--query is empty",
    "--output report --json": "--json .* --query",
    "--query x -k 0": "-k is 0",
    "--output report --max-chunks 0": "--max-chunks is 0",
    "--output report --seed -1": "--seed is -1",
    "--output report --max-chunk 5": "did you mean --max-chunks",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_flags(arguments: str, small_work: pathlib.Path) -> None:
    with pytest.raises(UserError, match=WRONG[arguments]):
        run(small_work, *arguments.split())


def test_a_work_dir_is_needed() -> None:
    with pytest.raises(UserError, match="--retro-work-dir is missing"):
        inspect(parse(InspectConfig, ["--output", "report"]))


def test_the_stage_that_is_not_finished_is_named(small_work: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"nowhere holds no manifest\.json"):
        run(tmp_path / "nowhere", "--output", str(tmp_path / "report"))
    unfinished, work = WorkDir(tmp_path), WorkDir(small_work)
    unfinished.manifest = {**work.manifest, "stages": {**work.manifest["stages"]}}
    del unfinished.manifest["stages"]["neighbors"]
    unfinished.write()
    with pytest.raises(UserError, match="'neighbors' is not finished; run tools/preprocess_retro_data"):
        run(tmp_path, "--output", str(tmp_path / "report"))
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("output", ["file", "file/below", "taken"])
def test_an_output_that_cannot_be_written_ends_in_one_line(
    output: str, small_work: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "taken" / "index.html").mkdir(parents=True)
    command = ["tools/inspect_retro_data.py", "--retro-work-dir", small_work, "--output", tmp_path / output]
    start = launch.run if output == "file" else launch.run_forked  # as a user would, once
    shown = start(*command, expect=2)
    assert "cannot be written to" in shown and len(shown.splitlines()) == 1


# ------------------------------------------------------------------------------------------------ terminal


def test_a_chunks_own_text_finds_it(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    work, table, data = small
    chunk = int(table.first_chunk[1])  # of a document in train
    text, following = data["texts"][chunk][4], data["texts"][chunk + 1][4]
    run(work.path, "--query", text, "-k", "3", "--json")
    answer = json.loads(capsys.readouterr().out)
    first = answer["neighbors"][0]
    assert answer["query"] == text and [neighbor["rank"] for neighbor in answer["neighbors"]] == [1, 2, 3]
    assert (first["chunk"], first["document"], first["text"]) == (chunk, "my_text_data:1", text)
    assert first["distance"] == pytest.approx(0, abs=0.01) and first["continuation"].strip() == following.strip()


class Found:
    """Stands in for the retriever: chunk 0, and no other."""

    def __init__(self, work: WorkDir):
        self.table, self.tokenizer = ChunkTable.open(work), open_tokenizer(work)

    def search(self, texts: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        ids = np.array([[0] + [-1] * (k - 1)])
        return ids, np.where(ids < 0, np.inf, 0.25).astype(np.float32)


def test_an_answer_for_people(
    hostile_work: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megatron_retro.retrieval.live.LiveRetriever", Found)
    run(hostile_work, "--query", "anything", "-k", "4")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1.  web:0   distance 0.250" and "…" in "".join(lines) and "\033" not in "".join(lines)
    assert max(map(len, lines)) <= 100 and len(lines) > 2


def test_text_cannot_steer_the_terminal() -> None:
    shown = terminal._wrapped("a\x1b[2Jb\u202ec\x07 d\te\n\n" + "word " * 30, 40)
    assert shown.splitlines()[0] == "    a\ufffd[2Jb\ufffdc\ufffd d e"
    assert max(map(len, shown.splitlines())) <= 40


def test_page_and_answer_together(
    small_work: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("megatron_retro.retrieval.live.LiveRetriever", Found)
    run(small_work, "--output", str(tmp_path / "new" / "report"), "--max-chunks", "10", "--query", "x", "--json")
    captured = capsys.readouterr()
    assert json.loads(captured.out)["neighbors"][0]["chunk"] == 0 and "index.html: " in captured.err
    assert [path.name for path in (tmp_path / "new" / "report").iterdir()] == ["index.html"]


# ------------------------------------------------------------------------------------------------ browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
PATIENCE = 120_000  # milliseconds, for a machine with much else to do
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium or google-chrome on PATH: apt-get install chromium"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    flags = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync"
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=flags.split(), timeout=PATIENCE)
        yield opened
        opened.close()


class Reader:
    """A page that is open, with what it asked for and complained of."""

    def __init__(self, browser: Any, work: pathlib.Path, folder: pathlib.Path):
        run(work, "--output", str(folder))
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page = browser.new_page(viewport={"width": 1280, "height": 900})
        self.page.set_default_timeout(PATIENCE)
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.address = (folder / "index.html").as_uri()
        self.open()

    def open(self, fragment: str = "") -> None:
        self.page.goto("about:blank")
        self.page.goto(self.address + fragment)
        self.page.wait_for_selector("#chunk h2")

    def listed(self) -> list[str]:
        return self.page.locator("#results b").all_text_contents()  # what is out of view is not laid out

    def search(self, text: str) -> list[str]:
        self.page.fill("#search", text)
        return self.listed()

    def shown(self) -> int:
        """The id of the chunk in view."""
        return int(self.page.inner_text("#chunk .title .soft").split("id ")[1])


@pytest.fixture
def small_page(browser: Any, small_work: pathlib.Path, tmp_path: pathlib.Path) -> Iterator[Reader]:
    reader = Reader(browser, small_work, tmp_path / "report")
    yield reader
    reader.page.close()
    assert reader.complaints == [] and {url.split(":")[0] for url in reader.requests} <= {"file", "about"}


@needs_chromium
def test_search_narrows_the_list(small_page: Reader, small: Small) -> None:
    _, table, data = small
    assert len(small_page.listed()) == table.num_chunks
    with_import = [place[4] for place in data["texts"].values() if "import" in place[4].lower()]
    assert len(small_page.search("Import")) == len(with_import) > 0
    own = table.first_chunk[4] - table.first_chunk[3]
    assert small_page.search("my_text_data:3") == ["my_text_data:3"] * own  # and not document 30
    assert small_page.search("no such words") == []
    small_page.page.keyboard.press("Escape")
    assert len(small_page.listed()) == table.num_chunks


@needs_chromium
def test_a_click_shows_the_chunk_and_its_neighbors(small_page: Reader, small: Small) -> None:
    data = small[2]
    page, chunk = small_page.page, 5
    page.locator("#results a").nth(chunk).click()
    page.wait_for_function("location.hash === '#chunk-5'")
    assert small_page.shown() == chunk and page.locator(".neighbor").count() == len(data["neighbors"][chunk])
    assert page.locator(".query .text").first.inner_text() == data["texts"][chunk - 1][4]
    near, distance, tokens, begin, end, near_begin, near_end = data["neighbors"][chunk][1]
    card = page.locator(".neighbor").nth(1)
    card.hover()
    assert f"distance {distance:.3f} · {tokens} token" in card.inner_text()
    assert page.locator(".query mark").text_content() == characters(data["texts"][chunk][4], begin, end)
    assert card.locator("mark").text_content() == characters(data["texts"][near][4], near_begin, near_end)
    if data["texts"][near][2] + 1 < data["texts"][near][3]:
        assert card.locator(".beside").text_content() == data["texts"][near + 1][4]
    card.locator("a").click()
    page.wait_for_function(f"location.hash === '#chunk-{near}'")
    assert small_page.shown() == near
    page.go_back()
    page.wait_for_function("location.hash === '#chunk-5'")
    assert small_page.shown() == chunk


@needs_chromium
def test_keys_go_to_the_next_and_the_previous(small_page: Reader) -> None:
    page, seen = small_page.page, []
    for key in ("j", "ArrowRight", "k", "ArrowLeft", "k"):  # the last one has nowhere to go
        page.keyboard.press(key)
        seen.append(small_page.shown())
    assert seen == [1, 2, 1, 0, 0] and page.evaluate("location.hash") == "#chunk-0"
    page.keyboard.press("/")
    page.keyboard.type("jk")
    assert page.input_value("#search") == "jk" and small_page.shown() == 0
    small_page.open("#chunk-7")
    assert small_page.shown() == 7 and page.locator("#results [aria-current]").count() == 1
    page.click("#next")
    assert small_page.shown() == 8


@needs_chromium
def test_hard_lists_are_filled(small_page: Reader, small: Small) -> None:
    data = small[2]
    for name in ("overlap", "far"):
        small_page.page.click(f"button[value={name}]")
        hrefs = small_page.page.eval_on_selector_all("#results a", "links => links.map(link => link.hash)")
        assert hrefs == [f"#chunk-{chunk}" for chunk in data["hard"][name]]
        assert small_page.shown() in data["hard"][name]
    small_page.page.click("button[value=few]")
    assert "none" in small_page.page.inner_text("#count")


@needs_chromium
@pytest.mark.parametrize("width", [1280, 400])
def test_text_that_wants_to_be_markup_is_text(
    width: int, browser: Any, hostile_work: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    reader = Reader(browser, hostile_work, tmp_path)
    page = reader.page
    page.set_viewport_size({"width": width, "height": 800})
    page.click("button[value=few]")
    assert reader.listed() and page.locator("#distributions table tbody tr").count() == 3
    assert "<img src=x onerror=" in page.locator("#chunk").inner_text() + page.locator("#results").inner_text()
    assert page.locator("img, #chunk script, #results script").count() == 0
    assert page.evaluate("window.injected") is None
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.close()
    assert reader.complaints == [] and {url.split(":")[0] for url in reader.requests} <= {"file", "about"}
