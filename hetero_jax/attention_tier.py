"""Tier 2: the paged KV pools and the jitted attention of every site, on one device of this process."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from hetero_jax import attention, native_attention, pool_pages, traced_attention
from hetero_jax.attention_layout import AttentionLayout, GroupedLayout, appending_nothing
from hetero_jax.described_site import DescribedSite
from hetero_jax.devices import are_ready, land, start_copy
from hetero_jax.errors import ConfigError
from hetero_jax.exported_attention import ExportedAttention
from hetero_jax.exported_site import ExportedSite
from hetero_jax.page_groups import SitePages
from hetero_jax.tracing import TIER2, Trace
from hetero_jax.wire import from_wire, to_wire
from partition import PlannedSite, Value


class SiteKernel(Protocol):
    """How tier 2 serves one kind of site.

    attend: (pool, inputs [R, ...] each, layout, weights) -> (pool, outputs [R, ...] each), to be jitted. Without the
      inputs that are cached, the pool has their rows already. Of a recognised site it also takes what `attend_behind`
      has begun: (pool, q, layout) -> that, or None where everything waits for k and v.
    """

    def page_bytes(self, *, page_size: int) -> int: ...

    def make_pool(self, *, num_pages: int, page_size: int) -> Any: ...

    def needed_layout(self, layout: AttentionLayout) -> AttentionLayout: ...

    def attend(self, pool: Any, inputs: Any, layout: AttentionLayout, weights: Any) -> tuple[Any, Any]: ...


class AttentionTier:
    """Serves `attend` for each site; a pool is donated to the call and replaced by its result.

    Args:
      sites: of the plan, or described by an engine elsewhere.
      weights: arrays of the weights that sites read.
      pages: of each site, where it keeps them; those of one pool have pages of one shape.
      kv_cache_bytes: memory of all pools; `num_pages` is as many as it holds.
      page_size: token positions in a page.
      dtype: element type of the pools.
      device: where they are.
      tier1: where rows come from and go to; None: this device, or the memory of the host.
      max_pages: no more than so many, whatever the memory; None: no limit.
    Raises:
      ConfigError: not one page fits, or what serves this device has no such dtype.
    """

    def __init__(
        self,
        sites: Sequence[PlannedSite | DescribedSite | ExportedSite],
        weights: Mapping[Value, jax.Array],
        *,
        pages: Sequence[SitePages],
        kv_cache_bytes: int,
        page_size: int,
        dtype: Any,
        device: Any,
        tier1: Any = None,
        max_pages: int | None = None,
    ) -> None:
        self.device, self.waited_s = device, 0.0  # it is JAX that waits, where the arrays are used
        self._tier1 = None if tier1 == device else tier1
        choose = _KernelChoice(dtype=dtype, device=device)
        made = {key: choose(site) for key, site in {site.key: site for site in reversed(sites)}.items()}
        self._kernels = [made[site.key] for site in sites]
        # Of sites that keep the same values, the first appends them.
        self.shares_pool = [place in pages[:site] for site, place in enumerate(pages)]
        self._group_of, self.num_groups = [place.group for place in pages], 1 + max(place.group for place in pages)
        pools = {place.pool: kernel for place, kernel in zip(pages, self._kernels, strict=True)}
        self._pool_of = [list(pools).index(place.pool) for place in pages]
        page_bytes = sum(kernel.page_bytes(page_size=page_size) for kernel in pools.values())
        if kv_cache_bytes < page_bytes:
            raise ConfigError(
                f"kv_cache_bytes={kv_cache_bytes} holds no page: one page of {page_size} tokens takes "
                f"{page_bytes} bytes over {len(sites)} sites"
            )
        fitting = kv_cache_bytes // page_bytes
        self.num_pages = fitting if max_pages is None else min(fitting, max_pages)
        self._pools = [kernel.make_pool(num_pages=self.num_pages, page_size=page_size) for kernel in pools.values()]
        self._weights = [
            jax.device_put(site.kernel_weights([weights[value] for value in site.weights]), device) for site in sites
        ]
        jitted = {kernel: (_jit(kernel), _jit_behind(kernel)) for kernel in made.values()}
        self._calls, self._calls_behind = zip(*(jitted[kernel] for kernel in self._kernels), strict=True)

    @property
    def place(self) -> str:
        """Where it is."""
        return str(self.device)

    @property
    def pool_bytes(self) -> int:
        """Bytes of all pools."""
        return sum(array.nbytes for array in jax.tree.leaves(self._pools))

    @property
    def num_sites(self) -> int:
        """Sites that it serves."""
        return len(self._kernels)

    @property
    def page_format(self) -> str:
        """Of the pools; where another tier's is the same, pages may go there."""
        return pool_pages.page_format(self._pools)

    def read_pages(self, pages: np.ndarray) -> tuple[np.ndarray, ...]:
        """As `pool_pages.read_pages`, after the calls so far."""
        return pool_pages.read_pages(self._pools, pages)

    def write_pages(self, pages: np.ndarray, contents: Sequence[np.ndarray]) -> None:
        """As `pool_pages.write_pages`, after the calls so far."""
        self._pools = pool_pages.write_pages(self._pools, pages, contents)

    def place_layout(self, layout: GroupedLayout, pools: Sequence[int] = ()) -> list[AttentionLayout]:
        """What each site needs of the layout, on this tier's device: once per microbatch, not once per site.

        Args:
          pools: of each sequence; this tier has but one.
        """
        takers = list(zip(self._kernels, self._group_of, strict=True))
        needed = {(kernel, group): kernel.needed_layout(layout.of_group(group)) for kernel, group in set(takers)}
        placed = {taker: jax.device_put(own, self.device) for taker, own in needed.items()}
        return [placed[taker] for taker in takers]

    def begin(self, arrays: tuple[jax.Array, ...]) -> None:
        """Start to move what sites take here."""
        if self._tier1 is not None:
            start_copy(arrays, self._tier1, self.device)

    def attend(
        self,
        site: int,
        layouts: Sequence[AttentionLayout],
        inputs: Sequence[jax.Array | np.ndarray],
        wire_dtype: str | None = None,
        begun: Any = None,
    ) -> tuple[jax.Array, ...]:
        """Append what is cached to the site's pool and attend: [R, *inner] of each output on this tier's device.

        Args:
          inputs: of the site; where it `shares_pool`, those that are not cached alone.
          wire_dtype: rows come as they travel, and go so; None: they are as the site has them.
          begun: what `attend_behind` gave for the same q and layouts; None: nothing.
        """
        if self._tier1 is not None:
            inputs = [land(array, self.device) for array in inputs]
        pool = self._pool_of[site]
        self._pools[pool], out = self._calls[site](
            self._pools[pool], tuple(inputs), layouts[site], self._weights[site], begun, wire_dtype=wire_dtype
        )
        return out

    def attend_behind(self, site: int, layouts: Sequence[AttentionLayout], q: np.ndarray, wire_dtype: str) -> Any:
        """Begin with what needs neither k nor v, of a recognised site, and wait for it: `begun` of `attend`."""
        pool = self._pools[self._pool_of[site]]
        return jax.block_until_ready(self._calls_behind[site](pool, q, layouts[site], wire_dtype=wire_dtype))

    def away_s(self) -> float:
        """As Tier2: unknown, and no more than a stage, as nothing travels far."""
        return 0.0

    def is_ready(self, pending: tuple[jax.Array, ...]) -> bool:
        """Whether what `attend` began is done."""
        return are_ready(pending)

    def record(self, trace: Trace, name: str, inputs: Sequence[jax.Array], pending: tuple[jax.Array, ...]) -> None:
        """Trace what `attend` began."""
        trace.computed(TIER2, name, inputs, pending)

    def fetch(self, pending: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """What `attend` began, on tier 1; JAX waits for it where it is used."""
        return pending if self._tier1 is None else tuple(land(array, self._tier1) for array in pending)


def _jit(kernel: SiteKernel) -> Any:
    """`kernel.attend` of rows as the site has them or, with a `wire_dtype`, as they travel."""

    def attend(
        pool: Any, inputs: Any, layout: AttentionLayout, weights: Any, begun: Any, wire_dtype: str | None
    ) -> Any:
        extras = {} if begun is None else {"begun": begun}
        pool, out = kernel.attend(pool, _received(inputs, wire_dtype), layout, weights, **extras)
        return pool, out if wire_dtype is None else to_wire(out, wire_dtype)

    return jax.jit(attend, donate_argnums=0, static_argnames="wire_dtype")


def _jit_behind(kernel: SiteKernel) -> Any:
    """`kernel.attend_behind` of q as it travels."""

    def attend_behind(pool: Any, q: Any, layout: AttentionLayout, wire_dtype: str) -> Any:
        assert isinstance(kernel, _SpecKernel), "others take all that they need at once"
        return kernel.attend_behind(pool, _received([q], wire_dtype)[0], layout)

    return jax.jit(attend_behind, static_argnames="wire_dtype")


def _received(inputs: Sequence[jax.Array], wire_dtype: str | None) -> Sequence[jax.Array]:
    return [from_wire(rows, wire_dtype, jnp.float32) for rows in inputs] if wire_dtype == "int8" else inputs


class _KernelChoice:
    """Picks what serves a site: the native kernel, the same in jax.numpy, or the site's own subgraph."""

    def __init__(self, *, dtype: Any, device: Any) -> None:
        self.dtype, self.device = jnp.dtype(dtype), device
        self.why_not_native = native_attention.refusal(dtype=dtype, device=device)

    def __call__(self, site: PlannedSite | DescribedSite | ExportedSite) -> SiteKernel:
        if isinstance(site, ExportedSite):
            return _ExportedKernel(site.attention, self.device)
        if isinstance(site, PlannedSite) and site.spec is None:
            return self._traced(site)
        if self.why_not_native is None:
            return _SpecKernel(native_attention, site, self.dtype, self.device, native_attention.needed_layout)
        self._check_plain_dtype(self.why_not_native)
        self._warn(f"attention runs in plain jax.numpy, about ten times slower: {self.why_not_native}")
        return _SpecKernel(attention, site, self.dtype, self.device, lambda layout: layout)

    def _traced(self, site: PlannedSite) -> SiteKernel:
        self._check_plain_dtype(f"the attention opened at {site.site.opening.where} is none that it knows")
        self._warn(
            f"the attention opened at {site.site.opening.where} runs by its own traced operations, slower than a "
            f"kernel, as {site.unrecognised}"
        )
        return _TracedKernel(site, self.dtype, self.device)

    def _check_plain_dtype(self, why: str) -> None:
        if self.dtype.name not in attention.DTYPES:
            raise ConfigError(f"kv_cache_dtype={self.dtype.name} needs the native kernel: {why}")

    def _warn(self, message: str) -> None:
        if self.device.platform == "cpu":
            warnings.warn(message, stacklevel=8)


class _SpecKernel:
    """A recognised site by `hetero_jax.attention` or `hetero_jax.native_attention`."""

    def __init__(
        self, module: Any, site: PlannedSite | DescribedSite, dtype: Any, device: Any, needed: Callable[..., Any]
    ) -> None:
        assert site.spec is not None
        self._module, self._spec, self._dtype, self._device = module, site.spec, dtype, device
        self.needed_layout = needed

    def page_bytes(self, *, page_size: int) -> int:
        return self._module.page_bytes(self._spec, page_size=page_size, dtype=self._dtype)

    def make_pool(self, *, num_pages: int, page_size: int) -> Any:
        return self._module.make_pool(
            self._spec, num_pages=num_pages, page_size=page_size, dtype=self._dtype, device=self._device
        )

    def attend_behind(self, pool: Any, q: jax.Array, layout: AttentionLayout) -> Any:
        if self._module is not native_attention:
            return None
        return native_attention.attend_behind(pool, q, layout, self._spec)

    def attend(
        self, pool: Any, inputs: Any, layout: AttentionLayout, weights: Any, **begun: jax.Array
    ) -> tuple[Any, Any]:
        sinks = weights[0] if self._spec.has_sinks else None
        q, *kv = inputs
        if not kv:
            layout, *kv = appending_nothing(layout, q, self._spec)
        pool, out = self._module.paged_attention(pool, q, *kv, layout, self._spec, sinks=sinks, **begun)
        return pool, (out,)


class _TracedKernel:
    """Any other causal site by its own subgraph."""

    def __init__(self, site: PlannedSite, dtype: Any, device: Any) -> None:
        self._site, self._dtype, self._device = site, dtype, device
        self.attend = functools.partial(traced_attention.paged_attention, site=site, dtype=dtype)

    def page_bytes(self, *, page_size: int) -> int:
        return traced_attention.page_bytes(self._site, page_size=page_size, dtype=self._dtype)

    def make_pool(self, *, num_pages: int, page_size: int) -> Any:
        return traced_attention.make_pool(
            self._site, num_pages=num_pages, page_size=page_size, dtype=self._dtype, device=self._device
        )

    def needed_layout(self, layout: AttentionLayout) -> AttentionLayout:
        return layout


class _ExportedKernel:
    """The same by programs of an engine elsewhere, which fix the page size and the element type."""

    def __init__(self, programs: ExportedAttention, device: Any) -> None:
        self._arrays, self._device = programs.pool, device
        self.attend = programs.attend

    def page_bytes(self, *, page_size: int) -> int:
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self._arrays)

    def make_pool(self, *, num_pages: int, page_size: int) -> Any:
        with jax.default_device(self._device):
            return tuple(jnp.zeros((num_pages, *shape), dtype) for shape, dtype in self._arrays)

    def needed_layout(self, layout: AttentionLayout) -> AttentionLayout:
        return layout
