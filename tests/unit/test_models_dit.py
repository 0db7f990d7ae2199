import pytest
import torch
from pydantic import ValidationError

from model_helpers import randomized
from sixfold.models.dit.config import DiTConfig
from sixfold.models.dit.embedding import grid_sinusoids, patchify, unpatchify
from sixfold.models.dit.model import DiT
from sixfold.models.network import initialize, parameter_tags


def small(**changes) -> DiTConfig:
    fields = {"image_size": 8, "patch_size": 2, "channels": 3, "width": 32, "depth": 2, "heads": 4, "classes": 10}
    return DiTConfig(**(fields | changes))


def test_published_size_and_cost():
    with torch.device("meta"):
        network = DiT(small(image_size=32, channels=4, width=1152, depth=28, heads=16, classes=1000))
    # 675M with the learned variance's 4 * 2 * 2 further outputs (DiT paper, table 9), 18k less without.
    outputs = 16 * (1152 + 1)
    assert round((sum(value.numel() for value in network.parameters()) + outputs) / 1e6) == 675
    assert network.forward_flops({"image": (1, 4, 32, 32)}) / 2e9 == pytest.approx(118.64, rel=2e-3)  # Gflops, table 9


def test_starts_as_zero_and_is_not_zero_with_random_weights():
    network = DiT(small())
    initialize(network, parameter_tags(network), seed=0, role="denoiser")
    inputs = torch.randn(2, 3, 8, 8), torch.rand(2), {"label": torch.tensor([1, 10])}
    assert network(*inputs).abs().max() == 0
    assert randomized(small())(*inputs).abs().min() > 0


def test_patches_come_back_in_place():
    images = torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8).float()
    patches = patchify(images, 2)
    assert torch.equal(patches[0, 5].view(3, 2, 2), images[0, :, 2:4, 2:4])
    outward = patches.view(2, 16, 3, 2, 2).permute(0, 1, 3, 4, 2).flatten(2)
    assert torch.equal(unpatchify(outward, 2, 3), images)


def test_grid_positions_are_all_different_and_smooth():
    positions = grid_sinusoids(4, 32, torch.device("cpu"))
    distances = torch.cdist(positions, positions)
    assert distances[~torch.eye(16, dtype=torch.bool)].min() > 0.5
    assert distances[0, 1] < distances[0, 3]
    torch.testing.assert_close(distances[0, 1], distances[0, 4])  # one to the right is as far as one down


@pytest.mark.parametrize("qk_norm", [False, True])
def test_time_label_and_position_all_matter(qk_norm):
    network = randomized(small(qk_norm=qk_norm))
    x, time, label = torch.randn(1, 3, 8, 8), torch.tensor([0.5]), torch.tensor([3])
    base = network(x, time, {"label": label})
    assert (network(x, time + 0.1, {"label": label}) - base).abs().max() > 1e-3
    assert (network(x, time, {"label": torch.tensor([10])}) - base).abs().max() > 1e-3
    moved = network(x.roll(2, dims=-1), time, {"label": label}).roll(-2, dims=-1)
    assert (moved - base).abs().max() > 1e-3


def test_samples_do_not_depend_on_their_neighbours():
    network = randomized(small())
    x, time, label = torch.randn(3, 3, 8, 8), torch.rand(3), torch.tensor([0, 10, 4])
    together = network(x, time, {"label": label})
    alone = torch.cat([network(x[i : i + 1], time[i : i + 1], {"label": label[i : i + 1]}) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_unconditional_network_needs_no_condition():
    config = small(classes=0)
    assert config.null_values == {}
    assert randomized(config)(torch.randn(2, 3, 8, 8), torch.rand(2), {}).shape == (2, 3, 8, 8)


def test_half_precision_weights_keep_the_time_in_fp32():
    network = randomized(small(), scale=0.1)
    x, time, label = torch.randn(4, 3, 8, 8), torch.tensor([0.5, 0.5005, 0.9, 0.1]), torch.arange(4)
    exact = network(x, time, {"label": label})
    rough = network.to(torch.bfloat16)(x, time, {"label": label})
    assert rough.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(rough.float().flatten(), exact.flatten(), dim=0) > 0.995


def test_positions_survive_meta_construction():
    with torch.device("meta"):
        network = DiT(small())
    tags = parameter_tags(network)
    network.to_empty(device="cpu")
    initialize(network, tags, seed=0, role="denoiser")
    assert torch.equal(network.patches.position, grid_sinusoids(4, 32, torch.device("cpu")))
    assert "patches.position" not in network.state_dict()


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"patch_size": 3}, "patch_size"), ({"heads": 5}, "heads"), ({"width": 30, "heads": 2}, "multiple of 4")],
)
def test_impossible_shapes_are_refused_with_the_way_out(changes, named):
    with pytest.raises(ValidationError, match=named):
        small(**changes)
