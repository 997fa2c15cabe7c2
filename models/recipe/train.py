"""Trains the mini guard: python models/recipe/train.py --corpus DIR --out DIR. Run again after a stop, it goes on where it was.

The loss is the cross-entropy of the answer's tokens over the whole vocabulary, so that the answer's share of the
probability means something. Embeddings and the lowest layers stay frozen.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from base import IM_END, write_base
from data import Example, chosen, encode, free_license, rows
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM


def batches(examples: list[Example], tokens: int, seed: int) -> list[list[int]]:
    """Index lists of about `tokens` padded tokens each, of like length, in random order."""
    rng = random.Random(seed)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids) + rng.random() * 6)
    out: list[list[int]] = [[]]
    for index in order:
        if out[-1] and (len(out[-1]) + 1) * len(examples[index].ids) > tokens:
            out.append([])
        out[-1].append(index)
    rng.shuffle(out)
    return out


def answer_states(model: LlamaForCausalLM, batch: list[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (N, vocab) that predict the batch's answer tokens, those tokens (N), their weights (N)."""
    width = max(len(example.ids) for example in batch)
    ids = torch.tensor([example.ids + [IM_END] * (width - len(example.ids)) for example in batch])
    # padding stands behind the answer, where a causal model cannot see it: no mask is needed
    states = model.model(input_ids=ids, use_cache=False).last_hidden_state
    at = [(row, example.answer + k) for row, example in enumerate(batch) for k in range(len(example.weights))]
    row, column = torch.tensor(at).T
    logits = F.linear(states[row, column - 1], model.lm_head.weight)
    return logits.float(), ids[row, column], torch.tensor([w for example in batch for w in example.weights])


@torch.no_grad()
def validate(model: LlamaForCausalLM, examples: list[Example], labels: list[bool], first: tuple[int, int]) -> dict[str, float]:
    """F1, FPR and AUPRC of P(unsafe) from the first answer token, threshold 0.5."""
    model.eval()
    scores = torch.zeros(len(examples))
    for batch in batches(examples, 3000, 0):
        logits, _, _ = answer_states(model, [examples[i] for i in batch])
        starts = torch.tensor([0, *[len(examples[i].weights) for i in batch]]).cumsum(0)[:-1]
        pair = logits[starts][:, list(first)]
        scores[torch.tensor(batch)] = pair.softmax(-1)[:, 1].float()
    model.train()
    truth = torch.tensor(labels)
    said = scores > 0.5
    hit, false = int((said & truth).sum()), int((said & ~truth).sum())
    order = truth[scores.argsort(descending=True)].float()
    precision = order.cumsum(0) / torch.arange(1, len(order) + 1)
    return {"f1": 2 * hit / max(1, int(said.sum()) + int(truth.sum())), "fpr": false / int((~truth).sum()),
            "recall": hit / int(truth.sum()), "auprc": float((precision * order).sum() / order.sum())}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="folder with train.jsonl.gz and val.jsonl.gz")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocab", type=int, default=20480)
    parser.add_argument("--frozen", type=int, default=3, help="lowest layers that are not trained")
    parser.add_argument("--rows", type=int, default=40000)
    parser.add_argument("--tokens", type=int, default=2400, help="padded tokens a step")
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser.parse_args()


def prepare(args: argparse.Namespace) -> tuple[LlamaForCausalLM, Tokenizer]:
    base = args.out / "base"
    if not (base / "tokenizer.json").exists():
        write_base(base, args.layers, args.vocab)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="sdpa")
    model.model.embed_tokens.weight.requires_grad_(False)
    for layer in model.model.layers[: args.frozen]:
        layer.requires_grad_(False)
    return model, Tokenizer.from_file(str(base / "tokenizer.json"))


def save(path: Path, state: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = prepare(args)
    kept = [row for row in rows(args.corpus / "train.jsonl.gz") if chosen(row, args.seed)]
    random.Random(args.seed).shuffle(kept)
    examples = [encode(row, tokenizer, args.seed) for row in kept[: args.rows]]
    val = [row for row in rows(args.corpus / "val.jsonl.gz") if free_license(row)]
    held = [encode(row, tokenizer, args.seed) for row in val]
    labels = [row["label"] == "unsafe" for row in val]
    first = (tokenizer.encode("safe", add_special_tokens=False).ids[0], tokenizer.encode("unsafe", add_special_tokens=False).ids[0])
    plan = batches(examples, args.tokens, args.seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.rate, betas=(0.9, 0.98), weight_decay=0.01)
    checkpoint, log, start = args.out / "checkpoint.pt", args.out / "log.jsonl", 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    tokens = sum(len(example.ids) for example in examples)
    print(f"{len(examples)} rows, {tokens} tokens, {len(plan)} steps from {start}, {len(val)} validation rows", flush=True)
    model.train()
    began = time.time()
    for step in range(start, len(plan)):
        rate = min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / len(plan))))
        for group in optimizer.param_groups:
            group["lr"] = args.rate * rate
        with torch.autocast("cpu", torch.bfloat16):
            logits, targets, weights = answer_states(model, [examples[i] for i in plan[step]])
        loss = (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        line: dict[str, float] = {"step": step, "loss": round(float(loss.detach()), 4), "minutes": round((time.time() - began) / 60, 2)}
        last = step + 1 == len(plan)
        if (step + 1) % 300 == 0 or last:
            save(checkpoint, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1})
        if (step + 1) % 600 == 0 or last:
            with torch.autocast("cpu", torch.bfloat16):
                few = len(held) if last else 1000
                line |= validate(model, held[:few], labels[:few], first)
        if step % 20 == 0 or "f1" in line:
            print(json.dumps(line), flush=True)
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
    final = args.out / "final"
    model.to(torch.bfloat16).save_pretrained(final, max_shard_size="60MB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (final / name).write_bytes((args.out / "base" / name).read_bytes())


if __name__ == "__main__":
    main()
