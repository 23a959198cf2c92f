"""The picture that published outputs were recorded on: downloaded, checked, kept."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from recorded_models import recorded_model
from test_published import NAME, picture, published, slices, without_recording

import converter
from converter.checks.pixels import read_normalisation
from converter.checks.published import Slices, check_published
from converter.errors import AccessError
from converter.hub import recorded_picture as module
from converter.hub.access import Access
from converter.hub.recorded_picture import PICTURE_SHA256, PICTURE_URL, recorded_picture

__all__ = ["picture", "slices"]  # fixtures

PICTURE = b"the picture"
OTHER = b"another picture"


@dataclass
class Bucket:
    """A server with one picture, on the loopback interface."""

    content: bytes = PICTURE
    status: int = 200
    length: int | None = None
    asked: list[str] = field(default_factory=list)


@contextmanager
def serving(bucket: Bucket) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            bucket.asked.append(self.path)
            self.send_response(bucket.status, "\x1b[31mred")
            self.send_header("Content-Length", str(bucket.length or len(bucket.content)))
            self.end_headers()
            self.wfile.write(bucket.content)

        def log_message(self, format: str, *args: object) -> None:
            """Logs nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    bucket = Bucket()
    with serving(bucket) as address:
        monkeypatch.setattr(module, "PICTURE_URL", f"{address}/val2017/000000039769.jpg")
        monkeypatch.setattr(module, "PICTURE_SHA256", hashlib.sha256(PICTURE).hexdigest())
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield bucket


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def access(cache: Path) -> Access:
    return Access(cache_dir=cache)


def kept(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file()]


def test_the_picture_has_an_https_address_and_a_known_digest() -> None:
    assert PICTURE_URL == (
        "https://s3.amazonaws.com/images.cocodataset.org/val2017/000000039769.jpg"
    )
    assert PICTURE_SHA256 == "dea9e7ef97386345f7cff32f9055da4982da5471c48d575146c796ab4563b04e"


def test_the_picture_is_downloaded_once(bucket: Bucket, access: Access) -> None:
    path = recorded_picture(access)

    assert path.read_bytes() == PICTURE
    assert recorded_picture(access) == path
    assert bucket.asked == ["/val2017/000000039769.jpg"]


@pytest.mark.parametrize("content", [OTHER, b"", PICTURE + b"\n", b"x" * (1 << 21)])
def test_another_picture_is_refused_and_not_cached(
    bucket: Bucket, access: Access, cache: Path, content: bytes
) -> None:
    bucket.content = content

    with pytest.raises(AccessError, match="is not the picture that outputs were recorded on"):
        recorded_picture(access)

    assert kept(cache) == []


def test_a_server_that_has_no_picture_is_named_without_its_words(
    bucket: Bucket, access: Access, cache: Path
) -> None:
    bucket.status = 404

    with pytest.raises(AccessError, match=r"cannot be downloaded \(status 404\)\.") as caught:
        recorded_picture(access)

    assert "--image" in caught.value.remedy
    assert "red" not in caught.value.message
    assert kept(cache) == []


def test_a_download_that_breaks_off_is_not_cached(
    bucket: Bucket, access: Access, cache: Path
) -> None:
    bucket.content, bucket.length = PICTURE[:5], len(PICTURE)

    with pytest.raises(AccessError):
        recorded_picture(access)

    assert kept(cache) == []


def test_an_address_that_does_not_answer_is_reported(
    access: Access, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Bucket()) as address:
        pass
    monkeypatch.setattr(module, "PICTURE_URL", f"{address}/picture.jpg")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    with pytest.raises(AccessError, match=r"cannot be downloaded \(ConnectionRefusedError\)"):
        recorded_picture(access)


def test_a_cached_picture_that_is_damaged_is_downloaded_again(
    bucket: Bucket, access: Access
) -> None:
    path = recorded_picture(access)
    path.write_bytes(OTHER)

    assert recorded_picture(access).read_bytes() == PICTURE


def test_offline_a_damaged_picture_is_refused(bucket: Bucket, access: Access, cache: Path) -> None:
    path = recorded_picture(access)
    path.write_bytes(OTHER)

    with pytest.raises(AccessError, match="is damaged in the cache"):
        recorded_picture(Access(cache_dir=cache, local_files_only=True))

    assert len(bucket.asked) == 1


def test_a_cache_that_cannot_be_used_is_reported(
    bucket: Bucket, access: Access, cache: Path
) -> None:
    cache.write_bytes(b"no folder")

    with pytest.raises(AccessError, match="cannot be cached"):
        recorded_picture(access)


def test_without_the_picture_the_level_is_not_checked(
    bucket: Bucket, model: Path, slices: Slices, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    without_recording(monkeypatch)
    bucket.content = OTHER

    found = converter.verify(model, cache_dir=cache)

    assert found.verdict == "unverified"
    assert published(found).status == "not checked"
    assert "is not the picture that outputs were recorded on" in published(found).reason


def test_a_picture_that_the_user_gives_is_not_compared_with_the_digest(
    bucket: Bucket, model: Path, slices: Slices, picture: Path, access: Access
) -> None:
    normalisation = read_normalisation(model / "preprocessor_config.json", 3)

    level = check_published(recorded_model(NAME), normalisation, slices, picture, access)

    assert level.status == "passed"
    assert bucket.asked == []
