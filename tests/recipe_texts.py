"""Small valid recipes that the recipe tests spoil in one way each."""

FLOW = """\
name: flow/tiny
data: {path: data/digits, global_batch: 64}
networks:
  denoiser:
    type: dit
    image_size: 8
    patch_size: 2
    channels: 1
    width: 32
    depth: 1
    heads: 4
    classes: 10
objective:
  type: denoising
  label_drop: 0.1
optimizer:
  type: adamw
  lr: 1e-3
schedule: {type: cosine, warmup_steps: 5}
engine:
  type: ddp
  micro_batch: 32
train:
  steps: 100
sampling: {type: euler, guidance: {type: cfg}}
evaluation:
  metrics: [loss, fd]
"""

TEXT = """\
name: lm/tiny
data: {path: data/text, global_batch: 16, sequence_length: 32}
networks:
  lm:
    type: moe_transformer
    vocab_size: 264
    width: 32
    depth: 2
    heads: 4
    kv_heads: 2
    experts:
      count: 4
      top_k: 2
      hidden_width: 32
objective: {type: next_token}
optimizer: {type: muon, lr: 0.02}
train: {steps: 100}
sampling: {type: autoregressive}
evaluation: {metrics: [loss, bits_per_byte]}
"""


def line_of(text: str, fragment: str) -> int:
    """The line number (from 1) of the first line that holds ``fragment``."""
    return next(number for number, line in enumerate(text.splitlines(), start=1) if fragment in line)


def replaced(text: str, old: str, new: str) -> str:
    """``text`` with the one occurrence of ``old`` replaced."""
    assert text.count(old) == 1, f"{old!r} must occur once"
    return text.replace(old, new)
