"""Where a graph may be cut, and what lies between the cuts."""

import msgspec


class Boundary(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor that crosses a cut.  `shape` mixes numbers and names of dynamic axes.

    Its size is `bytes_fixed + bytes_per_token * T` for a step of T rows (sequence models), or `bytes_fixed` per sample.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    bytes_per_token: int
    bytes_fixed: int


class BlockTensor(msgspec.Struct, frozen=True, kw_only=True):
    """A weight of a block, as stored."""

    name: str
    size_bytes: int


class Block(msgspec.Struct, frozen=True, kw_only=True):
    """The nodes [`node_start`, `node_stop`) of the topological order, between two neighbouring frontiers.

    `kind` is a digest of the block's structure (operators, attributes, shapes and types, no names or values):
    blocks of equal kind cost the same on a device, so one trial stands for all.
    `kv_layers` are the layer numbers N of `past_key_values.N.*` whose cache this block owns.
    """

    index: int
    kind: str
    node_start: int
    node_stop: int
    tensors: tuple[BlockTensor, ...]
    inputs: tuple[Boundary, ...]
    outputs: tuple[Boundary, ...]
    flops_per_token: int
    kv_bytes_per_token: int
    kv_layers: tuple[int, ...] = ()

    @property
    def weights_bytes(self) -> int:
        """Bytes of the block's own weights (a tensor shared with another block counts in both)."""
        return sum(t.size_bytes for t in self.tensors)
