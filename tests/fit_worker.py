"""Starts RETRO from foreign models at several layouts in one launch: logits, then losses of a few updates.

    torchrun --nproc-per-node N tests/fit_worker.py OUT.pt FOLDER CASE…      CASE = MODEL:LAYOUT[xfrozen]

FOLDER holds the models (see foreign.py), a layout is one of parallel_worker.py. RETRO layer 3 of 4 leaves the first of
two stages without anything to train where the decoder is frozen.
"""

import pathlib
import sys

import numpy as np
import parallel_worker as parallel_tests
import torch
import torch.distributed as dist
from foreign import S, tokens

from megatron_retro import distributed, mcore
from megatron_retro.interop.source import open_source
from megatron_retro.model.model import RetroModel, make_stages, padded_vocab_size
from megatron_retro.training import fit
from megatron_retro.training.checkpoint import shape_of
from megatron_retro.training.step import train_step

CHUNK = parallel_tests.CHUNK
RETRO = {"retro_add_retriever": True, "retro_layers": "3", "retro_num_neighbors": 2, "seq_length": S}


def run(folder: pathlib.Path, case: str) -> dict:
    name, layout = case.split(":")
    parallel, is_frozen = parallel_tests.parallel_of(layout.removesuffix("xfrozen")), layout.endswith("xfrozen")
    source = open_source("--retro-fit-from", str(folder / name))
    shape = shape_of(fit.adopt(RETRO, source))
    parallel.finish(distributed.world_size(), shape.model, shape.retro)
    mcore.initialize(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        virtual_stages=parallel.virtual_stages,
    )
    stages = make_stages(shape.model, shape.retro, parallel, padded_vocab_size(source.vocab_size, 128, 1), CHUNK, 1)
    fitted = fit.fit(stages, source)
    if is_frozen:
        fit.freeze(stages)
    before = {name: weight.detach().clone() for stage in stages for name, weight in fit.named_weights(stage)}
    model = mcore.wrap_for_training(*stages, use_distributed_optimizer=parallel.use_distributed_optimizer)
    result: dict = {"copied": fitted.copied, "new": fitted.new, "logits": logits(model), "loss": []}
    optimizer = mcore.build_optimizer(model, lr=1e-2, weight_decay=0.1, clip_grad=1.0, adam_eps=1e-5)
    samples = parallel_tests.make_samples(hidden=False)
    for step in range(2):
        update = train_step(model, optimizer, samples, step * 4 + np.arange(4), micro_batch_size=2)
        result["loss"] += [update.loss, update.grad_norm]
    changed = sorted(
        {name for stage in stages for name, now in fit.named_weights(stage) if not same(now, before[name])}
    )
    result["changed"] = sorted({name for of_rank in distributed.all_gather(changed) for name in of_rank})
    result["optimizer_bytes"] = sum(distributed.all_gather(state_bytes(optimizer)))
    mcore.parallel_state.destroy_model_parallel()
    return result


def same(now: torch.Tensor, before: torch.Tensor) -> bool:
    return torch.equal(now.detach(), before)


def state_bytes(optimizer: object) -> int:
    """Bytes of Adam's moments on this rank."""
    return sum(
        value.numel() * value.element_size()
        for part in getattr(optimizer, "chained_optimizers", [optimizer])
        for state in part.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.dim()
    )


@torch.no_grad()
def logits(model: mcore.ModelChunks) -> torch.Tensor | None:
    """Of `tokens()` with random neighbors, on the last stage; None before it."""
    first: RetroModel = mcore.unwrap(model)
    generator = torch.Generator().manual_seed(9)
    neighbors = torch.randint(97, (2, S // CHUNK, 2, 2 * CHUNK), generator=generator)
    lengths = torch.randint(1, 2 * CHUNK, (2, S // CHUNK, 2), generator=generator)

    def forward_step(_: object, stage: torch.nn.Module) -> tuple:
        out = stage(tokens(), neighbor_tokens_BxLxKxR=neighbors, neighbor_lengths_BxLxK=lengths)
        return out, lambda out: (out.sum() * 0, torch.ones((), dtype=torch.int32), {"logits": out})

    model.eval()
    reports = mcore.run_pipeline(
        forward_step,
        iter([None] * len(model)),
        model,
        num_microbatches=1 if len(model) == 1 else mcore.parallel_state.get_pipeline_model_parallel_world_size(),
        seq_length=first.boundary_length(S, S // CHUNK, 2),
        micro_batch_size=2,
        forward_only=True,
    )
    return mcore.gather_vocabulary(reports[0]["logits"]) if reports else None


if __name__ == "__main__":
    out, folder, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    results = {case: run(pathlib.Path(folder), case) for case in cases}
    logits_of_last = distributed.all_gather({case: result["logits"] for case, result in results.items()})
    if dist.get_rank() == 0:
        for case, result in results.items():
            result["logits"] = next(found[case] for found in logits_of_last if found[case] is not None)
        torch.save(results, out)
    dist.destroy_process_group()
