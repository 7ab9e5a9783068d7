"""Text of users in UTF-8, and what is said of any other encoding."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from polar_jax.checkpoints.pretrained import open_pretrained
from polar_jax.data.chat import ChatTemplate
from polar_jax.data.special_tokens import read_json
from polar_jax.runtime import text_files
from polar_jax.scaling import results
from polar_jax.types import UserError

WESTERN = 'Café society, naïve façade: 5 €\n' * 30
RUSSIAN = (  # all happy families are alike
  '\u0412\u0441\u0435 \u0441\u0447\u0430\u0441\u0442\u043b\u0438\u0432\u044b\u0435 '
  '\u0441\u0435\u043c\u044c\u0438 \u043f\u043e\u0445\u043e\u0436\u0438 '
  '\u0434\u0440\u0443\u0433 \u043d\u0430 \u0434\u0440\u0443\u0433\u0430\n'
) * 30
JAPANESE = 'むかしむかし、あるところに、おじいさんとおばあさんが住んでいました。\n' * 10
KOREAN = '옛날 옛적에 호랑이가 담배 피우던 시절에\n' * 10
CHINESE = '很久以前在一座大山里住着一位老人\n' * 10

OTHERS = [
  (WESTERN, 'cp1252', 'WINDOWS-1252'),
  (WESTERN, 'utf-16', 'UTF-16'),
  (WESTERN, 'utf-16-le', 'UTF-16LE'),
  (WESTERN, 'utf-16-be', 'UTF-16BE'),
  (WESTERN, 'utf-32', 'UTF-32'),
  (WESTERN, 'utf-32-be', 'UTF-32BE'),
  ('plain ASCII, one byte a letter\n' * 9, 'utf-16-le', 'UTF-16LE'),
  ('hi', 'utf-16', 'UTF-16'),
  ('a' * 100_000 + WESTERN, 'cp1252', 'WINDOWS-1252'),
  (RUSSIAN, 'cp1251', 'WINDOWS-1251'),
  (JAPANESE, 'shift_jis', 'SHIFT-JIS'),
  (JAPANESE, 'utf-16', 'UTF-16'),
  (KOREAN, 'euc_kr', 'EUC-KR'),
  (CHINESE, 'gb18030', 'GB18030'),
]


@pytest.mark.parametrize(('text', 'encoding', 'named'), OTHERS)
def test_the_encoding_is_named_and_the_advice_helps(tmp_path, text, encoding, named):
  path = tmp_path / 'a.txt'
  path.write_bytes(text.encode(encoding))
  with pytest.raises(text_files.TextError) as caught:
    text_files.read_text(path)
  message = str(caught.value)
  assert message.startswith(f'{path}: not UTF-8') and f'it seems to be {named}:' in message
  assert '\n' not in message and len(message) < 500
  command = re.search(r'iconv -f \S+ -t UTF-8', message).group().split()
  if shutil.which('iconv'):
    path.write_bytes(subprocess.run([*command, str(path)], check=True, capture_output=True).stdout)
    assert text_files.read_text(path) == text


@pytest.mark.parametrize('text', ['', 'a', 'ab\n', 'é', 'zero \0 byte', '日本', WESTERN, RUSSIAN])
def test_utf_8_is_read_with_and_without_a_mark(tmp_path, text):
  path = tmp_path / 'a.txt'
  for content in (text.encode(), b'\xef\xbb\xbf' + text.encode()):
    path.write_bytes(content)
    assert text_files.read_text(path) == text
  path.write_bytes(text.replace('\n', '\r\n').encode())
  assert text_files.read_text(path) == text


def test_binary_data_is_not_taken_for_text(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_bytes(bytes(range(256)) * 10)
  with pytest.raises(text_files.TextError, match='seems to be binary data'):
    text_files.read_text(path)


def test_all_readers_name_the_encoding(tmp_path):
  table = 'parameters,tokens,flops,loss,note é\n1e6,1e7,1e14,0.6,é\n'
  for encoding, named in {'cp1252': 'WINDOWS-1252', 'utf-16': 'UTF-16'}.items():
    files = {'r.csv': table, 'chat_template.jinja': '{{ messages }} é', 'config.json': '{"a": "é"}', 'tokenizer_config.json': '{"b": "é"}'}
    for name, text in files.items():
      (tmp_path / name).write_bytes(text.encode(encoding))
    for read in (
      lambda: results.read(tmp_path / 'r.csv'),
      lambda: results.read_table(tmp_path / 'r.csv'),
      lambda: ChatTemplate.from_folder(tmp_path),
      lambda: read_json(tmp_path / 'config.json'),
      lambda: open_pretrained(tmp_path),
    ):
      with pytest.raises(UserError, match=f'not UTF-8.*it seems to be {named}'):
        read()
    (tmp_path / 'tokenizer_config.json').unlink()
    with pytest.raises(UserError, match=f'chat_template.jinja: not UTF-8.*it seems to be {named}'):
      ChatTemplate.from_folder(tmp_path)


@pytest.mark.data
def test_the_reported_files(data_folder):
  for name, named in {'fit/latin1.csv': 'WINDOWS-1252', 'fit/u16.csv': 'UTF-16'}.items():
    with pytest.raises(UserError, match=f'it seems to be {named}'):
      results.read(data_folder / 'cases' / name)
  for name, named in {'text/latin1.txt': 'WINDOWS-1252', 'text/u16.txt': 'UTF-16'}.items():
    with pytest.raises(text_files.TextError, match=f'it seems to be {named}'):
      text_files.read_text(data_folder / 'cases' / name)
  assert text_files.read_text(data_folder / 'cases/text/bom.txt').startswith('some text')
