"""What few can do at the same time: a key that asks for much keeps nobody else from it."""

import functools

import anyio
import pytest

from ftjax.hosted.refusals import Refused
from ftjax.hosted.shares import Shares


def test_a_key_has_its_share_and_others_go_on_beside_it():
    async def main():
        shares, running, end = Shares("walks", at_once=3, of_key=2, open=4), [], anyio.Event()

        async def walk(owner):
            async with shares.of(owner):
                running.append(owner)
                await end.wait()

        async with anyio.create_task_group() as tasks:
            for owner in ("anna", "anna", "anna", "anna", "ben"):
                tasks.start_soon(walk, owner)
            await anyio.wait_all_tasks_blocked()
            assert sorted(running) == ["anna", "anna", "ben"]
            with pytest.raises(Refused, match="4 walks of your key are not done") as refused:
                await walk("anna")
            assert refused.value.status == 429
            end.set()
        assert sorted(running) == ["anna"] * 4 + ["ben"]
        assert await shares.run("anna", functools.partial(int, "7")) == 7

    anyio.run(main)


def test_what_fails_or_is_given_up_frees_its_share():
    async def main():
        shares = Shares("walks", at_once=1, of_key=1, open=1)
        with pytest.raises(ZeroDivisionError):
            await shares.run("anna", lambda: 1 / 0)
        with anyio.move_on_after(0.01):
            async with shares.of("anna"):
                await anyio.sleep_forever()
        assert await shares.run("ben", lambda: 7) == 7

    anyio.run(main)
