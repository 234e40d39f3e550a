# SPDX-License-Identifier: Apache-2.0
"""TLS with stock clients, and errors in a folder of certificates."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

from tests.servers import serving
from tests.support import require_tool, run
from vhdkit import errors
from vhdkit.chain.verbs.create import create_image
from vhdkit.serve.nbd.tls import certificate_context, psk_context, read_keys
from vhdkit.units import MIB


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ca-cert.pem`, and a certificate and key for server and client, all valid for a day."""
    openssl = require_tool("openssl")
    folder = tmp_path_factory.mktemp("tls")

    def make(*words: str) -> None:
        subprocess.run([openssl, *words], cwd=folder, check=True, capture_output=True, timeout=60)

    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for name in ("ca", "stranger"):
        make("req", "-x509", *curve, "-keyout", f"{name}-key.pem", "-out", f"{name}-cert.pem", "-days", "1",
             "-subj", f"/CN={name}", "-addext", "keyUsage=critical,keyCertSign,cRLSign")  # fmt: skip
    for name, authority in (("server", "ca"), ("client", "ca"), ("foreign", "stranger")):
        make("req", *curve, "-keyout", f"{name}-key.pem", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        (folder / "ext").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\nbasicConstraints=CA:FALSE\n")
        make("x509", "-req", "-in", f"{name}.csr", "-CA", f"{authority}-cert.pem", "-CAkey", f"{authority}-key.pem",
             "-CAcreateserial", "-out", f"{name}-cert.pem", "-days", "1", "-extfile", "ext")  # fmt: skip
    return folder


def folder_with(certificates: Path, folder: Path, **files: str) -> Path:
    """A folder with copies: ca="ca", server="server" become ca-cert.pem, server-cert.pem and its key."""
    folder.mkdir()
    for name, source in files.items():
        shutil.copy(certificates / f"{source}-cert.pem", folder / f"{name}-cert.pem")
        if name != "ca":
            shutil.copy(certificates / f"{source}-key.pem", folder / f"{name}-key.pem")
    return folder


def size_of(path: Path, clients: Path | None, *, host: str = "localhost") -> subprocess.CompletedProcess[str]:
    """What nbdinfo reports for the export `a`, over TLS with these certificates or in plain text."""
    scheme = "nbd+unix" if clients is None else "nbds+unix"
    uri = f"{scheme}://{host}/a?socket={path}" + ("" if clients is None else f"&tls-certificates={clients}")
    command = [require_tool("nbdinfo"), "--size", uri]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_clients_with_and_without_certificates(certificates: Path, tmp_path: Path) -> None:
    """With a CA in the folder only its clients are admitted; plain text is refused if TLS is required."""
    create_image(tmp_path / "disk.vhd", MIB)
    servers = folder_with(certificates, tmp_path / "server", ca="ca", server="server")
    known = folder_with(certificates, tmp_path / "known", ca="ca", client="client")
    foreign = folder_with(certificates, tmp_path / "foreign", ca="ca", client="foreign")
    without_certificate = folder_with(certificates, tmp_path / "without_certificate", ca="ca")
    path = tmp_path / "s.sock"
    words = ("--export", f"a={tmp_path / 'disk.vhd'}", "--socket", path, "--tls-certs", servers)
    with serving(*words, "--tls-required") as server:
        assert server.uri.startswith("nbds+unix:///a?")
        assert size_of(path, known).stdout.strip() == str(MIB)
        for clients in (foreign, without_certificate, None):
            refused = size_of(path, clients)
            assert refused.returncode and not refused.stdout, clients
        assert size_of(path, known).stdout.strip() == str(MIB)
        assert server.stop() == (0, "")


def test_tls_offered_to_every_client(certificates: Path, tmp_path: Path) -> None:
    """Without --tls-required plain text is served, too; without a CA in the folder any client is."""
    create_image(tmp_path / "disk.vhd", MIB)
    servers = folder_with(certificates, tmp_path / "server", server="server")
    without_certificate = folder_with(certificates, tmp_path / "without_certificate", ca="ca")
    path = tmp_path / "s.sock"
    with serving("--export", f"a={tmp_path / 'disk.vhd'}", "--socket", path, "--tls-certs", servers):
        assert size_of(path, without_certificate).stdout.strip() == str(MIB) == size_of(path, None).stdout.strip()
        uri = f"nbds+unix://localhost/a?socket={path}&tls-certificates={without_certificate}"
        (tmp_path / "in.raw").write_bytes(bytes(range(256)) * (MIB // 256))
        run([require_tool("nbdcopy"), "--flush", tmp_path / "in.raw", uri])
        run([require_tool("nbdcopy"), uri, tmp_path / "out.raw"])
        assert (tmp_path / "out.raw").read_bytes() == (tmp_path / "in.raw").read_bytes()


def test_old_versions_are_refused(certificates: Path, tmp_path: Path) -> None:
    """Nothing below TLS 1.2."""
    context = certificate_context(str(folder_with(certificates, tmp_path / "s", ca="ca", server="server")))
    assert context.options & ssl.OP_NO_RENEGOTIATION
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2 and context.verify_mode == ssl.CERT_REQUIRED
    context = certificate_context(str(folder_with(certificates, tmp_path / "t", server="server")))
    assert context.verify_mode == ssl.CERT_NONE


def test_bad_folders(certificates: Path, tmp_path: Path) -> None:
    """A missing or unusable file is named by its path; an encrypted key does not prompt for a password."""
    with pytest.raises(errors.NotFound, match=r"server-cert\.pem"):
        certificate_context(str(tmp_path))
    folder = folder_with(certificates, tmp_path / "s", ca="ca", server="server")
    (folder / "ca-cert.pem").write_text("rubbish")
    with pytest.raises(errors.InvalidArgument, match=r"ca-cert\.pem"):
        certificate_context(str(folder))
    shutil.copy(certificates / "client-key.pem", folder / "server-key.pem")
    with pytest.raises(errors.InvalidArgument, match=r"server-cert\.pem"):
        certificate_context(str(folder))
    run([require_tool("openssl"), "ec", "-aes128", "-passout", "pass:secret", "-in", certificates / "server-key.pem",
         "-out", folder / "server-key.pem"])  # fmt: skip
    with pytest.raises(errors.InvalidArgument, match="password"):
        certificate_context(str(folder))
    (folder / "server-key.pem").unlink()
    with pytest.raises(errors.NotFound, match=r"server-key\.pem"):
        certificate_context(str(folder))


def test_keys_file(tmp_path: Path) -> None:
    """USER:HEX lines, as psktool writes them; a bad line is named by its number."""
    path = tmp_path / "keys.psk"
    path.write_text("# comment\n\nalice:" + "ab" * 32 + "\nbo:b:" + "00" * 16 + "\n")
    assert read_keys(str(path)) == {"alice": b"\xab" * 32, "bo:b": bytes(16)}
    for text in ("alice", "alice:abc", ":" + "ab" * 32, "alice:" + "zz" * 32, "a:b\n", ""):
        path.write_text(text)
        with pytest.raises(errors.InvalidArgument):
            read_keys(str(path))
    with pytest.raises(errors.NotFound):
        read_keys(str(tmp_path / "gone"))


def test_keys_need_a_newer_python(tmp_path: Path) -> None:
    """If Python's ssl module lacks pre-shared keys, the error says so; otherwise the file is used."""
    path = tmp_path / "keys.psk"
    path.write_text("alice:" + "ab" * 32)
    if hasattr(ssl.SSLContext, "set_psk_server_callback"):
        assert psk_context(str(path)).minimum_version == ssl.TLSVersion.TLSv1_2
    else:
        with pytest.raises(errors.InvalidArgument, match=r"3\.13"):
            psk_context(str(path))
