"""Captions from a vision model behind an OpenAI-compatible `/chat/completions` endpoint."""

from __future__ import annotations

import base64
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from pipeline.config import CaptionConfig
from streamdit.errors import UserError

PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
"""Answers after which the same request is sent again, later and later."""
REFUSING = (401, 403, 404)
"""Answers that every further request would get too."""
BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 60.0
JPEG_QUALITY = 90


class EndpointError(RuntimeError):
    """One caption could not be had: why, and whether another run may get it."""

    def __init__(self, message: str, retryable: bool) -> None:
        super().__init__(message)
        self.retryable = retryable


class EndpointCaptioner:
    """Sends pictures of a clip with a prompt, takes the answer as its caption.

    Several requests are under way at once; each carries its clip's id along on this side, so an
    answer belongs to its clip in whatever order answers come.
    """

    def __init__(self, config: CaptionConfig) -> None:
        """Look at the settings; nothing is sent.

        Raises:
            UserError: if there is no address.
        """
        if not config.url:
            raise UserError(
                "captions.captioner=endpoint needs captions.url: the address of an "
                "OpenAI-compatible server, such as http://localhost:8000/v1"
            )
        self.config = config
        self.address = config.url.rstrip("/") + "/chat/completions"
        self._local = threading.local()

    def caption(self, clips: Mapping[str, Sequence[np.ndarray]]) -> dict[str, str | EndpointError]:
        """Describe clips.

        Args:
            clips: clip id to RGB pictures `uint8 [h, w, 3]`, in order of time.

        Returns:
            Clip id to caption, or to what went wrong.

        Raises:
            UserError: if the server refuses the key or does not know the model.
        """
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            asked = {clip_id: pool.submit(self._ask, clips[clip_id]) for clip_id in clips}
            try:
                return {clip_id: future.result() for clip_id, future in asked.items()}
            except UserError:
                pool.shutdown(cancel_futures=True)
                raise

    def _ask(self, pictures: Sequence[np.ndarray]) -> str | EndpointError:
        """One request, repeated while its failure may pass."""
        import requests

        try:
            response = self._session().post(
                self.address, json=self._body(pictures), timeout=self.config.timeout_s
            )
        except requests.RequestException as error:
            return EndpointError(f"{self.address}: {_one_line(error)}", retryable=True)
        status = response.status_code
        if status in REFUSING:
            raise UserError(
                f"{self.address} answers {status} ({_one_line(response.text)}): check "
                f"captions.url, captions.model {self.config.model!r} and the key in the "
                f"environment variable {self.config.api_key_env}"
            )
        if status != 200:
            reason = f"{self.address} answers {status} ({_one_line(response.text)})"
            return EndpointError(reason, retryable=status in PASSING)
        try:
            text = response.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            reason = f"{self.address} answers without choices[0].message.content"
            return EndpointError(reason, retryable=False)
        return " ".join(str(text or "").split())

    def _session(self) -> Any:
        """The calling thread's connection, with retries for what may pass."""
        if not hasattr(self._local, "session"):
            import requests
            from requests.adapters import HTTPAdapter
            from urllib3.util import Retry

            retry = Retry(
                total=self.config.retries,
                backoff_factor=BACKOFF_S,
                backoff_max=LONGEST_BACKOFF_S,
                status_forcelist=PASSING,
                allowed_methods=None,  # asking again for a caption does no harm
                raise_on_status=False,
            )
            session = requests.Session()
            for scheme in ("http://", "https://"):
                session.mount(scheme, HTTPAdapter(max_retries=retry))
            if key := os.environ.get(self.config.api_key_env):
                session.headers["Authorization"] = f"Bearer {key}"
            self._local.session = session
        return self._local.session

    def _body(self, pictures: Sequence[np.ndarray]) -> dict[str, Any]:
        content: list[dict[str, Any]] = [{"type": "text", "text": self.config.prompt}]
        content += [
            {"type": "image_url", "image_url": {"url": _data_url(picture)}} for picture in pictures
        ]
        return {
            "model": self.config.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.config.max_tokens,
            "temperature": 0,
            "seed": 0,
        }


def _data_url(picture: np.ndarray) -> str:
    """An RGB picture as JPEG in a `data:` address."""
    import cv2

    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    done, data = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), options)
    assert done
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode("ascii")


def _one_line(text: object) -> str:
    return " ".join(str(text).split())[:200]
