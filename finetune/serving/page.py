"""The page of a server: one file, whose own script and style are all that a browser may run on it."""

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, Response

PAGES = Path(__file__).parent


def route(file: str) -> APIRouter:
    """`/` with a page of this folder."""
    text = (PAGES / file).read_text(encoding="utf-8")
    headers = {"Content-Security-Policy": policy(text)}
    router = APIRouter()

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(text, headers=headers)

    return router


def policy(text: str) -> str:
    """A Content-Security-Policy under which the page's script and style run, and no other ones."""
    script, style = (_hash(text, tag) for tag in ("script", "style"))
    return (
        f"default-src 'none'; script-src '{script}'; style-src '{style}'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hash(text: str, tag: str) -> str:
    (found,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return "sha256-" + base64.b64encode(hashlib.sha256(found.encode()).digest()).decode()
