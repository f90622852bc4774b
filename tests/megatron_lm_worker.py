"""Loads checkpoints of Megatron-LM at several layouts in one launch and stores the logits of each.

torchrun --nproc-per-node N tests/megatron_lm_worker.py OUT.pt DIR:TPxPP[xSP]…
"""

import pathlib
import sys

import megatron_lm_helpers as theirs
import parallel_worker as parallel_tests
import torch
import torch.distributed as dist

from megatron_retro import distributed, mcore
from megatron_retro.interop.megatron_lm import MegatronCheckpoint
from megatron_retro.model.model import make_stages
from megatron_retro.training.checkpoint import shape_of
from megatron_retro.training.fit import fit


@torch.no_grad()
def logits(directory: str, layout: str) -> torch.Tensor | None:
    """[B, S, V], on the last stage; None before it."""
    source = MegatronCheckpoint(pathlib.Path(directory), trust_pickle=True)
    shape = shape_of({**source.flags, "seq_length": theirs.S})
    parallel = parallel_tests.parallel_of(layout)
    parallel.finish(distributed.world_size(), shape.model, shape.retro)
    mcore.initialize(parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    (model,) = make_stages(shape.model, shape.retro, parallel, source.vocab_size, theirs.C, seed=1)
    assert not fit([model], source).new
    tokens, neighbors = theirs.tokens_and_neighbors()
    lengths = torch.ones(neighbors.shape[:3], dtype=torch.int64)

    def forward_step(_: object, stage: torch.nn.Module) -> tuple:
        out = stage(tokens, neighbor_tokens_BxLxKxR=neighbors, neighbor_lengths_BxLxK=lengths)
        return out, lambda out: (out.sum() * 0, torch.ones((), dtype=torch.int32), {"logits": out})

    reports = mcore.run_pipeline(
        forward_step,
        iter([None]),
        model.eval(),
        num_microbatches=1,
        seq_length=model.boundary_length(theirs.S, theirs.L, theirs.K),
        micro_batch_size=theirs.B,
        forward_only=True,
    )
    found = mcore.gather_vocabulary(reports[0]["logits"]) if reports else None
    mcore.parallel_state.destroy_model_parallel()
    return found


if __name__ == "__main__":
    out, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    found = distributed.all_gather({case: logits(*case.rsplit(":", 1)) for case in cases})
    if dist.get_rank() == 0:
        torch.save({case: next(of[case] for of in found if of[case] is not None) for case in cases}, out)
    dist.destroy_process_group()
