# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Perplexity with intervals, paired comparisons, sizes of weights."""

from gemma_ext.evals._choices import ChoiceResult
from gemma_ext.evals._choices import multiple_choice
from gemma_ext.evals._comparisons import compare
from gemma_ext.evals._comparisons import Comparison
from gemma_ext.evals._comparisons import holm
from gemma_ext.evals._comparisons import Mean
from gemma_ext.evals._comparisons import mean
from gemma_ext.evals._comparisons import wilson
from gemma_ext.evals._formats import Format
from gemma_ext.evals._formats import FORMATS
from gemma_ext.evals._generation import CODE_STOPS
from gemma_ext.evals._generation import generate
from gemma_ext.evals._generation import score
from gemma_ext.evals._items import Choice
from gemma_ext.evals._items import items_sha256
from gemma_ext.evals._items import Program
from gemma_ext.evals._items import Question
from gemma_ext.evals._loading import load_items
from gemma_ext.evals._perplexity import perplexity
from gemma_ext.evals._results import check_same_tokens
from gemma_ext.evals._results import finite
from gemma_ext.evals._results import package_versions
from gemma_ext.evals._results import paired_json
from gemma_ext.evals._results import paired_ratio
from gemma_ext.evals._results import PerplexityResult
from gemma_ext.evals._sandbox import require_sandbox
from gemma_ext.evals._sizes import weight_sizes
from gemma_ext.evals._sizes import WeightSizes
from gemma_ext.evals._statistics import bootstrap_ci
from gemma_ext.evals._statistics import Interval
