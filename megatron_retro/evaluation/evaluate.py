"""What `tools/evaluate_retro.py` does: one text, or a file of questions, in every mode; a table, JSON, a page.

Modes: "on", "off" and "random" (neighbors), "also" (those of another work dir's database), "gpt" (another model).
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

from megatron_retro import distributed, mcore, watch
from megatron_retro.config import flags
from megatron_retro.config.evaluation import EvaluateConfig, EvaluationConfig
from megatron_retro.config.model import RETRIEVAL_MODES, ModelConfig, RetroConfig
from megatron_retro.config.training import DataConfig
from megatron_retro.data.questions import Question, read_questions
from megatron_retro.errors import UserError
from megatron_retro.evaluation.asking import QuestionEvaluation
from megatron_retro.evaluation.other import OtherDatabase
from megatron_retro.evaluation.report import write_report
from megatron_retro.evaluation.table import table
from megatron_retro.evaluation.text import TextEvaluation
from megatron_retro.inference.loading import Trained, check_same_tokenizer, load_trained
from megatron_retro.retrieval.progress import Progress
from megatron_retro.storage import check_writable, write_atomically
from megatron_retro.training import checkpoint, checkpoint_files
from megatron_retro.training.data import TrainingData
from megatron_retro.workdir import WorkDir


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Run the evaluation; every rank calls it and gets the figures, rank 0 prints and writes them.

    Raises:
        UserError: flags, checkpoints, work dirs and questions do not fit together.
    """
    config.finish()
    given, parallel, results = config.evaluation, config.parallel, config.results
    assert given.load and given.retro_work_dir
    distributed.use_this_ranks_share()
    mcore.initialize(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        timeout_minutes=parallel.distributed_timeout_minutes,
    )
    watch.at("the evaluation")
    for flag, file in (("--output", results.output), ("--report", results.report)):
        if file:
            distributed.together(functools.partial(check_writable, flag, pathlib.Path(file).absolute().parent))
    asked, gpt_directory, work_dir = config.questions.qa, given.gpt, given.retro_work_dir
    questions = distributed.together(lambda: read_questions(pathlib.Path(asked)) if asked else [])

    # ---- the model that reads, and what it reads
    trained = load_trained(given.load, parallel)
    retro = _retro_of(trained, given)
    config.questions.qa_prompt = config.questions.qa_prompt or trained.template
    searches = given.split != "none" or not all(question.ctxs for question in questions)
    data = TrainingData.open(work_dir, retrieve=retro is not None and searches)
    check_same_tokenizer(trained, data.tokenizer_digest, data.table.chunk_length, work_dir)
    if retro:
        parallel.check_retrieved_length(2 * data.table.chunk_length)
    work = WorkDir(work_dir)
    seq_length = given.seq_length or trained.model.seq_length
    _check_positions("--load", given.load, trained.model, seq_length)
    if gpt_directory:
        distributed.together(lambda: _check_gpt(gpt_directory, data, work_dir, seq_length))
    text = _text(given, data, work, retro, seq_length) if given.split != "none" else None
    asking = _asking(config, questions, data, work, retro) if questions else None

    # ---- one model after the other
    result: dict[str, Any] = {
        "checkpoint": str(trained.path),
        "iteration": trained.state.iteration,
        "retro_work_dir": work_dir,
        "split": given.split,
    }
    modes = [*RETRIEVAL_MODES, *(["also"] if given.also_db else [])] if retro else ["off"]
    _measure(text, asking, trained, modes, given)
    if gpt_directory:
        del trained  # its memory, before the next one's
        gpt = load_trained(gpt_directory, dataclasses.replace(parallel))
        result["gpt"] = str(gpt.path)
        _measure(text, asking, gpt, ["gpt"], given)

    # ---- figures
    if text:
        result |= text.result(data.open_tokenizer().decode)
    if asking:
        result["questions"] = asking.result()
    result["settings"] = flags.to_dict(config) | {"seq_length": seq_length}
    if distributed.rank() == 0:
        print(table(result))
        if results.output:
            content = json.dumps(result, indent=1, allow_nan=False).encode()
            write_atomically(pathlib.Path(results.output), lambda file: file.write(content))
        if results.report:
            write_report(pathlib.Path(results.report), result)
    mcore.shut_down()
    return result


def _check_gpt(directory: str, data: TrainingData, work_dir: str, seq_length: int) -> None:
    """Refuse what cannot be compared with before hours of evaluation."""
    path = checkpoint_files.find(directory)
    if path is None:
        raise UserError(f"--gpt {directory} holds no checkpoint")
    state = checkpoint.read_state(path)
    model, retro = checkpoint.model_config_of(state)
    if retro:
        raise UserError(f"--gpt {directory} holds a RETRO, not a GPT; evaluate it by itself with --load {directory}")
    if state.tokenizer_digest != data.tokenizer_digest:
        raise UserError(
            f"--gpt {directory} was trained with the tokenizer {state.tokenizer_digest}, --retro-work-dir {work_dir} "
            f"has {data.tokenizer_digest}; only models of one tokenizer predict the same tokens"
        )
    _check_positions("--gpt", directory, model, seq_length)


def _check_positions(flag: str, directory: str, model: ModelConfig, seq_length: int) -> None:
    most = model.max_position_embeddings or model.seq_length
    if model.position_embedding_type == "learned_absolute" and seq_length > most:
        raise UserError(
            f"--seq-length {seq_length} is more than the {most} positions that {flag} {directory} has learned; "
            f"take at most {most}"
        )


def _retro_of(trained: Trained, given: EvaluationConfig) -> RetroConfig | None:
    """The retrieval flags of a checkpoint with the number of neighbors asked for; None for a GPT."""
    if trained.retro is None:
        for flag, value in (("--also-db", given.also_db), ("--retro-num-neighbors", given.retro_num_neighbors)):
            if value:
                raise UserError(f"{flag} {value} is for a model that reads; {trained.path} is a GPT, leave it out")
        return None
    return dataclasses.replace(
        trained.retro, retro_num_neighbors=given.retro_num_neighbors or trained.retro.retro_num_neighbors
    )


def _text(
    given: EvaluationConfig, data: TrainingData, work: WorkDir, retro: RetroConfig | None, seq_length: int
) -> TextEvaluation:
    corpora = DataConfig(data_path=given.data_path)
    samples = data.samples(given.split, corpora, retro, seq_length=seq_length, num_samples=None, training=False)
    number, other_path, num_neighbors = len(samples), given.also_db, retro.retro_num_neighbors if retro else 0
    other = OtherDatabase.open(other_path, work) if other_path else None
    if other and num_neighbors > other.num_neighbors:
        raise UserError(
            f"--retro-num-neighbors {num_neighbors} is more than the {other.num_neighbors} that --also-db {other_path} "
            "holds for each chunk; build one with a larger --retro-query-num-neighbors-save"
        )
    number = min(number, given.max_samples or number)
    return TextEvaluation(samples, number, data.neighbors, other, num_neighbors, data.pad)


def _asking(
    config: EvaluateConfig, questions: list[Question], data: TrainingData, work: WorkDir, retro: RetroConfig | None
) -> QuestionEvaluation:
    return QuestionEvaluation(
        questions,
        work,
        data.table,
        distributed.together(data.open_tokenizer),
        template=str(config.questions.qa_prompt),
        max_new_tokens=config.questions.qa_max_new_tokens,
        batch_size=config.evaluation.micro_batch_size,
        num_neighbors=retro.retro_num_neighbors if retro else 0,
    )


def _measure(
    text: TextEvaluation | None,
    asking: QuestionEvaluation | None,
    trained: Trained,
    modes: list[str],
    given: EvaluationConfig,
) -> None:
    for mode in modes:
        if text:
            with Progress(mode, text.num_samples, "samples", together=True) as progress:
                text.measure(mode, trained.module, given.micro_batch_size, progress.advance)
        if asking and mode in ("on", "off", "gpt"):
            with Progress(mode, asking.num_questions, "questions", together=True) as progress:
                asking.measure(mode, trained, progress.advance)
