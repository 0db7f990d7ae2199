"""Training speed of our networks against the public implementations of the same architectures.

    python tests/benchmarks/bench_models.py [--peer-python .venv-peers/bin/python] [--rounds 15] [--compile]

One process serves each side; steps (forward, backward, fused AdamW) of the two alternate, so that whatever else the
machine does meets both. Medians are printed, and our rate over the peer's in the better of its precisions.
``--compile`` compiles our blocks alone.

What bounds the ratio on a CPU without bf16 arithmetic: both sides call the same matrix products (transformers' Mixtral
also runs ``grouped_mm``), which MKL does at 85 to 93 GFLOP/s on one core of an EPYC of the third generation in every
layout and thus leaves nothing to choose. They are about 440 of a mixture step's 685 ms of CPU time, so a network in
which all else cost nothing would reach 1.6. Tried without gain: SwiGLU by hand, whole or by tiles that fit the cache;
GELU through a sigmoid and RMSNorm with a backward of its own (1% of a step each).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

LANGUAGE = {"vocab_size": 512, "width": 256, "depth": 4, "heads": 4, "kv_heads": 2}
SEQUENCES, LENGTH = 8, 256
DIT = {"image_size": 16, "patch_size": 2, "channels": 4, "width": 384, "depth": 12, "heads": 6, "classes": 1000}
IMAGES = 16
TOKENS = SEQUENCES * LENGTH
CASES = {"moe": ("tokens/s", TOKENS), "dense": ("tokens/s", TOKENS), "dit": ("images/s", IMAGES)}
BALANCE_WEIGHT = 0.02


def our_loss(case):
    """Return one of our networks and its loss as a function of nothing."""
    import torch

    from sixfold.models.dit.config import DiTConfig
    from sixfold.models.moe_transformer.config import MoETransformerConfig
    from sixfold.models.network import initialize, parameter_tags
    from sixfold.objectives.contract import Batch, Phase
    from sixfold.objectives.next_token.config import NextTokenConfig

    if case == "dit":
        config = DiTConfig(**DIT)
    elif case == "moe":
        config = MoETransformerConfig(**LANGUAGE, hidden_width=344, experts={"count": 8, "top_k": 2})
    else:
        config = MoETransformerConfig(**LANGUAGE, hidden_width=688)
    network = config.load()(config)
    initialize(network, parameter_tags(network), seed=0, role="benchmark")
    if case == "dit":
        x, time_, label, target = image_batch()
        return network, lambda: (network(x, time_, {"label": label}) - target).square().mean()
    settings = NextTokenConfig(balance_weight=BALANCE_WEIGHT, chunk_tokens=TOKENS)
    objective = settings.load()(settings, {"lm": config})
    batch = Batch({"tokens": token_batch()}, torch.arange(SEQUENCES))

    def loss():
        terms = objective({"lm": network}, batch, Phase(name="main", trains=("lm",)), None)
        return terms.loss / terms.count

    return network, loss


def peer_loss(case):
    """Return a public implementation and its loss as a function of nothing."""
    if case == "dit":
        from diffusers import DiTTransformer2DModel

        network = DiTTransformer2DModel(
            num_attention_heads=DIT["heads"],
            attention_head_dim=DIT["width"] // DIT["heads"],
            in_channels=DIT["channels"],
            num_layers=DIT["depth"],
            sample_size=DIT["image_size"],
            patch_size=DIT["patch_size"],
            num_embeds_ada_norm=DIT["classes"],
        )
        x, time_, label, target = image_batch()
        steps = (time_ * 1000).long()
        return network, lambda: (network(x, timestep=steps, class_labels=label).sample - target).square().mean()
    import transformers

    common = {
        "vocab_size": LANGUAGE["vocab_size"],
        "hidden_size": LANGUAGE["width"],
        "num_hidden_layers": LANGUAGE["depth"],
        "num_attention_heads": LANGUAGE["heads"],
        "num_key_value_heads": LANGUAGE["kv_heads"],
        "use_cache": False,
    }
    if case == "moe":
        experts = {"num_local_experts": 8, "num_experts_per_tok": 2, "output_router_logits": True}
        settings = transformers.MixtralConfig(
            **common, **experts, intermediate_size=344, router_aux_loss_coef=BALANCE_WEIGHT
        )
        network = transformers.MixtralForCausalLM(settings)
    else:
        network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, intermediate_size=688))
    tokens = token_batch()[:, :-1]
    return network, lambda: network(input_ids=tokens, labels=tokens).loss


def token_batch():
    import torch

    return torch.randint(0, LANGUAGE["vocab_size"], (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(0))


def image_batch():
    import torch

    shape = (IMAGES, DIT["channels"], DIT["image_size"], DIT["image_size"])
    label = torch.randint(0, DIT["classes"], (IMAGES,))
    return torch.randn(shape), torch.rand(IMAGES), label, torch.randn(shape)


def serve(side, threads, compiled):
    """Read ``case precision`` lines, take one training step each, and answer with its seconds."""
    import torch

    from sixfold.train.worker import _keep_freed_memory

    _keep_freed_memory()  # as training does; both sides profit
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    ready = {}
    for line in sys.stdin:
        case, precision = line.split()
        if case not in ready:
            network, loss = (our_loss if side == "ours" else peer_loss)(case)
            network.train()
            for block in network.blocks() if compiled and side == "ours" else ():
                block.compile(fullgraph=True)
            ready[case] = network, loss, torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
        network, loss, optimizer = ready[case]
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - start
        size = sum(parameter.numel() for parameter in network.parameters())
        print(json.dumps({"seconds": seconds, "parameters": size, "loss": value.item()}), flush=True)


def ask(server, case, precision):
    server.stdin.write(f"{case} {precision}\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    if not answer:
        raise SystemExit(f"the process {server.args[0]} ended with {server.wait()}; its message stands above")
    return json.loads(answer)


def start(python, side, arguments):
    command = [python, __file__, "--serve", side, "--threads", str(arguments.threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads), "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(
        command + ["--compile"] * arguments.compile,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def measure(servers, case, precisions, rounds, warmup):
    """Return the median seconds of each (side, precision), steps of the two sides alternating."""
    seconds, sizes = {}, {}
    for precision in precisions:
        for round_ in range(warmup + rounds):
            for side, server in servers.items():
                answer = ask(server, case, precision)
                sizes[side] = answer["parameters"]
                if round_ >= warmup:
                    seconds.setdefault((side, precision), []).append(answer["seconds"])
    return {key: statistics.median(values) for key, values in seconds.items()}, sizes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has transformers and diffusers")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32"])
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each side")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="compile our blocks")
    parser.add_argument("--serve", choices=["ours", "peer"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.threads, arguments.compile)
        return
    servers = {
        "ours": start(sys.executable, "ours", arguments),
        "peer": start(arguments.peer_python, "peer", arguments),
    }
    try:
        for case in arguments.cases:
            unit, count = CASES[case]
            medians, sizes = measure(servers, case, arguments.precisions, arguments.rounds, arguments.warmup)
            for (side, precision), value in medians.items():
                print(f"{case:6} {side:5} {precision} {sizes[side] / 1e6:6.2f}M  {count / value:9.1f} {unit}")
            best = {side: min(value for (who, _), value in medians.items() if who == side) for side in servers}
            print(f"{case:6} ratio, each in its better precision: {best['peer'] / best['ours']:.2f}", flush=True)
    finally:
        for server in servers.values():
            server.stdin.close()
            server.wait(timeout=60)


if __name__ == "__main__":
    main()
