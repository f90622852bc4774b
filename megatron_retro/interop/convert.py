"""What `tools/convert_checkpoint.py` does: a foreign model becomes a checkpoint of this project."""

import pathlib

from megatron_retro import mcore
from megatron_retro.config import flags
from megatron_retro.config.conversion import DEFAULT_CHUNK_LENGTH, ConvertConfig
from megatron_retro.config.parallel import TrainingParallelConfig
from megatron_retro.config.training import PretrainConfig
from megatron_retro.data.tokenizer import tokenizer_file
from megatron_retro.errors import UserError
from megatron_retro.interop.own import OwnCheckpoint
from megatron_retro.interop.source import open_source
from megatron_retro.model.model import make_stages, padded_vocab_size
from megatron_retro.retrieval.corpora import describe_tokenizer
from megatron_retro.storage import check_writable
from megatron_retro.training import checkpoint, checkpoint_files
from megatron_retro.training.fit import fit
from megatron_retro.workdir import digest_of_tokenizer


def convert(config: ConvertConfig) -> None:
    """Convert as `config`, finished, says; in one process.

    Raises:
        UserError: the model is unknown, damaged or of another shape than it says.
    """
    given = config.conversion
    assert given.load and given.save
    source = open_source("--load", given.load, trust_pickle=given.trust_pickle)
    assert not isinstance(source, OwnCheckpoint)  # those are exported
    save = pathlib.Path(given.save)
    if there := checkpoint_files.complete(save):
        raise UserError(f"--save {save} holds checkpoints already, up to {there[0].name}; give another directory")
    if (save / "config.json").exists():
        raise UserError(f"--save {save} holds a Hugging Face model; give another directory")
    check_writable("--save", save)
    asked = given.tokenizer_model
    tokenizer = tokenizer_file(pathlib.Path(asked)) if asked else source.tokenizer_file()
    if tokenizer is None:
        raise UserError(f"--load {given.load} holds no tokenizer.json or tokenizer.model; give --tokenizer-model")
    facts = describe_tokenizer(tokenizer)
    if facts["vocab_size"] > source.vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer} has {facts['vocab_size']} ids, --load {given.load} knows "
            f"{source.vocab_size}; give the model's own as --tokenizer-model"
        )
    digest = digest_of_tokenizer(facts, tokenizer)
    source.check_tokenizer(digest, tokenizer)
    if not asked and source.tokenizer_digest:
        digest = source.tokenizer_digest  # an export writes the same ids in another form
    if given.retro_chunk_length and source.chunk_length not in (None, given.retro_chunk_length):
        raise UserError(
            f"--retro-chunk-length is {given.retro_chunk_length}, --load {given.load} reads chunks of "
            f"{source.chunk_length}; leave the flag out"
        )
    run = PretrainConfig(parallel=TrainingParallelConfig(bf16=given.bf16))
    positions = min(source.max_positions, source.longest or source.max_positions)
    if positions < source.max_positions:
        print(f"{positions} positions, its sliding window, of {source.max_positions}")
    shape = checkpoint.shape_of({**source.flags, "seq_length": positions})
    run.model, run.retro = shape.model, shape.retro
    run.retro.retro_work_dir = None

    mcore.initialize()
    chunk_length = source.chunk_length or given.retro_chunk_length or DEFAULT_CHUNK_LENGTH
    vocab_size = padded_vocab_size(source.vocab_size, run.model.make_vocab_size_divisible_by, 1)
    stages = make_stages(run.model, run.active_retro, run.parallel, vocab_size, chunk_length, run.data.seed)
    for line in fit(stages, source, "--load").lines(source):
        print(line)
    state = checkpoint.RunState(
        iteration=0,
        consumed_samples=0,
        config=flags.to_dict(run),
        vocab_size=vocab_size,
        chunk_length=chunk_length,
        tokenizer_digest=digest,
        data_digest="",
    )
    path = checkpoint.save(str(save), stages[0], None, state)
    print(f"saved to {path}")
    mcore.shut_down()
