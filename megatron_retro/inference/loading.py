"""A trained model from its checkpoint, at this run's layout."""

import dataclasses
import pathlib

import torch

from megatron_retro import distributed, mcore
from megatron_retro.config.model import QA_PROMPT, ModelConfig, ParallelConfig, RetroConfig
from megatron_retro.errors import UserError
from megatron_retro.model.model import RetroModel
from megatron_retro.training import checkpoint, checkpoint_files


@dataclasses.dataclass
class Trained:
    """A checkpoint's model, ready to run.

    Attributes:
        retro: None for a GPT.
        path: the checkpoint that was loaded.
    """

    module: torch.nn.Module
    model: ModelConfig
    retro: RetroConfig | None
    state: checkpoint.RunState
    path: pathlib.Path

    @property
    def template(self) -> str:
        """What a question becomes, with `{question}` in it: the checkpoint's --qa-prompt."""
        return self.state.config.get("qa_prompt", QA_PROMPT)


def load_trained(load: str, parallel: ParallelConfig) -> Trained:
    """Load the newest checkpoint under `load`; every rank calls it, after `mcore.initialize`.

    Raises:
        UserError: there is none, or the layout does not fit the model.
    """
    path = checkpoint_files.find_sound(load)
    if path is None:
        is_hugging_face = (pathlib.Path(load) / "config.json").is_file()
        way_out = "; tools/convert_checkpoint.py makes one of a Hugging Face directory" if is_hugging_face else ""
        raise UserError(f"--load {load} holds no checkpoint{way_out}")
    state = checkpoint.read_state(path)
    model, retro = checkpoint.model_config_of(state)
    parallel.bf16 = parallel.bf16 or bool(state.config.get("bf16"))
    parallel.finish(distributed.world_size(), model, retro)
    module = mcore.wrap_for_inference(
        RetroModel(model, retro, parallel, state.vocab_size, state.chunk_length, state.config["seed"])
    )
    mcore.load_state(module, None, str(path))
    return Trained(module, model, retro, state, path)


def check_same_tokenizer(trained: Trained, tokenizer_digest: str, chunk_length: int, work_dir: str) -> None:
    """Check that a work dir's tokens mean to the model what they meant in training.

    Raises:
        UserError: names what differs, and both values.
    """
    for what, trained_on, found in (
        ("tokenizer", trained.state.tokenizer_digest, tokenizer_digest),
        ("chunk length", trained.state.chunk_length, chunk_length),
    ):
        if trained_on != found:
            raise UserError(
                f"--retro-work-dir {work_dir}: its {what} is {found}, the checkpoint {trained.path} was trained with "
                f"{trained_on}; use a work dir built with that {what}"
            )
