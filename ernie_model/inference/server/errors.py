"""Errors in the shape of OpenAI's API: `{"error": {"message", "type", "param", "code"}}`."""

from typing import Any

from starlette.responses import JSONResponse


class ApiError(Exception):
    """What a client is told.

    Attributes:
        param: the field at fault, as `messages[0].content[1].image_url.url`.
        retry_after: in seconds; None where asking again would not help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",  # noqa: A002 - the field's own name
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(self.retry_after)
        elif self.status in (408, 409) or self.status >= 500:
            headers["x-should-retry"] = "false"  # OpenAI's clients ask again after these, and would meet the same end
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)
