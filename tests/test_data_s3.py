"""Data from an S3 server on this machine that refuses, cuts and drops requests: the batches are those of a folder.

Needs the packages of the extra `buckets`: pytest -m 'full and not aot and not mutants' tests/test_data_s3.py
"""

import os
import socket
import threading

import numpy as np
import pytest
from test_data_batches import assert_same, batches_of
from test_data_source import png

from limoe.data import files
from limoe.data.images import Preprocess
from limoe.data.order import BlockOrder, Order
from limoe.data.places import open_source
from limoe.data.shards import Example, write_shard

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore")]


class Faulty:
    """A WSGI application in front of another: one request in `one_in` is refused, cut short, or ends its connection."""

    def __init__(self, application, one_in):
        self.application, self.one_in, self.counts = application, one_in, {"503": 0, "cut": 0, "died": 0}
        self._draws, self._lock = np.random.default_rng(0), threading.Lock()

    def __call__(self, environ, start_response):
        with self._lock:
            fault = list(self.counts)[self._draws.integers(3)] if self._draws.random() < 1 / self.one_in else ""
            if fault:
                self.counts[fault] += 1
        if fault == "503":
            start_response("503 Slow Down", [("Content-Length", "0")])
            return [b""]
        body = b"".join(self.application(environ, start_response))
        if fault == "cut":
            return [body[: len(body) // 2]]
        if fault == "died":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        return [body]


@pytest.fixture
def server(monkeypatch):
    serving = pytest.importorskip("werkzeug.serving")
    pytest.importorskip("s3fs")
    from moto.server import DomainDispatcherApplication, create_backend_app

    faulty = Faulty(DomainDispatcherApplication(create_backend_app), 10**9)
    made = serving.make_server("127.0.0.1", 0, faulty, threaded=True)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{made.port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    yield faulty
    made.shutdown()
    thread.join(timeout=10)


def test_with_one_request_in_ten_failing_the_batches_are_those_of_a_folder(server, tmp_path, monkeypatch):
    import s3fs

    s3fs.S3FileSystem().mkdir("pairs")
    for shard in range(3):
        examples = [Example(f"{shard}{n:02}", png((shard, n, 9), side=60), f"{n}", None, "png") for n in range(40)]
        write_shard(tmp_path / "data" / f"{shard}.tar", examples)
        files.write_bytes(f"s3://pairs/data/{shard}.tar", (tmp_path / "data" / f"{shard}.tar").read_bytes())
    monkeypatch.setattr(files, "_BUCKET_PAUSES", (0.01,) * 8)
    server.one_in = 10
    for order in (Order(0), Order(0, (), BlockOrder(8, 32))):
        cache = tmp_path / f"cache{bool(order.blocks)}"
        there, here = (
            open_source(place, preprocess=Preprocess(8), cache_dir=cache)
            for place in (str(tmp_path / "data"), "s3://pairs/data")
        )
        if order.blocks:
            here.keep_blocks(32)
        for step in range(6):
            assert_same(batches_of(there, seed=order).at(step), batches_of(here, seed=order).at(step))
    assert all(server.counts.values()), "every kind of fault was met"
    assert sorted(files.names_in("s3://pairs/data")) == sorted(os.listdir(tmp_path / "data"))
    assert files.list_files("s3://pairs/data/*.tar") == [f"s3://pairs/data/{shard}.tar" for shard in range(3)]
