"""Keys and certificates of a deployment: a CA, the server's certificate, a key for each site.

    python -m scripts.certificates FOLDER --server superlink.example.org,10.0.0.5 --sites lab,clinic,bank

makes in FOLDER

    ca.crt               what every site and every user of `flwr` checks the server by
    ca.key               keep it off the server: who has it can pose as the server
    server.crt, .key     for the SuperLink, valid for the names and addresses of --server
    sites/lab, lab.pub   the key of a SuperNode, in OpenSSH's format, and the public half, which is registered
    superexec.secret     for the server: by it a SuperExec is known to a SuperLink of `--isolation process`

Private keys are readable by their owner alone (mode 600). What is there already is kept, so that sites can be
added later; the server's certificate is made anew if its names are others.
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
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_CURVE = ec.SECP384R1()
"""What Flower takes for the keys of SuperNodes; for certificates it serves as well."""
_CA_DAYS = 3650
_SECRET_BYTES = 32
_SITE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


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
        "--days", type=int, default=365, help="that the server's certificate is valid (default: 365)"
    )
    arguments = parser.parse_args()
    try:
        made = make(arguments.folder, _words(arguments.server), _words(arguments.sites), arguments.days)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(f"made {path}" for path in made) or "everything is there already")
    return 0


def make(folder: Path, server: list[str], sites: list[str], days: int = 365) -> list[Path]:
    """Make what is missing; returns what was made.

    Raises:
        ValueError: a name that is not allowed.
        OSError: the folder cannot be written to.
    """
    if not server:
        raise ValueError("--server names no host; the certificate is valid for these names and addresses only")
    if days < 1:
        raise ValueError(f"--days={days} is not allowed; allowed: >= 1")
    for site in sites:
        if not _SITE.fullmatch(site):
            raise ValueError(f"--sites: {site!r:.80} is not allowed; allowed: A-Z a-z 0-9 _ -, at most 64")
    names = [_name(host) for host in server]
    (folder / "sites").mkdir(parents=True, exist_ok=True, mode=0o700)
    made: list[Path] = []
    ca_key, ca = _authority(folder, made)
    _server(folder, names, days, ca_key, ca, made)
    if not (secret := folder / "superexec.secret").exists():
        _write_secret(secret, secrets.token_hex(_SECRET_BYTES).encode())
        made.append(secret)
    for site in sites:
        private, public = folder / "sites" / site, folder / "sites" / f"{site}.pub"
        if not private.exists():
            key = ec.generate_private_key(_CURVE)
            _write_secret(private, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
            public.write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n")
            made += [private, public]
    return made


def _authority(folder: Path, made: list[Path]) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key_path, path = folder / "ca.key", folder / "ca.crt"
    if key_path.exists() and path.exists():
        key = load_pem_private_key(key_path.read_bytes(), password=None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)  # our own
        return key, x509.load_pem_x509_certificate(path.read_bytes())
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
    _write_secret(key_path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.write_bytes(certificate.public_bytes(Encoding.PEM))
    made += [key_path, path]
    return key, certificate


def _server(
    folder: Path,
    names: list[x509.GeneralName],
    days: int,
    ca_key: ec.EllipticCurvePrivateKey,
    ca: x509.Certificate,
    made: list[Path],
) -> None:
    key_path, path = folder / "server.key", folder / "server.crt"
    if key_path.exists() and path.exists():
        old = x509.load_pem_x509_certificate(path.read_bytes())
        if set(old.extensions.get_extension_for_class(x509.SubjectAlternativeName).value) == set(names):
            return
    key = ec.generate_private_key(_CURVE)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, str(names[0].value)[:64])])
    certificate = (
        _builder(subject, ca.subject, key.public_key(), days)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    _write_secret(key_path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.write_bytes(certificate.public_bytes(Encoding.PEM))
    made += [key_path, path]


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
        return x509.DNSName(host)


def _write_secret(path: Path, data: bytes) -> None:
    """Never readable by others, not even while it is written."""
    path.unlink(missing_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


if __name__ == "__main__":
    sys.exit(main())
