"""The page and what it asks for: one process, on this machine only, for those who have the token.

The page loads nothing but itself, and its policy forbids everything else. Its address has the token; what it asks for
carries the token in a header, which no page from elsewhere can send. Names other than this machine's own are refused,
so that no foreign name that is made to point here is served.
"""

import secrets
import socket
from collections.abc import Callable
from importlib import resources

import jinja2
from markupsafe import Markup

from ftjax.errors import UserError
from ftjax.labeling.session import CHOICES, Session, Stale, name_of
from ftjax.labeling.view import view
from ftjax.reporting.harmless import digest

HOST = "127.0.0.1"
ACTIONS = ("next", "judge", "undo", "finish")


def import_library() -> None:
    """UserError where the web library is not installed."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"the page needs a web library ({error}); pip install 'ftjax[label]', or --terminal") from error


def app(session: Session, token: str, question: str, labeler: str, finished: Callable[[], list[str]]):
    """The ASGI application. It runs on one event loop, where no two judgements are taken at the same time.

    Args:
      question: what is asked of every pair.
      labeler: the name that the page proposes.
      finished: called when a labeler has nothing more to judge or ends; what has come of it all, in sentences.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    html, headers = page(question, labeler)

    def check(given: str | None) -> None:
        if not secrets.compare_digest((given or "").encode(), token.encode()):
            raise HTTPException(403, "the address lacks the token; open the one that the command printed")

    async def show(request: Request) -> Response:
        check(request.query_params.get("token"))
        return HTMLResponse(html, headers=headers)

    async def act(request: Request) -> Response:
        check(request.headers.get("authorization", "").removeprefix("Bearer "))
        try:
            given = await request.json()
            who = name_of(given["labeler"])
            match request.url.path:
                case "/judge":
                    if given["choice"] not in CHOICES:
                        raise ValueError(given["choice"])
                    session.judge(who, given["pair"], given["choice"])
                case "/undo":
                    session.undo(who)
                case "/finish":
                    session.leave(who)
                    return JSONResponse({"summary": finished()}, headers=headers)
        except UserError as error:
            raise HTTPException(400, str(error)) from error
        except Stale:
            return JSONResponse({"stale": True, **state(who)}, 409, headers)
        except (ValueError, KeyError, TypeError) as error:
            raise HTTPException(400, f"not understood: {error!r}") from error
        except OSError as error:  # such as a full disk
            raise HTTPException(500, str(error)) from error
        return JSONResponse(state(who), headers=headers)

    def state(who: str) -> dict:
        shown = session.current(who)
        progress = session.progress(who)
        said = {"progress": progress._asdict(), "undo": session.can_undo(who)}
        if shown is None:
            return said | {"summary": finished()}
        return said | {"pair": {"id": shown.pair.id, **view(shown)._asdict()}}

    async def refused(request: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": error.detail}, error.status_code, headers)

    return Starlette(
        routes=[Route("/", show), *[Route(f"/{action}", act, methods=["POST"]) for action in ACTIONS]],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"], www_redirect=False)],
        exception_handlers={HTTPException: refused},
    )


def page(question: str, labeler: str) -> tuple[str, dict[str, str]]:
    """(the page, the headers that all answers have)."""
    style = _resource("ftjax.reporting", "style.css") + _resource("ftjax.labeling", "label.css")
    script = _resource("ftjax.labeling", "label.js")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True).from_string(
        _resource("ftjax.labeling", "page.html")
    )
    html = template.render(style=Markup(style), script=Markup(script), question=question, labeler=labeler)
    policy = (
        f"default-src 'none'; style-src '{digest(style)}'; script-src '{digest(script)}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    )
    return html, {
        "Content-Security-Policy": policy,
        "Cache-Control": "no-store",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }


def listen(port: int) -> socket.socket:
    """A socket of this machine alone; port 0 is a free one. UserError where the port is taken."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((HOST, port))
        sock.listen()  # so that a browser that is faster than the server waits for it
    except OSError as error:
        sock.close()
        raise UserError(f"--port {port}: {error.strerror}; name another, or 0 for one that is free") from error
    return sock


def serve(application, sock: socket.socket) -> None:
    """Until Ctrl-C, which raises KeyboardInterrupt once what was asked for is answered."""
    import uvicorn

    config = uvicorn.Config(
        application,
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    uvicorn.Server(config).run(sockets=[sock])


def _resource(package: str, name: str) -> str:
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")
