"""Fine-tuning jobs and their models behind HTTP, on the machines one has, as OpenAI's client asks for them.

    python -m ftjax.serve --config serve                    the server; the same command goes on with what is there
    python -m ftjax.serve --config serve keys create NAME   an API key, which is shown this once
    python -m ftjax.serve --config serve keys list
    python -m ftjax.serve --config serve keys renew ID      another secret for who has what is made with that key
    python -m ftjax.serve --config serve keys revoke ID

--config.model.source names the model that is tuned, --config.folder where all of it is kept. The first start makes a
key. Ctrl-C or SIGTERM ends the server once it has answered what it was asked. In Python:

    openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key=KEY)
"""

import datetime
import functools
import sys
from types import ModuleType

from ml_collections import ConfigDict

from ftjax import cli, config_flag
from ftjax.errors import UserError
from ftjax.hosted import settings as configs

_KEYS = "`keys create NAME`, `keys list`, `keys renew ID` or `keys revoke ID`"


def main(argv: list[str]) -> int:
    settings = config_flag.value(configs.KEYS)
    configs.validate(settings)
    match argv[1:]:
        case []:
            return _server().serve(settings)
        case ["keys", *words]:
            return _keys(settings, words)
        case [word, *_]:
            raise UserError(f"unexpected argument {word!r}; for keys it is {_KEYS}")


def _keys(settings: ConfigDict, words: list[str]) -> int:
    keys = _server().keys_of(settings)
    match words:
        case ["create", name]:
            created = keys.create(name)
            print(f"{created.id} is the key of {name}. It is not shown again:\n{created.secret}")
        case ["renew", id]:
            print(f"the key {id} is another now. It is not shown again:\n{keys.renew(id).secret}")
        case ["list"]:
            for key in keys.all():
                made = datetime.datetime.fromtimestamp(key.created_at, datetime.UTC)
                state = "revoked" if key.revoked_at else "holds"
                print(f"{key.id}  {key.prefix}...  {made:%Y-%m-%d}  {state:7}  {key.name}")
        case ["revoke", id]:
            keys.revoke(id)
            print(f"{id} is revoked; what was made with it stays")
        case _:
            raise UserError(f"it is {_KEYS}")
    return 0


def _server() -> ModuleType:
    try:
        from ftjax.hosted import server
    except ImportError as error:
        raise UserError(f"the server needs further packages ({error}); pip install 'ftjax[serve]'") from error
    return server


if __name__ == "__main__":
    sys.argv[0] = "ftjax.serve"  # absl shows in --help the flags defined under this name
    config_flag.define("serve")
    cli.run(main, functools.partial(config_flag.parse, keys=configs.KEYS))
