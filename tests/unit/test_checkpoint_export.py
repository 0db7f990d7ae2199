"""A network leaves a checkpoint as plain tensors and as safetensors, without engines."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from checkpoint_helpers import state_of, write_steps
from sixfold.checkpoint.export import export_safetensors, read_parameters
from sixfold.checkpoint.verification import newest_verified
from sixfold.errors import CheckpointError, EnvironmentFault


@pytest.fixture
def candidate(tmp_path):
    write_steps(tmp_path / "checkpoints", 12)
    return newest_verified(tmp_path / "checkpoints", print)


@pytest.mark.parametrize(("averaged", "kind"), [(False, "parameters"), (True, "ema")])
def test_parameters_and_buffers_come_out_under_their_own_names(candidate, tmp_path, averaged, kind):
    saved = state_of(12)["denoiser"]
    expected = {
        "body.weight": saved[f"{kind}/body.weight"],
        "body.bias": saved[f"{kind}/body.bias"],
        "scale": saved["buffers/scale"],
    }
    read = read_parameters(candidate, "denoiser", averaged=averaged)
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in expected)

    out = tmp_path / "network.safetensors"
    export_safetensors(candidate, "denoiser", averaged=averaged, out=out)
    loaded = load_file(out)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    with safe_open(out, framework="pt") as opened:
        assert opened.metadata() | {"written_by": ""} == {
            "format": "pt",
            "role": "denoiser",
            "averaged": str(averaged).lower(),
            "step": "12",
            "recipe_hash": "recipe-1",
            "fingerprint": "data-1",
            "written_by": "",
        }
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["network.safetensors"]


def test_an_unknown_role_is_refused_with_what_there_is(candidate):
    with pytest.raises(CheckpointError, match="holds no critic/parameters") as caught:
        read_parameters(candidate, "critic", averaged=False)
    assert "denoiser/parameters" in str(caught.value)


def test_what_cannot_be_written_is_said(candidate, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFault, match="cannot be written"):
        export_safetensors(candidate, "denoiser", averaged=False, out=tmp_path / "file/network.safetensors")
    with pytest.raises(EnvironmentFault, match="cannot be written"):
        export_safetensors(candidate, "denoiser", averaged=False, out=tmp_path / ("n" * 250))
    export_safetensors(candidate, "denoiser", averaged=False, out=tmp_path / "new/folder/network.safetensors")
    assert len(load_file(tmp_path / "new/folder/network.safetensors")) == 3
