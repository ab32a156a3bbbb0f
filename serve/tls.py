"""The certificate that the front door shows, from files."""

from __future__ import annotations

import ssl
from pathlib import Path


class CertificateError(Exception):
    """A certificate or its key is missing, cannot be read, or they do not belong together."""


def certificate_for(folder: Path, certificate: str, key: str) -> Path | None:
    """The certificate, with its key beside it as `NAME.key`; None if none is set.

    Both are links, so that the key is not copied and a renewed certificate is found.

    Args:
        folder: Private to this service.
        certificate: PEM file of the certificate and what links it to its authority; "" for none.
        key: PEM file of its private key, without a passphrase.

    Raises:
        CertificateError: they cannot be used.
    """
    if not certificate and not key:
        return None
    if not certificate or not key:
        raise CertificateError("Set both tls_certificate and tls_key, or neither.")
    try:
        # What is encrypted is not asked for on a terminal: nobody may be there.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key, password="")
    except OSError as error:  # which an SSLError is too
        raise CertificateError(
            f"The certificate {certificate} with the key {key} cannot be used: {error}."
        ) from error
    pem = folder / "front.pem"
    pem.symlink_to(Path(certificate).absolute())
    (folder / "front.pem.key").symlink_to(Path(key).absolute())
    return pem


def context_for(certificate: Path | None) -> ssl.SSLContext | bool:
    """How the service checks its own front door: for this certificate, under whatever name."""
    if certificate is None:
        return True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(certificate)
    return context
