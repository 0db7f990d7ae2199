"""One process: recomputation, averages, clipping, refusals."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from engine_cases import REFERENCE, largest_difference, toy_engine, toy_step, train_toy, whole_state
from sixfold.engine.activation_checkpointing import COSTLY_OPERATIONS
from sixfold.engine.averaging import decays
from sixfold.engine.averaging_config import ConstantAverageConfig
from sixfold.engine.base import clip_factor
from sixfold.engine.config import ConstantScheduleConfig, DDPConfig, EngineConfig
from sixfold.engine.precision import compute_dtype
from sixfold.errors import EnvironmentFault


class _CountOperations(torch.utils._python_dispatch.TorchDispatchMode):
    """How often each operation ran."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func] = self.counts.get(func, 0) + 1
        return func(*args, **(kwargs or {}))


def _operations_of_one_step(checkpointing):
    engine = toy_engine(DDPConfig(precision="fp32", activation_checkpointing=checkpointing))
    with _CountOperations() as counter:
        toy_step(engine, 0)
    return counter.counts


def test_recomputation_is_real_and_exact():
    plain = train_toy(REFERENCE, 2, 5)
    for checkpointing in ("full", "selective"):
        other = train_toy(DDPConfig(precision="fp32", activation_checkpointing=checkpointing), 2, 5)
        assert other.losses == plain.losses
        assert largest_difference(other.parameters, plain.parameters) == 0.0
    aten = torch.ops.aten
    none, full, selective = (_operations_of_one_step(kind) for kind in ("none", "full", "selective"))
    assert full[aten.gelu.default] == selective[aten.gelu.default] == 2 * none[aten.gelu.default]
    assert full[aten.addmm.default] > none[aten.addmm.default]
    assert selective[aten.addmm.default] == none[aten.addmm.default], "matrix products are kept, not recomputed"
    assert str(aten._grouped_mm.default) in COSTLY_OPERATIONS
    assert str(torch.ops.higher_order.flex_attention) in COSTLY_OPERATIONS
    assert all(
        operation.split(".")[0] in ("aten", "sixfold") or hasattr(torch.ops.higher_order, operation)
        for operation in COSTLY_OPERATIONS
    )


def test_averages_follow_their_recurrence():
    engine = toy_engine(REFERENCE, average=ConstantAverageConfig(decay=0.3))
    expected = {name: value.clone() for name, value in engine.full_parameters(averaged=False)}
    for step in range(6):
        toy_step(engine, step)
        decay = min(0.3, (1 + step + 1) / (10 + step + 1))
        for name, value in engine.full_parameters(averaged=False):
            expected[name] = decay * expected[name] + (1 - decay) * value
    assert largest_difference(dict(engine.full_parameters(averaged=True)), expected) < 1e-6
    assert decays(ConstantAverageConfig(decay=0.9999), 10**6) == (0.9999,)


def test_clipping_scales_only_longer_gradients():
    assert clip_factor(0.9, 1.0) == 1.0
    assert clip_factor(4.0, 1.0) == pytest.approx(0.25, rel=1e-5)
    assert clip_factor(4.0, None) == 1.0


def test_reports_what_the_step_did():
    engine = toy_engine(REFERENCE, schedule=ConstantScheduleConfig(warmup_steps=4))
    _, report = toy_step(engine, 0)
    assert report.learning_rate == pytest.approx(1e-2 / 4)
    gradient_norm = report.grad_norm
    _, again = toy_step(toy_engine(REFERENCE.model_copy(update={"clip_grad_norm": 0.01})), 0)
    assert again.grad_norm == pytest.approx(gradient_norm), "the norm is reported before clipping"


def test_state_is_complete_before_the_first_step_and_loads_bitwise():
    trained = toy_engine(REFERENCE)
    template_of_new = set(trained.checkpoint_template())
    for step in range(3):
        toy_step(trained, step)
    state = whole_state(trained)
    assert set(state) == template_of_new
    other = toy_engine(REFERENCE)
    other.load_checkpoint_state({name: value.clone() for name, value in state.items()})
    assert all(torch.equal(value, state[name]) for name, value in whole_state(other).items())
    assert toy_step(other, 3) == toy_step(trained, 3)


def test_roles_without_averages_have_none():
    engine = toy_engine(REFERENCE, average=None)
    assert not any(name.startswith("ema/") for name in engine.checkpoint_state())
    toy_step(engine, 0)
    with engine.averaged():
        averaged = dict(engine.full_parameters(averaged=True))
    assert largest_difference(averaged, dict(engine.full_parameters(averaged=False))) == 0.0


def test_precision_auto_depends_on_the_hardware(monkeypatch):
    cpu = torch.device("cpu")
    assert compute_dtype("fp32", cpu) == torch.float32
    assert compute_dtype("bf16", cpu) == torch.bfloat16
    for supported, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda supported=supported: supported)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert compute_dtype("auto", cpu) == dtype


_COMPILED = """
import functools
import torch
# The compiler's tracing and partitioning without its code generation, which takes a minute of C++.
torch.compile = functools.partial(torch.compile, backend="aot_eager_decomp_partition")
from engine_cases import train_toy
from sixfold.engine.config import DDPConfig, FSDPConfig
budget = {"activation_checkpointing": "budget", "activation_memory_budget": 0.5}
for config in (
    DDPConfig(precision="fp32", compile=True, **budget),
    FSDPConfig(precision="fp32", compile=True, activation_checkpointing="selective"),
):
    trace = train_toy(config, 1, 3)
    print(*trace.losses)
    assert "layers.0.up.weight" in trace.parameters, "compiling must not change names"
"""


def test_compiled_blocks_train_alike():
    # In a process of its own: the type checks that tests lay over every function cannot be compiled.
    eager = train_toy(REFERENCE, 1, 3)
    for line in _output_of(_COMPILED):
        assert [float(word) for word in line.split()] == pytest.approx(eager.losses, rel=1e-5)


def _output_of(program):
    answer = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.splitlines()


def test_refusals_say_what_to_change(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(EnvironmentFault, match="pip install"):
        toy_engine(REFERENCE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "ddp", "activation_checkpointing": "budget"}, "set both or neither"),
        ({"type": "fsdp", "activation_memory_budget": 0.5}, "set both or neither"),
        ({"type": "ddp", "activation_checkpointing": "budget", "activation_memory_budget": 0.5}, "compile: true"),
        ({"type": "deepspeed", "zero_stage": 3, "compile": True}, "zero_stage: 2"),
        ({"type": "deepspeed", "zero_stage": 4}, "1, 2 or 3"),
        ({"type": "ddp", "clip_grad_norm": 0.0}, "greater than 0"),
        ({"type": "ddp", "micro_batch": 0}, "greater than or equal to 1"),
    ],
)
def test_malformed_settings_are_named(settings, message):
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(EngineConfig).validate_python(settings)


_REHEARSAL = """
import torch
from sixfold.engine.config import AdamWConfig, DDPConfig, DeepSpeedConfig, FSDPConfig, MuonConfig
from sixfold.engine.averaging_config import ConstantAverageConfig
from sixfold.engine.rehearsal import rehearse
from toy_network import ToyConfig
network = ToyConfig(width=4096, depth=2, experts=128, classes=50000)
for engine in (
    FSDPConfig(replicate=64, precision="bf16", activation_checkpointing="full"),
    DDPConfig(),
    DeepSpeedConfig(zero_stage=3),
):
    for optimizer in (AdamWConfig(lr=1.0), MuonConfig(lr=1.0)):
        found = rehearse(
            network, engine, optimizer, batch_fields={"tokens": ((8,), torch.int64)},
            loss=lambda module, others, batch: module(batch["tokens"]).float().sum(), world_size=512,
            average=ConstantAverageConfig(decay=0.999),
        )
        print(found.parameters, found.parameter_bytes, found.gradient_bytes, found.optimizer_bytes, found.average_bytes)
"""


def test_a_full_size_role_is_rehearsed_on_512_ranks_without_memory():
    rows = [[int(word) for word in line.split()] for line in _output_of(_REHEARSAL)]
    width, depth, experts, classes = 4096, 2, 128, 50000
    block = width + (2 * width + 1) * (width + 1) + width * (2 * width + 1) + experts * width**2
    parameters = depth * block + 2 * classes * width + classes
    assert [row[0] for row in rows] == [parameters] * 6
    fsdp, fsdp_muon, ddp, _, zero, _ = rows
    assert fsdp[1] == pytest.approx(4 * parameters / 8, rel=1e-3)
    assert fsdp[1] == fsdp[2] == fsdp[4]
    assert fsdp[3] == pytest.approx(2 * fsdp[1], rel=1e-3)
    assert fsdp_muon[3] < 1.2 * fsdp_muon[1], "Muon keeps one slot"
    assert ddp[1:] == [4 * parameters, 4 * parameters, pytest.approx(8 * parameters, rel=1e-6), 4 * parameters]
    assert zero[1] == 4 * parameters // 512
