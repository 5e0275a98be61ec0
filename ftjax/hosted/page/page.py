"""The page at /: jobs, chat and downloads for people, by the same routes as programs have.

It is the same for everyone and has no data, so that it needs no key; it asks for one, and sends it with everything that
it asks for. It loads nothing but itself, and its policy forbids everything else.
"""

from importlib import resources

import jinja2
from fastapi import APIRouter
from fastapi.responses import HTMLResponse
from markupsafe import Markup

from ftjax.reporting.harmless import digest

PATH = "/"
_SCRIPTS = ("page", "curves", "jobs", "stored", "new", "chat", "views")  # one script, in this order


def routes() -> APIRouter:
    router = APIRouter()
    html, headers = page()

    @router.get(PATH)
    def show() -> HTMLResponse:
        return HTMLResponse(html, headers=headers)

    return router


def page() -> tuple[str, dict[str, str]]:
    """(the page, its headers)."""
    style = _resource("ftjax.reporting", "style.css") + _resource("ftjax.hosted.page", "page.css")
    script = "".join(_resource("ftjax.hosted.page", f"{name}.js") for name in _SCRIPTS)
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        _resource("ftjax.hosted.page", "page.html")
    )
    policy = (
        f"default-src 'none'; style-src '{digest(style)}'; script-src '{digest(script)}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    return template.render(style=Markup(style), script=Markup(script)), {
        "Content-Security-Policy": policy,
        "Cache-Control": "no-store",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }


def _resource(package: str, name: str) -> str:
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")
