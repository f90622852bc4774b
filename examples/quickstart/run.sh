#!/usr/bin/env bash
# The whole way on real text, on two CPU cores: documents, work dir, training, resuming at another layout, evaluation.
# `make quickstart` runs it. A second run skips what is there and shows the table again; remove quickstart/ to start over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

run() { # say the command, then do it
    printf '\n$ %s\n' "$*"
    "$@"
}

trained() { # updates in the newest checkpoint
    cat quickstart/checkpoints/latest_checkpointed_iteration.txt 2> /dev/null || echo 0
}

# 1. Documents: JSON lines with the keys `id` and `text`.
[[ -s quickstart/stdlib.jsonl ]] || run python examples/quickstart/stdlib_documents.py quickstart/stdlib.jsonl

# 2. Work dir: tokens, chunks, embeddings, index, neighbors. What is finished already takes no time.
run torchrun --nproc-per-node 2 tools/preprocess_retro_data.py \
    --input quickstart/stdlib.jsonl --retro-work-dir quickstart/work --vocab-size 2000 --split 95,5,0

# 3. Train two thirds of the way, every layer shared by two ranks (tensor parallel).
pretrain=(
    torchrun --nproc-per-node 2 pretrain_retro.py
    --config examples/quickstart/retro.yaml --retro-work-dir quickstart/work
    --save quickstart/checkpoints --load quickstart/checkpoints
)
(($(trained) >= 450)) || run "${pretrain[@]}" --tensor-model-parallel-size 2 --exit-interval $((450 - $(trained)))

# 4. Resume from that checkpoint at another layout, every sample on one of the two ranks (data parallel), and finish.
(($(trained) >= 700)) || run "${pretrain[@]}"

# 5. Evaluate on the valid split, over the same tokens: neighbors on, off, and random ones.
run torchrun --nproc-per-node 2 tools/evaluate_retro.py --load quickstart/checkpoints \
    --retro-work-dir quickstart/work --split valid --output quickstart/eval.json

cat << 'END'

quickstart/stdlib.jsonl                the documents
quickstart/work/                       the work dir: tokenizer, tokens, chunks, embeddings, index, neighbors
quickstart/checkpoints/                checkpoints, and metrics.jsonl with a line a log interval
quickstart/eval.json                   loss, perplexity and bits per byte with retrieval on, off and random
examples/quickstart/                   the script and the model's flags, to change and run again
END
