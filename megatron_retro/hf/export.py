"""A checkpoint as a Hugging Face directory: weights in safetensors, config.json, generation_config.json, tokenizer.

A RETRO becomes a `RetroForCausalLM`, which loads where this package is installed; a GPT one of the models that
`transformers` has itself. Rows that only pad the vocabulary are left out.
"""

import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import huggingface_hub
import torch
import transformers
from torch import Tensor

from megatron_retro.config.conversion import ConversionConfig
from megatron_retro.config.model import ModelConfig
from megatron_retro.config.model import RetroConfig as RetroFlags
from megatron_retro.data.tokenizer import Tokenizer, tokenizer_file
from megatron_retro.errors import UserError
from megatron_retro.hf import RetroConfig, RetroForCausalLM, stock
from megatron_retro.hf.configuration import flag_names
from megatron_retro.hf.tokenizer import is_found, save_tokenizer
from megatron_retro.interop.own import OwnCheckpoint
from megatron_retro.retrieval.corpora import describe_tokenizer
from megatron_retro.storage import check_writable, replacing
from megatron_retro.training import checkpoint, checkpoint_files
from megatron_retro.training.data import open_work_dir
from megatron_retro.training.fit import BY_TOKEN
from megatron_retro.workdir import digest_of_tokenizer

_SHARD = "5GB"


def export(given: ConversionConfig) -> None:
    """Write the newest checkpoint under `--load` to the directory `--save`, which is complete or not there.

    Raises:
        UserError: the tokenizer is another than in training, the flags fit no model, or `--save` is there already.
    """
    assert given.load and given.save
    path, save = checkpoint_files.find_sound(given.load), pathlib.Path(given.save)
    assert path
    if save.exists() and (not save.is_dir() or any(save.iterdir())):
        raise UserError(f"--save {save} is there already; give a new directory")
    check_writable("--save", save.absolute().parent)
    if given.retro_chunk_length:
        raise UserError("--retro-chunk-length is for models that become checkpoints; this one is a checkpoint already")
    source = OwnCheckpoint(path)
    file = _tokenizer_file(given.tokenizer_model, source)
    digest = digest_of_tokenizer(describe_tokenizer(file), file)
    source.check_tokenizer(digest, file)
    shape = checkpoint.shape_of(source.state.config)
    retro = shape.retro if shape.retro.retro_add_retriever else None
    tokenizer = Tokenizer.open(file)
    config = _config(shape.model, retro, tokenizer, source.state.chunk_length, digest)
    weights = _weights(source, tokenizer.vocab_size, torch.bfloat16 if given.bf16 else None)
    tensors = dict(weights) if retro else stock.tensors_of(shape.model, weights)
    with replacing(save) as temporary:
        temporary.mkdir()
        _save_model(config, tensors, temporary)
        _generation(tokenizer).save_pretrained(temporary)
        save_tokenizer(file, temporary, shape.model.max_position_embeddings or shape.model.seq_length)
    kind = "RetroForCausalLM: import megatron_retro.hf before it is loaded" if retro else config.model_type
    print(f"{path} saved to {save} ({kind})")
    if not is_found(save, tokenizer):
        print(f"AutoTokenizer takes another kind for {config.model_type}; PreTrainedTokenizerFast loads this one")


def _tokenizer_file(given: str | None, source: OwnCheckpoint) -> pathlib.Path:
    if given:
        return tokenizer_file(pathlib.Path(given))
    if not (work_dir := source.state.config.get("retro_work_dir")):
        raise UserError(f"the checkpoint {source.path} names no work dir; give its tokenizer as --tokenizer-model FILE")
    try:
        work = open_work_dir(work_dir)
    except UserError as error:
        raise UserError(f"{error}; or give the checkpoint's tokenizer as --tokenizer-model FILE") from None
    return work.path / work.facts("tokenizer")["file"]


def _weights(source: OwnCheckpoint, vocab_size: int, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """Our name and values of each weight, without the rows of no token; with no dtype in that of the checkpoint."""
    for name in source.names():
        tensor = source.tensor(name).to(dtype)
        yield name, tensor[:vocab_size].clone() if name in BY_TOKEN else tensor


def _config(
    model: ModelConfig, retro: RetroFlags | None, tokenizer: Tokenizer, chunk_length: int, digest: str
) -> transformers.PreTrainedConfig:
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eod, "pad_token_id": tokenizer.pad}
    given: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "tokenizer_digest": digest, **ids}
    if retro is None:
        return stock.config_of(model, **given)
    values = {**vars(model), **vars(retro)}
    return RetroConfig(
        retro_chunk_length=chunk_length,
        **given,
        **{name: value for name, value in values.items() if name in flag_names()},
    )


def _save_model(config: transformers.PreTrainedConfig, tensors: dict[str, Tensor], directory: pathlib.Path) -> None:
    """Weights under the names that files have; models may call them otherwise inside."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    config.architectures = [CLASSES.get(config.model_type, RetroForCausalLM.__name__)]
    config.dtype = next(iter(tensors.values())).dtype
    config.save_pretrained(directory)
    huggingface_hub.save_torch_state_dict(tensors, directory, max_shard_size=_SHARD)
    for file in directory.glob("*.safetensors"):
        shutil.copymode(directory / "config.json", file)  # safetensors lets nobody else read its files


def _generation(tokenizer: Tokenizer) -> transformers.GenerationConfig:
    """Generation ends with a document, and writes no padding, as `tools/generate_retro_text.py` does."""
    never = {"suppress_tokens": [tokenizer.pad]} if tokenizer.pad != tokenizer.eod else {}
    return transformers.GenerationConfig(eos_token_id=tokenizer.eod, pad_token_id=tokenizer.pad, **never)
