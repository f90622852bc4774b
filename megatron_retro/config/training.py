"""Flags of `pretrain_retro.py`: data, optimizer, run; and the defaults that follow from the model's size."""

import dataclasses

from megatron_retro.config.flags import at_least, flag, flag_name, required
from megatron_retro.config.model import QA_PROMPT, ModelConfig, RetroConfig, check_qa_prompt
from megatron_retro.config.parallel import TrainingParallelConfig
from megatron_retro.errors import UserError


@dataclasses.dataclass
class DataConfig:
    """Data"""

    data_path: tuple[str, ...] = flag(
        (), "[WEIGHT] NAME …: corpora of the work dir, by name or prefix", many=True, show="all of them"
    )
    split: str | None = flag(None, "must be the work dir's; for scripts that pass it", show="the work dir's")
    seed: int = flag(1234, "of weights, sample order and dropout")
    verify_data: str = flag(
        "quick",
        "of the work dir; quick: sizes, small files, samples of large ones; full: every byte",
        choices=("quick", "full"),
    )
    num_workers: int | None = flag(
        None,
        "processes a rank reads samples with, ahead of the step; 0: it reads them itself",
        show="2 with a GPU, else 0",
    )


@dataclasses.dataclass
class InstructionConfig:
    """Instruction tuning"""

    sft_data: tuple[str, ...] = flag(
        (),
        '[WEIGHT] FILE …: JSON lines with "messages", or "question" and "answers"; "ctxs" to read, where given',
        many=True,
        show="none: pretraining",
    )
    sft_valid_data: tuple[str, ...] = flag((), "FILE …: such lines to evaluate on", many=True, show="none")
    qa_prompt: str = flag(QA_PROMPT, "what a question becomes", show="Question: … Answer:")

    def finish(self, data: DataConfig, retro: RetroConfig) -> None:
        """Check.

        Raises:
            UserError: names the flag and the way out.
        """
        check_qa_prompt(self.qa_prompt)
        if not self.sft_data:
            if self.sft_valid_data:
                raise UserError(f"--sft-valid-data {' '.join(self.sft_valid_data)} needs --sft-data FILE")
            return
        if data.data_path:
            raise UserError(f"--data-path {' '.join(data.data_path)} is for pretraining; leave it out with --sft-data")
        if retro.retro_max_overlap < 1:
            raise UserError(
                f"--retro-max-overlap {retro.retro_max_overlap} is for pretraining; leave it out with --sft-data"
            )


@dataclasses.dataclass
class OptimizationConfig:
    """Optimization"""

    micro_batch_size: int = flag(4, "samples a rank runs at once")
    global_batch_size: int | None = flag(None, "samples an update", show="--micro-batch-size × data-parallel ranks")
    train_iters: int | None = flag(None, "updates", show="one pass over the training split")
    lr: float | None = flag(None, "peak learning rate", show="6e-4 … 1e-4, by --hidden-size")
    min_lr: float | None = flag(None, "learning rate at the end", show="--lr / 10")
    lr_decay_style: str = flag("cosine", "decay", choices=("constant", "linear", "cosine"))
    lr_decay_iters: int | None = flag(None, "updates until --min-lr", show="--train-iters")
    lr_warmup_iters: int | None = flag(None, "updates of linear warm-up", show="2% of --train-iters, at most 750")
    weight_decay: float = flag(0.1, "decoupled weight decay, not on biases and norms")
    adam_beta1: float = flag(0.9, "Adam's β₁")
    adam_beta2: float = flag(0.95, "Adam's β₂")
    adam_eps: float = flag(1e-8, "Adam's ε")
    clip_grad: float = flag(1.0, "largest gradient norm; 0 turns clipping off")


@dataclasses.dataclass
class RunConfig:
    """Checkpoints, evaluation, logging"""

    save: str | None = flag(None, "directory for checkpoints and metrics.jsonl")
    save_interval: int | None = flag(None, "updates between checkpoints", show="at the end alone")
    load: str | None = flag(None, "directory to resume from; may equal --save and be empty")
    ckpt_step: int | None = flag(None, "update to resume from", show="the newest")
    retro_fit_from: str | None = flag(
        None,
        "start from the weights of a model, GPT or RETRO: checkpoints of this project or of Megatron-LM, or a Hugging "
        "Face directory",
    )
    trust_pickle: bool = flag(False, "let --retro-fit-from read Megatron-LM's .pt files, which are pickles, as data")
    eval_interval: int | None = flag(None, "updates between evaluations", show="at the end alone")
    eval_iters: int = flag(10, "global batches an evaluation; 0 turns it off")
    log_interval: int = flag(10, "updates between log lines")
    tensorboard_dir: str | None = flag(None, "directory for TensorBoard")
    exit_interval: int | None = flag(None, "save and exit after this many updates of this run")
    exit_duration_in_mins: float | None = flag(None, "save and exit so that the program takes at most so many minutes")
    on_bad_step: str = flag(
        "stop", "when loss or gradients are not finite, or the loss is a spike", choices=("stop", "skip", "rewind")
    )
    dry_run: bool = flag(False, "print parameters, memory a rank and speed to expect, and exit")


@dataclasses.dataclass
class PretrainConfig:
    """Everything `pretrain_retro.py` takes."""

    retro: RetroConfig = dataclasses.field(default_factory=RetroConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    parallel: TrainingParallelConfig = dataclasses.field(default_factory=TrainingParallelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    instructions: InstructionConfig = dataclasses.field(default_factory=InstructionConfig)
    optimization: OptimizationConfig = dataclasses.field(default_factory=OptimizationConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)

    def finish(self, world_size: int) -> None:
        """Fill in what needs no data; check. `finish_with_data` does the rest.

        Raises:
            UserError: names the flag, both values and what would fit.
        """
        self.model.finish()
        self.retro.finish(self.model)
        self.parallel.finish(world_size, self.model, self.active_retro)
        required(self.retro, retro_work_dir="tools/preprocess_retro_data.py builds one")
        if self.retro.retro_freeze_decoder and not (self.retro.retro_add_retriever and self.run.retro_fit_from):
            raise UserError(
                "--retro-freeze-decoder needs --retro-add-retriever, which adds what is trained, and --retro-fit-from, "
                "for the weights that stay"
            )
        self.instructions.finish(self.data, self.retro)
        if self.run.save_interval and not self.run.save:
            raise UserError(f"--save-interval {self.run.save_interval} needs --save DIR")
        if self.run.on_bad_step == "rewind" and not self.run.save:
            raise UserError("--on-bad-step rewind needs --save DIR, for the checkpoints that it goes back to")
        at_least(1, self.run, "save_interval", "eval_interval", "exit_interval", "log_interval")
        at_least(0, self.data, "num_workers")
        at_least(0, self.run, "ckpt_step")
        if self.run.ckpt_step is not None and not self.run.load:
            raise UserError(f"--ckpt-step {self.run.ckpt_step} needs --load DIR")
        self._finish_batch(world_size)
        self._check_ranges()

    def finish_with_data(self, num_samples: int) -> None:
        """Fill in what follows from the number of training samples; check the schedule."""
        optimization = self.optimization
        assert optimization.global_batch_size
        if optimization.train_iters is None:
            optimization.train_iters = -(-num_samples // optimization.global_batch_size)
        if optimization.lr is None:
            optimization.lr = default_learning_rate(self.model.hidden_size)
        if optimization.min_lr is None:
            optimization.min_lr = optimization.lr / 10
        if optimization.lr_decay_iters is None:
            optimization.lr_decay_iters = max(1, optimization.train_iters)
        if optimization.lr_warmup_iters is None:
            optimization.lr_warmup_iters = min(750, optimization.lr_decay_iters // 50)
        if optimization.lr_warmup_iters >= optimization.lr_decay_iters:
            raise UserError(
                f"--lr-warmup-iters {optimization.lr_warmup_iters} must be less than "
                f"--lr-decay-iters {optimization.lr_decay_iters}"
            )
        if optimization.min_lr > optimization.lr:
            raise UserError(f"--min-lr {optimization.min_lr} is above --lr {optimization.lr}")

    @property
    def active_retro(self) -> RetroConfig | None:
        """The retrieval flags where the model retrieves, else None."""
        return self.retro if self.retro.retro_add_retriever else None

    def _check_ranges(self) -> None:
        optimization, run = self.optimization, self.run
        at_least(1, optimization, "train_iters", "lr_decay_iters")
        for name in ("lr", "min_lr", "lr_warmup_iters", "weight_decay", "adam_eps", "clip_grad"):
            if (value := getattr(optimization, name)) is not None and not 0 <= value < float("inf"):
                raise UserError(f"{flag_name(name)} is {value}; it cannot be negative")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(optimization, name) < 1:
                raise UserError(f"{flag_name(name)} is {getattr(optimization, name)}; it lies from 0 to below 1")
        if run.eval_iters < 0:
            raise UserError(f"--eval-iters is {run.eval_iters}; it takes 0 (no evaluation) or more")
        if run.exit_duration_in_mins is not None and run.exit_duration_in_mins <= 0:
            raise UserError(f"--exit-duration-in-mins is {run.exit_duration_in_mins}; it must be above 0")

    def _finish_batch(self, world_size: int) -> None:
        parallel, optimization = self.parallel, self.optimization
        ranks = world_size // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
        together = optimization.micro_batch_size * ranks
        at_least(1, optimization, "micro_batch_size")
        if optimization.global_batch_size is None:
            optimization.global_batch_size = together
        if optimization.global_batch_size < 1 or optimization.global_batch_size % together:
            raise UserError(
                f"--global-batch-size {optimization.global_batch_size} is no multiple of --micro-batch-size "
                f"{optimization.micro_batch_size} × {ranks} data-parallel ranks"
            )
        microbatches, stages = optimization.global_batch_size // together, parallel.pipeline_model_parallel_size
        if parallel.virtual_stages > 1 and microbatches % stages:
            raise UserError(
                f"--global-batch-size {optimization.global_batch_size} makes {microbatches} micro-batches; with "
                f"--num-virtual-stages-per-pipeline-rank {parallel.virtual_stages} their number must be a multiple of "
                f"--pipeline-model-parallel-size {stages}"
            )


def default_learning_rate(hidden_size: int) -> float:
    """Peak rate of the nearest published size (arXiv 2304.06762: 6e-4 at width 768 … 1e-4 at 4096)."""
    return 6e-4 if hidden_size <= 768 else 3e-4 if hidden_size <= 1024 else 2e-4 if hidden_size <= 2048 else 1e-4
