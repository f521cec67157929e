# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""What gensim's Wikipedia filter leaves, as readable paragraphs.

`gensim.corpora.wikicorpus.filter_wiki` removes templates, tables and links but
keeps headings, quotes for bold and italics, and lists.
"""

import html
import re

_HEADING = re.compile(r'^\s*(={2,6})\s*(.*?)\s*\1\s*$')
_QUOTES = re.compile(r"'{2,5}")
_MARKUP = re.compile(r'^\s*(?:[*#:;|!{}]|</?\w|\w+\s*=)')
_TAG = re.compile(r'</?\w[^<>]*>')
_SPACES = re.compile(r'[^\S\n]+')
# What a removed template or formula leaves: "(, )", "( )", " ,".
_HOLLOW = re.compile(r'\(\s*(?:[,;:]\s*)*\)')
_LEADING = re.compile(r'\(\s*[,;]\s*')
_BEFORE = re.compile(r'\s+([,.;:)])(?=\s|$)')
# Table cells and captions lack it; a colon announces a list that is gone.
_SENTENCE = re.compile(r"[.!?…][\"')\]”’]*$")
_APPENDICES = frozenset(
  (
    'bibliography',
    'citations',
    'external links',
    'footnotes',
    'further reading',
    'notes',
    'references',
    'see also',
    'sources',
    'works cited',
  )
)


def prose(text: str) -> str:
  """Returns paragraphs separated by blank lines, headings on their own line.

  Lists, remains of tables and the appendices (references, links) are dropped,
  and so are headings with no paragraph of their own.
  """
  blocks: list[tuple[bool, str]] = []  # (is heading, text)
  appendix = 0  # Level of the appendix that is being skipped.
  for line in text.splitlines():
    if heading := _HEADING.match(line):
      level = len(heading[1])
      title = _clean(heading[2])
      if appendix and level > appendix:
        continue
      appendix = level if title.casefold() in _APPENDICES else 0
      if not appendix and title:
        while blocks and blocks[-1][0]:
          blocks.pop()
        blocks.append((True, title))
    elif not appendix and not _MARKUP.match(line):
      paragraph = _clean(line)
      if _SENTENCE.search(paragraph) and '|' not in paragraph:
        blocks.append((False, paragraph))
  while blocks and blocks[-1][0]:
    blocks.pop()
  return '\n\n'.join(block for _, block in blocks)


def _clean(text: str) -> str:
  text = _TAG.sub('', html.unescape(_QUOTES.sub('', text)))
  text = _HOLLOW.sub('', text)
  text = _LEADING.sub('(', text)
  text = _BEFORE.sub(r'\1', text)
  return _SPACES.sub(' ', text).strip()
