# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Errors: one class for each way to fail, all of them `GemmaExtError`."""


class GemmaExtError(Exception):
  """Base of every error that `gemma_ext` raises on purpose."""


# ------------------------------- checkpoints ---------------------------------


class CheckpointError(GemmaExtError, ValueError):
  """A checkpoint cannot be read."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
  """No checkpoint at that path or of that name; says where it looked."""


class CheckpointExistsError(CheckpointError, FileExistsError):
  """There is already something at the path to save to."""


class UnknownFormatError(CheckpointError):
  """The path is none of the formats that `gemma_ext.ckpts` reads."""


class TruncatedFileError(CheckpointError):
  """The file ends before the data that its header promises."""


class HeaderError(CheckpointError):
  """The header is malformed: bad magic, version, types or sizes."""


class HeaderTooLargeError(HeaderError):
  """A count or length in the header exceeds what the file can hold."""


class OverlappingTensorsError(CheckpointError):
  """Two tensors claim the same bytes of the file."""


class UnsupportedTypeError(CheckpointError):
  """A tensor type, or model architecture, that cannot be loaded."""


class TensorShapeError(CheckpointError):
  """A tensor does not have the shape that the model expects."""


class MissingTensorError(CheckpointError):
  """A tensor, file or metadata key that the model needs is missing."""


class UnexpectedTensorError(CheckpointError):
  """The checkpoint holds tensors that the model has no place for."""


class NonFiniteError(CheckpointError):
  """A tensor holds NaN or infinity."""


class PathEscapeError(CheckpointError):
  """A file name inside a checkpoint points outside its directory."""


class ChecksumError(CheckpointError):
  """A file does not have the hash that it is known by."""


class TokenizerError(CheckpointError):
  """The tokenizer is missing, malformed or does not fit the model."""


# ------------------------------ recipe, surgery ------------------------------


class RecipeError(GemmaExtError, ValueError):
  """A recipe, or one of its methods, is not valid."""


class UnmatchedRuleError(RecipeError):
  """A rule of the recipe matched no module; lists near misses."""


class GroupSizeError(RecipeError):
  """The group size does not fit the weight's input axis."""


class ParamsMismatchError(GemmaExtError, ValueError):
  """Parameters do not have the structure that model and recipe expect."""


class BackendError(GemmaExtError, RuntimeError):
  """An operation was asked to run where it cannot."""


class ShapeError(GemmaExtError, ValueError):
  """An array argument has the wrong shape or type."""


# ------------------------------ data, evaluation -----------------------------


class DataError(GemmaExtError, ValueError):
  """A text source cannot be read or holds too little."""


class OptionalDependencyError(GemmaExtError, ImportError):
  """A package of an optional extra is missing; says how to install it."""


# ------------------------------------ text -----------------------------------


class SamplingError(GemmaExtError, ValueError):
  """Text cannot be generated as it was asked to."""


# ---------------------------------- training ---------------------------------


class TrainError(GemmaExtError, ValueError):
  """Training cannot start or go on as it was asked to."""


class ConfigError(TrainError):
  """A training config is missing, malformed or holds a value out of range."""


class StateError(TrainError):
  """The state of an earlier run is damaged or belongs to another config."""


class RewardError(TrainError):
  """A reward function raised, or returned what is no number."""


class ProcessError(TrainError):
  """The processes of one run do not go together, or one of them is gone."""
