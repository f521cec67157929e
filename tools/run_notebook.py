# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Executes a notebook: `python -m tools.run_notebook IN.ipynb OUT.ipynb`."""

import argparse
import os
import pathlib

import nbclient
import nbformat


def execute(
  path: str | os.PathLike[str], *, timeout: int = 1800
) -> nbformat.NotebookNode:
  """Runs every cell in a kernel of this Python, in the notebook's folder.

  Args:
    path: The notebook.
    timeout: Seconds that one cell may take.

  Returns:
    The notebook with its outputs.

  Raises:
    nbclient.exceptions.CellExecutionError: If a cell raises.
  """
  path = pathlib.Path(path)
  notebook = nbformat.read(path, as_version=4)
  client = nbclient.NotebookClient(
    notebook,
    timeout=timeout,
    kernel_name='python3',
    resources={'metadata': {'path': str(path.parent)}},
  )
  return client.execute()


def printed(notebook: nbformat.NotebookNode) -> str:
  """Returns all that the cells wrote to their standard output."""
  return ''.join(
    output.text
    for cell in notebook.cells
    if cell.cell_type == 'code'
    for output in cell.outputs
    if output.output_type == 'stream' and output.name == 'stdout'
  )


def main() -> None:
  parser = argparse.ArgumentParser(description='Executes a notebook.')
  parser.add_argument('notebook', type=pathlib.Path)
  parser.add_argument('output', type=pathlib.Path, help='executed copy')
  args = parser.parse_args()
  notebook = execute(args.notebook)
  nbformat.write(notebook, args.output)
  print(printed(notebook))


if __name__ == '__main__':
  main()
