import { EXAMPLES } from './examples.js';

const $ = (id) => document.getElementById(id);
const MOST_TOKENS = 1000; // shown at first: a page with more spans becomes slow

/** Make an element with a class and children; strings become text, never markup. */
function make(tag, className = '', ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

const format = (reward) => (reward < 0 ? '\u2212' : '') + Math.abs(reward).toFixed(3);
const shorten = (text, most = 90) => {
  const line = text.replace(/\s+/g, ' ').trim() || '(empty)';
  return line.length > most ? line.slice(0, most) + '\u2026' : line;
};

/** Return the places that rewards take from the highest down; equal ones share a place. */
const ranks = (rewards) => rewards.map((reward) => 1 + rewards.filter((other) => other > reward).length);

/** Return the words of a text in an order that looks random and is always the same. */
function shuffled(text) {
  const words = text.split(/\s+/).filter(Boolean);
  let state = 20240217;
  for (let i = words.length - 1; i > 0; i--) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    const j = state % (i + 1);
    [words[i], words[j]] = [words[j], words[i]];
  }
  return words.join(' ');
}

async function ask(path, body) {
  const headers = { 'Content-Type': 'application/json' };
  if ($('token').value) headers.Authorization = `Bearer ${$('token').value}`;
  let response;
  try {
    response = await fetch(path, { method: 'POST', headers, body: JSON.stringify(body) });
  } catch {
    throw new Error('The server does not answer.');
  }
  const reply = await response.json().catch(() => ({}));
  if (response.ok) return reply;
  if (response.status === 401) throw new Error('This server wants its token: see Options.');
  throw new Error(reply.error?.message ?? `The server replied with status ${response.status}.`);
}

function addCandidate(text = '') {
  const item = make('li');
  const area = make('textarea');
  area.rows = 2;
  area.value = text;
  area.spellcheck = false;
  const remove = make('button', 'quiet', '\u00d7');
  remove.type = 'button';
  remove.addEventListener('click', () => {
    const next = item.nextElementSibling ?? item.previousElementSibling;
    item.remove();
    number();
    (next?.querySelector('textarea') ?? $('add')).focus();
  });
  item.append(make('b'), area, remove);
  $('candidates').append(item);
  number();
  return area;
}

function number() {
  [...$('candidates').children].forEach((item, i) => {
    item.querySelector('b').textContent = i + 1;
    item.querySelector('textarea').setAttribute('aria-label', `Candidate ${i + 1}`);
    item.querySelector('button').setAttribute('aria-label', `Remove candidate ${i + 1}`);
  });
}

function fill(example) {
  $('prompt').value = example.prompt;
  $('reference').value = example.reference;
  $('candidates').replaceChildren();
  example.candidates.forEach((text) => addCandidate(text));
}

function say(text, wrong = false) {
  $('status').textContent = text;
  $('status').classList.toggle('wrong', wrong);
}

function showBars(outputs, reply) {
  const { rewards, tokens, truncated } = reply;
  const places = ranks(rewards);
  const low = Math.min(0, ...rewards), high = Math.max(0, ...rewards);
  const part = (reward) => (100 * (reward - low)) / (high - low || 1);
  const order = rewards.map((_, i) => i).sort((a, b) => rewards[b] - rewards[a] || a - b);
  $('bars').replaceChildren(...order.map((i) => {
    const bar = make('i', rewards[i] < 0 ? 'below' : '');
    bar.style.left = `${part(Math.min(0, rewards[i]))}%`;
    bar.style.width = `${Math.abs(part(rewards[i]) - part(0))}%`;
    const zero = make('u');
    zero.style.left = `${part(0)}%`;
    const track = make('div', 'track', bar, zero);
    track.setAttribute('aria-hidden', 'true');
    const facts = make('span', 'facts', `candidate ${i + 1}, ${tokens[i].toLocaleString('en')} tokens`);
    if (truncated[i]) facts.append(', ', make('strong', '', 'cut to the model\u2019s length'));
    const text = make('span', 'text', shorten(outputs[i]));
    text.title = outputs[i];
    return make('li', places[i] === 1 ? 'first' : '', make('span', 'rank', `${places[i]}.`), text,
      make('span', 'value', format(rewards[i])), track, facts);
  }));
  $('scale').textContent = `Bars start at zero; the scale is ${format(low)} to ${format(high)}. Rewards compare answers to one prompt, ` +
    `not answers to different ones. ${reply.exact ? 'Scored exactly: no reward depends on the others.' : ''}`;
}

function showEffect(outputs, replies) {
  const names = ['Reference', 'None', 'Shuffled'];
  const head = make('tr', '', make('th', '', 'Candidate'), ...names.map((name) => make('th', '', name)));
  head.querySelectorAll('th').forEach((cell) => { cell.scope = 'col'; });
  const places = replies.map((reply) => ranks(reply.rewards));
  const rows = outputs.map((output, i) => {
    const name = make('th', '', `${i + 1}. ${shorten(output, 40)}`);
    name.scope = 'row';
    return make('tr', '', name, ...replies.map((reply, r) =>
      make('td', places[r][i] === 1 ? 'top' : '', format(reply.rewards[i]), make('span', '', `#${places[r][i]}`))));
  });
  $('effect').replaceChildren(make('thead', '', head), make('tbody', '', ...rows));
}

function showTokens(sequence) {
  const span = ({ id, text, part }) => {
    const element = make('span', part, text.replaceAll('\n', '\u21b5\n').replaceAll('\t', '\u21e5') || '\u2205');
    element.title = `id ${id}`;
    return element;
  };
  const spans = sequence.tokens.map(span);
  const cut = [sequence.truncated.prompt && 'the beginning of the prompt', sequence.truncated.responses && 'the end of an answer'].filter(Boolean);
  const facts = make('p', '', `${spans.length.toLocaleString('en')} tokens. ${cut.length ? `Cut off: ${cut.join(' and ')}.` : 'Nothing is cut off.'}`);
  if (spans.length <= MOST_TOKENS) {
    $('tokens').replaceChildren(facts, ...spans);
    return;
  }
  const half = MOST_TOKENS / 2;
  const more = make('button', 'quiet', `Show ${(spans.length - MOST_TOKENS).toLocaleString('en')} more`);
  more.type = 'button';
  more.addEventListener('click', () => { more.replaceWith(...spans.slice(half, -half)); $('tokens').focus(); });
  $('tokens').replaceChildren(facts, ...spans.slice(0, half), more, ...spans.slice(-half));
}

let shown = null; // what the results on the page belong to

async function readTokens() {
  const request = shown;
  const index = Number($('choice').value);
  try {
    const reply = await ask('template', { ...request, outputs: [request.outputs[index]] });
    if (request === shown && index === Number($('choice').value)) showTokens(reply.sequences[0]);
  } catch (error) {
    $('tokens').replaceChildren(make('p', '', error.message));
  }
}

let scoring = false;

async function score() {
  if (scoring) return;
  const outputs = [...$('candidates').querySelectorAll('textarea')].map((area) => area.value);
  if (!outputs.length) {
    say('Add a candidate first.', true);
    return;
  }
  const wrapper = document.querySelector('input[name=wrapper]:checked').value;
  const request = { prompt: $('prompt').value, reference: $('reference').value, outputs, wrapper };
  const references = [request.reference, '', shuffled(request.reference)];
  scoring = true;
  $('score').setAttribute('aria-disabled', 'true');
  say('Scoring\u2026');
  try {
    const replies = await ask('score', references.map((reference) => ({ ...request, reference })));
    shown = request;
    showBars(outputs, replies[0]);
    showEffect(outputs, replies);
    $('choice').replaceChildren(...outputs.map((output, i) => {
      const option = make('option', '', `${i + 1}. ${shorten(output, 60)}`);
      option.value = i;
      return option;
    }));
    const best = replies[0].rewards.indexOf(Math.max(...replies[0].rewards));
    $('choice').value = best;
    $('rewards').hidden = false;
    $('model').textContent = `Model: ${replies[0].model}`;
    say(`Candidate ${best + 1} is the best of ${outputs.length}, with ${format(replies[0].rewards[best])}.`);
    await readTokens();
  } catch (error) {
    $('rewards').hidden = true;
    say(error.message, true);
  } finally {
    scoring = false;
    $('score').removeAttribute('aria-disabled');
  }
}

$('legend').append(make('span', 'context', 'prompt and reference'), make('span', 'own', 'prompt and candidate'),
  make('span', 'control', 'control token'), 'The reward is read at the last one.');
EXAMPLES.forEach((example) => {
  const button = make('button', 'quiet', example.name);
  button.type = 'button';
  button.addEventListener('click', () => { fill(example); score(); });
  document.querySelector('.examples').append(button);
});
$('add').addEventListener('click', () => addCandidate().focus());
$('choice').addEventListener('change', readTokens);
$('form').addEventListener('submit', (event) => { event.preventDefault(); score(); });
document.addEventListener('keydown', (event) => {
  if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) { event.preventDefault(); score(); }
});
fill(EXAMPLES[0]);
