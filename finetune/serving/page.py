"""The pages of a server: files of this package, and a policy under which a browser runs nothing else."""

from pathlib import Path
from string import Template

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, Response

from finetune.serving.guard import PAGES

FILES = Path(__file__).parent / "pages"
TITLES = {"chat": "Chat", "images": "Images", "runs": "Runs", "machine": "Machine"}
OTHERS = ("runs", "machine")  # beside the main page
TYPES = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8"}
# Of this server's answers, the files of this package alone are sent as scripts and styles. data: and blob: are images
# that a page has been sent within JSON.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def routes(main: str) -> APIRouter:
    """`/` with the page of that name, the others, and what they load. All is read once: no request names a file."""
    router = APIRouter()
    for path, name in zip(PAGES, (main, *OTHERS), strict=True):
        html = page(name, main)
        _give(router, path, HTMLResponse(html, headers={"Content-Security-Policy": POLICY}))
    for file in sorted(FILES.iterdir()):
        if file.suffix in TYPES:
            _give(router, f"/static/{file.name}", Response(file.read_bytes(), media_type=TYPES[file.suffix]))
    return router


def page(name: str, main: str) -> str:
    """One page, with links to all that this server has."""
    current = ' aria-current="page"'
    links = "".join(
        f'<a href="{path}"{current if each == name else ""}>{TITLES[each]}</a>'
        for each, path in ((main, "./"), *((other, other) for other in OTHERS))
    )
    layout = Template(_text("layout"))
    return layout.substitute(title=TITLES[name], name=name, links=links, body=_text(name))


def _text(name: str) -> str:
    return (FILES / f"{name}.html").read_text(encoding="utf-8")


def _give(router: APIRouter, path: str, answer: Response) -> None:
    @router.get(path, include_in_schema=False)
    async def give() -> Response:
        return answer
