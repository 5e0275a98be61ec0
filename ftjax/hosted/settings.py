"""The config of the server: every key with its default and its check, as `ftjax.config` has those of a run."""

import ipaddress
from pathlib import Path

from ml_collections import ConfigDict

from ftjax import config as configs
from ftjax.config import Key
from ftjax.config_checks import ANY, Check, number, one_of
from ftjax.errors import UserError

MB = 2**20  # as OpenAI counts: a file of 512 MB has 536,870,912 bytes

_HOSTS = Check(lambda value: all(isinstance(name, str) and name for name in value), "names, such as ('gpu.example',)")

_WORDS = Check(lambda value: all(isinstance(word, str) and word for word in value), "texts, such as ('--x=1',)")

# As a run has them: of the base that jobs begin with and answers come from.
_MODEL = ("model.source", "model.revision", "model.dtype", "model.param_dtype", "model.attention")

KEYS: dict[str, Key] = {
    # Where files, jobs and the database are. One server uses it at a time.
    "folder": Key("serve", Check(bool, "a directory")),
    # "": SQLite in the folder; or a URL, postgresql+psycopg://user@host/name.
    "database": Key("", ANY),
    "host": Key("127.0.0.1", Check(bool, "an address of this machine; 0.0.0.0 is all of them")),
    "port": Key(8000, number(0, 65535)),  # 0: one that is free
    # Names by which the server is addressed, beside this machine's own: ("gpu.example",); ("*",): any.
    "hosts": Key((), _HOSTS),
    "certificate": Key("", ANY),  # TLS: PEM files of the certificate, with its chain, and of its private key
    "private_key": Key("", ANY),
    **{name: configs.KEYS[name] for name in _MODEL},
    "model.name": Key("", ANY),  # by which clients ask for it; "": its own
    "limits.requests_per_minute": Key(600, number(1)),  # of a key
    "limits.body_mb": Key(16, number(1)),  # of a request that uploads no file
    "files.max_mb": Key(512, number(1)),  # of one file
    "files.upload_mb": Key(8192, number(1)),  # of one that is uploaded in parts
    "files.quota_mb": Key(65536, number(1)),  # of all files of a key
    # After which a file is removed whose owner has not said when; 0: none is.
    "files.retention_days": Key(0.0, number(0)),
    "jobs.backend": Key("local", one_of("local", "slurm", "kubernetes")),  # what runs them
    "jobs.at_once": Key(1, number(1)),  # that run at the same time
    "jobs.per_key": Key(1, number(1)),  # of one key, of those
    "jobs.queue": Key(100, number(1)),  # of a key that wait
    "jobs.quota_mb": Key(65536, number(1)),  # of all jobs of a key, beyond which it begins none
    # After which the run of a job that has ended is removed; its models stay. 0: none is.
    "jobs.retention_days": Key(0.0, number(0)),
    # What all runs have beside the model: ("adapter.rank=8", "mesh.fsdp=-1"), keys of ftjax.config.
    "jobs.settings": Key((), _WORDS),
    # SLURM and Kubernetes: scripts/slurm/train.sbatch or scripts/gke/render.py of a checkout that all nodes see, and
    # what sbatch or it is given beside, such as ("--gpus-per-node=8",).
    "jobs.script": Key("", ANY),
    "jobs.options": Key((), _WORDS),
    "jobs.namespace": Key("default", ANY),
    # Who answers graders of the type score_model: an endpoint as OpenAI's, and the environment variable of its key.
    "jobs.judges": Key("", ANY),
    "jobs.judges_key": Key("", ANY),
    "generation.slots": Key(16, number(1)),  # answers that are written at the same time
    "generation.waiting": Key(256, number(0)),  # further ones that may wait
    "generation.max_length": Key(2048, number(2)),  # tokens of a prompt and its answer, and of a row that is trained on
    "generation.adapters": Key(8, number(1)),  # models that are loaded beside the base
    "generation.rank": Key(16, number(1)),  # the largest of them
    "tinker.rank": Key(32, number(1)),  # the largest of what is trained step by step
    "tinker.models": Key(8, number(1)),  # of these at the same time, of all keys
    "tinker.batch_tokens": Key(4096, number(1)),  # that are computed together, padding among them
    "tinker.max_length": Key(32768, number(1)),  # tokens of a datum
    "tinker.quota_mb": Key(65536, number(1)),  # of all checkpoints of a key
}


def defaults() -> ConfigDict:
    return configs.defaults(KEYS)


def validate(settings: ConfigDict) -> None:
    """UserError that names the key, its value and what it may be."""
    given = configs.check_values(settings, KEYS, but=("model.source",))
    if bool(given["certificate"]) != bool(given["private_key"]):
        raise UserError("config.certificate and config.private_key go together: set both, or none")
    for key in ("certificate", "private_key"):
        if given[key] and not Path(given[key]).is_file():
            raise UserError(f"config.{key}={given[key]!r}: no such file")
    if given["jobs.per_key"] > given["jobs.at_once"]:
        raise UserError(
            f"config.jobs.per_key={given['jobs.per_key']} is more than config.jobs.at_once={given['jobs.at_once']}, "
            "which are all that run; set it to that or less"
        )


def database_url(settings: ConfigDict) -> str:
    return settings.database or f"sqlite:///{Path(settings.folder).absolute() / 'server.db'}"


def hosts(settings: ConfigDict) -> frozenset[str]:
    """Names by which requests may address the server."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return frozenset({"127.0.0.1", "localhost", "[::1]", host.lower(), *map(str.lower, settings.hosts)})


def is_local(settings: ConfigDict) -> bool:
    """Whether nobody but this machine can ask."""
    try:
        return ipaddress.ip_address(settings.host).is_loopback
    except ValueError:
        return settings.host == "localhost"
