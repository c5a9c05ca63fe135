"""Sources that mean harm: bombs, archives that climb, URLs that lead inside, text that is markup (see also test_report)."""

import datetime
import functools
import io
import resource
import socket
import ssl
import struct
import threading
import zipfile
import zlib
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raysd.config import DataSpec
from raysd.data import archive, download
from raysd.data.check import check
from raysd.data.picture import decode
from raysd.data.source import open_source, read_picture
from raysd.errors import DataError
from raysd.storage import Storage
from tests.pictures import encoded, photo, scanned

PUBLIC = "93.184.215.14"


@pytest.fixture
def uploads(tmp_path):
    return Storage(str(tmp_path / "storage")).child("uploads")


def packed(*members, method=zipfile.ZIP_DEFLATED):
    """A zip of (name or ZipInfo, bytes)."""
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w", method) as file:
        for name, content in members:
            file.writestr(name, content)
    return body.getvalue()


def refused(tmp_path, uploads, body, said):
    (tmp_path / "x.zip").write_bytes(body)
    with pytest.raises(DataError, match=said) as caught:
        open_source(str(tmp_path / "x.zip"), uploads)
    assert str(caught.value).count("\n") < 3
    assert not (tmp_path / "storage").exists() or uploads.list() == []


# --- pictures


def png_header(width, height, data=b""):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(10_001, 10_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_refused_from_its_header(tmp_path, width, height):
    (tmp_path / "bomb.png").write_bytes(png_header(width, height))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"bomb\.png.*100,000,000 pixels"):
        read_picture(str(tmp_path / "bomb.png"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
    (tmp_path / "small.png").write_bytes(encoded(photo(1)))
    with pytest.raises(DataError, match="pixels"):
        read_picture(str(tmp_path / "small.png"), limit_pixels=100)


def test_a_bomb_in_a_set_is_left_out_and_named(tmp_path, uploads):
    for index in range(6):
        (tmp_path / f"{index}.png").write_bytes(encoded(photo(index)))
    (tmp_path / "bomb.png").write_bytes(png_header(60_000, 60_000))
    report = check(open_source(str(tmp_path), uploads), DataSpec(source="x", prompt="x"))
    assert [finding.name for finding in report.unreadable] == ["bomb.png"]


def test_a_jpeg_of_many_scans_is_left_out_and_named(tmp_path, uploads):
    """Each scan is a pass over all pixels, in as few as 30 bytes."""
    for index in range(6):
        (tmp_path / f"{index}.png").write_bytes(encoded(photo(index)))
    (tmp_path / "scans.jpg").write_bytes(scanned(200))
    (finding,) = check(open_source(str(tmp_path), uploads), DataSpec(source="x", prompt="x")).unreadable
    assert finding.name == "scans.jpg"
    assert "more than 100 scans" in finding.what


@pytest.mark.parametrize("hidden", [b"\xff\x01\xff\xff", b"\xff\xd0\xff\xff", b"\xff\x05\xff\xff", b"\xff\xff\xff"])
def test_scans_are_not_hidden_behind_what_has_no_length(hidden):
    body = scanned(0)
    last = body.rindex(b"\xff\xda")
    with pytest.raises(DataError, match="more than 100 scans"):
        decode(body[:last] + (hidden + body[last:-2]) * 200 + body[-2:])


def test_a_jpeg_of_countless_segments_is_refused():
    body = scanned(0)
    with pytest.raises(DataError, match="more than 10,000 segments"):
        decode(body[:-2] + b"\xff\xfe\0\2" * 10_000 + body[-2:])


def test_scans_of_thumbnails_of_further_pictures_and_of_films_behind_it_are_none():
    thumbnail = b"APP\0" + scanned(0) + b"\xff\xda" * 200
    several = io.BytesIO()
    photo(1).save(several, "MPO", save_all=True, append_images=[photo(2), photo(3)])
    film = b"\xff\xda" * 200
    for body in (
        encoded(photo(1), "JPEG", progressive=True),
        encoded(photo(1), "JPEG", extra=b"\xff\xe2" + struct.pack(">H", len(thumbnail) + 2) + thumbnail),
        several.getvalue(),
        encoded(photo(1), "JPEG") + film,
        scanned(50, photo(1)),
    ):
        assert decode(body).size == (128, 128)


def test_only_three_decoders_run_whatever_the_name_says(tmp_path):
    for kind in ("TIFF", "GIF", "ICO", "PPM"):
        (tmp_path / "x.png").write_bytes(encoded(photo(1, 32), kind))
        with pytest.raises(DataError, match="not a readable JPEG, PNG or WebP"):
            read_picture(str(tmp_path / "x.png"))


def test_a_file_larger_than_any_picture_is_not_read_whole(tmp_path, monkeypatch):
    from raysd.data import picture

    monkeypatch.setattr(picture, "MAX_BYTES", 2**20)
    with open(tmp_path / "x.png", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(DataError, match="larger than 1 MiB"):
        read_picture(str(tmp_path / "x.png"))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    position=st.integers(0, 3000), junk=st.binary(min_size=1, max_size=8), kind=st.sampled_from(["JPEG", "PNG", "WEBP"])
)
def test_flipped_bytes_end_in_a_picture_or_a_data_error(tmp_path, position, junk, kind):
    body = _whole(kind)
    position %= len(body)
    (tmp_path / "x.png").write_bytes(body[:position] + junk + body[position + len(junk) :])
    try:
        assert read_picture(str(tmp_path / "x.png")).mode == "RGB"
    except DataError as error:
        assert "x.png" in str(error)  # noqa: PT017


@functools.cache
def _whole(kind):
    return encoded(photo(1, 32), kind)


# --- archives


@pytest.mark.parametrize(
    "name",
    ["../x.png", "a/../../x.png", "/etc/x.png", "..\\x.png", "C:\\x.png", "c:x.png", "a\\..\\..\\x.png", "\\x.png"],
)
def test_a_path_that_climbs_out_is_refused(tmp_path, uploads, name):
    body = packed(("good.png", encoded(photo(1))), (name, b"x"))
    refused(tmp_path, uploads, body, "leads out of the archive")


def test_a_name_cut_by_a_zero_byte_is_refused(tmp_path, uploads):
    body = packed(("good.png", b"x"), ("aXb.png", b"x")).replace(b"aXb.png", b"a\0b.png")
    refused(tmp_path, uploads, body, "no name for a file")


def test_links_and_special_files_are_refused(tmp_path, uploads):
    for mode in (0o120777, 0o010644, 0o020644):
        link = zipfile.ZipInfo("link.png")
        link.create_system, link.external_attr = 3, mode << 16
        refused(tmp_path, uploads, packed(("a.png", b"x"), (link, "/etc/passwd")), "link or a special file")


def test_an_encrypted_archive_is_refused(tmp_path, uploads):
    body = bytearray(packed(("a.png", encoded(photo(1)))))
    body[6] |= 1
    body[body.rindex(b"PK\x01\x02") + 8] |= 1
    refused(tmp_path, uploads, bytes(body), "encrypted")


def test_zip_bombs_are_refused_before_anything_is_unpacked(tmp_path, uploads, monkeypatch):
    zeros = packed(*((f"{n}.png", bytes(10 * 2**20)) for n in range(4)))
    refused(tmp_path, uploads, zeros, "zip bomb")
    one = packed(("big.png", bytes(2**24)), ("rest.jpg", photo(1, 512).tobytes()), method=zipfile.ZIP_DEFLATED)
    refused(tmp_path, uploads, one, r"big\.png grows more than 100 times")
    monkeypatch.setattr(archive, "MAX_UNPACKED_BYTES", 1000)
    refused(tmp_path, uploads, packed(("a.png", encoded(photo(1)))), "zip bomb")


def test_overlapping_members_are_a_bomb(tmp_path, uploads):
    """One compressed body that many directory entries share (Fifield 2019)."""
    body = bytearray(packed(("0000.png", encoded(photo(1, 256)))))
    start = body.rindex(b"PK\x01\x02")
    entry, end = bytes(body[start : start + 46 + 8]), bytearray(body[start + 54 :])
    entries = b"".join(entry[:46] + f"{n:04d}.png".encode() for n in range(3000))
    end[8:12] = struct.pack("<HH", 3000, 3000)
    end[12:16] = struct.pack("<I", len(entries))
    refused(tmp_path, uploads, bytes(body[:start]) + entries + bytes(end), "zip bomb|[Oo]verlap|not a whole zip")


def test_the_number_of_members_and_the_directory_are_bounded(tmp_path, uploads, monkeypatch):
    body = packed(*((f"{n}.png", b"x") for n in range(20)))
    monkeypatch.setattr(archive, "MAX_MEMBERS", 10)
    refused(tmp_path, uploads, body, "20 files; at most 10")
    monkeypatch.setattr(archive, "MAX_DIRECTORY_BYTES", 100)
    monkeypatch.setattr(zipfile, "ZipFile", None)  # the directory is not even parsed
    refused(tmp_path, uploads, body, "table of contents")


def test_a_huge_directory_that_only_the_zip64_record_tells_of_is_refused(tmp_path, uploads):
    record = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 1, 1, 2**33, 0)
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, 0, 1)
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    refused(tmp_path, uploads, record + locator + end, "table of contents of 8,589,934,592 bytes")


def test_a_member_that_is_larger_than_it_says_or_than_a_picture_is_not_read_whole(tmp_path, uploads, monkeypatch):
    monkeypatch.setattr(archive, "MAX_BYTES", 1000)
    refused(tmp_path, uploads, packed(("a.png", encoded(photo(1)))), "larger than")
    monkeypatch.undo()
    body = bytearray(packed(("a.png", bytes(5000))))
    start = body.rindex(b"PK\x01\x02")
    body[start + 24 : start + 28] = struct.pack("<I", 10)
    refused(tmp_path, uploads, bytes(body), "damaged")


def test_other_compressions_and_double_names_are_refused(tmp_path, uploads):
    refused(tmp_path, uploads, packed(("a.png", b"x" * 100), method=zipfile.ZIP_LZMA), "method 14")
    with pytest.warns(UserWarning, match="Duplicate"):
        twice = packed(("a.png", b"x"), ("a.png", b"y"))
    refused(tmp_path, uploads, twice, "twice")


@pytest.mark.parametrize("cut", [10, 200, -30])
def test_a_cut_archive_is_refused(tmp_path, uploads, cut):
    body = packed(*((f"{n}.png", encoded(photo(n, 32))) for n in range(3)))
    refused(tmp_path, uploads, body[:cut], "not a (whole )?zip")


def test_an_archive_without_its_beginning_is_refused(tmp_path, uploads):
    """Its table of contents is whole, and has its first members begin before the file."""
    body = packed(*((f"{n}.png", encoded(photo(n, 32))) for n in range(3)))
    refused(tmp_path, uploads, body[10:], r"0\.png is damaged|not a whole zip")


def test_offsets_beyond_what_a_file_can_have_are_refused(tmp_path, uploads):
    body = bytearray(packed(("a.png", encoded(photo(1)))))
    start, end = body.rindex(b"PK\x01\x02"), body.rindex(b"PK\x05\x06")
    extra = struct.pack("<HHQ", 1, 8, 2**63)  # zip64: where the member begins
    body[start + 30 : start + 32] = struct.pack("<H", len(extra))
    body[start + 42 : start + 46] = b"\xff" * 4
    body[end + 12 : end + 16] = struct.pack("<I", end - start + len(extra))
    body[end:end] = extra
    refused(tmp_path, uploads, bytes(body), r"a\.png is damaged|not a whole zip")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10_000), junk=st.binary(min_size=1, max_size=8), cut=st.integers(0, 40))
def test_flipped_bytes_of_an_archive_end_in_files_or_a_data_error(tmp_path, position, junk, cut):
    position %= len(ARCHIVE)
    body = ARCHIVE[cut:position] + junk + ARCHIVE[position + len(junk) :]
    (tmp_path / "x.zip").write_bytes(body)
    try:
        open_source(str(tmp_path / "x.zip"), Storage(str(tmp_path / "storage")).child("uploads"))
    except DataError as error:
        assert "x.zip" in str(error)  # noqa: PT017


def test_a_damaged_member_is_named(tmp_path, uploads):
    body = bytearray(packed(("a.png", bytes(range(256)) * 9), method=zipfile.ZIP_STORED))
    body[300] ^= 0xFF
    refused(tmp_path, uploads, bytes(body), r"a\.png is damaged")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30),
        min_size=1,
        max_size=5,
        unique=True,
    )
)
def test_no_name_in_an_archive_becomes_a_path(tmp_path, names):
    body = packed(*((f"{name}.png", b"x") for name in names))
    (tmp_path / "x.zip").write_bytes(body)
    storage = Storage(str(tmp_path / "storage"))
    try:
        source = open_source(str(tmp_path / "x.zip"), storage.child("uploads"))
    except DataError:
        return
    assert all(entry.path.rsplit("/", 1)[1][:6].isdigit() for entry in source.entries)
    assert {path.name for path in tmp_path.iterdir()} == {"x.zip", "storage"}


# --- URLs


class Site(BaseHTTPRequestHandler):
    """Answers by path; keeps the Host headers that it saw."""

    answers: dict[str, tuple[int, dict[str, str], bytes]]
    hosts: list[str]

    def do_GET(self):
        self.hosts.append(self.headers["Host"])
        status, headers, body = self.answers.get(self.path, (404, {}, b""))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextmanager
def serving(answers, context=None):
    handler = type("Handler", (Site,), {"answers": answers, "hosts": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server.server_port, handler.hosts
    finally:
        server.shutdown()
        server.server_close()


ARCHIVE = packed(("a.png", encoded(photo(1))), ("a.txt", b"one"))


def names(monkeypatch, table):
    """Resolve by `table` ({name: address}); PUBLIC leads to this machine, so that a public site can be played."""
    asked, real = [], socket.getaddrinfo

    def resolve(host, port, *args, **kwargs):
        host = host.decode() if isinstance(host, bytes) else host
        asked.append(host)
        if host == PUBLIC:
            return real("127.0.0.1", port, *args, **kwargs)
        if host in table:
            address = table[host]
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            return [(family, socket.SOCK_STREAM, 6, "", (address, port))]
        return real(host, port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return asked


def test_a_zip_is_read_from_a_url_and_messages_hide_its_signature(uploads, monkeypatch):
    names(monkeypatch, {"site.test": PUBLIC})
    with serving({"/x.zip?sig=secret": (200, {}, ARCHIVE)}) as (port, hosts):
        source = open_source(f"http://site.test:{port}/x.zip?sig=secret", uploads)
        assert hosts == [f"site.test:{port}"]
    assert [(entry.name, entry.caption) for entry in source.entries] == [("a.png", "one")]
    assert source.origin == f"http://site.test:{port}/x.zip"


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/x.zip",
        "http://localhost/x.zip",
        "http://2130706433/x.zip",
        "http://0x7f.1/x.zip",
        "http://0/x.zip",
        "http://10.1.2.3/x.zip",
        "http://192.168.0.1/x.zip",
        "http://100.64.0.1/x.zip",
        "http://169.254.169.254/latest/meta-data",
        "http://224.0.0.1/x.zip",
        "http://255.255.255.255/x.zip",
        "http://[::1]/x.zip",
        "http://[::]/x.zip",
        "http://[::ffff:10.0.0.1]/x.zip",
        "http://[::ffff:169.254.169.254]/x.zip",
        "http://[64:ff9b::a00:1]/x.zip",
        "http://[64:ff9b:1::a00:1]/x.zip",
        "http://[2002:a00:1::]/x.zip",
        "http://[fe80::1]/x.zip",
        "http://[fec0::1]/x.zip",
        "http://[fd00:ec2::254]/x.zip",
        "http://[ff02::1]/x.zip",
    ],
)
def test_private_addresses_are_refused_in_any_spelling(uploads, url):
    with pytest.raises(DataError, match="not a public address"):
        open_source(url, uploads)


@pytest.mark.parametrize("address", ["10.0.0.7", "127.0.0.1", "169.254.169.254", "::1", "::ffff:127.0.0.1"])
def test_a_name_that_resolves_to_a_private_address_is_refused(uploads, monkeypatch, address):
    names(monkeypatch, {"inside.test": address})
    with pytest.raises(DataError, match=r"inside\.test is .*not a public address") as caught:
        open_source("https://inside.test/x.zip", uploads)
    assert str(caught.value).count("\n") < 3


def test_one_private_answer_among_public_ones_is_enough(uploads, monkeypatch):
    rows = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, 80)) for a in (PUBLIC, "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: rows)
    with pytest.raises(DataError, match="not a public address"):
        open_source("http://mixed.test/x.zip", uploads)


@pytest.mark.parametrize(
    "inside", ["http://127.0.0.1:{port}/x.zip", "http://inside.test:{port}/x.zip", "//[::1]:{port}/x.zip"]
)
def test_a_redirect_to_a_private_address_is_refused(uploads, monkeypatch, inside):
    names(monkeypatch, {"site.test": PUBLIC, "inside.test": "10.0.0.7"})
    answers = {"/x.zip": (200, {}, ARCHIVE)}
    with serving(answers) as (port, hosts):
        answers["/go"] = (302, {"Location": inside.format(port=port)}, b"")
        with pytest.raises(DataError, match="not a public address"):
            open_source(f"http://site.test:{port}/go", uploads)
        assert len(hosts) == 1


def test_the_address_judged_is_the_one_connected_to(uploads, monkeypatch):
    """A name server that answers differently the second time (DNS rebinding) is not asked a second time."""
    asked = names(monkeypatch, {"site.test": PUBLIC})
    with serving({"/x.zip": (200, {}, ARCHIVE)}) as (port, _):
        open_source(f"http://site.test:{port}/x.zip", uploads)
    assert asked.count("site.test") == 1
    assert asked.count(PUBLIC) == 1


def test_an_operator_can_allow_private_addresses(uploads, monkeypatch):
    monkeypatch.setenv(download.ALLOW_PRIVATE, "1")
    with serving({"/x.zip": (200, {}, ARCHIVE)}) as (port, _):
        assert len(open_source(f"http://127.0.0.1:{port}/x.zip", uploads).entries) == 1


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://site.test/x", "s3://bucket/x"])
def test_redirects_lead_nowhere_but_http(uploads, monkeypatch, location):
    names(monkeypatch, {"site.test": PUBLIC})
    with (
        serving({"/go": (302, {"Location": location}, b"")}) as (port, _),
        pytest.raises(DataError, match="refused"),
    ):
        open_source(f"http://site.test:{port}/go", uploads)


def test_a_host_that_is_no_international_name_is_refused_also_behind_a_redirect(uploads, monkeypatch):
    names(monkeypatch, {"site.test": PUBLIC})
    with serving({"/go": (302, {"Location": "http://xn--/"}, b"")}) as (port, _):
        for url in (f"http://site.test:{port}/go", "http://xn--a.example/x.zip"):
            with pytest.raises(DataError, match=r"^(site\.test|xn--a)"):
                open_source(url, uploads)


def test_redirects_size_and_status_are_bounded_and_named(uploads, monkeypatch):
    names(monkeypatch, {"site.test": PUBLIC})
    monkeypatch.setattr(download, "MAX_ARCHIVE_BYTES", 100)
    answers = {"/x.zip": (200, {}, ARCHIVE), "/loop": (302, {"Location": "/loop"}, b""), "/lost": (302, {}, b"")}
    with serving(answers) as (port, hosts):
        site = f"http://site.test:{port}"
        for path, said in (
            ("/x.zip", "larger than"),
            ("/loop", "more than 5 redirects"),
            ("/gone?a=secret", "answered 404"),
            ("/lost", "answered 302"),
        ):
            with pytest.raises(DataError, match=said) as caught:
                open_source(site + path, uploads)
            assert "secret" not in str(caught.value)
        assert len(hosts) == 1 + 6 + 1 + 1


def test_a_compressed_answer_is_not_expanded(uploads, monkeypatch):
    names(monkeypatch, {"site.test": PUBLIC})
    bomb = zlib.compress(bytes(2**26), 9, 31)
    with (
        serving({"/x.zip": (200, {"Content-Encoding": "gzip"}, bomb)}) as (port, _),
        pytest.raises(DataError, match="not a zip"),
    ):
        open_source(f"http://site.test:{port}/x.zip", uploads)


def test_a_slow_answer_ends_at_the_deadline(uploads, monkeypatch):
    names(monkeypatch, {"site.test": PUBLIC})
    monkeypatch.setattr(download, "MAX_SECONDS", -1)
    with serving({"/x.zip": (200, {}, ARCHIVE)}) as (port, _), pytest.raises(DataError, match="not there after"):
        open_source(f"http://site.test:{port}/x.zip", uploads)


@pytest.fixture(scope="module")
def certified(tmp_path_factory):
    """A server context for good.test, and the file that makes clients trust it."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "good.test")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now - datetime.timedelta(1))
    builder = builder.not_valid_after(now + datetime.timedelta(1))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("good.test")]), False)
    builder = builder.add_extension(x509.BasicConstraints(True, None), True)
    folder = tmp_path_factory.mktemp("certificate")
    (folder / "cert.pem").write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "key.pem").write_bytes(secret)
    return folder


def test_tls_names_and_certificates_are_those_of_the_url(uploads, monkeypatch, certified):
    monkeypatch.setenv("SSL_CERT_FILE", str(certified / "cert.pem"))
    names(monkeypatch, {"good.test": PUBLIC, "other.test": PUBLIC})
    context, asked = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), []
    context.load_cert_chain(certified / "cert.pem", certified / "key.pem")
    context.sni_callback = lambda sock, name, ctx: asked.append(name)
    answers = {"/x.zip": (200, {}, ARCHIVE), "/down": (302, {"Location": "http://good.test/x.zip"}, b"")}
    with serving(answers, context) as (port, hosts):
        assert len(open_source(f"https://good.test:{port}/x.zip", uploads).entries) == 1
        assert (asked, hosts) == (["good.test"], [f"good.test:{port}"])
        with pytest.raises(DataError, match="from https to http"):
            open_source(f"https://good.test:{port}/down", uploads)
        with pytest.raises(DataError, match="certificate"):
            open_source(f"https://other.test:{port}/x.zip", uploads)


def test_proxies_of_the_environment_are_not_used(uploads, monkeypatch):
    """A proxy would resolve the name itself, after it was judged."""
    names(monkeypatch, {"site.test": PUBLIC})
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with serving({"/x.zip": (200, {}, ARCHIVE)}) as (port, _):
        assert len(open_source(f"http://site.test:{port}/x.zip", uploads).entries) == 1
