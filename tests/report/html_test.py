"""report.html is one page that loads nothing and runs nothing."""

from __future__ import annotations

import base64
from html.parser import HTMLParser

import pytest

from polar_jax.report import html, report

PNG = b'\x89PNG\r\n\x1a\n' + b'\0\0\0\rIHDR' + (975).to_bytes(4, 'big') + b'and so on'
TABLE = '| name | n |\n| --- | ---: |\n| a | 1 |'


class Page(HTMLParser):
  """Tags with their attributes, text, and a check that tags are nested properly."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.text, self._open = [], [], []
    self.feed(text)
    assert not self._open

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in ('meta', 'img', 'br', 'hr'):
      self._open.append(tag)
    if tag == 'figure':
      assert 'p' not in self._open

  def handle_endtag(self, tag):
    assert self._open.pop() == tag

  def handle_data(self, data):
    self.text.append(data)

  def all(self, tag):
    return [attributes for name, attributes in self.tags if name == tag]


def loads_nothing(page):
  """Return whether no element refers to anything outside of the page."""
  links = [
    value for _, attributes in page.tags for name, value in attributes.items() if name in ('src', 'href', 'srcset', 'action', 'style')
  ]
  tags = {tag for tag, _ in page.tags}
  outside = [link for link in links if not link.startswith(('#', 'data:image/png;base64,', 'text-align'))]
  return not outside and not tags & {'script', 'link', 'iframe', 'object', 'embed', 'base', 'form'}


@pytest.fixture
def folder(tmp_path):
  (tmp_path / 'figures').mkdir()
  (tmp_path / 'figures' / 'a.png').write_bytes(PNG)
  return tmp_path


def test_figures_are_embedded_with_their_caption(folder):
  text = html.page('# R\n\n![The caption](figures/a.png)\n', folder, ['figures/a.png'])
  page = Page(text)
  (image,) = page.all('img')
  assert base64.b64decode(image['src'].removeprefix('data:image/png;base64,')) == PNG and image['alt'] == 'The caption'
  assert image['width'] == '624'  # 975 pixels at 150 per inch are 6.5 inches
  assert '<figcaption>The caption</figcaption>' in text and loads_nothing(page)


def test_headings_make_a_table_of_contents(folder):
  text = html.page('# Report\n\n## Time\n\n### By seed\n\n## Time\n', folder, [])
  page = Page(text)
  targets = [a['href'].removeprefix('#') for a in page.all('a')]
  assert targets[:2] == ['time', 'by-seed'] and len(set(targets)) == 3
  assert [h['id'] for tag in ('h2', 'h3') for h in page.all(tag)] == [targets[0], targets[2], targets[1]]
  assert '<title>Report</title>' in text


def test_tables_stay_tables_and_numbers_are_right_aligned(folder):
  page = Page(html.page(TABLE, folder, []))
  assert len(page.all('table')) == 1 and [cell.get('style') for cell in page.all('td')] == [None, 'text-align:right']


@pytest.mark.parametrize(
  'hostile',
  [
    '<script>alert(1)</script>',
    '<img src="https://evil/x.png" onerror=alert(1)>',
    '![x](https://evil/x.png)',
    '![x](../secret.png)',
    '[x](javascript:alert(1))',
    '<https://evil>',
    '[x][y]\n\n[y]: https://evil',
    '"><svg onload=alert(1)>',
  ],
)
@pytest.mark.parametrize('place', ['{}', '## {}', '| {} |\n| --- |\n| {} |', '- {}', '![{}](figures/a.png)', '`{}`'])
def test_untrusted_text_becomes_no_element(folder, hostile, place):
  (folder.parent / 'secret.png').write_bytes(b'secret')
  page = Page(html.page(place.replace('{}', hostile), folder, ['figures/a.png']))
  assert loads_nothing(page) and not {tag for tag, _ in page.tags} & {'script', 'svg'}
  assert base64.b64encode(b'secret').decode() not in str(page.tags)
  assert not [name for _, attributes in page.tags for name in attributes if name.startswith('on')]
  assert all(image['alt'] != 'x' for image in page.all('img'))


def test_the_page_forbids_the_browser_to_load_anything(folder):
  policies = [m['content'] for m in Page(html.page('# R', folder, [])).all('meta') if 'http-equiv' in m]
  assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
  assert 'prefers-color-scheme: dark' in html.page('# R', folder, [])


def test_the_report_is_written_as_a_page_with_the_same_content(tmp_path):
  value = {'accuracy': 0.7, 'low': 0.65, 'high': 0.75, 'n': 200, 'clusters': 30, 'clustered_by': 'prompt'}
  hostile = '<img src=https://evil/x.png> ![x](https://evil/x.png)'
  results = {'evaluate': {'by_split': {'validation': value}}, 'finetune': {'by_category': {hostile: value}}, 'timing': {'evaluate': 1.5}}
  report.write_report(tmp_path, results)
  text = (tmp_path / 'report.html').read_text()
  page = Page(text)
  assert loads_nothing(page) and len(page.all('img')) == 1
  shown = ''.join(page.text)
  assert hostile in shown and '70.0 [65.0, 75.0]' in shown and 'Intervals resample prompts (30 on validation)' in shown
  headings = [line.lstrip('# ') for line in (tmp_path / 'report.md').read_text().splitlines() if line.startswith('#')]
  assert all(heading in shown for heading in headings) and len(page.all('table')) == 3
