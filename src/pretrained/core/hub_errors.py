# SPDX-License-Identifier: Apache-2.0
"""What went wrong at the Hub, said in the words of the call that the user made.

``huggingface_hub`` raises some fifteen classes, in part of the HTTP client beneath it (requests up to
0.x, httpx from 1.0 on). Each becomes one `FileError` that names the id, the revision and the file, says
whether a token was sent (never the token), and how to mend it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from huggingface_hub import constants, errors, get_token

from pretrained.errors import FileError

if TYPE_CHECKING:
    from pretrained.core.hub import HubOptions

NETWORK_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    getattr(errors, "HTTPError", OSError),  # httpx's base class, which is no OSError; absent in 0.x
    errors.EntryNotFoundError,
    errors.HFValidationError,
)
"""The classes that a request to the Hub may end in."""


@dataclass(frozen=True, slots=True)
class _Fault:
    """What an exception and its causes tell.

    Attributes:
        names: Their class names.
        status: The response's status.
        first_line: The root cause in one line, with what the Hub itself said.
        retry_after: Seconds that the Hub asked to wait.
        file: The file whose upload failed.
    """

    names: str
    status: int | None
    first_line: str
    retry_after: int | None = None
    file: str | None = None


def is_outage(error: Exception) -> bool:
    """Whether the Hub does not serve now, so that cached files are the best answer.

    Args:
        error: One of `NETWORK_ERRORS`.
    """
    fault = _read(error)
    return _unreachable(fault) or fault.status == 429


def explain(
    error: Exception, repo_id: str, options: HubOptions, *, file: str | None = None, hint: str = ""
) -> FileError:
    """Translate an exception of a request.

    Args:
        error: One of `NETWORK_ERRORS`.
        repo_id: The repository asked for.
        options: The revision, token and so on.
        file: The file asked for, if it was one.
        hint: A further suggestion, for faults that a mistyped name explains.
    """
    fault = _read(error)
    what, mend = _refusal(fault, repo_id, options, file, hint) or _failure(fault, repo_id, hint)
    where = f"revision {options.revision!r}"
    if options.subfolder:
        where += f", subfolder {options.subfolder!r}"
    if file:
        where += f", file {file!r}"
    if options.endpoint:
        where += f", at {options.endpoint}"
    found = f"{fault.first_line} ({_token_state(options.token)})"
    return FileError(what, where=where, found=found, mend=mend)


def explain_push(
    error: Exception,
    repo_id: str,
    *,
    token: str | bool | None = None,
    revision: str | None = None,
    endpoint: str | None = None,
) -> FileError:
    """Translate an exception of an upload.

    Args:
        error: What a request of the upload ended in.
        repo_id: The repository pushed to.
        token: As the user gave it.
        revision: The branch pushed to, or None for the main one.
        endpoint: The Hub's address.
    """
    fault = _read(error)
    what, mend = _push_refusal(fault, repo_id, revision) or _push_failure(fault, repo_id)
    where = f"branch {revision!r}" if revision else "main branch"
    if fault.file:
        where += f", file {fault.file!r}"
    if endpoint:
        where += f", at {endpoint}"
    return FileError(what, where=where, found=f"{fault.first_line} ({_token_state(token)})", mend=mend)


_PUSH_AGAIN = "Push again: files that have arrived whole are not sent twice."


def _push_refusal(fault: _Fault, repo_id: str, revision: str | None) -> tuple[str, str] | None:
    """What the Hub said no to in a push, and the mend."""
    if "LocalTokenNotFoundError" in fault.names:
        return _NO_LOGIN
    if "RevisionNotFoundError" in fault.names:
        return f"{repo_id!r} has no revision {revision!r}", "Push to a branch, or to an open pull request."
    no_rights = (
        f"The Hub does not let you write to {repo_id!r}",
        "Use a token that may write there, push to a name of your own, or propose it: create_pr=True.",
    )
    changed = f"{repo_id!r} changed while it was being pushed to", "Push again."
    answers = {
        401: (
            f"The Hub does not know who is pushing to {repo_id!r}",
            "Pass token=..., a token that may write, or run `hf auth login`.",
        ),
        402: no_rights,
        403: no_rights,
        404: (
            f"There is no repository {repo_id!r} on the Hub, or you may not see it",
            "Check the spelling and the token.",
        ),
        409: changed,
        412: changed,
        413: (f"A file is too large for {repo_id!r}", "Pass a smaller max_shard_size."),
        429: _too_many(fault),
    }
    if fault.status is None or not 400 <= fault.status < 500:
        return None
    other = f"The Hub refused the push to {repo_id!r}", "See what it found; nothing was committed."
    return answers.get(fault.status, other)


def _push_failure(fault: _Fault, repo_id: str) -> tuple[str, str]:
    """What did not work on the way to the Hub or at it, in a push, and the mend."""
    if fault.status is not None:
        return f"The Hub answered with status {fault.status} to the push to {repo_id!r}", _PUSH_AGAIN
    if "HFValidationError" in fault.names:
        return f"{repo_id!r} cannot be the name of a repository", "Write 'name' or 'owner/name'."
    if "Timeout" in fault.names:
        return f"The Hub did not answer in time to the push to {repo_id!r}", _PUSH_AGAIN
    if "xet-write-token" in fault.first_line:
        return (
            f"The server does not speak Xet, in the push to {repo_id!r}",
            "Set HF_HUB_DISABLE_XET=1 for servers that know only LFS.",
        )
    if _unreachable(fault):
        return f"The connection failed in the push to {repo_id!r}", f"Check the connection. {_PUSH_AGAIN}"
    return f"Pushing to {repo_id!r} failed", _PUSH_AGAIN


_NO_LOGIN = (
    "token=True needs a stored login",
    "Run `hf auth login`, set HF_TOKEN, or pass the token itself.",
)


def _too_many(fault: _Fault) -> tuple[str, str]:
    wait = "a little" if fault.retry_after is None else f"{fault.retry_after} s"
    return (
        "The Hub answered that there were too many requests",
        f"Wait {wait}; a token raises the limit.",
    )


def _refusal(
    fault: _Fault, repo_id: str, options: HubOptions, file: str | None, hint: str
) -> tuple[str, str] | None:
    """What the Hub said no to, and the mend."""
    page = f"{options.endpoint or constants.ENDPOINT}/{repo_id}"
    if "LocalTokenNotFoundError" in fault.names:
        return _NO_LOGIN
    if "GatedRepoError" in fault.names:
        return (
            f"{repo_id!r} is gated: its owner lets in only those who asked",
            f"Ask at {page}, then pass token=... or run `hf auth login`.",
        )
    if "RevisionNotFoundError" in fault.names:
        return f"{repo_id!r} has no revision {options.revision!r}", f"See {page}/refs for those it has."
    if "EntryNotFoundError" in fault.names and fault.status == 404:
        return f"{repo_id!r} has no file {file!r}", f"See {page}/tree/{options.revision} for those it has."
    if "RepositoryNotFoundError" in fault.names or fault.status in (401, 404):
        return (
            f"There is no repository {repo_id!r} on the Hub, or it is private",
            f"{hint} Check the spelling; for a private one pass token=... or run `hf auth login`.".strip(),
        )
    return None


def _failure(fault: _Fault, repo_id: str, hint: str) -> tuple[str, str]:
    """What did not work on the way to the Hub, at it or here, and the mend."""
    if fault.status is not None:
        answers = {
            403: (f"The Hub refused access to {repo_id!r}", "Use a token that may read this repository."),
            429: _too_many(fault),
        }
        other = f"The Hub answered with status {fault.status} for {repo_id!r}", "Try again later."
        return answers.get(fault.status, other)
    if "Consistency check failed" in fault.first_line:
        return f"A file of {repo_id!r} did not arrive whole", "Load it again; nothing of it was kept."
    if "Timeout" in fault.names:
        return (
            f"The Hub did not answer in time for {repo_id!r}",
            "Try again, or raise HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT (seconds).",
        )
    if _unreachable(fault):
        return (
            f"The Hub could not be reached for {repo_id!r}",
            f"{hint} Check the connection and the proxy, or pass a local folder.".strip(),
        )
    return (
        f"The files of {repo_id!r} could not be fetched",
        "Check the disk space and the rights of the cache.",
    )


_CUTS = ("Connect", "Timeout", "Network", "Protocol", "ChunkedEncoding", "Offline")


def _unreachable(fault: _Fault) -> bool:
    if fault.status is not None:
        return fault.status >= 500
    return any(word in fault.names for word in _CUTS)


def _token_state(token: str | bool | None) -> str:
    if isinstance(token, str):
        return "the given token was sent"
    if token is False:
        return "no token was sent, since token=False"
    return "the stored token was sent" if get_token() else "no token was sent, since none is stored"


def _read(error: BaseException) -> _Fault:
    chain: list[BaseException] = []
    link: BaseException | None = error
    # The library wraps the telling exception in others.
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__
    names = " ".join(cls.__name__ for item in chain for cls in type(item).__mro__)
    responses = [getattr(item, "response", None) for item in chain]
    response = next((r for r in responses if getattr(r, "status_code", None) is not None), None)
    said = next((text for item in chain if (text := getattr(item, "server_message", None))), None)
    lines = str(said or chain[-1]).strip().splitlines() or [""]
    # Addresses of uploads and downloads carry signatures after the question mark.
    line = re.sub(r"(https?://[^\s?']+)\?[^\s']*", r"\1", lines[0])[:200]
    line = re.sub(r"\bhf_\w{4,}", "hf_...", line)
    if response is not None and said:
        line = f"status {response.status_code}, {line!r}"
    upload = re.search(r"Error while uploading '(.+?)' to the Hub", " ".join(map(str, chain)))
    return _Fault(
        names,
        None if response is None else int(response.status_code),
        f"{type(chain[-1]).__name__}: {line}".rstrip(": "),
        _retry_after(response),
        upload[1] if upload else None,
    )


def _retry_after(response: object) -> int | None:
    text = getattr(response, "headers", {}).get("Retry-After", "")
    return int(text) if isinstance(text, str) and text.isdecimal() and len(text) < 6 else None
