"""The hub: whether it can be reached, and why it does not give what is asked for."""

import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

from ..errors import ModelError, why

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

HUB = "https://huggingface.co"

LOG_IN = "log in (hf auth login)"


@cache
def hub_answers(address: str) -> bool:
    """Whether the hub, whose client tries for half a minute, can be connected to."""
    parts = urlsplit(address)
    if getproxies():
        return True
    try:
        port = parts.port or (80 if parts.scheme == "http" else 443)
        socket.create_connection((parts.hostname or "", port), timeout=5).close()
    except OSError:
        return False
    return True


def hub_absence() -> str | None:
    """Say that the hub cannot be reached; None where it can, or must not be used."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or hub_answers(constants.ENDPOINT):
        return None
    way_out = "connect to the hub, or set HF_HUB_OFFLINE=1 to read its cache"
    return f"{constants.ENDPOINT} cannot be reached: {way_out}"


def read_caches() -> str | None:
    """Read the caches of hub and datasets alone from now on, if the hub cannot be reached; why."""
    from datasets import config
    from huggingface_hub import constants

    if absence := hub_absence():
        constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    return absence


@cache
def hub_files(name: str, commit: str) -> "list[RepoSibling]":
    """The files of a model's repository with their sizes, and the hashes of those in LFS."""
    from huggingface_hub import HfApi

    return HfApi().model_info(name, revision=commit, files_metadata=True).siblings or []


@contextmanager
def raise_fetch_error(name: str, what: str = "") -> Iterator[None]:
    """Raise a ModelError for what the hub's client raises for a model, or for its file ``what``."""
    try:
        yield
    except Exception as error:  # of the hub's client, which has had several
        named, reason = f"{what} of {name}" if what else name, hub_refusal(name, "model")
        raise ModelError(f"cannot fetch {named}: {reason or why(error)}") from error


def hub_refusal(name: str, kind: Literal["model", "dataset"]) -> str | None:
    """Ask the hub why it does not give a repository; None where it would, or cannot say."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    if absence := hub_absence():
        return absence
    try:
        HfApi().auth_check(name, repo_type=kind)
    except GatedRepoError:
        return f"the {kind} is gated: ask for access on its page of the hub, and {LOG_IN}"
    except RepositoryNotFoundError:
        return f"the hub has no such {kind} that you may read: check the name, or {LOG_IN}"
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            return f"the hub refuses your token: {LOG_IN}"
        return None if status < 429 else f"the hub answers with status {status}: try again later"
    except Exception:  # of the client, which has had several
        return "the hub breaks the connection off: try again later"
    return None


def warn_of_mirror(name: str) -> None:
    """Warn that parts of a model's files come from another server than the hub's."""
    from huggingface_hub import constants

    if constants.ENDPOINT != HUB:
        warnings.warn(
            f"{name} comes from {constants.ENDPOINT} (HF_ENDPOINT) and not from {HUB}, and parts "
            f"of files cannot be verified: trust that server, or unset HF_ENDPOINT",
            stacklevel=3,
        )


def etag_of(response: Any) -> str:
    """The hub's name for the content of a file; empty where it does not say."""
    answers = (*response.history, response)
    linked = [one.headers["X-Linked-Etag"] for one in answers if "X-Linked-Etag" in one.headers]
    own = [] if response.history else [response.headers.get("ETag", "")]
    return next(iter((*linked, *own)), "").removeprefix("W/").strip('"')
