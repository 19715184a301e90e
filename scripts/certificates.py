"""Keys and certificates of a deployment: a CA, the server's certificate, a key for each site.

    python -m scripts.certificates FOLDER --server superlink.example.org,10.0.0.5 --sites lab,clinic,bank

makes in FOLDER

    ca.crt               what every site and every user of `flwr` checks the server by
    ca.key               keep it off all these machines: who has it can pose as the server
    server.crt, .key     for the SuperLink, valid for the names and addresses of --server
    sites/lab, lab.pub   the key of a SuperNode, in OpenSSH's format, and the public half, which is registered
    superexec.secret     for the server: by it a SuperExec is known to a SuperLink of `--isolation process`

Private keys are readable by their owner alone (mode 600), and git is told to leave the folder out. What is there
already is kept, so that sites can be added later, for which ca.key and the sites' private keys need not be there.
The server's certificate is made anew, with ca.key, if its names are others, if it is not that of server.key, if it
has less than 30 days left (without ca.key this is only told), or if --days is given.
"""

import argparse
import ipaddress
import os
import re
import secrets
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_CURVE = ec.SECP384R1()
"""What Flower takes for the keys of SuperNodes; for certificates it serves as well."""
_CA_DAYS = 3650
_SERVER_DAYS = 365
_RENEWED_WHEN_LEFT = timedelta(days=30)
_SECRET_BYTES = 32
_SECRET, _PUBLIC = 0o600, 0o644
"""Modes of files."""
_SITE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST = re.compile(rf"(?=.{{1,253}}$)(\*\.)?({_LABEL}\.)*(?!\d+$){_LABEL}")
"""The last label is no number: that would be a wrong IP address."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m scripts.certificates",
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--server", required=True, help="host names and IP addresses of the SuperLink, by commas")
    parser.add_argument("--sites", default="", help="names of sites, by commas")
    parser.add_argument(
        "--days", type=int, help=f"that the server's certificate is valid, from now on (default: {_SERVER_DAYS})"
    )
    arguments = parser.parse_args()
    try:
        made = make(arguments.folder, _words(arguments.server), _words(arguments.sites), arguments.days)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(f"made {path}" for path in made) or "everything is there already")
    return 0


def make(folder: Path, server: list[str], sites: list[str], days: int | None = None) -> list[Path]:
    """Make what is missing; returns what was made. ``days``: make the server's certificate anew, valid for these.

    Raises:
        ValueError: a name that is not allowed, or half of the CA is there and the other half is needed.
        OSError: the folder cannot be written to.
    """
    if not server:
        raise ValueError("--server names no host; the certificate is valid for these names and addresses only")
    if days is not None and days < 1:
        raise ValueError(f"--days={days} is not allowed; allowed: >= 1")
    for site in sites:
        if not _SITE.fullmatch(site):
            raise ValueError(f"--sites: {site!r:.80} is not allowed; allowed: A-Z a-z 0-9 _ -, at most 64")
    names = [_name(host) for host in server]
    (folder / "sites").mkdir(parents=True, exist_ok=True)
    if not (ignored := folder / ".gitignore").exists():
        ignored.write_text("*\n")
    made: list[Path] = []
    _server(folder, names, days, made)
    if not (secret := folder / "superexec.secret").exists():
        _write(secret, secrets.token_hex(_SECRET_BYTES).encode(), _SECRET)
        made.append(secret)
    for site in sites:
        _site(folder / "sites" / site, made)
    return made


def _site(private: Path, made: list[Path]) -> None:
    """A site's key. One of which only the public half is here is at its site, where it belongs."""
    public = private.with_name(f"{private.name}.pub")
    if public.exists():
        return
    if not private.exists():
        new = ec.generate_private_key(_CURVE)
        _write(private, new.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), _SECRET)
        made.append(private)
    key = load_ssh_private_key(private.read_bytes(), password=None)
    _write(public, key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n", _PUBLIC)
    made.append(public)


def _authority(folder: Path, why: str, made: list[Path]) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """The CA, to sign with; made if nothing of one is there: sites that know a CA know no other."""
    key_path, path = folder / "ca.key", folder / "ca.crt"
    if key_path.exists() and path.exists():
        key = load_pem_private_key(key_path.read_bytes(), password=None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)  # our own
        return key, x509.load_pem_x509_certificate(path.read_bytes())
    for missing, other in ((key_path, path), (path, key_path)):
        if other.exists():
            raise ValueError(f"{missing} is not here; it is needed to sign server.crt, because {why}")
    key = ec.generate_private_key(_CURVE)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedpm-flwr deployment CA")])
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        _builder(name, name, key.public_key(), _CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    _write(key_path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), _SECRET)
    _write(path, certificate.public_bytes(Encoding.PEM), _PUBLIC)
    made += [key_path, path]
    return key, certificate


def _server(folder: Path, names: list[x509.GeneralName], days: int | None, made: list[Path]) -> None:
    key_path, path = folder / "server.key", folder / "server.crt"
    why = "--days is given" if days is not None else _why_anew(folder, names)
    if not why:
        until = x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
        if until - datetime.now(UTC) >= _RENEWED_WHEN_LEFT:
            return
        why = f"it is valid until {until:%Y-%m-%d} only"
        if not (folder / "ca.key").exists():  # sites can be added all the same
            print(f"server.crt is not made anew: {why}, but {folder / 'ca.key'} is not here", file=sys.stderr)
            return
    ca_key, ca = _authority(folder, why, made)
    key = ec.generate_private_key(_CURVE)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, str(names[0].value)[:64])])
    certificate = (
        _builder(subject, ca.subject, key.public_key(), days or _SERVER_DAYS)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    _write(key_path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), _SECRET)
    _write(path, certificate.public_bytes(Encoding.PEM), _PUBLIC)
    made += [key_path, path]


def _why_anew(folder: Path, names: list[x509.GeneralName]) -> str:
    """What is wrong with the server's certificate that is there, but for its age; empty: nothing."""
    for name in ("server.crt", "server.key", "ca.crt"):
        if not (folder / name).exists():
            return f"there is no {name}"
    old, ca = (x509.load_pem_x509_certificate((folder / name).read_bytes()) for name in ("server.crt", "ca.crt"))
    try:
        old.verify_directly_issued_by(ca)
    except (InvalidSignature, ValueError, TypeError):
        return "ca.crt is another's"
    if set(old.extensions.get_extension_for_class(x509.SubjectAlternativeName).value) != set(names):
        return "it is valid for other names"
    return "" if _is_key_of(folder / "server.key", old) else "server.key is another's"


def _is_key_of(path: Path, certificate: x509.Certificate) -> bool:
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except PermissionError:
        return True  # it is the containers' user's by now
    except ValueError:  # damaged
        return False
    return key.public_key() == certificate.public_key()


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))  # clocks differ
        .not_valid_after(now + timedelta(days=days))
    )


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if not _HOST.fullmatch(host):
            raise ValueError(
                f"--server: {host!r:.80} is not allowed; allowed: host names and IP addresses, without a port"
            ) from None
        return x509.DNSName(host)


def _write(path: Path, data: bytes, mode: int) -> None:
    """Whole or not at all; never readable by more users than it is to be, not even while it is written."""
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
    part.chmod(mode)  # whatever the umask: users in containers are others than the one who makes it
    part.replace(path)


def _words(text: str) -> list[str]:
    return [stripped for word in text.split(",") if (stripped := word.strip())]


if __name__ == "__main__":
    sys.exit(main())
