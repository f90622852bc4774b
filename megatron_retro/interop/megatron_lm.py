"""A checkpoint of Megatron-LM as a source of weights: a GPT or RETRO in `.pt` shards, of megatron-core or older.

    latest_checkpointed_iteration.txt                      a number, or "release"
    iter_0001000/mp_rank_00/model_optim_rng.pt             of each tensor-parallel rank: args, iteration, model
    iter_0001000/mp_rank_00_000/model_optim_rng.pt         … and pipeline stage, where there are several

Its names become ours, its shards whole tensors. Which form of RETRO it is (`config/form.py`) shows in the names.
"""

import pathlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_retro.errors import UserError
from megatron_retro.interop import saved
from megatron_retro.interop.hugging_face import check_same_ids
from megatron_retro.interop.megatron_lm_args import Args, flags_of
from megatron_retro.interop.saved import Stored
from megatron_retro.training.checkpoint import weight_flags
from megatron_retro.training.fit import Source

TRACKER = "latest_checkpointed_iteration.txt"
_SHARD = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3}))?")
_FILES = ("model_optim_rng.pt", "model_rng.pt")

# Names of the model before megatron-core, in megatron-core's words; the order counts.
_LEGACY = [
    (r"^language_model\.(embedding|output_layer)\.", r"\1."),
    (r"^language_model\.(encoder|transformer)\.", "decoder."),
    (r"\.retriever\.", ".cross_attention.encoder."),
    (r"\.(self_)?attention\.query_key_value\.", ".self_attention.linear_qkv."),
    (r"\.(self_)?attention\.dense\.", ".self_attention.linear_proj."),
    (r"\.inter_attention\.query\.", ".cross_attention.linear_q."),
    (r"\.inter_attention\.key_value\.", ".cross_attention.linear_kv."),
    (r"\.inter_attention\.dense\.", ".cross_attention.linear_proj."),
    (r"\.mlp\.dense_h_to_4h\.", ".mlp.linear_fc1."),
    (r"\.mlp\.dense_4h_to_h\.", ".mlp.linear_fc2."),
    (r"\.(input|final)_(layer)?norm\.", r".\1_layernorm."),
    (r"\.post_inter_attention_(layer)?norm\.", ".pre_mlp_layernorm."),
]
_LEGACY_NORM = re.compile(r"\.post_attention_(layer)?norm\.")  # before what comes next: cross-attention or MLP

# megatron-core's names in ours: with Transformer Engine a linear layer may hold the normalization before it.
_CORE = [
    (r"^decoder\.layers\.\d+\.cross_attention\.encoder\.", "decoder.encoder."),
    (r"\.cross_attention\.attn\.", ".cross_attention."),
    (r"\.self_attention\.linear_qkv\.layer_norm_", ".input_layernorm."),
    (r"\.mlp\.linear_fc1\.layer_norm_", ".pre_mlp_layernorm."),
    (r"\.pre_mlp_layernorm\.norm\.", ".pre_mlp_layernorm."),
]
_NO_WEIGHTS = re.compile(r"(\._extra_state|rotary_pos_emb\.inv_freq)$")
_OUTPUT = ("output_layer.weight", "word_embeddings_for_head.weight")  # of the last stage; a copy where weights are tied

_BY_ROWS = re.compile(r"(word_embeddings|output_layer|linear_qkv|linear_q|linear_kv|linear_fc1)\.(weight|bias)$")
_BY_COLUMNS = re.compile(r"(linear_proj|linear_fc2)\.weight$")
_NORM_WEIGHT = re.compile(r"norm\.weight$")
_DEEPEST = 9  # dictionaries in dictionaries; a model from before megatron-core has 3
_CHUNK_LENGTH = 64  # of all RETROs of Megatron-LM that do not say it
_EMBEDDING = "embedding.word_embeddings.weight"
_FROM_DECODER = "decoder.encoder."  # + embedding…: Megatron-LM's encoder had none of its own


class MegatronCheckpoint(Source):
    """A GPT or RETRO of Megatron-LM; see `fit.Source`.

    Args:
        path: the directory with the tracker file, or one of an iteration.
        trust_pickle: whether the user has said that pickles may be read.

    Raises:
        UserError: pickles may not be read; shards are missing, damaged or not of one checkpoint; it is a model that
            nothing here is made for.
    """

    def __init__(self, path: pathlib.Path, trust_pickle: bool):
        self._directory, self.path = path, _iteration_directory(path)
        files = _shard_files(self.path)
        if not trust_pickle:
            raise UserError(
                f"{self.path} is of pickle files (.pt), a format whose files can be made to run programs when they are "
                "read; --trust-pickle reads it, as data alone"
            )
        self._shards = {place: _Shard(file) for place, file in files.items()}
        first = self._shards[0, 0]
        self._args = args = Args(first.file, first.args)
        self._tensor_ranks = args.whole("tensor_model_parallel_size", "model_parallel_size", otherwise=1)
        self._stages = args.whole("pipeline_model_parallel_size", otherwise=1)
        self._check_shards(files)
        self._weights = self._named()
        flags = flags_of(args, set(self._weights), is_legacy=first.is_legacy)
        self.flags: dict[str, Any] = weight_flags(flags)
        self.max_positions: int = flags["max_position_embeddings"]
        self.longest: int | None = self.flags.get("max_position_embeddings")
        self._gate = args.number("retro_attention_gate", otherwise=1.0) if first.is_legacy else 1.0
        is_retro = self.flags["retro_add_retriever"]
        self.chunk_length: int | None = None
        if is_retro:
            self.chunk_length = args.whole("retro_chunk_length", "retro_gpt_chunk_length", otherwise=_CHUNK_LENGTH)
        if not self.flags["untie_embeddings_and_output_weights"]:
            self._weights.pop("output_layer.weight", None)
        if is_retro:
            self._share_embedding()
        if _EMBEDDING not in self._weights:
            raise UserError(f"{first.file} holds no word embeddings; it is no checkpoint of a GPT or RETRO")
        self.vocab_size = self.shape(_EMBEDDING)[0]
        self.kind = f"checkpoint of Megatron-LM (TP {self._tensor_ranks}, PP {self._stages})"

    def names(self) -> list[str]:
        return list(self._weights)

    def left_out(self) -> list[str]:
        theirs = {name for shard in self._shards.values() for name in shard.weights if _NO_WEIGHTS.search(name)}
        if not self.flags["untie_embeddings_and_output_weights"]:
            theirs |= {name for shard in self._shards.values() for name in shard.weights if name.endswith(_OUTPUT)}
        return sorted(theirs)

    def shape(self, name: str) -> tuple[int, ...]:
        parts = self._parts(name)
        shape = list(parts[0].shape)
        if (axis := 1 if _BY_COLUMNS.search(name) else 0) < len(shape):
            shape[axis] *= len(parts)
        return (min(shape[0], self._positions_of(name) or shape[0]), *shape[1:])

    def tensor(self, name: str) -> Tensor:
        tensors = [part.tensor() for part in self._parts(name)]
        if _BY_COLUMNS.search(name):
            tensor = torch.cat(tensors, 1)
        elif ".linear_fc1." in name and self.flags["swiglu"]:  # gate and value lie together in each shard
            tensor = torch.cat(
                [half for halves in zip(*(part.chunk(2) for part in tensors), strict=True) for half in halves]
            )
        else:
            tensor = torch.cat(tensors) if _BY_ROWS.search(name) else tensors[0]
        if _NORM_WEIGHT.search(name) and self._args.get("apply_layernorm_1p"):
            tensor = tensor.float() + 1  # stored as the distance from one
        if self._gate != 1 and _FROM_DECODER not in name and ".cross_attention.linear_proj." in name:
            tensor = tensor.float() * self._gate
        return tensor[: self._positions_of(name)]

    def tokenizer_file(self) -> pathlib.Path | None:
        """The SentencePiece model beside the shards, if there is one."""
        return next(iter(sorted(self._directory.glob("*.model"))), None)

    def check_tokenizer(self, digest: str, file: pathlib.Path) -> None:
        if own := self.tokenizer_file():
            check_same_ids(own, file)

    # ------------------------------------------------------------------------------------------------ shards

    def _check_shards(self, files: dict[tuple[int, int], pathlib.Path]) -> None:
        layout = f"its args say tensor-parallel {self._tensor_ranks}, pipeline-parallel {self._stages}"
        for place in ((rank, stage) for rank in range(self._tensor_ranks) for stage in range(self._stages)):
            if place not in files:
                name = _shard_name(*place, self._stages)
                raise UserError(f"{self.path}: shard {name} is missing ({layout}); complete it")
        for (rank, stage), file in files.items():
            if rank >= self._tensor_ranks or stage >= self._stages:
                raise UserError(f"{self.path}: {file.parent.name} is one shard too many ({layout}); take it away")
        first = self._shards[0, 0]
        for shard in self._shards.values():
            if shard.iteration != first.iteration:
                raise UserError(
                    f"{shard.file} is of iteration {shard.iteration}, {first.file} of {first.iteration}; "
                    "take the shards of one checkpoint"
                )

    def _named(self) -> dict[str, list[Stored]]:
        """Our name -> the tensor of each tensor-parallel rank; layers are numbered through all stages."""
        weights: dict[str, list[Stored]] = {}
        layers_before = 0
        for stage in range(self._stages):
            ranks = [self._shards[rank, stage] for rank in range(self._tensor_ranks)]
            for theirs, tensor in ranks[0].weights.items():
                if not _NO_WEIGHTS.search(theirs):
                    parts = [_same_kind(shard, theirs, tensor, ranks[0]) for shard in ranks]
                    ours = _renumbered(_our_name(theirs, ranks[0]), layers_before)
                    if not tensor.shape:
                        raise UserError(f"{ranks[0].file}: tensor {theirs} is a single number; restore it")
                    if ours != _EMBEDDING or stage == 0:
                        weights[ours] = parts
            for shard in ranks[1:]:
                if extra := sorted(shard.weights.keys() - ranks[0].weights.keys()):
                    raise UserError(f"{shard.file} holds a tensor {extra[0]} that {ranks[0].file} lacks; restore it")
            layers_before += 1 + max((int(number) for number in _layer_numbers(ranks[0])), default=-1)
        return weights

    def _share_embedding(self) -> None:
        for name in (_EMBEDDING, "embedding.position_embeddings.weight"):
            if name in self._weights:
                self._weights[_FROM_DECODER + name] = self._weights[name]

    def _parts(self, name: str) -> list[Stored]:
        parts = self._weights[name]
        return parts if _BY_ROWS.search(name) or _BY_COLUMNS.search(name) else parts[:1]

    def _positions_of(self, name: str) -> int | None:
        """Rows of the encoder's table of positions; None for other tensors."""
        if name != f"{_FROM_DECODER}embedding.position_embeddings.weight":
            return None
        assert self.chunk_length
        return 2 * self.chunk_length


class _Shard:
    """What one rank saved.

    Attributes:
        weights: tensors by their own names, nested dictionaries flattened.
    """

    def __init__(self, file: pathlib.Path):
        self.file, content = file, saved.read(file)
        if not isinstance(content, dict):
            raise UserError(f"{file} holds no dictionary; it is no checkpoint of Megatron-LM")
        if "model0" in content:
            raise UserError(
                f"{file} was saved with virtual pipeline stages; save it without, or convert it in Megatron-LM"
            )
        for key in ("args", "model"):
            if key not in content:
                raise UserError(f"{file} has no {key!r}; it is no checkpoint of Megatron-LM, or an incomplete one")
        if not isinstance(content["args"], saved.Values) or not isinstance(content["model"], dict):
            raise UserError(f"{file}: its 'args' or 'model' is of another kind than Megatron-LM writes; restore it")
        version = content.get("checkpoint_version", 0)
        if not isinstance(version, (int, float)) or version < 2:
            raise UserError(
                f"{file} is of checkpoint version {version}; load and save it with a Megatron-LM of 2021 or later"
            )
        self.args, self.iteration = vars(content["args"]), content.get("iteration")
        self.weights = dict(self._flattened(content["model"]))
        self.is_legacy = any(name.startswith("language_model.") for name in self.weights)

    def _flattened(self, values: dict, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Stored]]:
        if depth > _DEEPEST:
            raise UserError(f"{self.file}: its 'model' is nested {depth} deep; restore it")
        for name, value in values.items():
            if isinstance(value, dict):
                yield from self._flattened(value, f"{prefix}{name}.", depth + 1)
            elif isinstance(value, Stored):
                yield f"{prefix}{name}", value


def _same_kind(shard: _Shard, name: str, tensor: Stored, first: _Shard) -> Stored:
    if name not in shard.weights:
        raise UserError(
            f"{shard.file} lacks the tensor {name} {list(tensor.shape)} that {first.file} holds; restore it"
        )
    if shard.weights[name].shape != tensor.shape:
        raise UserError(
            f"{shard.file}: tensor {name} is {list(shard.weights[name].shape)}, in {first.file} {list(tensor.shape)}; "
            "take the shards of one checkpoint"
        )
    return shard.weights[name]


# ------------------------------------------------------------------------------------------------ names


def _our_name(name: str, shard: _Shard) -> str:
    if shard.is_legacy:
        if name.endswith("word_embeddings_for_head.weight"):
            return "output_layer.weight"
        reads = _LEGACY_NORM.sub(".inter_attention.query.", name).rpartition(".")[0] + ".weight"
        becomes = ".pre_cross_attn_layernorm." if reads in shard.weights else ".pre_mlp_layernorm."
        name = _renamed(_LEGACY_NORM.sub(becomes, name), _LEGACY)
    return _renamed(name, _CORE)


def _renamed(name: str, rules: list[tuple[str, str]]) -> str:
    for theirs, ours in rules:
        name = re.sub(theirs, ours, name)
    return name


def _renumbered(name: str, layers_before: int) -> str:
    return re.sub(r"^decoder\.layers\.(\d+)", lambda match: f"decoder.layers.{int(match[1]) + layers_before}", name)


def _layer_numbers(shard: _Shard) -> Iterator[str]:
    for name in shard.weights:
        if match := re.match(r"decoder\.layers\.(\d+)\.", _our_name(name, shard)):
            yield match[1]


# ------------------------------------------------------------------------------------------------ files


def is_megatron(path: pathlib.Path) -> bool:
    """Whether a directory holds .pt shards of Megatron-LM, itself or for iterations."""
    return any(
        _SHARD.fullmatch(shard.name) for folder in ("", "iter_*/", "release/") for shard in path.glob(f"{folder}*")
    )


def _iteration_directory(path: pathlib.Path) -> pathlib.Path:
    tracker = path / TRACKER
    if not tracker.is_file():
        return path
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if text != "release" and not re.fullmatch(r"\d{1,9}", text):
        raise UserError(f"{tracker} holds {text[:40]!r}, neither a number nor 'release'; restore it")
    directory = path / ("release" if text == "release" else f"iter_{int(text):07d}")
    if not directory.is_dir():
        raise UserError(f"{tracker} names {text}, but there is no {directory.name}; complete the directory")
    return directory


def _shard_files(path: pathlib.Path) -> dict[tuple[int, int], pathlib.Path]:
    """(tensor-parallel rank, pipeline stage) -> file."""
    files = {}
    for entry in sorted(path.iterdir()):
        if match := _SHARD.fullmatch(entry.name):
            file = next((entry / name for name in _FILES if (entry / name).is_file()), None)
            if file is None:
                raise UserError(f"{entry} holds no {_FILES[0]}; complete it")
            files[int(match[1]), int(match[2] or 0)] = file
    if (0, 0) not in files:
        raise UserError(f"{path} holds no {_shard_name(0, 0, 1)}; only Megatron-LM's --ckpt-format torch is read")
    return files


def _shard_name(rank: int, stage: int, stages: int) -> str:
    return f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if stages > 1 else "")
