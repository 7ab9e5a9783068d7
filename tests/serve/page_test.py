"""The page, in a browser that runs it: against a real server, by keyboard, in light and dark."""

from __future__ import annotations

import re
import shutil

import pytest

pytestmark = pytest.mark.needs('uvicorn')

INJECTION = '<img src=x onerror="document.title=1">'

# Elements whose text has too little contrast with what is behind it (WCAG 2.2, 1.4.3), and controls without a name.
CONTRAST = """() => {
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => { const [r, g, b] = rgb.map((v) => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = (e) => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c.slice(0, 3); } return [255, 255, 255]; };
  const found = [];
  for (const e of document.querySelectorAll('body *')) {
    if (!e.checkVisibility() || ![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
    const [a, b] = [light(parse(getComputedStyle(e).color).slice(0, 3)), light(behind(e))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) found.push(`${e.tagName}.${e.className}: ${e.textContent.slice(0, 30)}`);
  }
  return found;
}"""
NAMELESS = """() => [...document.querySelectorAll('button, textarea, select, input')].filter((e) => e.checkVisibility())
  .filter((e) => !(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim())).map((e) => e.outerHTML.slice(0, 80))"""


@pytest.fixture(scope='module')
def browser():
  from playwright.sync_api import sync_playwright

  found = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
  with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=found, args=['--no-sandbox'])
    yield browser
    browser.close()


@pytest.fixture
def visit(browser):
  """Return a function that opens a page, which must report no error and load nothing from elsewhere.

  Its policy forbids eval, and so the `wait_for_function` of playwright.
  """
  problems, contexts = [], []

  def open_page(address, **settings):
    contexts.append(browser.new_context(viewport={'width': 1280, 'height': 900}, **settings))
    opened = contexts[-1].new_page()
    # The browser itself logs replies of other status than 200, which the tests provoke.
    opened.on('console', lambda message: problems.append(message.text) if 'status of 4' not in message.text else None)
    opened.on('pageerror', lambda error: problems.append(str(error)))
    opened.on('request', lambda request: None if request.url.startswith(address) else problems.append(request.url))
    opened.goto(address)
    opened.wait_for_selector('#candidates textarea')
    return opened

  yield open_page
  for context in contexts:
    context.close()
  assert problems == []


def test_every_file_is_served_with_a_strict_policy(exact_server):
  client = exact_server.client
  for path in ('/', '/page/style.css', '/page/page.js', '/page/examples.js', '/page/icon.svg'):
    reply = client.get(path)
    assert reply.status == 200 and "default-src 'none'" in reply.headers['content-security-policy'], path
    assert 'unsafe' not in reply.headers['content-security-policy'] and reply.headers['x-content-type-options'] == 'nosniff'
  html = client.get('/').body
  assert html.startswith('<!doctype html>') and '//' not in re.sub('<!doctype html>', '', html)
  assert not re.search(r'<script(?![^>]*src=)|\son\w+=|\sstyle=', html)
  assert client.get('/page/../server.py').status == 404


def numbers(texts):
  return [float(text.replace('\u2212', '-')) for text in texts]


@pytest.mark.needs('playwright')
def test_the_whole_page_by_keyboard(exact_server, visit):
  address = exact_server.server.address
  opened = visit(address)
  prompt, reference = opened.input_value('#prompt'), opened.input_value('#reference')
  opened.focus('#add')
  opened.keyboard.press('Enter')
  opened.keyboard.type(INJECTION)  # the new candidate has the focus
  opened.keyboard.press('Control+Enter')
  opened.wait_for_selector('#tokens span')
  outputs = [area.input_value() for area in opened.query_selector_all('#candidates textarea')]
  assert len(outputs) == 5 and outputs[-1] == INJECTION
  score = lambda text: exact_server.client.post('/score', {'prompt': prompt, 'reference': text, 'outputs': outputs}).body
  reply = score(reference)
  order = sorted(range(5), key=lambda i: -reply['rewards'][i])
  assert numbers(opened.locator('#bars .value').all_inner_texts()) == [round(reply['rewards'][i], 3) for i in order]
  assert opened.locator('#bars .rank').all_inner_texts() == ['1.', '2.', '3.', '4.', '5.']
  facts = opened.locator('#bars .facts').all_inner_texts()
  for place, i in enumerate(order):
    assert facts[place].startswith(f'candidate {i + 1}, {reply["tokens"][i]} tokens') and ('cut' in facts[place]) == reply['truncated'][i]
  assert opened.inner_text('#status').startswith(f'Candidate {order[0] + 1} is the best of 5')
  cells = [re.match(r'[\u2212\d.]+', text).group() for text in opened.locator('#effect td').all_inner_texts()]
  shuffled = numbers(cells[2::3])
  assert numbers(cells[0::3]) == [round(r, 3) for r in reply['rewards']]
  assert numbers(cells[1::3]) == [round(r, 3) for r in score('')['rewards']]
  assert shuffled != numbers(cells[0::3]) and shuffled != numbers(cells[1::3])
  described = exact_server.client.post('/template', {'prompt': prompt, 'reference': reference, 'outputs': [outputs[order[0]]]}).body
  spans = opened.locator('#tokens span').all_text_contents()
  assert len(spans) == len(described['sequences'][0]['tokens']) and spans[0] == '<s>' and spans[-1] == '[UNUSED_TOKEN_130]'
  assert opened.title() == 'POLAR reward model'  # nothing of the candidate has run
  # Another candidate's tokens, and one candidate less.
  opened.focus('#choice')
  opened.select_option('#choice', '4')
  opened.locator('#tokens', has_text='onerror').wait_for()
  opened.focus('#candidates li:nth-child(1) button')
  opened.keyboard.press('Enter')
  assert opened.locator('#candidates textarea').count() == 4
  assert opened.evaluate("document.activeElement.getAttribute('aria-label')") == 'Candidate 1'


@pytest.mark.needs('playwright')
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_text_can_be_read_and_controls_have_names(exact_server, visit, scheme):
  opened = visit(exact_server.server.address, color_scheme=scheme)
  opened.evaluate("document.querySelector('details').open = true")
  opened.click('.examples button:nth-of-type(2)')
  opened.wait_for_selector('#tokens span')
  assert opened.evaluate(CONTRAST) == [] and opened.evaluate(NAMELESS) == []
  opened.set_viewport_size({'width': 360, 'height': 800})
  assert opened.evaluate('document.documentElement.scrollWidth') <= 360  # nothing sticks out of a telephone


@pytest.mark.needs('playwright')
def test_errors_are_said_on_the_page(serve, visit):
  with serve(token='secret') as server:
    opened = visit(server.server.address)
    opened.click('#score')
    opened.locator('#status', has_text='wants its token').wait_for()
    opened.evaluate("document.querySelector('details').open = true")
    opened.fill('#token', 'secret')
    opened.fill('#prompt', 'x' * 1_000_001)
    opened.click('#score')
    opened.locator('#status', has_text='serve.max_characters').wait_for()
    assert opened.is_hidden('#rewards')
    opened.fill('#prompt', 'x')
    opened.keyboard.press('Control+Enter')
    opened.wait_for_selector('#tokens span')
