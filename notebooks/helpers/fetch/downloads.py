"""Downloads that go on where they stopped and are checked before they count.

A file is written as NAME.part and takes its name when its size, first bytes and hash are right. `requests` and
`urllib3.util.Retry` do the connection, the waiting and `Retry-After`; what is here is what they leave to the caller:
bodies that are cut, ranges that are wrong, files that changed meanwhile.
"""

import contextlib
import json
import os
import re
import shutil
import time

from ..runtime.files import as_path, hash_file, is_remote, read_text, write_text

USER_AGENT = "chest-xray-notebooks/1.0 (research and teaching; python-requests)"

_BLOCK = 2**18  # bytes
_SPARE = 2**26  # bytes of disk that a download leaves free, for what else is written meanwhile
_SIGNS = {".tgz": b"\x1f\x8b", ".gz": b"\x1f\x8b", ".zip": b"PK", ".png": b"\x89PNG"}  # first bytes, by ending


class DownloadError(OSError):
    """A file that could not be had, or is not what was asked for; the message says what to do."""


def download_file(
    url, path, sha256=None, size=None, progress=None, *, md5=None, record=True, retries=5, pause=1.0, timeout=60,
    session=None,
):  # fmt: skip
    """Downloads a file, resuming an earlier attempt; a file that is there already is only checked.

    The SHA-256 of a file for which no hash is given is recorded on first use in NAME.sha256, in the form that
    `sha256sum -c` reads, and later copies are compared with it: it then shows change and damage, not who made the file.
    A server such as Hugging Face's that tells the SHA-256 itself, in `X-Linked-ETag`, is held to its word.

    Args:
        url: address, http or https.
        path: path of the file, on a disk of this machine; its ending tells what first bytes are expected.
        sha256: SHA-256 of the file in hexadecimal, if known.
        size: its size in bytes, if known.
        progress: callable such as `tqdm`, called with `total=` (None if the server does not tell), `initial=`, `desc=`,
            `unit="B"` and `unit_scale=True`, returning an object with `update(n)` and `close()`. n is negative where a
            download starts anew.
        md5: MD5 of the file in hexadecimal, if that is what its makers published.
        record: whether to record the hash of a file for which none is given.
        retries: attempts in a row that may bring nothing new before giving up.
        pause: seconds before the second of them, doubled each time; a server's `Retry-After` goes before it.
        timeout: seconds of silence after which a connection counts as broken.
        session: `requests.Session` of `open_session`, for many files from one server.

    Returns:
        Path of the file.

    Raises:
        DownloadError: the server refuses, the connection stays broken, a web page comes instead of the file, size or
            hash is wrong, or the disk lacks space. The file then isn't there under its name.
        ValueError: the path is in a bucket.
    """
    if is_remote(path):
        raise ValueError(f"{path} lies in a bucket. Download to a local folder and copy from there.")
    path = as_path(path)
    sums = path.with_name(path.name + ".sha256")
    expected = {name: value.lower() for name, value in (("sha256", sha256), ("md5", md5)) if value}
    recorded = read_text(sums).split()[:1] if sums.exists() and not expected else []
    expected |= {"sha256": recorded[0].lower()} if recorded else {}
    source = f"the one recorded in {sums.name} on first use" if recorded else "the expected one"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        with contextlib.closing(_Bar(progress, path.name)) as bar:
            _fetch_part(url, part, size, bar, retries, pause, timeout, session)
        told = (_read_state(part, url) or {}).get("sha256")
        if told and not expected:
            expected, source = {"sha256": told}, "the one that the server told"
        try:
            _check_beginning(url, part)
            _check(part, size, expected, source, "It was removed; download again, and if that does not help")
        except DownloadError:
            part.unlink()
            _state_of(part).unlink(missing_ok=True)
            raise
        os.replace(part, path)
        _state_of(part).unlink(missing_ok=True)
    else:
        _check(path, size, expected, source, "Remove it to download it again; if that does not help")
    if record and not sha256 and not md5 and not recorded:
        write_text(sums, f"{expected.get('sha256') or hash_file(path)}  {path.name}\n")
    return path


def open_session(retries=5, pause=1.0):
    """Opens a `requests.Session` that waits and asks again after 429 and 5xx; arguments as for `download_file`."""
    import requests  # not above: this room is imported where nothing is downloaded, too
    from urllib3.util import Retry

    retry = Retry(
        total=None,
        connect=0,  # broken connections are for _fetch_part to count
        read=0,
        other=0,
        redirect=10,
        status=retries,
        backoff_factor=pause,
        status_forcelist=(429, 500, 502, 503, 504),
        allowed_methods=("GET",),
        respect_retry_after_header=True,
        raise_on_status=False,
    )
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retry))
    # Identity: a tgz is to come as it is, and a range counts its bytes.
    session.headers.update({"User-Agent": USER_AGENT, "Accept-Encoding": "identity"})
    return session


def assert_space(folder, needed):
    """Raises DownloadError if the disk of a folder has less than `needed` bytes free, and some to spare."""
    free = shutil.disk_usage(folder).free
    if free < needed + _SPARE:
        raise DownloadError(
            f"{folder}: {needed:,} bytes are needed and {free:,} are free, of which {_SPARE:,} are to stay free; make "
            "space, or choose another folder"
        )


class _Bar:
    """One bar over all attempts; it is made when the size is known, and follows the size of the .part file."""

    def __init__(self, progress, name):
        self.progress, self.name, self.bar, self.at = progress, name, None, 0

    def move_to(self, position, total=None):
        if self.bar is None and self.progress:
            options = {"desc": self.name, "unit": "B", "unit_scale": True}
            self.bar = self.progress(total=total, initial=position, **options)
        elif self.bar is not None:
            self.bar.update(position - self.at)
        self.at = position

    def close(self):
        if self.bar is not None:
            self.bar.close()


def _fetch_part(url, part, size, bar, retries, pause, timeout, session):
    """Fills a .part file by as many requests as it takes."""
    import requests
    import urllib3

    broken = (requests.exceptions.ConnectionError, requests.exceptions.Timeout, urllib3.exceptions.HTTPError, _Broken)
    with contextlib.ExitStack() as stack:
        session = session or stack.enter_context(open_session(retries, pause))
        idle, most = 0, _size(part)  # a part that is begun anew has to grow beyond what there was
        while True:
            try:
                _request(session, url, part, size, bar, timeout)
                return
            except broken as error:
                idle = 0 if _size(part) > most else idle + 1
                most = max(most, _size(part))
                if idle > retries:
                    raise DownloadError(
                        f"{url}: the connection broke {idle} times in a row ({error}); {_size(part):,} bytes are "
                        f"kept in {part.name}: run this again later, and it goes on from there"
                    ) from error
            time.sleep(pause * 2 ** min(max(idle - 1, 0), 6))


def _request(session, url, part, size, bar, timeout):
    """Asks once, for what the .part file still lacks; `_Broken` or an error of `requests` if it still lacks some."""
    have, known = _size(part), _read_state(part, url)
    headers = {}
    if have and known and have == known["total"]:  # an earlier attempt ended just before the last check
        return
    if have and known:  # a part whose origin nobody noted is not gone on with
        headers["Range"] = f"bytes={have}-"
        if known["validator"]:
            headers["If-Range"] = known["validator"]
    with session.get(url, headers=headers, stream=True, timeout=timeout) as response:
        if response.status_code == 416 and headers:  # nothing is left to send, or the part is longer than the file
            if response.headers.get("Content-Range") == f"bytes */{have}" and known["total"] is None:
                return
            part.unlink()
            raise _Broken(f"{have:,} bytes were kept of a file that is no longer so long")
        if response.status_code not in (200, 206):
            what = f"HTTP {response.status_code} {response.reason or ''}".strip()
            raise DownloadError(f"{url}: the server answers {what}; open the address in a browser, or try again later")
        total = _read_total(response, have if headers else 0, known, part)
        if response.status_code == 200:
            have = 0
        if size is not None and total not in (None, size):
            raise DownloadError(
                f"{url}: the server has {total:,} bytes, {size:,} are expected; is this the right file?"
            )
        if "html" in response.headers.get("Content-Type", "").lower() and not part.name.endswith(
            (".html.part", ".htm.part")
        ):
            raise DownloadError(_web_page(url, part))
        assert_space(part.parent, (total or size or have) - have)
        if not have:
            etag = response.headers.get("ETag", "")
            validator = response.headers.get("Last-Modified") if etag[:2] in ("", "W/") else etag
            told = {"total": total, "validator": validator, "sha256": _linked_hash(response)}
            write_text(_state_of(part), json.dumps({"url": url, **told}))
        bar.move_to(have, total)
        with part.open("ab" if have else "wb") as file:
            for block in response.raw.stream(_BLOCK, decode_content=False):
                file.write(block)
                have += len(block)
                bar.move_to(have)
                if have > (total or size or have):
                    part.unlink()
                    raise DownloadError(f"{url}: the server sends more than the {total or size:,} bytes that it should")
    if have < (total or size or 0):
        raise _Broken(f"{have:,} of {total or size:,} bytes came")


class _Broken(Exception):
    """An attempt that did not bring the whole file; another may."""


def _read_total(response, asked, known, part):
    """Returns the size of the whole file as the answer tells it, or None; `_Broken` if it is of another range."""
    if response.status_code == 200:
        length = response.headers.get("Content-Length", "")
        return int(length) if length.isdigit() else None
    told = response.headers.get("Content-Range", "")
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", told)
    total = int(match[3]) if match and match[3] != "*" else None
    if (
        not asked
        or not match
        or int(match[1]) != asked
        or (None not in (total, known["total"]) and total != known["total"])
    ):
        part.unlink(missing_ok=True)  # begin anew: what would be added may belong elsewhere
        raise _Broken(f"asked for the bytes from {asked:,} on, the server sent {told!r}")
    return total if total is not None else known["total"]


def _linked_hash(response):
    """Returns the SHA-256 that Hugging Face tells of a large file on the way to it, or None."""
    told = [answer.headers.get("X-Linked-ETag", "").strip('"').lower() for answer in (*response.history, response)]
    return next((value for value in told if re.fullmatch(r"[0-9a-f]{64}", value)), None)


def _state_of(part):
    return part.with_name(part.name + ".json")


def _read_state(part, url):
    try:
        state = json.loads(read_text(_state_of(part)))
        return state if state["url"] == url and {"total", "validator"} <= set(state) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _size(path):
    return path.stat().st_size if path.exists() else 0


def _web_page(url, part):
    return (
        f"{url}: a web page came instead of {part.name.removesuffix('.part')}, such as a log-in or a notice; open the "
        "address in a browser"
    )


def _check_beginning(url, part):
    name = part.name.removesuffix(".part")
    with part.open("rb") as file:
        beginning = file.read(64)
    if re.match(rb"\s*<(!doctype\s+html|html)", beginning, re.IGNORECASE) and not name.endswith((".html", ".htm")):
        raise DownloadError(_web_page(url, part))
    sign = next((sign for ending, sign in _SIGNS.items() if name.lower().endswith(ending)), b"")
    if not beginning.startswith(sign):
        raise DownloadError(
            f"{url}: what came does not begin like a {os.path.splitext(name)[1]} file; is the address right?"
        )


def _check(path, size, expected, source, remedy):
    """Holds a file against its size and a dict of hashes by algorithm; DownloadError if one is another."""
    if size is not None and _size(path) != size:
        raise DownloadError(
            f"{path}: {_size(path):,} bytes, {size:,} are expected. {remedy}, ask who gives the file away."
        )
    for algorithm, value in expected.items():
        digest = hash_file(path, algorithm)
        if digest != value:
            name = {"sha256": "SHA-256", "md5": "MD5"}[algorithm]
            raise DownloadError(
                f"{path}: {name} {digest} is not {source}, {value}. {remedy}, the file at its source has changed: ask "
                "there, and only then give or record the new hash."
            )
