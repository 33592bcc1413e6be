"""Downloads that continue where they stopped, and that count only after a check of size, first bytes and hash.

A file is written as NAME.part and renamed when it has passed. `requests` and `urllib3.util.Retry` do the connection,
the waiting and `Retry-After`. What they leave to the caller is here: bodies that are cut, wrong ranges, and files that
changed between two attempts.
"""

import contextlib
import json
import os
import re
import shutil
import time

from ..runtime.files import as_path, hash_file, is_remote, read_text, write_text
from ..runtime.packages import explain_offline

USER_AGENT = "chest-xray-notebooks/1.0 (research and teaching; python-requests)"

_BLOCK = 2**18  # bytes
_SPARE = 2**26  # bytes of the disk that a download leaves free, for what else is written meanwhile
_SIGNATURES = {".tgz": b"\x1f\x8b", ".gz": b"\x1f\x8b", ".zip": b"PK"}  # first bytes, by ending of the name


class DownloadError(OSError):
    """A file that could not be downloaded, or is not the expected one; the message says what to do."""


def download_file(url, path, sha256=None, size=None, progress=None, *, md5=None, retries=5, pause=1.0, timeout=60):
    """Downloads a file, resuming an earlier attempt; a file that exists already is only checked.

    Where no hash is given, the SHA-256 is recorded on first use in NAME.sha256, in the form that `sha256sum -c` reads,
    and later copies are compared with it: that shows change and damage, not who made the file. Where a server such as
    Hugging Face's sends the SHA-256 in `X-Linked-ETag`, the file is compared with that.

    Args:
        url: address, http or https.
        path: path of the file, on a disk of this machine; from its ending follow the first bytes that are expected.
        sha256: SHA-256 of the file in hexadecimal, if known.
        size: its size in bytes, if known.
        progress: callable such as `tqdm`; its bar goes back where a download starts again.
        md5: MD5 of the file in hexadecimal, if that is what was published.
        retries: attempts in a row that may bring nothing new before giving up.
        pause: seconds before the second of them, doubled each time; a server's `Retry-After` takes precedence.
        timeout: seconds of silence after which a connection counts as broken.

    Returns:
        Path of the file.

    Raises:
        DownloadError: the server refuses, the connection stays broken, a web page comes instead of the file, size or
            hash is wrong, or the disk lacks space. The file then does not exist under its name.
        ValueError: the path is in a bucket.
    """
    if is_remote(path):
        raise ValueError(f"{path} lies in a bucket. Download to a local folder and copy from there.")
    path = as_path(path)
    record, part = path.with_name(path.name + ".sha256"), path.with_name(path.name + ".part")
    expected = {name: value.lower() for name, value in (("sha256", sha256), ("md5", md5)) if value}
    source, is_new = "the expected one", not expected and not record.exists()
    if not expected and record.exists():
        expected = {"sha256": read_text(record).partition(" ")[0].lower()}
        source = f"the one recorded in {record.name} on first use"
    if path.exists():
        _check(path, size, expected, source, "Remove it to download it again; if that does not help")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(_Bar(progress, path.name)) as bar:
            _fetch_part(url, part, size, bar, retries, pause, timeout)
        sent = (_read_note(part, url) or {}).get("sha256")
        if sent and not expected:
            expected, source = {"sha256": sent}, "the one that the server sent"
        try:
            _check_beginning(url, part)
            _check(part, size, expected, source, "It was removed; download again, and if that does not help")
        except DownloadError:
            part.unlink()
            _note_of(part).unlink(missing_ok=True)
            raise
        os.replace(part, path)
        _note_of(part).unlink(missing_ok=True)
    if is_new:
        write_text(record, f"{expected.get('sha256') or hash_file(path)}  {path.name}\n")
    return path


def assert_space(folder, needed):
    """Raises DownloadError unless the disk of a folder has `needed` bytes free, and 64 MiB to spare."""
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


class _Broken(Exception):
    """An attempt that did not bring the whole file; another may."""


def _open_session(retries, pause):
    """Opens a `requests.Session` that waits and asks again after 429 and 5xx."""
    import requests  # not above: this module is imported where nothing is downloaded, too
    from urllib3.util import Retry

    retry = Retry(
        total=None,
        connect=0,  # broken connections are counted by _fetch_part
        read=0,
        other=0,
        redirect=10,
        status=retries,
        backoff_factor=pause,
        status_forcelist=(429, 500, 502, 503, 504),
        raise_on_status=False,
    )
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retry))
    # Identity: an archive has to come as it is, and a range counts its bytes.
    session.headers.update({"User-Agent": USER_AGENT, "Accept-Encoding": "identity"})
    return session


def _fetch_part(url, part, size, bar, retries, pause, timeout):
    """Completes a .part file, in as many requests as it takes."""
    import requests
    import urllib3

    broken = (requests.exceptions.ConnectionError, requests.exceptions.Timeout, urllib3.exceptions.HTTPError, _Broken)
    idle, most = 0, _size(part)  # a part that is started again has to grow beyond its earlier size
    with _open_session(retries, pause) as session:
        while True:
            try:
                return _request(session, url, part, size, bar, timeout)
            except broken as error:
                idle = 0 if _size(part) > most else idle + 1
                most = max(most, _size(part))
                if idle > retries:
                    raise DownloadError(
                        f"{url}: the connection broke {idle} times in a row ({error}); {_size(part):,} bytes are "
                        f"kept in {part.name}: run this again later, and it continues from there{explain_offline()}"
                    ) from error
            time.sleep(pause * 2 ** min(max(idle - 1, 0), 6))


def _request(session, url, part, size, bar, timeout):
    """Asks once for the rest of a .part file; `_Broken` or an error of `requests` if some is still missing."""
    have, known = _size(part), _read_note(part, url)
    if have and known and have == known["total"]:  # an earlier attempt ended just before the last check
        return
    headers = {}
    if have and known:  # a part of unknown origin is not continued
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
            status = f"HTTP {response.status_code} {response.reason or ''}".strip()
            raise DownloadError(
                f"{url}: the server answers {status}; open the address in a browser, or try again later"
            )
        total = _read_total(response, have if headers else 0, known, part)
        have = have if response.status_code == 206 else 0
        if size is not None and total not in (None, size):
            raise DownloadError(
                f"{url}: the server has {total:,} bytes, {size:,} are expected; is this the right file?"
            )
        if "html" in response.headers.get("Content-Type", "").lower():
            raise _web_page(url, part)
        assert_space(part.parent, (total or size or have) - have)
        if not have:
            _write_note(part, url, total, response)
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


def _read_total(response, asked, known, part):
    """Returns the size of the whole file by the answer's headers, or None; `_Broken` if another range was sent."""
    if response.status_code == 200:
        length = response.headers.get("Content-Length", "")
        return int(length) if length.isdigit() else None
    sent = response.headers.get("Content-Range", "")
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", sent)
    total = int(match[2]) if match and match[2] != "*" else None
    changed = asked and None not in (total, known["total"]) and total != known["total"]
    if not asked or not match or int(match[1]) != asked or changed:
        part.unlink(missing_ok=True)  # start again: what would be added may belong elsewhere
        raise _Broken(f"asked for the bytes from {asked:,} on, the server sent {sent!r}")
    return total if total is not None else known["total"]


def _note_of(part):
    return part.with_name(part.name + ".json")


def _write_note(part, url, total, response):
    """Notes beside a .part file which file it is a part of."""
    etag = response.headers.get("ETag", "")
    validator = response.headers.get("Last-Modified") if etag[:2] in ("", "W/") else etag
    # Hugging Face sends the SHA-256 of a large file with the redirect to it.
    linked = [answer.headers.get("X-Linked-ETag", "").strip('"').lower() for answer in (*response.history, response)]
    sha256 = next((value for value in linked if re.fullmatch(r"[0-9a-f]{64}", value)), None)
    note = {"url": url, "total": total, "validator": validator, "sha256": sha256}
    write_text(_note_of(part), json.dumps(note))


def _read_note(part, url):
    try:
        note = json.loads(read_text(_note_of(part)))
        return note if note["url"] == url and {"total", "validator"} <= set(note) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _size(path):
    return path.stat().st_size if path.exists() else 0


def _web_page(url, part):
    return DownloadError(
        f"{url}: a web page came instead of {part.name.removesuffix('.part')}, such as a log-in or a notice; open the "
        "address in a browser"
    )


def _check_beginning(url, part):
    ending = os.path.splitext(part.name.removesuffix(".part"))[1].lower()
    with part.open("rb") as file:
        beginning = file.read(64)
    if re.match(rb"\s*<(!doctype\s+html|html)", beginning, re.IGNORECASE):
        raise _web_page(url, part)
    if not beginning.startswith(_SIGNATURES.get(ending, b"")):
        raise DownloadError(f"{url}: the download does not begin like a {ending} file; is the address right?")


def _check(path, size, expected, source, remedy):
    """Compares a file with its size and with a dict of hashes by algorithm; DownloadError if one differs."""
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
