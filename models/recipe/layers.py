"""How many layers of the base to keep: python models/recipe/layers.py --corpus DIR --out DIR. Nothing is trained but a line for each layer.

Logistic regression on the mean and the last of a layer's states, fitted on training rows, ranks validation rows, and the benign
texts and unsafe twins for development, whose sources it did not see. What a layer tells a line, it can tell the layers that
are trained on top of it.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from base import IM_END, write_base
from data import Example, encode, free_license, gather
from row_file import rows
from tokenizers import Tokenizer
from train import batches
from transformers import LlamaForCausalLM

from edgeguard.bench.metrics import auprc, auroc

LAYERS, VOCAB = 30, 20480
PULL = 0.03  # of the weights towards zero


@torch.no_grad()
def states(model: LlamaForCausalLM, examples: list[Example]) -> torch.Tensor:
    """Mean and last state of each prompt after each layer, (rows, layers + 1, 2 * hidden), float16."""
    found: list[torch.Tensor] = [torch.empty(0)] * len(examples)
    for batch in batches(examples, 3000, 0):
        lengths = torch.tensor([examples[i].answer for i in batch])
        width = int(lengths.max())
        ids = torch.tensor([examples[i].ids[: examples[i].answer] + [IM_END] * (width - examples[i].answer) for i in batch])
        inside = (torch.arange(width) < lengths[:, None]).float()[..., None]
        layers = model.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        each = [torch.cat([(layer.float() * inside).sum(1) / lengths[:, None], layer[range(len(batch)), lengths - 1].float()], -1)
                for layer in layers]
        for place, row in zip(batch, torch.stack(each, 1).half(), strict=True):
            found[place] = row
    return torch.stack(found)


def fitted(seen: torch.Tensor, unsafe: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """P(unsafe) of the other rows, by a logistic regression on the seen ones."""
    middle, spread = seen.mean(0), seen.std(0) + 1e-4
    seen, others = (((part - middle) / spread).clamp(-6, 6) for part in (seen, others))
    line, offset = torch.zeros(seen.shape[1], requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([line, offset], max_iter=150, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(seen @ line + offset, unsafe) + PULL / 2 * line.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return (others @ line + offset).detach().sigmoid()


def chosen(found: list[dict[str, Any]], number: int, seed: int) -> list[dict[str, Any]]:
    return random.Random(seed).sample(found, min(number, len(found)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="folder with train.jsonl.gz, val.jsonl.gz and benign/")
    parser.add_argument("--out", type=Path, required=True, help="where the base model is written")
    parser.add_argument("--rows", type=int, default=5000, help="training rows")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not (args.out / "tokenizer.json").exists():
        write_base(args.out, LAYERS, VOCAB)
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    model = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.bfloat16, attn_implementation="eager").eval()
    train = chosen(gather(args.corpus, [], 1), args.rows, args.seed)
    held = chosen([row for row in rows(args.corpus / "val.jsonl.gz") if free_license(row)], 1500, args.seed)
    other = [*rows(args.corpus / "benign" / "twins-train.jsonl.gz"),
             *chosen(list(rows(args.corpus / "benign" / "benign-train.jsonl.gz")), 600, args.seed)]
    every = [*train, *held, *other]
    found = states(model, [encode(row, tokenizer, 1) for row in every])
    unsafe = torch.tensor([float(row["label"] == "unsafe") for row in every])
    end = len(train) + len(held)
    print("| layer | AUPRC, validation | AUROC, twins and benign texts |\n| --- | --- | --- |")
    for layer in range(2, LAYERS + 1, 2):
        scores = fitted(found[: len(train), layer].float(), unsafe[: len(train)], found[len(train):, layer].float())
        truth = unsafe[len(train):] > 0
        split = end - len(train)
        print(f"| {layer} | {auprc(truth[:split].tolist(), scores[:split].tolist()):.3f} | "
              f"{auroc(truth[split:].tolist(), scores[split:].tolist()):.3f} |", flush=True)


if __name__ == "__main__":
    main()
