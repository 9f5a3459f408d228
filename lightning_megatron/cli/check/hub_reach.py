"""Tells Hugging Face's libraries that there is no network, where there is none, so that they do not retry for it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from huggingface_hub import constants


@contextmanager
def offline_if_out_of_reach() -> Iterator[None]:
    """Inside, models, tokenizers and datasets come from the cache alone if the hub's name cannot be resolved.

    Each request would be sent six times over half a minute otherwise. Behind a proxy, names need not be resolved here.
    """
    before = constants.HF_HUB_OFFLINE
    if not before and not any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        constants.HF_HUB_OFFLINE = not _resolves(urlsplit(constants.ENDPOINT).hostname or "huggingface.co")
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _resolves(host: str) -> bool:
    try:
        return bool(socket.getaddrinfo(host, 443))
    except OSError:
        return False
