"""Push a folder to the hub: asked for early, carried out last, by huggingface_hub."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from shlex import quote
from typing import Any

from ..errors import OutputError, why
from ..progress import hushed, track

_WEIGHTS = (".safetensors", ".bin", ".gguf", ".index.json")
"""Endings of files that a loader may take for the weights of the model."""

SAVED = ("model*.safetensors", "model.safetensors.index.json")
"""The weights of a folder that transformers saves, as patterns."""


def push(folder: str | Path, repository: str, *, private: bool = False) -> str:
    """Push a cut, a healed model or adapters to the hub, with the card and all that lies beside it.

    The repository is created where there is none. The token is that of ``HF_TOKEN`` or of
    ``hf auth login``. Nothing in the folder changes.

    Args:
        folder: what is pushed, all of it.
        repository: as ``user/name``.
        private: for a repository that is created.

    Returns:
        The address of the repository.

    Raises:
        OutputError: there is no such folder, no token, or no right to write there; the repository
            has other weights; or the hub cannot be reached or breaks off.
    """
    return Push(repository, private).check().carry_out(Path(folder).expanduser())


@dataclass(frozen=True, slots=True)
class Push:
    """A push that is wanted: to which repository, and whether a new one is private."""

    repository: str
    private: bool = False

    def check(self) -> "Push":
        """Refuse, before any work, what the hub would refuse after it; OutputError."""
        from huggingface_hub import HfApi, constants, get_token

        owner = self._owner()
        if constants.HF_HUB_OFFLINE:
            raise self._refused("HF_HUB_OFFLINE is set: unset it, or leave the push out")
        if get_token() is None:
            raise self._refused("there is no token: run 'hf auth login', or set HF_TOKEN")
        try:
            me = HfApi().whoami()
        except Exception as error:  # its own, httpx's or requests', by version
            raise self._refused(why(error)) from error
        self._check_rights(me, owner)
        return self

    def check_weights(self, ours: Iterable[str] = SAVED) -> None:
        """Refuse a repository with weights that would stay beside ours, and be loaded for them.

        ``ours`` are names of files that will be pushed, or patterns of them. OutputError.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError

        patterns = tuple(ours)
        try:
            siblings = HfApi().model_info(self.repository).siblings or ()
        except RepositoryNotFoundError:
            return
        except Exception as error:
            raise self._refused(why(error)) from error
        for name in sorted(one.rfilename for one in siblings):
            if name.endswith(_WEIGHTS) and not any(fnmatchcase(name, one) for one in patterns):
                raise self._refused(
                    f"it has {name}, which would stay beside what is pushed: name another "
                    f"repository, or delete that file there"
                )

    def carry_out(self, folder: Path) -> str:
        """Push all of a folder; gives the address. OutputError as :func:`push`."""
        from huggingface_hub import HfApi

        if not folder.is_dir():
            raise self._refused(f"there is no folder {folder}")
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
        self.check_weights(names)
        api = HfApi()
        # On a terminal the hub's own bars have what ours could not: bytes and files.
        show = False if sys.stderr.isatty() else None
        try:
            with track(f"push to {self.repository}", show=show) as shown:
                url = api.create_repo(self.repository, private=self.private or None, exist_ok=True)
                if show is None:
                    with hushed(shown):
                        self._upload(api, folder)
                else:
                    self._upload(api, folder)
        except Exception as error:  # its own, httpx's, requests' or hf_xet's, by version
            bare = error.__cause__ if isinstance(error, RuntimeError) else None
            cause = "" if bare is None else f" {why(bare)}"
            raise OutputError(
                f"pushing to {self.repository} broke off: {why(error)}{cause}; {folder} is whole, "
                f"and 'hf upload {self.repository} {quote(str(folder))}' goes on"
            ) from error
        return str(url)

    def _upload(self, api: Any, folder: Path) -> None:
        message = f"Push {folder.name} by shallower"
        api.upload_folder(repo_id=self.repository, folder_path=folder, commit_message=message)

    def _owner(self) -> str:
        """The user or organisation before the slash."""
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        owner, slash, _ = self.repository.partition("/")
        try:
            validate_repo_id(self.repository)
        except HFValidationError as error:
            raise self._refused(f"expected USER/NAME: {why(error)}") from error
        if not slash:
            raise self._refused("expected USER/NAME, with the user or organisation that owns it")
        return owner

    def _check_rights(self, me: dict[str, Any], owner: str) -> None:
        """Refuse a token that only reads, and the place of somebody else."""
        token = (me.get("auth") or {}).get("accessToken") or {}
        roles = {one.get("name"): one.get("roleInOrg") for one in me.get("orgs") or ()}
        role = token.get("role")
        if role == "read":
            raise self._refused(
                f"the token {token.get('displayName', '')!r} of {me.get('name')} only reads: make "
                f"one that writes, at huggingface.co/settings/tokens"
            )
        # What a fine-grained token may do lies in scopes that only the hub itself can read.
        if role != "fineGrained" and owner != me.get("name") and owner not in roles:
            raise self._refused(
                f"{me.get('name')} is not {owner}, and no member of it: expected "
                f"{' or '.join(f'{one}/NAME' for one in (me.get('name'), *roles))}"
            )
        if roles.get(owner) == "read":
            raise self._refused(f"{me.get('name')} may only read what {owner} has")

    def _refused(self, reason: str) -> OutputError:
        return OutputError(f"cannot push to {self.repository}: {reason}")
