"""What ``lm/char-cpu`` reaches at nanoGPT's CPU budget, beside a network and settings of nanoGPT's shape.

    python tests/benchmarks/bench_characters.py [--text FILE] [--threads 2] [KEY=VALUE ...]

The baseline trains 2000 steps of 12 x 64 characters of one text, ours the recipe's 1800; both are measured, at the end,
on all of its last tenth.
Without ``--text`` it is English prose that comes with the interpreter, cut to the length of tiny Shakespeare: the
language reference and the docstrings of the standard library. On tiny Shakespeare itself 1.88 nats were published for
the baseline's setting (four layers and heads, width 128, AdamW at 1e-3 with a cosine).
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import math
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

from sixfold.distributed.process_group import World
from sixfold.recipe.load import load_recipe
from sixfold.train.assembly import assemble
from sixfold.train.loop import train_step
from sixfold.train.worker import _keep_freed_memory as keep_freed_memory
from sixfold_data.build import BuildOptions
from sixfold_data.build_text import build_text

CHARACTERS = 1_115_394  # tiny Shakespeare's length
STEPS, SEQUENCES, LENGTH = 2000, 12, 64
SHORTEST_DOCSTRING = 200


def prose() -> str:
    """Return the language reference and long docstrings of the standard library, once each, in an order by hash."""
    from pydoc_data.topics import topics

    texts = set(topics.values())
    for file in Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"):
        if not {"site-packages", "dist-packages", "test", "tests", "lib2to3"} & set(file.parts):
            texts |= _docstrings(file.read_bytes())
    plain = [text.encode("ascii", "ignore").decode() for text in texts]
    return "\n\n".join(sorted(plain, key=lambda text: hashlib.blake2b(text.encode()).digest()))[:CHARACTERS]


def _docstrings(source: bytes) -> set[str]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # a few files are broken on purpose
        return set()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = {ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)}
    return {text for text in found if text and len(text) >= SHORTEST_DOCSTRING}


class Block(nn.Module):
    """GPT-2's block: LayerNorm before attention and before a GELU layer four times as wide, no biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width, bias=False) for _ in range(2))
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.query_key_value(self.norms[0](x)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        attended = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.output(attended.transpose(1, 2).flatten(-2))
        return x + self.down(gelu(self.up(self.norms[1](x))))


class Baseline(nn.Module):
    """A GPT-2 of four layers and heads, width 128, with learned positions and tied embeddings."""

    def __init__(self, vocabulary: int, width: int = 128, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, bias=False)
        for name, value in self.named_parameters():
            if value.ndim == 2:
                residual = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(value, std=0.02 / math.sqrt(2 * depth) if residual else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        return self.norm(self.blocks(x)) @ self.token.weight.T


def train_baseline(train: Tensor, vocabulary: int) -> Callable[[Tensor], Tensor]:
    """Train with nanoGPT's published CPU setting; return logits as a function of tokens."""
    torch.manual_seed(1337)
    network = Baseline(vocabulary)
    matrices = [value for value in network.parameters() if value.ndim == 2]
    rest = [value for value in network.parameters() if value.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)
    for step in range(STEPS):
        progress = (step - 100) / (STEPS - 100)
        rate = 1e-3 * (step + 1) / 100 if step < 100 else 1e-4 + 4.5e-4 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(train) - LENGTH, (SEQUENCES,))
        batch = torch.stack([train[start : start + LENGTH + 1] for start in starts.tolist()])
        cross_entropy(network(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return network


def train_ours(data: Path, overrides: list[str]) -> tuple[Callable[[Tensor], Tensor], str]:
    """Train the recipe's network with the recipe's own step; return logits as a function of tokens, and its size."""
    recipe = load_recipe("lm/char-cpu", [f"data.path={data}", *overrides]).recipe
    keep_freed_memory()
    training = assemble(recipe, World())
    while training.progress.step < training.progress.total_steps:
        training.progress = train_step(training, next(training.stream)).progress
    (engine,) = training.engines.values()
    size = sum(value.numel() for name, value in engine.network.named_parameters() if "embedding" not in name)
    return lambda tokens: engine.network(tokens)[0], f"{size / 1e6:.2f}M active parameters"


@torch.no_grad()
def held_out_loss(logits: Callable[[Tensor], Tensor], held_out: Tensor) -> float:
    """Nats a character over windows of ``LENGTH`` side by side."""
    windows = held_out[: (len(held_out) - 1) // LENGTH * LENGTH + 1].unfold(0, LENGTH + 1, LENGTH)
    losses = [
        cross_entropy(logits(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
        for part in windows.split(128)
    ]
    return sum(losses) / (len(windows) * LENGTH)


def main() -> None:
    """Train both on the same text and print their held-out losses and times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a UTF-8 text to use instead")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=["ours", "baseline"], help="train one of the two")
    parser.add_argument("overrides", nargs="*", help="changes of the recipe")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    text = prose() if options.text is None else options.text.read_text(encoding="utf-8")
    alphabet = {character: number for number, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([alphabet[character] for character in text])
    cut = int(0.9 * len(tokens))
    with tempfile.TemporaryDirectory() as folder:
        source, data = Path(folder, "text.txt"), Path(folder, "characters")
        source.write_text(text, encoding="utf-8")
        build_text(source, BuildOptions(out=data, val_fraction=0.1), "characters")
        runs = {
            "ours": lambda: train_ours(data, options.overrides),
            "baseline": lambda: (train_baseline(tokens[:cut], len(alphabet)), "nanoGPT's CPU setting"),
        }
        for name, run in runs.items():
            if options.only in (None, name):
                started, started_cpu = time.perf_counter(), time.process_time()
                logits, what = run()
                wall, cpu = time.perf_counter() - started, time.process_time() - started_cpu
                loss = held_out_loss(logits, tokens[cut:])
                print(
                    f"{name:8} {loss:.4f} nats a character held out  {wall:.0f} s, {cpu:.0f} s of CPU  ({what})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
