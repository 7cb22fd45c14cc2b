"""The root of every error that crosses a room or a wire, and the table from code to class.

An error is `code, message, hint, retry, detail`; each class fixes its HTTP status and the exit
code of a command. `serve` encodes an error, `call` and `blocking` raise the same class on the
other side, so nobody ever matches text. Rooms add leaves (`JobNotFound`) in their `errors.py`;
a leaf that the receiver has not imported decodes as its family.
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """An error as JSON: what a client of any language sees."""

    code: str
    message: str
    hint: str = ""
    retry: bool = False
    detail: dict[str, Any] = {}
    family: str = "internal"


class ServiceError(Exception):
    """Something that a caller has to be told; never raised for misuse by our own code."""

    code: ClassVar[str] = "internal"
    family: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 70
    retry: bool = False
    _by_code: ClassVar[dict[str, type[ServiceError]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        ServiceError._by_code[cls.code] = cls

    def __init__(self, message: str, *, hint: str = "", retry: bool | None = None, **detail: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.detail = detail
        if retry is not None:
            self.retry = retry

    def to_body(self) -> ErrorBody:
        """Say this error as JSON."""
        return ErrorBody(
            code=self.code,
            message=self.message,
            hint=self.hint,
            retry=self.retry,
            detail=self.detail,
            family=self.family,
        )

    @staticmethod
    def from_body(body: ErrorBody) -> ServiceError:
        """Turn a received body into the class that its code names, else its family, else `Internal`."""
        table = ServiceError._by_code
        cls = table.get(body.code) or table.get(body.family) or Internal
        error = cls(body.message, hint=body.hint, retry=body.retry)
        error.detail = body.detail
        return error


class Invalid(ServiceError):
    """The request itself is wrong; the same request will never work."""

    code = family = "invalid"
    http_status = 400
    exit_code = 64


class Unauthorized(ServiceError):
    code = family = "unauthorized"
    http_status = 401
    exit_code = 77


class NotFound(ServiceError):
    code = family = "not_found"
    http_status = 404
    exit_code = 66


class AlreadyExists(ServiceError):
    code = family = "already_exists"
    http_status = 409
    exit_code = 73


class Conflict(ServiceError):
    """Somebody else changed the object first, or its state does not allow this now."""

    code = family = "conflict"
    http_status = 412
    exit_code = 75


class Unavailable(ServiceError):
    """The thing that would answer cannot be reached or is not ready; trying again may help."""

    code = family = "unavailable"
    http_status = 503
    exit_code = 69
    retry = True


class NotLeader(Unavailable):
    """Another member leads; `detail["leader"]` says where, if known."""

    code = family = "not_leader"
    http_status = 421


class DeadlineExceeded(Unavailable):
    code = "deadline_exceeded"
    family = "unavailable"
    http_status = 504


class Internal(ServiceError):
    code = family = "internal"


def error_of(status: int, raw: bytes, where: str) -> ServiceError:
    """Turn a refusal into its error class; one that is not ours is `Unavailable` (5xx), `NotFound` or `Internal`."""
    try:
        return ServiceError.from_body(msgspec.json.decode(raw, type=ErrorBody))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        text = raw[:200].decode("utf-8", "replace").strip()
        if status >= 500:
            return Unavailable(f"{where} answered {status}: {text}")
        return NotFound(f"{where}: {text}") if status == 404 else Internal(f"{where} answered {status}: {text}")
