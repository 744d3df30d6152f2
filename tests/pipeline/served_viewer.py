"""Viewers that run for a test, and what they show."""

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

EVIL = """<img src=x onerror='document.title="hacked"'>&"quoted"; drop #1?%"""
"""A name that is HTML, JavaScript and a bad URL at once."""

TOKEN = "a-token-of-the-tests"


@dataclass
class Results:
    """Folders of one cohort: the slides `plain`, `EVIL` and `broken`, features, and results of two methods."""

    slides: Path
    features: Path
    results: Path
    attention: Path
    labels: Path


@dataclass
class Served:
    """A viewer that runs."""

    address: str
    port: int

    def ask(
        self,
        path: str = "",
        *,
        method: str = "GET",
        body: Any = None,
        headers: dict[str, str] | None = None,
        at: str = "",
    ) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers of an answer."""
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request((at or self.address) + path, data, headers or {}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read(), dict(answer.headers)
        except urllib.error.HTTPError as error:
            return error.code, error.read(), dict(error.headers)

    def json(self, path: str) -> Any:
        """The JSON of an answer that must be one."""
        status, body, _ = self.ask(path)
        assert status == 200, body
        return json.loads(body)

    def array(self, path: str, kind: str) -> np.ndarray:
        """The numbers of a binary answer."""
        status, body, _ = self.ask(path)
        assert status == 200, body
        return np.frombuffer(body, kind)
