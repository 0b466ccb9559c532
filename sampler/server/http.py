"""HTTP to one vLLM server, on a thread of its own, and the error sentences for it.

It knows addresses, keys and limits, and nothing of weights or completions. Used by ``sampler/server/client.py``.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import threading
from collections.abc import Coroutine, Sequence
from concurrent import futures
from concurrent.futures import Future
from typing import Any, TypeVar

import httpx

from common.errors import RunFailure, UserError

T = TypeVar("T")
CONNECT_S = 10.0
MEET_S = 60.0  # for each question asked while meeting the server
_IDLE_S = 2.0  # a connection is not used again after this: the server hangs up after 5, at times in mid-request
# A machine that disappears is noticed within half a minute.
_KEEPALIVE = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)] + [
    (socket.IPPROTO_TCP, getattr(socket, name), value)
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
    if hasattr(socket, name)
]
_SWITCHES = {
    "/collective_rpc": "VLLM_SERVER_DEV_MODE=1",
    "/reset_prefix_cache": "VLLM_SERVER_DEV_MODE=1",
    "/v1/load_lora_adapter": "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True",
}
"""The variable that the server must be started with to have the address."""


class VllmHttp:
    """The connections to one server. Every failure is one sentence, never with the key: a ``UserError`` until ``met``
    is set, a ``RunFailure`` from then on. ``cure`` ends the sentences about a server that is not right."""

    def __init__(self, url: str, key_env: str | None, timeout_s: float, connections: int, cure: str) -> None:
        self.url, self.cure, self.met = url.rstrip("/"), cure, False
        self._key_env, self._key, self._timeout_s = key_env, read_key(key_env), timeout_s
        self._client = httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx.Timeout(None, connect=CONNECT_S),
            trust_env=False,  # neither a web proxy nor the passwords in ~/.netrc belong in between
            transport=httpx.AsyncHTTPTransport(
                limits=httpx.Limits(max_connections=None, keepalive_expiry=_IDLE_S),
                socket_options=_KEEPALIVE,
                trust_env=False,
            ),
        )
        self._slots = asyncio.Semaphore(max(1, connections))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="remote sampler", daemon=True)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, path: str, body: Any = None, **how: Any) -> Any:
        return self.start(self.ask(path, body, **how)).result()

    async def ask(
        self, path: str, body: Any = None, *, doing: str, timeout_s: float | None = None, optional: bool = False
    ) -> Any:
        """The answer's JSON, or its text where it is none; None for an ``optional`` address that does not exist."""
        async with self._slots:
            response = await self._send(path, body, doing, min(timeout_s or self._timeout_s, self._timeout_s))
        if response.status_code != 200:
            error = _vllm_error(response)
            if response.status_code == 404 and not error:
                if optional:
                    return None
                switch = f" ({_SWITCHES[path]} was not set when it started)" if path in _SWITCHES else ""
                raise UserError(f"the server at {self.url} has no {path.partition('?')[0]}{switch}; {self.cure}")
            raise self._error(
                f"the sampler server at {self.url} failed while {doing}: HTTP {response.status_code}, "
                f"{self._short(error or response.text)}"
            )
        try:
            return response.json()
        except ValueError:
            return response.text

    def has(self, path: str) -> bool:
        """Whether there is such an address to POST to: asked by GET, which does nothing there."""
        work = self._send(path, None, "telling what it offers", min(MEET_S, self._timeout_s))
        return self.start(work).result().status_code != 404

    def leave(self, path: str, body: Any) -> None:
        """A best-effort request at shutdown with a short timeout; errors are ignored."""
        futures.wait([self.start(self._send(path, body, "being left", 5.0))], timeout=5.0)

    def close(self) -> None:
        futures.wait([self.start(self._end())], timeout=CONNECT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=CONNECT_S)
        if not self._thread.is_alive():
            self._loop.close()

    async def _end(self) -> None:
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        await self._client.aclose()

    async def _send(self, path: str, body: Any, doing: str, limit_s: float) -> httpx.Response:
        try:
            async with asyncio.timeout(limit_s):
                response = await self._client.request("GET" if body is None else "POST", path, json=body)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise self._error(f"nothing answers at {self.url} ({self._short(str(error))}); {self.cure}") from None
        except (TimeoutError, httpx.TimeoutException):
            raise self._error(
                f"the sampler server at {self.url} was still {doing} after {limit_s:g} s "
                "(sampler.options.timeout_s); raise the limit or look at the server's log"
            ) from None
        except httpx.HTTPError as error:
            raise self._error(
                f"the connection to the sampler server at {self.url} broke while it was {doing} "
                f"({type(error).__name__}); it has probably died: look at its log and start it again"
            ) from None
        if response.status_code in (401, 403):
            cure = (
                f"the environment variable {self._key_env} holds another key than the server's"
                if self._key_env
                else "name the environment variable with its key in sampler.options.api_key_env"
            )
            raise UserError(f"the server at {self.url} refuses the key (HTTP {response.status_code}); {cure}")
        return response

    def _error(self, sentence: str) -> Exception:
        return (RunFailure if self.met else UserError)(sentence)

    def _short(self, text: str) -> str:
        text = text.replace(self._key, "<the key>") if self._key else text
        return " ".join(text.split())[:300] or "no reason given"


def read_key(name: Any) -> str:
    """The server's key, empty where no variable is named. The value is in no message."""
    if name is None:
        return ""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
        raise UserError(  # what was written here may be the key itself
            "sampler.options.api_key_env must be the name of an environment variable in capitals, not the key"
        )
    key = os.environ.get(name, "")
    if not key:
        raise UserError(f"sampler.options.api_key_env={name!r}: no such environment variable is set here; export it")
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise UserError(f"the environment variable {name} holds spaces or characters that no key has; set it again")
    return key


def _vllm_error(response: httpx.Response) -> str:
    """vLLM's own words about what went wrong; empty when the answer is not of that form."""
    try:
        error = response.json().get("error")
    except (ValueError, AttributeError):
        return ""
    return str(error.get("message", "")) if isinstance(error, dict) else str(error or "")


async def in_order(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Their results in order; when one fails, the others are given up."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        raise


def follow(future: Future[T], work: Future[T]) -> None:
    """``future``, which only this ends, gets the result of ``work``; cancelled, it cancels that."""

    def end(work: Future[T]) -> None:
        if work.cancelled():
            future.cancel()
        elif future.set_running_or_notify_cancel():
            if error := work.exception():
                future.set_exception(error)
            else:
                future.set_result(work.result())

    future.add_done_callback(lambda future: future.cancelled() and work.cancel())
    work.add_done_callback(end)
