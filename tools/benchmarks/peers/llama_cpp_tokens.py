# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Token ids of varied strings, ours against llama.cpp's on the same file.

    python -m tools.benchmarks.peers.llama_cpp_tokens [--checkpoint=PATH.gguf]

Prints the mismatches and exits with 1 if there are any. Our tokenizers follow
the official ones: control tokens in the text become ids, except padding, end,
begin and unknown. So llama.cpp is asked with parse_special=True, and with
False for the strings that hold one of those four. Runs of U+2581 are left out:
SentencePiece cannot tell them from runs of spaces, llama.cpp can.
"""

import itertools
import json
import random
import sys

from absl import app
from absl import flags

from gemma_ext.ckpts import _gguf
from gemma_ext.ckpts import _gguf_header
from gemma_ext.ckpts import _model_classes
from gemma_ext.ckpts import _sample
from gemma_ext.ckpts import _vocab
from tools.benchmarks.peers import _llama_cpp

_CHECKPOINT = flags.DEFINE_string(
  'checkpoint', None, 'A GGUF file; the sample checkpoint by default.'
)
_JSON = flags.DEFINE_string('json', None, 'Where to write the result.')

_KEPT_AS_TEXT = ('<pad>', '<eos>', '<bos>', '<unk>')

_CODE = (
  'def f(x):\n    return x ** 2  # square\n\n\nclass A:\n\tpass\n',
  'for (int i = 0; i < n; ++i) { a[i] += b[i] * c; }\n',
  '#include <stdio.h>\nint main(void) { printf("%d\\n", 42); }\n',
  "SELECT * FROM t WHERE a >= 10 AND b LIKE '%x%' ORDER BY c;",
  '{"a": [1, 2, {"b": null}], "c": "d\\te"}',
  '<table><tr><td>1</td><td>2</td></tr></table><br/>',
  '<h1>Title</h1>\n<p>Text &amp; more</p>\n<!-- c -->',
  'fn main() -> Result<(), Box<dyn Error>> { Ok(()) }',
  'λx.x → ∀y∈ℝ: y² ≥ 0 ∧ ¬(1 ≡ 2 mod 3)',
  'import numpy as np\nx = np.zeros((3, 4), dtype=np.float32)\n',
  'grep -rn "foo\\s*bar" . | awk \'{print $1}\' > /dev/null 2>&1',
  'a=b;c==d;e===f;g!==h;i=>j;k->l;m::n;o||p&&q',
  '\\begin{equation} \\int_0^\\infty e^{-x^2} dx = \\frac{\\sqrt{\\pi}}{2}',
  'https://example.com/a/b?c=d&e=%20f#g',
  '\t\tif x:\n\t\t\treturn\n\t\t\t\t\t# deep',
  'x\r\ny\r\nz\r',
  '```python\nprint("hi")\n```\n',
  '| a | b |\n|---|---|\n| 1 | 2 |\n',
)
_LANGUAGES = (
  'The quick brown fox jumps over the lazy dog.',
  'Voix ambiguë d’un cœur qui au zéphyr préfère les jattes de kiwis.',
  'Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.',
  'El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia.',
  'いろはにほへと ちりぬるを わかよたれそ つねならむ。',
  '私は東京に住んでいます。昨日、友達とラーメンを食べました。',
  'ｶﾀｶﾅ　ひらがな　漢字　ＡＢＣ１２３',
  '我能吞下玻璃而不伤身体。機器學習',
  '다람쥐 헌 쳇바퀴에 타고파',
  'نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر',
  'דג סקרן שט בים מאוכזב ולפתע מצא חברה',
  'Съешь же ещё этих мягких французских булок, да выпей чаю',
  'ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश',
  'เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน',
  'Ξεσκεπάζω την ψυχοφθόρα βδελυγμία',
  'Pijamalı hasta yağız şoföre çabucak güvendi.',
  'Tiếng Việt có dấu: ắ ằ ẳ ẵ ặ',
  'አማርኛ ᏣᎳᎩ ᚠᛇᚻ 𓂀𓃠 𐍈 ꧁꧂',
  'a\u0301 \u00e1 n\u0303 \u00f1 \u1100\u1161 \uac00',
  '№ ™ ½ ² ﬁ ﬂ Ⅷ ㎏ ℃ ① ﷽',
)
_EMOJI = (
  '😀',
  '😀😃😄😁',
  'a😀b',
  '👨‍👩‍👧‍👦',
  '🏳️‍🌈',
  '👍🏽👍🏿',
  '🇩🇪🇯🇵🇫🇷',
  '❤️‍🔥',
  '1️⃣2️⃣',
  '🧑🏻‍🚀 to 🌙',
  '👩\u200d💻 codes',
  '\u200d',
  '\u200b\u200c\u200d\ufeff',
  '🫠🫨🪿',
  '\U0001f9d1\u200d\U0001f384',
)
_ODD = (
  '',
  ' ',
  '\n',
  '\t',
  '\r',
  '▁',
  ' a',
  'a ',
  ' a ',
  '\x00',
  'a\x00b',
  '\x01\x02\x7f',
  '\x1b[31mred\x1b[0m',
  '\u00a0\u2003\u3000',
  '\ufffd',
  '\U0010ffff',
  '\ue000\uf8ff',
  '\u0378',
  '\u2028\u2029',
  '\u202eabc\u202c',
  '<0x41>',
  '<0x0A><0xFF>',
  'ſtraße',
  '…—–‘’“”«»',
  '!!!???...',
  '((((()))))',
  '0123456789',
  '3.14159265358979',
  '1,234,567.89',
  '2026-11-23T18:57:04Z',
  'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa',
  'AbCdEfGhIjKlMnOp',
  'Donaudampfschifffahrtsgesellschaftskapitän',
  '\\',
  '\'"`',
  '~!@#$%^&*()',
  "don't can't I'll we've",
  'a\u0300\u0301\u0302\u0303\u0304',
  'Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́Ǫ̵̹̻̝̳͂̌̌͘!͖̬̰̙̗̿̋ͥͥ̂ͣ̐́́͜͞',
)
_CONTROL = (
  '<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n',
  '<start_of_turn>',
  'a<end_of_turn>b',
  ' <start_of_turn> ',
  '<unused0>',
  'x<unused7>y<unused98>',
  '<unused99><unused6241>',
  '<mask>',
  '[multimodal]',
  '<start_of_image>',
  '<end_of_image>',
  '<start_of_turn',
  'start_of_turn>',
  '<<start_of_turn>>',
  '<start_of_turn><start_of_turn>',
  '<end_of_turn>\n\n\n<start_of_turn>',
  '<unused12345>',
  '<unused 7>',
  '<bos>',
  'a <eos> b',
  '<pad><pad>',
  '<unk>',
  '<bos>Hello<eos>',
  'text <bos',
  'eos>',
)


def strings() -> list[str]:
  """Returns the strings that are compared, the same every time."""
  out = list(itertools.chain(_CODE, _LANGUAGES, _EMOJI, _ODD, _CONTROL))
  for n in (2, 3, 5, 8, 16, 30, 31, 32, 33, 63, 100):
    out += [' ' * n, '\n' * n, '\t' * n, 'a' + ' ' * n + 'b', 'é' * n]
    out += [' \n' * n, '\n ' * n]
  rng = random.Random(0)
  pools = [
    [chr(c) for c in range(32, 127)],
    list(' \n\t  ab01.,'),
    [chr(c) for c in range(0x3040, 0x30FF)],
    [chr(c) for c in range(0x600, 0x6FF)],
    [chr(c) for c in range(0x1F300, 0x1F6FF)] + ['\u200d', '\ufe0f'],
    [chr(c) for c in range(0x20, 0xD7FF)],
  ]
  for pool in pools:
    out += [''.join(rng.choices(pool, k=k)) for k in (3, 10, 40, 160)]
  return out


def main(argv: list[str]) -> None:
  del argv
  path = _CHECKPOINT.value or _sample.sample_path()
  with open(path, 'rb') as file:
    header = _gguf_header.read_header(file)
    hparams = _gguf.GgufSource(file, header).hparams
  tokenizer = _vocab.tokenizer_of(
    header.metadata,
    _model_classes.FAMILIES[hparams.family].tokenizer,
    max_tokens=hparams.vocab_size,
  )
  texts = strings()
  mismatches = []
  with _llama_cpp.LlamaCpp(path) as peer:
    for text in texts:
      special = not any(t in text for t in _KEPT_AS_TEXT)
      expected = peer.tokenize(text, parse_special=special)
      actual = list(map(int, tokenizer.encode(text)))
      if actual != expected:
        mismatches.append({'text': text, 'ours': actual, 'peer': expected})
        print(f'{text!r}\n  ours      {actual}\n  llama.cpp {expected}')
  print(f'{len(texts)} strings, {len(mismatches)} mismatches')
  if _JSON.value:
    with open(_JSON.value, 'w', encoding='utf-8') as file:
      json.dump({'strings': len(texts), 'mismatches': mismatches}, file)
  sys.exit(1 if mismatches else 0)


if __name__ == '__main__':
  app.run(main)
