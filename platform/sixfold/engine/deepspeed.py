"""DeepSpeed ZeRO: optimizer state (1), gradients (2), parameters (3) partitioned over ranks, optionally on the CPU.

DeepSpeed averages gradients over ranks and can divide them by a loss scale at the update. Backward therefore runs at
scale 1 and the update at scale count / ranks, which makes the gradient the sum over all ranks divided by the global
count; its own clipping, limit / (norm + 1e-6), is the other engines' expression. Masters and slots are read and written
as fragments of named parameters, so that checkpoints are the same as every other engine's.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from sixfold.distributed.collectives import any_rank
from sixfold.distributed.mesh import host_mesh
from sixfold.distributed.process_group import World, ensure_group
from sixfold.engine.averaging import MovingAverages
from sixfold.engine.base import RoleSpecification, network_on_meta, persistent_buffers, requiring_no_gradient
from sixfold.engine.config import AdamWConfig, DeepSpeedConfig, OptimizerConfig
from sixfold.engine.contract import State, StepReport
from sixfold.engine.optimizers import allocate_adamw_state, torch_adamw
from sixfold.engine.precision import compute_dtype
from sixfold.engine.schedules import learning_rate_factor
from sixfold.engine.sharding import own_part
from sixfold.engine.zero_fragments import fragments, group_of, partitions
from sixfold.engine.zero_muon import MOMENTUM, FlatMuonAndAdamW, allocate_momentum, holds_matrices
from sixfold.errors import EnvironmentFault
from sixfold.models.network import ParameterTag, initial_value, reset_buffers

SLOTS = ("exp_avg", "exp_avg_sq")
_PARAMETER_SHARDING_STAGE = 3
_LINEAR = nn.functional.linear


class DeepSpeedEngine:
    """One role under ZeRO."""

    def __init__(self, specification: RoleSpecification) -> None:
        config, optimizer = specification.engine, specification.optimizer
        assert isinstance(config, DeepSpeedConfig)
        ensure_group(specification.world)
        deepspeed = _import_deepspeed(specification.world)
        network, tags = network_on_meta(specification)
        settings = runtime_settings(config, specification.world)
        _materialize(deepspeed, network, settings, specification)
        parameters = dict(network.named_parameters())
        updater = _updater(optimizer, parameters, tags)
        runtime, zero, *_ = deepspeed.initialize(
            model=network, optimizer=updater, config=settings, dist_init_required=False
        )
        self.specification = specification
        self.network: nn.Module = network
        self.module: nn.Module = runtime
        self.updates = 0
        self._runtime: Any = runtime
        self._zero: Any = zero
        self._adam_states = _allocate_states(zero)
        self._fragments = fragments(zero, parameters)
        self._slots: dict[str, tuple[str, ...]] = dict.fromkeys(parameters, SLOTS)
        if isinstance(updater, FlatMuonAndAdamW):
            updater.place(partitions(zero), self._fragments)
            self._slots |= {name: (MOMENTUM,) for name in parameters if tags[name].matrix}
        self._host_mesh = host_mesh()
        for name, part in self._fragments.items():
            whole = initial_value(tags[name], part.shape, seed=specification.seed, role=specification.role, name=name)
            with torch.no_grad():
                part.write(part.cut(whole))
        _restore_buffers(network, specification.world.device)
        self._publish_masters()
        average = specification.average
        self._averages = None if average is None else MovingAverages(average, self._masters())

    @contextmanager
    def accumulate(self, *, last: bool) -> Iterator[None]:
        """Mark the micro-batch whose backward ends the accumulation."""
        self._runtime.set_gradient_accumulation_boundary(last)
        self._zero.override_loss_scale(1.0)
        yield

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a local sum of losses."""
        self._runtime.backward(loss, scale_wrt_gas=False)

    def join_backward(self, loss: Tensor) -> Tensor:
        """Announce a backward pass that is not this engine's own call; the scale is 1."""
        announced: Tensor = self._runtime.scale(loss)
        return announced

    def step(self, count: Tensor, *, finite: Tensor) -> StepReport:
        """Update from the accumulated gradient; see :mod:`sixfold.engine.base` for what a skip means."""
        specification = self.specification
        terms = float(count.item())
        assert terms > 0, "a step needs at least one term over all ranks"
        factor = learning_rate_factor(specification.schedule, self.updates, specification.total_steps)
        rate = factor * specification.optimizer.lr
        if any_rank(not bool(finite.item())):
            self._discard_gradients()
            return StepReport(grad_norm=math.nan, learning_rate=rate, skipped=True)
        for group in self._zero.param_groups:
            group["lr"] = factor * group["peak_lr"]
        self._zero.override_loss_scale(terms / specification.world.size)
        self._runtime.step()
        if self._zero.overflow:  # the global norm is not finite: all ranks saw it and left everything as it was
            return StepReport(grad_norm=math.nan, learning_rate=rate, skipped=True)
        self.updates += 1
        if self._averages is not None:
            self._averages.update(self.updates, self._masters())
        return StepReport(grad_norm=float(self._zero._global_grad_norm), learning_rate=rate, skipped=False)

    @contextmanager
    def untrained(self) -> Iterator[nn.Module]:
        """Yield the network as another role's phase calls it; stage 3 gathers by hooks of its own parts."""
        with requiring_no_gradient(self.network):
            yield self.network

    @torch.no_grad()
    def average_into(self, values: Mapping[str, Tensor], decay: float) -> None:
        """Average the fp32 masters into ``values``, gathering one tensor at a time."""
        for name, whole in self.full_parameters(averaged=False):
            if (held := values.get(name)) is not None:
                part = own_part(whole, held) if isinstance(held, DTensor) else whole
                (held.to_local() if isinstance(held, DTensor) else held).lerp_(part.to(held.device), 1.0 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Hold the main average in the network for a while; the masters stay as they are."""
        if self._averages is None:
            yield
            return
        self._swap_masters_and_averages()
        try:
            yield
        finally:
            self._swap_masters_and_averages()

    def checkpoint_state(self) -> State:
        """Return the state cut evenly over ranks on the CPU, gathered one tensor at a time; a collective."""
        state: State = {}
        for name, part in self._fragments.items():
            state[f"parameters/{name}"] = self._cut(part.gather(part.read()).cpu())
            for slot in self._slots[name]:
                state[f"optimizer/{name}/{slot}"] = self._cut(part.gather(part.read(slot)).cpu())
        return state | self.average_state()

    def average_state(self) -> State:
        """Return averages, buffers and count alone, cut and gathered like :meth:`checkpoint_state`; a collective."""
        state: State = {f"buffers/{name}": value for name, value in persistent_buffers(self.network).items()}
        state["optimizer_step"] = torch.tensor(self.updates)
        for kind, values in ({} if self._averages is None else self._averages.values).items():
            for name, held in values.items():
                state[f"{kind}/{name}"] = self._cut(self._fragments[name].gather(held).cpu())
        return state

    def checkpoint_template(self) -> State:
        """Return empty tensors of :meth:`checkpoint_state`'s shapes and cuts."""
        kinds = ["parameters", *({} if self._averages is None else self._averages.values)]
        template: State = {}
        for name, part in self._fragments.items():
            keys = [f"{kind}/{name}" for kind in kinds] + [f"optimizer/{name}/{slot}" for slot in self._slots[name]]
            template |= {key: self._cut(torch.empty(part.shape)) for key in keys}
        template |= {f"buffers/{k}": torch.empty_like(v) for k, v in persistent_buffers(self.network).items()}
        return template | {"optimizer_step": torch.tensor(0)}

    @torch.no_grad()
    def load_checkpoint_state(self, state: State) -> None:
        """Write every rank's fragments from a filled template, gathering one tensor at a time; a collective."""
        for name, part in self._fragments.items():
            part.write(part.cut(_whole(state[f"parameters/{name}"])))
            for slot in self._slots[name]:
                part.write(part.cut(_whole(state[f"optimizer/{name}/{slot}"])), slot)
            for kind, values in ({} if self._averages is None else self._averages.values).items():
                values[name].copy_(part.cut(_whole(state[f"{kind}/{name}"])))
        for name, value in persistent_buffers(self.network).items():
            value.copy_(state[f"buffers/{name}"])
        self.updates = int(state["optimizer_step"].item())
        for adam_state in self._adam_states:
            adam_state["step"].fill_(self.updates)
        self._publish_masters()

    def full_parameters(self, *, averaged: bool) -> Iterator[tuple[str, Tensor]]:
        """Yield every full parameter (or its average) and persistent buffer on the CPU; a collective."""
        for name, part in self._fragments.items():
            held = self._averages.main[name] if averaged and self._averages is not None else part.read()
            yield name, part.gather(held).cpu()
        for name, value in persistent_buffers(self.network).items():
            yield name, value.detach().cpu().clone()

    def close(self) -> None:
        """Drop DeepSpeed's hooks and everything that holds tensors; the engine is unusable afterwards.

        Stage 3 puts a function of its own in the place of torch's linear, for the whole process, and leaves it there.
        """
        nn.functional.linear = _LINEAR
        self._runtime.destroy()
        for owned in ("network", "module", "_runtime", "_zero", "_adam_states", "_fragments", "_averages"):
            delattr(self, owned)

    def _masters(self) -> dict[str, Tensor]:
        """This rank's part of every fp32 master."""
        return {name: part.read() for name, part in self._fragments.items()}

    @torch.no_grad()
    def _swap_masters_and_averages(self) -> None:
        assert self._averages is not None
        for name, part in self._fragments.items():
            held = part.read().clone()
            part.write(self._averages.main[name])
            self._averages.main[name].copy_(held)
        self._publish_masters()

    @torch.no_grad()
    def _publish_masters(self) -> None:
        """Copy the masters into the parameters that forward uses, as the end of an update does."""
        if self._stage < _PARAMETER_SHARDING_STAGE:
            self._zero.update_lp_params()
            return
        self._zero._partition_all_parameters()  # some stay gathered after a forward, and would stay as they were
        for group in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)

    def _cut(self, whole: Tensor) -> DTensor:
        """Keep this rank's rows of a whole tensor on the CPU."""
        return distribute_tensor(whole, self._host_mesh, [Shard(0)], src_data_rank=None)

    def _discard_gradients(self) -> None:
        """Forget what backward accumulated, as DeepSpeed does on overflow (it has no call for that)."""
        zero, config = self._zero, self.specification.engine
        assert isinstance(config, DeepSpeedConfig)
        zero.zero_grad(set_to_none=True)
        if config.offload_optimizer:
            zero.reset_cpu_buffers()
        zero.averaged_gradients.clear()
        if self._stage < _PARAMETER_SHARDING_STAGE:
            zero.micro_step_id = -1  # the next micro-batch replaces offloaded gradients instead of adding to them
            zero._release_preflattened_grad_buffers()
            zero.all_grad_tensors.clear()

    @property
    def _stage(self) -> int:
        config = self.specification.engine
        assert isinstance(config, DeepSpeedConfig)
        return config.zero_stage


def runtime_settings(config: DeepSpeedConfig, world: World) -> dict[str, Any]:
    """Return DeepSpeed's own configuration for a recipe's."""
    on_cuda = world.device.type == "cuda"
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "overlap_comm": on_cuda,
        # Parameters kept whole would have to be published separately; they are few and small.
        "stage3_param_persistence_threshold": 0,
    }
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_cuda}
    return {
        # The loop owns accumulation: it marks boundaries itself.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world.size,
        "gradient_clipping": config.clip_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "bf16": {"enabled": _stores_bfloat16(config, world)},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": 2**31,
    }


def _stores_bfloat16(config: DeepSpeedConfig, world: World) -> bool:
    """Whether working parameters are bf16 beside fp32 masters.

    Stage 1 keeps them fp32 under autocast: DeepSpeed gives bf16 stage 1 to another optimizer, without these fragments.
    """
    return config.zero_stage > 1 and compute_dtype(config.precision, world.device) == torch.bfloat16


def _import_deepspeed(world: World) -> Any:
    """Import DeepSpeed for this device, quietly, on our process group."""
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read at import; the wrong guess fails much later
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # read without a default, even by a rank that is alone
    try:
        import deepspeed
    except ImportError as error:
        raise EnvironmentFault.of(
            f"engine type deepspeed needs the package deepspeed: {error}",
            where="engine.type",
            allowed="ddp and fsdp work without it",
            fix="pip install 'sixfold[deepspeed]', or set engine.type=fsdp",
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Not ours to mend, and once for every collective.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+_tensor` is deprecated", category=FutureWarning)
    # An extension for inference that is compiled on first use, and that training never calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if world.device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
    )
    return deepspeed


def _materialize(
    deepspeed: Any, network: nn.Module, settings: dict[str, Any], specification: RoleSpecification
) -> None:
    """Give the meta network memory; in stage 3 module by module, so that no rank ever holds it whole."""
    config = specification.engine
    assert isinstance(config, DeepSpeedConfig)
    device = specification.world.device
    dtype = torch.bfloat16 if _stores_bfloat16(config, specification.world) else torch.float32
    for part in reversed(list(network.modules())):  # children first: partitioning a module takes its children along
        part.to_empty(device=device, recurse=False)
        if not part._parameters:
            continue
        for value in part.parameters(recurse=False):
            value.data = value.data.to(dtype)
        if config.zero_stage == _PARAMETER_SHARDING_STAGE:
            deepspeed.zero.Init(module=part, config_dict_or_path=settings, dtype=dtype)


def _updater(
    config: OptimizerConfig, parameters: Mapping[str, nn.Parameter], tags: Mapping[str, ParameterTag]
) -> torch.optim.Optimizer:
    if isinstance(config, AdamWConfig):
        return torch_adamw(config, config.lr, parameters, tags)
    return FlatMuonAndAdamW(config, parameters, tags)


def _allocate_states(zero: Any) -> list[dict[str, Tensor]]:
    """Make the state of every flat partition before the first update, link it to parameters; return AdamW's."""
    states = []
    for number, partition in enumerate(partitions(zero)):
        if holds_matrices(group_of(zero, number)):
            allocate_momentum(zero.optimizer, partition)
        else:
            states.append(allocate_adamw_state(zero.optimizer, partition))
    link: Callable[[], None] | None = getattr(zero, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        link()
    return states


def _restore_buffers(network: nn.Module, device: torch.device) -> None:
    """Undo DeepSpeed's cast of buffers to bf16, which rounds positions and biases, and set their values."""
    for part in network.modules():
        for name, value in part.named_buffers(recurse=False):
            if value.is_floating_point():
                part._buffers[name] = torch.empty_like(value, dtype=torch.float32, device=device)
    reset_buffers(network)


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value
