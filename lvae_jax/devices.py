"""How a sweep uses several devices: the layouts of its members and batches on them. All parallel code is here."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Int

from lvae_jax.training import Metrics, TrainState


class Layout(NamedTuple):
    """The placement of the members of a sweep and of their batches on devices. On the host, states are [M, ...],
    metrics [K, M] and indices [K, M, B] in every layout, so that a checkpoint serves any of them.

    Attributes:
      map: (steps, donate_argnums) -> `training.members_steps`, its options bound, compiled for the devices.
      axis_name: of the devices that share a batch, which is an option of `members_steps`; None if none do.
      place: leaves [M, ...] -> as `map`ped steps take and return them.
      collect: (leaves, M, axis) -> the inverse, in numpy; `axis` of the leaves is that of the members.
      share: indices [K, M, B] of the whole batch -> those of this process, as `map`ped steps take them.
      batches: sharding of what `share` returns, and of examples that it chose.
      whole: sharding of what all devices have.
    """

    map: Callable[..., Callable[..., tuple[TrainState, Metrics]]]
    axis_name: str | None
    place: Callable[[Any], Any]
    collect: Callable[[Any, int, int], Any]
    share: Callable[[Int[np.ndarray, "K M B"]], Int[np.ndarray, "..."]]
    batches: Sharding
    whole: Sharding


AXIS = "devices"


def one_device() -> Layout:
    """Everything on the first device of this process."""
    sharding = SingleDeviceSharding(jax.local_devices()[0])
    return Layout(
        map=jax.jit,
        axis_name=None,
        place=lambda tree: jax.device_put(tree, sharding),
        collect=lambda tree, num_members, axis: jax.device_get(tree),
        share=lambda indices: indices,
        batches=sharding,
        whole=sharding,
    )


def split_batch(devices: Sequence[jax.Device]) -> Layout:
    """Data parallel: each device has all members and an equal part of each batch; `devices` may be of several
    processes, which feed their own devices.

    Raises:
      ValueError: by `share`, if a batch does not divide by the devices.
    """
    # A process can only place arrays on devices of its own.
    mesh = _local_mesh(devices)
    whole = NamedSharding(mesh, PartitionSpec())
    ours = [index for index, device in enumerate(devices) if device.process_index == jax.process_index()]

    def share(indices: Int[np.ndarray, "K M B"]) -> Int[np.ndarray, "K M D b"]:
        steps, members, size = indices.shape
        if size % len(devices):
            raise ValueError(f"a batch of {size} cannot be split over {len(devices)} devices: give a multiple of that")
        return indices.reshape(steps, members, len(devices), -1)[:, :, ours]

    return Layout(
        # Seeds, sigmas, states and the training data on every device; indices and examples [K, M, D, ...] by device.
        map=functools.partial(
            jax.pmap, axis_name=AXIS, devices=devices, in_axes=(None, None, None, None, 2, 2), out_axes=(None, None)
        ),
        axis_name=AXIS,
        place=lambda tree: jax.device_put(tree, whole),
        collect=lambda tree, num_members, axis: jax.device_get(tree),
        share=share,
        batches=NamedSharding(mesh, PartitionSpec(None, None, AXIS)),
        whole=whole,
    )


def split_members(devices: Sequence[jax.Device]) -> Layout:
    """Each of `devices`, all of this process, has an equal part of the members and their whole batches; repeats of the
    last member, which `collect` drops, fill up the parts."""
    mesh = _local_mesh(devices)

    def parts(num_members: int) -> Int[np.ndarray, "D m"]:
        # Rounded up; the last device repeats the last member.
        size = -(-num_members // len(devices))
        return np.minimum(np.arange(len(devices) * size), num_members - 1).reshape(len(devices), size)

    def place(tree: Any) -> Any:
        sharding = NamedSharding(mesh, PartitionSpec(AXIS))
        return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf)[parts(len(leaf))], sharding), tree)

    def collect(tree: Any, num_members: int, axis: int) -> Any:
        def merge(leaf: np.ndarray) -> np.ndarray:
            merged = leaf.reshape(*leaf.shape[:axis], -1, *leaf.shape[axis + 2 :])
            return merged.take(np.arange(num_members), axis=axis)

        return jax.tree.map(merge, jax.device_get(tree))

    return Layout(
        # Members by device; only the training data are the same everywhere.
        map=functools.partial(
            jax.pmap, axis_name=AXIS, devices=devices, in_axes=(0, 0, 0, None, 1, 1), out_axes=(0, 1)
        ),
        axis_name=None,
        place=place,
        collect=collect,
        share=lambda indices: indices[:, parts(indices.shape[1])],
        batches=NamedSharding(mesh, PartitionSpec(None, AXIS)),
        whole=NamedSharding(mesh, PartitionSpec()),
    )


def _local_mesh(devices: Sequence[jax.Device]) -> Mesh:
    return Mesh(np.array([device for device in devices if device.process_index == jax.process_index()]), (AXIS,))
