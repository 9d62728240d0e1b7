"""Ask a language model for its judgement, over an OpenAI-compatible server, such as `vllm serve`.

What is judged is hostile text. It may tell the judge what to say, and a policy that is paid for it will find out how.
So a judge's prompt should mark where that text begins and ends, and completions should be read by a person now and
then. The reply is never run: one number is looked for in it.
"""

import asyncio
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import regex

from bae import event_loop
from bae.errors import NoAnswer, UserError
from bae.text.direct import check_reference
from bae.text.short_answers import folded
from bae.text.templates import PLACE, filled
from bae.text.verdict import Verdict
from bae.text.workers import Pair, Pending

AGAIN = (408, 409, 425, 429)
"""Statuses that are worth another try, beside those of 500 and more."""
PAUSE = 0.5
"""Seconds before the second try; twice as many before the third, and so on."""


class Judge:
    """Ask for a score between 0 and 1. Equal questions are asked once.

    Args:
        url: of the server, with the version: http://localhost:8000/v1.
        model: its name there.
        prompt: with places such as {question}, {reference}, {answer}.
        pattern: a regular expression whose last match in the reply has the score as its first group.
        lowest, highest: the scores that mean 0 and 1.
        max_tokens: of a reply.
        temperature: of a reply.
        tries: how often a call is made, if the server does not answer or has too much to do.
        key_variable: the environment variable that holds the server's key; none needs to be set.
        log: a file for all replies, one JSON object in each line; those that it has are not asked for again. None for
            no file.

    Raises:
        ValueError: for an option that cannot work.
    """

    def __init__(
        self,
        url: str,
        model: str,
        prompt: str,
        pattern: str,
        lowest: float = 0.0,
        highest: float = 1.0,
        max_tokens: int = 256,
        temperature: float = 0.0,
        tries: int = 3,
        key_variable: str = "JUDGE_API_KEY",
        log: str | None = None,
    ) -> None:
        if not lowest < highest:
            raise ValueError(f"judge.lowest={lowest}: must be below judge.highest={highest}")
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"judge.url={url}: must begin with http:// or https://, as in http://localhost:8000/v1")
        if tries < 1 or max_tokens < 1:
            raise ValueError(f"judge.tries={tries}, judge.max_tokens={max_tokens}: must be 1 or more")
        try:
            self._pattern = regex.compile(pattern)
        except regex.error as error:
            raise ValueError(f"judge.pattern={pattern}: {error}") from error
        if not self._pattern.groups:
            raise ValueError(f"judge.pattern={pattern}: must have a group, in parentheses, around the score")
        self.places = frozenset(PLACE.findall(prompt))
        if not self.places:
            raise ValueError("judge.prompt has no place such as {answer}, so the judge would see nothing; write one")
        self.url, self.model, self.prompt, self.tries = url.rstrip("/"), model, prompt, tries
        self.lowest, self.highest = lowest, highest
        self.options = {"max_tokens": max_tokens, "temperature": temperature}
        self.key_variable = key_variable
        self._log = None if log is None else Path(log)
        self._replies: dict[str, str] | None = None

    async def score(self, values: Mapping[str, str]) -> float:
        """Return the judge's score, from 0 to 1.

        Args:
            values: {place of the prompt: text}.

        Raises:
            NoAnswer: if the server does not answer, or the reply has no score from `lowest` to `highest`.
            UserError: one sentence, if the server refuses the request.
        """
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": filled(self.prompt, values)}],
            **self.options,
        }
        key = hashlib.sha256(json.dumps([self.url, body]).encode()).hexdigest()
        if self._replies is None:
            self._replies = self._logged()
        if key in self._replies:
            return self._read(self._replies[key])
        reply = await self._ask(body)
        score = self._read(reply)
        self._replies[key] = reply
        if self._log is not None:
            entry = {"key": key, "score": score, "reply": reply} | dict(values)
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        return score

    def _read(self, reply: str) -> float:
        """Return the score of a reply. Raises NoAnswer if it has none."""
        try:
            found = list(self._pattern.finditer(reply, timeout=1.0))
            score = float(found[-1][1])
        except (IndexError, TypeError, ValueError, TimeoutError) as error:
            raise NoAnswer(f"the judge's reply has no score: {reply[:200]!r}") from error
        if not self.lowest <= score <= self.highest:
            raise NoAnswer(f"the judge gave {score:g}, which is not from {self.lowest:g} to {self.highest:g}")
        return (score - self.lowest) / (self.highest - self.lowest)

    async def _ask(self, body: Mapping[str, Any]) -> str:
        """Return the reply to a request, after as many tries as it needs. Raises as `score` does."""
        import aiohttp

        key = os.environ.get(self.key_variable)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        said = ""
        for number in range(self.tries):
            if number:
                await asyncio.sleep(PAUSE * 2 ** (number - 1))
            try:
                address = f"{self.url}/chat/completions"
                async with aiohttp.request("POST", address, json=body, headers=headers) as response:
                    text = await response.text()
                    if response.status < 400:
                        return str(json.loads(text)["choices"][0]["message"]["content"] or "")
                    said = f"status {response.status}: {' '.join(text.split())[:200]}"
                    if response.status < 500 and response.status not in AGAIN:
                        raise UserError(
                            f"judge.url={self.url}: the server refused the request ({said}); correct judge.url, "
                            f"judge.model={self.model} or the key in ${self.key_variable}"
                        )
            except (aiohttp.ClientError, OSError) as error:
                said = f"{type(error).__name__}: {error}"
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise NoAnswer(f"the server {self.url} answered in another form than OpenAI's: {error!r}") from error
        raise NoAnswer(f"the server {self.url} did not answer ({said})")

    def _logged(self) -> dict[str, str]:
        """Return {key: reply} of the log. A line that was cut off by the end of a run is passed over."""
        found = {}
        for line in self._log.read_text(encoding="utf-8").splitlines() if self._log and self._log.is_file() else ():
            try:
                entry = json.loads(line)
                found[entry["key"]] = entry["reply"]
            except (ValueError, KeyError, TypeError):
                continue
        return found


class JudgeVerifier:
    """Let a judge decide whether an answer means the same as the reference.

    An answer is CORRECT if its score is `threshold` or more, else WRONG. If the judge does not answer in time, the
    verdict is TIMEOUT. Blank answers and longer ones than `max_chars` are UNPARSEABLE, and no judge is asked about
    them, nor about an answer that equals the reference but for case and white space: it is CORRECT.

    Args:
        judge: has a prompt with {answer} and {reference}, and no other place.
        threshold: of the score, above 0 and at most 1.
        timeout: the most seconds for one answer, with all tries.
        at_once: how many answers are asked about at a time.
        max_chars: the most characters that an answer may have.

    Raises:
        ValueError: for an option that cannot work; from the methods, for a blank reference.
        UserError: from the verdicts, if the server refuses the request.
    """

    def __init__(
        self, judge: Judge, threshold: float = 0.5, timeout: float = 60.0, at_once: int = 64, max_chars: int = 1000
    ) -> None:
        if judge.places != {"answer", "reference"}:
            raise ValueError("verifier.judge.prompt: must have the places {answer} and {reference}, and no other")
        if not (0 < threshold <= 1 and 0 < timeout < float("inf") and at_once > 0 and max_chars > 0):
            raise ValueError(
                f"verifier.threshold={threshold}, verifier.timeout={timeout}, verifier.at_once={at_once}, "
                f"verifier.max_chars={max_chars}: all must be above 0, and the threshold at most 1"
            )
        self.judge, self.threshold, self.timeout, self.max_chars = judge, threshold, timeout, max_chars
        self._room = asyncio.Semaphore(at_once)
        self._running: set[Future[Verdict]] = set()

    def submit(self, pairs: Sequence[Pair]) -> Pending:
        """Begin to ask about (answer, reference) pairs, without waiting. Raises ValueError for a blank reference."""
        begun = [self._begin(answer.strip(), reference.strip()) for answer, reference in pairs]

        def verdicts() -> list[Verdict]:
            return [each if isinstance(each, Verdict) else _result(each) for each in begun]

        return verdicts

    def verify(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """Ask about (answer, reference) pairs, and wait for the verdicts. Raises ValueError for a blank reference."""
        return self.submit(pairs)()

    def equivalent(self, pairs: Sequence[Pair]) -> list[bool]:
        """Tell for each pair of answers whether they are equal but for case and white space. No judge is asked."""
        return [folded(one) == folded(other) for one, other in pairs]

    def fault(self, reference: str) -> str | None:
        """Return why a text cannot be a reference; None if it can be one."""
        return None if reference.strip() else "it is blank"

    def close(self) -> None:
        """Drop what is still being asked."""
        for future in list(self._running):
            future.cancel()

    def _begin(self, answer: str, reference: str) -> "Verdict | Future[Verdict]":
        check_reference(self, reference)
        if not answer or len(answer) > self.max_chars:
            return Verdict.UNPARSEABLE
        if folded(answer) == folded(reference):
            return Verdict.CORRECT
        future = event_loop.start(self._verdict(answer, reference))
        self._running.add(future)
        future.add_done_callback(self._running.discard)
        return future

    async def _verdict(self, answer: str, reference: str) -> Verdict:
        async with self._room:
            try:
                async with asyncio.timeout(self.timeout):
                    score = await self.judge.score({"answer": answer, "reference": reference})
            except (NoAnswer, TimeoutError):
                return Verdict.TIMEOUT
        return Verdict.CORRECT if score >= self.threshold else Verdict.WRONG


def _result(future: Future[Verdict]) -> Verdict:
    """Return a verdict, once it is there. One whose question was dropped is TIMEOUT."""
    try:
        return future.result()
    except CancelledError:
        return Verdict.TIMEOUT
