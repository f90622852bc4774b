"""Generation: every new token sees what training would have shown it, and text comes out."""

import json
import pathlib

import numpy as np
import pytest
import torch
from launch import run, run_forked
from model_helpers import AS_MEGATRON_LM, C, K, R, V, make_model, make_neighbors, make_tokens
from torch import Tensor

from megatron_retro.config.flags import parse
from megatron_retro.config.generation import GenerateConfig
from megatron_retro.data.chunks import ChunkTable
from megatron_retro.errors import UserError
from megatron_retro.inference.cached import Arrivals, CachedModel
from megatron_retro.inference.reader import Reads
from megatron_retro.inference.sampling import choose
from megatron_retro.inference.writer import Choice, Text, Writer
from megatron_retro.model.model import RetroModel
from megatron_retro.retrieval.corpora import open_tokenizer
from megatron_retro.retrieval.neighbors import NeighborTable
from megatron_retro.workdir import WorkDir

PROMPTS = [(1, 1), (3, 11), (5, 10), (9, 2), (4, 4)]
MODELS = {
    "rotary": {},
    "learned": {"position_embedding_type": "learned_absolute"},
    "grouped": {"group_query_attention": True, "num_query_groups": 2, "swiglu": True, "disable_bias_linear": True},
    "Megatron-LM's": AS_MEGATRON_LM,
}


def lively_model(**flags: object) -> RetroModel:
    """With weights so large that each of them matters."""
    model = make_model(**flags).eval()
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data = noise * weight.shape[1] ** -0.5 if weight.dim() > 1 else weight.data + 0.3 * noise
    return model


# ------------------------------------------------------------------------------------------------ kept states


def teacher_forced(
    model: RetroModel, tokens_BxS: Tensor, prompts: tuple[int, ...], neighbors: tuple[Tensor, Tensor] | None
) -> dict[tuple[int, int], Tensor]:
    """(sample, position) -> logits [V] behind each prompt and behind every token of the text that follows."""
    cached = CachedModel(model, len(prompts), tokens_BxS.shape[1], K if neighbors else 0)
    num_chunks = max(1, -(-max(prompts) // C))
    width, lengths = num_chunks * C, torch.tensor(prompts)
    text = torch.nn.functional.pad(tokens_BxS, (0, width))[:, :width].clone()
    text[torch.arange(width) >= lengths[:, None]] = V - 1  # what stands behind a prompt must not matter
    known_tokens = known_lengths = None
    if neighbors:
        complete = torch.arange(num_chunks) < (lengths // C)[:, None]
        known_tokens, known_lengths = neighbors[0][:, :num_chunks], neighbors[1][:, :num_chunks] * complete[..., None]
    logits = cached.begin(text, lengths, known_tokens, known_lengths)
    found = {}
    while True:
        assert logits is not None
        position = cached.length
        for sample in range(len(prompts)):
            found[sample, int(position[sample]) - 1] = logits[sample]
        if int(position.max()) == tokens_BxS.shape[1]:
            return found
        completing = torch.nonzero((position + 1) % C == 0).flatten()
        arrivals = None
        if neighbors and len(completing):
            arrivals = Arrivals(completing, *(part[completing, position[completing] // C] for part in neighbors))
        logits = cached.step(tokens_BxS[torch.arange(len(prompts)), position], arrivals)


@pytest.mark.parametrize("prompts", PROMPTS, ids=str)
@pytest.mark.parametrize("flags", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("retrieves", [True, False], ids=["on", "off"])
def test_cached_logits_equal_the_training_forward(
    prompts: tuple[int, int], flags: dict[str, object], retrieves: bool
) -> None:
    """Position by position over seven chunks; one has no neighbor, some have fewer or short ones."""
    model, tokens, neighbors = lively_model(**flags), make_tokens(), make_neighbors() if retrieves else None
    with torch.no_grad():
        given = dict(zip(("neighbor_tokens_BxLxKxR", "neighbor_lengths_BxLxK"), neighbors or (None, None), strict=True))
        expected = model(tokens, **given)
    found = teacher_forced(model, tokens, prompts, neighbors)
    assert len(found) == len(prompts) * (tokens.shape[1] - max(prompts) + 1)
    for (sample, position), logits in found.items():
        torch.testing.assert_close(logits, expected[sample, position], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ the loop


class Library:
    """Stands in for the reader: neighbors that are a function of the chunk's tokens."""

    seconds = 0.0

    def read(self, chunks: list[list[int]]) -> Reads:
        tokens, lengths = zip(*map(neighbors_of, chunks), strict=True)
        ids = np.array([[sum(chunk) % 97] * K for chunk in chunks])
        return Reads(ids, np.zeros(ids.shape), torch.stack(tokens), torch.stack(lengths))


def neighbors_of(chunk: list[int]) -> tuple[Tensor, Tensor]:
    assert len(chunk) == C
    generator = torch.Generator().manual_seed(sum(token * 31**place for place, token in enumerate(chunk)) % 2**31)
    return torch.randint(V, (K, R), generator=generator), torch.randint(0, R + 1, (K,), generator=generator)


def writer(model: RetroModel, *, context: int, reads: bool = True) -> Writer:
    library = Library() if reads else None
    return Writer(
        model,
        chunk_length=C,
        context=context,
        vocab_size=V - 1,
        eod=0,
        pad=1,
        reader=library,  # type: ignore[arg-type]
        num_neighbors=K,
    )


def written(prompts: list[list[int]], choice: Choice, count: int, **settings: object) -> list[list[int]]:
    texts: list[list[int]] = [[] for _ in prompts]
    for event in writer(lively_model(), **settings).write(prompts, choice, count):  # type: ignore[arg-type]
        if event.token is not None:
            texts[event.text].append(event.token)
    return texts


@torch.no_grad()
def naively_written(prompt: list[int], count: int, context: int, reads: bool) -> list[int]:
    """Greedy, by the training forward over the whole window for every token."""
    model, tokens, begin = lively_model(), list(prompt), 0
    while len(tokens) < len(prompt) + count and tokens[-1] != 0:
        if len(tokens) - begin > context:
            begin = -(-(len(tokens) - context // 2) // C) * C
        window = tokens[begin:]
        num_chunks = -(-len(window) // C)
        text = torch.tensor([window + [3] * (num_chunks * C - len(window))])
        near_tokens, near_lengths = torch.zeros(1, num_chunks, K, R, dtype=torch.int64), torch.zeros(1, num_chunks, K)
        for chunk in range(len(window) // C):
            near_tokens[0, chunk], near_lengths[0, chunk] = neighbors_of(window[chunk * C : (chunk + 1) * C])
        given = dict(neighbor_tokens_BxLxKxR=near_tokens, neighbor_lengths_BxLxK=near_lengths.long()) if reads else {}
        logits = model(text, **given)[0, len(window) - 1, : V - 1]
        logits[1] = -torch.inf
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


PROMPT_TOKENS = [[5, 9, 2], [7] * 13, [4, 3, 2, 8, 6], [11, 12]]


@pytest.mark.parametrize("reads", [True, False], ids=["on", "off"])
def test_a_batch_writes_what_each_prompt_alone_would(reads: bool) -> None:
    """Prompts of different lengths, texts that end at different times, beyond the context."""
    texts = written(PROMPT_TOKENS, Choice(temperature=0), 30, context=4 * C, reads=reads)
    assert texts == [naively_written(prompt, 30, 4 * C, reads) for prompt in PROMPT_TOKENS]
    assert any(len(text) == 30 for text in texts)


def test_choices_depend_on_seed_and_number_of_the_text() -> None:
    first = written(PROMPT_TOKENS, Choice(seed=1), 20, context=8 * C)
    assert written(PROMPT_TOKENS, Choice(seed=1), 20, context=8 * C) == first
    assert written(PROMPT_TOKENS[:2], Choice(seed=1), 20, context=8 * C) == first[:2]
    assert written(PROMPT_TOKENS, Choice(seed=2), 20, context=8 * C) != first
    twins = written([PROMPT_TOKENS[0]] * 2, Choice(seed=1), 20, context=8 * C)
    assert twins[0] != twins[1]
    for text in first:
        assert 1 not in text and V - 1 not in text and 0 not in text[:-1]


def test_texts_come_and_go() -> None:
    """Each its own way: choices, lengths, retrieval; one is cancelled, and none changes what another gets."""
    settings = [(Choice(temperature=0), True), (Choice(seed=3), True), (Choice(top_k=5), False), (Choice(), True)]
    settings *= 2
    prompts = [PROMPT_TOKENS[number % 4] for number in range(8)]

    def make(number: int, writer: Writer) -> Text:
        choice, reads = settings[number]
        return Text(number, list(prompts[number]), choice, number, 10 + 3 * number, writer._reader if reads else None)

    alone = {}
    for number in range(8):
        one = writer(lively_model(), context=4 * C)
        text = make(number, one)
        batches = iter([[text]])
        assert list(one.write_texts(lambda batches=batches: next(batches, []))) and text.tokens  # type: ignore[misc]
        alone[number] = text.tokens
    many = writer(lively_model(), context=4 * C)
    texts = [make(number, many) for number in range(8)]
    batches = iter([texts[:1], [], texts[1:4], [], [], [], [], texts[4:5], [], texts[5:]])
    for event in many.write_texts(lambda: next(batches, [])):
        if event.text == 7 and len(texts[7].tokens) - texts[7].num_prompt == 5:
            texts[7].is_cancelled = True
    for number in range(7):
        assert texts[number].tokens == alone[number]
    assert texts[7].tokens == alone[7][: len(texts[7].tokens)] and len(texts[7].tokens) == len(prompts[7]) + 5


def test_events_tell_what_was_read() -> None:
    events = list(writer(lively_model(), context=8 * C).write([[5] * (2 * C + 1)], Choice(), 2 * C))
    texts = [5] * (2 * C + 1) + [event.token for event in events if event.token is not None]
    chunks = [(event.chunk, event.ids[0]) for event in events if event.ids is not None]
    complete = (len(texts) - 1) // C  # the last token is not read any more
    assert chunks == [(number, sum(texts[number * C : (number + 1) * C]) % 97) for number in range(complete)]
    assert events[-1].finish in ("stop", "length") and all(event.finish is None for event in events[:-1])


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (dict(top_k=0, top_p=1.0), [0.1, 0.4, 0.2, 0.3]),
        (dict(top_k=2, top_p=1.0), [0, 4 / 7, 0, 3 / 7]),
        (dict(top_k=0, top_p=0.6), [0, 4 / 7, 0, 3 / 7]),
        (dict(top_k=3, top_p=0.9), [0, 4 / 9, 2 / 9, 3 / 9]),
        (dict(top_k=0, top_p=0.4), [0, 1, 0, 0]),
    ],
)
def test_choices_follow_the_distribution(settings: dict, kept: list[float]) -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    draws = (np.arange(1000) + 0.5) / 1000
    for temperature in (1.0, 0.5):
        tokens = choose(logits.expand(1000, -1) * temperature, draws, temperature=temperature, **settings)
        np.testing.assert_allclose(torch.bincount(tokens, minlength=4) / 1000, kept, atol=2e-3)
    greedy = choose(logits.expand(3, -1), draws[:3], temperature=0, **settings)
    assert greedy.tolist() == [1, 1, 1]


# ------------------------------------------------------------------------------------------------ the tool

TOOL = "tools/generate_retro_text.py"


def held_out(work: pathlib.Path) -> tuple[np.ndarray, list[int]]:
    """(chunk ids, tokens) of a document of the valid split, of three chunks and a half."""
    table = ChunkTable.open(WorkDir(work))
    document = next(d for d in table.documents_in("valid", (80, 10, 10)) if np.diff(table.first_chunk)[d] > 4)
    chunks = table.first_chunk[document] + np.arange(4)
    tokens, _ = table.tokens(chunks, table.chunk_length, 0)
    return chunks, tokens.reshape(-1)[: 7 * table.chunk_length // 2].tolist()


def test_the_tool_reads_what_training_read_at_every_layout(
    trained: pathlib.Path, small_work: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """The neighbors of a held-out document's chunks are the saved ones, and two ranks write what one writes."""
    work = WorkDir(small_work)
    chunks, tokens = held_out(small_work)
    prompts = [open_tokenizer(work).decode([tokens])[0], "import json\n"]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    arguments = ["--load", trained, "--retro-work-dir", small_work, "--prompt-file", file, "--json"]
    arguments += ["--max-new-tokens", 100, "--temperature", 0]
    layouts = {"": 1, "--tensor-model-parallel-size 2": 2, "--pipeline-model-parallel-size 2": 2}
    answers = []
    for number, (layout, ranks) in enumerate(layouts.items()):
        output = tmp_path / f"{number}.jsonl"
        printed = run_forked(TOOL, *arguments, "--output", output, *layout.split(), ranks=ranks)
        assert "of the time for retrieval" in printed
        answers.append([json.loads(line) for line in output.read_text().splitlines()])
    for answer in answers[1:]:
        assert answer == answers[0]
    first, second = answers[0]
    assert first["prompt"] == prompts[0] and first["tokens"] == 100 and first["finish"] == "length"
    assert [read["chunk"] for read in first["read"]] == list(range((len(tokens) + 99) // 64))
    assert [read["chunk"] for read in second["read"]] == [0]
    assert second["read"][0]["text"].startswith("import json") and len(second["read"][0]["neighbors"]) == 2
    saved = NeighborTable(work)
    for chunk, read in zip(chunks[:3], first["read"], strict=False):
        ids, distances = saved.ids(chunk[None])[0], saved.distances(chunk[None])[0]
        for neighbor in read["neighbors"]:
            place = ids.tolist().index(neighbor["chunk"])
            assert neighbor["distance"] == pytest.approx(distances[place], abs=0.01)
        assert read["neighbors"][0]["chunk"] == ids[0] or distances[1] - distances[0] < 0.01


def test_text_for_people(trained: pathlib.Path, small_work: pathlib.Path) -> None:
    where = [TOOL, "--load", trained, "--retro-work-dir", small_work, "--prompt", "def main(", "--max-new-tokens", 64]
    shown = run(*where, "--show-neighbors", "--num-samples", 2)
    assert shown.count("def main(") >= 2 and shown.count("chunk 0: def main(") == 2 and "my_text_data:" in shown
    assert "chunk" not in run_forked(*where, "--retrieval", "off", "--show-neighbors").split("def main(", 1)[0]
    assert "my_text_data:" in run_forked(*where, "--retrieval", "random", "--show-neighbors")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--retro-work-dir w --prompt x", "--load is missing"),
        ("--load l --prompt x", "--retro-work-dir is missing"),
        ("--load l --retro-work-dir w", "either --prompt or --prompt-file"),
        ("--load l --retro-work-dir w --prompt x --prompt-file y", "either --prompt or --prompt-file"),
        ("--load l --retro-work-dir w --prompt x --output o", "--output takes the JSON lines of --json"),
        ("--load l --retro-work-dir w --prompt x --max-new-tokens 0", "--max-new-tokens is 0; it must be at least 1"),
        ("--load l --retro-work-dir w --prompt x --top-p 0", "--top-p is 0.0; it lies above 0"),
        ("--load l --retro-work-dir w --prompt x --temperature -1", "--temperature is -1.0; it must be at least 0"),
        ("--load l --retro-work-dir w --prompt x --temperature nan", "--temperature is nan"),
        ("--load l --retro-work-dir w --prompt x --sequence-parallel", "--sequence-parallel"),
        ("--load l --retro-work-dir w --prompt x --retro-num-neighbors 0", "--retro-num-neighbors is 0"),
    ],
)
def test_flags_that_cannot_be(flags: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(GenerateConfig, flags.split()).finish()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "cannot be read"),
        ("empty.txt", b" \n\n", "holds no prompt"),
        ("latin.txt", b"\xff\xfe", "cannot be read"),
        ("a.jsonl", b'{"prompt": "x"}\n{"text": "x"}\n', r'a.jsonl:2: no "prompt"'),
        ("b.jsonl", b'{"prompt": 3}\n', r'b.jsonl:1: no "prompt" \(it is no string\)'),
        ("c.jsonl", b'{"prompt": ""}\n', r"c.jsonl:1 is empty"),
        ("d.jsonl", b'{"prompt": "\\ud800"}\n', r"d.jsonl:1 is no Unicode text"),
    ],
)
def test_prompt_files_that_cannot_be(tmp_path: pathlib.Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    flags = ["--load", "l", "--retro-work-dir", "w", "--prompt-file", str(tmp_path / name)]
    with pytest.raises(UserError, match=message):
        parse(GenerateConfig, flags).prompts()


def test_what_does_not_fit_together_is_one_line(trained: pathlib.Path, small_work: pathlib.Path) -> None:
    where = [TOOL, "--prompt", "x", "--load", trained, "--retro-work-dir"]
    assert "holds no manifest.json" in run_forked(*where, "/nowhere", expect=2)
    shown = run_forked(*where, small_work, "--retro-num-neighbors", 1_000_000, expect=2)
    assert "--retro-num-neighbors 1000000 is more than the 10 that the work dir holds for each chunk" in shown
    shown = run_forked(*where, small_work, "--pipeline-model-parallel-size", 3, expect=2)
    assert "generate_retro_text.py: error: --" in shown and "Traceback" not in shown
