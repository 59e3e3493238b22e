"""Errors of the API: {"error": {"message", "type", "param", "code"}} with a status that clients understand.

Clients of OpenAI decide by the status and the header `x-should-retry` whether to try again. It is "true" for
429 and 503, where the same request may succeed later, and "false" for all others.
"""

from __future__ import annotations

from typing import Any

# status -> (type, code) where an error gives no code of its own
KINDS = {
    400: ("invalid_request_error", None),
    401: ("invalid_request_error", "invalid_api_key"),
    403: ("invalid_request_error", "forbidden"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("invalid_request_error", "request_timeout"),
    413: ("invalid_request_error", "too_large"),
    415: ("invalid_request_error", "unsupported_media_type"),
    429: ("rate_limit_error", "queue_full"),
    500: ("server_error", "internal_error"),
    503: ("server_error", "unavailable"),
}
RETRIED = (429, 503)


class ApiError(Exception):
    """An answer other than the pictures.

    Args:
      status: one of KINDS.
      message: one line that names what is wrong and how to mend it.
      param: the field at fault.
      code: a word for programs; None takes that of KINDS.
      retry_after: seconds after which the client may try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind, code = KINDS[self.status]
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code or code}
        return {"error": error}

    def headers(self) -> dict[str, str]:
        """The headers of the answer."""
        headers = {"x-should-retry": "true" if self.status in RETRIED else "false"}
        if self.retry_after is not None:
            headers["retry-after"] = str(self.retry_after)
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers
