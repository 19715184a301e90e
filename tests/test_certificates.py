"""Keys and certificates: for whom they are valid, who may read them, and that nothing is overwritten."""

import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)

from scripts.certificates import make

from .helpers import without_rights

CHECKOUT = Path(__file__).parent.parent
BROKEN_OFF = """
import os, sys
from pathlib import Path
from scripts import certificates

write = certificates._write

def stop_at(path, data, mode):
    if path.name == sys.argv[2]:
        os._exit(9)
    write(path, data, mode)

certificates._write = stop_at
certificates.make(Path(sys.argv[1]), ["localhost"], ["lab"], days=200)
"""


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


def fits(folder: Path) -> bool:
    """The server's key and certificate, and the halves of the lab's key."""
    key = load_pem_private_key((folder / "server.key").read_bytes(), password=None)
    site = load_ssh_private_key((folder / "sites" / "lab").read_bytes(), password=None)
    public = load_ssh_public_key((folder / "sites" / "lab.pub").read_bytes())
    return (key.public_key(), site.public_key()) == (server(folder).public_key(), public)


@pytest.mark.parametrize("before", ["server.key", "server.crt", "lab", "lab.pub"])
@pytest.mark.parametrize("is_first", [True, False], ids=["the first call", "a renewal"])
def test_a_call_that_was_broken_off_is_made_good_by_the_next(before: str, is_first: bool, tmp_path: Path) -> None:
    if not is_first:
        make(tmp_path, ["localhost"], [])
    broken = subprocess.run([sys.executable, "-c", BROKEN_OFF, tmp_path, before], cwd=CHECKOUT, check=False)
    assert broken.returncode == 9
    made = make(tmp_path, ["localhost"], ["lab"])
    assert made
    assert fits(tmp_path)
    assert make(tmp_path, ["localhost"], ["lab"]) == []


def test_a_damaged_key_of_the_server_is_made_anew(tmp_path: Path) -> None:
    make(tmp_path, ["localhost"], ["lab"])
    (tmp_path / "server.key").write_text("-----BEGIN PRIVATE KEY-----\n")
    make(tmp_path, ["localhost"], [])
    assert fits(tmp_path)


def test_sites_are_added_where_the_key_of_the_server_is_the_containers_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)  # the folders above are pytest's, for its own user alone
    folder = Path("keys")
    make(folder, ["localhost"], ["lab"])
    (folder / "server.key").chmod(0)
    (folder / "sites").chmod(0o777)
    with without_rights():
        made = make(folder, ["localhost"], ["bank"])
    assert made == [folder / "sites" / "bank", folder / "sites" / "bank.pub"]


def test_halves_of_a_sites_key(tmp_path: Path) -> None:
    """The public one follows from the private one, which is not made anew once it is at its site."""
    make(tmp_path, ["localhost"], ["lab"])
    before = contents(tmp_path)
    private, public = tmp_path / "sites" / "lab", tmp_path / "sites" / "lab.pub"
    public.unlink()
    assert make(tmp_path, ["localhost"], ["lab"]) == [public]
    assert contents(tmp_path) == before
    private.unlink()
    assert make(tmp_path, ["localhost"], ["lab"]) == []
    assert public.read_bytes() == before[public]


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


@pytest.mark.parametrize("days", [29, 1])
def test_sites_are_added_without_the_key_of_the_ca_when_the_certificate_ends_soon(
    days: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, ["localhost"], [], days)
    (tmp_path / "ca.key").unlink()
    until = f"{server(tmp_path).not_valid_after_utc:%Y-%m-%d}"
    assert make(tmp_path, ["localhost"], ["lab"]) == [tmp_path / "sites" / "lab", tmp_path / "sites" / "lab.pub"]
    told = f"server.crt is not made anew: it is valid until {until} only, but {tmp_path / 'ca.key'} is not here\n"
    assert capsys.readouterr().err == told


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
    for name in ("keys/sites/lab", "keys/ca.crt", "superexec.secret", "ca.key"):  # as the guide puts them
        assert not subprocess.run(["git", "-C", str(CHECKOUT), "check-ignore", "-q", name], check=False).returncode


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--server", ""], "--server names no host"),
        (["--server", " , "], "--server names no host"),
        (["--server", "https://a.org"], "--server: 'https://a.org' is not allowed; allowed: host names and IP"),
        (["--server", "a.org,b.org:9092"], "--server: 'b.org:9092' is not allowed"),
        (["--server", "10.0.0.300"], "--server: '10.0.0.300' is not allowed"),
        (["--server", "a..org"], "--server: 'a..org' is not allowed"),
        (["--server", "a b"], "--server: 'a b' is not allowed"),
        (["--server", "a-"], "--server: 'a-' is not allowed"),
        (["--server", "ä.org"], "--server: 'ä.org' is not allowed"),
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


def test_names_of_the_server_may_have_spaces_around_them(tmp_path: Path) -> None:
    hosts = " superlink.example.org, 127.0.0.1,::1 , my_host,*.example.org,"
    command = [
        sys.executable,
        "-m",
        "scripts.certificates",
        str(tmp_path),
        "--server",
        hosts,
        "--sites",
        "lab, bank",
    ]
    subprocess.run(command, check=True)
    assert names(tmp_path) == ["superlink.example.org", "127.0.0.1", "::1", "my_host", "*.example.org"]
    assert (tmp_path / "sites" / "bank").exists()
