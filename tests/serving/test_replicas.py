"""Two replicas behind one address: one is killed under load, and only the requests in flight must be sent again."""

import asyncio
import concurrent.futures
import contextlib
import http.client
import itertools
import threading
import urllib.parse

import pytest

from servers import ask, start_process

CLIENTS, REQUESTS = 8, 8


class Balancer:
    """Forward connections to the replicas in turn; a replica that refuses the connection is passed over.

    It stands for the proxy of a cluster: it sends no request twice.
    """

    def __init__(self, urls):
        addresses = [(u.hostname, u.port) for u in map(urllib.parse.urlsplit, urls)]
        self.orders = itertools.cycle([addresses, addresses[::-1]])
        self.loop, self.started = asyncio.new_event_loop(), threading.Event()
        threading.Thread(target=self.loop.run_until_complete, args=(self._serve(),), daemon=True).start()
        assert self.started.wait(10)

    async def _serve(self):
        server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self.started.set()
        await server.serve_forever()

    async def _connect(self, reader, writer):
        for address in next(self.orders):
            with contextlib.suppress(OSError):
                to_reader, to_writer = await asyncio.open_connection(*address)
                await asyncio.gather(self._copy(reader, to_writer), self._copy(to_reader, writer))
                return
        writer.close()

    async def _copy(self, reader, writer):
        with contextlib.suppress(OSError):
            while piece := await reader.read(65536):
                writer.write(piece)
                await writer.drain()
        writer.close()


@pytest.mark.slow
def test_killed_replica_costs_only_the_requests_in_flight(chat_folder):
    replicas = [start_process(chat_folder) for _ in range(2)]
    balancer = Balancer([url for _, url in replicas])
    done, killed, gone = threading.Semaphore(0), threading.Event(), threading.Event()

    def client(number):
        """Send requests one after another; return their texts, and how many had to be sent again."""
        texts, repeated = [], 0
        for i in range(REQUESTS):
            for _ in range(2):
                try:
                    status, answer = ask(balancer.url, prompt=[40 + number, 50 + i], max_tokens=30, num_steps=16)
                    assert status == 200
                    texts.append(answer["choices"][0]["text"])
                    break
                except (OSError, http.client.HTTPException):
                    assert killed.is_set()
                    assert gone.wait(30)  # a dying process still accepts connections
                    repeated += 1
            done.release()
        return texts, repeated

    try:
        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
            jobs = [pool.submit(client, number) for number in range(CLIENTS)]
            for _ in range(CLIENTS * REQUESTS // 4):
                done.acquire()
            killed.set()
            replicas[0][0].kill()
            replicas[0][0].wait()
            gone.set()
            found = [job.result() for job in jobs]
        assert sum(repeated for _, repeated in found) <= CLIENTS
        for number, (texts, _) in enumerate(found):
            assert len(texts) == REQUESTS
            prompt = [40 + number, 50 + REQUESTS - 1]
            assert texts[-1] == ask(replicas[1][1], prompt=prompt, max_tokens=30, num_steps=16)[1]["choices"][0]["text"]
    finally:
        for process, _ in replicas:
            process.kill()
            process.communicate(timeout=30)
