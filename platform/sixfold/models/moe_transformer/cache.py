"""Keys and values of the tokens that were already read, so that decoding reads each token once."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


class LayerCache:
    """Keys and values of one attention layer, in storage of fixed capacity."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._storage: tuple[Tensor, Tensor] | None = None

    def extend(
        self, key: Float[Tensor, "n kv_heads new features"], value: Float[Tensor, "n kv_heads new features"], start: int
    ) -> tuple[Float[Tensor, "n kv_heads keys features"], Float[Tensor, "n kv_heads keys features"]]:
        """Store keys and values at positions from ``start`` on and return all up to the last of them."""
        n, kv_heads, new, features = key.shape
        end = start + new
        assert end <= self._capacity, f"{end} positions do not fit a cache of {self._capacity}"
        if self._storage is None:
            shape = (n, kv_heads, self._capacity, features)
            self._storage = key.new_empty(shape), value.new_empty(shape)
        keys, values = self._storage
        keys[:, :, start:end] = key
        values[:, :, start:end] = value
        return keys[:, :, :end], values[:, :, :end]


class KeyValueCache:
    """The caches of all layers and how many positions they hold.

    Args:
        layers: attention layers of the network.
        capacity: the most positions that will be read, prompt included.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        self.layers = [LayerCache(capacity) for _ in range(layers)]
        self.length = 0
