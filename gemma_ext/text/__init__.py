# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Text from a checkpoint, as it comes."""

from gemma_ext.text._energy import active_for
from gemma_ext.text._energy import Budget
from gemma_ext.text._energy import complexity
from gemma_ext.text._energy import Cost
from gemma_ext.text._energy import cost
from gemma_ext.text._energy import experts_within
from gemma_ext.text._energy import Machine
from gemma_ext.text._energy import with_budget
from gemma_ext.text._speculative import Draft
from gemma_ext.text._speculative import Speculative
from gemma_ext.text._stream import Stream
from gemma_ext.text._stream import stream
