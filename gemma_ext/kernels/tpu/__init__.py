# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Kernels for TPUs, in Pallas' Mosaic TPU."""

from gemma_ext.kernels.tpu._matmul import matmul as matmul
from gemma_ext.kernels.tpu._matmul import why_not as why_not
