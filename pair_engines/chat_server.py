"""Pairs that a chat model behind a server makes: any server that speaks the protocol of OpenAI's chat completions."""

import argparse
import email.utils
import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool

from files.console import InputError, warn
from files.reading import excerpt
from pair_engines.durable import GIVE_UP, Answer, Failure, Job, durable_rows
from pair_engines.outputs import partial_file
from pair_engines.templates import STILL_THINKING, chosen_templates, draw_jobs, instruction, without_thinking

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before the first try again, which doubles up to the longest
LONGEST_ASKED = 600.0  # seconds; a server that asks to wait for longer has shut the door
LONGEST_ANSWER = 2**24  # bytes
TRY_AGAIN = {408, 409, 425, 429}  # and all from 500 on
SETTINGS = ("url", "chat_model", "seed", "temperature", "top_p", "max_new_tokens")


def server_pairs(args: argparse.Namespace) -> Iterator[dict]:
    """A chat model behind a server rewrites each text once, following a template drawn at random for it.

    A text that fails with every try becomes a row with its error.
    """
    templates = chosen_templates(args)
    settings = {name: getattr(args, name) for name in SETTINGS} | {"templates": templates, "shard": args.shard}
    server = Server(args)  # checks the address
    return durable_rows(
        partial_file(args.out), draw_jobs(args, templates), settings, "server", lambda going_on: server.answers(templates, going_on)
    )


class RetryError(Exception):
    """A request that may succeed if it is tried again.

    wait     seconds that the server asks to wait, None where it does not say
    """

    def __init__(self, why: str, wait: float | None = None):
        super().__init__(why)
        self.wait = wait


class RefusedError(Exception):
    """A request that will always fail, though others may not."""


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """The key goes to the server that was named, and to no other."""

    def redirect_request(self, *_):
        return None


class Server:
    """An endpoint, and how it is asked: so many requests at once, each tried again a few times, none before the server allows it."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.url = args, completions_url(args.url)
        self.opener = urllib.request.build_opener(NoRedirects)
        self.not_before, self.stopped = 0.0, threading.Event()
        self.no_answer_yet = threading.Lock()  # taken by the first answer, or by the first failure that is told
        self.headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "make_pairs"}
        if key := os.environ.get("OPENAI_API_KEY", "").strip():
            if not (key.isascii() and key.isprintable()):
                raise InputError("OPENAI_API_KEY holds a character that cannot be sent: set it again")
            self.headers["Authorization"] = f"Bearer {key}"

    def answers(self, templates: dict[str, str], going_on: bool) -> Answer:
        """What answers jobs. `going_on`: the server has answered before.

        Raises InputError where the server does not answer at all: GIVE_UP texts in a row have failed, or all there are.
        """
        succeeded = going_on

        def answer(jobs: list[Job]) -> Iterator[list[tuple[Job, str | Failure]]]:
            nonlocal succeeded
            held = []  # failures since the last success: where the server is gone they are forgotten, and tried again by the next run
            self.stopped.clear()
            try:
                with ThreadPool(self.args.concurrency) as threads:  # daemons: Ctrl-C does not wait for the server
                    for job, found in threads.imap_unordered(lambda job: (job, self.ask(instruction(job, templates))), jobs):
                        held.append((job, found))
                        if not isinstance(found, Failure):
                            succeeded = True
                            self.no_answer_yet.acquire(blocking=False)
                            yield held
                            held = []
                        elif len(held) >= GIVE_UP:
                            why = f"{GIVE_UP} texts in a row failed, the last with {found.error}"
                            raise InputError(f"{self.url}: {why}; run again to go on")
            finally:
                self.stopped.set()
            if held and not succeeded:
                raise InputError(f"{self.url}: no text was answered; the last failed with {held[-1][1].error}")
            if held:
                yield held

        return answer

    def ask(self, prompt: str) -> str | Failure:
        """The model's answer, after as many tries as it takes; a failure after `--retries` more than one."""
        for attempt in range(self.args.retries + 1):
            while self.not_before > time.monotonic() and not self.stopped.is_set():  # another thread may move it on meanwhile
                self.wait_until(self.not_before)
            if self.stopped.is_set():
                return Failure("stopped")
            try:
                return without_thinking(self.request(prompt))
            except RefusedError as error:
                return Failure(str(error))
            except RetryError as error:
                why = str(error)
                if attempt < self.args.retries and self.no_answer_yet.acquire(blocking=False):
                    warn(f"{self.url}: {why}; each request is tried again (--retries {self.args.retries})")
                pause = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1)
                if error.wait is not None:  # for all requests, not for this one alone
                    pause = error.wait
                    self.not_before = max(self.not_before, time.monotonic() + pause)
                if attempt < self.args.retries:
                    self.wait_until(time.monotonic() + pause)
        return Failure(f"{why} (tried {self.args.retries + 1} times)")

    def wait_until(self, moment: float) -> None:
        while (rest := moment - time.monotonic()) > 0 and not self.stopped.wait(rest):
            pass

    def request(self, prompt: str) -> str:
        """One request. Raises RetryError, RefusedError, or InputError where no request can succeed."""
        args = self.args
        body = {"model": args.chat_model, "messages": [{"role": "user", "content": prompt}], "max_tokens": args.max_new_tokens}
        body |= {"temperature": args.temperature, "top_p": args.top_p}
        request = urllib.request.Request(self.url, json.dumps(body).encode(), self.headers)
        try:
            with self.opener.open(request, timeout=args.timeout) as response:
                content = read_in_time(response, args.timeout)
        except urllib.error.HTTPError as error:
            with error:
                raise self.explain(error) from None
        except (OSError, http.client.HTTPException) as error:  # no connection, a timeout, an answer cut short
            raise RetryError(describe(error)) from None
        return read_answer(content)

    def explain(self, error: urllib.error.HTTPError) -> Exception:
        """The exception that an answer other than 200 stands for."""
        try:
            text = excerpt(error.read(1000).decode(errors="replace"), 120)
        except (OSError, http.client.HTTPException):
            text = ""
        why = f"{error.code} {error.reason}" + (f": {text}" if text else "")
        if error.code in TRY_AGAIN or error.code >= 500:
            wait = seconds_to_wait(error.headers.get("Retry-After"))
            if wait is not None and wait > LONGEST_ASKED:
                return InputError(f"{self.url} asks to wait for {wait:.0f} seconds ({why}): run again then to go on")
            return RetryError(why, wait)
        if error.code in (401, 403):
            return InputError(f"{self.url} refuses: {why}; the key is taken from OPENAI_API_KEY")
        if error.code in (404, 405) or error.code < 400:
            return InputError(f"{self.url}: {why}; check --url, which most often ends in /v1, and --chat-model")
        return RefusedError(why)


def completions_url(url: str) -> str:
    """The address of the chat completions below a server's address. Raises InputError where it is no address."""
    try:
        parts = urllib.parse.urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or True)
    except ValueError:
        is_address = False
    if not is_address or not url.isascii() or any(c.isspace() for c in url):
        raise InputError(f"--url {excerpt(url)}: needs an address such as http://localhost:8000/v1")
    path = parts.path.rstrip("/")
    return urllib.parse.urlunsplit(parts._replace(path=path if path.endswith("/chat/completions") else f"{path}/chat/completions"))


def read_in_time(response: http.client.HTTPResponse, seconds: float) -> bytes:
    """The body of an answer. Raises RetryError where it is endless, or drips in for too long."""
    deadline, content = time.monotonic() + seconds, b""
    while chunk := response.read1(2**16):
        content += chunk
        if len(content) > LONGEST_ANSWER or time.monotonic() > deadline:
            raise RetryError(f"the answer did not end within {seconds:g} seconds and {LONGEST_ANSWER >> 20} MiB")
    if response.length:
        raise RetryError("the answer was cut short")
    return content


def read_answer(content: bytes) -> str:
    """The text in a chat completion; "" where the model said nothing. Raises RetryError for anything else.

    Raises RefusedError where the model was still thinking, which some servers keep apart from what it says.
    """
    try:
        choice = json.loads(content)["choices"][0]
        message, ended_by = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        raise RetryError(f"the answer is no chat completion: {excerpt(content.decode(errors='replace'))!r}") from None
    if message is not None and not isinstance(message, str):
        raise RetryError(f"the answer is no text: {excerpt(message)!r}")
    if not message and ended_by == "length":
        raise RefusedError(STILL_THINKING)
    return (message or "").encode(errors="replace").decode()


def seconds_to_wait(retry_after: str | None) -> float | None:
    """What a header Retry-After asks for: seconds, or a date."""
    if not retry_after:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return None


def describe(error: Exception) -> str:
    why = getattr(error, "reason", None) or error
    return excerpt(f"{type(why).__name__}: {why}" if str(why) else type(why).__name__)
