"""The thoughts of a response, which reward models do not score."""

from __future__ import annotations

import re

_THINKING = re.compile(r'<think>(.*?)</think>(.*)', re.DOTALL)


def strip_thinking(text: str) -> str:
  """Return the text after the first `</think>` that follows the first `<think>`, stripped; without such tags, the text unchanged.

  This is the official rule: POLAR's reward function searches anywhere in the response (re.search), so words before `<think>` are
  dropped too, and later tags stay. In one case it is extended: where a chat template ends the prompt with `<think>`, the response has only
  `</think>`, and what follows it is returned. A response cut while thinking is scored whole.
  """
  if match := _THINKING.search(text):
    return match.group(2).strip()
  _, tag, answer = text.partition('</think>')
  return answer.strip() if tag else text
