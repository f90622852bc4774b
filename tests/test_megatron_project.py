"""A RETRO project of Megatron-LM 0.15, with its faults planted: what holds is reused, what does not is masked."""


import numpy as np
import pytest
import torch
from conftest import build, stdlib_texts
from megatron_files import database, write_corpus, write_project
from test_tokenizer import gpt2_files

from megatron_retro.data.chunks import ChunkTable
from megatron_retro.data.tokenizer import Tokenizer, gpt2_json
from megatron_retro.retrieval.neighbors import NeighborTable
from megatron_retro.retrieval.project import Project
from megatron_retro.retrieval.project_order import Order
from megatron_retro.workdir import WorkDir

C, S, K, SEED = 16, 64, 6, 77
CONFIG = {
    "retro_gpt_chunk_length": C,
    "retro_gpt_data_cache_path": None,
    "retro_gpt_data_path": ["0.7", "wiki/wiki_text_document", "0.3", "books_text_sentence"],
    "retro_gpt_eval_interval": 10,
    "retro_gpt_eval_iters": 1,
    "retro_gpt_global_batch_size": 4,
    "retro_gpt_merge_file": "tokenizer/merges.txt",
    "retro_gpt_seed": SEED,
    "retro_gpt_seq_length": S,
    "retro_gpt_split": "80,20,0",
    "retro_gpt_tokenizer_model": None,
    "retro_gpt_tokenizer_type": "GPT2BPETokenizer",
    "retro_gpt_train_samples": 60,
    "retro_gpt_vocab_file": "tokenizer/vocab.json",
}


def documents(tokenizer):
    """Two corpora: whole documents, and documents of several sequences; many a length is a multiple of C."""
    texts = tokenizer.encode([text[200:900] for text in stdlib_texts(34)])
    whole = [[row[: (5 + number % 4) * C - number % 3] + [tokenizer.eod]] for number, row in enumerate(texts[:20])]
    parts = [[row[: 2 * C], row[2 * C : 3 * C + 5], [*row[-9:], tokenizer.eod]] for row in texts[20:]]
    return [whole, parts]


class Small:
    """What a small project holds."""

    def __init__(self, path):
        self.path = path
        (path / "tokenizer").mkdir(parents=True)
        files = gpt2_files(path / "tokenizer")
        (path / "tokenizer.json").write_bytes(gpt2_json(*files))
        self.tokenizer = Tokenizer.open(path / "tokenizer.json")
        self.corpora = documents(self.tokenizer)
        self.prefixes = [str(path / "data" / prefix) for prefix in CONFIG["retro_gpt_data_path"][1::2]]
        for prefix, of_corpus in zip(self.prefixes, self.corpora, strict=True):
            write_corpus(prefix, of_corpus)
        train = [corpus[: round(0.8 * len(corpus))] for corpus in self.corpora]
        self.chunks = database(train, C, self.tokenizer.eod)


def samples_of_megatron(small, cache):
    """Megatron's own samples: split -> [(corpus, its sample's token ids, the sequences it takes them from)]."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    class Plain:
        vocab_size, eod, unique_identifiers = 400, 399, {}

    weights = [float(weight) for weight in CONFIG["retro_gpt_data_path"][::2]]
    config = GPTDatasetConfig(
        random_seed=SEED, sequence_length=S, blend=(small.prefixes, weights), split=CONFIG["retro_gpt_split"],
        path_to_cache=str(cache), tokenizer=Plain(), reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False, mid_level_dataset_surplus=0.005,
    )  # fmt: skip
    numbers = Project(small.path).samples
    built = BlendedMegatronDatasetBuilder(GPTDataset, [*numbers.values()], lambda: True, config).build()
    found = {}
    for (split, number), dataset in zip(numbers.items(), built, strict=True):
        if dataset is not None:
            at = [(int(dataset.dataset_index[i]), int(dataset.dataset_sample_index[i])) for i in range(number)]
            found[split] = [(c, *dataset.datasets[c]._query_document_sample_shuffle_indices(i)) for c, i in at]
    return found


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A project without an index, whose neighbors are random, with every fault planted in every row."""
    small = Small(tmp_path_factory.mktemp("project") / "project")
    generator = np.random.default_rng(0)
    windows = {"train": 60 * S // C, "valid": 8 * S // C}
    small.neighbors = {
        split: generator.permuted(np.tile(np.arange(len(small.chunks)), (count, 1)), axis=1)[:, :K]
        for split, count in windows.items()
    }
    for rows in small.neighbors.values():
        rows[::3, K - 1] = -1
        rows[1::3, 1] = rows[1::3, 0]
    write_project(small.path, CONFIG, small.corpora, small.chunks, small.neighbors)
    return small


def test_windows_lie_where_megatrons_samples_do(small, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)  # megatron-core asks for it
    project, lengths = Project(small.path), [[len(s) for d in c for s in d] for c in small.corpora]
    found = samples_of_megatron(small, tmp_path)
    assert list(found) == ["train", "valid"]
    for split, samples in found.items():
        order = Order(
            [np.array(of_corpus) for of_corpus in lengths], [0.7, 0.3], project.split, split,
            samples=project.samples[split], seq_length=S, chunk_length=C, seed=SEED,
        )  # fmt: skip
        every = order.windows(0, len(samples) * S // C)
        flat = [[s for d in c for s in d] for c in small.corpora]
        for number in range(len(every.corpus)):
            corpus, tokens, sequences = samples[number // (S // C)]
            window = tokens[number % (S // C) * C :][:C].tolist()
            assert every.corpus[number] == corpus
            assert {every.sequence[number], every.last_sequence[number]} <= set(sequences.tolist())
            begin = flat[corpus][every.sequence[number]][every.offset[number] :][:C]
            assert window[: len(begin)] == begin
            assert (len(begin) == C) == (not every.across[number])


@pytest.fixture(scope="module")
def work(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("work") / "work"
    build(path, "--retro-project-dir", str(small.path), "--retro-query-num-neighbors-save", "4")
    return WorkDir(path)


def test_a_project_becomes_a_work_dir(small, work):
    table = ChunkTable.open(work)
    assert [corpus.name for corpus in table.corpora] == ["wiki_text_document", "books_text_sentence"]
    assert [corpus.weight for corpus in table.corpora] == [0.7, 0.3]
    assert table.num_documents == sum(map(len, small.corpora)) and table.chunk_length == C
    train = table.documents_in("train", tuple(work.facts("chunks")["split"]))
    assert train.tolist() == [*range(16), *range(20, 20 + round(0.8 * 14))]
    held = table.tokens(np.array(NeighborTable(work, table).ids(np.arange(3))[:, 0]), C, 0)
    assert len(held[0]) == 3
