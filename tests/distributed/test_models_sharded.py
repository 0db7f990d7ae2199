"""What parity of the recipes leaves out: tied embeddings, all options of the mixture, decoding while sharded."""

import os

import pytest
import torch

from model_helpers import mixture
from ranks import rank_pool
from sixfold.distributed.collectives import sum_over_ranks
from sixfold.distributed.process_group import World
from sixfold.distributed.randomness import PositionRandom
from sixfold.engine.build import build_engine
from sixfold.engine.config import AdamWConfig, ConstantScheduleConfig, DDPConfig, DeepSpeedConfig, FSDPConfig
from sixfold.objectives.contract import Batch, Phase, Progress
from sixfold.objectives.next_token.config import NextTokenConfig
from sixfold.samplers.autoregressive import AutoregressiveSampler
from sixfold.samplers.config import AutoregressiveConfig
from sixfold.samplers.contract import SampleRequest

NETWORK = mixture(
    tie_embeddings=True,
    qk_norm=True,
    depth=3,
    experts={"router": "sigmoid", "shared": 1, "bias_update_rate": 0.01, "first_dense_layers": 1, "routed_scale": 2.0},
)
OBJECTIVE = NextTokenConfig(balance_weight=0.01, router_z_weight=0.001, chunk_tokens=32)
SEQUENCES, STEPS = 8, 6


def train_and_decode(engine_config):
    """Train some steps on this rank's sequences; return the losses, gradient norms, a drawn text, and expert biases."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    engine = build_engine(
        engine_config,
        AdamWConfig(lr=1e-2),
        ConstantScheduleConfig(warmup_steps=0),
        network_config=NETWORK,
        role="lm",
        seed=3,
        total_steps=STEPS,
        average=None,
        world=World(rank=rank, size=size, local_rank=rank),
    )
    objective = OBJECTIVE.load()(OBJECTIVE, {"lm": NETWORK})
    mine = slice(rank * SEQUENCES // size, (rank + 1) * SEQUENCES // size)
    losses, norms = [], []
    for step in range(STEPS):
        starts = torch.randint(0, 31, (SEQUENCES, 1), generator=torch.Generator().manual_seed(step))
        tokens = (starts + 5 * torch.arange(17)) % 31
        documents = (torch.arange(17) > 9).long().expand(SEQUENCES, -1)
        batch = Batch({"tokens": tokens[mine], "documents": documents[mine]}, torch.arange(SEQUENCES)[mine])
        random = PositionRandom(0, batch.positions)
        with engine.accumulate(last=True):
            terms = objective({"lm": engine.module}, batch, Phase(name="main", trains=("lm",)), random)
            engine.backward(terms.loss)
        total = sum_over_ranks({"loss": terms.loss.detach(), "count": terms.count, **terms.statistics})
        report = engine.step(total["count"], finite=torch.tensor(True))
        progress = Progress(samples=step * SEQUENCES, step=step, total_steps=STEPS)
        statistics = {name: total[name] for name in terms.statistics}
        objective.after_step({"lm": engine.network}, statistics, progress)
        losses.append((total["loss"] / total["count"]).item())
        norms.append(report.grad_norm)
    sampler = AutoregressiveSampler(AutoregressiveConfig(max_new_tokens=6), OBJECTIVE, {"lm": NETWORK})
    request = SampleRequest(seed=0, numbers=torch.arange(4), conditions={})
    text = sampler({"lm": engine.module}, request)["tokens"]
    biases = [value.clone() for name, value in engine.network.named_buffers() if name.endswith("expert_bias")]
    engine.close()
    return losses, norms, text, torch.stack(biases)


@pytest.fixture(scope="module")
def alone():
    return train_and_decode(DDPConfig(precision="fp32"))


@pytest.mark.parametrize(
    "config",
    [
        FSDPConfig(precision="fp32"),
        FSDPConfig(precision="fp32", activation_checkpointing="full"),
        DeepSpeedConfig(precision="fp32", zero_stage=3),
        DDPConfig(precision="fp32"),
    ],
    ids=["fsdp", "fsdp, recomputed", "zero 3", "ddp"],
)
def test_all_options_of_the_mixture_agree_with_one_process(config, alone):
    losses, norms, text, biases = alone
    assert losses[-1] < losses[0]
    assert biases.abs().max() > 0.005
    for other in rank_pool(2).run(train_and_decode, config):
        assert other[0] == pytest.approx(losses, rel=1e-5)
        assert other[1] == pytest.approx(norms, rel=1e-5)
        assert torch.equal(other[2], text)
        torch.testing.assert_close(other[3], biases)
