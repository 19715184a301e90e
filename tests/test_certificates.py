"""Keys and certificates: for whom they are valid, who may read them, and that nothing is overwritten."""

import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from scripts.certificates import make


def server(folder: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / "server.crt").read_bytes())


def days_left(folder: Path) -> int:
    return (server(folder).not_valid_after_utc - datetime.now(UTC)).days


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> list[str]:
    alternatives = server(folder).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in alternatives]


def test_the_server_is_signed_for_its_names_and_private_keys_are_private(tmp_path: Path) -> None:
    make(tmp_path, ["superlink.example.org", "10.0.0.5"], ["lab", "clinic"])
    ca = x509.load_pem_x509_certificate((tmp_path / "ca.crt").read_bytes())
    server(tmp_path).verify_directly_issued_by(ca)
    assert names(tmp_path) == ["superlink.example.org", "10.0.0.5"]
    for path in ("ca.key", "server.key", "superexec.secret", "sites/lab", "sites/clinic"):
        assert (tmp_path / path).stat().st_mode & 0o777 == 0o600
    private = load_ssh_private_key((tmp_path / "sites" / "lab").read_bytes(), password=None)
    public = load_ssh_public_key((tmp_path / "sites" / "lab.pub").read_bytes())
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert private.public_key().public_numbers() == public.public_numbers()


def test_sites_are_added_and_what_is_there_is_kept(tmp_path: Path) -> None:
    make(tmp_path, ["localhost"], ["lab"])
    before = contents(tmp_path)
    assert make(tmp_path, ["localhost"], ["lab"]) == []
    made = make(tmp_path, ["localhost"], ["lab", "bank"])
    assert made == [tmp_path / "sites" / "bank", tmp_path / "sites" / "bank.pub"]
    assert all(path.read_bytes() == data for path, data in before.items())
    made = make(tmp_path, ["localhost", "::1"], ["lab"])
    assert made == [tmp_path / "server.key", tmp_path / "server.crt"]
    assert names(tmp_path) == ["localhost", "::1"]
    assert (tmp_path / "ca.crt").read_bytes() == before[tmp_path / "ca.crt"]


def test_sites_are_added_while_the_key_of_the_ca_is_elsewhere(tmp_path: Path) -> None:
    make(tmp_path, ["localhost"], ["lab"])
    (tmp_path / "ca.key").rename(tmp_path.parent / f"{tmp_path.name}-safe.key")
    before = contents(tmp_path)
    assert make(tmp_path, ["localhost"], ["bank"]) == [
        tmp_path / "sites" / "bank",
        tmp_path / "sites" / "bank.pub",
    ]
    assert all(path.read_bytes() == data for path, data in before.items())
    before = contents(tmp_path)
    for hosts, days, why in (
        (["::1"], None, "it is valid for other names"),
        (["localhost"], 9, "--days is given"),
    ):
        with pytest.raises(
            ValueError, match=rf"ca\.key is not here; it is needed to sign server\.crt, because {why}"
        ):
            make(tmp_path, hosts, ["clinic"], days)
        assert contents(tmp_path) == before
    (tmp_path.parent / f"{tmp_path.name}-safe.key").rename(tmp_path / "ca.key")
    (tmp_path / "ca.crt").unlink()
    with pytest.raises(ValueError, match=r"ca\.crt is not here; it is needed .* because there is no ca\.crt"):
        make(tmp_path, ["localhost"], ["clinic"])


def test_a_certificate_that_ends_soon_is_made_anew(tmp_path: Path) -> None:
    make(tmp_path, ["localhost"], [])
    assert days_left(tmp_path) == 364
    make(tmp_path, ["localhost"], [], days=29)
    assert days_left(tmp_path) == 28
    first = server(tmp_path)
    assert make(tmp_path, ["localhost"], []) == [tmp_path / "server.key", tmp_path / "server.crt"]
    assert days_left(tmp_path) == 364
    assert server(tmp_path).public_key() != first.public_key()
    make(tmp_path, ["localhost"], [], days=31)
    assert make(tmp_path, ["localhost"], []) == []


def test_a_certificate_of_another_ca_is_made_anew(tmp_path: Path) -> None:
    make(tmp_path, ["localhost"], [])
    for half in ("ca.key", "ca.crt"):
        (tmp_path / half).unlink()
    make(tmp_path, ["localhost"], [])
    server(tmp_path).verify_directly_issued_by(x509.load_pem_x509_certificate((tmp_path / "ca.crt").read_bytes()))


def test_git_sees_nothing_of_it_and_other_users_what_is_public(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    before = os.umask(0o077)
    try:
        make(tmp_path / "certs", ["localhost"], ["lab"])
    finally:
        os.umask(before)
    seen = ["git", "-C", str(tmp_path), "status", "--porcelain", "--untracked-files=all"]
    assert subprocess.run(seen, capture_output=True, text=True, check=True).stdout == ""
    for name in ("ca.crt", "server.crt", "sites/lab.pub"):
        assert (tmp_path / "certs" / name).stat().st_mode & 0o777 == 0o644
    checkout = Path(__file__).parent.parent
    for name in ("keys/sites/lab", "keys/ca.crt", "superexec.secret", "ca.key"):  # as the guide puts them
        assert not subprocess.run(["git", "-C", str(checkout), "check-ignore", "-q", name], check=False).returncode


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
