"""Users of a server with OpenAI's API, for Locust: `locust -f users.py --headless --users N`, a process of its own.

FINHPC_LOAD names a file of `token`, `seconds`, `requests`, `repeat` and `answers`. Each user takes the next of
`requests`, streams its answer, and takes another one, until `seconds` are over or none is left; with `repeat` the first
one follows the last. What every request saw is written to the file `answers`; times are those of `time.monotonic`,
which processes of one machine share.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from pathlib import Path
from typing import Any

from locust import FastHttpUser, task
from locust.exception import StopUser

LOAD: dict[str, Any] = json.loads(Path(os.environ["FINHPC_LOAD"]).read_text(encoding="utf-8"))
LEFT = deque(LOAD["requests"])
HEADERS = {
    "Authorization": f"Bearer {LOAD['token']}",
    "Content-Type": "application/json",
    "Accept-Encoding": "identity",
}
DATA, END = b"data: ", b"[DONE]"
answers: list[dict[str, Any]] = []
working: set[User] = set()


class User(FastHttpUser):
    """`network_timeout`: for a server that hangs, beyond its own limit for a request."""

    network_timeout = 400.0

    def on_start(self) -> None:
        working.add(self)

    @task
    def ask(self) -> None:
        """Stream one answer, or leave; the last user to leave ends the process."""
        if not LEFT or (answers and time.monotonic() - answers[0]["begin"] > LOAD["seconds"]):
            working.discard(self)
            if not working:
                Path(LOAD["answers"]).write_text(json.dumps(answers), encoding="utf-8")
                self.environment.runner.quit()
            raise StopUser
        asked = LEFT.popleft()
        if LOAD["repeat"]:
            LEFT.append(asked)
        body = {"temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        answer: dict[str, Any] = {"begin": time.monotonic(), "times": [], "tokens": 0, "error": None}
        answers.append(answer)
        data = json.dumps(body | asked)
        with self.client.post(
            "/v1/completions", data=data, headers=HEADERS, stream=True, catch_response=True
        ) as response:
            try:
                if response.status_code == 200:
                    self.read(response.stream, answer)
                    if answer["tokens"] != asked["max_tokens"]:
                        answer["error"] = f"{answer['tokens']} of {asked['max_tokens']} tokens came"
                else:
                    answer["error"] = f"status {response.status_code}: {(response.text or '')[:200]}"
            except (OSError, ValueError, KeyError) as error:
                answer["error"] = f"{type(error).__name__}: {error}"
            if answer["error"] is not None:
                response.failure(answer["error"])
            else:
                response.success()
        answer["end"] = time.monotonic()

    def read(self, stream: Any, answer: dict[str, Any]) -> None:
        """Note when each event with text came, and how many tokens there were in the end."""
        while line := stream.readline(b"\n"):
            if not line.startswith(DATA):
                continue
            if line.startswith(END, len(DATA)):
                stream.read()  # the rest, so that the connection can be used again
                return
            now, event = time.monotonic(), json.loads(line[len(DATA) :])
            if "error" in event:
                raise ValueError(str(event["error"])[:200])
            if event["choices"]:
                answer["times"].append(now)
            if event.get("usage"):
                answer["tokens"] = event["usage"]["completion_tokens"]
        raise ValueError("the stream ended without [DONE]")
