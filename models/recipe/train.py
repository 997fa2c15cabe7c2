"""Trains the mini guard: python models/recipe/train.py --corpus DIR --out DIR [--more FILE ...]. Run again after a stop, it goes on.

The loss is the cross-entropy of the answer's tokens over the whole vocabulary, so that the answer's share of the
probability means something. Embeddings and the lowest layers stay frozen. From epoch to epoch rows are changed anew
(synthetic/augment.py); what is saved at the end is the running average of the weights.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from base import IM_END, TOKENIZER_CONFIG, write_base
from data import Example, encode, free_license, gather, unit
from measures import SCORES, by_source, measures
from row_file import rows, write
from synthetic.augment import augment
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from edgeguard.machine import cpu

Row = dict[str, Any]


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
    device = model.lm_head.weight.device
    ids = torch.tensor([example.ids + [IM_END] * (width - len(example.ids)) for example in batch], device=device)
    # padding stands behind the answer, where a causal model cannot see it: no mask is needed
    states = model.model(input_ids=ids, use_cache=False).last_hidden_state
    at = [(row, example.answer + k) for row, example in enumerate(batch) for k in range(len(example.weights))]
    row, column = torch.tensor(at, device=device).T
    logits = F.linear(states[row, column - 1], model.lm_head.weight)
    return logits.float(), ids[row, column], torch.tensor([w for example in batch for w in example.weights], device=device)


def halved(device: str) -> torch.autocast:
    """Products in bfloat16, but not on a processor without units for it, where they take several times as long as in float32."""
    return torch.autocast(device, torch.bfloat16, enabled=device != "cpu" or bool(cpu().flags & {"avx512_bf16", "bf16"}))


@torch.no_grad()
def scores(model: LlamaForCausalLM, examples: list[Example], first: tuple[int, int]) -> torch.Tensor:
    """P(unsafe) of each example, (rows,), from the first answer token."""
    model.eval()
    found = torch.zeros(len(examples))
    for batch in batches(examples, 6000, 0):
        with halved(model.device.type):
            logits, _, _ = answer_states(model, [examples[i] for i in batch])
        starts = torch.tensor([0, *[len(examples[i].weights) for i in batch]]).cumsum(0)[:-1]
        found[torch.tensor(batch)] = logits[starts.to(logits.device)][:, list(first)].softmax(-1)[:, 1].float().cpu()
    model.train()
    return found


def scored(model: LlamaForCausalLM, held: list[Row], examples: list[Example], first: tuple[int, int]) -> list[Row]:
    """Which row it is, its label and the model's score."""
    said = scores(model, examples, first).tolist()
    return [{"id": row["id"], "source": row["source"], "label": row["label"], "score": round(score, 6)}
            for row, score in zip(held, said, strict=True)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="folder with train.jsonl.gz and val.jsonl.gz")
    parser.add_argument("--more", type=Path, nargs="*", default=[], help="further files of rows to train on")
    parser.add_argument("--held", type=Path, nargs="*", default=[], help="further files of rows to measure on at the end")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="folder of weights to go on from, such as models/mini-3/gguf; else the base model")
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--vocab", type=int, default=20480)
    parser.add_argument("--frozen", type=int, default=6, help="lowest layers that are not trained")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--augmented", type=float, default=0.2, help="share of the rows that are changed in an epoch")
    parser.add_argument("--left-out", nargs="*", default=[], help="sources that are not trained on; validation is theirs then")
    parser.add_argument("--part", type=float, default=1.0, help="share of all rows, for a trial")
    parser.add_argument("--tokens", type=int, default=3200, help="padded tokens a step")
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate of the top layer")
    parser.add_argument("--decay", type=float, default=0.95, help="learning rate of a layer over that of the layer above")
    parser.add_argument("--average", type=float, default=0.995, help="decay of the running average of the weights")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="compile the layers first: 1.5 times as fast on a CPU; needs a C++ compiler")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser.parse_args()


class Run:
    """Model, optimiser and place of a training that can be stopped at any time."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.checkpoint = args, args.out / "checkpoint.pt"
        self.base = args.start or args.out / "base"
        if not (self.base / "tokenizer.json").exists():
            write_base(self.base, args.layers, args.vocab)
        # for texts this short, plain attention is several times faster on a CPU than the fused one's backward pass
        gguf = "model.gguf" if (self.base / "model.gguf").exists() else None
        self.model = LlamaForCausalLM.from_pretrained(self.base, gguf_file=gguf, dtype=torch.float32, attn_implementation="eager")
        self.model.to(args.device)
        if args.compile:
            for layer in self.model.model.layers:
                layer.compile(dynamic=True)
        self.model.model.embed_tokens.weight.requires_grad_(False)
        for layer in self.model.model.layers[: args.frozen]:
            layer.requires_grad_(False)
        self.tokenizer = Tokenizer.from_file(str(self.base / "tokenizer.json"))
        self.first = tuple(self.tokenizer.encode(word, add_special_tokens=False).ids[0] for word in ("safe", "unsafe"))
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.groups(), lr=args.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        self.average = [p.detach().clone() for p in self.trained]
        self.epoch = self.step = self.steps = 0
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, map_location=args.device)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average, self.epoch, self.step, self.steps = state["average"], state["epoch"], state["step"], state["steps"]

    def groups(self) -> list[dict[str, Any]]:
        """Parameters by layer, each with its share of the learning rate: what lies low is general, and changes little."""
        layers = self.model.model.layers
        norm = {"params": list(self.model.model.norm.parameters()), "share": 1.0}
        return [norm, *({"params": list(layer.parameters()), "share": self.args.decay ** (len(layers) - 1 - index)}
                        for index, layer in enumerate(layers) if index >= self.args.frozen)]

    def save(self) -> None:
        partial = self.checkpoint.with_suffix(".partial")
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "average": self.average,
                    "epoch": self.epoch, "step": self.step, "steps": self.steps}, partial)
        partial.replace(self.checkpoint)

    def take(self, batch: list[Example], done: float) -> float:
        """One step at a share of the whole training; gives the loss."""
        warm = min(1.0, (self.steps + 1) / 50)
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.rate * group["share"] * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        with halved(self.args.device):
            logits, targets, weights = answer_states(self.model, batch)
        loss = (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        decay = min(self.args.average, self.steps / (self.steps + 10))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.trained], 1 - decay)
        return float(loss.detach())

    def averaged(self) -> None:
        """The average in the place of the weights."""
        for parameter, average in zip(self.trained, self.average, strict=True):
            parameter.data.copy_(average)

    def write(self, out: Path) -> None:
        self.model.to(torch.bfloat16).save_pretrained(out, max_shard_size="60MB")
        (out / "tokenizer.json").write_bytes((self.base / "tokenizer.json").read_bytes())
        (out / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=1), encoding="utf-8")


def encoded(run: Run, found: Iterable[Row], epoch: int) -> list[Example]:
    """The rows of an epoch as tokens, a share of them changed; the same epoch gives the same."""
    args = run.args
    changed = (augment(row, random.Random(f"{args.seed}:{epoch}:{row['id']}"))
               if unit(f"{epoch}:{row['id']}", args.seed) < args.augmented else row for row in found)
    return [encode(row, run.tokenizer, args.seed + epoch) for row in changed]


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    run, log = Run(args), args.out / "log.jsonl"
    found = [row for row in gather(args.corpus, args.more, args.seed, args.left_out) if unit(f"part:{row['id']}", args.seed) < args.part]
    held = [row for row in rows(args.corpus / "val.jsonl.gz")
            if free_license(row) and (not args.left_out or row["source"] in args.left_out)]
    held += [row for path in args.held for row in rows(path)]
    if not held:
        raise SystemExit(f"No validation row is of {', '.join(args.left_out)}, and there is no --held to measure on.")
    held_examples = [encode(row, run.tokenizer, args.seed) for row in held]

    def tell(line: dict[str, Any]) -> None:
        print(json.dumps(line), flush=True)
        with log.open("a") as file:
            file.write(json.dumps(line) + "\n")

    tell({"options": {name: str(value) for name, value in vars(args).items()},
          "versions": {package: version(package) for package in ("torch", "transformers", "tokenizers")}, "machine": cpu().model})
    began = time.time()
    for epoch in range(run.epoch, args.epochs):
        examples = encoded(run, found, epoch)
        plan = batches(examples, args.tokens, args.seed + epoch)
        tokens = sum(len(each.ids) for each in examples)
        tell({"epoch": epoch, "rows": len(examples), "tokens": tokens, "steps": len(plan), "from": run.step})
        for step in range(run.step, len(plan)):
            loss = run.take([examples[i] for i in plan[step]], (epoch + step / len(plan)) / args.epochs)
            run.step = step + 1
            if step % 20 == 0:
                tell({"epoch": epoch, "step": step, "loss": round(loss, 4), "minutes": round((time.time() - began) / 60, 2)})
            if run.step % 300 == 0:
                run.save()
        run.epoch, run.step = epoch + 1, 0
        run.save()
        if run.epoch < args.epochs:
            tell({"epoch": epoch, "val": measures(scored(run.model, held, held_examples, run.first))})
    run.averaged()
    judged = scored(run.model, held, held_examples, run.first)
    tell({"averaged": by_source(judged)})
    write(args.out / SCORES, judged)
    run.write(args.out / "final")


if __name__ == "__main__":
    main()
