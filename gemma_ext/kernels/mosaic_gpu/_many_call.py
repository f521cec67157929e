# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""The kernel for many rows of x as a function of arrays."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from gemma_ext.kernels.mosaic_gpu import _many_rows

_PART = _many_rows.PART  # Of the result, too, so many rows leave together.


def many_rows(
  x: jax.Array, codes: jax.Array, scale: jax.Array, spec: _many_rows.Spec
) -> jax.Array:
  """Multiplies x with a packed weight.

  Args:
    x: bfloat16 `[xs, cols]`.
    codes: Codes of a weight `[rows, cols]`, as stored.
    scale: Its scales, as stored.
    spec: What to compile for.

  Returns:
    bfloat16 `[xs, rows]`, accumulated in float32, and rounded once more if
    `spec.split` is not 1.
  """
  codes = codes.reshape(spec.rows, spec.row_bytes)
  if codes.dtype == jnp.int8:
    codes = jax.lax.bitcast_convert_type(codes, jnp.uint8)
  if spec.padded > spec.xs:
    x = jnp.pad(x, ((0, spec.padded - spec.xs), (0, 0)))
  out = _compiled(spec)(x, codes, scale.reshape(-1))
  if spec.split > 1:
    out = out.astype(jnp.float32).sum(0).astype(jnp.bfloat16)
  else:
    out = out[0]
  return out[: spec.xs]


@functools.lru_cache(maxsize=256)
def _compiled(spec: _many_rows.Spec):
  # Here, not above: what is beneath is there on no machine without a GPU.
  from jax.experimental.mosaic import gpu as mgpu
  from jaxlib.mlir import ir
  import numpy as np

  from gemma_ext.kernels.mosaic_gpu import _pairs
  from gemma_ext.kernels.mosaic_gpu import _words

  # Stubs of Pallas leave out what these classes have.
  pallas: Any = plgpu
  swizzled = (pallas.TilingTransform((8, 64)), pallas.SwizzleTransform(128))
  number = plgpu.Layout.WG_SPLAT(())
  steps, step_cols = spec.steps, _many_rows.STEP

  def weights(codes_smem, scale_gmem, row, step, part):
    @plgpu.inline_mgpu(
      arg_types=(plgpu.RefType(), plgpu.RefType(), number, number),
      return_type=pallas.ShapeDtypeStruct(
        (_PART, _PART), jnp.bfloat16, layout=plgpu.Layout.WGMMA
      ),
    )
    def emit(ctx, codes, scale, row, step):
      del ctx
      row, step = (_words.Int(v.registers.item()) for v in (row, step))
      found = _many_rows.unpack(
        _pairs.Pairs(), spec, codes, scale, row, step, part
      )
      layout = mgpu.WGMMA_LAYOUT
      shape = layout.registers_shape((_PART, _PART))
      pair = ir.VectorType.get((2,), ir.BF16Type.get())
      registers = np.empty(len(found), object)
      for i, word in enumerate(found):
        registers[i] = mgpu.utils.bitcast(word.value, pair)
      return mgpu.FragmentedArray(
        _registers=registers.reshape(shape), _layout=layout, _is_signed=None
      )

    return emit(codes_smem, scale_gmem, row, step)

  def put(acc, smem, part):
    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(swizzled)))
    def emit(ctx, acc, smem):
      del ctx
      ops, i32 = _pairs.Pairs(), _words.i32()
      pairs = [
        _words.Int(mgpu.utils.bitcast(v, i32)) for v in acc.registers.flat
      ]
      _many_rows.transpose(ops, pairs, smem, part)

    emit(acc, smem)

  def kernel(x_gmem, codes_gmem, scale_gmem, out_gmem, out_smem):
    def pipeline(body, context):
      shared_x: dict[str, Any] = (
        {'collective_axes': ('cluster',)} if spec.cluster > 1 else {}
      )
      return plgpu.emit_pipeline_warp_specialized(
        body,
        grid=(steps,),
        memory_registers=40,
        in_specs=[
          plgpu.BlockSpec(
            (spec.tile_x, step_cols),
            lambda k: (0, k),
            transforms=swizzled,
            memory_space=plgpu.SMEM,
            **shared_x,
          ),
          plgpu.BlockSpec(
            (_many_rows.ROWS, spec.step_bytes),
            lambda k: (0, k),
            memory_space=plgpu.SMEM,
          ),
        ],
        wg_axis='wg',
        num_compute_wgs=2,
        max_concurrent_steps=spec.depth,
        compute_context=context,
      )

    ignore = lambda *_, **__: None

    @functools.partial(
      pl.run_scoped,
      allocations=pipeline(ignore, ignore).get_allocations(x_gmem, codes_gmem),
      collective_axes='wg',
    )
    def _(allocations):
      wg = jax.lax.axis_index('wg')
      rank = jax.lax.axis_index('cluster') if spec.cluster > 1 else 0
      of_rows, of_x = spec.tiles

      @plgpu.nd_loop((of_rows * of_x * spec.split,), collective_axes='block')
      def _(loop):
        (index,) = loop.index
        part = index % spec.split if spec.split > 1 else 0
        row, column = plgpu.planar_snake(
          index // spec.split, (of_rows, of_x), 0, min(spec.width, of_rows)
        )
        row = (row * spec.cluster + rank) * _many_rows.ROWS
        column = column * spec.tile_x
        first = part * steps

        def context(run):
          @functools.partial(
            pl.run_scoped, acc=plgpu.ACC((_PART, spec.tile_x), jnp.float32)
          )
          def _(acc):
            run(acc)
            total = acc[...].astype(jnp.bfloat16)
            for p in range(spec.tile_x // _PART):
              plgpu.wait_smem_to_gmem(0, wait_read_only=True)
              put(total, out_smem.at[wg], p)
              plgpu.commit_smem()
              plgpu.copy_smem_to_gmem(
                out_smem.at[wg],
                out_gmem.at[
                  part,
                  pl.ds(column + p * _PART, _PART),
                  pl.ds(row + wg * _PART, _PART),
                ],
              )

        def body(indices, x_smem, codes_smem, acc):
          (k,) = indices
          for p in range(step_cols // _PART):
            w = weights(codes_smem, scale_gmem, row, first + k, p)
            x = x_smem.at[:, pl.ds(p * _PART, _PART)]
            plgpu.wgmma(acc, w, plgpu.transpose_ref(x, (1, 0)))
          # Nobody but who waits knows when registers have been read.
          plgpu.wgmma_wait(0)
          return acc

        width = spec.step_bytes * steps
        pipeline(body, context)(
          x_gmem.at[
            pl.ds(column, spec.tile_x),
            pl.ds(first * step_cols, steps * step_cols),
          ],
          codes_gmem.at[
            pl.ds(row, _many_rows.ROWS), pl.ds(part * width, width)
          ],
          allocations=allocations,
        )

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  cluster: dict[str, Any] = {}
  if spec.cluster > 1:
    cluster = {'cluster': (spec.cluster,), 'cluster_names': ('cluster',)}
  tiles = spec.tiles[0] * spec.tiles[1] * spec.split
  return plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct(
      (spec.split, spec.padded, spec.rows), jnp.bfloat16
    ),
    grid=(min(spec.processors // spec.cluster, tiles),),
    grid_names=('block',),
    **cluster,
    num_threads=3,
    thread_name='wg',
    scratch_types=dict(
      out_smem=plgpu.SMEM((2, _PART, _PART), jnp.bfloat16, transforms=swizzled)
    ),
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Lane
    ),
  )
