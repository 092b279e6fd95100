"""The HTTP process's side of the link, where the engine's process is killed."""

import asyncio
import socket

import pytest

from deepseek_jax.serve.asking import Event, LostError
from deepseek_jax.serve.link import pack
from deepseek_jax.serve.remote import RemoteAsker


def test_who_is_lost_alone_is_told_and_the_others_wait_on():
    async def lose() -> None:
        ours, theirs = socket.socketpair()
        asker = RemoteAsker(*await asyncio.open_connection(sock=ours))
        running = asyncio.create_task(asker.run())
        lost, other = (asyncio.ensure_future(anext(asker.submit([1], {}, 0))) for _ in range(2))
        await asyncio.sleep(0.01)
        prompt = [[-1.0], [[[7, -1.0], [9, -2.5]]]]
        said = [1, [], [], [], "length", 0, prompt]
        theirs.sendall(pack({"lost": 0, "message": "NaN"}) + pack({"events": [said]}))
        with pytest.raises(LostError, match="NaN"):
            await asyncio.wait_for(lost, 5)
        event = await asyncio.wait_for(other, 5)
        assert event == Event((), (), (), "length", 0, ((-1.0,), (((7, -1.0), (9, -2.5)),)))
        theirs.close()
        await asyncio.wait_for(running, 5)

    asyncio.run(lose())


@pytest.mark.parametrize("read", [True, False])
def test_who_waits_for_an_engine_that_is_killed_is_told(read):
    """Also where it had not read all that it was told: then the connection is reset."""

    async def lose() -> None:
        ours, theirs = socket.socketpair()
        asker = RemoteAsker(*await asyncio.open_connection(sock=ours))
        running = asyncio.create_task(asker.run())
        waiting = asyncio.ensure_future(anext(asker.submit([1], {}, 0)))
        asked = asyncio.create_task(asker.metrics())
        await asyncio.sleep(0.01)
        if read:
            theirs.recv(1 << 16)
        theirs.close()
        await asyncio.wait_for(running, 5)
        for each in (waiting, asked, anext(asker.submit([1], {}, 0)), asker.metrics()):
            with pytest.raises(LostError, match="has ended"):
                await asyncio.wait_for(each, 5)

    asyncio.run(lose())
