# SPDX-License-Identifier: Apache-2.0
"""What went wrong at the Hub, said in the words of the call that the user made.

``huggingface_hub`` raises some fifteen classes, in part of the HTTP client beneath it (requests up to
0.x, httpx from 1.0 on). Each becomes one `FileError` that names the id, the revision and the file, says
whether a token was sent (never the token), and how to mend it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from huggingface_hub import errors, get_token

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
    """What an exception and its causes tell: their class names and the response's status."""

    names: str
    status: int | None
    first_line: str


def is_outage(error: Exception) -> bool:
    """Whether the Hub could not be reached, so that cached files are the best answer.

    Args:
        error: One of `NETWORK_ERRORS`.
    """
    return _unreachable(_read(error))


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
    return FileError(what, where=where, found=f"{fault.first_line} ({_token_state(options)})", mend=mend)


def first_line(error: Exception) -> str:
    """The root cause of an exception in one line."""
    return _read(error).first_line


def _refusal(
    fault: _Fault, repo_id: str, options: HubOptions, file: str | None, hint: str
) -> tuple[str, str] | None:
    """What the Hub said no to, and the mend."""
    page = f"https://huggingface.co/{repo_id}"
    if "LocalTokenNotFoundError" in fault.names:
        return (
            "token=True needs a stored login",
            "Run `hf auth login`, set HF_TOKEN, or pass the token itself.",
        )
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
    if fault.status == 403:
        return f"The Hub refused access to {repo_id!r}", "Use a token that may read this repository."
    if fault.status == 429:
        return (
            "The Hub answered that there were too many requests",
            "Wait a little; a token raises the limit.",
        )
    if fault.status is not None:
        return f"The Hub answered with status {fault.status} for {repo_id!r}", "Try again later."
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


def _unreachable(fault: _Fault) -> bool:
    if fault.status is not None:
        return fault.status >= 500
    return any(word in fault.names for word in ("Connect", "Timeout", "Network", "Protocol", "Offline"))


def _token_state(options: HubOptions) -> str:
    if isinstance(options.token, str):
        return "the given token was sent"
    if options.token is False:
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
    statuses = [getattr(getattr(item, "response", None), "status_code", None) for item in chain]
    status = next((int(s) for s in statuses if s is not None), None)
    lines = str(chain[-1]).strip().splitlines() or [""]
    return _Fault(names, status, f"{type(chain[-1]).__name__}: {lines[0][:200]}".rstrip(": "))
