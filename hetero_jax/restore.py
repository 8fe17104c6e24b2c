"""An Orbax checkpoint of a plan's parameters, each leaf straight to the device that the plan gives it to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from hetero_jax.config import EngineConfig
from hetero_jax.devices import place
from hetero_jax.errors import CheckpointError
from partition import Plan

_Key = tuple[str, ...]  # the way to a leaf, as Orbax names it


def restore(plan: Plan, folder: str | os.PathLike[str], config: EngineConfig | None = None) -> Plan:
    """The plan with the parameters of a checkpoint, ready for an engine with the same configuration.

    What stages read goes to tier 1's device, what only sites read (sinks, learned biases) to tier 2's, and nothing
    else is read. However the leaves were sharded in training, each comes whole, in the dtype of the plan.

    Args:
      plan: of the same tree of parameters as was saved, arrays or `jax.ShapeDtypeStruct`.
      folder: what `StandardCheckpointer` or `PyTreeCheckpointer` wrote (of a `CheckpointManager`: FOLDER/STEP/default).
        Leaves that the plan does not know (optimizer state beside them) are ignored.
    Raises:
      CheckpointError: no sound checkpoint, or a leaf is missing or has another shape; the message has its name.
      ConfigError: the platform that the configuration asks for is not there.
    """
    path, placement = Path(folder).absolute(), place(config or EngineConfig())
    leaves, tree = jax.tree_util.tree_flatten_with_path(plan.of_shapes().forward.params)
    devices = dict.fromkeys(plan.site_leaves, placement.tier2)
    devices |= dict.fromkeys(plan.stage_leaves, placement.tier1)
    keys = {number: ocp.tree.str_keypath(leaves[number][0]) for number in sorted(devices)}
    wanted = {
        key: jax.ShapeDtypeStruct(
            leaves[number][1].shape,
            leaves[number][1].dtype,
            sharding=jax.sharding.SingleDeviceSharding(devices[number]),
        )
        for number, key in keys.items()
    }
    arrays = _read(path, wanted)
    params = [arrays[keys[number]] if number in keys else leaf for number, (_, leaf) in enumerate(leaves)]
    return replace(plan, forward=replace(plan.forward, params=tree.unflatten(params)))


def _read(path: Path, wanted: Mapping[_Key, jax.ShapeDtypeStruct]) -> dict[_Key, jax.Array]:
    """The wanted leaves; all others of the checkpoint's own tree are placeholders, which Orbax does not read."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        saved = _saved_tree(path, checkpointer)
        _check(path, {ocp.tree.str_keypath(way): leaf for way, leaf in _flat(saved)}, wanted)
        item = jax.tree_util.tree_map_with_path(
            lambda way, _: wanted.get(ocp.tree.str_keypath(way), ocp.PLACEHOLDER), saved
        )
        args = jax.tree.map(_restore_args, item)
        try:
            found = checkpointer.restore(path, args=ocp.args.PyTreeRestore(item=item, restore_args=args))
        except Exception as error:  # Orbax reports damaged files through many types
            raise CheckpointError(f"{path}: {error}") from error
    return {ocp.tree.str_keypath(way): leaf for way, leaf in _flat(found)}


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
    if leaf is ocp.PLACEHOLDER:
        return ocp.RestoreArgs()
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, dtype=leaf.dtype)


def _saved_tree(path: Path, checkpointer: ocp.PyTreeCheckpointer) -> Any:
    """What the checkpoint says of its leaves."""
    try:
        metadata: Any = checkpointer.metadata(path).item_metadata
        return metadata.tree
    except Exception as error:
        raise CheckpointError(f"{path}: not a sound Orbax checkpoint ({error})") from error


def _flat(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)


def _check(path: Path, found: Mapping[_Key, Any], wanted: Mapping[_Key, jax.ShapeDtypeStruct]) -> None:
    """Compares names and shapes before anything is allocated."""
    for key, leaf in wanted.items():
        name = ".".join(key)
        if key not in found:
            some = ", ".join(".".join(each) for each in list(found)[:8])
            raise CheckpointError(f"{path}: the leaf {name!r} is missing; it has {len(found)}: {some} ...")
        if tuple(found[key].shape) != leaf.shape:
            raise CheckpointError(
                f"{path}: the leaf {name!r} has shape {tuple(found[key].shape)}; the plan was made for {leaf.shape}"
            )
