"""The picture that published outputs were recorded on, from COCO's bucket.

The certificate of images.cocodataset.org is Amazon's and does not include that name, so for https
the address uses Amazon's name of the bucket.
"""

import hashlib
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

from converter.errors import AccessError
from converter.files import replacing, sha256
from converter.hub.access import Access

PICTURE_URL = "https://s3.amazonaws.com/images.cocodataset.org/val2017/000000039769.jpg"
PICTURE_SHA256 = "dea9e7ef97386345f7cff32f9055da4982da5471c48d575146c796ab4563b04e"

_LIMIT = 1 << 20  # bytes; the picture has 173 kB
_TIMEOUT = 30  # seconds without an answer

_REMEDY = "Give the picture with --image."


def recorded_picture(access: Access) -> Path:
    """The picture in the cache, checked by its SHA-256; downloaded if it is missing or damaged.

    Raises:
        AccessError: it is not in the cache and may not or cannot be downloaded, its address serves
            something else, or the cache cannot be used.
    """
    from huggingface_hub import cached_assets_path

    try:
        folder = cached_assets_path("eomt-convert", namespace="images", assets_dir=access.cache_dir)
        picture = folder / PICTURE_URL.rpartition("/")[2]
        cached = picture.exists()
        if cached and sha256(picture) == PICTURE_SHA256:
            return picture
        if access.offline:
            where = "is damaged in the cache" if cached else "is not in the cache"
            raise AccessError(f"{PICTURE_URL} {where}.", _REMEDY)
        content = _download()
        with replacing(picture) as file:
            file.write(content)
    # huggingface_hub raises a ValueError if there is a file in place of the folder
    except (OSError, ValueError) as error:
        raise AccessError(f"{PICTURE_URL} cannot be cached: {error}.", _REMEDY) from error
    return picture


def _download() -> bytes:
    """Downloads the picture and checks its SHA-256.

    Raises:
        AccessError: its address serves something else, or does not answer.
    """
    try:
        with urlopen(PICTURE_URL, timeout=_TIMEOUT) as response:
            content: bytes = response.read(_LIMIT + 1)
    except HTTPError as error:
        error.close()  # the error is also the response
        raise _not_downloaded(f"status {error.code}") from error
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        kind = type(reason if isinstance(reason, Exception) else error).__name__
        raise _not_downloaded(kind) from error
    found = hashlib.sha256(content).hexdigest()
    if found != PICTURE_SHA256:
        raise AccessError(
            f"The download from {PICTURE_URL} is not the picture that outputs were recorded on: "
            f"its SHA-256 is {found}, expected {PICTURE_SHA256}.",
            _REMEDY,
        )
    return content


def _not_downloaded(why: str) -> AccessError:
    return AccessError(f"{PICTURE_URL} cannot be downloaded ({why}).", _REMEDY)
