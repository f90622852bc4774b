"""The model reads: on text that only its neighbors can predict, it learns to copy from them."""

import numpy as np
import torch

from megatron_retro import mcore
from megatron_retro.config.model import ModelConfig, ParallelConfig, RetroConfig
from megatron_retro.data.chunks import ChunkTable, Corpus
from megatron_retro.data.samples import Samples
from megatron_retro.model.model import RetroModel
from megatron_retro.training.evaluation import sample_losses
from megatron_retro.training.step import train_step

CHUNK, CHUNKS, VOCAB, STEPS, BATCH = 8, 8, 32, 50, 16


class Twins:
    """Every document of random tokens exists twice; a chunk's neighbor is the same chunk of its twin."""

    num_neighbors = 1

    def __init__(self, num_chunks: int):
        self._num_chunks = num_chunks

    def ids(self, chunks: np.ndarray) -> np.ndarray:
        return ((chunks + self._num_chunks // 2) % self._num_chunks)[:, None]


def twin_samples(num_samples: int) -> Samples:
    draw = np.random.default_rng(0)
    half = draw.integers(0, VOCAB, size=(1000, CHUNK * CHUNKS))
    tokens = np.concatenate([half, half]).reshape(-1).astype(np.uint16)
    length = np.full(2000, CHUNK * CHUNKS)
    table = ChunkTable([Corpus("twins", tokens, np.arange(2000) * CHUNK * CHUNKS, length, 0.0)], CHUNK)
    return Samples(
        table,
        split="train",
        split_weights=(1.0, 0.0, 0.0),
        corpus_weights=None,
        chunks_a_sample=CHUNKS,
        seed=1,
        pad=0,
        num_samples=num_samples,
        neighbors=Twins(table.num_chunks),
        num_neighbors=1,
        retrieval_dropout=0.0,
    )


def test_it_learns_to_copy_from_its_neighbors() -> None:
    torch.set_num_threads(1)
    if not mcore.parallel_state.model_parallel_is_initialized():
        mcore.initialize()
    shape = ModelConfig(num_layers=4, hidden_size=64, num_attention_heads=2, seq_length=CHUNK * CHUNKS)
    shape.finish()
    retro = RetroConfig(retro_layers="2,4", retro_num_neighbors=1)
    retro.finish(shape)
    model = mcore.wrap_for_training(RetroModel(shape, retro, ParallelConfig(), 128, CHUNK, seed=1))
    optimizer = mcore.build_optimizer(model, lr=4e-3, weight_decay=0.0, clip_grad=1.0)
    samples = twin_samples(STEPS * BATCH)
    for step in range(STEPS):
        train_step(model, optimizer, samples, step * BATCH + np.arange(BATCH), BATCH)
    loss = {
        mode: sample_losses(model, samples, num_samples=64, micro_batch_size=16, retrieval=mode).mean
        for mode in ("on", "off", "random")
    }
    # The tokens are random: without its twin's text nothing beats log(VOCAB). The first chunk of eight has no neighbor.
    assert loss["on"] < 0.5 * np.log(VOCAB)
    assert loss["off"] > 0.95 * np.log(VOCAB)
    assert loss["random"] > 0.95 * np.log(VOCAB)
