"""Tokens a second of a RETRO that reads while it writes, against a GPT of the same shape, in turns in one process.

python benchmarks/generate.py --load CKPT --retro-work-dir work

Prints a table: seconds a token of the model alone and with retrieval, their ratio to the GPT's, and the ratio of
multiply-adds, which the model's time should not exceed by more than a tenth. The GPT has the decoder's shape and
initial weights; how fast it writes does not depend on them. Prompts are chunks of the work dir's own text.
"""

import argparse
import pathlib
import statistics
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_retro import mcore  # noqa: E402
from megatron_retro.config.model import ParallelConfig  # noqa: E402
from megatron_retro.inference.generate import open_trained  # noqa: E402
from megatron_retro.inference.reader import open_reader  # noqa: E402
from megatron_retro.inference.writer import Choice, Writer  # noqa: E402
from megatron_retro.model.flops import multiply_adds  # noqa: E402
from megatron_retro.model.model import RetroModel  # noqa: E402

NO_TOKEN = -1  # no text ends early


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--load", required=True, help="checkpoint of a RETRO")
    parser.add_argument("--retro-work-dir", required=True)
    parser.add_argument("--texts", type=int, nargs="+", default=[1, 8], help="written at once")
    parser.add_argument("--new-tokens", type=int, default=256, help="of each text")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    parallel = ParallelConfig()
    work, trained, table, tokenizer = open_trained(args.load, args.retro_work_dir, parallel)
    if trained.retro is None:
        sys.exit(f"--load {args.load} is a GPT; give a RETRO, the GPT of its shape is made here")
    k, length = trained.retro.retro_num_neighbors, table.chunk_length
    gpt = RetroModel(trained.model, None, parallel, trained.state.vocab_size, length, seed=1)
    reader = open_reader(work, table, k)

    def writer(model: torch.nn.Module, reads: bool) -> Writer:
        return Writer(
            model,  # type: ignore[arg-type]
            chunk_length=length,
            context=(trained.model.max_position_embeddings or trained.model.seq_length) // length * length,
            vocab_size=tokenizer.vocab_size,
            eod=NO_TOKEN,
            pad=tokenizer.pad,
            reader=reader if reads else None,
            num_neighbors=k,
        )

    average = length + args.new_tokens / 2
    shape = dict(vocab_size=trained.state.vocab_size, chunk_length=length, context=average)
    arithmetic = (
        multiply_adds(trained.model, trained.retro, **shape).total / multiply_adds(trained.model, None, **shape).total
    )
    print("| texts at once | tokens/s GPT | tokens/s RETRO | model's time ÷ GPT's | multiply-adds ÷ GPT's | ", end="")
    print("whole time ÷ GPT's | retrieval's share |\n|---|---|---|---|---|---|---|")
    with torch.no_grad():
        for texts in args.texts:
            ids, _ = table.tokens(torch.arange(texts).numpy() * (table.num_chunks // texts), length, tokenizer.pad)
            seconds: dict[str, list[tuple[float, float]]] = {"gpt": [], "retro": []}
            for _ in range(args.rounds + 1):
                for name, model in (("gpt", gpt.eval()), ("retro", mcore.unwrap(trained.module))):
                    reading = reader.seconds
                    writes = writer(model, name == "retro")
                    events = writes.write(ids.tolist(), Choice(), args.new_tokens)
                    count = sum(event.token is not None for event in events)
                    assert count == texts * args.new_tokens
                    seconds[name].append((writes.model_seconds / count, (reader.seconds - reading) / count))
            by_gpt, alone, reads = (  # the first round warms up
                statistics.median(each)
                for each in (
                    [model for model, _ in seconds["gpt"][1:]],
                    [model for model, _ in seconds["retro"][1:]],
                    [found for _, found in seconds["retro"][1:]],
                )
            )
            whole = alone + reads
            print(
                f"| {texts} | {1 / by_gpt:,.1f} | {1 / whole:,.1f} | {alone / by_gpt:.2f} | {arithmetic:.2f} | "
                f"{whole / by_gpt:.2f} | {reads / whole:.1%} |",
                flush=True,
            )
    mcore.shut_down()


if __name__ == "__main__":
    main()
