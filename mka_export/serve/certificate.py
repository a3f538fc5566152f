"""A certificate that vouches for nothing but makes the page a secure context, once the browser's user agrees."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import ipaddress
import ssl
from collections.abc import Collection

from mka_export.errors import ServeError
from mka_export.serve.server import Server

DAYS = 30


def secure(server: Server, names: Collection[str]) -> str:
    """Have ``server`` speak TLS, with a new certificate for ``names`` that nobody else signed.

    Returns:
        the certificate's SHA-256, as browsers show it.

    Raises:
        ServeError: the package that makes certificates is missing.
    """
    try:
        import trustme
    except ImportError:
        raise ServeError("--tls needs the package trustme", "Run: pip install 'mka-export[serve]'") from None
    until = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=DAYS)
    valid = filter(_can_be_certified, names)
    certificate = trustme.CA(organization_name="mka-export serve").issue_cert(*valid, not_after=until)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    # Clients shake hands in their own threads, so that a slow one keeps nobody waiting.
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    der = ssl.PEM_cert_to_DER_cert(certificate.cert_chain_pems[0].bytes().decode("ascii"))
    return ":".join(f"{byte:02X}" for byte in hashlib.sha256(der).digest())


def _can_be_certified(name: str) -> bool:
    import idna

    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    with contextlib.suppress(idna.IDNAError):
        return bool(idna.encode(name, uts46=True))
    return False  # as my_host
