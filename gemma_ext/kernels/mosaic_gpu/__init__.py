# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Kernels for Hopper and newer GPUs, in Pallas' Mosaic GPU."""

from gemma_ext.kernels.mosaic_gpu._call import few_rows as few_rows
from gemma_ext.kernels.mosaic_gpu._call import matmul as matmul
from gemma_ext.kernels.mosaic_gpu._call import why_not as why_not
