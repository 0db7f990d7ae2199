"""One format for every sharding: what any number of ranks wrote, any number reads, and all agree on what failed."""

import json
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from checkpoint_helpers import empty_state, equal, extra_of, open_checkpointer, state_of, write_steps
from sixfold.checkpoint.store import FileStore
from sixfold.checkpoint.verification import newest_verified
from sixfold.distributed.process_group import mesh_of
from sixfold.errors import CheckpointError, EnvironmentFault


class _Opened:
    """A checkpointer on all ranks of the pool, with a group of its own."""

    def __init__(self, directory, **settings):
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=60))
        self.run = open_checkpointer(
            directory, group=self.group, rank=dist.get_rank(), world_size=dist.get_world_size(), **settings
        )

    def __enter__(self):
        return self.run

    def __exit__(self, *error):
        if error[0] is None:
            self.run.close()
        dist.destroy_process_group(self.group)


class _Network(nn.Module):
    """Sizes that divide by nothing: 7 rows, 5 rows, and a single row that most ranks hold nothing of."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 7)
        self.head = nn.Linear(7, 5)
        self.scale = nn.Parameter(torch.zeros(1, 3))

    def forward(self, x):
        return self.head(torch.relu(self.body(x))) * self.scale.sum()


def _full_values(step):
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(value.shape, generator=generator) for name, value in _Network().named_parameters()}


def _sharded_state(values, mesh=None):
    """The state of an FSDP2 network with Adam's first moments; ``values`` fill it, or NaN."""
    network = _Network()
    fully_shard(network, mesh=mesh)
    state = {}
    for name, parameter in network.named_parameters():
        full = torch.full(parameter.shape, float("nan")) if values is None else values[name]
        shard = distribute_tensor(full, parameter.device_mesh, parameter.placements)
        state[f"parameters/{name}"] = shard
        state[f"optimizer/{name}/exp_avg"] = DTensor.from_local(
            shard.to_local() * 2, shard.device_mesh, shard.placements, shape=shard.shape, stride=shard.stride()
        )
    return {"denoiser": {**state, "optimizer_step": torch.tensor(0 if values is None else 5)}}


def _full(states):
    return {
        role: {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}
        for role, state in states.items()
    }


def _expected(step):
    state = {}
    for name, value in _full_values(step).items():
        state |= {f"parameters/{name}": value, f"optimizer/{name}/exp_avg": value * 2}
    return {"denoiser": {**state, "optimizer_step": torch.tensor(5)}}


def _blank(states):
    return {role: {name: torch.full_like(value, -1) for name, value in state.items()} for role, state in states.items()}


def _save_sharded(directory, step, mesh_shape=None):
    names = ("replicate", "shard")
    mesh = None if mesh_shape is None else mesh_of("cpu", mesh_shape, names)
    with _Opened(directory) as run:
        run.save(step, _sharded_state(_full_values(step), mesh), extra_of(step))
        run.wait()
        return [each.step for each in run.poll()], sum(value.nbytes for value in run._buffers._buffers.values())


def _load_sharded(directory, step):
    messages = []
    with _Opened(directory) as run:
        states = _sharded_state(None)
        extra = run.load(run.newest_verified(messages.append), states)
        return equal(_full(states), _expected(step)), extra == extra_of(step), messages


def _load_alone(directory, step):
    states = _blank(_expected(step))
    run = open_checkpointer(directory)
    run.load(run.newest_verified(print), states)
    return equal(states, _expected(step))


def test_shards_of_two_ranks_load_on_one_and_on_four(two_ranks, four_ranks, tmp_path):
    assert [steps for steps, _ in two_ranks.run(_save_sharded, tmp_path, 3)] == [[3], [3]]
    assert _load_alone(tmp_path, 3)
    assert four_ranks.run(_load_sharded, tmp_path, 3) == [(True, True, [])] * 4
    assert two_ranks.run(_load_sharded, tmp_path, 3) == [(True, True, [])] * 2


def test_what_one_process_wrote_loads_sharded(two_ranks, four_ranks, tmp_path):
    run = open_checkpointer(tmp_path)
    run.save(4, _expected(4), extra_of(4))
    run.close()
    assert four_ranks.run(_load_sharded, tmp_path, 4) == [(True, True, [])] * 4
    assert two_ranks.run(_load_sharded, tmp_path, 4) == [(True, True, [])] * 2


def test_hybrid_shards_are_written_and_staged_once(two_ranks, four_ranks, tmp_path):
    results = four_ranks.run(_save_sharded, tmp_path, 5, (2, 2))
    whole = sum(value.nbytes for value in _expected(5)["denoiser"].values())
    assert sum(staged for _, staged in results) == whole, "the replicas stage nothing twice"
    assert _load_alone(tmp_path, 5)
    assert two_ranks.run(_load_sharded, tmp_path, 5) == [(True, True, [])] * 2


def _save_replicated(directory):
    with _Opened(directory) as run:
        run.save(1, state_of(1), extra_of(1))
        run.wait()
        staged = sum(value.nbytes for value in run._buffers._buffers.values())
        run.save(2, state_of(2), extra_of(2))
        first_plan = run._planning._agreed
        wider = state_of(3)
        wider["denoiser"]["parameters/new"] = torch.arange(4.0)
        run.save(3, wider, extra_of(3))
        return staged, first_plan is run._planning._agreed


def test_replicas_share_the_writing(two_ranks, tmp_path):
    """Under DDP every rank holds everything; each value is staged and written by one rank only."""
    results = two_ranks.run(_save_replicated, tmp_path)
    whole = sum(value.nbytes for value in state_of(1)["denoiser"].values())
    assert sum(staged for staged, _ in results) == whole
    assert all(0 < staged < 0.75 * whole for staged, _ in results)
    assert [unchanged for _, unchanged in results] == [False, False], "another layout is planned anew"
    manifest = json.loads((tmp_path / "step_00000002" / "MANIFEST.json").read_text())["manifest"]
    assert sorted(manifest["files"]) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    states = empty_state()
    states["denoiser"]["parameters/new"] = torch.zeros(4)
    run = open_checkpointer(tmp_path)
    run.load(run.newest_verified(print), states)
    assert torch.equal(states["denoiser"].pop("parameters/new"), torch.arange(4.0))
    assert equal(states, state_of(3))


def _partition(states):
    """What a ZeRO rank provides: a subset of the plain tensors."""
    names = sorted(states["denoiser"])[dist.get_rank() :: dist.get_world_size()]
    return {"denoiser": {name: states["denoiser"][name] for name in names}}


def _save_partitions(directory):
    with _Opened(directory) as run:
        run.save(6, _partition(state_of(6)), extra_of(6))


def _load_partitions(directory):
    with _Opened(directory) as run:
        states = _partition(empty_state())
        run.load(run.newest_verified(print), states)
        return equal(states, _partition(state_of(6)))


def test_ranks_may_each_hold_other_tensors(two_ranks, four_ranks, tmp_path):
    two_ranks.run(_save_partitions, tmp_path)
    states = empty_state()
    run = open_checkpointer(tmp_path)
    run.load(run.newest_verified(print), states)
    assert equal(states, state_of(6))
    assert four_ranks.run(_load_partitions, tmp_path) == [True] * 4


def _two_dimensional(directory):
    """Sharded on both dimensions of a 2x2 mesh, unevenly."""
    mesh = mesh_of("cpu", (2, 2), ("rows", "columns"))
    value = torch.arange(35.0).reshape(5, 7)
    part = distribute_tensor(value, mesh, [Shard(0), Shard(1)])
    with _Opened(directory) as run:
        run.save(1, {"denoiser": {"parameters/w": part}}, {})
        run.wait()
        target = distribute_tensor(torch.zeros(5, 7), mesh, [Shard(1), Replicate()])
        run.load(run.newest_verified(print), {"denoiser": {"parameters/w": target}})
        return torch.equal(target.full_tensor(), value)


def test_any_placement_loads_as_any_other(four_ranks, tmp_path):
    assert four_ranks.run(_two_dimensional, tmp_path) == [True] * 4


class _RankOneFull(FileStore):
    """Rank 1's data goes to the kernel's always-full device."""

    def writer(self, path):
        return Path("/dev/full").open("wb") if path.endswith("__1_0.distcp") else super().writer(path)


def _full_on_rank_one(directory):
    with _Opened(directory, keep=1) as run:
        run.save(1, state_of(1), extra_of(1))
        run.wait()
        healthy, run._store = run._store, _RankOneFull(directory)
        try:
            run.save(2, state_of(2), extra_of(2))
            run.wait()
        except EnvironmentFault as fault:
            text = str(fault)
        newest = run.newest_verified(print).step
        run._store = healthy
        run.save(3, state_of(3), extra_of(3))
        run.wait()
        return text, newest


def test_a_full_disk_on_one_rank_is_known_to_all_and_saving_goes_on(two_ranks, tmp_path):
    for text, newest in two_ranks.run(_full_on_rank_one, tmp_path):
        assert "disk is full" in text
        assert "rank 1" in text
        assert newest == 1
    assert newest_verified(tmp_path, print).step == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000003"]


def _fall_back(directory):
    messages = []
    with _Opened(directory) as run:
        candidate = run.newest_verified(messages.append)
        return candidate.step, list(candidate.rejected), messages


def test_ranks_fall_back_together(two_ranks, tmp_path):
    write_steps(tmp_path, 1, 2, 3)
    (tmp_path / "step_00000003" / "__0_0.distcp").unlink()
    (tmp_path / "step_00000002" / "MANIFEST.json").write_text("{")
    first, second = two_ranks.run(_fall_back, tmp_path)
    assert first[:2] == second[:2] == (1, ["step_00000003", "step_00000002"])
    assert len(first[2]) == 2, "rank 0 says why"
    assert second[2] == [], "and nobody repeats it"


def _wrong_template_on_rank_one(directory):
    states = empty_state()
    if dist.get_rank() == 1:
        states["denoiser"]["parameters/unknown"] = torch.zeros(3)
    with _Opened(directory) as run:
        try:
            run.load(run.newest_verified(print), states)
        except CheckpointError as error:
            return str(error)
    return None


def test_a_fault_of_one_rank_stops_all(two_ranks, tmp_path):
    write_steps(tmp_path, 1)
    for text in two_ranks.run(_wrong_template_on_rank_one, tmp_path):
        assert "parameters/unknown is not in it" in text


def _hole(directory):
    """Rank 1 claims to hold nothing of a tensor of which rank 0 holds half: an engine's mistake, not a user's."""
    mesh = mesh_of("cpu", (2,), ("rank",))
    part = distribute_tensor(torch.arange(8.0), mesh, [Shard(0)])
    state = {"parameters/w": part} if dist.get_rank() == 0 else {}
    with _Opened(directory) as run:
        try:
            run.save(1, {"denoiser": state}, {})
        except ValueError as error:
            return str(error)
    return None


def test_a_tensor_with_a_hole_is_refused_before_anything_is_written(two_ranks, tmp_path):
    assert all("parameters/w" in text for text in two_ranks.run(_hole, tmp_path))
    assert newest_verified(tmp_path, print) is None


def _separate_folders(directory):
    with pytest.raises(EnvironmentFault, match="rank 1 does not see"), _Opened(f"{directory}/{dist.get_rank()}"):
        pass


def test_a_folder_that_is_not_shared_is_refused_at_the_start(two_ranks, tmp_path):
    two_ranks.run(_separate_folders, tmp_path)
