"""The key pair that every machine of a cluster holds: only a machine that has it can connect."""

from __future__ import annotations

import os
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

from tiler.cluster.missing import explained
from tiler.errors import StorageError, UsageError

CERT, KEY = "cert.pem", "key.pem"
_DAYS = 3650


def make_keys(folder: Path) -> tuple[Path, Path]:
    """Write cert.pem and key.pem into `folder`, readable only by their owner. Raises UsageError if either exists, and
    StorageError."""
    with explained():
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    paths = folder / CERT, folder / KEY
    for path in paths:
        if path.exists():
            raise UsageError(f"{path} exists already; give another folder, or remove it on every machine")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tiler cluster")])
    begin = datetime.now(UTC) - timedelta(days=400)  # clocks of old machines may be a year behind
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + timedelta(days=_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path, text in zip(paths, (certificate.public_bytes(pem), private), strict=True):
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(text)
    except OSError as error:
        raise StorageError(f"{folder}: keys cannot be written ({error.strerror}); give another folder") from error
    return paths


def find_keys(folder: Path) -> tuple[Path, Path]:
    """Return the paths of the certificate and the private key in `folder`. Raises UsageError if a file is missing, if
    the two are no pair, or if others may read the private key."""
    folder = folder.expanduser()
    cert, key = folder / CERT, folder / KEY
    for path in (cert, key):
        if not path.is_file():
            raise UsageError(
                f"{path}: no such file; `tiler cluster keys {folder}` makes a pair, copy it to each machine"
            )
    if key.stat().st_mode & 0o077:
        raise UsageError(f"{key}: other users can read it; run: chmod 600 {key}")
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_cert_chain(cert, key, password="")  # otherwise it asks for a password at the terminal
        context.load_verify_locations(cert)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{folder}: {CERT} and {KEY} are not a pair of keys ({error}); `tiler cluster keys FOLDER` makes one, copy it "
            "to each machine"
        ) from error
    return cert, key
