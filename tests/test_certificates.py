"""Keys and certificates: for whom they are valid, who may read them, and that nothing is overwritten."""

import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from scripts.certificates import make


def names(folder: Path) -> list[str]:
    certificate = x509.load_pem_x509_certificate((folder / "server.crt").read_bytes())
    alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in alternatives]


def test_the_server_is_signed_for_its_names_and_private_keys_are_private(tmp_path: Path) -> None:
    make(tmp_path, ["superlink.example.org", "10.0.0.5"], ["lab", "clinic"])
    ca, server = (
        x509.load_pem_x509_certificate((tmp_path / f"{who}.crt").read_bytes()) for who in ("ca", "server")
    )
    server.verify_directly_issued_by(ca)
    assert names(tmp_path) == ["superlink.example.org", "10.0.0.5"]
    for path in ("ca.key", "server.key", "sites/lab", "sites/clinic"):
        assert (tmp_path / path).stat().st_mode & 0o777 == 0o600
    private = load_ssh_private_key((tmp_path / "sites" / "lab").read_bytes(), password=None)
    public = load_ssh_public_key((tmp_path / "sites" / "lab.pub").read_bytes())
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert private.public_key().public_numbers() == public.public_numbers()


def test_sites_are_added_and_what_is_there_is_kept(tmp_path: Path) -> None:
    make(tmp_path, ["localhost"], ["lab"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert make(tmp_path, ["localhost"], ["lab"]) == []
    made = make(tmp_path, ["localhost"], ["lab", "bank"])
    assert made == [tmp_path / "sites" / "bank", tmp_path / "sites" / "bank.pub"]
    assert all(path.read_bytes() == data for path, data in before.items())
    made = make(tmp_path, ["localhost", "::1"], ["lab"])
    assert made == [tmp_path / "server.key", tmp_path / "server.crt"]
    assert names(tmp_path) == ["localhost", "::1"]
    assert (tmp_path / "ca.crt").read_bytes() == before[tmp_path / "ca.crt"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--server", ""], "--server names no host"),
        (["--server", "localhost", "--sites", "../ca"], "--sites: '../ca' is not allowed; allowed: A-Z"),
        (["--server", "localhost", "--days", "0"], "--days=0 is not allowed; allowed: >= 1"),
    ],
)
def test_wrong_arguments_make_nothing(arguments: list[str], told: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.certificates", str(tmp_path / "new"), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert told in done.stderr
    assert not (tmp_path / "new").exists()
